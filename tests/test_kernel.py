"""The step kernel against the reference, on the emulated device and, where there is one, on a GPU.

The tolerance is that of docs/design.md: twice what rounding to the kernel's types costs, and the
noise of float32 sums. What involves no sum of rounded values must be equal.
"""

from __future__ import annotations

import shutil

import emulator
import numpy as np
import pytest
from emulator import ORDERS
from kernel_cache import fill_cache, read_cache
from kernel_cases import DYNAMIC, LLAMA3, LONGROPE, MODELS, TYPES, YARN
from kernel_models import (
    Machine,
    RandomModel,
    Run,
    assert_within_bound,
    both_references,
    default_kv_type,
    feed,
    model_config,
    random_tokens,
    references,
    two_panels,
)
from seeded_bugs import BUGS, Bug, dropped, symptom

from minflash.config import RopeConfig
from minflash.packing import Layout, dequantize
from minflash.quantize import quantize
from minflash.sampling import Sampling
from minflash.step_model import CHAINED
from minflash.tail import Extras, noted_tokens

pytestmark = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)


def check(machine: Machine, model: RandomModel, run: Run, n: int, widths: tuple[int, ...]) -> None:
    """``n`` tokens from position 0 on, in steps of ``widths``: all logits."""
    tokens = random_tokens(model.config, n)
    logits = feed(machine.open(model, run), tokens, widths)
    assert_within_bound(logits, *references(model, tokens, run.kv_type))


@pytest.mark.parametrize("name", MODELS)
def test_every_type_and_architecture(machine: Machine, name: str) -> None:
    """Positions 0 to 17 one by one, then the edges of blocks within steps of 1, 2, 7 and 8."""
    model = MODELS[name]()
    check(machine, model, Run(), 58, (1,) * 18 + (7, 8, 2, 8, 1, 8, 6))


@pytest.mark.parametrize("grid", [1, 7, None])
@pytest.mark.parametrize("name", ["bf16", "int4 64, 3 layers, windows 40, 0, 9"])
def test_grids(machine: Machine, name: str, grid: int | None) -> None:
    few = machine.kind == "cuda" or grid is None
    for seed, order in enumerate(ORDERS[-1:] if few else ORDERS):
        check(machine, MODELS[name](), Run(grid, order, seed), 40, (1, 8, 2, 1, 7, 1, 8))


@pytest.mark.parametrize("grid, orders", [(1, ORDERS[:2]), (2, ORDERS[1:2]), (7, ORDERS[:2])])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_few_and_many_blocks(
    name: str, grid: int, orders: tuple[emulator.Order, ...]
) -> None:
    """In both orders of warps, of which two blocks have met the first above."""
    machine, model = Machine("emulated"), MODELS[name]()
    for order in orders:
        check(machine, model, Run(grid, order), 12, (1, 8, 1, 2))
    machine.close()


@pytest.mark.parametrize("name", ["bf16", "fp8 64, untied, 5 heads on 1", "int8 32, all biases"])
def test_cp_async(machine: Machine, name: str) -> None:
    """The path of sm_80 to sm_89."""
    for seed, order in enumerate(ORDERS[1:] if machine.kind == "emulated" else ORDERS[:1]):
        check(
            machine,
            MODELS[name](),
            Run(2, order, seed, capability=80, prefetch=3),
            27,
            (1, 8, 2, 1, 7),
        )


@pytest.mark.parametrize(
    "capability, shared_bytes", [(80, 166912), (89, 101376), (90, 232448), (120, 101376)]
)
def test_the_rules_of_tuning(machine: Machine, capability: int, shared_bytes: int) -> None:
    """Rings and stages as on real cards."""
    run = Run(7, "random", capability=capability, shared_bytes=shared_bytes, small=False)
    check(machine, MODELS["int4 32, head_dim 96, q and k norms"](), run, 40, (8, 1, 2, 1, 7))


@pytest.mark.parametrize(
    "type, group, dim, hidden_dim",
    [("bf16", 0, 64, 8192), ("int8", 32, 8192, 64), ("int4", 64, 64, 4160)],
)
def test_wide_matrices(machine: Machine, type: str, group: int, dim: int, hidden_dim: int) -> None:
    """More columns than fit into shared memory eight times over, more rows than partial sums.

    The second panel of 8192 columns is as wide as the first, that of 4160 is narrow.
    """
    config = model_config(dim=dim, hidden_dim=hidden_dim, n_heads=2, n_layers=1, vocab_size=130)
    model = RandomModel(config, type, group)
    check(machine, model, Run(2, "random"), 11, (1, 8, 2))


@pytest.mark.parametrize("type, group", [("bf16", 0), ("int4", 64)])
def test_one_column_in_two_panels(type: str, group: int) -> None:
    """Both are as wide: into a narrower one what comes early is hidden by the order of the ring.

    Emulated only: every GPU has more shared memory, and prefill cannot be built for so little.
    """
    (model, run), machine = two_panels(type, group), Machine("emulated")
    panel_cols = machine.open(model, run).program.maps["step_one"].panel_cols
    assert 2 * panel_cols == model.config.hidden_dim
    check(machine, model, run, 3, (1, 1, 1))
    machine.close()


@pytest.mark.parametrize("kv_type", ["bf16", "fp16"])
@pytest.mark.parametrize("type", ["bf16", "fp16"])
def test_cache_types(machine: Machine, type: str, kv_type: str) -> None:
    model = RandomModel(model_config(), type)
    check(machine, model, Run(kv_type=kv_type), 40, (1, 8, 2, 1, 7))


@pytest.mark.parametrize("rope", [LLAMA3, YARN, DYNAMIC, LONGROPE], ids=lambda rope: rope.kind)
def test_rope_of_the_whole_sequence(machine: Machine, rope: RopeConfig) -> None:
    """A prompt of 50 and its continuation; frequencies may depend on the length."""
    model = RandomModel(model_config(rope=rope), "fp16")
    step, (exact, rounded) = machine.open(model), both_references(model)
    tokens = random_tokens(model.config, 56)
    for begin in range(0, 50, 8):
        step.step(tokens[begin : min(begin + 8, 50)], begin, length=50, head=False)
    for reference in (exact, rounded):
        reference.forward(tokens[:50], 0)
    rows = []
    for position in range(50, 56):
        logits = feed(step, tokens[position : position + 1], (1,), position)
        expected = [r.forward(tokens[position : position + 1], position) for r in (exact, rounded)]
        rows.append((logits[0], *expected))
    assert_within_bound(*(np.stack(column) for column in zip(*rows, strict=True)))


def split_edges(machine: Machine, model: RandomModel, run: Run, lengths: list[int]) -> None:
    """Steps of 1 and of 8 after a random past of each of ``lengths`` positions."""
    step = machine.open(model, run)
    exact, rounded = both_references(model, run.kv_type)
    for length in lengths:
        for width in {1, min(8, model.config.max_context - length)}:
            fill_cache(step, (exact, rounded), length, run.kv_type or default_kv_type(model))
            tokens = random_tokens(model.config, width, length)
            logits = feed(step, tokens, (width,), length)
            expected = [r.forward(tokens, length, all_logits=True) for r in (exact, rounded)]
            assert_within_bound(logits, *expected)


@pytest.mark.parametrize("grid", [2, 7, None])
def test_split_edges(machine: Machine, grid: int | None) -> None:
    """Splits of 2 blocks: edges at multiples of 32 positions, up to the end of the context."""
    lengths = [15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 257, 504, 511]
    split_edges(machine, MODELS["bf16"](), Run(grid), lengths)


def test_blocks_without_rows(machine: Machine) -> None:
    """More blocks than W_qkv has row blocks: splits belong to some that come to attention first."""
    split_edges(machine, MODELS["bf16"](), Run(26, "random"), [0, 100, 330])


@pytest.mark.parametrize("capability", [80, 90])
def test_split_edges_of_the_rules(machine: Machine, capability: int) -> None:
    """Splits by the rules of tuning, several KV heads, a window that begins within a block."""
    config = model_config(
        n_heads=4, n_kv_heads=2, head_dim=128, windows=(0, 200), max_context=1500, n_layers=2
    )
    run = Run(13, "random", capability=capability, small=False)
    lengths = [127, 128, 129, 256, 1023, 1499]
    split_edges(machine, RandomModel(config, "fp16"), run, lengths)


def test_far_positions(machine: Machine) -> None:
    """An angle is exact at any position: the last of 40000."""
    config = model_config(n_layers=1, max_context=40000, windows=(300,), rope=LLAMA3)
    model = RandomModel(config, "fp16")
    split_edges(machine, model, Run(7), [39990, 39999])


@pytest.mark.slow
def test_the_end_of_a_context_of_128k(machine: Machine) -> None:
    """All of it attended to, in splits by the rules of tuning."""
    config = model_config(n_layers=1, n_heads=2, max_context=131072, rope=LLAMA3)
    run = Run(7, small=False)
    split_edges(machine, RandomModel(config, "fp16"), run, [131064, 131071])


def test_rewind(machine: Machine) -> None:
    """Other tokens from an earlier position on replace the former ones."""
    model = MODELS["bf16"]()
    step = machine.open(model)
    first, second = random_tokens(model.config, 45), random_tokens(model.config, 45, 9)
    feed(step, first, (8,))
    for position in (33, 32, 18, 7, 0):
        tokens = first[:position] + second[position:]
        logits = feed(step, tokens[position:], (1, 7, 2, 8), position)
        exact, rounded = references(model, tokens)
        assert_within_bound(logits, exact[position:], rounded[position:])


def test_chained_tokens(machine: Machine) -> None:
    """A launch goes on with the token that the launch before chose, without asking the host."""
    model = MODELS["int4 64, 3 layers, windows 40, 0, 9"]()
    step = machine.open(model)
    tickets = [step.step([5, 6, 7], 0)]
    tickets += [step.step([CHAINED], position) for position in range(3, 20)]
    step.wait()
    tokens = [step.token(ticket) for ticket in tickets]
    logits = feed(machine.open(model), [5, 6, 7, *tokens[:-1]], (3, *(1,) * 17))
    assert tokens == logits[2:].argmax(axis=1).tolist()
    assert len(step.device.launches) == 18  # type: ignore[attr-defined]


def test_steps_without_a_head(machine: Machine) -> None:
    """Prefill computes no logits, and what follows is the same."""
    model = MODELS["int8 32, all biases"]()
    tokens = random_tokens(model.config, 27)
    step, other = machine.open(model), machine.open(model)
    for begin in range(0, 24, 8):
        step.step(tokens[begin : begin + 8], begin, head=False)
    logits = feed(step, tokens[24:], (1,), 24)
    assert (logits == feed(other, tokens, (8, 8, 8, 1, 1, 1))[24:]).all()


def test_bitwise_repeatable(machine: Machine) -> None:
    """In any order of blocks, warps and copies."""
    model = MODELS["int4 64, 3 layers, windows 40, 0, 9"]()
    tokens = random_tokens(model.config, 70)
    runs = [Run(7, order, seed) for seed, order in enumerate(ORDERS)]
    logits = [feed(machine.open(model, run), tokens, (8, 8, 8, 8, 8, 8, 7, 1)) for run in runs]
    assert all((other == logits[0]).all() for other in logits[1:])


# Equal, not only near


def one_hot_matrix(layout: Layout, columns: np.ndarray) -> np.ndarray:
    """float32 [rows, cols] with a single value in each row, so large that every type holds it."""
    values = np.zeros((layout.rows, layout.cols), np.float32)
    values[np.arange(len(columns)), columns] = {"int4": 15, "int8": 127}.get(layout.type, 448)
    return values


def exact_model(type: str, group: int) -> RandomModel:
    """One layer that adds nothing to the residual. Token t < 256 is 16 e_t after the first norm.

    The value that position p writes is then 16 times column tokens[p] of W_v, without any rounding
    of sums; 16 is the root of dim. RoPE does not turn, so the same holds for keys. The last 40
    tokens are random. Weights have 8 significant bits, which fp16 and bf16 caches both hold.
    """
    config = model_config(
        dim=256, hidden_dim=128, head_dim=64, n_heads=4, n_kv_heads=2, vocab_size=296, n_layers=1,
        tied=False, norm_eps=1e-30, rope=RopeConfig("linear", factor=1e30),
    )  # fmt: skip
    model = RandomModel(config, type, group, seed=4)
    embed = dequantize(model.matrix("embed")).copy()
    embed[:256] = one_hot_matrix(Layout(256, 256, type, group), np.arange(256))
    model.put("embed", quantize(embed, type, group, search=False))
    for name in ("wo", "w_down"):
        layout = model.matrices[f"layers.0.{name}"]
        zero = np.zeros((layout.rows, layout.cols), np.float32)
        model.put(f"layers.0.{name}", quantize(zero, type, group, search=False))
    model.put("layers.0.attn_norm", np.ones(256, np.float32))
    return model


@pytest.mark.parametrize("type, group", TYPES)
def test_dequantization_and_the_cache_are_exact(machine: Machine, type: str, group: int) -> None:
    """Every column of W_k and W_v meets the matrix units alone, and lies where it belongs."""
    model = exact_model(type, group)
    step = machine.open(model, kv_type="fp16", max_context=320)
    order = np.random.default_rng(5).permutation(256).tolist()
    empty = read_cache(step)
    feed(step, order[:240], (8,))
    feed(step, order[240:], (1,), 240)
    wqkv = dequantize(model.matrix("layers.0.wqkv")).astype(np.float64)
    for bits, before, first in zip(read_cache(step), empty, (256, 384), strict=True):
        rows = wqkv[first : first + 128].reshape(2, 64, 256)  # [KV head, head_dim, dim]
        expected = (16 * rows[:, :, order]).swapaxes(1, 2).astype(np.float16)
        assert (bits[0, :, :256].view(np.float16) == expected).all()
        assert (bits[0, :, 256:] == before[0, :, 256:]).all()


@pytest.mark.parametrize("type, group", TYPES)
def test_embedding_is_exact(machine: Machine, type: str, group: int) -> None:
    """The residual is the embedding, as the layer adds nothing."""
    model = exact_model(type, group)
    step = machine.open(model, kv_type="fp16", max_context=320)
    tokens = [295, 0, 255, 256, 257, 271, 272, 290]
    feed(step, tokens, (8,))
    residual = np.empty((8, 256), np.float32)
    address = int(step._args["workspace"]) + step.program.workspace["residual"]
    step.device.download(address, residual)
    assert (residual == dequantize(model.matrix("embed"))[tokens]).all()


def test_a_step_writes_its_own_positions_only(machine: Machine) -> None:
    model = MODELS["int8 64, 6 heads on 3"]()
    step = machine.open(model)
    tokens = random_tokens(model.config, 40)
    before, position = read_cache(step), 0
    for width in (8, 7, 1, 1, 2, 8, 8):
        feed(step, tokens[position : position + width], (width,), position)
        after = read_cache(step)
        for old, new in zip(before, after, strict=True):
            changed = (old != new).any(axis=(0, 1, 3)).nonzero()[0]
            assert changed.tolist() == list(range(position, position + width))
        before, position = after, position + width


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_race_and_no_access_outside(sanitizer: emulator.Sanitizer) -> None:
    """Both kernels on 3 blocks, with splits, a window, biases and all filters of sampling."""
    done = emulator.run_sanitized([__file__], sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "within the bound" in done.stdout


def sanitized_steps() -> None:
    """What the sanitized process runs.

    The past ends with a block of the cache: within one, a step's own positions may be stored while
    the copy of the others runs. That race is meant, as what it brings is masked (docs/kernel.md).
    """
    config = model_config(windows=(0, 21), qkv_bias=True, qk_norm=True)
    model = RandomModel(config, "int4", 32, ("int8", 32))
    machine = Machine("emulated")
    split_edges(machine, model, Run(3, "random", prefetch=3), [0, 64, 96])
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=3)
    step = machine.open(model, Run(3, "random", prefetch=3))
    step.token(step.step([5], 0, sampling=sampling))
    step.note_tokens(noted_tokens(config.vocab_size, sampling, [5]))
    mask = np.full(11, 0xFFFFFFFF, np.uint32)
    ticket = step.step([5], 0, sampling=sampling, extras=Extras(True, True, mask, 20))
    step.token(ticket)
    step.logprobs(ticket, 20)
    print("within the bound")


# Bugs are planted once, to see that these tests would notice; docs/kernel.md has the whole table

NAMES = ("stages are not released", "a position too many", "attention: arrivals are not reset")
PLANTED = [bug for bug in BUGS if bug.what.endswith(NAMES)]
PLANTED += [bug for bug in dropped() if "publishes SwiGLU" in bug.what]  # a barrier, a phase


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.what)
def test_planted_bugs_are_noticed(bug: Bug) -> None:
    assert symptom(bug, timeout_s=1) is not None


# Sampling


if __name__ == "__main__":
    sanitized_steps()
