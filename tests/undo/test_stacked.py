"""Merges on top of each other are undone in order; out of order is an error that says what comes first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from tests.undo.models import files_of, make_adapter, make_base

STACKS = ["uu", "up", "pu", "pp", "uuu", "upu", "puu", "uup", "ppp", "ppu"]
"""The merges of a stack, the first one first: u with an undo file, p without."""


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def stacked(folder: Path, kinds: str) -> list[Path]:
    """Returns the base and what each merge wrote."""
    folders = [make_base(folder / "base", hidden=64)]
    for number, kind in enumerate(kinds):
        adapter = make_adapter(folder / f"adapter{number}", hidden=64, seed=number + 1)
        out = folder / f"merged{number}"
        code, output = invoke("merge", folders[-1], adapter, out, *(["--undo"] if kind == "u" else []))
        assert code == 0, output
        folders.append(out)
    return folders


@pytest.mark.parametrize("approximate", [False, True], ids=["exact", "approximate"])
@pytest.mark.parametrize("kinds", STACKS)
def test_a_lower_adapter_is_told_what_comes_first(tmp_path: Path, kinds: str, approximate: bool) -> None:
    folders = stacked(tmp_path, kinds)
    digests = [at.adapter_digest(tmp_path / f"adapter{number}") for number in range(len(kinds))]
    flags = ["--approximate"] if approximate else []
    for number in range(len(kinds) - 1):
        for others in ([], ["--adapter", tmp_path / f"adapter{len(kinds) - 1}"]):
            lower = tmp_path / f"adapter{number}"
            code, output = invoke(
                "unmerge", folders[-1], tmp_path / "no", "--adapter", lower, *others, *flags, "--json"
            )
            assert code == 5, output
            (problem,) = json.loads(output)["problems"]
            assert problem["kind"] == "out-of-order"
            assert problem["file"] == str(lower)
            steps = []
            for other in range(len(kinds) - 1, number - 1, -1):
                exact = set(kinds[other:]) == {"u"}
                what = "this one" if other == number else f"the merge of {digests[other]}"
                steps.append(f"{what} ({'with its undo file' if exact else 'with --approximate'})")
            assert problem["remedy"].startswith(f"Undo first {', then '.join(steps)}.")
            below = kinds[number] == "u" and "p" in kinds[number:]
            written = at.content_digest(folders[number + 1], cache=False).digest
            assert (written in problem["remedy"]) == below
            assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kinds", STACKS)
def test_the_way_that_is_told_leads_down(tmp_path: Path, kinds: str) -> None:
    """Exactly as far as there are undo files, and from there approximately to the last."""
    folders = stacked(tmp_path, kinds)
    here = folders[-1]
    for number in range(len(kinds) - 1, -1, -1):
        exact = set(kinds[number:]) == {"u"}
        adapter, below = tmp_path / f"adapter{number}", tmp_path / f"down{number}"
        arguments = ["unmerge", here, below, "--adapter", adapter]
        if not exact:
            code, output = invoke(*arguments)
            assert code == 3, output
            assert "cannot be undone exactly" in output
            arguments.append("--approximate")
        code, output = invoke(*arguments)
        assert code == 0, output
        if exact:
            assert files_of(below) == files_of(folders[number])
        here = below
    true, near = load_file(folders[0] / "model.safetensors"), load_file(here / "model.safetensors")
    assert true.keys() == near.keys()
    for name, values in true.items():
        # Each approximate step is off by half a unit of the merged value at most, and by one rounding.
        assert torch.allclose(values.double(), near[name].double(), rtol=2.0**-5, atol=2.0**-12), name
    if set(kinds) != {"u"}:
        code, output = invoke("unmerge", here, tmp_path / "no", "--adapter", adapter, "--approximate")
        assert code == 5, output
        assert "nothing left to undo" in output


def test_an_adapter_of_no_merge_is_another(tmp_path: Path) -> None:
    folders = stacked(tmp_path, "up")
    other = make_adapter(tmp_path / "other", hidden=64, seed=9)
    code, output = invoke("unmerge", folders[-1], tmp_path / "no", "--adapter", other)
    assert code == 5
    assert "the merge was of" in output


def test_a_merge_onto_changed_weights_remembers_no_merge_before(tmp_path: Path) -> None:
    """A receipt beside other weights than its own tells nothing of them."""
    folders = stacked(tmp_path, "p")
    shutil.copy(folders[0] / "model.safetensors", folders[1] / "model.safetensors")
    report = at.merge(folders[1], make_adapter(tmp_path / "other", hidden=64, seed=9), tmp_path / "again")
    assert report.receipt is not None
    assert report.receipt.base.earlier == ()


@pytest.mark.parametrize("content", [b"{}", b"no JSON", b'{"schema_version": "9.0"}'])
def test_a_receipt_that_cannot_be_read_stops_no_merge(tmp_path: Path, content: bytes) -> None:
    folders = stacked(tmp_path, "p")
    (folders[1] / "merge_receipt.json").write_bytes(content)
    report = at.merge(folders[1], make_adapter(tmp_path / "other", hidden=64, seed=9), tmp_path / "again")
    assert report.receipt is not None
    assert report.receipt.base.earlier == ()
    assert any("earlier merges are not recorded" in note for note in report.notes)
