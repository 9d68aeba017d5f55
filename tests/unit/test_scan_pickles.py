"""What a pickle would import is read from its instructions; nothing of it ever runs."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterhub_tools as at
from adapterhub_tools.ops.scan_pickle import UNKNOWN, PickleImports, imports_of, starts_like_a_pickle
from adapterhub_tools.store.files import LocalFile
from tests.tiny_files import write_json


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def read(path: Path) -> PickleImports:
    with LocalFile(path, name=path.name) as source:
        return imports_of(source)


def test_a_checkpoint_of_tensors_imports_nothing_suspicious(tmp_path: Path) -> None:
    value = OrderedDict(a=torch.ones(2), b=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    for form in (True, False):
        torch.save(value, tmp_path / "x.bin", _use_new_zipfile_serialization=form)
        found = read(tmp_path / "x.bin")
        assert found.suspicious == ()
        assert found.damage == ""
        assert "torch._utils._rebuild_tensor_v2" in found.names
        report = at.scan(tmp_path)
        assert [p.kind for p in report.problems] == ["pickle"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("zipped", [False, True])
def test_harm_is_named_and_never_done(tmp_path: Path, protocol: int, zipped: bool) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps({"weights": Harmful(os.system, f"touch {canary}")}, protocol=protocol)
    path = tmp_path / "adapter_model.bin"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("adapter_model/data.pkl", data)
    else:
        path.write_bytes(data)
    report = at.scan(path)
    (told,) = [p for p in report.problems if p.kind == "pickle-code"]
    assert "posix.system" in told.message
    assert not canary.exists()
    pickle.loads(data)
    assert canary.exists()  # it would have been done


@pytest.mark.parametrize(
    "call",
    [
        Harmful(eval, "1"),
        Harmful(subprocess.check_output, ["true"]),
        Harmful(getattr, "a", "upper"),
        torch.load,
    ],
    ids=["eval", "subprocess", "getattr", "torch.load"],
)
def test_other_ways_to_code(tmp_path: Path, call: object) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([call]))
    assert read(tmp_path / "x.pkl").suspicious


def test_a_second_pickle_behind_the_first_is_followed(tmp_path: Path) -> None:
    harm = pickle.dumps(Harmful(os.system, "true"))
    (tmp_path / "x.bin").write_bytes(pickle.dumps({}) + harm)
    assert read(tmp_path / "x.bin").suspicious == ("posix.system",)


def test_a_harmful_member_under_another_name_in_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", pickle.dumps(Harmful(os.system, "true")))
    found = read(tmp_path / "x.bin")
    assert found.suspicious == ("posix.system",)
    assert found.members == ("archive/data.pkl", "archive/data/0")


# Names put together so that a simple reader takes them for harmless ones.
COMPUTED = [
    b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93.",
    b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x8c\x0bcollections\x8c\x0bOrderedDict00h\x00N0h\x01\x93.",
    b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x8c\x06system\x86\x93.",
    b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    b"\x80\x02\x82\x01.",
]


@pytest.mark.parametrize("data", COMPUTED)
def test_computed_names_count_as_unknown(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(data)
    list(pickletools.genops(data))  # they are instructions
    assert read(tmp_path / "x.pkl").suspicious


def test_names_kept_in_the_memo_are_followed(tmp_path: Path) -> None:
    data = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940" + b"0h\x00h\x01\x93."
    (tmp_path / "x.pkl").write_bytes(data)
    assert read(tmp_path / "x.pkl").names == ("posix.system",)
    assert UNKNOWN not in read(tmp_path / "x.pkl").names


DAMAGED = [
    b"",
    b"\x80\x04",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x80\x02X\xff\xff\xff\x7fabc.",
    b"PK\x03\x04" + bytes(60),
    b"\x80\x02(" * 1000,
    b"cos\nsystem\n" + b"\xff" * 100,
    b"I" + b"9" * 5000 + b"\n.",
    b"\x80\x02h\xff.",
]


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_ones_end_with_a_finding_and_no_traceback(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    kinds = {p.kind for p in at.scan(tmp_path).problems}
    assert "pickle" in kinds
    assert kinds <= {"pickle", "pickle-code"}


def test_an_archive_with_flags_and_checksums_that_hide_it(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Harmful(os.system, "true")))
    data = bytearray(made.getvalue())
    encrypted = bytearray(data)
    encrypted[data.rfind(b"PK\x01\x02") + 8] |= 1  # "encrypted", in the directory only
    wrong = bytearray(data)
    wrong[data.rfind(b"PK\x01\x02") + 16] ^= 0xFF  # another CRC-32
    for number, content in enumerate((encrypted, wrong)):
        (tmp_path / f"{number}.bin").write_bytes(content)
    report = at.scan(tmp_path)
    assert {(p.kind, p.file) for p in report.problems} == {
        (kind, f"{number}.bin") for kind in ("pickle", "pickle-code") for number in (0, 1)
    }


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (pickle.dumps({"a": 1}), True),
        (pickle.dumps(Harmful(os.system, "x"), protocol=0), True),
        (b"\x80\x02\x00\x00\x00\x00\x00\x00" + b'{"a"', False),
        (b"\x80\x02", False),
        (b"plain text.\n", False),
        (b"(like this) .", False),
        (b"", False),
    ],
)
def test_first_bytes(data: bytes, expected: bool) -> None:
    assert starts_like_a_pickle(data) is expected


def test_nothing_is_imported_or_run_during_a_scan(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"cantigravity\nx\n(tR.")
    (tmp_path / "x.py").write_text("import antigravity\n", encoding="utf-8")
    write_json(tmp_path / "config.json", {"auto_map": {"AutoModel": "x.Y"}})
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "{{ x.__class__ }}"})
    code = """
import sys
import adapterhub_tools as at
at.scan(sys.argv[1])  # loads what a scan needs
events = []
sys.addaudithook(lambda name, arguments: events.append((name, arguments)))
count = len(at.scan(sys.argv[1]).problems)
ran = [event for event in events if event[0].partition(".")[0] not in ("open", "os", "io")]
ran += [event for event in events if event[0] in ("os.system", "os.exec", "os.fork", "os.posix_spawn")]
assert count >= 5 and not ran, (count, ran)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
