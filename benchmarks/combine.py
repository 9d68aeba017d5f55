"""Combining adapters straight into a base, against the merge that adds the same adapters up.

    python benchmarks/combine.py --runs 5
    python benchmarks/combine.py --method dare_ties --runs 3

Two r = 16 adapters and a TinyLlama-1.1B-shaped base. Goals for ``ties``: at most 3 times the plain merge, 600
MB. (``combine`` to an adapter is in benchmarks/algebra.py.)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import interleave
from algebra import START, median, peak, synthetic
from merge import RESULTS, Goal, adaptertool, goal_table


def into(folder: Path, runs: int, factors: str, method: str) -> tuple[list[interleave.Run], list[Goal]]:
    base, out = folder / "base", folder / "out"
    synthetic("base", "1.1b", base)
    adapters = [folder / f"adapter{i}" for i in range(2)]
    for seed, adapter in enumerate(adapters):
        synthetic("adapter", "1.1b", adapter, "--rank", 16, "--factors", factors, "--seed", seed)
    given = [str(adapter) for adapter in adapters]
    words = [adaptertool(), "combine", *given, "--weights", "1,1", "--out", str(out), "--into", str(base)]
    options = {"linear": []}.get(method, ["--density", "0.2" if method == "ties" else "0.5"])
    plain, name = "merge of two", f"combine --into, {method}"
    found = interleave.interleave(
        {
            START: [sys.executable, "-c", "import torch"],
            plain: [adaptertool(), "merge", str(base), *given, str(out), "-q"],
            name: [*words, "--method", method, *options, "-q"],
        },
        runs,
        inputs=[base, *adapters],
        outputs=[out],
    )
    return found, [
        Goal(text=f"{method} / plain merge", measured=median(found, name) / median(found, plain), limit=3),
        Goal(text="peak MB", measured=peak(found, name), limit=600),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="ties")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--factors", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workdir", type=Path, help="where the files go; they are removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adaptertool-bench-", dir=options.workdir) as name:
        runs, goals = into(Path(name), options.runs, options.factors, options.method)
        facts = interleave.machine_facts(Path(name))
    summaries = interleave.summarise(runs, START)
    print(interleave.markdown(summaries))
    print(goal_table(goals))
    results = RESULTS / f"combine-{options.method}.json"
    interleave.write_results(results, f"combine --into, {options.method}", runs, summaries, facts)
    with results.with_suffix(".md").open("a", encoding="utf-8") as file:
        file.write(f"\n{goal_table(goals)}\n")
    print(f"written: {results}")


if __name__ == "__main__":
    main()
