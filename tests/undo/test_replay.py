"""A merge is repeated from its receipt: the same result, or an error that says what differs."""

from __future__ import annotations

from pathlib import Path

import pytest

import adapterhub_tools as at
from adapterhub_tools.errors import IntegrityError, MismatchError
from adapterhub_tools.model.receipt import RECEIPT_FILE
from tests.undo.models import files_of, make_adapter, make_base


def test_the_same_folder_again(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    at.merge(base, adapters, tmp_path / "one", scale=[0.3, -1.5], dtype="float32")
    report = at.merge(base, adapters, tmp_path / "two", replay=tmp_path / "one" / RECEIPT_FILE)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert report.receipt is not None
    assert [adapter.scale for adapter in report.receipt.adapters] == [0.3, -1.5]


def test_another_base_says_what_differs(tmp_path: Path) -> None:
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", seed=1)
    adapter = make_adapter(tmp_path / "adapter")
    at.merge(base, adapter, tmp_path / "one")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError) as caught:
        at.merge(other, adapter, tmp_path / "two", replay=tmp_path / "one")
    places = [problem.loc for problem in caught.value.problems]
    assert places[:3] == ["/base/digest", "/base/targets_digest", "/output/digest"]
    assert any(place.startswith("/output/tensors/") for place in places)
    assert not (tmp_path / "two").exists()


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    at.merge(base, adapters, tmp_path / "one")
    for given in (adapters[:1], adapters[::-1]):
        with pytest.raises(MismatchError, match="in its order"):
            at.merge(base, given, tmp_path / "two", replay=tmp_path / "one")


def test_options_that_the_receipt_decides_are_refused(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    at.merge(base, adapter, tmp_path / "one")
    with pytest.raises(MismatchError, match="--scale"):
        at.merge(base, adapter, tmp_path / "two", replay=tmp_path / "one", scale=2.0)
