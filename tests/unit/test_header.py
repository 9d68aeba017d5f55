"""The strict reader of safetensors headers: each kind of bad file, and the limits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_tools.errors import AdapterError, FormatError, StoreError, UnsupportedError
from adapterhub_tools.store.files import LocalFile
from adapterhub_tools.store.header import MAX_HEADER_BYTES, SafetensorsHeader, named_magic, read_header
from adapterhub_tools.store.values import bool_problems
from tests.unit.safetensors_bytes import NAME, Memory, entry, pack

GOOD = pack({"a": entry()}, bytes(4))
A = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
B = b'{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'


def one(**parts: object) -> bytes:
    return pack({"a": entry(**parts)}, bytes(4))


def padded(before: bytes = b"", after: bytes = b"") -> bytes:
    return pack(before + b'{"a":' + A + b"}" + after, bytes(4))


def empty_tensors(count: int) -> bytes:
    pieces = (b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(count))
    return pack(b"{" + b",".join(pieces) + b"}")


def named(name: str) -> bytes:
    return pack({name: entry()}, bytes(4))


# number and name -> bytes, kind of the problem, where it is said to be
ROWS: dict[str, tuple[bytes | Callable[[], bytes], str, str]] = {
    "1 empty file": (b"", "header-too-small", "header"),
    "2 seven bytes": (bytes(7), "header-too-small", "header"),
    "3 header of 0 bytes": (bytes(16), "header-empty", "header"),
    "4 header of 2**64-1 bytes": (b"\xff" * 16, "header-too-large", "header"),
    "5 header of 100,000,001 bytes": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        "header-too-large",
        "header",
    ),
    "6 header beyond the file": ((100).to_bytes(8, "little") + b"{}", "header-truncated", "header"),
    "7 no tensor": (pack(b"{}"), "no-tensors", "header"),
    "7 no tensor but metadata": (pack({"__metadata__": {"format": "pt"}}), "no-tensors", "header"),
    "8 an array": (pack([]), "not-an-object", "header"),
    "9 invalid UTF-8": (pack(b'{"\xff":' + A + b"}", bytes(4)), "encoding", "header"),
    "10 byte order mark": (padded(b"\xef\xbb\xbf"), "header-start", "header"),
    "11 leading spaces": (padded(b"  "), "header-start", "header"),
    "12 newline padding": (padded(after=b"\n\t"), "header-trailing-bytes", "header"),
    "12 newline between spaces": (padded(after=b" \n "), "header-trailing-bytes", "header"),
    "13 NUL padding": (padded(after=b"\0\0"), "header-trailing-bytes", "header"),
    "13 garbage after the object": (padded(after=b"garbage"), "header-trailing-bytes", "header"),
    "13 a second object": (padded(after=b"{}"), "json", "header"),
    "14 duplicate tensor": (pack(b'{"a":' + A + b',"a":' + A + b"}", bytes(4)), "duplicate-key", "header"),
    "15 duplicate by escape": (
        pack(b'{"a":' + A + b',"\\u0061":' + A + b"}", bytes(4)),
        "duplicate-key",
        "header",
    ),
    "16 swap polyglot": (
        pack(b'{"a":' + A + b',"b":' + B + b',"b":' + A + b',"a":' + B + b"}", bytes(8)),
        "duplicate-key",
        "header",
    ),
    "17 duplicate dtype": (
        pack(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "duplicate-key",
        "header",
    ),
    "18 duplicate metadata": (
        pack(b'{"__metadata__":{},"__metadata__":{},"a":' + A + b"}", bytes(4)),
        "duplicate-key",
        "header",
    ),
    "18 duplicate in metadata": (
        pack(b'{"__metadata__":{"x":"1","x":"2"},"a":' + A + b"}", bytes(4)),
        "duplicate-key",
        "header",
    ),
    "19 metadata of a number": (
        pack({"__metadata__": {"x": 1}, "a": entry()}, bytes(4)),
        "metadata-type",
        "__metadata__",
    ),
    "19 metadata is an array": (
        pack({"__metadata__": [], "a": entry()}, bytes(4)),
        "metadata-type",
        "__metadata__",
    ),
    "20 metadata is null": (
        pack({"__metadata__": None, "a": entry()}, bytes(4)),
        "metadata-type",
        "__metadata__",
    ),
    "21 unknown field": (one(extra=1), "unknown-field", "a"),
    "21 missing field": (pack({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "missing-field", "a"),
    "21 entry is an array": (pack({"a": ["F32", [1], [0, 4]]}, bytes(4)), "entry-type", "a"),
    "21 entry is null": (pack({"a": None}, bytes(4)), "entry-type", "a"),
    "22 overlap": (
        pack({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(offsets=[4, 8])}, bytes(8)),
        "overlap",
        "b",
    ),
    "23 one range ten times": (pack({f"t{i}": entry() for i in range(10)}, bytes(4)), "overlap", "t1"),
    "24 hole": (pack({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "gap", "b"),
    "25 first offset not 0": (pack({"a": entry(offsets=[4, 8])}, bytes(8)), "gap", "a"),
    "26 ZIP appended": (GOOD + b"PK\x03\x04" + bytes(30), "trailing-data", "a"),
    "26 PDF appended": (GOOD + b"%PDF-1.7\n", "trailing-data", "a"),
    "27 one byte short": (GOOD[:-1], "data-truncated", "a"),
    "28 reversed offsets": (one(offsets=[4, 0]), "offsets-type", "a"),
    "28 negative offset": (one(offsets=[-4, 0]), "offsets-type", "a"),
    "28 float offsets": (one(offsets=[0, 4.0]), "offsets-type", "a"),
    "28 string offsets": (one(offsets=["0", "4"]), "offsets-type", "a"),
    "28 boolean offsets": (one(offsets=[False, 4]), "offsets-type", "a"),
    "28 minus zero": (pack(b'{"a":' + A.replace(b"[0,4]", b"[-0,4]") + b"}", bytes(4)), "offsets-type", "a"),
    "28 three offsets": (one(offsets=[0, 4, 4]), "offsets-type", "a"),
    "28 offsets are null": (one(offsets=None), "offsets-type", "a"),
    "29 offset 2**64": (one(offsets=[0, 2**64]), "json-number", "header"),
    "29 offset 2**64-1": (one(shape=[2**48 - 1], offsets=[0, 2**64 - 1]), "size-mismatch", "a"),
    "30 shape against bytes": (one(shape=[2]), "size-mismatch", "a"),
    "30 no shape against bytes": (
        pack({"a": entry(shape=[], offsets=[0, 8])}, bytes(8)),
        "size-mismatch",
        "a",
    ),
    "31 product overflow": (one(shape=[2**32, 2**32]), "size-overflow", "a"),
    "31 overflow, then zero": (
        pack({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}),
        "size-overflow",
        "a",
    ),
    "32 dimension 2**63": (pack({"a": entry(shape=[0, 2**63], offsets=[0, 0])}), "dim-limit", "a"),
    "32 dimension 2**48": (pack({"a": entry(shape=[0, 2**48], offsets=[0, 0])}), "dim-limit", "a"),
    "33 negative dimension": (one(shape=[-1]), "shape-type", "a"),
    "33 float dimension": (one(shape=[1.0]), "shape-type", "a"),
    "33 boolean dimension": (one(shape=[True]), "shape-type", "a"),
    "33 string dimension": (one(shape=["1"]), "shape-type", "a"),
    "33 shape is a number": (one(shape=1), "shape-type", "a"),
    "34 100,000 dimensions": (one(shape=[1] * 100_000), "rank-limit", "a"),
    "34 nine dimensions": (one(shape=[1] * 9), "rank-limit", "a"),
    "35 unknown dtype": (one(dtype="F33"), "dtype", "a"),
    "35 lowercase dtype": (one(dtype="f32"), "dtype", "a"),
    "35 dtype is a number": (one(dtype=32), "dtype", "a"),
    "36 six-bit dtype": (
        pack({"a": entry(dtype="F6_E2M3", shape=[4], offsets=[0, 3])}, bytes(3)),
        "dtype",
        "a",
    ),
    "37 odd number of F4": (
        pack({"a": entry(dtype="F4", shape=[3], offsets=[0, 2])}, bytes(2)),
        "sub-byte-alignment",
        "a",
    ),
    "38 200,000 levels": (pack(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "json-depth", "header"),
    "39 header of 94 MB": (
        lambda: (94_000_000).to_bytes(8, "little") + b"{" + b" " * 93_999_998 + b"}",
        "header-too-large",
        "header",
    ),
    "40 201,000 empty tensors": (lambda: empty_tensors(201_000), "too-many-tensors", "header"),
    "40 1.6 million empty tensors": (lambda: empty_tensors(1_600_000), "header-too-large", "header"),
    "41 empty name": (named(""), "tensor-name", "(empty name)"),
    "41 NUL in the name": (named("a\0b"), "tensor-name", "a\0b"),
    "41 control character": (named("a\x1b[31mb"), "tensor-name", "a\x1b[31mb"),
    "41 bidirectional control": (named("a\u202eb"), "tensor-name", "a\u202eb"),
    "41 parent folder": (named("../a"), "tensor-name", "../a"),
    "41 parent folder inside": (named("a/../b"), "tensor-name", "a/../b"),
    "41 parent folder, backslash": (named("a\\.."), "tensor-name", "a\\.."),
    "41 1 MB name": (named("n" * 1_000_000), "tensor-name", "n" * 1_000_000),
    "41 1,001 bytes of name": (named("é" * 501), "tensor-name", "é" * 501),
    "42 lone surrogate": (pack(b'{"\\ud800":' + A + b"}", bytes(4)), "encoding", "header"),
    "44 LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n",
        "lfs-pointer",
        "header",
    ),
    "45 GGUF": (b"GGUF\x03\0\0\0" + bytes(16), "not-safetensors", "header"),
    "45 ZIP": (b"PK\x03\x04\x14\0\0\0" + bytes(16), "not-safetensors", "header"),
    "45 pickle": (b"\x80\x02}q\0X\x01\0\0\0aK\x01s.", "not-safetensors", "header"),
    "45 HTML": (b"<!DOCTYPE html><html></html>", "not-safetensors", "header"),
}


def read(path: Path) -> SafetensorsHeader:
    with LocalFile(path, name=NAME) as source:
        return read_header(source)


@pytest.mark.parametrize("row", ROWS)
def test_refused(row: str, tmp_path: Path) -> None:
    data, kind, loc = ROWS[row]
    path = tmp_path / NAME
    path.write_bytes(data if isinstance(data, bytes) else data())
    began = time.process_time()
    with pytest.raises(AdapterError) as caught:
        read(path)
    assert time.process_time() - began < 2
    assert type(caught.value) is (UnsupportedError if row.startswith("36") else FormatError)
    first = caught.value.problems[0]
    assert (first.kind, first.file, first.loc) == (kind, NAME, loc)
    assert all(problem.remedy for problem in caught.value.problems)
    assert str(caught.value).startswith(f"{NAME}: ")
    assert "\x1b" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_every_row_is_here() -> None:
    """Rows 43, 46 and 47 have tests of their own below."""
    assert {int(row.split()[0]) for row in ROWS} | {43, 46, 47} == set(range(1, 48))


def test_row_43_a_bool_of_two() -> None:
    data = bytearray(9_000_000)
    data[4_500_000] = 2
    span = entry(dtype="BOOL", shape=[9_000_000], offsets=[4, 9_000_004])
    source = Memory(pack({"a": entry(), "b": span}, b"\x02" * 4 + bytes(data)))
    problems = bool_problems(source, read_header(source))
    assert [(p.kind, p.file, p.loc) for p in problems] == [("bool-value", NAME, "b")]
    assert "element 4500000 is 2" in problems[0].message
    data[4_500_000] = 1
    source = Memory(pack({"a": entry(), "b": span}, b"\x02" * 4 + bytes(data)))
    assert bool_problems(source, read_header(source)) == []


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_row_46_not_a_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(FormatError, match=f"^{NAME}: found a .*expected a regular file") as caught:
        read(path)
    assert caught.value.problems[0].kind == "not-regular"


def test_row_47_truncated_while_open(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(GOOD)
    with LocalFile(path, name=NAME) as source:
        os.truncate(path, 20)
        with pytest.raises(StoreError, match=f"^{NAME}: the file was changed"):
            read_header(source)


def test_row_47_replaced_while_open(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(GOOD)
    with LocalFile(path, name=NAME) as source:
        read_header(source)
        (tmp_path / "new").write_bytes(GOOD)
        (tmp_path / "new").replace(path)
        with pytest.raises(StoreError, match=f"^{NAME}: the file was changed"):
            source.check_unchanged()


def test_limits_hold_before_reading() -> None:
    source = Memory((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(1000))
    with pytest.raises(FormatError, match="16,777,217 bytes; the limit is 16,777,216"):
        read_header(source)
    assert source.reads <= 24


def test_of_the_data_nothing_is_read() -> None:
    source = Memory(pack({"a": entry(shape=[1_000_000], offsets=[0, 4_000_000])}, bytes(4_000_000)))
    read_header(source)
    assert source.reads <= 24 + len(source.data) - 4_000_000


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """The largest header within the limits, in a process of its own."""
    (tmp_path / NAME).write_bytes(empty_tensors(200_000))
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from adapterhub_tools.store.files import LocalFile\n"
        "from adapterhub_tools.store.header import read_header\n"
        "with LocalFile(Path(sys.argv[1]), name='x') as source:\n"
        "    assert len(read_header(source).tensors) == 200_000\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / NAME)]
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(peak) < 300_000


def test_one_tensor_too_many() -> None:
    with pytest.raises(FormatError, match="200,001 tensors; the limit is 200,000"):
        read_header(Memory(empty_tensors(200_001)))


def test_every_problem_is_listed() -> None:
    header = {
        "__metadata__": {"x": 1},
        "a": entry(dtype="F33", extra=1),
        "b": entry(shape=[2], offsets=[8, 12]),
        "../c": entry(offsets=[10, 14]),
    }
    with pytest.raises(FormatError) as caught:
        read_header(Memory(pack(header, bytes(20))))
    assert sorted(problem.kind for problem in caught.value.problems) == [
        "dtype",
        "gap",
        "metadata-type",
        "overlap",
        "size-mismatch",
        "tensor-name",
        "trailing-data",
        "unknown-field",
    ]


def test_duplicates_do_not_hide_other_problems() -> None:
    text = b'{"a":' + A + b',"a":' + A + b',"b":' + B.replace(b"F32", b"F33") + b"}"
    with pytest.raises(FormatError) as caught:
        read_header(Memory(pack(text, bytes(8))))
    assert [problem.kind for problem in caught.value.problems] == ["duplicate-key", "dtype"]


def test_many_problems_are_counted() -> None:
    header = {f"t{i}": entry(dtype="F33", offsets=[4 * i, 4 * i + 4]) for i in range(5000)}
    with pytest.raises(FormatError) as caught:
        read_header(Memory(pack(header, bytes(20_000))))
    assert len(caught.value.problems) == 101
    assert caught.value.problems[-1].kind == "more-problems"


def test_format_problems_come_before_what_is_unsupported() -> None:
    header = {"a": entry(dtype="F6_E3M2", shape=[4], offsets=[0, 3]), "b": entry(dtype="F33", offsets=[3, 7])}
    with pytest.raises(FormatError) as caught:
        read_header(Memory(pack(header, bytes(7))))
    assert [problem.loc for problem in caught.value.problems] == ["b"]


def test_magic_in_a_sound_file_is_no_obstacle() -> None:
    """A header of 0x3c = 60 bytes makes the file start with '<', as a page would."""
    text = (b'{"a":' + A + b"}").ljust(60)
    assert len(text) == 60
    assert named_magic(pack(text)) is not None
    assert list(read_header(Memory(pack(text, bytes(4)))).tensors) == ["a"]
