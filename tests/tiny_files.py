"""Writes tiny bases and adapters with the standard library alone, so that tests stand on their own.

Values are small integers or given bytes; the base is shaped like a Llama of two layers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype, shape, data."""

SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1}
WIDTH, HEADS_OUT, ROWS, LAYERS = 8, 4, 12, 2


def zeros(dtype: str, *shape: int) -> Tensor:
    return dtype, shape, bytes(prod(shape) * SIZES[dtype])


def counted(dtype: str, *shape: int, start: int = 1) -> Tensor:
    """Values 1, 2, 3, … modulo 7, so that two tensors rarely look alike."""
    values = [float((start + index) % 7 - 3) for index in range(prod(shape))]
    if dtype == "F32":
        data = struct.pack(f"<{len(values)}f", *values)
    else:
        data = b"".join(struct.pack("<f", value)[2:] for value in values)
    return dtype, shape, data


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, pad: int = 0
) -> None:
    """Writes the tensors in the order given, with ``pad`` more spaces after the header than needed."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def base_tensors(dtype: str = "F32") -> dict[str, Tensor]:
    tensors = {"model.embed_tokens.weight": counted(dtype, ROWS, WIDTH)}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        for index, (name, rows) in enumerate(
            (("q_proj", WIDTH), ("k_proj", HEADS_OUT), ("v_proj", HEADS_OUT))
        ):
            tensors[f"{stem}.self_attn.{name}.weight"] = counted(dtype, rows, WIDTH, start=index + layer)
        tensors[f"{stem}.mlp.down_proj.weight"] = counted(dtype, WIDTH, 2 * WIDTH, start=layer)
        tensors[f"{stem}.input_layernorm.weight"] = counted(dtype, WIDTH, start=2)
    tensors["model.norm.weight"] = counted(dtype, WIDTH)
    return tensors


def base_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": ROWS,
        **changes,
    }


def make_base(folder: Path, *, dtype: str = "F32", **config: Any) -> Path:
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", base_tensors(dtype), metadata={"format": "pt"})
    write_json(folder / "config.json", base_config(**config))
    return folder


def adapter_tensors(rank: int = 2) -> dict[str, Tensor]:
    tensors = {}
    for layer in range(LAYERS):
        for name, rows in (("q_proj", WIDTH), ("v_proj", HEADS_OUT)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = counted("F32", rank, WIDTH, start=layer)
            tensors[f"{stem}.lora_B.weight"] = counted("F32", rows, rank, start=layer + 1)
    return tensors


def adapter_config(**changes: Any) -> dict[str, Any]:
    return {
        "base_model_name_or_path": "example/tiny",
        "bias": "none",
        "lora_alpha": 4,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj", "v_proj"],
        **changes,
    }


def make_adapter(folder: Path, *, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    chosen = adapter_tensors() if tensors is None else tensors
    write_safetensors(folder / "adapter_model.safetensors", chosen, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", adapter_config(**config))
    return folder
