"""What a power failure could lose: the order of writes and flushes of a whole merge, as the kernel saw it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapterhub_tools.model.receipt import RECEIPT_FILE
from tests.faults.injection import record
from tests.faults.scene import Scene

CALLS = "openat,mkdir,write,pwrite64,fallocate,fsync,fdatasync,rename,renameat2,unlink,unlinkat,rmdir"
_PATHS = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"^(?:\d+ +)?\w+\(\d+<([^>]*)>")
_CALL = re.compile(r"^(?:\d+ +)?(\w+)\(")


class Device:
    """Which files and folders have changes that the device need not have yet."""

    def __init__(self) -> None:
        self.dirty: set[str] = set()
        self.renames = 0
        self.flushes = 0

    def see(self, line: str, out: Path) -> None:
        found = _CALL.match(line)
        if found is None:
            return
        call, paths, descriptor = found[1], _PATHS.findall(line), _DESCRIPTOR.match(line)
        if call in ("fsync", "fdatasync") and descriptor:
            self.flushes += 1
            self.dirty.discard(descriptor[1])
        elif call in ("write", "pwrite64", "fallocate") and descriptor:
            self.dirty.add(descriptor[1])
        elif call == "mkdir" or (call == "openat" and "O_CREAT" in line):
            assert paths[0].startswith("/"), line
            if " = -1 " in line:
                return
            if Path(paths[0]).name == RECEIPT_FILE:
                assert self.inside(Path(paths[0]).parent) == set(), "the receipt before what it vouches for"
            self.dirty |= {paths[0], str(Path(paths[0]).parent)}
        elif call.startswith("rename") and str(out) in paths:
            self.renames += 1
            new = Path(next(path for path in paths if path != str(out)))
            assert self.inside(new) == set(), "not flushed before it takes its place"
            self.dirty |= {str(new.parent), str(out.parent)}

    def inside(self, folder: Path) -> set[str]:
        return {path for path in self.dirty if Path(path) == folder or folder in Path(path).parents}


@pytest.mark.usefixtures("injectable")
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
@pytest.mark.parametrize("threads", [1, 2])
def test_all_is_on_the_device_before_the_rename_and_that_before_the_end(
    scene: Scene, replace: bool, threads: int
) -> None:
    scene.reset(replace)
    ended, lines = record(scene.start(replace=replace, merge={"threads": threads}), scene.log, CALLS)
    assert ended.done, ended
    device = Device()
    for line in lines:
        device.see(line, scene.out)
    assert device.renames == 1
    assert device.flushes >= len(scene.new)
    assert str(scene.place) not in device.dirty, "the new name itself is not flushed"
    assert device.inside(scene.out) == set()
