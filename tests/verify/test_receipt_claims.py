"""What a receipt says of base, adapters, tensors and files is compared with what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterhub_tools as at
from adapterhub_tools.errors import IntegrityError
from adapterhub_tools.model.receipt import RECEIPT_FILE
from tests.undo.models import make_adapter, make_base

NORM = "model.norm.weight"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "base", shards=2)
    at.merge(base, make_adapter(tmp_path / "adapter", delta=0.2), tmp_path / "merged", undo=True)
    return tmp_path / "merged"


def check(merged: Path, sample: str = "rows") -> at.VerifyReport:
    folder = merged.parent
    return at.verify(base=folder / "base", adapter=folder / "adapter", merged=merged, sample=sample)


def edit(merged: Path, change: Edit) -> None:
    receipt = json.loads((merged / RECEIPT_FILE).read_text())
    change(receipt)
    (merged / RECEIPT_FILE).write_text(json.dumps(receipt))


INPUTS: dict[str, Edit] = {
    "/adapters/0/method": lambda r: r["adapters"][0].update(method="dora"),
    "/adapters/0/targets": lambda r: r["adapters"][0].update(targets=9),
    "/adapters/0/full": lambda r: r["adapters"][0].update(full=2),
    "/guarantee": lambda r: r.update(guarantee="tolerance"),
    "/base/config_digest": lambda r: r["base"].update(config_digest=f"config-sha256-v1:{'0' * 64}"),
    f"/output/tensors/{NORM}/action": lambda r: r["output"]["tensors"][NORM].update(action="replace"),
    f"/output/tensors/{NORM}/dtype": lambda r: r["options"].update(dtype="float16"),
}


@pytest.mark.parametrize("loc", INPUTS)
def test_a_claim_that_headers_and_configs_refute(merged: Path, loc: str) -> None:
    edit(merged, INPUTS[loc])
    report = check(merged)
    assert report.exit_code == 1
    assert loc in [problem.loc for problem in report.problems if problem.kind == "receipt-claim"]


@pytest.mark.parametrize("field", ["digest", "targets_digest"])
def test_another_base_digest(merged: Path, field: str) -> None:
    edit(merged, lambda r: r["base"].update({field: r["output"]["digest"]}))
    report = check(merged, "full")
    assert [problem.loc for problem in report.problems] == [f"/base/{field}"]
    assert any("--sample full" in note for note in check(merged).notes)


@pytest.mark.parametrize("field", ["dtype", "shape"])
def test_another_dtype_or_shape(merged: Path, field: str) -> None:
    other = {"dtype": "F16", "shape": [16, 2]}[field]
    edit(merged, lambda r: r["output"]["tensors"][NORM].update({field: other}))
    report = at.verify(merged=merged, receipt=True)
    assert [problem.loc for problem in report.problems] == [NORM]
    assert check(merged).exit_code == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["output"]["side_files"].pop("tokenizer.json"),
        lambda r: r["output"]["files"].popitem(),
        lambda r: r["output"].pop("undo"),
    ],
    ids=["tokenizer", "weights", "undo"],
)
def test_a_file_that_is_no_longer_listed(merged: Path, change: Edit) -> None:
    edit(merged, change)
    report = at.verify(merged=merged, receipt=True)
    assert [problem.kind for problem in report.problems] == ["extra-file"]
    assert check(merged, "full").exit_code == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "modeling.py", "chat_template.jinja", "more/a.py"])
def test_a_file_that_was_added(merged: Path, name: str) -> None:
    (merged / "README.md").write_text("A card may be added.")
    assert at.verify(merged=merged, receipt=True).ok
    (merged / name).parent.mkdir(exist_ok=True)
    (merged / name).write_text("{}")
    report = at.verify(merged=merged, receipt=True)
    assert [problem.kind for problem in report.problems] == ["extra-file"]
    assert name.startswith(report.problems[0].file)


def test_a_path_out_of_the_folder(merged: Path) -> None:
    edit(merged, lambda r: r["output"]["side_files"].update({"../base/config.json": {"sha256": "0" * 64}}))
    report = at.verify(merged=merged, receipt=True)
    assert report.exit_code == 1
    assert "'..'" in str(report.problems[0])
    assert "SHA-256" not in str(report.problems[0])


def test_one_untouched_tensor_in_another_dtype(merged: Path) -> None:
    for path in merged.glob("*.safetensors"):
        tensors = load_file(path)
        if NORM in tensors:
            save_file({**tensors, NORM: tensors[NORM].to(torch.float16)}, path, {"format": "pt"})
    report = check(merged)
    assert [problem.loc for problem in report.problems] == [f"/output/tensors/{NORM}/dtype"]


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_true_claims(merged: Path, dtype: str | None) -> None:
    folder = merged.parent
    shutil.rmtree(merged)
    at.merge(folder / "base", folder / "adapter", merged, dtype=dtype, scale=0.5)
    for sample in ("rows", "full"):
        report = check(merged, sample)
        assert report.ok, [str(problem) for problem in report.problems]


def test_nothing_approximates_the_base_of_a_changed_model(merged: Path) -> None:
    path = next(iter(merged.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    folder = merged.parent
    with pytest.raises(IntegrityError, match="was changed after the merge"):
        at.unmerge(merged, folder / "undone", adapter=folder / "adapter", approximate=True)
    assert not (folder / "undone").exists()


def test_the_merges_before(merged: Path) -> None:
    """What a receipt remembers of them is what the base's own receipt tells."""
    folder = merged.parent
    other = make_adapter(folder / "other", seed=5, delta=0.2)
    at.merge(merged, other, folder / "again")
    assert at.verify(base=merged, adapter=other, merged=folder / "again").ok
    edit(folder / "again", lambda r: r["base"]["earlier"][0].update(undo=False))
    report = at.verify(base=merged, adapter=other, merged=folder / "again")
    assert [problem.loc for problem in report.problems] == ["/base/earlier"]
