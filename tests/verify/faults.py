"""Faults that are put into a merged folder, each by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN = 128
Q0 = "model.layers.0.self_attn.q_proj.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"
K0 = "model.layers.0.self_attn.k_proj.weight"
NORM = "model.norm.weight"


class Models:
    """Base, adapter and merged tensors of one scene, with the delta of a module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.merged = folder / "merged"
        self.base = load_file(folder / "base" / "model.safetensors")
        self.now = load_file(self.merged / "model.safetensors")
        self.factors = load_file(folder / "adapter" / "adapter_model.safetensors")
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        self.rank, self.alpha = config["r"], config["lora_alpha"]
        self.rslora = config.get("use_rslora", False)

    @property
    def scaling(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def ab(self, name: str) -> tuple[Tensor, Tensor]:
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        return self.factors[f"{stem}A.weight"].double(), self.factors[f"{stem}B.weight"].double()

    def put(self, name: str, delta: Tensor, start: Tensor | None = None) -> None:
        """Replaces a tensor by base + delta, rounded once."""
        base = (self.base[name] if start is None else start).double()
        self.now[name] = (base + delta).float().to(self.base[name].dtype)

    def delta(self, name: str) -> Tensor:
        A, B = self.ab(name)
        return self.scaling * B @ A

    def save(self) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in self.now.items()},
            self.merged / "model.safetensors",
            {"format": "pt"},
        )


def _row(models: Models) -> None:
    models.now[Q0][5] = models.base[Q0][5]


def _tensor(models: Models) -> None:
    models.now[Q0] = models.base[Q0]


def _twice(models: Models) -> None:
    for name in (Q0, Q1):
        models.put(name, models.delta(name), models.now[name])


def _permuted_factor(models: Models) -> None:
    A, B = models.ab(Q0)
    models.put(Q0, models.scaling * B @ A.roll(1, dims=0))


def _permuted_rows(models: Models) -> None:
    models.put(Q0, models.delta(Q0).roll(1, dims=0))


def _transposed(models: Models) -> None:
    models.put(Q0, models.delta(Q0).t())


def _scale(models: Models) -> None:
    models.put(Q0, 1.01 * models.delta(Q0))


def _other_rule(models: Models) -> None:
    factor = models.rank**0.5
    for name in (Q0, Q1):
        models.put(name, models.delta(name) * (1 / factor if models.rslora else factor))


def _no_alpha(models: Models) -> None:
    for name in (Q0, Q1):
        models.put(name, models.delta(name) / models.scaling)


def _rank_slice(models: Models) -> None:
    A, B = models.ab(Q0)
    half = models.rank // 2
    models.put(Q0, models.scaling * B[:, :half] @ A[:half])


def _swapped(models: Models) -> None:
    models.now[Q0], models.now[Q1] = models.now[Q1], models.now[Q0]


def _norm(models: Models) -> None:
    models.now[NORM][3] *= 1.5


def _other_adapter(models: Models) -> None:
    generator = torch.Generator().manual_seed(99)
    noise = torch.randn(models.base[Q0].shape, generator=generator, dtype=torch.float64)
    models.put(Q0, noise * models.delta(Q0).std())


def _subtracted(models: Models) -> None:
    models.put(Q0, -models.delta(Q0))


def _missing(models: Models) -> None:
    del models.now[NORM]


def _extra(models: Models) -> None:
    models.now["model.extra.weight"] = torch.zeros(3)


def _not_finite(models: Models) -> None:
    models.now[Q0][1, 1] = float("nan")


FAULTS: dict[str, tuple[Callable[[Models], None], str]] = {
    "one row unmerged": (_row, "1 rows are not merged: 5"),
    "one tensor unmerged": (_tensor, "the adapter is not applied"),
    "merged twice": (_twice, "applied twice"),
    "A permuted": (_permuted_factor, "the factors are permuted"),
    "rows permuted": (_permuted_rows, "the rows of the delta are permuted"),
    "transposed on a square layer": (_transposed, "the delta is transposed"),
    "one per cent more on one tensor": (_scale, "multiplied by 1.01"),
    "the other scaling rule": (_other_rule, "the scaling is alpha/"),
    "alpha ignored": (_no_alpha, "alpha is ignored"),
    "other rank slice": (_rank_slice, "of 6 ranks are merged"),
    "swapped tensors": (_swapped, "swapped: it holds what"),
    "a changed norm weight": (_norm, "1 values differ, the first at [3, 0]"),
    "another adapter": (_other_adapter, "not this adapter's delta"),
    "subtracted": (_subtracted, "the adapter is subtracted"),
    "a missing tensor": (_missing, "missing"),
    "an extra tensor": (_extra, "neither the base nor the adapters"),
    "not finite": (_not_finite, "NaN or infinity"),
}
"""Name -> what puts the fault in, and a part of the explanation that must be found."""
