"""Notices to the user: the logger "minflash", quiet except for what changes the outcome."""

from __future__ import annotations

import logging
import os

LOG_LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("minflash")


def _set_level(level: str) -> None:
    if level.lower() in LOG_LEVELS:
        logger.setLevel(level.upper())
    elif level:
        logger.warning(
            "MINFLASH_LOG_LEVEL must be one of %s, found %r, which changes nothing; set it to one "
            "of them or unset it",
            ", ".join(LOG_LEVELS),
            level,
        )


_set_level(os.environ.get("MINFLASH_LOG_LEVEL", ""))
_said: set[str] = set()


def say_once(message: str) -> None:
    """A warning through the logger "minflash", once per process."""
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message)
