"""PEFT and transformers as the reference: adapt, save, merge by both, compare weights and outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import adapterhub_tools as at
from adapterhub_tools.errors import AdapterError
from tests.parity.models import Builder, outputs_of, perturb_trainable, save_base

WEIGHTS = 1e-6
"""Allowed difference of a weight, relative to the largest weight of its tensor."""

LOGITS = 1e-5
"""Allowed difference of an output value, relative to the largest one where that exceeds 1."""


TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(kw_only=True)
class Case:
    """One feature: a base, how it is adapted, and what is peculiar about saving or comparing it.

    Attributes:
        build: makes the base.
        config: the adapter's config.
        prepare: changes the loaded base before it is adapted (a resized vocabulary).
        load_as: the class that the adapted base is loaded as, where not the one that was saved.
        load: further arguments of its ``from_pretrained``.
        unused: the start of the names of tensors that this class leaves aside.
        save: further arguments of ``PeftModel.save_pretrained``.
        options: of our merge.
        rows: the tokens that occur in the batch.
        seed: of the perturbation.
        size: of the perturbation.
        same: how many targets keep their values: tensors that PEFT saves although nothing changed them.
    """

    build: Builder
    config: Callable[[], PeftConfig]
    prepare: Callable[[Any], None] | None = None
    load_as: type[PreTrainedModel] | None = None
    load: dict[str, Any] = field(default_factory=dict)
    unused: str = ""
    save: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = 96
    seed: int = 3
    size: float = 0.1
    same: int = 0


@dataclass(kw_only=True)
class Adapted:
    """A base and an adapter on disk, and the adapted model in memory, before any merge."""

    base: Path
    adapter: Path
    model: PeftModel
    outputs: Tensor
    rows: int
    loader: Callable[[Path], nn.Module]


def adapt(case: Case, folder: Path, name: str = "adapter") -> Adapted:
    """Saves a base, adapts it with PEFT, perturbs all that is trainable, and saves the adapter."""
    made = case.build()
    base = folder / "base"
    if not base.exists():
        save_base(made, base)
    loader = _loader(made, case)
    loaded = loader(base)
    if case.prepare is not None:
        case.prepare(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(loaded, case.config())
        assert perturb_trainable(model, case.seed, case.size)
        model.eval()
        model.save_pretrained(folder / name, **case.save)
    return Adapted(
        base=base,
        adapter=folder / name,
        model=model,
        outputs=outputs_of(model, case.rows),
        rows=case.rows,
        loader=loader,
    )


def _loader(made: nn.Module, case: Case) -> Callable[[Path], nn.Module]:
    cls = case.load_as or type(made)

    def load(folder: Path) -> nn.Module:
        if isinstance(made, PreTrainedModel):
            return load_exactly(cls, folder, unused=case.unused, **case.load)
        model = case.build()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model

    def load_loosely(folder: Path) -> nn.Module:
        # A base without the head that the class has: transformers makes a new one.
        if case.load_as is not None and folder.name == "base":
            torch.manual_seed(5)
            return cls.from_pretrained(folder, dtype=torch.float32, **case.load).eval()
        return load(folder)

    return load_loosely


def load_exactly(
    cls: type[PreTrainedModel], folder: Path, *, unused: str = "", **options: Any
) -> PreTrainedModel:
    """Loads a folder with transformers; no tensor may be missing, left over or of another shape."""
    model, info = cls.from_pretrained(
        folder, output_loading_info=True, dtype=options.pop("dtype", torch.float32), **options
    )
    found = {
        what: sorted(map(str, info[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if unused:
        found["unexpected_keys"] = [key for key in found["unexpected_keys"] if not key.startswith(unused)]
    assert not any(found.values()), found
    return model.eval()


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields})


def saved_with(model: nn.Module, config: LoraConfig, folder: Path, seed: int = 3) -> PeftModel:
    """Adapts a model, perturbs all that is trainable, and saves the adapter."""
    adapted = get_peft_model(model, config)
    perturb_trainable(adapted, seed)
    adapted.eval().save_pretrained(folder)
    return adapted


def ours(base: Path, adapters: Path | Sequence[Path], out: Path, **options: Any) -> at.MergeReport:
    """Merges with the package under test."""
    return at.merge(base, adapters, out, **options)


def stored(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor that lies in a folder's safetensors files."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def assert_same_weights(merged: nn.Module, reference: nn.Module) -> None:
    """Compares two models tensor by tensor: the same names, values within WEIGHTS."""
    left, right = merged.state_dict(), reference.state_dict()
    assert set(left) == set(right)
    for name, expected in right.items():
        assert left[name].shape == expected.shape, name
        assert_close(left[name], expected, name, WEIGHTS)


def assert_close(found: Tensor, expected: Tensor, name: str, bound: float) -> None:
    """Compares two tensors; the bound is relative to the largest expected value."""
    difference = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    scale = expected.double().abs().max().item() if expected.numel() else 1.0
    assert difference <= bound * scale, f"{name}: differs by {difference:.3g} at a scale of {scale:.3g}"


def assert_same_outputs(merged: nn.Module, adapted: Adapted) -> None:
    """Compares the outputs of a merged model with those of the adapted one before any merge."""
    found = outputs_of(merged, adapted.rows)
    assert found.shape == adapted.outputs.shape
    difference = (found - adapted.outputs).abs().max().item()
    assert difference <= LOGITS * max(1.0, adapted.outputs.abs().max().item()), difference


def assert_untouched_bits(out: Path, base: Path, changed: set[str]) -> None:
    """Every tensor of the base that is not named must be in the output bit by bit."""
    before, after = stored(base), stored(out)
    for name in before.keys() - changed:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(_bits(after[name]), _bits(before[name])), name


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def changed_names(report: at.MergeReport) -> set[str]:
    """Returns the tensors that a receipt says were changed, cast or added."""
    assert report.receipt is not None
    return {t.name for t in report.receipt.tensors if t.action != "copy"}


def check_parity(case: Case, folder: Path, *, reference_is_right: bool = True) -> tuple[at.MergeReport, Path]:
    """Runs the whole comparison for one case.

    Args:
        case: the feature.
        folder: where to work.
        reference_is_right: False where PEFT's own merge does not give the adapted model (tied embeddings),
            so that only the adapted model itself is the reference.
    """
    adapted = adapt(case, folder)
    out = folder / "out"
    report = ours(adapted.base, adapted.adapter, out, **case.options)
    assert report.changed == report.expected - case.same > 0
    merged = adapted.loader(out)
    assert_same_outputs(merged, adapted)
    assert_untouched_bits(out, adapted.base, changed_names(report))
    if reference_is_right:
        assert_same_weights(merged, adapted.model.merge_and_unload(safe_merge=True))
    return report, out


def refused(
    error: type[AdapterError], kind: str, base: Path, adapter: Path, out: Path, **options: Any
) -> Any:
    """Merges what must be refused, checks class, kind and remedy, and that nothing is left behind.

    Returns:
        The problem of that kind.
    """
    before = sorted(out.parent.iterdir())
    with pytest.raises(AdapterError) as caught:
        ours(base, adapter, out, **options)
    raised = caught.value
    assert type(raised) is error, f"{type(raised).__name__}: {raised}"
    found = [problem for problem in raised.problems if problem.kind == kind]
    assert found, f"{kind} not among {[(p.kind, str(p)) for p in raised.problems]}"
    assert found[0].remedy, str(found[0])
    assert sorted(out.parent.iterdir()) == before
    return found[0]
