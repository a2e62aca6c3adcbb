"""The in-kernel timer, on the emulated device: its marks are ordered and add up to the step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_models import Machine, RandomModel, Run, model_config, tuning

from minflash.profiling import PHASES, as_table, phase_times
from minflash.step_model import StepModel

GRID = 3
STEP_US = 100.0


@pytest.fixture(scope="module")
def profiled() -> StepModel:
    """A model after two steps; one KV head, so that two blocks have no part in attention."""
    model = RandomModel(model_config(), "bf16")
    run = Run(GRID)
    machine = Machine("emulated")
    device = machine.open(model, run).device
    choice = tuning(model, run, device.facts)
    step = StepModel(model, device, 64, tuning=replace(choice, profile=True))
    step.step([1, 2, 3], 0)
    step.step([4], 3)
    return step


def test_marks_are_in_order(profiled: StepModel) -> None:
    marks = profiled.read_profile()
    assert marks.shape == (GRID, 5 * profiled.config.n_layers + 1, 4)
    begin, written = marks[:, :, 0], marks[:, :, 3]
    assert (begin <= written).all() and (written[:, :-1] <= begin[:, 1:]).all()


def test_phases_add_up_to_the_step(profiled: StepModel) -> None:
    times = phase_times(profiled, STEP_US)
    assert [t.phase for t in times] == [*PHASES, "head"]
    assert [t.count for t in times] == [profiled.config.n_layers] * 5 + [1]
    for t in times:
        parts = (t.load_us, t.stream_us, t.write_us, t.stall_us, t.most_work_us, t.total_us)
        assert all(np.isfinite(part) and part > -1e-9 for part in parts)
    assert sum(t.count * t.total_us for t in times) == pytest.approx(STEP_US, rel=1e-9)
    assert len(as_table(times).splitlines()) == len(times) + 1


def test_without_the_timer_there_is_nothing_to_read(profiled: StepModel) -> None:
    plain = Machine("emulated").open(RandomModel(model_config(), "bf16"), Run(GRID))
    with pytest.raises(AssertionError, match="not compiled in"):
        plain.read_profile()
