"""A small, valid adapter: about a megabyte, so that there is a middle to break off in."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

RANK, WIDTH = 32, 1024
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
PREFIX = "base_model.model."


def _tensor_bytes(count: int, seed: int) -> bytes:
    """float32 values between 1 and 2: any mantissa, one exponent."""
    words = struct.unpack(f"<{count}I", random.Random(seed).randbytes(4 * count))
    return struct.pack(f"<{count}I", *(0x3F800000 | word & 0x7FFFFF for word in words))


def weights(seed: int) -> bytes:
    """An `adapter_model.safetensors`; another seed gives other weights of the same shapes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for number, module in enumerate(MODULES):
        for factor, shape in (("A", [RANK, WIDTH]), ("B", [WIDTH, RANK])):
            content = _tensor_bytes(RANK * WIDTH, seed * 100 + 10 * number + (factor == "B"))
            span = [len(data), len(data) + len(content)]
            name = f"{PREFIX}{module}.lora_{factor}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": span}
            data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def config() -> bytes:
    """An `adapter_config.json`."""
    return json.dumps(
        {
            "base_model_name_or_path": "example/base",
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": ["q_proj"],
            "modules_to_save": None,
        },
        indent=2,
    ).encode()


def write_adapter(folder: Path, seed: int = 1) -> Path:
    """Makes the folder and returns it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(config())
    (folder / "adapter_model.safetensors").write_bytes(weights(seed))
    return folder
