"""minflash plan: the numbers are those of what loads, for every kind of model and GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import minflash
from minflash.cards import CARDS, find_card
from minflash.checkpoint import open_checkpoint
from minflash.cli import main
from minflash.config import ModelConfig
from minflash.errors import ArgumentError, CheckpointError, ContextError, DeviceError
from minflash.gpu_memory import MARGIN_BYTES, cache_bytes, gpu_context, step_bytes
from minflash.plan import Room, describe, describe_shape, plan, room_of_card
from minflash.shapes import SHAPES

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_named_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINFLASH_MODEL", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of which only config.json is there."""
    (tmp_path / "config.json").write_text(json.dumps(HF))
    return tmp_path


@pytest.mark.parametrize("shape", SHAPES)
def test_what_fits_is_what_the_engine_would_take(shape: str) -> None:
    from minflash.plan import _program

    model = describe_shape(shape, "int4", None)
    room = room_of_card("h200-sxm")
    made = plan(model, room)
    assert room.free_bytes is not None and made.largest_context is not None
    program = _program(model, room.facts)
    assert gpu_context(model.config, program, room.free_bytes, None) == made.largest_context
    if made.largest_context < model.config.max_context:
        with pytest.raises(ContextError, match=f"that fits is {made.largest_context}$"):
            gpu_context(model.config, program, room.free_bytes, made.largest_context + 16)
    assert made.fits and made.context == made.largest_context
    assert made.total_bytes + MARGIN_BYTES <= room.free_bytes
    assert made.total_bytes == made.weight_bytes + made.workspace_bytes + made.cache_bytes
    assert made.cache_bytes == cache_bytes(model.config, made.context)


def test_the_speed_is_the_bandwidth_over_the_bytes_of_a_step() -> None:
    model = describe_shape("llama-3.1-8b", "bf16", None)
    made = plan(model, Room("", 10**12, 1000.0), 4096)
    needed = step_bytes(model.config, dict(model.matrices), 4096)
    assert made.step_bytes_full == needed
    assert made.tokens_per_s_full == pytest.approx(1e12 / needed)
    assert made.tokens_per_s_empty == pytest.approx(1e12 / made.step_bytes_empty)


def test_a_model_that_does_not_fit() -> None:
    made = plan(describe_shape("llama-3.1-8b", "bf16", None), room_of_card("rtx-3080"))
    assert made.fits is False and made.largest_context == 0
    made = plan(describe_shape("llama-3.1-8b", "int4", None), Room("", 10**10, None), 131072)
    assert made.fits is False and made.largest_context is not None
    assert 0 < made.largest_context < 131072


def test_without_a_gpu_bytes_are_told_all_the_same() -> None:
    made = plan(describe_shape("smollm2-135m", None, None), Room("", None, None))
    assert made.fits is None and made.largest_context is None
    assert made.tokens_per_s_empty is None and made.weight_bytes > 2.6e8


def test_a_converted_folder_is_described_as_it_is(converted: Path) -> None:
    model = describe(converted)
    with open_checkpoint(converted) as checkpoint:
        assert dict(model.matrices) == checkpoint.matrices
    with pytest.raises(ArgumentError, match="already converted"):
        describe(converted, "int4")


@pytest.mark.parametrize("quant", [None, "bf16", "int8", "int4"])
def test_a_source_is_described_as_convert_makes_it(
    quant: str | None, source: Path, tmp_path: Path
) -> None:
    made = minflash.convert(source, tmp_path / "out", quant=quant, progress=False)
    with open_checkpoint(made) as checkpoint:
        assert dict(describe(source, quant).matrices) == checkpoint.matrices


def test_config_json_is_enough_of_a_hugging_face_folder(folder: Path) -> None:
    model = describe(folder)
    assert {layout.type for layout in model.matrices.values()} == {"fp16"}
    assert model.config == ModelConfig.from_hf(HF) and "float16" in model.notes[0]
    model = describe(folder, "int4", 32)
    assert model.matrices["layers.0.wqkv"].group_size == 32
    assert model.matrices["embed"].type == "int8"


@pytest.mark.parametrize("stored", ["Q8_0", "Q4_1", "F16"])
@pytest.mark.parametrize("quant", [None, "int4", "int8"])
def test_a_gguf_file_is_described_as_convert_makes_it(
    stored: str, quant: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    path = tmp_path / "model.gguf"
    write_gguf(path, "llama2", lambda name: "F32" if "norm" in name else stored)
    made = minflash.convert(path, tmp_path / "out", quant=quant, progress=False)
    with open_checkpoint(made) as checkpoint:
        assert dict(describe(path, quant).matrices) == checkpoint.matrices


def test_errors_name_the_way_out(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        describe(tmp_path / "missing")
    with pytest.raises(ContextError, match="the model's own is 4096"):
        plan(describe(folder), Room("", None, None), 4097)
    with pytest.raises(ArgumentError, match="--gpu knows a10"):
        find_card("rtx-9090")
    (folder / "config.json").write_text(json.dumps(HF | {"head_dim": 48, "hidden_size": 96}))
    with pytest.raises(DeviceError, match="head_dim"):
        plan(describe(folder), Room("", None, None))


@pytest.mark.parametrize("card", CARDS)
def test_every_card_can_be_planned_for(card: str) -> None:
    made = plan(describe_shape("llama-3.2-1b", "int4", None), room_of_card(card))
    assert made.fits and made.tokens_per_s_full is not None and made.tokens_per_s_full > 10


# Bits of the bus, Gbit/s a pin, CUDA cores: the other figures of the same datasheets.
BUSES = {
    "a10": (384, 12.5, 9216), "a40": (384, 14.5, 10752), "l4": (192, 12.5, 7424),
    "l40s": (384, 18, 18176), "rtx-3060": (192, 15, 3584), "rtx-3080": (320, 19, 8704),
    "rtx-3090": (384, 19.5, 10496), "rtx-4060": (128, 17, 3072), "rtx-4070": (192, 21, 5888),
    "rtx-4080": (256, 22.4, 9728), "rtx-4090": (384, 21, 16384), "rtx-5070": (192, 28, 6144),
    "rtx-5080": (256, 30, 10752), "rtx-5090": (512, 28, 21760), "rtx-a6000": (384, 16, 10752),
    "rtx-6000-ada": (384, 20, 18176), "rtx-pro-6000": (512, 28, 24064),
}  # fmt: skip
STATED = {
    "a100-40gb",
    "a100-80gb-pcie",
    "a100-80gb-sxm",
    "h100-pcie",
    "h100-sxm",
    "h200-sxm",
    "b200",
}


def test_bandwidth_is_the_bus_times_its_rate() -> None:
    assert {*BUSES, *STATED} == {*CARDS}  # cards with HBM state the bandwidth alone
    for name, (bits, gbit_per_s, cores) in BUSES.items():
        assert CARDS[name].gb_per_s == pytest.approx(bits * gbit_per_s / 8, abs=0.5), name
        assert CARDS[name].multiprocessors == cores / 128, name


def test_names_of_cards_are_taken_as_people_write_them() -> None:
    assert find_card("NVIDIA GeForce RTX 4090") is CARDS["rtx-4090"]
    assert find_card("H100 SXM") is CARDS["h100-sxm"]


def test_the_command_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--shape", "llama-3.1-8b", "--quant", "int4", "--gpu", "rtx-4090"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for words in ("4.99 GB", "yes; the largest context", "at most", "(datasheet)"):
        assert words in text
    assert main([*arguments, "--context", "1000", "--bandwidth", "900", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["context"] == 1000 and facts["fits"] is True
    assert facts["gb_per_s"] == 900 and facts["bandwidth_origin"] == "given"


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ("4.9", "fits          no: not even the weights fit; take a smaller type with --quant"),
        ("5", "no: weights and workspace take 5.06 GB and 0.27 GB stay free, which leaves no room"),
        ("5.327", "no: weights and workspace take 5.06 GB and 0.27 GB stay free, which leaves no"),
        ("6", "no: the largest context that fits is 5104 (the model's own limit is 131072)"),
    ],
)
def test_what_does_not_fit_is_said_and_is_no_error(
    memory: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--shape", "llama-3.1-8b", "--quant", "int4", "--context", "131072"]
    assert main([*arguments, "--memory", memory]) == 0
    text = capsys.readouterr().out
    assert "4.99 GB" in text and words in text
    assert main([*arguments, "--memory", memory, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--shape", "llama-3.1-8b"], "MODEL and --shape"),
        (["--shape", "llama-3.1-8b", "--gpu", "l4", "--memory", "8"], "--gpu and --memory"),
        (["--shape", "llama-3.1-8b", "--memory", "-8"], "--memory must be above 0"),
        (["--shape", "llama-3.1-8b", "--context", "0"], "--context must be at least 1"),
    ],
)
def test_wrong_arguments_are_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
