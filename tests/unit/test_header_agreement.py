"""What the strict header reader accepts, and that the format's own library reads the same in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

from adapterhub_tools.errors import FormatError, UnsupportedError
from adapterhub_tools.model.tensor import DTYPE_BITS
from adapterhub_tools.store.header import read_header
from tests.unit.safetensors_bytes import NAME, Memory, entry, pack

# --- what is accepted --------------------------------------------------------------------------------


def test_accepted() -> None:
    header = {
        "z": entry(dtype="F4", shape=[2, 3], offsets=[20, 23]),
        "__metadata__": {"format": "pt", "": "empty key"},
        "empty": entry(dtype="I64", shape=[0, 5], offsets=[20, 20]),
        "a.ü/..b": entry(dtype="BF16", shape=[2, 4], offsets=[4, 20]),
        "scalar": entry(shape=[], offsets=[0, 4]),
    }
    text = json.dumps(header, indent=1).encode()
    found = read_header(Memory(pack(text, bytes(23))))
    assert list(found.tensors) == ["scalar", "a.ü/..b", "empty", "z"]
    start = 8 + len(text)
    assert found.offsets == {"scalar": start, "a.ü/..b": start + 4, "empty": start + 20, "z": start + 20}
    assert found.metadata == {"format": "pt", "": "empty key"}
    assert (found.name, found.data_start, found.length) == (NAME, start, start + 23)
    spec = found.tensors["a.ü/..b"]
    assert (spec.name, spec.dtype, spec.shape, spec.nbytes) == ("a.ü/..b", "BF16", (2, 4), 16)


@pytest.mark.parametrize("spaces", range(9))
def test_any_padding_with_spaces(spaces: int) -> None:
    assert list(
        read_header(Memory(pack(json.dumps({"a": entry()}).encode() + b" " * spaces, bytes(4)))).tensors
    ) == ["a"]


@pytest.mark.parametrize("dtype", [d for d in DTYPE_BITS if not d.startswith("F6")])
def test_every_dtype(dtype: str) -> None:
    nbytes = DTYPE_BITS[dtype] * 8 // 8
    data = pack({"a": entry(dtype=dtype, shape=[8], offsets=[0, nbytes])}, bytes(nbytes))
    assert read_header(Memory(data)).tensors["a"].dtype == dtype


# --- agreement with the format's own library ---------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[dict[str, object], int]:
    position, header = 0, {}
    for name in draw(
        st.lists(names.filter(lambda n: n != "__metadata__"), min_size=1, max_size=4, unique=True)
    ):
        dtype = draw(st.sampled_from(["F32", "BF16", "F16", "F64", "U8", "BOOL", "I64", "F8_E4M3", "F4"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        bits = DTYPE_BITS[dtype]
        for dim in shape:
            bits *= dim
        end = position + (bits + 7) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(names, names, max_size=2))
    return dict(draw(st.permutations(list(header.items())))), position


TOKENS = [bytes([char]) for char in b'"{}[],:014-.e \n\\\0']
TOKENS += [b"null", b"true", b'"a"', b'"dtype"', b'"F32"', b"[0,4]", b"18446744073709551615", b"\\u0061"]


@settings(max_examples=1500, deadline=None)
@given(valid_headers(), st.data())
@example(({"a": entry()}, 4), None)
def test_what_is_accepted_means_the_same_to_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    made: tuple[dict[str, object], int],
    data: st.DataObject | None,
) -> None:
    """Damaged headers: only our errors, and what we accept the library reads with the same content."""
    header, nbytes = made
    text = bytearray(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
    extra = 0
    if data is not None:
        for _ in range(data.draw(st.integers(0, 3), label="mutations")):
            at = data.draw(st.integers(0, len(text)), label="at")
            cut = data.draw(st.integers(0, 4), label="cut")
            text[at : at + cut] = data.draw(
                st.sampled_from([b"", *TOKENS]) | st.binary(max_size=3), label="put"
            )
        extra = data.draw(st.sampled_from([0, 0, 0, -1, 1]), label="extra")
    body = bytes((7 * i + 1) % 251 for i in range(max(0, nbytes + extra)))
    content = pack(bytes(text), body)
    agree(content, tmp_path_factory.getbasetemp() / f"fuzz-{os.getpid()}.safetensors")


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    agree(content, tmp_path_factory.getbasetemp() / f"fuzz-{os.getpid()}.safetensors")


def agree(content: bytes, path: Path) -> None:
    """Checks that a file is refused with our errors, or read by both with the same content."""
    try:
        found = read_header(Memory(content))
    except (FormatError, UnsupportedError) as error:
        assert all(problem.file == NAME and problem.kind for problem in error.problems)  # noqa: PT017 - no error is right too
        return
    path.write_bytes(content)
    with safe_open(path, framework="numpy") as theirs:
        assert set(theirs.keys()) == set(found.tensors)
        assert (theirs.metadata() or {}) == found.metadata
        for name, spec in found.tensors.items():
            view = theirs.get_slice(name)
            assert tuple(view.get_shape()) == spec.shape
            assert view.get_dtype() == spec.dtype
    for name, (dtype, shape, data) in library_content(content).items():
        spec = found.tensors[name]
        assert (spec.dtype, spec.shape) == (dtype, shape)
        assert content[found.offsets[name] : found.offsets[name] + spec.nbytes] == data


def library_content(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns what the library's own parser finds in a file: dtype, shape and bytes by name."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in deserialize(content)
    }


def test_the_mutations_reach_both_answers() -> None:
    """Guards the fuzzing above: valid headers are accepted, so agreement is tested at all."""
    good = pack({"a": entry()}, bytes(4))
    assert list(read_header(Memory(good)).tensors) == ["a"]
    assert library_content(good) == {"a": ("F32", (1,), bytes(4))}
