"""Notices to the user: the logger "minflash", quiet except for what changes the outcome."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("minflash")
_level = getattr(logging, os.environ.get("MINFLASH_LOG_LEVEL", "").upper(), None)
if isinstance(_level, int):
    logger.setLevel(_level)

_said: set[str] = set()


def say_once(message: str) -> None:
    """A warning through the logger "minflash", once per process."""
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message)
