"""Without an undo file: close to the base, with a true account of how close, and never called the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterhub_tools as at
from adapterhub_tools.errors import AdapterError, LossyError, MismatchError, UnsupportedError
from tests.undo.models import DTYPES, VOCAB, make_adapter, make_base
from tests.undo.test_methods import CONFIGS, make

SHAPES = {"bfloat16": (8, -125), "float16": (11, -13), "float32": (24, -125)}
"""dtype -> precision, and the exponent of the smallest normal number as frexp counts."""
ADDITIVE = ("loha", "lokr", "vera")


def check_account(base: Path, near: Path, report: at.UnmergeReport, slack: float = 0.05) -> int:
    """Compares what is reported of the error with the error; returns how many weights are wrong.

    The estimate is that of weights whose low bits are random: even as often as odd.
    """
    true, found = load_file(base / "model.safetensors"), load_file(near / "model.safetensors")
    wrong, largest = 0, 0.0
    for name, values in true.items():
        precision, lowest = SHAPES[str(values.dtype).removeprefix("torch.")]
        wide, other = values.double(), found[name].double()
        wrong += int((wide != other).sum())
        exponents = torch.where(other == 0, lowest, torch.frexp(other)[1].clamp(min=lowest))
        largest = max(
            largest, float(((wide - other).abs() / torch.exp2(exponents.double() - precision)).max())
        )
    assert report.expected_wrong is not None
    assert report.largest_error is not None
    print(
        f"{wrong} wrong, {report.expected_wrong} expected; {largest:g} ulp, at most {report.largest_error:g}"
    )
    assert wrong > 0
    assert abs(wrong - report.expected_wrong) <= 6 * wrong**0.5 + slack * wrong
    assert largest <= report.largest_error
    return wrong


@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [0.01, 0.2])
def test_the_expected_error_is_the_true_one(tmp_path: Path, dtype: str, delta: float, factors: str) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, hidden=256)
    adapter = make_adapter(tmp_path / "adapter", hidden=256, delta=delta, dtype=factors)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=adapter, approximate=True)
    assert not report.exact
    # Beside float32 weights, deltas of narrow factors often lie halfway: then it matters that torch.randn
    # gives more odd float32 numbers than even ones, 3 to 2.
    halfway = dtype == "float32" and factors != "float32"
    wrong = check_account(base, tmp_path / "near", report, slack=0.2 if halfway else 0.05)
    assert not halfway or wrong > 1.1 * by_spacings_alone(tmp_path / "merged", tmp_path / "near")
    planned = at.unmerge(tmp_path / "merged", None, dry_run=True, adapter=adapter, approximate=True)
    assert (planned.expected_wrong, planned.largest_error) == (report.expected_wrong, report.largest_error)
    assert f"about {report.expected_wrong:,} weights differ" in planned.summary


def by_spacings_alone(merged: Path, near: Path) -> float:
    """Returns how many wrong weights the spacings alone, without ties, would explain."""
    before, after = load_file(merged / "model.safetensors"), load_file(near / "model.safetensors")
    total = 0.0
    for name, values in before.items():
        steps = torch.frexp(values.double())[1] - torch.frexp(after[name].double())[1]
        total += float((1 - torch.exp2(-steps.clamp(min=0).double()))[values != after[name]].sum())
    return total


def test_it_is_never_called_the_base(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", delta=0.2)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=adapter, approximate=True)
    receipt = json.loads((tmp_path / "near" / "merge_receipt.json").read_text())
    merged = json.loads((tmp_path / "merged" / "merge_receipt.json").read_text())
    assert receipt["options"]["approximates_base_of"] == merged["output"]["digest"]
    assert report.digest != at.content_digest(base, cache=False).digest
    assert report.summary.startswith("approximated: 4 of 9 tensors, about ")
    assert "this is an approximation, not the base" in report.notes
    replay = tmp_path / "near" / "merge_receipt.json"
    again = at.merge(tmp_path / "merged", adapter, tmp_path / "again", replay=replay)
    assert again.receipt is not None
    assert again.receipt.options["approximates_base_of"] == merged["output"]["digest"]


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_subnormals_and_large_values(tmp_path: Path, dtype: str, tied: bool) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, hidden=128, specials=True, tied=tied)
    adapter = make_adapter(tmp_path / "adapter", hidden=128, delta=0.1, head=True)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=adapter, approximate=True)
    # A tied head that was untied is one more tensor, which the base does not have.
    check_account(base, tmp_path / "near", report, slack=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ADDITIVE)
def test_other_methods_that_add(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    base, adapter = make(tmp_path, method, dtype)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=adapter, approximate=True)
    check_account(base, tmp_path / "near", report)


def test_several_adapters_with_scales(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden=128)
    adapters = [make_adapter(tmp_path / f"adapter{i}", hidden=128, delta=0.1, seed=i) for i in range(3)]
    at.merge(base, adapters, tmp_path / "merged", scale=(0.5, -1.0, 0.25))
    report = at.unmerge(tmp_path / "merged", tmp_path / "near", adapter=adapters[::-1], approximate=True)
    check_account(base, tmp_path / "near", report)


def test_a_combination_that_is_a_sum(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden=128)
    adapters = [make_adapter(tmp_path / f"adapter{i}", hidden=128, delta=0.1, seed=i) for i in range(2)]
    merged = tmp_path / "merged"
    at.combine_adapters(adapters, out=merged, into=base, method="linear", weights=[0.7, 0.4])
    report = at.unmerge(merged, tmp_path / "near", adapter=adapters, approximate=True)
    check_account(base, tmp_path / "near", report)


def refused(folder: Path, error: type[AdapterError], kind: str, *adapters: Path) -> None:
    with pytest.raises(error) as caught:
        at.unmerge(folder / "merged", folder / "near", adapter=adapters, approximate=True)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert all(problem.remedy for problem in caught.value.problems)
    assert not (folder / "near").exists()


@pytest.mark.parametrize("method", sorted(set(CONFIGS) - set(ADDITIVE)))
def test_methods_that_do_not_add(tmp_path: Path, method: str) -> None:
    base, adapter = make(tmp_path, method, torch.bfloat16)
    at.merge(base, adapter, tmp_path / "merged")
    refused(tmp_path, UnsupportedError, "not-additive", adapter)


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_linear", "magnitude_prune", "breadcrumbs"])
def test_combinations_that_are_no_sums(tmp_path: Path, method: str) -> None:
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(tmp_path / f"adapter{i}", seed=i) for i in range(2)]
    more = {} if method == "slerp" else {"density": 0.5}
    weights = [0.5, 0.5]
    at.combine_adapters(adapters, out=tmp_path / "merged", into=base, method=method, weights=weights, **more)
    refused(tmp_path, UnsupportedError, "combined", *adapters)


@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_a_cast_that_lost_bits(tmp_path: Path, narrow: str) -> None:
    base, adapter = make_base(tmp_path / "base", dtype="float32"), make_adapter(tmp_path / "adapter")
    at.merge(base, adapter, tmp_path / "merged", dtype=narrow)
    refused(tmp_path, LossyError, "cast", adapter)


def test_a_cast_that_lost_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden=256)
    adapter = make_adapter(tmp_path / "adapter", hidden=256, delta=0.1)
    at.merge(base, adapter, tmp_path / "wide", dtype="float32")
    at.merge(base, adapter, tmp_path / "same", dtype="bfloat16")
    for name in ("wide", "same"):
        report = at.unmerge(tmp_path / name, tmp_path / f"near {name}", adapter=adapter, approximate=True)
        check_account(base, tmp_path / f"near {name}", report)


def test_another_adapter(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    at.merge(base, adapter, tmp_path / "merged")
    refused(tmp_path, MismatchError, "other-adapter", make_adapter(tmp_path / "other", seed=7))
    refused(tmp_path, MismatchError, "missing-adapter")


@pytest.mark.parametrize("saved", ["lm_head", "model.embed_tokens"])
def test_replaced_tensors_are_gone(tmp_path: Path, saved: str) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", saved={saved: torch.zeros(VOCAB, 32)})
    at.merge(base, adapter, tmp_path / "merged")
    refused(tmp_path, LossyError, "replaced", adapter)
