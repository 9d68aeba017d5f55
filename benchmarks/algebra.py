"""Shrinking, extracting and combining, against a dense SVD of the same matrices.

    python benchmarks/algebra.py shrink --runs 5
    python benchmarks/algebra.py extract --runs 3
    python benchmarks/algebra.py combine --runs 5

``shrink``: a synthetic Llama-7B-shaped adapter, r = 64 on 224 modules, to r = 8. Goals: at most 3 s more than
a process that only imports torch, and at least 500 times faster than the dense way.
``extract``: a TinyLlama-1.1B-shaped base and the same with a rank-64 adapter merged into it, in bfloat16, at
rank 32. Goals: at least 10 times faster than the dense way, errors within 1 % of the optimum, 600 MB.

``combine``: four synthetic Llama-7B-shaped adapters, r = 16 on 224 modules, by ``linear`` and ``cat`` to
r = 64 and by ``svd`` to r = 16. Goals: at most 5 s each, 600 MB. There is no dense reference: PEFT needs the
model in memory, and its ``linear`` computes something else (docs/combine.md).

The dense way is benchmarks/dense_svd.py, our own reference (in float32, one matrix of each shape times the
count), because the tools that work so would need days for all matrices. It runs in the same minute.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import interleave
from merge import HERE, RESULTS, Goal, adaptertool, goal_table

START = "python -c 'import torch'"


def synthetic(*words: object) -> None:
    subprocess.run([sys.executable, str(HERE / "synthetic.py"), *map(str, words)], check=True)


def dense(*words: object) -> dict:
    """Runs the dense reference in a process of its own."""
    argv = [sys.executable, str(HERE / "dense_svd.py"), *map(str, words)]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def median(runs: list[interleave.Run], command: str) -> float:
    return statistics.median(run.wall_s for run in runs if run.command == command)


def peak(runs: list[interleave.Run], command: str) -> float:
    return max(run.peak_rss_bytes for run in runs if run.command == command) / 1e6


def shrink(folder: Path, runs: int, factors: str) -> tuple[list[interleave.Run], list[Goal]]:
    adapter, out = folder / "adapter", folder / "out"
    synthetic("adapter", "7b", adapter, "--rank", 64, "--factors", factors)
    name = "svd-shrink 7B r=64→8"
    found = interleave.interleave(
        {
            START: [sys.executable, "-c", "import torch"],
            name: [adaptertool(), "svd-shrink", str(adapter), str(out), "--rank", "8", "-q"],
        },
        runs,
        inputs=[adapter],
        outputs=[out],
    )
    reference = dense("adapter", adapter, 8)
    print(json.dumps(reference))
    seconds = median(found, name) - median(found, START)
    return found, [
        Goal(text="seconds beyond start-up", measured=seconds, limit=3),
        Goal(text="× faster than dense", measured=reference["seconds"] / seconds, limit=500, at_least=True),
        Goal(text="peak MB", measured=peak(found, name), limit=600),
    ]


def extract(folder: Path, runs: int, factors: str) -> tuple[list[interleave.Run], list[Goal]]:
    base, adapter, tuned, out = (folder / name for name in ("base", "adapter", "tuned", "out"))
    synthetic("base", "1.1b", base)
    synthetic("adapter", "1.1b", adapter, "--rank", 64, "--factors", factors)
    subprocess.run([adaptertool(), "merge", str(base), str(adapter), str(tuned), "-q"], check=True)
    name = "extract 1.1B r=32"
    words = [adaptertool(), "extract", str(base), str(tuned), str(out), "--rank", "32"]
    found = interleave.interleave(
        {START: [sys.executable, "-c", "import torch"], name: [*words, "-q"]},
        runs,
        inputs=[base, tuned],
        outputs=[out],
    )
    reference = dense("models", base, tuned, 32)
    print(json.dumps(reference))
    shutil.rmtree(out, ignore_errors=True)
    text = subprocess.run([*words, "--json"], check=True, capture_output=True, text=True).stdout
    errors = {module["path"]: module["error"] for module in json.loads(text)["modules"]}
    worst = max(errors[row["name"].removesuffix(".weight")] / row["error"] for row in reference["shapes"])
    seconds = median(found, name)
    return found, [
        Goal(text="× faster than dense", measured=reference["seconds"] / seconds, limit=10, at_least=True),
        Goal(text="worst error / optimum", measured=worst, limit=1.01),
        Goal(text="peak MB", measured=peak(found, name), limit=600),
    ]


def combine(folder: Path, runs: int, factors: str) -> tuple[list[interleave.Run], list[Goal]]:
    adapters = [folder / f"adapter{i}" for i in range(4)]
    for place, adapter in enumerate(adapters):
        synthetic("adapter", "7b", adapter, "--rank", 16, "--factors", factors, "--seed", place)
    out = folder / "out"
    words = [adaptertool(), "combine", *map(str, adapters), "--weights", "0.4,0.3,0.2,-0.1"]
    methods = ("linear", "cat", "svd")
    found = interleave.interleave(
        {
            START: [sys.executable, "-c", "import torch"],
            **{f"combine {m}": [*words, "--method", m, "--out", str(out), "-q"] for m in methods},
        },
        runs,
        inputs=adapters,
        outputs=[out],
    )
    return found, [
        goal
        for m in methods
        for goal in (
            Goal(text=f"{m}: seconds", measured=median(found, f"combine {m}"), limit=5),
            Goal(text=f"{m}: peak MB", measured=peak(found, f"combine {m}"), limit=600),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("shrink", "extract", "combine"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--factors", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workdir", type=Path, help="where the files go; they are removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adaptertool-bench-", dir=options.workdir) as name:
        work = {"shrink": shrink, "extract": extract, "combine": combine}[options.what]
        runs, goals = work(Path(name), options.runs, options.factors)
        facts = interleave.machine_facts(Path(name))
    summaries = interleave.summarise(runs, START)
    print(interleave.markdown(summaries))
    print(goal_table(goals))
    results = RESULTS / f"algebra-{options.what}.json"
    interleave.write_results(results, f"algebra: {options.what}", runs, summaries, facts)
    with results.with_suffix(".md").open("a", encoding="utf-8") as file:
        file.write(f"\n{goal_table(goals)}\n")
    print(f"written: {results}")


if __name__ == "__main__":
    main()
