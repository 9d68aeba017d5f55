"""An undo file that was made up, with a receipt that agrees: it neither leaves the folder nor is believed."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import adapterhub_tools as at
from adapterhub_tools.errors import FormatError, IntegrityError
from tests.undo.models import make_adapter, make_base

Q0 = "model.layers.0.self_attn.q_proj.weight"


def rewrite(merged: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the description in an undo file, and the size and SHA-256 that the receipt has of the file."""
    path = merged / "merge.undo"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__")
    blobs = {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }
    packed, size = struct.unpack("<II", blobs["undo.json"][:8])
    assert len(blobs["undo.json"]) == 8 + packed  # one piece
    description = json.loads(zstandard.decompress(blobs["undo.json"][8:], max_output_size=size))
    edit(description)
    text = json.dumps(description).encode()
    frame = zstandard.compress(text)
    blobs["undo.json"] = struct.pack("<II", len(frame), len(text)) + frame
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, blob in blobs.items():
        entries[name] = {"dtype": "U8", "shape": [len(blob)], "data_offsets": [end, end + len(blob)]}
        end += len(blob)
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(blobs.values()))
    receipt = json.loads((merged / "merge_receipt.json").read_text())
    receipt["output"]["undo"] |= {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (merged / "merge_receipt.json").write_text(json.dumps(receipt))


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "base")
    at.merge(base, make_adapter(tmp_path / "adapter"), tmp_path / "merged", undo=True)
    return tmp_path / "merged"


def undo(merged: Path) -> at.UnmergeReport:
    return at.unmerge(merged, merged.parent / "undone", adapter=merged.parent / "adapter", threads=1)


def test_what_is_rewritten_without_a_change_still_undoes(merged: Path) -> None:
    rewrite(merged, lambda _: None)
    assert undo(merged).exact


@pytest.mark.parametrize("field", ["headers", "files"])
@pytest.mark.parametrize("form", ["../{}", "a/../../{}", "absolute", "..\\{}", ""])
def test_no_name_leads_out_of_the_output(merged: Path, field: str, form: str) -> None:
    name = str(merged.parent / "escaped") if form == "absolute" else form.format("escaped")

    def edit(description: dict[str, Any]) -> None:
        first = next(iter(description[field]))
        description[field][name] = description[field].pop(first)

    rewrite(merged, edit)
    before = sorted(merged.parent.iterdir())
    with pytest.raises(FormatError) as caught:
        undo(merged)
    assert [problem.kind for problem in caught.value.problems] == ["undo-file"]
    assert sorted(merged.parent.iterdir()) == before


def _terms(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    def edit(description: dict[str, Any]) -> None:
        change(description["tensors"][Q0]["terms"][0])

    return edit


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a hyperparameter is missing": _terms(lambda term: term["hparams"].pop("alpha")),
    "a hyperparameter is another": _terms(lambda term: term["hparams"].update(alpha=9)),
    "a hyperparameter is a list": _terms(lambda term: term["hparams"].update(rank=[4])),
    "the kind is missing": _terms(lambda term: term["hparams"].pop("kind")),
    "the multiplier is a text": _terms(lambda term: term["hparams"].update(multiplier="1")),
    "another method": _terms(lambda term: term.update(method="loha")),
    "a module that is not there": _terms(lambda term: term.update(module="model.layers.9.self_attn.q_proj")),
    "an adapter that is not there": _terms(lambda term: term.update(adapter=1)),
    "a factor is missing": _terms(lambda term: term["factors"].pop("A")),
    "the factors are swapped": _terms(
        lambda term: term["factors"].update(A=term["factors"]["B"], B=term["factors"]["A"])
    ),
    "a part of the tensor": _terms(lambda term: term["placement"].update(rows=[0, 4])),
    "no terms": lambda description: description["tensors"][Q0].update(terms=[]),
    "another predictor": lambda description: description["tensors"][Q0].update(predictor="scaled-1"),
    "a blob that is not there": lambda description: description["tensors"][Q0].update(blob="999999"),
    "a tensor is missing": lambda description: description["tensors"].pop(Q0),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_cannot_be_is_refused(merged: Path, name: str) -> None:
    rewrite(merged, EDITS[name])
    with pytest.raises(FormatError) as caught:
        undo(merged)
    assert [problem.kind for problem in caught.value.problems] == ["undo-file"]
    assert not (merged.parent / "undone").exists()


def test_what_could_be_but_is_not_gives_another_base(merged: Path) -> None:
    """A sign that fits everything but the bits of the base."""
    rewrite(merged, _terms(lambda term: term["hparams"].update(multiplier=-1.0)))
    with pytest.raises(IntegrityError, match="what was restored is"):
        undo(merged)
    assert not (merged.parent / "undone").exists()
