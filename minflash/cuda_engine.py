"""The step kernel as an engine: prompts in chunks, then steps launched ahead of the reader.

A generated token stays on the device and feeds the next launch; the host reads it from pinned
memory while the following steps run already, so that the GPU never waits for Python.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .codegen import generate
from .errors import DeviceError, MinflashError
from .step_model import CHAINED, GREEDY, NO_TOKEN, StepModel
from .tuning import MANY_COLUMNS, DeviceFacts, Tuning, choose
from .upload import Upload

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .device import Device
    from .sampling import Sampling

LARGEST_CARD = DeviceFacts(compute_capability=90, multiprocessors=132, shared_bytes=232448)
AHEAD = 4  # steps launched before the token of the one before them is read


def model_problem(checkpoint: Checkpoint) -> str | None:
    """Why the kernel cannot run this model on any GPU; None when it can."""
    try:
        tuning = choose(checkpoint.config, LARGEST_CARD)
        generate(checkpoint.config, checkpoint.matrices, tuning)
    except DeviceError as error:
        return str(error)
    return None


class CudaEngine:
    """One model on one GPU. Not safe for use by several threads at once: LLM holds a lock."""

    device = "cuda"

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_context: int | None = None,
        *,
        device: Device | None = None,
        tuning: Tuning | None = None,
        progress: bool = True,
    ) -> None:
        """Everything is uploaded here: the checkpoint may be closed afterwards.

        ``max_context`` in positions; None: the model's own, bounded by the free GPU memory.
        ``device``: None for CuPy's current one. ``progress``: a bar for a large model, where stderr
        is a terminal. Raises ContextError when ``max_context`` is more
        than the model or the memory allows, DeviceError when the model does not fit the GPU.
        """
        if device is None:
            from .device import CudaDevice

            device = CudaDevice()
        with Upload(checkpoint, progress=None if progress else False) as upload:
            self._take(StepModel(upload, device, max_context, tuning=tuning))

    @classmethod
    def over(cls, model: StepModel) -> CudaEngine:
        """An engine over a model that is on its device already; closes it in the end."""
        engine = cls.__new__(cls)
        engine._take(model)
        return engine

    def _take(self, model: StepModel) -> None:
        self._model: StepModel | None = model
        self.config, self.max_context = model.config, model.max_context
        self.peak_memory_bytes = model.nbytes

    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, count: int
    ) -> Generator[int, None, None]:
        model = self._open_model()
        tickets = deque([self._read_prompt(model, prompt, sampling)])
        launch, end = len(prompt), len(prompt) + count - 1  # the last token is never read
        for position in range(len(prompt), len(prompt) + count):
            while launch < end and len(tickets) <= AHEAD:
                # Steps that nobody asks for any more run to their end: what they leave in the
                # cache is written again before it is read.
                tickets.append(model.step([CHAINED], launch, sampling=sampling))
                launch += 1
            token = model.token(tickets.popleft())
            if token == NO_TOKEN:
                raise MinflashError(
                    f"the model gave no finite logit (position {position}): its weights are "
                    "damaged or overflow; check the checkpoint, or convert it again"
                )
            yield token

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        model = self._open_model()
        logits = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for begin in range(0, len(tokens), MANY_COLUMNS):
            part = tokens[begin : begin + MANY_COLUMNS]
            model.step(part, begin, length=len(tokens), logits=True)
            model.read_logits(len(part), into=logits[begin : begin + len(part)])
        return logits

    def close(self) -> None:
        """Gives back all memory of the GPU. May be called twice."""
        if self._model is not None:
            self._model.close()
            self._model = None

    @staticmethod
    def _read_prompt(model: StepModel, prompt: Sequence[int], sampling: Sampling) -> int:
        """Launches the steps that read the prompt; returns the ticket of its next token."""
        ticket = 0
        for begin in range(0, len(prompt), MANY_COLUMNS):
            part = prompt[begin : begin + MANY_COLUMNS]
            last = begin + len(part) == len(prompt)
            ticket = model.step(
                part, begin, length=len(prompt), head=last, sampling=sampling if last else GREEDY
            )
        return ticket

    def _open_model(self) -> StepModel:
        if self._model is None:
            raise DeviceError("this engine is closed; load the model again")
        return self._model
