"""Values that no option has are refused by every function alike, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import adapterhub_tools as at
from tests.tiny_files import adapter_tensors, counted, make_adapter

Call = Callable[[Path, Path, Path], object]

WRITERS: dict[str, Call] = {
    "merge": lambda base, adapter, out: at.merge(base, adapter, out, dtype="half"),
    "svd_shrink": lambda base, adapter, out: at.svd_shrink(adapter, out, rank=1, dtype="half"),
    "convert to lora": lambda base, adapter, out: at.convert(adapter, out, to="lora", dtype="half"),
    "convert to dora": lambda base, adapter, out: at.convert(
        adapter, out, to="dora", base=base, dtype="half"
    ),
    "extract": lambda base, adapter, out: at.extract(base, base, out, rank=1, dtype="half"),
    "fit": lambda base, adapter, out: at.fit(adapter, out, server="vllm", dtype="half"),
    "combine_adapters": lambda base, adapter, out: at.combine_adapters(
        [adapter, other(adapter)], out=out, weights=[1, 1], dtype="half"
    ),
}
NO_OUT: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda base, adapter: at.merge(base, adapter, None),
    "svd_shrink": lambda base, adapter: at.svd_shrink(adapter, None, rank=1),
    "convert": lambda base, adapter: at.convert(adapter, None, to="dora", base=base),
    "extract": lambda base, adapter: at.extract(base, base, None, rank=1),
    "unmerge": lambda base, adapter: at.unmerge(base, None, adapter=adapter),
    "combine_adapters": lambda base, adapter: at.combine_adapters(
        [adapter, other(adapter)], out=None, weights=[1, 1]
    ),
}


def other(adapter: Path) -> Path:
    """A second adapter beside the first."""
    tensors = {name: counted(*spec[:1], *spec[1], start=3) for name, spec in adapter_tensors().items()}
    return make_adapter(adapter.with_name("other"), tensors=tensors)


@pytest.mark.parametrize("name", WRITERS)
def test_a_dtype_that_is_not_written(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^dtype must be one of float64, .*, not 'half'$"):
        WRITERS[name](base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NO_OUT)
def test_no_output_outside_a_dry_run(name: str, base: Path, adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"^out may be None only in a dry run$"):
        NO_OUT[name](base, adapter)
