"""The KV cache of the step kernel as tests read and write it.

Of one layer it is [kv head][block of 16 positions][K | V].
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from kernel_models import Array, round_to

from minflash.numeric import fp32_to_bf16
from minflash.reference import Reference
from minflash.resources import resource_dir
from minflash.step_model import StepModel


def _offsets(name: str, head_dim: int) -> Array:
    """Where k_offset or v_offset of cuda/attend.cuh puts a block's values: int [16, head_dim].

    Read from the source, so that the cache's layout is written down once. In units of 16 bits.
    """
    source = (resource_dir("cuda") / "attend.cuh").read_text(encoding="utf-8")
    body = re.search(rf"int {name}\(int position, int dim\) {{\s*return ([^;]*);", source)
    assert body is not None
    position, dim = np.arange(16)[:, None], np.arange(head_dim)[None, :]
    names = {"position": position, "dim": dim, "kHeadDim": head_dim, "kHalfBytes": 32 * head_dim}
    offsets: Array = eval(" ".join(body[1].replace("/", "//").split()), names)
    return offsets // 2


def _empty_blocks(step: StepModel) -> Array:
    """The cache's shape: uint16 [n_layers, n_kv_heads, blocks, 2 * 16 * head_dim]."""
    config, blocks = step.config, int(step._args["max_blocks"])
    shape = (config.n_layers, config.n_kv_heads, blocks, 32 * config.head_dim)
    return np.zeros(shape, np.uint16)


def read_cache(step: StepModel) -> tuple[Array, Array]:
    """Keys and values as bits, uint16 [n_layers, n_kv_heads, positions, head_dim] each."""
    raw = _empty_blocks(step)
    step.device.download(int(step._args["kv_cache"]), raw)
    layers, heads, blocks, _ = raw.shape
    shape = (layers, heads, blocks * 16, step.config.head_dim)
    keys, values = (raw[..., _offsets(f"{name}_offset", shape[3])] for name in "kv")
    return keys.reshape(shape), values.reshape(shape)


def write_cache(step: StepModel, keys: Array, values: Array) -> None:
    """The inverse of read_cache; positions beyond those given become zeros."""
    raw = _empty_blocks(step)
    layers, heads, blocks, _ = raw.shape
    dim = step.config.head_dim
    for name, bits in (("k_offset", keys), ("v_offset", values)):
        whole = np.zeros((layers, heads, blocks * 16, dim), np.uint16)
        whole[:, :, : bits.shape[2]] = bits
        raw[..., _offsets(name, dim)] = whole.reshape(layers, heads, blocks, 16, dim)
    step.device.upload(int(step._args["kv_cache"]), raw)


def fill_cache(
    step: StepModel, references: Sequence[Reference], length: int, kv_type: str, seed: int = 3
) -> None:
    """Random keys and values at the first ``length`` positions of the kernel and the references."""
    rng = np.random.default_rng(seed)
    config = step.config
    shape = (2, config.n_layers, config.n_kv_heads, length, config.head_dim)
    both = round_to(kv_type, rng.standard_normal(shape).astype(np.float32))
    as_bits = fp32_to_bf16 if kv_type == "bf16" else lambda v: v.astype(np.float16).view(np.uint16)
    write_cache(step, as_bits(both[0]), as_bits(both[1]))
    for reference in references:
        reference.length = 0
        reference._allocate(min(reference.max_context, length + 64))
        reference._keys[:, :, :length] = both[0]
        reference._values[:, :, :length] = both[1]
        reference.length = length
