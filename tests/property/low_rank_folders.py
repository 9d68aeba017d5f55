"""Tiny bases and LoRA adapters written by hand, in float64, and their deltas by plain matrix products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."


def write_base(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Writes a base of an architecture that no table knows, so that shapes alone count."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "made-up", **config}))
    return folder


def write_lora(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    """Writes an adapter of module path -> (B, A)."""
    folder.mkdir(parents=True)
    tensors = {}
    for path, (b, a) in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(factors.values()))[1].shape[0]
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(factors), **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def deltas_of(folder: Path) -> dict[str, Tensor]:
    """Returns s·B·A of every module; patterns must be whole paths or last parts."""
    config, tensors = config_of(folder), load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        alpha = config["lora_alpha"]
        for key, value in (config.get("alpha_pattern") or {}).items():
            if key in (path, path.rpartition(".")[2]):
                alpha = value
        rank = a.shape[0]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        found[path] = scale * tensors[f"{PREFIX}{path}.lora_B.weight"].double() @ a.double()
    return found


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)
