"""The digest cache: never wrong, whatever happens to the files or to the cache itself."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest

from adapterhub_tools.errors import StoreError
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.store import digest_cache
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.digest import ALGORITHMS, digest_checkpoint
from adapterhub_tools.store.digest_cache import DigestCache, cached_checkpoint_digests, default_path
from adapterhub_tools.store.files import FileStamp
from adapterhub_tools.store.layout import build_file

NAME = "model.safetensors"


def write(root: Path, fill: int = 1) -> None:
    specs = [TensorSpec(name=name, dtype="U8", shape=(4,)) for name in ("a", "b", "c")]
    head, _ = build_file(specs, {})
    root.mkdir(exist_ok=True)
    (root / NAME).write_bytes(head + bytes([fill]) * 12)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "cache" / "digests.sqlite")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file just written counts as settled."""
    monkeypatch.setattr(digest_cache, "SETTLED_NS", 0)


class Counter:
    """A Progress that counts the bytes that were really read."""

    def __init__(self) -> None:
        self.bytes = 0

    def start(self, what: str, total_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        self.bytes += nbytes

    def finish(self) -> None:
        pass


def read_bytes(checkpoint: Checkpoint, cache: DigestCache | None, **options: object) -> int:
    """Asks for digests, checks that they are right, and returns how many bytes had to be read for them."""
    counter = Counter()
    found = cached_checkpoint_digests(checkpoint, cache=cache, progress=counter, threads=1, **options)
    assert found == digest_checkpoint(checkpoint, **options)
    assert list(found) == sorted(found)
    return counter.bytes


def test_computed_once(base: Path, cache: DigestCache, settled: None) -> None:
    checkpoint = open_checkpoint(base)
    assert read_bytes(checkpoint, cache) == 12
    assert read_bytes(checkpoint, cache) == 0
    cache.close()
    with DigestCache(cache.path) as again:
        assert read_bytes(open_checkpoint(base), again) == 0
        assert again.warnings == []
    assert cache.warnings == []
    cache.close()
    cache.close()


def test_without_cache(base: Path) -> None:
    assert read_bytes(open_checkpoint(base), None) == 12
    assert read_bytes(open_checkpoint(base), None, names=["a"]) == 4


def test_only_what_is_missing_is_computed(base: Path, cache: DigestCache, settled: None) -> None:
    checkpoint = open_checkpoint(base)
    assert read_bytes(checkpoint, cache, names=["b"]) == 4
    assert read_bytes(checkpoint, cache, names=["a", "b"]) == 4
    assert read_bytes(checkpoint, cache) == 4
    assert read_bytes(checkpoint, cache) == 0
    assert read_bytes(checkpoint, cache, names=[]) == 0


def test_algorithms_are_apart(base: Path, cache: DigestCache, settled: None) -> None:
    checkpoint = open_checkpoint(base)
    for algorithm in ALGORITHMS:
        assert read_bytes(checkpoint, cache, algorithm=algorithm) == 12
    for algorithm in ALGORITHMS:
        assert read_bytes(checkpoint, cache, algorithm=algorithm) == 0


def test_a_young_file_is_not_remembered(base: Path, cache: DigestCache) -> None:
    """Its next change could fall into the same tick of the clock."""
    checkpoint = open_checkpoint(base)
    assert read_bytes(checkpoint, cache) == 12
    assert read_bytes(checkpoint, cache) == 12


def test_nor_one_from_the_future(base: Path, cache: DigestCache) -> None:
    future = time.time_ns() + 3_600_000_000_000
    os.utime(base / NAME, ns=(future, future))
    checkpoint = open_checkpoint(base)
    assert read_bytes(checkpoint, cache) == 12
    assert read_bytes(checkpoint, cache) == 12


def rewritten(path: Path) -> None:
    write(path.parent, 2)


def rewritten_with_its_old_time(path: Path) -> None:
    before = path.stat()
    write(path.parent, 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_with_its_old_time(path: Path) -> None:
    before = path.stat()
    path.rename(path.with_name("old"))
    write(path.parent, 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    "change", [rewritten, rewritten_with_its_old_time, replaced_with_its_old_time, touched]
)
def test_a_changed_file_is_read_again(base: Path, cache: DigestCache, settled: None, change) -> None:
    assert read_bytes(open_checkpoint(base), cache) == 12
    time.sleep(0.02)  # a tick of the file system's clock
    change(base / NAME)
    assert read_bytes(open_checkpoint(base), cache) == 12
    assert read_bytes(open_checkpoint(base), cache) == 0


def test_a_moved_file_is_read_again(base: Path, cache: DigestCache, settled: None) -> None:
    assert read_bytes(open_checkpoint(base), cache) == 12
    base.rename(base.with_name("moved"))
    assert read_bytes(open_checkpoint(base.with_name("moved")), cache) == 12


def test_a_file_changed_since_it_was_opened(base: Path, cache: DigestCache, settled: None) -> None:
    checkpoint = open_checkpoint(base)
    read_bytes(checkpoint, cache)
    (base / NAME).write_bytes(b"x")
    with pytest.raises(StoreError, match="changed"):
        cached_checkpoint_digests(checkpoint, cache=cache)


# --- a cache that fails ------------------------------------------------------------------------------


def check_ignored(base: Path, cache: DigestCache) -> None:
    assert read_bytes(open_checkpoint(base), cache) == 12
    assert read_bytes(open_checkpoint(base), cache) == 12
    assert len(cache.warnings) >= 1
    assert all(text.startswith(f"digest cache '{cache.path}' not used: ") for text in cache.warnings)
    assert len(set(cache.warnings)) == len(cache.warnings)


def test_a_damaged_file(base: Path, cache: DigestCache, settled: None) -> None:
    cache.path.parent.mkdir()
    cache.path.write_bytes(b"not a database" * 1000)
    check_ignored(base, cache)
    assert cache.path.read_bytes() == b"not a database" * 1000


def test_another_schema(base: Path, cache: DigestCache, settled: None) -> None:
    cache.path.parent.mkdir()
    connection = sqlite3.connect(cache.path)
    connection.execute("CREATE TABLE file_digests_v1 (x)")
    connection.commit()
    connection.close()
    check_ignored(base, cache)


def test_a_folder_in_its_place(base: Path, cache: DigestCache, settled: None) -> None:
    cache.path.mkdir(parents=True)
    check_ignored(base, cache)


def test_a_folder_that_cannot_be_made(base: Path, tmp_path: Path, settled: None) -> None:
    (tmp_path / "file").touch()
    check_ignored(base, DigestCache(tmp_path / "file" / "digests.sqlite"))


def test_a_locked_file(
    base: Path, cache: DigestCache, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_cache, "_BUSY_SECONDS", 0.05)
    read_bytes(open_checkpoint(base), cache)
    write(base, 2)
    holder = sqlite3.connect(cache.path)
    holder.execute("BEGIN EXCLUSIVE")
    cache.close()
    check_ignored(base, cache)
    holder.close()


@pytest.mark.parametrize(
    "change",
    [
        "digests = replace(digests, '0', '1')",
        "digests = X'00'",
        "digests = 'text'",
        "check_sha256 = X'00'",
        "path = path || 'x'",
        "size = size + 1",
    ],
)
def test_an_entry_that_was_changed_by_hand(
    base: Path, cache: DigestCache, settled: None, change: str
) -> None:
    checkpoint = open_checkpoint(base)
    read_bytes(checkpoint, cache)
    cache.close()
    connection = sqlite3.connect(cache.path)
    connection.execute(f"UPDATE file_digests_v1 SET {change}")
    connection.commit()
    connection.close()
    assert read_bytes(checkpoint, cache) == 12
    assert read_bytes(checkpoint, cache) == 0


def test_an_entry_of_another_file_is_no_use(base: Path, cache: DigestCache, settled: None) -> None:
    """The check covers path and state, so an entry cannot be passed off as that of another file."""
    write(base.with_name("other"), 2)
    one, two = open_checkpoint(base), open_checkpoint(base.with_name("other"))
    read_bytes(one, cache)
    read_bytes(two, cache)
    cache.close()
    connection = sqlite3.connect(cache.path)
    rows = connection.execute("SELECT digests, check_sha256 FROM file_digests_v1 ORDER BY path").fetchall()
    for (path,), row in zip(
        connection.execute("SELECT path FROM file_digests_v1 ORDER BY path").fetchall(),
        reversed(rows),
        strict=True,
    ):
        connection.execute(
            "UPDATE file_digests_v1 SET digests = ?, check_sha256 = ? WHERE path = ?", (*row, path)
        )
    connection.commit()
    connection.close()
    assert read_bytes(one, cache) == 12
    assert read_bytes(two, cache) == 12
    assert len(cache.warnings) == 1
    assert "an entry is damaged" in cache.warnings[0]


def test_the_oldest_entries_go(tmp_path: Path, cache: DigestCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "MAX_ENTRIES", 3)
    stamp = FileStamp(device=1, inode=2**64 - 1, size=3, mtime_ns=4, ctime_ns=5)
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        cache.put(path, stamp, ALGORITHMS[0], {"a": bytes(32)})
    found = [bool(cache.get(path, stamp, ALGORITHMS[0])) for path in paths]
    assert found == [False, False, True, True, True]
    assert cache.warnings == []


def test_names_that_are_not_utf8(tmp_path: Path, cache: DigestCache) -> None:
    stamp = FileStamp(device=1, inode=2, size=3, mtime_ns=4, ctime_ns=5)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    cache.put(odd, stamp, ALGORITHMS[0], {"é": bytes(32)})
    assert cache.get(odd, stamp, ALGORITHMS[0]) == {"é": bytes(32)}
    assert cache.warnings == []


def test_several_processes_at_once(base: Path, tmp_path: Path, settled: None) -> None:
    """Threads with connections of their own stand for processes."""
    path = tmp_path / "cache" / "digests.sqlite"
    checkpoint = open_checkpoint(base)
    expected = digest_checkpoint(checkpoint)
    failures: list[object] = []

    def work() -> None:
        with DigestCache(path) as mine:
            for _ in range(20):
                if cached_checkpoint_digests(checkpoint, cache=mine, threads=1) != expected:
                    failures.append("wrong digests")
            failures.extend(mine.warnings)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADAPTERTOOL_CACHE", str(tmp_path))
    assert default_path() == tmp_path / "digests.sqlite"
    assert DigestCache().path == default_path()
    monkeypatch.delenv("ADAPTERTOOL_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_path() == tmp_path / "xdg" / "adaptertool" / "digests.sqlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "adaptertool" / "digests.sqlite"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_path() == tmp_path / "Library" / "Caches" / "adaptertool" / "digests.sqlite"
