"""A base, an adapter, an older output and the one that is expected, in one folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.faults.forked_merges import Ended, Merge, MergeServer
from tests.faults.outputs import InputState, Tree, check_receipt, tree_of
from tests.faults.small_model import make_adapter, make_base


class Scene:
    """The inputs, and the two outputs that may stand at ``out`` after a fault: ``old`` or ``new``.

    Attributes:
        out: the output.
        new: the tree of a complete merge.
        older: the tree of an older output, of another adapter; it lies at ``older_folder``.
        log: where strace writes.
    """

    def __init__(self, folder: Path, server: MergeServer) -> None:
        self.server = server
        self.folder = folder
        self.base = make_base(folder / "base")
        self.adapter = make_adapter(folder / "adapter")
        self.other = make_adapter(folder / "other", seed=2)
        self.log = folder / "strace.log"
        self.place = folder / "place"
        self.place.mkdir()
        self.out = self.place / "out"
        self.older_folder = folder / "older"
        self.folders = (self.base, self.adapter, self.other)
        self.inputs = InputState.of(*self.folders)
        for adapter, out in ((self.other, self.older_folder), (self.adapter, folder / "expected")):
            ended = self.server.run(self.keywords(adapter=str(adapter), out=str(out)))
            assert ended.done, ended
            self.check(out)
        self.older = tree_of(self.older_folder)
        self.new = tree_of(folder / "expected")
        assert self.older != self.new

    def keywords(self, **more: Any) -> dict[str, Any]:
        """Returns the keywords of the merge; one worker, so that its calls have one order."""
        paths = {"base": str(self.base), "adapter": str(self.adapter), "out": str(self.out)}
        return {**paths, "threads": 1, **more}

    def check(self, out: Path) -> None:
        """Checks a complete output by what it says of itself."""
        check_receipt(out)

    def reset(self, replace: bool) -> None:
        """Puts the older output in place, or nothing."""
        shutil.rmtree(self.place)
        self.place.mkdir()
        if replace:
            shutil.copytree(self.older_folder, self.out)

    def old(self, replace: bool) -> Tree | None:
        return self.older if replace else None

    def start(self, *, replace: bool, wait_in: str = "main", **request: Any) -> Merge:
        return self.server.start(
            self.keywords(replace=replace, **request.pop("merge", {})), wait_in=wait_in, **request
        )

    def state(self, replace: bool) -> str:
        """Returns ``"old"`` or ``"new"``; a mix fails, with what differs."""
        found = tree_of(self.out)
        if found == self.old(replace):
            return "old"
        if found == self.new:
            self.check(self.out)
            return "new"
        raise AssertionError(f"neither the old nor the new output: {found}")

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.place.iterdir() if path != self.out)

    def merge_again(self) -> Ended:
        """Merges as a user would after a fault, and checks that all is as if there had been none."""
        ended = self.server.run(self.keywords(replace=self.out.exists()))
        assert ended.done, ended
        assert tree_of(self.out) == self.new
        assert self.leftovers() == []
        return ended

    def check_inputs(self) -> None:
        assert InputState.of(*self.folders) == self.inputs
