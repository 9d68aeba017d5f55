"""A device that is full or broken, at any system call: a StoreError, the output untouched, nothing left."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

import adapterhub_tools as at
from adapterhub_tools.errors import StoreError
from tests.faults.forked_merges import REPOSITORY, Ended
from tests.faults.injection import FLUSHES, OPENS, REMOVALS, WRITES, census, inject, is_message
from tests.faults.scene import Scene

LOOPS = {
    "ENOSPC": WRITES | FLUSHES | OPENS,
    "EDQUOT": WRITES | FLUSHES,
    "EIO": WRITES | FLUSHES,
}
KINDS = {"ENOSPC": "disk-full", "EDQUOT": "quota", "EIO": "io", "ENOLCK": "lock", "EFBIG": "file-too-large"}
READS = {"getdents64", "openat", "pread64", "preadv", "preadv2", "read"}
_MKDIR_PATH = re.compile(r'^mkdir(?:at)?\((?:AT_FDCWD[^,]*, )?"([^"]*)"')


def must_fail(call: str, hit: str, log: Path) -> bool:
    """Returns whether a merge cannot be complete after this failed call."""
    if call in OPENS:
        return "O_CREAT" in hit
    if call.startswith("mkdir"):  # makedirs asks again for folders that exist, and takes any answer
        path = _MKDIR_PATH.match(hit)
        lines = log.read_text().splitlines()
        assert path is not None, hit
        return not any(path[1] in line for line in lines[: lines.index(hit)])
    return call not in READS


def check_refused(ended: Ended, scene: Scene, error: str, hit: str, *, by_preflight: bool = False) -> None:
    """Checks for a StoreError of the right kind that names the file, the reason and the remedy."""
    answer = ended.answer
    assert "traceback" not in answer, f"{hit}\n{answer['traceback']}"
    assert (answer.get("error"), answer.get("exit_code")) == ("StoreError", StoreError.exit_code), (
        hit,
        answer,
    )
    for problem in answer["problems"]:
        assert problem["kind"] == KINDS[error], (hit, problem)
        assert problem["file"], (hit, problem)
        if str(scene.place) in hit:
            assert problem["file"].startswith(str(scene.place)), (hit, problem)
            assert os.path.normpath(problem["file"]) == problem["file"], (hit, problem)
        reasons = [os.strerror(getattr(errno, error)), *(["bytes are needed"] if by_preflight else [])]
        assert any(reason in problem["message"] for reason in reasons), (hit, problem)
        assert problem["remedy"], (hit, problem)


@pytest.mark.usefixtures("injectable")
@pytest.mark.parametrize("wait_in", ["main", "worker"])
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", pytest.param("EDQUOT", marks=pytest.mark.slow)])
def test_error_at_every_call(scene: Scene, error: str, replace: bool, wait_in: str) -> None:
    injected = loop(scene, error, LOOPS[error], replace=replace, wait_in=wait_in)
    assert {"pwrite64", "sync_file_range"} <= set(injected)
    if wait_in == "main":
        assert {"fallocate", "fsync", "mkdir", "renameat2" if replace else "rename", "write"} <= set(injected)


@pytest.mark.usefixtures("injectable")
@pytest.mark.parametrize(
    ("error", "calls"), [("ENOLCK", {"flock"}), ("EIO", READS)], ids=["no locks", "unreadable"]
)
@pytest.mark.parametrize("wait_in", ["main", "worker"])
def test_error_at_every_lock_and_read(scene: Scene, error: str, calls: set[str], wait_in: str) -> None:
    injected = loop(scene, error, calls, replace=True, wait_in=wait_in)
    assert set(injected) <= calls


@pytest.mark.usefixtures("injectable")
def test_what_cannot_be_removed_is_told(scene: Scene) -> None:
    """With the new output in place, the old one's folder may stay behind; the merge is right and says so."""
    told = 0
    for call in sorted(REMOVALS):
        for when in range(1, 100):
            scene.reset(replace=True)
            ended, hit = inject(scene.start(replace=True), scene.log, call, when, "error=EIO")
            if not hit:
                break
            if not ended.done:  # a probe could not be removed: before any work
                check_refused(ended, scene, "EIO", hit)
                assert scene.state(replace=True) == "old"
            else:
                assert scene.state(replace=True) == "new"
                told += check_told(ended, scene, hit)
            scene.merge_again()
    assert told > 0
    scene.check_inputs()


def check_told(ended: Ended, scene: Scene, hit: str) -> int:
    """Checks that a merge that was complete names what it could not remove; returns how much that is."""
    notes = [note for note in ended.answer["notes"] if note.startswith("could not be removed")]
    left = [f"could not be removed: {scene.place / name}" for name in scene.leftovers()]
    assert notes == left, (hit, ended.answer)
    return len(left)


def loop(scene: Scene, error: str, calls: set[str], *, replace: bool, wait_in: str) -> Counter[str]:
    """Fails each call of each kind once, checks what every failure leaves, and returns how many there are."""
    scene.reset(replace)
    ended, counts = census(scene.start(replace=replace, wait_in=wait_in), scene.log)
    assert ended.done, ended
    injected: Counter[str] = Counter()
    refused = 0
    for call in sorted(set(counts) & calls):
        for when in count(1):
            scene.reset(replace)
            merge = scene.start(replace=replace, wait_in=wait_in)
            ended, hit = inject(merge, scene.log, call, when, f"error={error}")
            if not hit:
                assert ended.done, ended
                break
            if is_message(hit):
                continue
            injected[call] += 1
            if ended.done:
                assert not must_fail(call, hit, scene.log), hit
                assert scene.state(replace) == "new"
                check_told(ended, scene, hit)
                continue
            assert scene.state(replace) == "old", hit
            assert scene.leftovers() == [], hit
            if str(scene.folder) in hit:
                check_refused(ended, scene, error, hit)
                refused += 1
            else:  # a file of the installed package: as when one of its modules cannot be read
                assert str(REPOSITORY) in hit or sys.prefix in hit, (hit, ended)
    scene.merge_again()
    scene.check_inputs()
    print(f"{error}: {sum(injected.values())}, refused {refused}: {dict(injected)}")
    assert dict(injected) == {
        call: counts[call] for call in calls if counts[call]
    }  # every one, and none twice
    return injected


@pytest.mark.usefixtures("injectable")
@pytest.mark.parametrize("call", ["fallocate", "fadvise64", "sync_file_range"])
@pytest.mark.parametrize("error", ["EOPNOTSUPP", "ENOSYS"])
def test_what_is_only_faster_may_be_missing(scene: Scene, call: str, error: str) -> None:
    scene.reset(replace=False)
    merge = scene.start(replace=False)
    ended, _ = inject(merge, scene.log, "syncfs", 1, "error=EIO", always=f"{call}:error={error}", follow=True)
    assert ended.done, ended
    assert scene.state(replace=False) == "new"
    if call != "fadvise64":  # only large files drop their pages
        assert scene.log.read_text().count("(INJECTED)") >= 3


PAGE = os.sysconf("SC_PAGE_SIZE")
SIZES = range(PAGE, 40 * PAGE, PAGE)


@pytest.mark.usefixtures("mountable")
@pytest.mark.parametrize("preflight", [True, False], ids=["asked before", "filled meanwhile"])
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_a_file_system_too_small(scene: Scene, replace: bool, preflight: bool) -> None:
    """From no room to enough, page by page; without preflight it is as if another program filled it."""
    kinds = [small_device(scene, f"size={size}", replace=replace, preflight=preflight) for size in SIZES]
    kinds = [kind for kind in kinds if kind]
    print(f"file systems too small: {Counter(kinds)}")
    assert ("refused before" in kinds) == (preflight and PAGE == 4096), Counter(kinds)
    assert kinds.count("written") >= 10
    assert kinds.count("refused while writing") >= 2
    first = kinds.index("written")
    assert set(kinds[first:]) == {"written"}


@pytest.mark.usefixtures("mountable")
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_too_few_inodes(scene: Scene, replace: bool) -> None:
    kinds = [small_device(scene, f"nr_inodes={inodes}", replace=replace) for inodes in range(2, 36)]
    kinds = [kind for kind in kinds if kind]
    print(f"too few inodes: {Counter(kinds)}")
    assert set(kinds) == {"refused while writing", "written"}
    assert kinds.count("refused while writing") >= 10


def small_device(scene: Scene, options: str, *, replace: bool, preflight: bool = True) -> str:
    """Merges to a file system of its own; returns what came of it, or "" if the old output has no room."""
    ended = scene.server.run(
        scene.keywords(replace=replace),
        mounts=[{"at": str(scene.place), "options": options}],
        copies=[(str(scene.older_folder), str(scene.out))] if replace else [],
        no_preflight=not preflight,
        show=[str(scene.place)],
    )
    shown = ended.answer["shown"][str(scene.place)]
    inside = {path.removeprefix("out/"): what for path, what in shown.items() if path.startswith("out/")}
    if "shutil.Error" in ended.answer.get("traceback", ""):
        return ""
    if ended.done:
        assert inside == scene.new
        assert len(shown) == len(inside) + 1, "something is left beside the output"
        return "written"
    check_refused(ended, scene, "ENOSPC", str(scene.place), by_preflight=True)
    assert inside == (scene.older if replace else {})
    assert len(shown) == len(inside) + bool(replace), "something is left beside the output"
    return (
        "refused before"
        if "are needed" in ended.answer["problems"][0]["message"]
        else "refused while writing"
    )


def test_preflight_says_what_is_needed_and_free(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_tools.store.destination.free_bytes", lambda folder: 1000)
    with pytest.raises(StoreError, match=r"bytes are needed, 1,000 are free\. Free space") as caught:
        at.merge(**scene.keywords())
    assert caught.value.problems[0].kind == "disk-full"
    assert caught.value.problems[0].file == str(scene.place)
    assert list(scene.place.iterdir()) == []


@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_a_limit_on_file_sizes(scene: Scene, replace: bool) -> None:
    """``ulimit -f``: the kernel writes up to the limit, then refuses; every file's size is met once."""
    sizes = {path.stat().st_size for path in scene.older_folder.rglob("*") if path.is_file()}
    refused = 0
    for limit in sorted({0, 1, 100, *(size - 1 for size in sizes), *sizes}):
        scene.reset(replace)
        ended = scene.server.run(scene.keywords(replace=replace), file_size_limit=limit)
        assert scene.leftovers() == []
        if limit >= max(sizes):
            assert ended.done, ended
            assert scene.state(replace) == "new"
            continue
        check_refused(ended, scene, "EFBIG", str(scene.place))
        assert scene.state(replace) == "old"
        refused += 1
    assert refused >= len(sizes)
    scene.merge_again()
    scene.check_inputs()
