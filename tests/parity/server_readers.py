"""Reads adapters as servers do, written from their sources and without this package: an oracle for `fit`.

vLLM: ``vllm/lora/peft_helper.py`` and ``lora_model.py``; llama.cpp: ``convert_lora_to_gguf.py`` and
``llama_adapter_lora_weight::get_scale``; SGLang: ``lora_config.py``, ``lora.py`` and ``mem_pool.py``. Deltas
are exact fractions where the scale is rational.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PREFIX = "base_model.model."


class RefusedError(Exception):
    """The server would not load it."""


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "adapter_model.safetensors")


def vllm(folder: Path, max_lora_rank: int = 512) -> dict[str, tuple[float, Tensor, Tensor]]:
    """Returns module -> (scale, B, A)."""
    config, tensors = opened(folder)
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise RefusedError("config")
    if config["r"] > max_lora_rank:
        raise RefusedError("rank")
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(PREFIX).split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, role = ".".join(parts[:-2]), parts[-2][-1]
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            module, role = ".".join(parts[:-1]), parts[-1][-1]
        else:
            raise RefusedError(name)
        if tensor.shape[role == "B"] > max_lora_rank:
            raise RefusedError("rank")
        pairs.setdefault(module, {})[role] = tensor
    return {module: (config["lora_alpha"] / root, pair["B"], pair["A"]) for module, pair in pairs.items()}


def sglang(folder: Path, max_lora_rank: int = 64) -> dict[str, tuple[float, Tensor, Tensor]]:
    """Returns module -> (scale, B, A)."""
    config, tensors = opened(folder)
    if config["peft_type"].lower() != "lora" or config.get("use_dora"):
        raise RefusedError("config")
    if config["r"] > max_lora_rank:
        raise RefusedError("rank")
    if not isinstance(config["target_modules"], list):
        raise RefusedError("target_modules")
    named = {name.rpartition(".")[2] for name in config["target_modules"]}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, role = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if module.rpartition(".")[2] not in named or role[-2:] not in ("_A", "_B"):
            raise RefusedError(name)
        if tensor.shape[role[-1] == "B"] != config["r"]:
            raise RefusedError("the shape of a buffer")
        pairs.setdefault(module, {})[role[-1]] = tensor
    for module in pairs:  # q, k and v are stacked, and so are gate and up
        stem, _, last = module.rpartition(".")
        wanted = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(
            last
        )
        if wanted is not None and f"{stem}.{wanted}" not in pairs:
            raise RefusedError(module)
    scale = config["lora_alpha"] / config["r"]
    return {module: (scale, pair["B"], pair["A"]) for module, pair in pairs.items()}


def llama_cpp(folder: Path) -> dict[str, tuple[float, Tensor, Tensor]]:
    """Returns module -> (scale, B, A)."""
    config, tensors = opened(folder)
    alpha = float(torch.tensor(config["lora_alpha"], dtype=torch.float32))
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        base = name.replace(PREFIX, "")
        for role in "AB":
            for suffix in (f".lora_{role}.weight", f".lora_embedding_{role}"):
                if suffix in name:
                    pairs.setdefault(base.replace(suffix, ""), {})[role] = tensor
                    break
            else:
                continue
            break
        else:
            raise RefusedError(name)
    return {
        module: (alpha / pair["B"].shape[1] if alpha else 1.0, pair["B"], pair["A"])
        for module, pair in pairs.items()
    }


def matrix(tensor: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in tensor.double().tolist()]


def delta(scale: Fraction, b: Tensor, a: Tensor) -> list[list[Fraction]]:
    """Returns s·B·A, exactly."""
    left, right = matrix(b), list(zip(*matrix(a), strict=True))
    return [
        [scale * sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0)) for column in right]
        for row in left
    ]
