"""ModelConfig: the facts of a model. Every quirk of a Hugging Face config.json is resolved here, once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; fields keep the names of Hugging Face's ``rope_parameters``."""

    kind: str = "default"  # default, linear, dynamic, llama3, yarn, longrope
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0  # original_max_position_embeddings; positions
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and semantics of one decoder-only transformer."""

    architecture: str  # llama, mistral, qwen2, qwen3
    dim: int
    hidden_dim: int
    head_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_context: int  # positions
    norm_eps: float
    rope: RopeConfig
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # per layer: positions a query sees, itself included; 0: all
    bos_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
