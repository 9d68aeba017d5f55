"""What the tests of faults share: one small model, and a server that forks a process for each merge."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.forked_merges import MergeServer
from tests.faults.injection import why_no_injection
from tests.faults.scene import Scene
from tests.faults.small_model import make_adapter, make_base


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MergeServer]:
    folder = tmp_path_factory.mktemp("warm")
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    warm = {"base": str(base), "adapter": str(adapter), "out": str(folder / "out"), "threads": 2}
    with MergeServer(warm) as running:
        yield running


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system in memory where there is one: there a merge is three times as fast.

    A killed process loses nothing that it gave to the kernel, and an injected error never reaches the device,
    so these tests see the same as on a disk; the slow ones run there.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 32 << 20:
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def scene(memory_folder: Path, server: MergeServer) -> Scene:
    return Scene(memory_folder, server)


@pytest.fixture
def scene_on_disk(tmp_path: Path, server: MergeServer) -> Scene:
    return Scene(tmp_path, server)


@pytest.fixture(scope="session")
def injectable() -> None:
    reason = why_no_injection()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def mountable(server: MergeServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where this user may not have mounts of its own."""
    folder = tmp_path_factory.mktemp("mount")
    ended = server.run({"base": str(folder / "none")}, mounts=[{"at": str(folder)}])
    if "PermissionError" in ended.answer.get("traceback", ""):
        pytest.skip("neither root nor user namespaces: no mounts for one process")
