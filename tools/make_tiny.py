#!/usr/bin/env python3
"""Make weights/tiny: a random model of the Llama architecture, small enough for the repository.

It has what a real model has: grouped query heads, a byte-level BPE tokenizer with the special
tokens of ChatML, a chat template, int4 layers and an int8 embedding. Its text is noise. The same
bytes come out on every machine: weights from a raw PCG64 stream, merges from a list.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minflash.convert import convert
from minflash.numeric import fp32_to_bf16

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Pairs in the order in which they merge; a space is written Ġ, as byte-level BPE does.
MERGES = """Ġ t|h e|i n|Ġ a|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|o r|Ġ o|n d|Ġ c|i s|e n|Ġ b|Ġ f|i t|e s
a n|Ġo f|Ġ p|in g|Ġa nd|a l|Ġ m|Ġ d|o u|Ġt o|Ġ in|l e|a r|Ġ h|Ġ is|Ġ k|Ġ y|Ġy ou|Ġ l|s t|Ġ n|Ġ e
Ġ 1|l o|he l|hel lo"""
DIM, HIDDEN_DIM, HEADS, KV_HEADS, LAYERS = 64, 160, 4, 2, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The split of GPT-2's tokenizer, which the library calls ByteLevel with use_regex.
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def byte_letters() -> list[str]:
    """The printable letter of each byte (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer() -> dict[str, Any]:
    """tokenizer.json."""
    merges = [pair.split(" ") for pair in MERGES.replace("\n", "|").split("|")]
    tokens = [*SPECIAL, *byte_letters(), *("".join(pair) for pair in merges)]
    assert len(set(tokens)) == len(tokens)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": True} for i, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def config(vocab_size: int) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": DIM,
        "intermediate_size": HIDDEN_DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes(vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names -> shapes."""
    kv_dim = DIM // HEADS * KV_HEADS
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (DIM,),
        "self_attn.q_proj": (DIM, DIM),
        "self_attn.k_proj": (kv_dim, DIM),
        "self_attn.v_proj": (kv_dim, DIM),
        "self_attn.o_proj": (DIM, DIM),
        "post_attention_layernorm": (DIM,),
        "mlp.gate_proj": (HIDDEN_DIM, DIM),
        "mlp.up_proj": (HIDDEN_DIM, DIM),
        "mlp.down_proj": (DIM, HIDDEN_DIM),
    }
    every = {"model.embed_tokens.weight": (vocab_size, DIM), "model.norm.weight": (DIM,)}
    for index in range(LAYERS):
        every |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return every


def weights(vocab_size: int) -> dict[str, NDArray[np.uint16]]:
    """bf16 bit patterns: matrices uniform with a standard deviation near 1.7 / sqrt(cols)."""
    stream = np.random.PCG64(20)
    out = {}
    for name, shape in shapes(vocab_size).items():
        raw = stream.random_raw(int(np.prod(shape)))
        uniform = ((raw >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape)
        values = 1 + 0.3 * uniform if len(shape) == 1 else uniform * 3 / np.sqrt(shape[1])
        out[name] = fp32_to_bf16(values.astype(np.float32))
    return out


def write_source(folder: Path) -> None:
    """A Hugging Face folder."""
    tokens = tokenizer()
    vocab_size = len(tokens["model"]["vocab"])
    files = {
        "config.json": config(vocab_size),
        "tokenizer.json": tokens,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[1],
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[2],
            "unk_token": SPECIAL[0],
            "add_bos_token": False,
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_safetensors(folder / "model.safetensors", weights(vocab_size))


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.uint16]]) -> None:
    header, position = {}, 0
    for name, bits in tensors.items():
        end = position + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(bits.tobytes() for bits in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "weights" / "tiny")
    parser.add_argument("--quant", default="int4", help="type of the layers (default: int4)")
    parser.add_argument("--group-size", type=int, default=32)
    args = parser.parse_args()
    group_size = args.group_size if args.quant in ("int4", "int8", "fp8") else None
    with tempfile.TemporaryDirectory() as folder:
        write_source(Path(folder))
        out = convert(folder, args.out, quant=args.quant, group_size=group_size, overwrite=True)
    total = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {total} bytes")


if __name__ == "__main__":
    main()
