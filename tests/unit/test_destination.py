"""Outputs that are refused before any work starts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from adapterhub_tools.errors import StoreError
from adapterhub_tools.store import destination
from adapterhub_tools.store.destination import check_destination, check_space, free_bytes
from adapterhub_tools.store.directory import stage
from tests.unit.folders import LAST, make, refused, tree


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make(tmp_path / "base", weights="w")


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


@pytest.mark.parametrize("call", ["lstat", "scandir"])
def test_an_output_that_cannot_be_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    make(tmp_path / "out")

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="Input/output error"):  # noqa: PT012 - the patch ends with the block
        if call == "lstat":  # the parent is resolved with it too
            patch.setattr(destination.os.path, "realpath", lambda path, strict=False: str(path))
        patch.setattr(destination.os, call, fail)
        check_destination(tmp_path / "out", inputs=[])


def test_a_system_without_mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination, "_MOUNTS", str(tmp_path / "nothing"))
    assert not check_destination(make(tmp_path / "out"), inputs=[]).occupied


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


@pytest.mark.parametrize("place", ["blobs/out", "snapshots/out", "snapshots/main/out", "out", ""])
@pytest.mark.parametrize("given", ["snapshot", "weights", "folder of links"])
def test_among_the_files_of_the_hub_cache_that_are_read(tmp_path: Path, place: str, given: str) -> None:
    repository = tmp_path / "hub" / "models--example--tiny"
    blobs = make(repository / "blobs", abc="w")
    snapshot = make(repository / "snapshots" / "main")
    links = make(tmp_path / "links")
    (snapshot / "weights").symlink_to(Path("../../blobs/abc"))
    (links / "weights").symlink_to(blobs / "abc")
    reading = {"snapshot": snapshot, "weights": snapshot / "weights", "folder of links": links}[given]
    error = refused("overlaps-input", repository / place, inputs=(reading,), replace=True)
    assert error.problems[0].remedy
    assert tree(repository) == {"blobs/abc": b"w", "snapshots/main/weights": b"w"}
    check_destination(tmp_path / "hub" / "models--example--other", inputs=[reading])
