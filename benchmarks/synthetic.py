"""Synthetic Llama-shaped bases and LoRA adapters, to measure on without downloading anything.

    python benchmarks/synthetic.py base 1.1b DIR
    python benchmarks/synthetic.py adapter 1.1b DIR --factors float32 --base-id ../base

The weights are bfloat16, N(0, 0.02), read at shifting offsets out of one pool of 64 MiB: 13 GB are written at
the speed of the disk, and the values have the distribution that rounding and hashing see in a real model. The
models say nothing sensible. The files are laid out as transformers and PEFT lay them out, so both load them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SEED = 20250101
POOL_BYTES = 64 << 20
MAX_SHARD_BYTES = 5_000_000_000
BASE_STD = 0.02
FACTOR_STD = 0.01  # with r = 16 and scaling 2 the delta is about 4 % of a weight
SHIFT = 1_000_003  # a prime, so that tensors of one size do not repeat each other


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that make a Llama architecture."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=176, layers=2, heads=4, kv_heads=2, vocab=256, positions=128),
    # TinyLlama-1.1B
    "1.1b": Shape(
        hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, vocab=32000, positions=2048
    ),
    # Llama-2-7B
    "7b": Shape(
        hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocab=32000, positions=4096
    ),
    # Eight of the eighty layers of Llama-2-70B: its tensor sizes in the bytes of the 7B model.
    "70b-slice": Shape(
        hidden=8192, intermediate=28672, layers=8, heads=64, kv_heads=8, vocab=32000, positions=4096
    ),
}

Layout = dict[str, tuple[int, ...]]


def linear_layers(shape: Shape) -> dict[str, tuple[int, int]]:
    """The seven linear layers of a block, in the order of the model: path -> (out, in)."""
    h, f, kv = shape.hidden, shape.intermediate, shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
    }


def base_tensors(shape: Shape) -> Layout:
    """Every tensor of the base, in the order of the model."""
    tensors: Layout = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        block = f"model.layers.{layer}."
        tensors |= {f"{block}{path}.weight": size for path, size in linear_layers(shape).items()}
        tensors[f"{block}input_layernorm.weight"] = (shape.hidden,)
        tensors[f"{block}post_attention_layernorm.weight"] = (shape.hidden,)
    tensors["model.norm.weight"] = (shape.hidden,)
    tensors["lm_head.weight"] = (shape.vocab, shape.hidden)
    return tensors


def adapter_tensors(shape: Shape, rank: int) -> Layout:
    """LoRA factors on every linear layer, under the names that PEFT saves."""
    tensors: Layout = {}
    for layer in range(shape.layers):
        for path, (rows, columns) in linear_layers(shape).items():
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{prefix}.lora_A.weight"] = (rank, columns)
            tensors[f"{prefix}.lora_B.weight"] = (rows, rank)
    return dict(sorted(tensors.items()))


class Pool:
    """64 MiB of normal numbers, read in a ring at an offset that moves on with every read."""

    def __init__(self, std: float, dtype: str, seed: int = SEED) -> None:
        rng = np.random.default_rng(seed)
        count = POOL_BYTES // (2 if dtype == "bfloat16" else 4)
        values: np.ndarray[tuple[int], np.dtype[Any]] = np.empty(
            count, np.uint16 if dtype == "bfloat16" else np.float32
        )
        step = count // 16
        for start in range(0, count, step):
            block = rng.standard_normal(step, np.float32) * np.float32(std)
            values[start : start + step] = _to_bfloat16(block) if dtype == "bfloat16" else block
        self._bytes = memoryview(values.data).cast("B")
        self._item = values.itemsize
        self._offset = 0

    def chunks(self, size: int) -> Iterator[memoryview]:
        """Views of the pool that add up to ``size`` bytes."""
        while size > 0:
            view = self._bytes[self._offset : self._offset + size]
            size -= len(view)
            self._offset = (self._offset + len(view) + SHIFT * self._item) % len(self._bytes)
            yield view


def _to_bfloat16(
    values: np.ndarray[tuple[int], np.dtype[np.float32]],
) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Round finite float32 to the bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: Layout, dtype: str, pool: Pool) -> None:
    """Write one safetensors file; layer norms are ones, everything else comes from the pool."""
    item = 2 if dtype == "bfloat16" else 4
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * item
        header[name] = {
            "dtype": "BF16" if dtype == "bfloat16" else "F32",
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    one = b"\x80\x3f" if dtype == "bfloat16" else b"\x00\x00\x80\x3f"
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(len(encoded).to_bytes(8, "little") + encoded))
        for name, shape in tensors.items():
            if name.endswith("norm.weight"):
                _write_all(file, memoryview(one * math.prod(shape)))
                continue
            for view in pool.chunks(math.prod(shape) * item):
                _write_all(file, view)
        os.fsync(file.fileno())


def _write_all(file: BinaryIO, data: memoryview) -> None:
    """An unbuffered write may be partial (Linux stops at 2 GiB)."""
    while data:
        data = data[file.write(data) :]


def make_base(name: str, directory: Path) -> int:
    """Write the base called ``name`` and return its bytes of weights."""
    shape = SHAPES[name]
    shards: list[Layout] = [{}]
    filled = 0
    tensors = base_tensors(shape)
    for tensor, size in tensors.items():
        size_bytes = 2 * math.prod(size)
        if filled + size_bytes > MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][tensor] = size
        filled += size_bytes
    directory.mkdir(parents=True)
    pool = Pool(BASE_STD, "bfloat16")
    total = sum(2 * math.prod(size) for size in tensors.values())
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0], "bfloat16", pool)
    else:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(directory / file, shard, "bfloat16", pool)
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", base_config(shape))
    _write_json(
        directory / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
    )
    return total


def base_config(shape: Shape) -> dict[str, object]:
    """config.json of a Llama model of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def make_adapter(
    name: str, directory: Path, *, factors: str, base_id: str, rank: int = 16, seed: int = SEED
) -> int:
    """Write a LoRA adapter for the base called ``name`` and return its trainable parameters."""
    shape = SHAPES[name]
    directory.mkdir(parents=True)
    tensors = adapter_tensors(shape, rank)
    pool = Pool(FACTOR_STD, factors, seed)
    write_safetensors(directory / "adapter_model.safetensors", tensors, factors, pool)
    targets = [path.rpartition(".")[2] for path in linear_layers(shape)]
    _write_json(directory / "adapter_config.json", adapter_config(base_id, rank, targets))
    return sum(math.prod(size) for size in tensors.values())


def adapter_config(base_id: str, rank: int, targets: list[str]) -> dict[str, object]:
    """adapter_config.json with every field that PEFT 0.21 writes for LoRA."""
    unset = (
        "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules "
        "kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config megatron_config "
        "modules_to_save monteclora_config revision target_parameters trainable_token_indices use_bdlora "
        "velora_config"
    )
    config: dict[str, object] = dict.fromkeys(unset.split())
    config |= {
        "alpha_pattern": {},
        "base_model_name_or_path": base_id,
        "bias": "none",
        "ensure_weight_tying": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": 2 * rank,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    return dict(sorted(config.items()))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("base", "adapter"))
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path, help="written here; must not exist")
    parser.add_argument(
        "--factors", choices=("float32", "bfloat16"), default="float32", help="dtype of A and B"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=SEED, help="of the factors")
    parser.add_argument("--base-id", default="synthetic", help="base_model_name_or_path of the adapter")
    options = parser.parse_args()
    if options.kind == "base":
        print(f"{make_base(options.shape, options.directory):,} bytes of weights in {options.directory}")
    else:
        count = make_adapter(
            options.shape,
            options.directory,
            factors=options.factors,
            base_id=options.base_id,
            rank=options.rank,
            seed=options.seed,
        )
        print(f"{count:,} trainable parameters in {options.directory}")


if __name__ == "__main__":
    main()
