"""Killed at any system call: the output is the old one or the complete new one; the next merge cleans up."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter

import pytest

from adapterhub_tools.store.working_folder import recover
from tests.faults.injection import CHANGING, census, inject, is_message
from tests.faults.scene import Scene

pytestmark = pytest.mark.usefixtures("injectable")


def kill_and_check(
    scene: Scene, call: str, when: int, *, replace: bool, wait_in: str, threads: int = 1
) -> bool:
    """Kills one merge at a call and checks what it left; returns False if there was no such call."""
    scene.reset(replace)
    merge = scene.start(replace=replace, wait_in=wait_in, merge={"threads": threads})
    ended, hit = inject(merge, scene.log, call, when, "signal=SIGKILL", follow=threads > 1)
    if ended.done:
        assert scene.state(replace) == "new"
        assert scene.leftovers() == []
        return False
    assert ended.killed, (call, when, ended)
    scene.state(replace)
    scene.merge_again()
    return not is_message(hit)  # the last write reports the end


def kill_at_every_call(scene: Scene, calls: set[str], *, replace: bool, wait_in: str) -> Counter[str]:
    """Kills a merge once at each call that it makes; returns how often."""
    scene.reset(replace)
    ended, counts = census(scene.start(replace=replace, wait_in=wait_in), scene.log)
    assert ended.done, ended
    killed: Counter[str] = Counter()
    for call in sorted(set(counts) & calls):
        while kill_and_check(scene, call, killed[call] + 1, replace=replace, wait_in=wait_in):
            killed[call] += 1
    scene.check_inputs()
    print(f"kills: {sum(killed.values())}: {dict(killed)}")
    assert dict(killed) == {call: counts[call] for call in calls if counts[call]}  # every one, and none twice
    return killed


@pytest.mark.parametrize("wait_in", ["main", "worker"])
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_killed_at_every_call(scene: Scene, replace: bool, wait_in: str) -> None:
    killed = kill_at_every_call(scene, CHANGING - {"close"}, replace=replace, wait_in=wait_in)
    assert {"openat", "pwrite64", "sync_file_range"} <= set(killed)
    if wait_in == "main":
        assert {"fallocate", "fsync", "mkdir", "renameat2" if replace else "rename", "write"} <= set(killed)


@pytest.mark.slow
@pytest.mark.parametrize("wait_in", ["main", "worker"])
@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_killed_at_every_call_on_a_disk(scene_on_disk: Scene, replace: bool, wait_in: str) -> None:
    kill_at_every_call(scene_on_disk, CHANGING, replace=replace, wait_in=wait_in)


@pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])
def test_killed_with_two_workers(scene: Scene, replace: bool) -> None:
    killed: Counter[str] = Counter()
    for call in ("pwrite64", "sync_file_range"):
        while kill_and_check(scene, call, killed[call] + 1, replace=replace, wait_in="main", threads=2):
            killed[call] += 1
    scene.check_inputs()
    print(f"kills: {sum(killed.values())}: {dict(killed)}")
    assert all(killed[call] >= 3 for call in ("pwrite64", "sync_file_range"))


def test_killed_where_folders_cannot_be_exchanged(scene: Scene) -> None:
    """With --allow-replace-gap the output may be missing for a moment; the next run brings the old back."""
    gaps = 0
    for call in ("rename", "fsync", "unlinkat", "rmdir"):
        for when in itertools.count(1):
            scene.reset(replace=True)
            merge = scene.start(replace=True, merge={"allow_replace_gap": True})
            ended, _ = inject(merge, scene.log, call, when, "signal=SIGKILL", always="renameat2:error=EINVAL")
            if not ended.killed:
                assert ended.done, ended
                assert scene.state(replace=True) == "new"
                break
            if not scene.out.exists():
                gaps += 1
                recover(scene.out)
                assert scene.state(replace=True) == "old"
                assert scene.leftovers() == []
            else:
                scene.state(replace=True)
            scene.merge_again()
    print(f"killed in the gap: {gaps}")
    assert gaps == 2  # at the flush between the two renames, and at the second of them
    scene.check_inputs()


@pytest.mark.parametrize("kills", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_at_any_moment(scene: Scene, kills: int) -> None:
    """The moments between calls too: as long as a merge takes is cut into equal parts, one kill at each."""
    scene.reset(replace=True)
    merge = scene.start(replace=True, merge={"threads": 2})
    merge.until_waiting()
    begin = time.monotonic()
    merge.go()
    assert merge.end().done
    whole = time.monotonic() - begin
    states: Counter[str] = Counter()
    for kill in range(kills):
        scene.reset(replace=True)
        merge = scene.start(replace=True, merge={"threads": 2})
        merge.until_waiting()
        merge.go()
        time.sleep(whole * kill / kills)
        os.kill(merge.pid, signal.SIGKILL)
        ended = merge.end()
        states[scene.state(replace=True) if ended.killed else "finished"] += 1
        scene.merge_again()
    scene.check_inputs()
    print(f"kills at any moment: {dict(states)}")
    assert states["old"] > 0
