"""The same bytes whatever the threads, the blocks, and the run; the same content whatever the shards."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

import adapterhub_tools as at
from adapterhub_tools.engine import run as engine
from adapterhub_tools.linalg import rounding
from adapterhub_tools.linalg.single import SingleSum
from adapterhub_tools.store import writer
from tests.faults.outputs import Tree, check_receipt, tree_of
from tests.faults.small_model import make_adapter, make_base

HIDDEN = 160
BLOCKS = {"small": (1 << 9, 1 << 11), "middle": (5000, 10_000), "as delivered": (1 << 18, 8 << 20)}
"""Elements of a block of arithmetic, and bytes of a chunk that is read and written; those in the middle are
neither powers of two nor whole rows."""


class Sizes:
    """Sets the sizes of blocks wherever a module holds them, and counts what they led to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.blocks = self.writes = 0
        write = writer.RangeWriter.write

        def counted(evaluate: Callable[..., None]) -> Callable[..., None]:
            def counted_block(*args: object) -> None:
                self.blocks += 1
                evaluate(*args)

            return counted_block

        def counted_write(*args: object) -> None:
            self.writes += 1
            write(*args)  # type: ignore[arg-type]

        # A block is evaluated in binary32 first where the result has 16 bits, else in binary64.
        for kind, name in ((SingleSum, "delta"), (rounding.BlockRounder, "_round_block")):
            monkeypatch.setattr(kind, name, counted(getattr(kind, name)))
        monkeypatch.setattr(writer.RangeWriter, "write", counted_write)

    def set(self, elements: int, nbytes: int) -> None:
        self.blocks = self.writes = 0
        held = {"BLOCK_ELEMENTS": 0, "CHUNK_BYTES": 0}
        for name, module in sorted(sys.modules.items()):
            for constant, value in (("BLOCK_ELEMENTS", elements), ("CHUNK_BYTES", nbytes)):
                if name.startswith("adapterhub_tools.") and hasattr(module, constant):
                    self._monkeypatch.setattr(module, constant, value)
                    held[constant] += 1
        assert all(held.values()), held


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Sizes:
    assert BLOCKS["as delivered"][1] == engine.CHUNK_BYTES
    assert BLOCKS["as delivered"][0] == rounding.BLOCK_ELEMENTS
    return Sizes(monkeypatch)


@pytest.mark.parametrize("repeats", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_result(tmp_path: Path, sizes: Sizes, dtype: str, repeats: int) -> None:
    adapters = [make_adapter(tmp_path / f"adapter-{seed}", hidden=HIDDEN, seed=seed) for seed in (1, 2)]
    digests, work = set(), {}
    runs = 0
    for shards in (1, 2, 3):
        base = make_base(tmp_path / f"base-{shards}", hidden=HIDDEN, shards=shards, dtype=dtype)
        trees: list[Tree | None] = []
        for threads, name, repeat in product((1, 2, 4), BLOCKS, range(repeats)):
            sizes.set(*BLOCKS[name])
            out = tmp_path / f"out-{shards}-{threads}-{name}-{repeat}"
            report = at.merge(base, adapters, out, scale=(1.0, 0.3), threads=threads)
            assert report.resolved > 0 or dtype == "float32"
            digests.add(report.digest)
            trees.append(tree_of(out))
            if len(trees) == 1:
                check_receipt(out)
            shutil.rmtree(out)
            work[shards, name] = (sizes.blocks, sizes.writes)
            runs += 1
        assert all(tree == trees[0] for tree in trees)
    print(f"{dtype}: {runs} merges, {len(digests)} digest")
    assert len(digests) == 1
    for shards in (1, 2, 3):
        blocks, writes = zip(*(work[shards, name] for name in BLOCKS), strict=True)
        assert blocks[0] > blocks[1] > blocks[2]
        assert writes[0] > writes[1] > writes[2]
