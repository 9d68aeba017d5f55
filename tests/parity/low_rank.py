"""What the tests of shrink, convert and extract share: adapters made by PEFT, and their deltas by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import adapterhub_tools as at
from tests.parity.models import outputs_of, perturb_trainable


def fresh(build: Callable[[], nn.Module]) -> Any:
    """Builds a model with the same weights every time."""
    torch.manual_seed(0)
    return build()


def saved(
    model: nn.Module, config: PeftConfig, folder: Path, *, size: float = 0.1, seed: int = 3
) -> PeftModel:
    """Adapts a model with PEFT, perturbs what is trainable, and saves the adapter."""
    adapted = get_peft_model(model, config)
    perturb_trainable(adapted, seed, size)
    adapted.eval().save_pretrained(folder)
    return adapted


def loaded(model: nn.Module, folder: Path) -> PeftModel:
    """Loads an adapter with PEFT onto a fresh model."""
    return PeftModel.from_pretrained(model, folder).eval()


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """Returns PEFT's own float64 delta of every LoRA module, as matrices of the first axis by all others."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.scaling:
            found[name] = layer.double().get_delta_weight("default").detach().flatten(1)
    return found


def close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Compares outputs of models, relative to the largest value where that exceeds 1."""
    difference = float((found - expected).abs().max())
    assert difference <= bound * max(1.0, float(expected.abs().max())), difference


def same_outputs(model: nn.Module, folder: Path, expected: Tensor, bound: float = 1e-5) -> PeftModel:
    """Loads an adapter with PEFT, which must find every tensor, and compares the outputs."""
    adapted = loaded(model, folder)
    close(outputs_of(adapted), expected, bound)
    return adapted


def refused(
    error: type[at.AdapterError], kind: str, out: Path, call: Any, *args: Any, **options: Any
) -> None:
    """Checks that a call fails with one class and kind of problem, and writes nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error) as caught:
        call(*args, out, **options)
    assert type(caught.value) is error
    assert kind in {problem.kind for problem in caught.value.problems}, caught.value
    assert sorted(out.parent.iterdir()) == before


def truncated(delta: Tensor, rank: int) -> Tensor:
    """Returns the best approximation of a rank by the dense SVD."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]
