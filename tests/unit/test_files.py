"""Local files: changes while reading are noticed, and no path leads out of its folder."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from adapterhub_tools.errors import FormatError, StoreError
from adapterhub_tools.model.protocols import Source
from adapterhub_tools.store import files
from adapterhub_tools.store.files import LocalFile, resolve_inside, store_error


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)))
    return path


def test_reading(path: Path) -> None:
    with LocalFile(path, name="shown") as source:
        assert isinstance(source, Source)
        assert (source.name, source.length, source.path) == ("shown", 256, path)
        assert source.read(10, 5) == bytes(range(10, 15))
        assert source.read(256, 0) == b""
        view = memoryview(bytearray(3))
        source.read_into(view, 253)
        assert bytes(view) == b"\xfd\xfe\xff"
        source.check_unchanged()
        assert os.fstat(source.fileno()).st_size == 256
    source.close()
    with pytest.raises(StoreError):
        source.read(0, 1)


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    monkeypatch.setattr(files.os, "preadv", lambda fd, views, at: read(fd, [views[0][:7]], at))
    whole = os.pread
    monkeypatch.setattr(files.os, "pread", lambda fd, length, at: whole(fd, min(length, 7), at))
    with LocalFile(path, name="shown") as source:
        assert source.read(0, 256) == bytes(range(256))


def test_reading_past_the_end(path: Path) -> None:
    with LocalFile(path, name="shown") as source, pytest.raises(StoreError, match="byte 257 was asked for"):
        source.read(250, 7)


def test_a_device_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, views: object, at: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "preadv", fail)
    monkeypatch.setattr(files.os, "pread", fail)
    with (
        LocalFile(path, name="shown") as source,
        pytest.raises(StoreError, match="shown: could not read at byte 3"),
    ):
        source.read(3, 1)


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def overwrite(path: Path) -> None:
    path.write_bytes(bytes(256))


def append(path: Path) -> None:
    with path.open("ab") as target:
        target.write(b"x")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [truncate, overwrite, append, replace, remove])
def test_a_change_while_open_is_noticed(path: Path, change) -> None:
    os.utime(path, ns=(1, 1))
    with LocalFile(path, name="shown") as source:
        stamp = source.stamp
        change(path)
        with pytest.raises(StoreError) as caught:
            source.check_unchanged()
        assert caught.value.problems[0].kind == "changed-while-reading"
        assert caught.value.problems[0].file == "shown"
        if change is truncate:
            with pytest.raises(StoreError) as caught:
                source.read(50, 100)
            assert caught.value.problems[0].kind == "changed-while-reading"
    if change is not remove:
        with pytest.raises(StoreError) as caught:
            LocalFile(path, name="shown", expect=stamp)
        assert caught.value.problems[0].kind == "changed-while-reading"


def test_a_check_that_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    source = LocalFile(path, name="shown")
    with source, monkeypatch.context() as patch, pytest.raises(StoreError) as caught:  # noqa: PT012 - the file is opened before
        patch.setattr(files.os, "fstat", fail)
        source.check_unchanged()
    assert "shown: could not examine it" in str(caught.value)
    assert "mount it again" in str(caught.value)


def test_a_new_hard_link_is_no_change(path: Path) -> None:
    with LocalFile(path, name="shown") as source:
        path.with_name("link").hardlink_to(path)
        source.check_unchanged()


def test_no_descriptor_is_left_open_after_a_refusal(path: Path) -> None:
    stamp = LocalFile(path, name="shown").stamp
    overwrite(path)
    descriptors = Path("/dev/fd")  # Linux and macOS
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        with pytest.raises(StoreError):
            LocalFile(path, name="shown", expect=stamp)
    assert len(list(descriptors.iterdir())) == before


@pytest.mark.parametrize("code", sorted(files._REMEDIES))
def test_every_mapped_error_has_kind_and_remedy(code: int) -> None:
    error = store_error(OSError(code, os.strerror(code)), "read it", "a")
    assert isinstance(error, StoreError)
    assert error.problems[0].kind
    assert error.problems[0].remedy
    assert os.strerror(code) in str(error)


def test_an_unknown_error_has_a_remedy_too() -> None:
    assert store_error(OSError("odd"), "read it", "a").problems[0].remedy


# --- paths inside a folder ---------------------------------------------------------------------------

BAD_PATHS = {
    "": "empty",
    "..": "'..'",
    "../x": "'..'",
    "a/../../x": "'..'",
    "a/..": "'..'",
    ".": "'.'",
    "./a": "'.'",
    "a//b": "empty part",
    "a/": "empty part",
    "/etc/passwd": "absolute",
    "//server/share": "absolute",
    "C:\\x": "backslash",
    "C:x": "drive",
    "\\\\server\\share\\x": "backslash",
    "a\\b": "backslash",
    "a\0b": "NUL",
}


@pytest.mark.parametrize("relative", BAD_PATHS)
def test_bad_paths(tmp_path: Path, relative: str) -> None:
    with pytest.raises(FormatError, match=BAD_PATHS[relative]) as caught:
        resolve_inside(tmp_path, relative)
    assert caught.value.problems[0].kind == "path"


def test_good_paths(tmp_path: Path) -> None:
    real = Path(os.path.realpath(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").touch()
    (tmp_path / "link").symlink_to("sub/file")
    (tmp_path / "folder").symlink_to("sub")
    assert resolve_inside(tmp_path, "sub/file") == real / "sub/file"
    assert resolve_inside(tmp_path, "link") == real / "sub/file"
    assert resolve_inside(tmp_path, "folder/file") == real / "sub/file"
    assert resolve_inside(tmp_path, "missing") == real / "missing"
    assert resolve_inside(tmp_path, "..name") == real / "..name"
    alias = tmp_path / "alias"
    alias.symlink_to(tmp_path)
    assert resolve_inside(alias, "sub/file") == real / "sub/file"


@pytest.mark.parametrize(
    "target", ["../outside", "/etc/hostname", "sub/../../outside", "../missing", "../root-2"]
)
def test_links_out_of_the_folder(tmp_path: Path, target: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "root-2").mkdir()
    (tmp_path / "outside").write_text("x")
    (root / "link").symlink_to(target)
    with pytest.raises(FormatError, match="out of its folder"):
        resolve_inside(root, "link")


def test_a_link_to_the_folder_itself_is_no_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(".")
    with pytest.raises(FormatError):
        resolve_inside(tmp_path, "link")


def test_a_loop(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FormatError, match="leads back to itself"):
        resolve_inside(tmp_path, "a")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Check the path"):
        resolve_inside(tmp_path / "nowhere", "a")


def hub_cache(tmp_path: Path) -> Path:
    """A Hub cache as its client lays it out; returns the snapshot."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    (snapshot / "unet").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "unet" / "config.json").symlink_to("../../../blobs/f00")
    return snapshot


def test_a_snapshot_links_into_the_blobs_of_its_repository(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    blob = Path(os.path.realpath(tmp_path)) / "hub/models--owner--name/blobs/f00"
    assert resolve_inside(snapshot, "config.json") == blob
    assert resolve_inside(snapshot, "unet/config.json") == blob
    assert resolve_inside(snapshot / "unet", "config.json") == blob


def test_but_not_into_those_of_another(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    other = tmp_path / "hub" / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (other / "f00").write_text("x")
    (snapshot / "stolen").symlink_to("../../../models--owner--other/blobs/f00")
    with pytest.raises(FormatError, match="out of its folder"):
        resolve_inside(snapshot, "stolen")
    plain = tmp_path / "snapshots" / "rev"
    plain.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "f00").write_text("x")
    (plain / "file").symlink_to("../../blobs/f00")
    with pytest.raises(FormatError, match="out of its folder"):
        resolve_inside(plain, "file")


def make_fifo(path: Path) -> str:
    os.mkfifo(path)
    return "named pipe"


def make_socket(path: Path) -> str:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()
    return "socket"


def make_folder(path: Path) -> str:
    path.mkdir()
    return "folder"


def make_device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "device"


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_folder, make_device])
def test_only_regular_files_are_opened(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has 108 bytes at most
    kind = make(Path("odd"))
    with pytest.raises(FormatError, match=f"found a {kind}, expected a regular file") as caught:
        LocalFile(Path("odd"), name="odd")
    assert caught.value.problems[0].kind == "not-regular"


def test_a_pipe_that_takes_the_place_of_a_file_does_not_hang(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(files.os, "stat", lambda name: status)
    with pytest.raises(FormatError, match="named pipe"):
        LocalFile(path, name="shown")
