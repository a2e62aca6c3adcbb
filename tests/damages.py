"""What can happen to a weight file, and what the message must then say. test_damaged.py goes through it."""

# ruff: noqa: E501  (a table reads best with a line for each case)

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from weight_files import Parts

from minflash.packing import Layout

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """damage: what happens to a model folder; words: what the message must hold."""

    name: str
    damage: Damage
    words: tuple[str, ...]
    sharded: bool = False


def case(name: str, damage: Damage, *words: str, sharded: bool = False) -> Case:
    return Case(name, damage, words, sharded)


def edit(change: Callable[[Parts], object], file: str = MODEL) -> Damage:
    """Takes the weight file apart, changes it, writes it again."""

    def damage(folder: Path) -> None:
        parts = Parts.load(folder / file)
        change(parts)
        parts.save()

    return damage


def entry(name: str, **fields: Any) -> Damage:
    """Changes fields of one tensor in the header."""
    return edit(lambda parts: parts.header[name].update(fields))


def matrix_entry(name: str, **fields: Any) -> Damage:
    return edit(lambda parts: parts.matrices[name].update(fields))


def metadata(**fields: Any) -> Damage:
    return edit(lambda parts: parts.header["__metadata__"].update(fields))


def replace_bytes(change: Callable[[bytes], bytes], file: str = MODEL) -> Damage:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def config(change: Callable[[dict[str, Any]], object]) -> Damage:
    return json_file("config.json", change)


def json_file(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def weight_map(change: Callable[[dict[str, str]], object]) -> Damage:
    return json_file(INDEX, lambda index: change(index["weight_map"]))


def header_text(change: Callable[[str], str]) -> Damage:
    def damage(folder: Path) -> None:
        parts = Parts.load(folder / MODEL)
        parts.save_text(change(json.dumps(parts.header)).encode("utf-8", "surrogateescape"))

    return damage


def set_length(length: int) -> Damage:
    return replace_bytes(lambda raw: length.to_bytes(8, "little") + raw[8:])


def truncate(share: float) -> Damage:
    return replace_bytes(lambda raw: raw[: int(len(raw) * share)])


def poke(name: str, offset: int, value: bytes) -> Damage:
    """Overwrites bytes of a tensor's data."""

    def change(parts: Parts) -> None:
        at = parts.header[name]["data_offsets"][0] + offset
        parts.data[at : at + len(value)] = value

    return edit(change)


def move(name: str, begin: int = 0, end: int = 0) -> Damage:
    """Shifts the offsets of one tensor."""

    def change(parts: Parts) -> None:
        offsets = parts.header[name]["data_offsets"]
        parts.header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return edit(change)


def swap(parts: Parts) -> None:
    """The data of two vectors of the same length changes places."""
    first, second = parts.header["layers.0.attn_norm"], parts.header["layers.0.ffn_norm"]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def huge_matrix(folder: Path) -> None:
    """Declares 2^40 rows, with a shape and offsets that agree."""
    parts = Parts.load(folder / MODEL)
    parts.matrices["lm_head"]["rows"] = 1 << 40
    shape = Layout(1 << 40, 48, "int8", 32).shape
    begin = parts.header["lm_head"]["data_offsets"][0]
    parts.header["lm_head"].update(
        shape=list(shape), data_offsets=[begin, begin + shape[0] * shape[1]]
    )
    parts.save()


def make_directory(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def make_pipe(folder: Path) -> None:
    (folder / MODEL).unlink()
    os.mkfifo(folder / MODEL)


def make_loop(folder: Path) -> None:
    (folder / MODEL).unlink()
    (folder / MODEL).symlink_to(MODEL)


def remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def write(file: str, data: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(data)


def outside(folder: Path) -> None:
    """A shard outside the folder, reached through the index."""
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder.parent / "outside.safetensors")
    weight_map(lambda names: names.update(embed="../outside.safetensors"))(folder)


def move_to_other_shard(folder: Path) -> None:
    """A tensor that two shards hold."""
    first = Parts.load(folder / "model-00001-of-00003.safetensors")
    last = Parts.load(folder / "model-00003-of-00003.safetensors")
    begin, end = first.header["layers.0.attn_norm"]["data_offsets"]
    last.append(
        "layers.0.attn_norm", first.header["layers.0.attn_norm"], bytes(first.data[begin:end])
    )
    last.save()


NAN16, INF16 = b"\x00\x7e", b"\x00\x7c"
SCALE = Layout(96, 48, "int4", 32).tile_code_bytes  # offset of the first scale of a layer's matrix
HEAD_SCALE = Layout(37, 48, "int8", 32).tile_code_bytes
WQKV = "layers.0.wqkv"
NORM = "layers.0.attn_norm"

CASES = [
    # The file as such
    case("missing file", remove(MODEL), MODEL, "No such file"),
    case("empty file", write(MODEL, b""), MODEL, "is empty"),
    case("seven bytes", write(MODEL, b"1234567"), MODEL, "7 bytes"),
    case("directory in place of the file", make_directory(MODEL), MODEL, "is a directory"),
    case("pipe in place of the file", make_pipe, MODEL, "not a regular file"),
    case("symbolic link to itself", make_loop, MODEL, "cannot be read"),
    case("another format", write(MODEL, b"GGUF" + bytes(100)), MODEL),
    case("a text", write(MODEL, b"<html>404 Not Found</html>"), MODEL, "header length", "limit"),
    # Header: length and text
    case("header length zero", set_length(0), MODEL, "header must begin"),
    case("header length beyond the file", set_length(90_000_000), MODEL, "90000000", "beyond the file"),
    case("header length over the limit", set_length(100_000_001), MODEL, "100000001", "limit"),
    case("header length 2^64 - 1", set_length((1 << 64) - 1), MODEL, "limit"),
    case("header length one less", replace_bytes(lambda raw: (int.from_bytes(raw[:8], "little") // 2).to_bytes(8, "little") + raw[8:]), MODEL, "not JSON"),
    case("truncated in the length", truncate(0.0001), MODEL, "bytes of header length"),
    case("truncated in the header", truncate(0.01), MODEL, "truncated"),
    case("truncated in the data", truncate(0.5), MODEL, "truncated", "tensor 'layers."),
    case("last byte missing", replace_bytes(lambda raw: raw[:-1]), MODEL, "tensor 'lm_head'", "truncated"),
    case("bytes after the end", replace_bytes(lambda raw: raw + b"x"), MODEL, "1 bytes after 'lm_head' belong to no tensor"),
    case("header not UTF-8", header_text(lambda text: text.replace("embed", "emb\udcffd")), MODEL, "not UTF-8"),
    case("header a list", header_text(lambda text: "[" + text + "]"), MODEL, "must begin"),
    case("header not JSON", header_text(lambda text: text.replace(":", ";", 1)), MODEL, "not JSON"),
    case("header nested deeply", header_text(lambda text: '{"x":' + "[" * 100_000), MODEL, "nested too deeply"),
    case("repeated tensor", header_text(lambda text: text[:-1] + ', "embed": {}}'), MODEL, "'embed' is repeated"),
    case("repeated field", header_text(lambda text: text.replace('"dtype"', '"dtype": "U8", "dtype"', 1)), MODEL, "'dtype' is repeated"),
    case("number of 5000 digits", header_text(lambda text: text.replace('"shape": [', '"shape": [' + "9" * 5000 + ", ", 1)), MODEL),
    # Header: the entries
    case("entry not an object", edit(lambda parts: parts.header.update({NORM: 7})), MODEL, NORM, "needs dtype"),
    case("entry without a shape", edit(lambda parts: parts.header[NORM].pop("shape")), MODEL, NORM, "needs dtype, shape"),
    case("unknown dtype", entry(NORM, dtype="F31"), MODEL, NORM, "'F31' is not one of"),
    case("dtype not a string", entry(NORM, dtype=["F32"]), MODEL, NORM, "is not one of"),
    case("negative shape", entry(NORM, shape=[-48]), MODEL, NORM, "integers >= 0", "-48"),
    case("fractional shape", entry(NORM, shape=[48.0]), MODEL, NORM, "integers >= 0"),
    case("shape of booleans", entry(NORM, shape=[True]), MODEL, NORM, "integers >= 0"),
    case("shape not a list", entry(NORM, shape="48"), MODEL, NORM, "integers >= 0"),
    case("shape of another size", entry(NORM, shape=[47]), MODEL, NORM, "188 bytes"),
    case("shape that wraps 64 bits", entry(NORM, shape=[1 << 63, 1 << 63, 48]), MODEL, NORM, "another size"),
    case("absurdly long shape", entry(NORM, shape=[2] * 10_000), MODEL, NORM, "shape must be"),
    case("three offsets", entry(NORM, data_offsets=[0, 1, 2]), MODEL, NORM, "two integers"),
    case("negative offset", entry(NORM, data_offsets=[-192, 0]), MODEL, NORM, "two integers"),
    case("offsets reversed", entry(NORM, data_offsets=[192, 0]), MODEL, NORM, "another size"),
    case("offsets out of range", entry(NORM, data_offsets=[1 << 62, (1 << 62) + 192]), MODEL, NORM, "ends at byte"),
    case("overlap", move(NORM, -4, -4), MODEL, NORM, "overlaps 'embed'"),
    case("hole", edit(lambda parts: [parts.header.pop(NORM)]), MODEL, WQKV, "a hole after 'embed'"),
    case("huge matrix", huge_matrix, MODEL, "lm_head", "ends at byte"),
    # Metadata
    case("no metadata", edit(lambda parts: parts.header.pop("__metadata__")), MODEL, "format must be 'minflash'"),
    case("metadata of numbers", metadata(layout_version=1), MODEL, "strings to strings"),
    case("another format in the metadata", metadata(format="pt"), MODEL, "format must be 'minflash'", "'pt'"),
    case("newer layout", metadata(layout_version="2"), MODEL, "layout version 2 is newer", "update minflash"),
    case("older layout", metadata(layout_version="0"), MODEL, "layout version 0 is older", "convert the model again"),
    case("layout version no number", metadata(layout_version="new"), MODEL, "layout_version must be an integer"),
    case("no layout version", edit(lambda parts: parts.header["__metadata__"].pop("layout_version")), MODEL, "layout_version"),
    case("no matrices", edit(lambda parts: parts.header["__metadata__"].pop("matrices")), MODEL, "'matrices'", "JSON object"),
    case("matrices not JSON", header_text(lambda text: text.replace('\\"rows\\"', "rows")), MODEL, "'matrices'", "not JSON"),
    case("matrix not declared", edit(lambda parts: parts.matrices.pop(WQKV)), MODEL, WQKV, "not in 'matrices'", "F32"),
    case("vector declared as matrix", edit(lambda parts: parts.matrices.update({NORM: parts.matrices[WQKV]})), MODEL, NORM, "U8"),
    case("declared and missing", edit(lambda parts: parts.matrices.update(ghost=parts.matrices[WQKV])), MODEL, "'ghost'", "missing"),
    case("unknown type", matrix_entry(WQKV, type="int3"), MODEL, WQKV, "'int3' is not one of"),
    case("type not a string", matrix_entry(WQKV, type=["int4"]), MODEL, WQKV, "is not one of"),
    case("group size not allowed", matrix_entry(WQKV, group_size=48), MODEL, WQKV, "group size 48"),
    case("rows a string", matrix_entry(WQKV, rows="80"), MODEL, WQKV, "integers >= 0"),
    case("no rows", edit(lambda parts: parts.matrices[WQKV].pop("rows")), MODEL, WQKV, "must give rows"),
    case("empty matrix", matrix_entry(WQKV, rows=0), MODEL, WQKV, "empty"),
    case("rows of another size", matrix_entry(WQKV, rows=8000), MODEL, WQKV, "shape must be (500, 640)"),
    # Tensors against config.json
    case("rows that config.json denies", matrix_entry(WQKV, rows=79), MODEL, WQKV, "implies shape [80, 48], found [79, 48]"),
    case("vector stored as F16", entry(NORM, dtype="F16", shape=[96]), MODEL, NORM, "dtype F32, found F16"),
    case("vector of two dimensions", entry(NORM, shape=[48, 1]), MODEL, NORM, "shape must be (48,)"),
    case("matrix stored as I8", entry(WQKV, dtype="I8"), MODEL, WQKV, "dtype U8, found I8"),
    case("missing vector", edit(lambda parts: parts.drop(NORM)), MODEL, NORM, "is missing"),
    case("missing matrix", edit(lambda parts: parts.drop("lm_head")), MODEL, "lm_head", "is missing"),
    case("left-over tensor", edit(lambda parts: parts.append("layers.0.rotary", {"dtype": "F32", "shape": [1]}, bytes(4))), MODEL, "layers.0.rotary", "left over"),
    case("name of a megabyte", edit(lambda parts: parts.append("x" * 10**6, {"dtype": "F32", "shape": [1]}, bytes(4))), MODEL, "xxx", "left over"),
    case("name of half a character", edit(lambda parts: parts.append("\ud800", {"dtype": "F32", "shape": [1]}, bytes(4))), MODEL, "ud800", "left over"),
    case("other order", edit(swap), MODEL, "'layers.0.ffn_norm' stands where 'layers.0.attn_norm' belongs"),
    case("one layer too few", config(lambda values: values.update(num_hidden_layers=3)), MODEL, "layers.2.attn_norm", "missing"),
    case("one layer too many", config(lambda values: values.update(num_hidden_layers=1)), MODEL, "layers.1.attn_norm", "left over"),
    case("more layers than tensors", config(lambda values: values.update(num_hidden_layers=900)), "900 layers"),
    case("other dim", config(lambda values: values.update(hidden_size=64)), MODEL, "'embed'", "implies shape [37, 64]"),
    # Numbers
    case("NaN scale of int4", poke(WQKV, SCALE, NAN16), MODEL, WQKV, "scale or bias", "NaN or infinite"),
    case("infinite bias of int4", poke(WQKV, SCALE + 2, INF16), MODEL, WQKV, "scale or bias", "NaN or infinite"),
    case("infinite scale of int8", poke("lm_head", HEAD_SCALE, INF16), MODEL, "lm_head", "scale or bias"),
    case("NaN scale in the padding", poke("lm_head", 3 * 2 * 544 - 2, NAN16), MODEL, "lm_head", "rows 32 to 47"),
    case("NaN norm", poke(NORM, 8, np.float32(np.nan).tobytes()), MODEL, NORM, "NaN or infinity"),
    case("infinite norm", poke("final_norm", 8, np.float32(-np.inf).tobytes()), MODEL, "final_norm", "NaN or infinity"),
    # config.json
    case("no config.json", remove("config.json"), "config.json", "No such file"),
    case("empty config.json", write("config.json", b""), "config.json", "not JSON"),
    case("config.json not JSON", write("config.json", b"{'a': 1}"), "config.json", "not JSON"),
    case("config.json a list", write("config.json", b"[1]"), "config.json", "JSON object"),
    case("config.json not UTF-8", write("config.json", b'{"a": "\xff"}'), "config.json", "UTF-8"),
    case("config.json a directory", make_directory("config.json"), "config.json", "directory"),
    case("config.json repeats a key", write("config.json", b'{"hidden_size": 1, "hidden_size": 2}'), "config.json", "'hidden_size' is repeated"),
    case("config.json of 60 MB", lambda folder: os.truncate(folder / "config.json", 60_000_000), "config.json", "larger"),
    case("config.json without a key", config(lambda values: values.pop("hidden_size")), "config.json", "hidden_size"),
    case("config.json with an absurd number", config(lambda values: values.update(hidden_size=10**30)), "config.json", "hidden_size"),
    case("config.json with a NaN", config(lambda values: values.update(rms_norm_eps=float("nan"))), "config.json", "rms_norm_eps"),
    case("not converted", config(lambda values: values.pop("quantization_config")), "config.json", "minflash convert"),
    case("another quantization", config(lambda values: values.update(quantization_config={"quant_method": "awq"})), "minflash convert"),
    case("newer layout in config.json", config(lambda values: values["quantization_config"].update(layout_version=7)), "config.json", "7 is newer"),
    case("layout version true", config(lambda values: values["quantization_config"].update(layout_version=True)), "config.json", "integer"),
    # Shards and their index
    case("index not JSON", write(INDEX, b"{"), INDEX, "not JSON", sharded=True),
    case("index without a map", write(INDEX, b"{}"), INDEX, "weight_map", sharded=True),
    case("index with numbers", weight_map(lambda names: names.update(embed=3)), INDEX, "embed", "plain name", sharded=True),
    case("index leaves the folder", outside, INDEX, "embed", "plain name", sharded=True),
    case("index with an absolute path", weight_map(lambda names: names.update(embed="/etc/x.safetensors")), INDEX, "plain name", sharded=True),
    case("index with a null byte", weight_map(lambda names: names.update(embed="a\0.safetensors")), INDEX, "plain name", sharded=True),
    case("shard missing", remove("model-00002-of-00003.safetensors"), "model-00002", "No such file", sharded=True),
    case("shard truncated", replace_bytes(lambda raw: raw[:-5], "model-00003-of-00003.safetensors"), "model-00003", "lm_head", "truncated", sharded=True),
    case("index forgets a tensor", weight_map(lambda names: names.pop(NORM)), "model-00001", NORM, "nowhere", sharded=True),
    case("index names another shard", weight_map(lambda names: names.update(embed="model-00002-of-00003.safetensors")), "model-00001", "embed", "model-00002", sharded=True),
    case("index invents a tensor", weight_map(lambda names: names.update(ghost="model-00002-of-00003.safetensors")), INDEX, "ghost", "missing in", sharded=True),
    case("tensor in two shards", move_to_other_shard, "model-00003", NORM, "repeated", sharded=True),
    case("one file and an index", write(MODEL, b""), MODEL, INDEX, "only one", sharded=True),
]  # fmt: skip
