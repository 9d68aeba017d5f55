"""What is not the merge that the receipt tells of is refused, by its name, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import adapterhub_tools as at
from adapterhub_tools.errors import AdapterError, FormatError, IntegrityError, MismatchError, UnsupportedError
from adapterhub_tools.model.undo import UNDO_FILE
from tests.undo.models import files_of, make_adapter, make_base


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "base")
    at.merge(base, make_adapter(tmp_path / "adapter"), tmp_path / "merged", undo=True)
    return tmp_path / "merged"


def refused(merged: Path, *adapters: Path, error: type[AdapterError], kind: str) -> AdapterError:
    out = merged.parent / "undone"
    with pytest.raises(error) as caught:
        at.unmerge(merged, out, adapter=adapters)
    assert [problem.kind for problem in caught.value.problems] == [kind], caught.value
    assert all(problem.remedy for problem in caught.value.problems)
    assert not out.exists()
    assert not [path for path in merged.parent.iterdir() if path.name.startswith(".")]
    return caught.value


def test_another_adapter(merged: Path) -> None:
    other = make_adapter(merged.parent / "other", seed=9)
    refused(merged, other, error=MismatchError, kind="other-adapter")


def test_a_missing_adapter(merged: Path) -> None:
    error = refused(merged, error=MismatchError, kind="missing-adapter")
    assert "adaptertool init" in error.problems[0].remedy
    at.init(merged.parent / "adapter")
    assert str(at.inspect(merged.parent / "adapter").to_json()["digest"]) in error.problems[0].message


def test_an_adapter_with_another_scaling(merged: Path) -> None:
    other = make_adapter(merged.parent / "other", use_rslora=True)
    refused(merged, other, error=MismatchError, kind="other-adapter")


def test_the_undo_file_of_another_merge(merged: Path) -> None:
    folder = merged.parent
    at.merge(folder / "base", make_adapter(folder / "other", seed=9), folder / "merged2", undo=True)
    shutil.copy(folder / "merged2" / UNDO_FILE, merged / UNDO_FILE)
    refused(merged, folder / "adapter", error=IntegrityError, kind="undo-digest")


def test_the_undo_file_of_another_merge_with_its_digest_in_the_receipt(merged: Path) -> None:
    folder = merged.parent
    at.merge(folder / "base", make_adapter(folder / "other", seed=9), folder / "merged2", undo=True)
    shutil.copy(folder / "merged2" / UNDO_FILE, merged / UNDO_FILE)
    receipt = json.loads((merged / "merge_receipt.json").read_text())
    other = json.loads((folder / "merged2" / "merge_receipt.json").read_text())
    receipt["output"]["undo"] = other["output"]["undo"]
    (merged / "merge_receipt.json").write_text(json.dumps(receipt))
    refused(merged, folder / "adapter", error=IntegrityError, kind="other-undo")


def test_a_missing_undo_file(merged: Path) -> None:
    (merged / UNDO_FILE).unlink()
    refused(merged, merged.parent / "adapter", error=FormatError, kind="no-undo")


def test_a_merge_without_undo(merged: Path) -> None:
    folder = merged.parent
    at.merge(folder / "base", folder / "adapter", folder / "plain")
    refused(folder / "plain", folder / "adapter", error=FormatError, kind="no-undo")


def test_a_folder_without_a_receipt(merged: Path) -> None:
    refused(merged.parent / "base", merged.parent / "adapter", error=FormatError, kind="no-receipt")


def test_a_truncated_undo_file_at_any_length(merged: Path) -> None:
    data = (merged / UNDO_FILE).read_bytes()
    for length in range(0, len(data), max(1, len(data) // 40)):
        (merged / UNDO_FILE).write_bytes(data[:length])
        refused(merged, merged.parent / "adapter", error=IntegrityError, kind="undo-digest")


def test_a_changed_merged_weight(merged: Path) -> None:
    path = merged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(merged, merged.parent / "adapter", error=IntegrityError, kind="merged-tensor")


def test_a_changed_side_file(merged: Path) -> None:
    (merged / "tokenizer.json").write_text("{}")
    refused(merged, merged.parent / "adapter", error=IntegrityError, kind="side-file")


def test_an_edited_receipt(merged: Path) -> None:
    path = merged / "merge_receipt.json"
    receipt = json.loads(path.read_text())
    name = next(iter(receipt["output"]["tensors"]))
    receipt["output"]["tensors"][name]["digest"] = "0" * 64
    path.write_text(json.dumps(receipt))
    refused(merged, merged.parent / "adapter", error=IntegrityError, kind="receipt")


def test_out_of_order(merged: Path) -> None:
    folder = merged.parent
    second = make_adapter(folder / "second", seed=4)
    at.merge(merged, second, folder / "twice", undo=True)
    error = refused(folder / "twice", folder / "adapter", error=MismatchError, kind="out-of-order")
    assert at.adapter_digest(second) in str(error)


@pytest.mark.parametrize("check", ["targets", "off"])
def test_undo_needs_the_digest_of_the_base(merged: Path, check: str) -> None:
    folder = merged.parent
    with pytest.raises(UnsupportedError, match="--check-base"):
        at.merge(folder / "base", folder / "adapter", folder / "no", undo=True, check_base=check)
    assert not (folder / "no").exists()


def test_records_damaged_anywhere_are_an_error_or_the_base(merged: Path) -> None:
    """Even where receipt and undo file agree, nothing but the base ever appears."""
    import hashlib
    import random

    folder = merged.parent
    data = (merged / UNDO_FILE).read_bytes()
    receipt = json.loads((merged / "merge_receipt.json").read_text())
    chooser = random.Random(0)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        (merged / UNDO_FILE).write_bytes(damaged)
        receipt["output"]["undo"]["sha256"] = hashlib.sha256(damaged).hexdigest()
        (merged / "merge_receipt.json").write_text(json.dumps(receipt))
        try:
            at.unmerge(merged, folder / "undone", adapter=folder / "adapter", threads=1)
        except AdapterError:
            refusals += 1
            assert not (folder / "undone").exists()
        else:
            weights = (folder / "undone" / "model.safetensors").read_bytes()
            assert weights[-2000:] == (folder / "base" / "model.safetensors").read_bytes()[-2000:]
            shutil.rmtree(folder / "undone")
    print(f"{refusals} of 150 refused")
    assert refusals >= 100


def test_the_command_line(merged: Path) -> None:
    from click.testing import CliRunner

    from adapterhub_tools.cli.main import cli

    folder = merged.parent
    arguments = ["unmerge", str(merged), str(folder / "undone"), "--adapter", str(folder / "adapter")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "4 of 9 tensors restored bit for bit" in result.output
    assert files_of(folder / "undone") == files_of(folder / "base")
    other = make_adapter(folder / "other", seed=9)
    result = CliRunner().invoke(cli, ["unmerge", str(merged), str(folder / "no"), "--adapter", str(other)])
    assert result.exit_code == 5
