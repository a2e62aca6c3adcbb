"""The generated source: one string, the same for the same model, with NumPy's launch arguments."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import emulator
import pytest
from emulator import EmulatedModule, EmulatorError
from kernel_models import RandomModel, model_config

from minflash.codegen import PREFILLS, Program, generate, join_sources
from minflash.errors import DeviceError
from minflash.resources import resource_dir
from minflash.tuning import DeviceFacts, Tuning, choose

FACTS = DeviceFacts(90, 7, 232448)
needs_compiler = pytest.mark.skipif(
    shutil.which(emulator.compiler()) is None, reason="the emulated device needs g++"
)


def program(model: RandomModel | None = None, **changes: int | bool) -> Program:
    model = model or RandomModel(model_config(), "bf16")
    tuning = choose(model.config, model.matrices, FACTS, **changes)
    return generate(model.config, model.matrices, tuning)


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_launch_arguments_lie_where_numpy_puts_them(tmp_path: Path, head_dim: int) -> None:
    generated = program(RandomModel(model_config(head_dim=head_dim, n_heads=1), "bf16"))
    struct = re.search(r"struct StepArgs \{.*?\};\n", generated.source, re.DOTALL)
    assert struct is not None and generated.args.names is not None
    shown = "".join(f'printf("%zu ", offsetof(StepArgs, {n}));' for n in generated.args.names)
    (tmp_path / "args.cpp").write_text(
        "#include <cstddef>\n#include <cstdio>\n"
        "typedef unsigned char u8; typedef unsigned u32; typedef unsigned long long u64;\n"
        f'{struct[0]}int main() {{ {shown} printf("%zu", sizeof(StepArgs)); }}\n'
    )
    run = tmp_path / "args"
    subprocess.run([emulator.compiler(), str(tmp_path / "args.cpp"), "-o", str(run)], check=True)
    *offsets, size = map(int, subprocess.check_output([str(run)]).split())
    fields = generated.args.fields
    assert fields is not None
    assert dict(zip(generated.args.names, offsets, strict=True)) == {
        name: field[1] for name, field in fields.items()
    }
    assert size == generated.args.itemsize


@needs_compiler
def test_a_missing_tensor_is_an_error_in_the_line_that_names_it() -> None:
    source = program().source.replace("constexpr Matrix w_down{", "constexpr Matrix w_other{")
    with pytest.raises(EmulatorError) as caught:
        EmulatedModule(source, optimize=0)
    found = re.search(r"^step\.cu:(\d+):.*error:.*w_down.*$", str(caught.value), re.MULTILINE)
    assert found is not None, caught.value
    lines = (resource_dir("cuda") / "step.cu").read_text().splitlines()
    assert "tensors::w_down" in lines[int(found[1]) - 1]


@needs_compiler
def test_launch_arguments_of_another_size_do_not_compile() -> None:
    source = program().source.replace("  u32 ticket;", "  u32 ticket; u64 more;")
    with pytest.raises(EmulatorError, match="StepArgs differs from step_args_dtype"):
        EmulatedModule(source, optimize=0)


def test_line_directives() -> None:
    """Every line of the source is the line of the file that the directives say."""
    folder, at, seen = resource_dir("cuda"), ("", 0), set()
    generated = program()
    for line in (generated.source + generated.prefill_source).splitlines():
        directive = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if directive:
            at = (directive[2], int(directive[1]))
            continue
        name, number = at
        at = (name, number + 1)
        seen.add(name)
        if line and name != "config.cuh":
            assert line == (folder / name).read_text().splitlines()[number - 1]
    assert seen == {path.name for path in folder.iterdir() if path.suffix[:3] == ".cu"} | {
        "config.cuh"
    }


def test_nothing_is_included_when_compiling() -> None:
    """CuPy and the cache of kernels see the whole source, so an edit never loads a stale kernel."""
    includes = re.findall(r"^\s*#include.*$", program().source, re.MULTILINE)
    assert includes == ['#include "emulated_ptx.h"']  # where __CUDACC__ is not defined


@pytest.mark.parametrize("name", ["ptx.cuh", "norm.cuh", "step.cu"])
def test_an_edited_file_changes_the_source(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cuda"
    shutil.copytree(resource_dir("cuda"), folder)
    constants = {"config.cuh": '#include "tensor.cuh"'}
    before = join_sources(folder, "step.cu", constants)
    assert before == join_sources(resource_dir("cuda"), "step.cu", constants)
    (folder / name).write_text((folder / name).read_text() + "// edited\n")
    assert join_sources(folder, "step.cu", constants) != before


HASH = """
import hashlib, test_codegen
print(hashlib.sha256(test_codegen.program().source.encode()).hexdigest())
"""


def test_the_same_model_gives_the_same_source_in_every_process() -> None:
    def source(seed: str) -> str:
        paths = ":".join([str(Path(__file__).parent), *sys.path])
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": paths, "PATH": "/usr/bin:/bin"}
        return subprocess.check_output([sys.executable, "-c", HASH], env=environment, text=True)

    assert source("1") == source("2")


@pytest.mark.parametrize(
    "field, value",
    [("warps", 4), ("stage_bytes", 4096), ("in_flight_bytes", 20000), ("bulk_copy", False),
     ("max_splits", 3), ("split_blocks", 3), ("stages", 8), ("grid", 170)],
)  # fmt: skip
def test_every_choice_of_tuning_is_in_the_source(field: str, value: int) -> None:
    assert program(**{field: value}).source != program().source
    assert getattr(program(**{field: value}).tuning, field) == value


def test_facts_of_the_model_are_in_the_source() -> None:
    base = model_config()
    changes = [
        {"norm_eps": 1e-6}, {"windows": (0, 7)}, {"qkv_bias": True}, {"qk_norm": True},
        {"tied": False}, {"n_layers": 3, "windows": (0,)}, {"vocab_size": 330},
    ]  # fmt: skip
    sources = {program(RandomModel(model_config(**c), "bf16")).source for c in changes}
    sources |= {program(RandomModel(base, t, g)).source for t, g in [("fp16", 0), ("int8", 32)]}
    assert len(sources | {program().source}) == 10
    layouts = RandomModel(base, "bf16").matrices
    tuning = choose(base, layouts, FACTS)
    kinds = {generate(base, layouts, tuning, kv_type=t).source for t in ("bf16", "fp16")}
    assert len(kinds) == 2


def test_what_the_kernel_cannot_run_is_said() -> None:
    def refuse(match: str, model: RandomModel) -> None:
        with pytest.raises(DeviceError, match=match):
            generate(model.config, model.matrices, Tuning())

    narrow = RandomModel(model_config(head_dim=32), "bf16")
    refuse("head_dim 64, 96 and 128, this model has 32", narrow)
    odd = RandomModel(model_config(hidden_dim=104), "bf16")
    refuse("hidden_dim to be a multiple of 32, found 104", odd)
    refuse("type fp32", RandomModel(model_config(), "fp32"))
    mixed = RandomModel(model_config(), "bf16")
    mixed.put("layers.1.wo", RandomModel(model_config(), "int8", 32).matrix("layers.1.wo"))
    refuse(r"layers\.1\.wo is stored differently", mixed)


def test_inline_assembly_is_in_one_file() -> None:
    for path in resource_dir("cuda").glob("*.cu*"):
        text = path.read_text()
        assert ("asm" in re.findall(r"\w+", text)) == (path.name == "ptx.cuh"), path.name
        assert ("__CUDACC__" in text) == (path.name == "ptx.cuh"), path.name


def test_one_program_holds_all_kernels() -> None:
    generated = program()
    steps, prefill = (
        re.findall(r'extern "C" __global__ void __launch_bounds__\(.*?\) (\w+)\(', source)
        for source in (generated.source, generated.prefill_source)
    )
    assert set(steps) == set(generated.maps) and tuple(prefill) == PREFILLS


def test_the_context_changes_the_workspace_and_no_source() -> None:
    model = RandomModel(model_config(), "int8", 32)
    tuning = choose(model.config, model.matrices, FACTS)
    short, long = (
        generate(model.config, model.matrices, tuning, max_context=context)
        for context in (100, None)
    )
    assert (short.prefill_tokens, long.prefill_tokens) == (128, 512)
    assert short.workspace["total"] < long.workspace["total"]
    assert (short.source, short.prefill_source) == (long.source, long.prefill_source)
    none = generate(model.config, model.matrices, replace(tuning, prefill_tokens=100))
    assert none.prefill_tokens == 0 and none.workspace["total"] == none.workspace["prefill"]
