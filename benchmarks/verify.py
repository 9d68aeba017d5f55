"""Time and memory of ``merge --undo``, ``unmerge`` and ``verify`` against the plain merge.

    python benchmarks/verify.py --shape 7b --runs 5

Commands, run in turn as whole processes, after one merge with undo that the checks read:

    merge            adaptertool merge BASE ADAPTER OUT: the reference of all ratios
    merge --undo     the same, and what brings the base back
    unmerge          adaptertool unmerge MERGED OUT --adapter ADAPTER
    verify rows      adaptertool verify BASE ADAPTER MERGED: 1 % of the rows exactly, probes on all
    verify full      the same with --sample full
    verify receipt   adaptertool verify MERGED --receipt: digests alone

7B takes about 41 GB of disk in the work folder while it runs; all of it is removed at the end unless --keep
is given.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import interleave
from merge import Goal, adaptertool, prepare, weight_bytes

REFERENCE, UNDO, UNMERGE = "merge", "merge --undo", "unmerge"
ROWS, FULL, RECEIPT = "verify rows", "verify full", "verify receipt"
LIMITS = {UNDO: 1.7, ROWS: 1.5, FULL: 3.0}
PEAK_MB = 500.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("tiny", "1.1b", "7b", "70b-slice"), default="1.1b")
    parser.add_argument("--factors", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep base and adapter for the next run")
    parser.add_argument("--results", type=Path, help="JSON file; a .md table is written beside it")
    options = parser.parse_args()
    workdir = options.workdir or Path(tempfile.mkdtemp(prefix="bench-verify-"))
    workdir.mkdir(parents=True, exist_ok=True)
    merged = workdir / "merged"
    try:
        place = prepare(options.shape, options.factors, workdir, manifest=False)
        interleave.remove([merged])
        tool, base, adapter = adaptertool(), str(place.base), str(place.adapter)
        subprocess.run([tool, "merge", base, adapter, str(merged), "--undo", "-q"], check=True)
        size = (merged / "merge.undo").stat().st_size
        print(f"undo file: {size:,} bytes, {size / weight_bytes(place.base):.2%} of the base")
        out, check = str(place.out), [tool, "verify", base, adapter, str(merged)]
        commands = {
            REFERENCE: [tool, "merge", base, adapter, out],
            UNDO: [tool, "merge", base, adapter, out, "--undo"],
            UNMERGE: [tool, "unmerge", str(merged), out, "--adapter", adapter],
            ROWS: check,
            FULL: [*check, "--sample", "full"],
            RECEIPT: [tool, "verify", str(merged), "--receipt"],
        }
        if options.threads:
            commands = {name: [*argv, "--threads", str(options.threads)] for name, argv in commands.items()}
        measured = interleave.interleave(
            commands, options.runs, inputs=[place.base, place.adapter, merged], outputs=[place.out]
        )
    finally:
        interleave.remove([merged])
        if not options.keep and options.workdir is None:
            interleave.remove([workdir])
    summaries = interleave.summarise(measured, REFERENCE)
    print(interleave.markdown(summaries))
    for goal in goals(summaries):
        print(f"{'met ' if goal.met else 'MISSED'}  {goal.text}: {goal.measured:.2f}, limit {goal.limit:.2f}")
    if options.results:
        facts = interleave.machine_facts(Path.cwd())
        interleave.write_results(options.results, f"verify, {options.shape}", measured, summaries, facts)


def goals(summaries: list[interleave.Summary]) -> list[Goal]:
    """The promised figures."""
    by_name = {item.command: item for item in summaries}
    found = [
        Goal(text=f"{name} / merge", measured=by_name[name].median_of_ratios, limit=limit)
        for name, limit in LIMITS.items()
    ]
    return found + [
        Goal(text=f"peak RSS of {name}, MB", measured=by_name[name].peak_rss_bytes[2] / 1e6, limit=PEAK_MB)
        for name in (UNDO, UNMERGE, ROWS, FULL)
    ]


if __name__ == "__main__":
    main()
