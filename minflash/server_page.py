"""The chat page, one static file."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def load_page() -> tuple[str, str]:
    """The chat page, and the policy that lets a browser run this script and load nothing else."""
    text = (files("minflash") / "web" / "index.html").read_text("utf-8")
    hashes = {}
    for tag in ("script", "style"):
        inside = "".join(re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        hashes[tag] = f"{tag}-src 'sha256-{digest}'"
    policy = (
        *("default-src 'none'", hashes["script"], hashes["style"], "img-src data:"),
        *("connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
    return text, "; ".join(policy)
