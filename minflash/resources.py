"""Where the files that are not Python lie: the kernel source and the default model's manifest."""

from __future__ import annotations

from pathlib import Path

from .errors import MinflashError

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """The folder ``cuda`` or ``weights``: in an installed package, else beside it in a checkout.

    Raises MinflashError when there is neither: the installation is incomplete.
    """
    installed = _PACKAGE / name
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent
    # site-packages/cuda belongs to other packages: only a folder of ours has a pyproject.toml.
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise MinflashError(
        f"the folder {name!r} of minflash is missing: neither {installed} nor a checkout holds it; "
        "install minflash again"
    )
