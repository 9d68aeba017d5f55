"""Damaged and hostile files of every sort give findings, never another error, in bounded time."""

from __future__ import annotations

import io
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_tools.ops.scan_file import file_findings
from adapterhub_tools.store.files import LocalFile
from tests.tiny_files import make_adapter


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def zipped(method: int, **members: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return made.getvalue()


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
NAMES = [
    *("adapter_config.json", "config.json", "tokenizer_config.json", "model_index.json", "modules.json"),
    *("x.index.json", "adapter_manifest.json", "a.safetensors", "a.jinja", "a.txt", "a.py", "a.gguf", "a"),
    *("a.bin", "a.pt", "a.npz", "a.npy", "a.keras"),
]
SEEDS = [
    *(pickle.dumps(Harmful(), protocol=protocol) for protocol in range(6)),
    *(zipped(method, **{"a/data.pkl": pickle.dumps(Harmful()), "a/data/0": bytes(50)}) for method in METHODS),
    zipped(zipfile.ZIP_STORED, **{"a.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}" + b" " * 90}),
    b'{"auto_map": {"a": "b"}, "chat_template": "{{ x.__class__ }}", "weight_map": {"a": "../x"}}',
    b"{% for m in messages %}{{ m['content'] + '}}' }}{% endfor %}",
    b'[{"type": "os.path"}]',
    b"\x7fELF" + bytes(60),
]

edits = st.lists(
    st.tuples(
        st.integers(0, 2000), st.sampled_from(["set", "cut", "put"]), st.binary(min_size=1, max_size=20)
    ),
    max_size=12,
)


def edited(data: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    made = bytearray(data)
    for place, kind, piece in changes:
        at = place % (len(made) + 1)
        if kind == "put":
            made[at:at] = piece
        elif kind == "cut":
            del made[at : at + len(piece)]
        else:
            made[at : at + len(piece)] = piece
    return bytes(made)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SEEDS), edits, st.sampled_from(NAMES))
def test_any_damage_is_a_finding(
    tmp_path_factory: Any, seed: bytes, changes: list[tuple[int, str, bytes]], name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "scanned"
    path.write_bytes(edited(seed, changes))
    start = time.monotonic()
    with LocalFile(path, name=name) as source:
        list(file_findings(name, source))
    assert time.monotonic() - start < 5


def test_an_archive_whose_directory_would_fill_the_memory(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    data = bytearray(zipped(zipfile.ZIP_STORED, **{"a/data.pkl": b"\x80\x02N."}))
    end = data.rfind(b"PK\x05\x06")
    data[end + 12 : end + 16] = (1 << 30).to_bytes(4, "little")
    (adapter / "x.bin").write_bytes(data)
    with LocalFile(adapter / "x.bin", name="x.bin") as source:
        found = list(file_findings("x.bin", source))
    assert any("cannot be read" in str(item) for item in found)
