"""Folders of conversions that were killed: each is locked while its writer lives, then removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from pathlib import Path

_NAME = re.compile(r"\.(?P<goal>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>partial|replaced)")


def hidden_names(goal: Path) -> tuple[Path, Path]:
    """Beside ``goal``: where a model is written, and where the one it replaces waits."""
    stem = f".{goal.name}.{os.getpid()}-{secrets.token_hex(4)}"
    return goal.parent / f"{stem}.partial", goal.parent / f"{stem}.replaced"


def lock_folder(folder: Path) -> int:
    """Marks ``folder`` as in use until the descriptor is closed, at the latest by the kernel."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks: the process id must do
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def remove_leftovers(folder: Path) -> None:
    """Removes what killed conversions left in ``folder``; a replaced model without heir returns."""
    try:
        paths = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return
    for path in paths:
        name = _NAME.fullmatch(path.name)
        if name is None or _process_lives(int(name["pid"])) or _is_locked(path):
            continue
        goal = folder / name["goal"]
        if name["kind"] == "replaced" and not os.path.lexists(goal):
            with contextlib.suppress(OSError):
                path.rename(goal)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _process_lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def _is_locked(path: Path) -> bool:
    """Whether a writer holds it, perhaps in another container, whose process ids are not ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return False
    finally:
        os.close(descriptor)
    return False
