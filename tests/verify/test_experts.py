"""Stacked experts that another tool packed otherwise are told as such."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterhub_tools as at
from tests.undo.models import make_adapter, make_base

STACKED = "model.layers.0.mlp.experts.gate_up_proj"
SQUARE = "model.layers.0.mlp.experts.down_proj"
SINGLE = "model.layers.1.mlp.experts.{}.up_proj.weight"

Change = Callable[[dict[str, Tensor]], None]


def scene(folder: Path) -> dict[str, Path]:
    base = make_base(folder / "base")
    generator = torch.Generator().manual_seed(4)
    tensors = load_file(base / "model.safetensors")
    tensors[STACKED] = torch.randn(4, 24, 16, generator=generator).bfloat16()
    tensors[SQUARE] = torch.randn(4, 16, 16, generator=generator).bfloat16()
    for number in range(3):
        tensors[SINGLE.format(number)] = torch.randn(8, 16, generator=generator).bfloat16()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(folder / "adapter")
    at.merge(base, adapter, folder / "merged")
    return {"base": base, "adapter": adapter, "merged": folder / "merged"}


def permuted(tensors: dict[str, Tensor]) -> None:
    tensors[STACKED] = tensors[STACKED][[2, 1, 3, 0]]


def transposed(tensors: dict[str, Tensor]) -> None:
    tensors[STACKED] = tensors[STACKED].transpose(1, 2)


def transposed_square(tensors: dict[str, Tensor]) -> None:
    tensors[SQUARE] = tensors[SQUARE].transpose(1, 2)


def one_by_one(tensors: dict[str, Tensor]) -> None:
    for number, expert in enumerate(tensors.pop(STACKED)):
        tensors[f"model.layers.0.mlp.experts.{number}.gate_up_proj.weight"] = expert


def stacked(tensors: dict[str, Tensor]) -> None:
    experts = [tensors.pop(SINGLE.format(number)) for number in range(3)]
    tensors["model.layers.1.mlp.experts.up_proj"] = torch.stack(experts)


def one_value(tensors: dict[str, Tensor]) -> None:
    tensors[STACKED][1, 2, 3] += 1


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (permuted, STACKED, "its experts are in another order: 0 holds that of 2, 2 holds that of 3"),
        (transposed, STACKED, "each of its experts is transposed"),
        (transposed_square, SQUARE, "each of its experts is transposed"),
        (one_by_one, STACKED, "it is missing: the experts there are packed otherwise, one by one"),
        (stacked, SINGLE.format(1), "it is missing: the experts there are packed otherwise, stacked in one"),
        (one_value, STACKED, "it is not the base's tensor: 1 values differ"),
    ],
)
def test_the_packing_is_told(tmp_path: Path, change: Change, name: str, words: str) -> None:
    given = scene(tmp_path)
    assert at.verify(**given).ok
    path = given["merged"] / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    report = at.verify(**given)
    assert report.exit_code == 1
    causes = {tensor.name: tensor.cause for tensor in report.tensors if not tensor.ok}
    assert words in causes[name]
