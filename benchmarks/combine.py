"""Combining adapters: into a base against the plain merge of the same, and into one adapter.

    python benchmarks/combine.py into --runs 5
    python benchmarks/combine.py linear --runs 5

``into``: TIES of two r = 16 adapters into a TinyLlama-1.1B-shaped base. Goals: at most 3 times the merge that
adds the same adapters up, 600 MB.
``linear``: the sum of four r = 16 adapters in the shape of Llama-7B (224 modules), at rank 16 and as it is.
Goals: at most 5 s more than a process that only imports torch, 600 MB.
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


def linear(folder: Path, runs: int, factors: str, method: str) -> tuple[list[interleave.Run], list[Goal]]:
    out = folder / "out"
    adapters = [folder / f"adapter{i}" for i in range(4)]
    for seed, adapter in enumerate(adapters):
        synthetic("adapter", "7b", adapter, "--rank", 16, "--factors", factors, "--seed", seed)
    words = [adaptertool(), "combine", *map(str, adapters), "--weights", "0.4,0.3,0.2,0.1"]
    words += ["--method", method, "--out", str(out), "-q"]
    whole, cut = f"{method}, rank 64", f"{method}, cut to rank 16"
    found = interleave.interleave(
        {START: [sys.executable, "-c", "import torch"], whole: words, cut: [*words, "--rank", "16"]},
        runs,
        inputs=adapters,
        outputs=[out],
    )
    start = median(found, START)
    return found, [
        Goal(text="seconds beyond start-up", measured=median(found, whole) - start, limit=5),
        Goal(text="the same, cut to rank 16", measured=median(found, cut) - start, limit=5),
        Goal(text="peak MB", measured=max(peak(found, whole), peak(found, cut)), limit=600),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("into", "linear"))
    parser.add_argument("--method", help="ties and linear if not given")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--factors", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workdir", type=Path, help="where the files go; they are removed")
    options = parser.parse_args()
    method = options.method or {"into": "ties", "linear": "linear"}[options.what]
    with tempfile.TemporaryDirectory(prefix="adaptertool-bench-", dir=options.workdir) as name:
        work = {"into": into, "linear": linear}[options.what]
        runs, goals = work(Path(name), options.runs, options.factors, method)
        facts = interleave.machine_facts(Path(name))
    summaries = interleave.summarise(runs, START)
    print(interleave.markdown(summaries))
    print(goal_table(goals))
    results = RESULTS / f"combine-{options.what}-{method}.json"
    interleave.write_results(results, f"combine: {options.what}", runs, summaries, facts)
    with results.with_suffix(".md").open("a", encoding="utf-8") as file:
        file.write(f"\n{goal_table(goals)}\n")
    print(f"written: {results}")


if __name__ == "__main__":
    main()
