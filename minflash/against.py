"""``minflash bench --against``: another engine on the same shapes, in the same process.

What runs it lies in tools/ of a checkout, as against_NAME.py with ``NAME``, ``TYPE`` and
``Engine``: neither its code nor its libraries are part of the package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MinflashError

ENGINES = ("transformers",)
_TOOLS = Path(__file__).resolve().parent.parent / "tools"


@dataclass(frozen=True)
class Against:
    """Milliseconds a token of the other engine at one shape and context, weights of ``type``."""

    shape: str
    context: int
    engine: str  # with its version
    type: str
    generate_ms: float  # its generation as it is
    compiled_ms: float  # its compiled step, captured as a graph


def load_tool(name: str) -> Any:
    """The module that runs the engine of that name. Raises MinflashError where it cannot."""
    path = _TOOLS / f"against_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise MinflashError(
            f"--against {name} needs {path.name} in {path.parent}, which only a checkout of "
            "minflash has: run python -m minflash bench in one"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        missing = error.name or error
        raise MinflashError(
            f"--against {name} needs the package {missing} here, which minflash does not install: "
            f"{' '.join(str(error).split())}"
        ) from error
    return module


def measure(
    tool: Any, shapes: Iterable[str], contexts: Iterable[int], steps: int, runs: int
) -> list[Against]:
    """What the engine takes at every context of every shape; one model is there at a time."""
    from .shapes import shape_config

    found, contexts = [], list(contexts)
    for shape in shapes:
        engine = tool.Engine(shape_config(shape))
        try:
            for context in contexts:
                times = (engine.generate_ms(context, steps, runs),
                         engine.compiled_ms(context, steps, runs))  # fmt: skip
                found.append(Against(shape, context, tool.NAME, tool.TYPE, *times))
        finally:
            engine.close()
    return found
