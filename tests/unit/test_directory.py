"""Folders appear whole or not at all: the commit protocol, replacing, modes."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from adapterhub_tools.errors import FormatError, StoreError
from adapterhub_tools.store import exchange
from adapterhub_tools.store.directory import stage
from tests.unit.folders import LAST, make, tree


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make(tmp_path / "base", weights="w")


def test_a_fresh_output_appears_only_at_commit(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    with stage(out, inputs=[base]) as staged:
        staged.write_bytes("config.json", b"1")
        staged.write_bytes("deep/er/file", b"2")
        fd = staged.create("model.safetensors")
        os.write(fd, b"3")
        os.fsync(fd)
        os.close(fd)
        staged.mark_synced("model.safetensors")
        assert staged.copy_file(base / "weights", "copied") == (1, hashlib.sha256(b"w").hexdigest())
        assert not out.exists()
        staged.commit(LAST)
        assert out.is_dir()
    assert tree(out) == {
        "config.json": b"1",
        "copied": b"w",
        "deep/er/file": b"2",
        "model.safetensors": b"3",
        "receipt.json": b"{}\n",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    assert staged.left == ()


def test_an_empty_output_is_taken(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with stage(out, inputs=[]) as staged:
        staged.commit(LAST)
    assert tree(out) == {"receipt.json": b"{}\n"}


def test_a_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with stage(Path("out"), inputs=[]) as staged:
        staged.commit(LAST)
    assert tree(tmp_path / "out") == {"receipt.json": b"{}\n"}


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with stage(out, inputs=[]) as staged:
        staged.write_bytes("a", b"1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_exception_the_destination_is_untouched(tmp_path: Path, error: type[BaseException]) -> None:
    out = make(tmp_path / "out", old="x")
    with pytest.raises(error), stage(out, inputs=[], replace=True) as staged:  # noqa: PT012 - an error after something was written
        staged.write_bytes("a", b"1")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert tree(out) == {"old": b"x"}


def test_replacing_exchanges_the_whole_folder(tmp_path: Path) -> None:
    out = make(tmp_path / "out", old="x")
    inode = out.stat().st_ino
    with stage(out, inputs=[], replace=True) as staged:
        staged.write_bytes("a", b"1")
        assert tree(out) == {"old": b"x"}
        staged.commit(LAST)
    assert tree(out) == {"a": b"1", "receipt.json": b"{}\n"}
    assert out.stat().st_ino != inode
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_exchange_exchanges(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", a="1"), make(tmp_path / "two", b="2")
    exchange.exchange(one, two)
    assert tree(one) == {"b": b"2"}
    assert tree(two) == {"a": b"1"}
    with pytest.raises(FileNotFoundError):
        exchange.exchange(one, tmp_path / "three")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    source = tmp_path / "source"
    source.write_text("x")
    source.chmod(0o600)
    before = os.umask(umask)
    try:
        with stage(tmp_path / "out", inputs=[]) as staged:
            staged.copy_file(source, "copied")
            staged.write_bytes("sub/a", b"1")
            staged.commit(LAST)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("relative", ["../x", "/x", "a/../b", "", "a\\b", "a\0b", "C:x"])
def test_files_stay_inside(tmp_path: Path, relative: str) -> None:
    with stage(tmp_path / "out", inputs=[]) as staged, pytest.raises(StoreError) as caught:
        staged.write_bytes(relative, b"1")
    assert caught.value.problems[0].kind == "path"


def test_a_file_written_twice(tmp_path: Path) -> None:
    with stage(tmp_path / "out", inputs=[]) as staged:
        staged.write_bytes("a", b"1")
        with pytest.raises(StoreError, match="File exists"):
            staged.write_bytes("a", b"2")


def test_copying_what_is_not_a_file(tmp_path: Path, base: Path) -> None:
    with stage(tmp_path / "out", inputs=[]) as staged:
        with pytest.raises(FormatError, match="a folder"):
            staged.copy_file(base, "a")
        with pytest.raises(StoreError, match="No such file"):
            staged.copy_file(base / "nothing", "b")
