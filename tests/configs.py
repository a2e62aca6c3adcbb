"""config.json of each family, with keys changed: helpers of tests."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest

from minflash.config import ModelConfig
from minflash.errors import ConfigError

LLAMA = checkpoints.CASES["llama2"]
MISTRAL = checkpoints.CASES["mistral"]
QWEN2 = checkpoints.CASES["qwen2"]
QWEN3 = checkpoints.CASES["qwen3"]
LEFT_OUT = object()


def changed(base: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """The config with some keys set, or left out."""
    config = {**base, **keys}
    return {key: value for key, value in config.items() if value is not LEFT_OUT}


def parse(base: dict[str, Any] = LLAMA, **keys: Any) -> ModelConfig:
    return ModelConfig.from_hf(changed(base, **keys))


def refused(base: dict[str, Any] = LLAMA, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(base, **keys)
    return str(caught.value)
