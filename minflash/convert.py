"""Converting a foreign checkpoint to the weight file; only this file knows foreign tensor names.

A Hugging Face folder, a hub id or a GGUF file becomes the folder that docs/format.md describes.
The source must hold every tensor that its config asks for, and no other. ``conversion`` does the
work, once it is known which of the source's tensors make which of ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from .arguments import as_path, check_flag
from .checkpoint import expected_tensors
from .config import ModelConfig
from .conversion import Conversion, Part, Target
from .convert_types import Wanted
from .errors import ConvertError
from .huggingface import PICKLES, HuggingFaceSource, fetch, is_hub_id, pickle_message
from .source import FLOAT_KINDS, GGUFSource, Source

logger = logging.getLogger("minflash")

# Our name -> the source's names, in the order in which they are joined. {0} is the layer.
_HUGGING_FACE = {
    "embed": ["model.embed_tokens.weight"],
    "attn_norm": ["model.layers.{0}.input_layernorm.weight"],
    "wqkv": [f"model.layers.{{0}}.self_attn.{part}_proj.weight" for part in "qkv"],
    "wqkv_bias": [f"model.layers.{{0}}.self_attn.{part}_proj.bias" for part in "qkv"],
    "q_norm": ["model.layers.{0}.self_attn.q_norm.weight"],
    "k_norm": ["model.layers.{0}.self_attn.k_norm.weight"],
    "wo": ["model.layers.{0}.self_attn.o_proj.weight"],
    "wo_bias": ["model.layers.{0}.self_attn.o_proj.bias"],
    "ffn_norm": ["model.layers.{0}.post_attention_layernorm.weight"],
    "w_gate_up": [f"model.layers.{{0}}.mlp.{part}_proj.weight" for part in ("gate", "up")],
    "w_gate_up_bias": [f"model.layers.{{0}}.mlp.{part}_proj.bias" for part in ("gate", "up")],
    "w_down": ["model.layers.{0}.mlp.down_proj.weight"],
    "w_down_bias": ["model.layers.{0}.mlp.down_proj.bias"],
    "final_norm": ["model.norm.weight"],
    "lm_head": ["lm_head.weight"],
}
_GGUF = {
    "embed": ["token_embd.weight"],
    "attn_norm": ["blk.{0}.attn_norm.weight"],
    "wqkv": [f"blk.{{0}}.attn_{part}.weight" for part in "qkv"],
    "wqkv_bias": [f"blk.{{0}}.attn_{part}.bias" for part in "qkv"],
    "q_norm": ["blk.{0}.attn_q_norm.weight"],
    "k_norm": ["blk.{0}.attn_k_norm.weight"],
    "wo": ["blk.{0}.attn_output.weight"],
    "wo_bias": ["blk.{0}.attn_output.bias"],
    "ffn_norm": ["blk.{0}.ffn_norm.weight"],
    "w_gate_up": [f"blk.{{0}}.ffn_{part}.weight" for part in ("gate", "up")],
    "w_gate_up_bias": [f"blk.{{0}}.ffn_{part}.bias" for part in ("gate", "up")],
    "w_down": ["blk.{0}.ffn_down.weight"],
    "w_down_bias": ["blk.{0}.ffn_down.bias"],
    "final_norm": ["output_norm.weight"],
    "lm_head": ["output.weight"],
}
_NAMES = {"hf": _HUGGING_FACE, "gguf": _GGUF}
# Tensors without information: rotary frequencies, which follow from the config.
_HARMLESS_ENDS = (
    "rotary_emb.inv_freq",
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    quant: str | None = None,
    group_size: int | None = None,
    head_quant: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Convert a Hugging Face folder, hub id or GGUF file to the folder ``out``; returns its path.

    quant: type of the layers' matrices, "bf16", "fp16", "fp8", "int8" or "int4" ("fp32" as well).
        None keeps them as stored: bf16 and fp16 as they are; float32 as bf16 or fp16 where those
        hold all values (else bf16, or fp32 from GGUF); the GGUF types Q8_0, Q4_0 and Q4_1 without
        any loss; other GGUF types quantized again to int4 or int8.
    group_size: 32, 64 or 128; default 64 with int4, else the largest that divides all columns.
    head_quant: type of the embedding and output head; default int8 with int4 layers, else quant.
    overwrite: replace a converted model at ``out``, after success.
    progress: a progress bar on a stderr that is a terminal.
    report: takes each line of news (default: the logger "minflash").

    ``out`` appears only when it is complete. Raises ConvertError, ConfigError, CheckpointError,
    DownloadError, TokenizerError or ArgumentError.
    """
    check_flag("overwrite", overwrite)
    check_flag("progress", progress)
    wanted, goal = Wanted(quant, group_size, head_quant), as_path("out", out)
    opened = open_source(source)
    try:
        config = _config(opened)
        targets = plan_tensors(opened, config)
        conversion = Conversion(opened, targets, wanted, progress, report or logger.info)
        return conversion.run(goal, overwrite)
    finally:
        opened.close()


def open_source(source: str | Path) -> Source:
    """The checkpoint at a path or of a hub id. Raises ConvertError when there is none."""
    path = as_path("source", source)
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        if path.suffix != ".gguf" and is_hub_id(str(source)):
            return HuggingFaceSource(fetch(str(source)))
        raise ConvertError(
            f"{source}: there is no such file or folder; give a Hugging Face folder, "
            "a hub id (owner/name) or a GGUF file"
        )
    if path.is_dir():
        return HuggingFaceSource(path)
    if path.suffix in PICKLES:
        raise ConvertError(pickle_message(path))
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise ConvertError(
            f"{path}: give the folder that holds it, together with config.json: {path.parent}"
        )
    return GGUFSource(path)


def plan_tensors(source: Source, config: ModelConfig) -> list[Target]:
    """All tensors of the weight file with their parts; ConvertError for a gap or a leftover."""
    unused = {name for name in source.shapes if not name.endswith(_HARMLESS_ENDS)}
    if config.tied:  # some checkpoints store a tied head a second time
        unused -= set(_NAMES[source.format]["lm_head"])
    targets = []
    for name, shape in expected_tensors(config).items():
        layer, kind = name.split(".")[1:] if "." in name else ("", name)
        names = [pattern.format(layer) for pattern in _NAMES[source.format][kind]]
        parts = tuple(map(Part, names, *_part_rows(kind, shape[0], config, source.rotated)))
        for part in parts:
            _check_part(source, part, shape[1:])
            unused.discard(part.name)
        targets.append(Target(name, shape, parts))
    if unused:
        shown = ", ".join(sorted(unused)[:5]) + (", ..." if len(unused) > 5 else "")
        raise ConvertError(
            f"{source.path}: {len(unused)} tensors are left over, which a {config.architecture} "
            f"model with this config does not have: {shown}"
        )
    return targets


def _config(source: Source) -> ModelConfig:
    quantization = source.config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == "minflash":
        raise ConvertError(
            f"{source.path}: is a converted model already; convert the original instead"
        )
    return ModelConfig.from_hf(source.config, source=str(source.path))


def _part_rows(
    kind: str, rows: int, config: ModelConfig, rotated: bool
) -> tuple[list[int], list[int]]:
    """Of each part: its rows, and head_dim where they are permuted within each head (else 0)."""
    if kind.startswith("wqkv"):
        head_dim = config.head_dim if rotated else 0
        return [config.q_dim, config.kv_dim, config.kv_dim], [head_dim, head_dim, 0]
    if kind.startswith("w_gate_up"):
        return [config.hidden_dim] * 2, [0, 0]
    return [rows], [0]


def _check_part(source: Source, part: Part, rest: tuple[int, ...]) -> None:
    where = f"{source.path}: tensor {part.name}"
    if part.name not in source.shapes:
        raise ConvertError(f"{where} is missing; the config asks for it")
    shape, expected = source.shapes[part.name], (part.rows, *rest)
    if shape != expected:
        raise ConvertError(f"{where} has shape {shape}, but the config says {expected}")
    kind = source.kinds[part.name]
    if source.format == "hf" and kind not in FLOAT_KINDS:
        raise ConvertError(
            f"{where} has dtype {kind}; only F32, BF16 and F16 are supported: "
            "convert the original, unquantized model"
        )
