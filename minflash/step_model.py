"""One model on one device: its arenas, and steps of the kernel over them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from . import rope
from .codegen import ALARM_GRID_BARRIER, ALARM_RING, ALARM_WORD, PREFILLS, generate
from .config import ModelConfig
from .device import Device
from .errors import ContextError, DeviceError
from .gpu_memory import cache_block_bytes, cache_blocks, cache_bytes, gpu_context
from .packing import Layout
from .prefill_layout import FEW_TOKENS
from .sampling import Sampling
from .tail import PLAIN, REPORT, Extras, read_report
from .tensors import expected_tensors
from .tuning import MANY_COLUMNS, Tuning, choose
from .workspace import PROFILE_MARKS

if TYPE_CHECKING:
    from .choosing import TopLogprobs

CHAINED = -1  # the token that the launch before chose
GREEDY = Sampling()
_MAILBOX_SLOTS = 64
_WATCHDOG_NS = 500_000_000
_SPIN_SECONDS, _SLEEP_SECONDS = 0.001, 0.00005
_STALL_SECONDS = 5.0  # without a token before the stream is asked for errors


class Weights(Protocol):
    """What a StepModel needs of a model's weights."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def matrices(self) -> Mapping[str, Layout]: ...

    def copy_to(self, device: Device, name: str, address: int) -> None:
        """Copies a tensor's bytes to the device."""
        ...


class StepModel:
    """Launches steps; knows nothing of text. Used by one thread at a time."""

    def __init__(
        self,
        checkpoint: Weights,
        device: Device,
        max_context: int | None,
        *,
        kv_type: str | None = None,
        tuning: Tuning | None = None,
        watchdog_ns: int = _WATCHDOG_NS,
    ) -> None:
        """max_context: positions; None: the model's own, bounded by the device's free memory.
        kv_type: "bf16" or "fp16"; None: what the layers' activations are rounded to.

        Raises DeviceError when the model does not fit or the kernel cannot run it, ContextError
        when ``max_context`` is too much, and what ``checkpoint.copy_to`` raises.
        """
        self.config, self.device = checkpoint.config, device
        self.matrices = dict(checkpoint.matrices)
        config = self.config
        if kv_type is None:
            kv_type = "bf16" if checkpoint.matrices["layers.0.wqkv"].type == "bf16" else "fp16"
        self.kv_type = kv_type
        tuning = tuning or choose(config, checkpoint.matrices, device.facts)
        self.program = generate(
            config, checkpoint.matrices, tuning, kv_type=kv_type, max_context=max_context
        )
        self.max_context = gpu_context(config, self.program, device.free_bytes(), max_context)
        try:
            kernels = device.build(self.program)  # compiles while the weights are uploaded
            self._args = np.zeros((), self.program.args)
            self._allocate(watchdog_ns)
            for name, offset in self.program.weights.offsets.items():
                checkpoint.copy_to(device, name, self._weights + offset)
            self._launch = dict(kernels)
        except BaseException:
            device.release()
            raise
        self._ticket = self._arrivals = 0
        self._phases = 1  # zero is what words hold at first
        self._launching = False
        self._rope_length = 0
        self._prefilled = (0, 0)  # position and number of the tokens that prefill read last

    def _allocate(self, watchdog_ns: int) -> None:
        """The arenas, and all launch arguments that stay."""
        device, args = self.device, self._args
        weight_bytes, workspace_bytes = self.program.weights.nbytes, self.program.workspace["total"]
        kv_bytes = cache_bytes(self.config, self.max_context)
        self.nbytes = weight_bytes + kv_bytes + workspace_bytes
        self._weights = args["weights"] = device.allocate(weight_bytes)
        self._workspace = args["workspace"] = device.allocate(workspace_bytes)
        args["kv_cache"] = kv_cache = device.allocate(kv_bytes)
        device.clear(kv_cache, kv_bytes)
        device.clear(self._workspace, workspace_bytes)
        mailbox, self._mailbox_address = device.pinned(8 * _MAILBOX_SLOTS)
        alarm, alarm_address = device.pinned(32)
        self._mailbox, self._alarm = mailbox.view(np.uint64), alarm.view(np.uint32)
        reports, self._reports_address = device.pinned(REPORT.itemsize * _MAILBOX_SLOTS)
        self._reports = reports.view(REPORT)
        args["alarm"], args["watchdog_ns"] = alarm_address, watchdog_ns
        args["kv_layer_bytes"] = kv_bytes // self.config.n_layers
        args["max_blocks"] = cache_blocks(self.max_context)
        args["prefill_tokens"] = self.program.prefill_tokens

    def step(
        self,
        tokens: Sequence[int],
        position: int,
        *,
        length: int | None = None,
        head: bool = True,
        logits: bool = False,
        sampling: Sampling = GREEDY,
        extras: Extras = PLAIN,
        resumes: bool = False,
    ) -> int:
        """Launches one step and returns its ticket; does not wait.

        tokens: 1 to 8 token ids at ``position`` and after it, or [CHAINED]. length: of the sequence
        that RoPE is for (default: up to the last token). head: compute logits and choose a token.
        logits: keep the logits of all columns. extras: of choosing the token. resumes: the token is
        the last one of the ``prefill`` just before, of which only the last layer and the head are
        left to do.
        Raises ContextError past the end of the cache.
        """
        n = len(tokens)
        if not 1 <= n <= MANY_COLUMNS:
            raise AssertionError(f"a step takes 1 to {MANY_COLUMNS} tokens, not {n}")
        self._begin(position, n, length)
        self._ticket = (self._ticket + 1) & 0xFFFFFFFF
        args = self._args
        args["tokens"][:n] = tokens
        args["head"], args["logits"] = head, logits
        args["resumed"] = self._residual_of(position) if resumes else 0
        self._set_sampling(sampling)
        self._set_extras(extras)
        slot = self._ticket % _MAILBOX_SLOTS
        args["ticket"], args["mailbox"] = self._ticket, self._mailbox_address + 8 * slot
        args["report"] = self._reports_address + REPORT.itemsize * slot
        ranks = head and (sampling.filters or extras.logprobs is not None)
        self._run("step_one" if n == 1 else "step_many", ranks=ranks)
        return self._ticket

    def prefill(self, tokens: Sequence[int], position: int, *, length: int | None = None) -> None:
        """Launches one read of many tokens; does not wait.

        It fills the cache, and leaves what a step with ``resumes`` goes on from.

        tokens: 1 to ``prefill_tokens`` ids at ``position`` and after it; length: as for a step.
        Raises ContextError past the end of the cache.
        """
        n, most = len(tokens), self.prefill_tokens
        if not 1 <= n <= most:
            raise AssertionError(f"one launch reads 1 to {most} tokens of a prompt, not {n}")
        self._begin(position, n, length)
        few = n <= FEW_TOKENS
        if few:
            self._args["tokens"][:n] = tokens
        else:
            place = self._workspace + self.program.workspace["prefill"]
            self.device.upload(place, np.array(tokens, np.int32))
        self._prefilled = position, n
        self._run(PREFILLS[few])

    def _residual_of(self, position: int) -> int:
        """Address of what the last ``prefill`` left of a token before the last layer."""
        begin, n = self._prefilled
        if not begin <= position < begin + n:
            raise AssertionError(f"position {position} is not of the last prefill: {begin}, {n}")
        row = 4 * self.config.dim * (position - begin)
        return self._workspace + self.program.prefill_residual + row

    @property
    def prefill_tokens(self) -> int:
        """Most tokens of one ``prefill``; 0: there is none."""
        return self.program.prefill_tokens

    def _begin(self, position: int, n: int, length: int | None) -> None:
        """The arguments of all launches for ``n`` tokens at ``position``."""
        if position + n > self.max_context:
            raise ContextError(
                f"position {position + n - 1} is past the context of {self.max_context} positions"
            )
        self._set_rope(length or position + n)
        self._args["position"], self._args["n_columns"] = position, n

    def _run(self, kernel: str, *, ranks: bool = False) -> None:
        """Launches a kernel, and counts its phases and its arrivals at the grid barrier."""
        if self._launching:  # an interrupt left open whether the last launch happened
            self._reset_barrier()
        self._args["barrier_base"] = self._arrivals & 0xFFFFFFFF
        self._args["first_phase"] = self._phases & 0xFFFFFFFF
        self._phases += self.program.phases
        self._launching = True
        self._launch[kernel](self._args)
        barriers = self.program.barriers_of(kernel, ranks=ranks)
        self._arrivals += barriers * self.program.tuning.grid
        self._launching = False

    def token(self, ticket: int) -> int:
        """Waits for the token that the step ``ticket`` chose, or NO_TOKEN or EXCLUDED of tail.py.

        Raises DeviceError when a wait in the step timed out.
        """
        slot = ticket % _MAILBOX_SLOTS
        mailbox, alarm = self._mailbox, self._alarm
        begin, stalled = time.perf_counter(), _STALL_SECONDS
        while int(mailbox[slot]) >> 32 != ticket or alarm[0]:
            if alarm[0]:
                self._report_alarm()
            waited = time.perf_counter() - begin
            # At first only lets other threads run: sleeping takes longer than a short step.
            time.sleep(0 if waited < _SPIN_SECONDS else _SLEEP_SECONDS)
            if waited > stalled:
                self.device.synchronize()  # raises what went wrong, if anything did
                if int(mailbox[slot]) >> 32 != ticket and not alarm[0]:
                    raise DeviceError(f"step {ticket} ended without a token; load the model again")
        return int(mailbox[slot]) & 0xFFFFFFFF

    def logprobs(self, ticket: int, n: int) -> tuple[float, TopLogprobs]:
        """The chosen token's log-probability and those of the n likeliest.

        Of a step with ``Extras.logprobs``, after its ``token`` and before 64 more steps.
        """
        report = self._reports[ticket % _MAILBOX_SLOTS]
        return read_report(report, min(n, self.config.vocab_size))

    def note_tokens(self, noted: NDArray[np.uint32]) -> None:
        """What ``Extras.adjust`` goes by from the next step on: see ``tail.noted_tokens``.

        The kernel counts the tokens that such steps choose.
        """
        self.device.upload(self._workspace + self.program.workspace["noted"], noted)

    def wait(self) -> None:
        """Waits for all steps. Raises DeviceError when a wait in one timed out."""
        self.device.synchronize()
        if self._alarm[0]:
            self._report_alarm()

    def read_logits(
        self, n_columns: int, into: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Logits float32 [n_columns, vocab_size] of the last step with logits=True; waits.

        into: a contiguous array to fill in place of a new one.
        """
        self.wait()
        if into is None:
            into = np.empty((n_columns, self.config.vocab_size), np.float32)
        self.device.download(self._workspace + self.program.workspace["logits"], into)
        return into

    def read_residual(self, n_columns: int) -> NDArray[np.float32]:
        """What the last layer of the last step gave: float32 [n_columns, dim]; waits."""
        self.wait()
        workspace, dim = self.program.workspace, self.config.dim
        if n_columns == 1:
            words = np.empty((1, dim), np.uint64)  # the value lies below the number of its phase
            self.device.download(self._workspace + workspace["residual_words"], words)
            return words.astype(np.uint32).view(np.float32)
        residual = np.empty((n_columns, dim), np.float32)
        self.device.download(self._workspace + workspace["residual"], residual)
        return residual

    def read_vector(self, name: str) -> NDArray[np.float32]:
        """A vector of the weights, such as final_norm: float32 [its length]; waits."""
        vector = np.empty(expected_tensors(self.config)[name], np.float32)
        self.device.download(self._weights + self.program.weights.offsets[name], vector)
        return vector

    def read_profile(self) -> NDArray[np.uint64]:
        """The marks of the last step, uint64 [blocks, phases, marks] in ticks; waits for it.

        Raises AssertionError unless the kernels were compiled with ``Tuning.profile``.
        """
        assert self.program.tuning.profile, "the in-kernel timer is not compiled in"
        self.wait()
        phases = self.program.phases - 1  # the embedding is not timed
        marks = np.empty((self.program.tuning.grid, phases, PROFILE_MARKS), np.uint64)
        self.device.download(self._workspace + self.program.workspace["profile"], marks)
        return marks

    def read_cache(self, blocks: int) -> NDArray[np.uint8]:
        """The first blocks of keys and values as they lie there; waits.

        Returns uint8 [n_layers, n_kv_heads, blocks, block_bytes].
        """
        self.wait()
        config = self.config
        shape = config.n_layers, config.n_kv_heads, blocks, cache_block_bytes(config)
        cache = np.empty(shape, np.uint8)
        for (layer, head), address in self._cache_rows():
            self.device.download(address, cache[layer, head])
        return cache

    def write_cache(self, cache: NDArray[np.uint8]) -> None:
        """The inverse of ``read_cache``; waits."""
        for (layer, head), address in self._cache_rows():
            self.device.upload(address, cache[layer, head])
        self.wait()

    def clear_cache(self) -> None:
        """Zeroes all keys and values, for after a step that may have left some that are not finite.

        A block of positions is read as a whole, and zero times what is not finite is not zero.
        """
        args = self._args
        nbytes = int(args["kv_layer_bytes"]) * self.config.n_layers
        self.device.clear(int(args["kv_cache"]), nbytes)

    def _cache_rows(self) -> Iterator[tuple[tuple[int, int], int]]:
        """(layer, KV head) and the address of its first block."""
        config, args = self.config, self._args
        begin, layer_bytes = int(args["kv_cache"]), int(args["kv_layer_bytes"])
        head_bytes = int(args["max_blocks"]) * cache_block_bytes(config)
        for layer, head in np.ndindex(config.n_layers, config.n_kv_heads):
            yield (layer, head), begin + layer * layer_bytes + head * head_bytes

    def close(self) -> None:
        """Gives back all memory of the device; the model cannot be used any more."""
        try:
            self.device.synchronize()
        finally:
            self._launch.clear()  # lets go of the compiled kernels
            self._mailbox = self._alarm = self._reports = np.zeros(0, np.uint64)
            self.device.release()

    def _set_rope(self, length: int) -> None:
        config = self.config
        if self._rope_length and config.rope.kind not in rope.LENGTH_DEPENDENT:
            return
        if length != self._rope_length:
            inverse, scaling = rope.frequencies(
                config.rope, config.head_dim, length, config.max_context
            )
            self._args["rope_turns"] = [int(math.ldexp(f / (2 * math.pi), 64)) for f in inverse]
            self._args["rope_scale"] = scaling
            self._rope_length = length

    def _set_sampling(self, sampling: Sampling) -> None:
        args = self._args
        args["greedy"], args["seed"] = sampling.greedy, sampling.seed or 0
        args["temperature"] = sampling.temperature
        args["filters"], args["top_k"] = sampling.filters, sampling.top_k
        args["top_p"], args["min_p"] = sampling.top_p, sampling.min_p
        args["repetition"] = sampling.repetition_penalty
        args["presence"] = sampling.presence_penalty
        args["frequency"] = sampling.frequency_penalty

    def _set_extras(self, extras: Extras) -> None:
        args = self._args
        args["adjust"], args["ban_ends"] = extras.adjust, extras.ban_ends
        args["logprobs"] = -1 if extras.logprobs is None else extras.logprobs
        args["mask"] = extras.mask is not None
        if extras.mask is not None:
            self.device.upload(self._workspace + self.program.workspace["mask"], extras.mask)

    def _reset_barrier(self) -> None:
        """Waits for all launches and sets what blocks count arrivals with back to zero."""
        self.device.synchronize()
        self.device.clear(self._workspace, self.program.workspace["residual"])
        self._arrivals, self._launching = 0, False

    def _report_alarm(self) -> None:
        """Turns an alarm into an exception and makes the model usable again."""
        kind, block, phase, expected, seen = (int(word) for word in self._alarm[:5])
        self._reset_barrier()  # the abandoned step runs to its end on its own
        self.clear_cache()
        self._alarm[:] = 0
        limit = int(self._args["watchdog_ns"]) / 1e9
        what = {
            ALARM_GRID_BARRIER: "grid barrier",
            ALARM_RING: "stage of the ring",
            ALARM_WORD: "result of another block",
        }[kind]
        raise DeviceError(
            f"a wait in the step kernel took longer than {limit:g} s: {what}, block {block}, "
            f"phase {phase}, expected {expected}, seen {seen}; the step was abandoned, the model "
            "can be used again"
        )
