"""What a user sees of an upload. Which bytes arrive is tested with the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest

from minflash import upload as subject
from minflash.checkpoint import open_checkpoint
from minflash.device import Device
from minflash.upload import Upload


class NoDevice:
    """Takes bytes and keeps none."""

    def upload(self, address: int, data: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("terminal", "large", "asked", "shown"),
    [
        (True, True, None, True),
        (False, True, None, False),  # stderr is piped: a log gets no bar
        (True, False, None, False),  # over before anyone reads it
        (True, True, False, False),
        (False, False, True, True),
    ],
)
def test_a_large_model_shows_a_bar_on_a_terminal(
    converted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    large: bool,
    asked: bool | None,
    shown: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with open_checkpoint(converted) as checkpoint:
        monkeypatch.setattr(subject, "_BAR_BYTES", checkpoint.nbytes + (not large))
        with Upload(checkpoint, progress=asked) as upload:
            for name in checkpoint.names:
                upload.copy_to(cast(Device, NoDevice()), name, 0)
    error = capsys.readouterr().err
    assert ("loading" in error) == shown and bool(error) == shown
