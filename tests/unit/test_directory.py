"""Folders appear whole or not at all: the commit protocol, replacing, refusals, modes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import stat
from pathlib import Path

import pytest

from adapterhub_tools.errors import FormatError, StoreError
from adapterhub_tools.store import destination, directory, exchange, working_folder
from adapterhub_tools.store.destination import check_destination, check_space, free_bytes
from adapterhub_tools.store.directory import stage

LAST = ("receipt.json", b"{}\n")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make(tmp_path / "base", weights="w")


def refused(kind: str, out: Path, *, inputs: tuple[Path, ...] = (), **options: bool) -> StoreError:
    """Checks that neither the check nor staging accepts the output, and that nothing is left behind."""
    parent = Path(os.path.realpath(out.parent))
    before = sorted(parent.iterdir()) if parent.is_dir() else []
    with pytest.raises(StoreError) as caught, stage(out, inputs=inputs, **options) as staged:
        staged.commit(LAST)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert all(problem.file and problem.remedy for problem in caught.value.problems)
    assert (sorted(parent.iterdir()) if parent.is_dir() else []) == before
    return caught.value


def test_a_fresh_output_appears_only_at_commit(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    with stage(out, inputs=[base]) as staged:
        staged.write_bytes("config.json", b"1")
        staged.write_bytes("deep/er/file", b"2")
        fd = staged.create("model.safetensors")
        os.write(fd, b"3")
        os.close(fd)
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
    with pytest.raises(error), stage(out, inputs=[], replace=True) as staged:  # noqa: PT012
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


def test_exchange_exchanges(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", a="1"), make(tmp_path / "two", b="2")
    exchange.exchange(one, two)
    assert tree(one) == {"b": b"2"}
    assert tree(two) == {"a": b"1"}
    with pytest.raises(FileNotFoundError):
        exchange.exchange(one, tmp_path / "three")


# --- refusals ----------------------------------------------------------------------------------------


def test_not_empty_without_replace(tmp_path: Path) -> None:
    out = make(tmp_path / "out", old="x")
    assert "--replace" in str(refused("exists", out))
    assert tree(out) == {"old": b"x"}


def test_a_file_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("x")
    refused("not-a-folder", out, replace=True)


@pytest.mark.parametrize("target", ["base", "nowhere"])
def test_a_symbolic_link(tmp_path: Path, base: Path, target: str) -> None:
    out = tmp_path / "out"
    out.symlink_to(tmp_path / target)
    refused("symlink", out, replace=True)


def test_a_mount_point() -> None:
    with pytest.raises(StoreError) as caught:
        check_destination(Path("/proc"), inputs=[], replace=True)
    assert caught.value.problems[0].kind == "mount-point"


def test_a_bind_mount_is_found_in_mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one file system `ismount` sees nothing; the kernel's list of mounts does."""
    out = make(tmp_path / "out put")
    listing = tmp_path / "mountinfo"
    escaped = str(out).replace(" ", "\\040")
    listing.write_text(f"36 35 98:0 /x {escaped} rw,noatime master:1 - ext4 /dev/root rw\n")
    monkeypatch.setattr(destination, "_MOUNTS", str(listing))
    refused("mount-point", out)


def test_the_root() -> None:
    with pytest.raises(StoreError):
        check_destination(Path("/"), inputs=[], replace=True)


def test_a_missing_parent(tmp_path: Path) -> None:
    refused("not-found", tmp_path / "nowhere" / "out")


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        check_destination(tmp_path / "file" / "out", inputs=[])


def test_a_parent_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the question itself is answered in its place.
    monkeypatch.setattr(destination.os, "access", lambda path, mode: False)
    refused("permission", tmp_path / "out")


@pytest.mark.parametrize("where", ["base", "base/out", "base/deep/out", "."])
def test_output_equal_inside_or_around_an_input(tmp_path: Path, base: Path, where: str) -> None:
    (base / "deep").mkdir()
    refused("overlaps-input", tmp_path / where, inputs=(base,), replace=True)
    assert tree(base) == {"weights": b"w"}


def test_output_that_holds_an_input_file(tmp_path: Path, base: Path) -> None:
    refused("overlaps-input", base, inputs=(base / "weights",), replace=True)


def test_output_beside_an_input_file_is_fine(tmp_path: Path, base: Path) -> None:
    with stage(base / "out", inputs=[base / "weights"]) as staged:
        staged.commit(LAST)
    assert tree(base / "out") == {"receipt.json": b"{}\n"}


def test_an_input_reached_through_a_link(tmp_path: Path, base: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(base)
    refused("overlaps-input", base / "out", inputs=(link,))
    refused("overlaps-input", link / "out", inputs=(base,))


def test_an_input_whose_files_link_into_the_output(tmp_path: Path) -> None:
    out = make(tmp_path / "out", blob="x")
    snapshot = make(tmp_path / "snapshot")
    (snapshot / "model.safetensors").symlink_to(out / "blob")
    refused("overlaps-input", out, inputs=(snapshot,), replace=True)


def test_the_same_folder_under_another_path(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a bind mount: the paths differ, device and inode do not."""
    monkeypatch.setattr(destination.os.path, "realpath", lambda path, strict=False: os.path.normpath(path))
    link = tmp_path / "link"
    link.symlink_to(base)
    refused("overlaps-input", link / "out", inputs=(base,))


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


# --- other writers -----------------------------------------------------------------------------------


def test_another_writer_came_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoreError) as caught, stage(out, inputs=[]) as second:  # noqa: PT012
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

    with pytest.raises(StoreError) as caught, stage(out, inputs=[], replace=True) as staged:  # noqa: PT012
        monkeypatch.setattr(directory.os, "write", fail)
        staged.write_bytes("a", b"1")
    problem = caught.value.problems[0]
    assert problem.kind == kind
    assert problem.file == str(out / "a")
    assert problem.remedy
    assert ("bytes are free" in problem.message) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert tree(out) == {"old": b"x"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


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


def test_space(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    check_space(tmp_path, free // 2)
    with pytest.raises(StoreError) as caught:
        check_space(tmp_path, free * 10)
    problem = caught.value.problems[0]
    assert problem.kind == "disk-full"
    assert f"{free * 10:,} bytes are needed" in problem.message
    assert "are free" in problem.message
    with pytest.raises(StoreError):
        check_space(tmp_path / "nowhere", 1)
