"""Exceptions that users see. Each message names the rule, the value found and the way out."""

from __future__ import annotations


class MinflashError(Exception):
    """Base of every error that minflash raises on purpose."""


class ConfigError(MinflashError, ValueError):
    """A model's config.json cannot be used: a missing key, an absurd number, or unsupported."""


class CheckpointError(MinflashError, ValueError):
    """A weight file is damaged, incomplete or of another layout version."""


class ConvertError(MinflashError):
    """A foreign checkpoint cannot be converted."""


class DownloadError(MinflashError):
    """A model could not be fetched."""


class DeviceError(MinflashError, RuntimeError):
    """The requested device is missing, too old or has too little memory."""


class TokenizerError(MinflashError, ValueError):
    """A tokenizer is missing or damaged, or does not fit the model."""


class ContextError(MinflashError, ValueError):
    """A prompt and its answer do not fit the context."""


class ArgumentError(MinflashError, ValueError):
    """An argument of a public function has a value outside its range."""
