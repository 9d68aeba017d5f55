"""The files we write: the same input is the same bytes, aligned, and read back by both readers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from adapterhub_tools.errors import UnsupportedError
from adapterhub_tools.model.tensor import DTYPE_BITS, TensorSpec
from adapterhub_tools.store import layout
from adapterhub_tools.store.files import LocalFile
from adapterhub_tools.store.header import read_header
from adapterhub_tools.store.layout import build_file


def spec(name: str, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_the_exact_bytes() -> None:
    head, offsets = build_file([spec("b"), spec("a", "BF16", (1, 3))], {"z": "é", "format": "pt"})
    text = (
        '{"__metadata__":{"format":"pt","z":"é"},'
        '"a":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]},'
        '"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ).encode()
    assert head[8:].rstrip(b" ") == text
    assert len(head) == 192
    assert head[:8] == (184).to_bytes(8, "little")
    assert offsets == {"b": 192, "a": 200}
    assert list(offsets) == ["b", "a"]


def test_metadata_only_where_there_is_some() -> None:
    assert b"__metadata__" not in build_file([spec("a")], {})[0]


def test_metadata_comes_first_whatever_the_names() -> None:
    header = json.loads(build_file([spec("A"), spec("\x20")], {"x": "y"})[0][8:])
    assert list(header) == ["__metadata__", " ", "A"]


def test_the_order_is_kept_unless_alignment_needs_another() -> None:
    kept = [spec("c", "F64"), spec("b", "BF16", (4,)), spec("a", "F32")]
    assert list(build_file(kept, {})[1]) == ["c", "b", "a"]
    moved = [spec("d", "U8", (3,)), spec("c", "BF16", (1,)), spec("b", "F64"), spec("a", "F64")]
    assert list(build_file(moved, {})[1]) == ["b", "a", "c", "d"]


def test_a_name_given_twice() -> None:
    with pytest.raises(ValueError, match="'a' is given twice"):
        build_file([spec("a"), spec("a")], {})


def test_more_than_can_be_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_TENSORS", 2)
    build_file([spec("a"), spec("b")], {})
    with pytest.raises(UnsupportedError, match=r"a file of 3 tensors.*Spread the tensors"):
        build_file([spec("a"), spec("b"), spec("c")], {})
    monkeypatch.setattr(layout, "MAX_HEADER_BYTES", 50)
    with pytest.raises(UnsupportedError, match="a header of"):
        build_file([spec("a")], {})


names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf"]), min_size=1, max_size=8)
dtypes = st.sampled_from([dtype for dtype in DTYPE_BITS if DTYPE_BITS[dtype] >= 8])
tensors = st.dictionaries(
    names.filter(lambda name: name != "__metadata__" and ".." not in name),
    st.tuples(dtypes, st.lists(st.integers(0, 4), max_size=3)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(tensors, st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), names, max_size=3))
def test_both_readers_read_it_back(
    tmp_path_factory: pytest.TempPathFactory,
    made: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str],
) -> None:
    specs = [spec(name, dtype, tuple(shape)) for name, (dtype, shape) in made.items()]
    head, offsets = build_file(specs, metadata)
    assert (head, offsets) == build_file(specs, dict(reversed(metadata.items())))
    assert len(head) % 64 == 0
    data = head + bytes(sum(one.nbytes for one in specs))
    path = tmp_path_factory.getbasetemp() / "layout.safetensors"
    path.write_bytes(data)
    with LocalFile(path, name="x") as source:
        found = read_header(source)
    assert found.tensors == {one.name: one for one in specs}
    assert found.offsets == offsets
    assert found.metadata == metadata
    assert found.data_start == len(head)
    assert all(offsets[one.name] % (DTYPE_BITS[one.dtype] // 8) == 0 for one in specs)
    theirs = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in deserialize(data)}
    assert theirs == {one.name: (one.dtype, one.shape) for one in specs}


def test_empty_tensors_alone(tmp_path: Path) -> None:
    """Such a file is legal and has no data."""
    head, offsets = build_file([spec("a", shape=(0,))], {})
    (tmp_path / "x").write_bytes(head)
    with LocalFile(tmp_path / "x", name="x") as source:
        assert read_header(source).offsets == offsets == {"a": len(head)}
