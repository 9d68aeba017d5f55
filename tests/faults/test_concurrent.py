"""Several processes merge to one output: one wins, the others win later or are refused; never a mix."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from adapterhub_tools.errors import StoreError
from adapterhub_tools.model.receipt import RECEIPT_FILE
from tests.faults.forked_merges import MergeServer
from tests.faults.outputs import Tree, check_receipt, tree_of
from tests.faults.scene import Scene
from tests.faults.small_model import make_adapter

ROUNDS = [10, pytest.param(100, marks=pytest.mark.slow)]
LOST = {"exists", "locked"}
"""What the loser of a race may be told: the output was made meanwhile, or its working folder taken."""


class Rivals:
    """Writers with an adapter each, so that their outputs differ, and what each would write alone."""

    def __init__(self, scene: Scene, writers: int) -> None:
        self.scene = scene
        self.adapters = [make_adapter(scene.folder / f"rival-{i}", seed=10 + i) for i in range(writers)]
        self.trees: list[Tree] = []
        for i, adapter in enumerate(self.adapters):
            alone = scene.folder / f"alone-{i}"
            assert scene.server.run(scene.keywords(adapter=str(adapter), out=str(alone))).done
            check_receipt(alone)
            self.trees.append(tree_of(alone) or {})
        assert len({json.dumps(tree) for tree in self.trees}) == writers

    def race(self, server: MergeServer, *, replace: bool) -> list[dict[str, Any]]:
        """Lets all start at once and returns their answers."""
        merges = [
            server.start(self.scene.keywords(adapter=str(adapter), replace=replace))
            for adapter in self.adapters
        ]
        for merge in merges:
            merge.until_waiting()
        for merge in merges:
            merge.go()
        while not all(merge.ended for merge in merges):
            look_at(self.scene.out, [*self.trees, self.scene.older or {}])
        return [merge.end().answer for merge in merges]


def look_at(out: Path, complete: list[Tree]) -> None:
    """Reads the output while others write: through one open folder nothing but one whole output may be seen.

    Unless it is taken away meanwhile: then files are missing, and another folder has its name, or none.
    """
    try:
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        seen: object = tree_of(Path(f"/proc/self/fd/{folder}"))
    except FileNotFoundError as error:
        seen = error
    try:
        if seen not in complete:
            assert out.stat().st_ino != os.fstat(folder).st_ino, f"an incomplete output: {seen}"
    except FileNotFoundError:
        return
    finally:
        os.close(folder)


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("writers", [2, 4])
@pytest.mark.parametrize("start", ["fresh", "replace", "replace nothing"])
def test_one_output_for_all(scene: Scene, server: MergeServer, start: str, writers: int, rounds: int) -> None:
    rivals = Rivals(scene, writers)
    outcomes: Counter[str] = Counter()
    for _ in range(rounds):
        scene.reset(replace=start == "replace")
        answers = rivals.race(server, replace=start != "fresh")
        won = [i for i, answer in enumerate(answers) if "digest" in answer]
        for answer in answers:
            if "digest" in answer:
                outcomes["won"] += 1
                continue
            assert (answer.get("error"), answer.get("exit_code")) == ("StoreError", StoreError.exit_code), (
                answer
            )
            assert answer["problems"][0]["kind"] in LOST, answer
            outcomes[answer["problems"][0]["kind"]] += 1
        assert won, answers
        if start == "fresh":
            assert len(won) == 1, answers
        if start == "replace":
            assert len(won) == writers, answers
        assert tree_of(scene.out) in [rivals.trees[i] for i in won]
        check_receipt(scene.out)
        assert scene.leftovers() == []
    scene.check_inputs()
    print(f"{writers} writers, {start}, {rounds} rounds: {dict(outcomes)}")
    assert outcomes.total() == writers * rounds


def test_a_working_folder_in_use_is_left_alone(scene: Scene, server: MergeServer) -> None:
    """One merge stands still before its first tensor while another goes by: neither disturbs the other."""
    scene.reset(replace=True)
    slow = scene.start(replace=True, wait_in="worker")
    slow.until_waiting()
    working = scene.leftovers()
    assert len(working) == 1
    fast = server.run(scene.keywords(adapter=str(scene.other), replace=True))
    assert fast.done, fast
    assert scene.leftovers() == working
    assert tree_of(scene.out) == scene.older
    slow.go()
    assert slow.end().done
    assert scene.state(replace=True) == "new"
    assert scene.leftovers() == []
    assert (scene.out / RECEIPT_FILE).is_file()


def test_a_writer_that_is_killed_does_not_stop_the_others(scene: Scene, server: MergeServer) -> None:
    rivals = Rivals(scene, 3)
    killed = 0
    for round_number in range(12):
        scene.reset(replace=True)
        merges = [
            server.start(scene.keywords(adapter=str(adapter), replace=True)) for adapter in rivals.adapters
        ]
        for merge in merges:
            merge.until_waiting()
        for merge in merges:
            merge.go()
        time.sleep(0.008 * round_number)
        os.kill(merges[0].pid, signal.SIGKILL)
        first, *others = [merge.end() for merge in merges]
        killed += first.killed
        assert all(other.done for other in others), others
        assert tree_of(scene.out) in rivals.trees
        scene.merge_again()
    scene.check_inputs()
    assert killed >= 1
