"""The step kernel as an engine: prompts in chunks, then steps launched ahead of the reader.

A generated token stays on the device and feeds the next launch; the host reads it from pinned
memory while the following steps run already, so that the GPU never waits for Python. Only with a
grammar, whose mask depends on the token before, each step waits for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .cache_state import CacheLayout, CacheState
from .choosing import Chooser, none_allowed
from .codegen import generate
from .errors import DeviceError, MinflashError
from .gpu_memory import BLOCK_POSITIONS, cache_block_bytes, step_bytes
from .kept import KeptTokens
from .reference import rms_norm
from .step_model import CHAINED, StepModel
from .tail import EXCLUDED, NO_TOKEN, PLAIN, Extras, noted_tokens
from .tuning import MANY_COLUMNS, DeviceFacts, Tuning, choose
from .upload import Upload

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .device import Device
    from .engine import Cancelled, Choose
    from .sampling import Sampling

LARGEST_CARD = DeviceFacts(compute_capability=90, multiprocessors=132, shared_bytes=232448)
# Steps launched before the token of the one before them is read. They run on after a cancel.
AHEAD = 2
QUEUED_CHUNKS = 8  # steps of a prompt that are launched before the host looks up
LEAST_PREFILL = 17  # tokens of a prompt that are not read by steps: those of three steps


def model_problem(checkpoint: Checkpoint) -> str | None:
    """Why the kernel cannot run this model on any GPU; None when it can."""
    try:
        tuning = choose(checkpoint.config, checkpoint.matrices, LARGEST_CARD)
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
        self.peak_memory_bytes, self._matrices = model.nbytes, model.matrices
        self._bus: float | None = getattr(model.device, "bus_gb_per_s", None)
        self.forwarded = self.reused = 0
        self._kept = KeptTokens(model.config)
        self._columns = 0  # of the step that was launched last

    def tokens(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        count: int,
        *,
        choose: Choose | None = None,
        cancelled: Cancelled | None = None,
    ) -> Generator[int, None, None]:
        cancelled = cancelled or (lambda: False)
        try:
            if choose is not None and not isinstance(choose, Chooser):
                yield from self._chosen(prompt, choose, count, cancelled)
            elif choose is not None and choose.constraint is not None:
                yield from self._masked(prompt, choose, count, cancelled)
            else:
                yield from self._launched_ahead(prompt, sampling, choose, count, cancelled)
        except Exception:
            self._forget()  # nobody knows what a step that failed has written
            raise

    def _launched_ahead(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        chooser: Chooser | None,
        count: int,
        cancelled: Cancelled,
    ) -> Iterator[int]:
        """The kernel chooses, and its token feeds the next step without the host."""
        model = self._open_model()
        ticket = self._read_prompt(prompt, cancelled, **self._choice(sampling, chooser, 0))
        if ticket is None:
            return
        tickets = deque([ticket])
        launch, end = len(prompt), len(prompt) + count - 1  # the last token is never read
        for position in range(len(prompt), len(prompt) + count):
            while launch < end and len(tickets) <= AHEAD:
                # Steps that nobody asks for any more run to their end: what they leave in the
                # cache is written again before it is read.
                options = self._choice(sampling, chooser, launch + 1 - len(prompt))
                tickets.append(model.step([CHAINED], launch, **options))
                launch += 1
            token = self._token(tickets.popleft(), chooser, position)
            if position < launch:
                self._note([token], position + 1)
            yield token
            if cancelled():
                return

    def _masked(
        self, prompt: Sequence[int], chooser: Chooser, count: int, cancelled: Cancelled
    ) -> Iterator[int]:
        """The kernel chooses within a mask that depends on the token before."""
        options = self._choice(chooser.sampling, chooser, 0)
        ticket, end = self._read_prompt(prompt, cancelled, **options), len(prompt) + count
        for position in range(len(prompt), end):
            if ticket is None:
                return
            token = self._token(ticket, chooser, position)
            yield token
            if position + 1 == end or cancelled():
                return  # the last token is never read
            options = self._choice(chooser.sampling, chooser, position + 1 - len(prompt))
            ticket = self._step([token], position, **options)

    def _chosen(
        self, prompt: Sequence[int], choose: Choose, count: int, cancelled: Cancelled
    ) -> Iterator[int]:
        """A function on the host chooses from the logits: each step waits for it."""
        model = self._open_model()
        if self._read_prompt(prompt, cancelled, logits=True) is None:
            return
        end = len(prompt) + count
        for position in range(len(prompt), end):
            token = choose(model.read_logits(self._columns)[-1], position)
            yield token
            if position + 1 == end or cancelled():
                return  # the last token is never read
            self._step([token], position, logits=True)

    def _choice(self, sampling: Sampling, chooser: Chooser | None, place: int) -> dict[str, Any]:
        """Options of the step that chooses token ``place`` of the answer."""
        if chooser is None:
            return {"sampling": sampling, "extras": PLAIN}
        sampling = chooser.sampling
        if place == 0 and sampling.adjusts:
            noted = noted_tokens(
                self.config.vocab_size, sampling, chooser.prompt, chooser.answer, chooser.ends
            )
            self._open_model().note_tokens(noted)
        extras = Extras(
            adjust=sampling.adjusts,
            ban_ends=place < sampling.min_tokens,
            mask=None if chooser.constraint is None else chooser.constraint.bits(),
            logprobs=chooser.asked,
        )
        return {"sampling": sampling, "extras": extras}

    def _token(self, ticket: int, chooser: Chooser | None, position: int) -> int:
        """Waits for a step's token; the chooser goes on with it."""
        model = self._open_model()
        token = model.token(ticket)
        if token == EXCLUDED and chooser is not None:
            raise none_allowed(position)
        if token in (NO_TOKEN, EXCLUDED):
            raise MinflashError(
                f"the model gave no finite logit (position {position}): its weights are "
                "damaged or overflow; check the checkpoint, or convert it again"
            )
        if chooser is not None and chooser.asked is not None:
            chooser.took(token, *model.logprobs(ticket, chooser.asked))
        elif chooser is not None:
            chooser.took(token)
        return token

    def logit_parts(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        for begin in range(0, len(tokens), MANY_COLUMNS):
            part = tokens[begin : begin + MANY_COLUMNS]
            self._step(part, begin, length=len(tokens), logits=True)
            yield self._finite(self._open_model().read_logits(len(part)))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        logits = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for begin in range(0, len(tokens), MANY_COLUMNS):
            part = tokens[begin : begin + MANY_COLUMNS]
            self._step(part, begin, length=len(tokens), logits=True)
            self._open_model().read_logits(len(part), into=logits[begin : begin + len(part)])
        return self._finite(logits)

    def hidden(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        model = self._open_model()
        residual = np.empty((len(tokens), self.config.dim), np.float32)
        for begin in range(0, len(tokens), MANY_COLUMNS):
            part = tokens[begin : begin + MANY_COLUMNS]
            self._step(part, begin, length=len(tokens), head=False)
            residual[begin : begin + len(part)] = model.read_residual(len(part))
        weight = model.read_vector("final_norm")
        self._finite(residual)
        hidden: NDArray[np.float32] = rms_norm(residual, weight, self.config.norm_eps)
        return hidden

    def bandwidth(self, steps_per_s: float, position: int) -> tuple[float, float | None]:
        """GB/s that so many steps a second at a position read, and per cent of the card's bus."""
        speed = steps_per_s * step_bytes(self.config, self._matrices, position) / 1e9
        return speed, 100 * speed / self._bus if self._bus else None

    def reset(self) -> None:
        self._kept.cut(0)

    def _forget(self) -> None:
        """Empties the cache, of which some may not be finite."""
        self._kept.cut(0)
        with suppress(DeviceError):  # after another error, which is the one to tell
            self._open_model().clear_cache()

    def _finite(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """``rows``, one a token. Where one is not finite as a whole, the cache is emptied."""
        if not np.isfinite(rows[:, 0]).all():
            self._forget()
        return rows

    def save_cache(self) -> CacheState:
        kept, blocks = self._kept, -(-len(self._kept) // BLOCK_POSITIONS)
        tensors = {"cache": self._open_model().read_cache(blocks)}
        return CacheState(self.cache_layout, list(kept.ids), list(kept.rope_keys), tensors)

    def load_cache(self, state: CacheState) -> None:
        state.check(self.cache_layout, self.max_context)
        self._kept.cut(0)
        self._open_model().write_cache(state.tensors["cache"])
        self._kept.replace(state.ids, state.rope_keys)

    def close(self) -> None:
        """Gives back all memory of the GPU. May be called twice."""
        if self._model is not None:
            self._model.close()
            self._model = None

    def _read_prompt(self, prompt: Sequence[int], cancelled: Cancelled, **last: Any) -> int | None:
        """Launches what reads the prompt, from where the cache does not hold it.

        last: options of the step at its end, which chooses a token. Returns its ticket, or None
        when cancelled. The kernels depend on the prompt alone, and not on what the cache holds, so
        that asking the same prompt again gives the same bits.
        """
        shared = self._kept.shared(prompt)
        if len(prompt) >= LEAST_PREFILL and self._open_model().prefill_tokens:
            return self._prefill(prompt, shared, cancelled, last)
        return self._read_in_steps(prompt, shared, cancelled, last)

    def _read_in_steps(
        self, prompt: Sequence[int], shared: int, cancelled: Cancelled, last: dict[str, Any]
    ) -> int | None:
        ticket = 0
        self.reused = shared // MANY_COLUMNS * MANY_COLUMNS  # the pieces of a fresh start
        for number, begin in enumerate(range(self.reused, len(prompt), MANY_COLUMNS), start=1):
            part = prompt[begin : begin + MANY_COLUMNS]
            options = last if begin + len(part) == len(prompt) else {"head": False}
            ticket = self._step(part, begin, length=len(prompt), **options)
            if number % QUEUED_CHUNKS == 0 and options is not last:
                self._open_model().wait()  # so that there is something to cancel
            if cancelled():
                return None
        return ticket

    def _prefill(
        self, prompt: Sequence[int], shared: int, cancelled: Cancelled, last: dict[str, Any]
    ) -> int | None:
        """Many tokens a launch, in any pieces the same bits; a step ends the last token."""
        model, end = self._open_model(), len(prompt) - 1
        self.reused = begin = shared
        while begin <= end:
            part = prompt[begin : begin + model.prefill_tokens]
            self._kept.cut(begin)
            model.prefill(part, begin, length=len(prompt))
            self._note(prompt[begin : min(begin + len(part), end)], len(prompt))
            begin += len(part)
            if begin <= end:
                model.wait()  # so that there is something to cancel
            if cancelled():
                return None
        return self._step(prompt[end:], end, length=len(prompt), resumes=True, **last)

    def _step(self, tokens: Sequence[int], position: int, **options: Any) -> int:
        """Launches a step, and keeps the books of what the cache holds."""
        self._kept.cut(position)
        self._columns = len(tokens)
        ticket = self._open_model().step(tokens, position, **options)
        self._note(tokens, options.get("length") or position + len(tokens))
        return ticket

    def _note(self, tokens: Sequence[int], length: int) -> None:
        self._kept.add(tokens, length)
        self.forwarded += len(tokens)

    @property
    def cache_layout(self) -> CacheLayout:
        config = self.config
        shape = (config.n_layers, config.n_kv_heads, -1, cache_block_bytes(config))
        name = f"cuda-blocks-{self._open_model().kv_type}-2"
        return CacheLayout(name, {"cache": ("U8", shape)}, block=BLOCK_POSITIONS)

    def _open_model(self) -> StepModel:
        if self._model is None:
            raise DeviceError("this engine is closed; load the model again")
        return self._model
