"""Merges with undo, and unmerges: killed, and on a device that is full or broken, at every system call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked_merges import MergeServer
from tests.faults.injection import CHANGING
from tests.faults.outputs import InputState, tree_of
from tests.faults.scene import Scene
from tests.faults.small_model import make_adapter, make_base
from tests.faults.test_disk_full import LOOPS, READS, loop
from tests.faults.test_kill import kill_at_every_call

pytestmark = pytest.mark.usefixtures("injectable")


class UndoScene(Scene):
    """The merge keeps what brings the base back."""

    def keywords(self, **more: Any) -> dict[str, Any]:
        return {**super().keywords(**more), "undo": True}


class UnmergeScene(Scene):
    """A merge is taken back; the older output is another base, from another merge."""

    def __init__(self, folder: Path, server: MergeServer) -> None:
        self.server = server
        self.folder = folder
        self.log = folder / "strace.log"
        self.place = folder / "place"
        self.place.mkdir()
        self.out = self.place / "out"
        self.older_folder = folder / "older"
        self.adapter = make_adapter(folder / "adapter")
        bases = {
            "merged": make_base(folder / "base"),
            "other": make_base(folder / "wide", hidden=32, shards=1),
        }
        (bases["other"] / "tokenizer.json").write_text("{}")
        for name, base in bases.items():
            merge = {"base": str(base), "adapter": str(self.adapter), "out": str(folder / name)}
            assert server.run({**merge, "undo": True}).done
        self.folders = (folder / "merged", folder / "other", self.adapter)
        self.inputs = InputState.of(*self.folders)
        for name, out in (("other", self.older_folder), ("merged", folder / "expected")):
            ended = server.run(self.keywords(merged=str(folder / name), out=str(out)))
            assert ended.done, ended
        self.older, self.new = tree_of(self.older_folder), tree_of(folder / "expected")
        restored = {name: digest for name, digest in tree_of(bases["merged"]).items() if name != "README.md"}
        assert self.new == restored
        assert self.older != self.new

    def keywords(self, **more: Any) -> dict[str, Any]:
        paths = {"merged": str(self.folder / "merged"), "adapter": str(self.adapter), "out": str(self.out)}
        return {"call": "unmerge", **paths, "threads": 1, **more}

    def check(self, out: Path) -> None:
        assert tree_of(out) == self.new


@pytest.fixture(scope="module")
def warm_server(server: MergeServer, tmp_path_factory: pytest.TempPathFactory) -> MergeServer:
    """The fork server, with everything imported that these two need."""
    folder = tmp_path_factory.mktemp("warm-undo")
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    merge = {"base": str(base), "adapter": str(adapter), "out": str(folder / "merged"), "threads": 2}
    server.ask({"warm": {**merge, "undo": True}})
    unmerge = {"merged": str(folder / "merged"), "adapter": str(adapter), "out": str(folder / "out")}
    server.ask({"warm": {"call": "unmerge", **unmerge}})
    return server


@pytest.fixture(params=[UndoScene, UnmergeScene], ids=["merge --undo", "unmerge"])
def undo_scene(request: pytest.FixtureRequest, memory_folder: Path, warm_server: MergeServer) -> Scene:
    return request.param(memory_folder, warm_server)


WAIT_IN = [pytest.param("main", marks=pytest.mark.slow), "worker"]


@pytest.mark.parametrize("wait_in", WAIT_IN)
@pytest.mark.parametrize("replace", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_every_call(undo_scene: Scene, replace: bool, wait_in: str) -> None:
    killed = kill_at_every_call(undo_scene, CHANGING - {"close"}, replace=replace, wait_in=wait_in)
    assert killed["pwrite64"] >= 3
    if wait_in == "main":
        assert {"fallocate", "fsync", "mkdir", "write"} <= set(killed)


@pytest.mark.parametrize("wait_in", WAIT_IN)
@pytest.mark.parametrize("replace", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("error", ["ENOSPC", pytest.param("EIO", marks=pytest.mark.slow)])
def test_error_at_every_call(undo_scene: Scene, error: str, replace: bool, wait_in: str) -> None:
    injected = loop(undo_scene, error, LOOPS[error], replace=replace, wait_in=wait_in)
    assert injected["pwrite64"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("wait_in", ["main", "worker"])
def test_error_at_every_read(undo_scene: Scene, wait_in: str) -> None:
    injected = loop(undo_scene, "EIO", READS, replace=True, wait_in=wait_in)
    assert set(injected) <= READS
