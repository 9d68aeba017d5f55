"""Output folders when something fails: killed runs, other writers, full disks, failed flushes."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest

from adapterhub_tools.errors import StoreError
from adapterhub_tools.store import directory, working_folder
from adapterhub_tools.store.directory import stage
from tests.unit.folders import LAST, make, refused, tree


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(first: Path, second: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(directory, "exchange", fail)


def test_no_exchange_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out", old="x")
    without_exchange(monkeypatch)
    error = refused("no-exchange", out, replace=True)
    assert "--allow-replace-gap" in str(error)
    assert tree(out) == {"old": b"x"}


def test_with_a_gap_allowed_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out", old="x")
    without_exchange(monkeypatch)
    with stage(out, inputs=[], replace=True, allow_replace_gap=True) as staged:
        staged.write_bytes("a", b"1")
        staged.commit(LAST)
    assert tree(out) == {"a": b"1", "receipt.json": b"{}\n"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_in_the_gap_puts_the_old_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", old="x")
    without_exchange(monkeypatch)
    rename = os.rename

    def second_fails(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(directory.os, "rename", second_fails)
    with (
        pytest.raises(StoreError, match="Input/output error"),
        stage(out, inputs=[], replace=True, allow_replace_gap=True) as staged,
    ):
        staged.commit(LAST)
    assert tree(out) == {"old": b"x"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- other writers -----------------------------------------------------------------------------------


def test_another_writer_came_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoreError) as caught, stage(out, inputs=[]) as second:  # noqa: PT012 - staging works, what follows fails
        with stage(out, inputs=[]) as first:
            first.write_bytes("a", b"first")
            first.commit(LAST)
        second.write_bytes("a", b"second")
        second.commit(LAST)
    assert caught.value.problems[0].kind == "exists"
    assert tree(out) == {"a": b"first", "receipt.json": b"{}\n"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def left_over(tmp_path: Path, *, lock: bytes | None, name: str = ".out.tmp-0123456789ab") -> Path:
    work = make(tmp_path / name)
    make(work / "new", half="x")
    if lock is not None:
        (work / ".lock").write_bytes(lock)
    return work


@pytest.mark.parametrize("lock", [b"", socket.gethostname().encode()])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, lock: bytes) -> None:
    work = left_over(tmp_path, lock=lock)
    with stage(tmp_path / "out", inputs=[]) as staged:
        assert not work.exists()
        staged.commit(LAST)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_working_folder_without_lock_is_removed(tmp_path: Path) -> None:
    work = make(tmp_path / ".out.tmp-0123456789ab")
    working_folder.recover(tmp_path / "out")
    assert not work.exists()


def test_what_is_in_use_or_another_hosts_or_another_outputs_stays(tmp_path: Path) -> None:
    in_use = left_over(tmp_path, lock=socket.gethostname().encode(), name=".out.tmp-a")
    others = [
        left_over(tmp_path, lock=b"another-host", name=".out.tmp-b"),
        left_over(tmp_path, lock=None, name=".out.tmp-c"),
        left_over(tmp_path, lock=b"", name=".out2.tmp-d"),
    ]
    with (in_use / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert working_folder.recover(tmp_path / "out") == ()
    assert all(work.is_dir() for work in [in_use, *others])
    assert working_folder.recover(tmp_path / "out") == (in_use,)


def test_a_run_killed_in_the_gap_gets_its_old_output_back(tmp_path: Path) -> None:
    work = left_over(tmp_path, lock=b"")
    make(work / "old", old="x")
    refused_by_what_came_back = tmp_path / "out"
    with pytest.raises(StoreError) as caught, stage(refused_by_what_came_back, inputs=[]):
        pass
    assert caught.value.problems[0].kind == "exists"
    assert tree(tmp_path / "out") == {"old": b"x"}
    assert not work.exists()


# --- faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "io"),
        (errno.EFBIG, "file-too-large"),
    ],
)
def test_write_errors_name_path_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    out = make(tmp_path / "out", old="x")

    def fail(fd: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    with pytest.raises(StoreError) as caught, stage(out, inputs=[], replace=True) as staged:  # noqa: PT012 - staging works, what follows fails
        monkeypatch.setattr(directory.os, "write", fail)
        staged.write_bytes("a", b"1")
    problem = caught.value.problems[0]
    assert problem.kind == kind
    assert problem.file == str(out / "a")
    assert problem.remedy
    assert ("bytes are free" in problem.message) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert tree(out) == {"old": b"x"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_copy_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x")

    def fail(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError) as caught, stage(tmp_path / "out", inputs=[]) as staged:  # noqa: PT012 - staging works, what follows fails
        monkeypatch.setattr(directory.os, "write", fail)
        staged.copy_file(tmp_path / "source", "copied")
    assert caught.value.problems[0].file == str(tmp_path / "out" / "copied")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(directory.os, "write", lambda fd, data: write(fd, bytes(data[:3])))
    with stage(tmp_path / "out", inputs=[]) as staged:
        staged.write_bytes("a", b"0123456789")
        staged.commit(LAST)
    assert (tmp_path / "out" / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("replace", [False, True])
def test_every_fsync_failing_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool) -> None:
    """Whichever flush fails, even the last, after the rename: the destination is as it was."""
    fsync, failures = os.fsync, 0
    for number in range(1, 100):
        out = tmp_path / f"case{number}" / "out"
        out.parent.mkdir()
        if replace:
            make(out, old="x")
        calls = 0

        def fail(fd: int) -> None:
            nonlocal calls
            calls += 1
            if calls == number:  # noqa: B023 - called within this round only
                raise OSError(errno.EIO, "Input/output error")
            fsync(fd)

        monkeypatch.setattr(directory.os, "fsync", fail)
        try:
            with stage(out, inputs=[], replace=replace) as staged:
                staged.write_bytes("a", b"1")
                os.close(staged.create("sub/b"))
                staged.commit(LAST)
        except StoreError:
            failures += 1
            assert (tree(out) if out.exists() else None) == ({"old": b"x"} if replace else None)
            assert [p.name for p in out.parent.iterdir()] == (["out"] if replace else [])
        else:
            assert tree(out) == {"a": b"1", "receipt.json": b"{}\n", "sub/b": b""}
            break
    assert failures >= 8


def test_files_and_folders_are_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of flushes and renames, by inode: all of the new folder, then the rename, then its parent."""
    fsync, rename, log = os.fsync, os.rename, []

    def logged_fsync(fd: int) -> None:
        log.append(os.fstat(fd).st_ino)
        fsync(fd)

    def logged_rename(source: Path, target: Path) -> None:
        log.append("rename")
        rename(source, target)

    out = tmp_path / "out"
    with stage(out, inputs=[]) as staged:
        monkeypatch.setattr(directory.os, "fsync", logged_fsync)
        monkeypatch.setattr(directory.os, "rename", logged_rename)
        staged.write_bytes("a", b"1")
        os.close(staged.create("sub/b"))
        staged.commit(LAST)
    at = log.index("rename")
    for path in (out, out / "a", out / "sub", out / "sub/b", out / "receipt.json"):
        assert path.stat().st_ino in log[:at]
    receipt = log.index((out / "receipt.json").stat().st_ino)
    assert receipt > max(log.index((out / name).stat().st_ino) for name in ("a", "sub/b"))
    assert tmp_path.stat().st_ino in log[at:]
    assert log.count((out / "a").stat().st_ino) == 1  # what is flushed already is not flushed again
