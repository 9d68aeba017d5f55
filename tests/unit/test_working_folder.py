"""The working folder and the exchange of folders, where the system refuses or another run interferes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest

from adapterhub_tools.errors import StoreError
from adapterhub_tools.store import directory, exchange, working_folder
from adapterhub_tools.store.directory import flush, stage
from tests.unit.folders import LAST, make, tree


def failing(code: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("call", ["mkdir", "open", "write"])
def test_a_working_folder_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(working_folder.os, call, failing(errno.ENOSPC))
        with pytest.raises(StoreError) as caught, stage(tmp_path / "out", inputs=[]):
            pass
    assert caught.value.problems[0].kind == "disk-full"
    assert caught.value.problems[0].remedy
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_folder.fcntl, "flock", failing(errno.ENOLCK))
    with pytest.raises(StoreError, match="cannot lock files") as caught, stage(tmp_path / "out", inputs=[]):
        pass
    assert caught.value.problems[0].kind == "lock"
    assert list(tmp_path.iterdir()) == []


def test_the_clean_up_of_another_run_takes_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making the folder, its lock file and the lock: each time, the run makes another one."""
    os_open, flock, stages = os.open, fcntl.flock, []

    def steal_before_open(path: Path, flags: int, *rest: int, **named: int) -> int:
        if Path(path).name == ".lock" and flags & os.O_CREAT and not stages:
            stages.append("before its lock file")
            Path(path).parent.rmdir()
        return os_open(path, flags, *rest, **named)

    def steal_before_lock(fd: int, operation: int) -> None:
        if len(stages) == 1:
            stages.append("locked by the other")
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        if len(stages) == 2:
            stages.append("removed before the lock")
            for work in tmp_path.glob(".out.tmp-*"):
                shutil.rmtree(work)
        flock(fd, operation)

    monkeypatch.setattr(working_folder.os, "open", steal_before_open)
    monkeypatch.setattr(working_folder.fcntl, "flock", steal_before_lock)
    with stage(tmp_path / "out", inputs=[]) as staged:
        staged.commit(LAST)
    assert len(stages) == 3
    assert tree(tmp_path / "out") == {"receipt.json": b"{}\n"}


def test_it_gives_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_folder.fcntl, "flock", failing(errno.EAGAIN))
    with pytest.raises(StoreError) as caught, stage(tmp_path / "out", inputs=[]):
        pass
    assert caught.value.problems[0].kind == "locked"
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stage(tmp_path / "out", inputs=[]) as staged:
        staged.commit(LAST)
        work = next(tmp_path.glob(".out.tmp-*"))
        make(work / "foreign", x="1")
    assert staged.left == (str(work),)
    assert tree(tmp_path / "out") == {"receipt.json": b"{}\n"}
    shutil.rmtree(work / "foreign")
    assert working_folder.recover(tmp_path / "out") == (work,)  # its lock file is still there, and free


def test_a_working_folder_removed_from_under_us(tmp_path: Path) -> None:
    with stage(tmp_path / "out", inputs=[]) as staged:
        staged.commit(LAST)
        shutil.rmtree(next(tmp_path.glob(".out.tmp-*")))
    assert staged.left == ()


def test_the_parent_disappears(tmp_path: Path) -> None:
    assert working_folder.recover(tmp_path / "nowhere" / "out") == ()


# --- undoing -----------------------------------------------------------------------------------------


def replace_with_failing_last_flush(
    out: Path, patch: pytest.MonkeyPatch, *, gap: bool, then: str
) -> StoreError:
    """Replaces an output; the flush of its parent fails, and then so does the call named ``then``."""
    parent, fsync = out.parent.stat().st_ino, os.fsync
    exchange_folders, calls = exchange.exchange, 0

    def failing_flush(fd: int) -> None:
        if os.fstat(fd).st_ino == parent:
            if then == "rename":
                patch.setattr(directory.os, "rename", failing(errno.EIO))
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    def exchange_once(first: Path, second: Path) -> None:
        nonlocal calls
        calls += 1
        if gap:
            raise OSError(errno.EINVAL, "Invalid argument")
        if then == "exchange" and calls > 2:  # after the probe and the commit
            raise OSError(errno.EIO, "Input/output error")
        exchange_folders(first, second)

    patch.setattr(directory.os, "fsync", failing_flush)
    patch.setattr(directory, "exchange", exchange_once)
    with (
        pytest.raises(StoreError) as caught,
        stage(out, inputs=[], replace=True, allow_replace_gap=gap) as staged,
    ):
        staged.commit(LAST)
    return caught.value


@pytest.mark.parametrize("gap", [False, True])
def test_a_failed_last_flush_puts_the_old_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: bool
) -> None:
    out = make(tmp_path / "out", old="x")
    error = replace_with_failing_last_flush(out, monkeypatch, gap=gap, then="")
    assert error.problems[0].kind == "io"
    assert tree(out) == {"old": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_comes_back_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out")
    replace_with_failing_last_flush(out, monkeypatch, gap=False, then="")
    assert tree(out) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("gap", "then"), [(False, "exchange"), (True, "rename")])
def test_where_even_that_fails_the_message_says_so(tmp_path: Path, gap: bool, then: str) -> None:
    out = make(tmp_path / "out", old="x")
    with pytest.MonkeyPatch.context() as patch:
        error = replace_with_failing_last_flush(out, patch, gap=gap, then=then)
    assert error.problems[0].kind == "not-durable"
    assert tree(out) == {"receipt.json": b"{}\n"}


def test_an_old_output_that_cannot_be_put_back_is_never_removed(tmp_path: Path) -> None:
    """Both renames of a replacement with a gap fail half-way: the next run restores the old output."""
    out = make(tmp_path / "out", old="x")
    rename, done = os.rename, []

    def first_only(source: Path, target: Path) -> None:
        if done:
            raise OSError(errno.EIO, "Input/output error")
        done.append(target)
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "exchange", failing(errno.EINVAL))
        patch.setattr(directory.os, "rename", first_only)
        with (
            pytest.raises(StoreError),
            stage(out, inputs=[], replace=True, allow_replace_gap=True) as staged,
        ):
            staged.commit(LAST)
    assert not out.exists()
    assert len(staged.left) == 1
    working_folder.recover(out)
    assert tree(out) == {"old": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- system calls ------------------------------------------------------------------------------------


def test_a_probe_that_fails_for_another_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out", old="x")
    monkeypatch.setattr(directory, "exchange", failing(errno.EIO))
    with pytest.raises(StoreError) as caught, stage(out, inputs=[], replace=True, allow_replace_gap=True):
        pass
    assert caught.value.problems[0].kind == "io"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_that_only_closing_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def close_then_fail(fd: int) -> None:
        close(fd)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with stage(tmp_path / "out", inputs=[]) as staged:
        with monkeypatch.context() as patch, pytest.raises(StoreError) as caught:  # noqa: PT012 - the close that fails is a part of writing
            patch.setattr(directory.os, "close", close_then_fail)
            staged.write_bytes("a", b"1")
        assert caught.value.problems[0].kind == "quota"
        assert caught.value.problems[0].file == str(tmp_path / "out" / "a")


def test_a_folder_that_cannot_be_flushed_has_nothing_to_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems; for a file the same answer is an error."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(directory.os, "fsync", failing(errno.EINVAL))
    folder, file = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path / "file", os.O_RDONLY)
    try:
        flush(folder)
        with pytest.raises(OSError, match="Invalid argument"):
            flush(file)
        monkeypatch.setattr(directory.os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            flush(folder)
    finally:
        os.close(folder)
        os.close(file)


@pytest.mark.parametrize("known", [True, False])
def test_macos_flushes_through_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    calls = []

    def control(fd: int, command: int) -> None:
        calls.append(command)
        if not known:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(directory.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(directory.fcntl, "fcntl", control)
    monkeypatch.setattr(directory.os, "fsync", lambda fd: calls.append("fsync"))
    flush(0)
    assert calls == ([51] if known else [51, "fsync"])


class Library:
    """A C library that has only the functions given, each recording its arguments."""

    def __init__(self, **results: int) -> None:
        self.calls: list[tuple[object, ...]] = []
        for name, result in results.items():
            setattr(self, name, self.function(name, result))

    def function(self, name: str, result: int):
        def call(*arguments: object) -> int:
            self.calls.append((name, *(getattr(one, "value", one) for one in arguments)))
            return result

        return call


@pytest.mark.parametrize(
    ("platform", "machine", "library", "expected"),
    [
        ("linux", "x86_64", Library(renameat2=0), ("renameat2", -100, b"a", -100, b"b", 2)),
        ("linux", "x86_64", Library(syscall=0), ("syscall", 316, -100, b"a", -100, b"b", 2)),
        ("linux", "aarch64", Library(syscall=0), ("syscall", 276, -100, b"a", -100, b"b", 2)),
        ("darwin", "arm64", Library(renamex_np=0), ("renamex_np", b"a", b"b", 2)),
    ],
)
def test_the_call_on_each_system(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    machine: str,
    library: Library,
    expected: tuple[object, ...],
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(exchange.platform, "machine", lambda: machine)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    exchange.exchange(Path("a"), Path("b"))
    assert library.calls == [expected]


@pytest.mark.parametrize("platform", ["linux", "darwin", "freebsd14"])
def test_a_system_without_the_call(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(exchange.platform, "machine", lambda: "unknown")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library())
    with pytest.raises(OSError) as caught:
        exchange.exchange(Path("a"), Path("b"))
    assert caught.value.errno in exchange.UNSUPPORTED_ERRORS
