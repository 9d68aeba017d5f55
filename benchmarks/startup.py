"""How long the commands take that people wait for at a prompt.

    python benchmarks/startup.py --runs 20

Goals: ``adaptertool --help`` within 150 ms and ``adaptertool inspect`` of a 7B adapter within 300 ms,
medians. The reference is an interpreter that does nothing. The adapter is synthetic (r = 16 on all linear
layers, 160 MB, removed at the end) and is inspected as PEFT leaves it, and again with the manifest that
``adaptertool init`` writes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import interleave
from merge import HERE, RESULTS, Goal, adaptertool, goal_table

REFERENCE, HELP, PLAIN, MANIFEST = "python -c pass", "--help", "inspect (PEFT)", "inspect (manifest)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    command = adaptertool()
    with tempfile.TemporaryDirectory(prefix="adaptertool-bench-") as folder:
        plain, manifest = Path(folder, "plain"), Path(folder, "manifest")
        subprocess.run([sys.executable, str(HERE / "synthetic.py"), "adapter", "7b", str(plain)], check=True)
        shutil.copytree(plain, manifest)
        subprocess.run([command, "init", str(manifest)], check=True)
        runs = interleave.interleave(
            {
                REFERENCE: [sys.executable, "-c", "pass"],
                HELP: [command, "--help"],
                PLAIN: [command, "inspect", str(plain)],
                MANIFEST: [command, "inspect", str(manifest)],
            },
            options.runs,
            settle=False,
            cache="as-is",
        )
        facts = interleave.machine_facts(Path(folder))
    summaries = interleave.summarise(runs, REFERENCE)
    limits_ms = {HELP: 150.0, PLAIN: 300.0, MANIFEST: 300.0}
    goals = [
        Goal(
            text=f"adaptertool {item.command}, ms",
            measured=item.wall_s[1] * 1000,
            limit=limits_ms[item.command],
        )
        for item in summaries
        if item.command in limits_ms
    ]
    print(interleave.markdown(summaries))
    print(goal_table(goals))
    results = RESULTS / "startup.json"
    interleave.write_results(results, "start-up", runs, summaries, facts)
    with results.with_suffix(".md").open("a", encoding="utf-8") as file:
        file.write(f"\n{goal_table(goals)}\n")
    print(f"written: {results}")


if __name__ == "__main__":
    main()
