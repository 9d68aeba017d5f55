"""JSON that two readers could understand differently, or that could exhaust one, is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_tools.errors import FormatError, StoreError
from adapterhub_tools.store.strict_json import (
    MAX_REPORTED,
    examine_json,
    json_type,
    parse_json,
    read_json,
    read_json_object,
)

DEEP = 64


def kinds(data: bytes) -> list[str]:
    with pytest.raises(FormatError) as caught:
        parse_json(data, file="a.json")
    assert all(problem.file == "a.json" and problem.remedy for problem in caught.value.problems)
    return [problem.kind for problem in caught.value.problems]


REFUSED = {
    "empty": (b"", "json"),
    "only spaces": (b"  ", "json"),
    "byte order mark": (b"\xef\xbb\xbf{}", "encoding"),
    "utf-16": ("{}".encode("utf-16"), "encoding"),
    "not utf-8": (b'{"a": "\xff"}', "encoding"),
    "utf-8 of a surrogate": (b'{"a": "\xed\xa0\x80"}', "encoding"),
    "overlong utf-8": (b'{"a": "\xc0\x80"}', "encoding"),
    "trailing garbage": (b"{} x", "json"),
    "two values": (b"{}{}", "json"),
    "trailing NUL": (b"{}\0", "json"),
    "trailing comma": (b"[1,]", "json"),
    "single quotes": (b"{'a': 1}", "json"),
    "comment": (b"{} // no", "json"),
    "control character in a string": (b'"a\nb"', "json"),
    "leading zero": (b"[01]", "json"),
    "plus": (b"[+1]", "json"),
    "hexadecimal": (b"[0x10]", "json"),
    "bare word": (b"[True]", "json"),
    "form feed as space": (b"[\x0c1]", "json"),
    "duplicate key": (b'{"a": 1, "a": 1}', "duplicate-key"),
    "duplicate key, escaped": (b'{"a": 1, "\\u0061": 2}', "duplicate-key"),
    "duplicate key, nested": (b'{"x": [{"a": 1, "b": 2, "a": 3}]}', "duplicate-key"),
    "NaN": (b'{"a": NaN}', "json-number"),
    "Infinity": (b"[Infinity]", "json-number"),
    "-Infinity": (b"[-Infinity]", "json-number"),
    "overflowing float": (b"[1e400]", "json-number"),
    "float of a million digits": (b"[" + b"1" * 1_000_000 + b".5]", "json-number"),
    "integer above 2**64 - 1": (b"[18446744073709551616]", "json-number"),
    "integer below -2**63": (b"[-9223372036854775809]", "json-number"),
    "integer of a million digits": (b"[" + b"9" * 1_000_000 + b"]", "json-number"),
    "lone surrogate": (b'["\\ud800"]', "encoding"),
    "lone low surrogate in a key": (b'{"\\uDC00x": 1}', "encoding"),
    "65 levels": (b"[" * (DEEP + 1) + b"]" * (DEEP + 1), "json-depth"),
    "65 levels of objects": (b'{"a":' * (DEEP + 1) + b"1" + b"}" * (DEEP + 1), "json-depth"),
    "200,000 levels": (b"[" * 200_000 + b"]" * 200_000, "json-depth"),
    "200,000 levels, open": (b"[" * 200_000, "json-depth"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "lfs-pointer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    data, kind = REFUSED[case]
    began = time.process_time()
    assert kinds(data) == [kind]
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"{}", {}),
        (b' {"a":\r\n\t1 } \n', {"a": 1}),
        (b"[18446744073709551615, -9223372036854775808]", [2**64 - 1, -(2**63)]),
        (b"[1e308, 1e-400, -0.0]", [1e308, 0.0, -0.0]),
        (b'["\\ud83d\\ude00", "\xf0\x9f\x98\x80"]', ["\U0001f600", "\U0001f600"]),
        (b'{"a": {"a": 1}, "b": {"a": 1}}', {"a": {"a": 1}, "b": {"a": 1}}),
        (b"[" * DEEP + b"]" * DEEP, json.loads("[" * DEEP + "]" * DEEP)),
        (b'"12345678901234567890123"', "12345678901234567890123"),
    ],
)
def test_accepted(data: bytes, value: object) -> None:
    assert parse_json(data, file="a.json") == value


def test_minus_zero_is_a_float_as_elsewhere() -> None:
    assert isinstance(parse_json(b"[-0]", file="a.json")[0], float)


def test_the_key_and_every_problem_are_named() -> None:
    data = b'{"a": 1, "a": 2, "b": [NaN, {"c": 1, "c": 1, "c": 1}]}'
    value, problems = examine_json(data, file="a.json", loc="header")
    assert [problem.kind for problem in problems] == ["json-number", "duplicate-key", "duplicate-key"]
    assert "'c' stands 3 times" in problems[1].message
    assert "'a' stands 2 times" in problems[2].message
    assert {problem.loc for problem in problems} == {"header"}
    assert value == {"a": 2, "b": [0.0, {"c": 1}]}


def test_the_position_is_named() -> None:
    with pytest.raises(FormatError, match="line 2, column 6"):
        parse_json(b'{\n"a": ?}', file="a.json")


def test_problems_are_counted_not_listed_without_end() -> None:
    found = kinds(b"[" + b"NaN," * 5000 + b"1]")
    assert len(found) == MAX_REPORTED + 1
    assert found[-1] == "more-problems"


def test_too_large_is_not_parsed() -> None:
    with pytest.raises(FormatError, match="11 bytes of JSON; the limit is 10"):
        parse_json(b"?" * 11, file="a.json", max_bytes=10)


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'"ab",', b"0,", b"0.5,", b'{"a":0},'])
def test_punctuation_is_counted_before_anything_is_built(piece: bytes) -> None:
    data = b"[" + piece * (16_000_000 // len(piece)) + b"0]"
    began = time.process_time()
    assert kinds(data) == ["json-size"]
    assert time.process_time() - began < 2


def test_memory_stays_below_300_mb() -> None:
    """The costliest inputs within all limits, in a process of its own so that its peak can be read."""
    script = (
        "import re, resource, sys\n"
        "from adapterhub_tools.store.strict_json import examine_json\n"
        "flat = b'{' + b','.join(b'\"%x\":0' % i for i in range(990_000)) + b'}'\n"
        "nested = b'[' + b'{},' * 900_000 + b'0]'\n"
        "names = b'[' + b','.join(b'\"%x\"' % i for i in range(1_500_000)) + b']'\n"
        "for data in (flat, nested, names):\n"
        "    value, problems = examine_json(data, file='a.json')\n"
        "    assert value and not problems\n"
        "    del value\n"
        "try:  # the kernel's own figure; ru_maxrss starts at that of the parent process\n"
        "    print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "except OSError:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    peak = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert 10_000 < int(peak) < 300_000  # KiB


def test_reading_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    assert read_json_object(path) == {"a": 1}
    path.write_bytes(b"[1]")
    with pytest.raises(FormatError, match=r"^config.json: found an array, expected a JSON object"):
        read_json_object(path)
    with pytest.raises(FormatError, match=r"^sub/config.json: 3 bytes of JSON; the limit is 2"):
        read_json(path, file="sub/config.json", max_bytes=2)
    with pytest.raises(StoreError, match="Check the path"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(FormatError, match="a folder, expected a regular file"):
        read_json(tmp_path)


def test_types_have_their_json_names() -> None:
    values = [None, True, 1, 1.5, "a", {}, []]
    names = ["null", "a boolean", "an integer", "a number", "a string", "an object", "an array"]
    assert [json_type(value) for value in values] == names


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.booleans())
def test_every_json_value_reads_back(value: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode(), file="a.json") == value


@settings(max_examples=300, deadline=None)
@given(JSON, st.data())
def test_damage_gives_the_same_value_as_python_or_a_format_error(value: object, data: st.DataObject) -> None:
    """A stricter reader may refuse more, but what it accepts means what it means elsewhere."""
    text = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b'"', b"[", b"{", b",", b"0", b"\\"])
        )
        if not text:
            return
    try:
        found = parse_json(bytes(text), file="a.json")
    except FormatError:
        return
    assert found == json.loads(bytes(text))
