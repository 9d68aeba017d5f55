"""Time and memory of ``merge --undo``, ``unmerge`` and ``verify`` against the plain merge.

    python benchmarks/verify.py --shape 7b --runs 5

Commands, run in turn as whole processes. First, with base and adapter in the page cache:

    merge            adaptertool merge BASE ADAPTER OUT: the reference of all ratios
    merge --undo     the same, and what brings the base back

Then, with a merged model that the checks read in the page cache too (as far as it fits):

    merge            as above
    unmerge          adaptertool unmerge MERGED OUT --adapter ADAPTER
    verify rows      adaptertool verify BASE ADAPTER MERGED: 1 % of the rows exactly, probes on all
    verify full      the same with --sample full
    verify receipt   adaptertool verify MERGED --receipt: digests alone

Then, in this process and by turns, the content digest of the base is compared with what the blake3 library
reaches on the raw files with the same number of threads (b3sum is that library), all in the page cache.

7B takes about 41 GB of disk in the work folder while it runs; all of it is removed at the end unless --keep
is given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

import interleave
from merge import Goal, adaptertool, prepare, weight_bytes

REFERENCE, UNDO, UNMERGE = "merge", "merge --undo", "unmerge"
ROWS, FULL, RECEIPT = "verify rows", "verify full", "verify receipt"
LIMITS = {UNDO: 1.7, ROWS: 1.5, FULL: 3.0}
PEAK_MB = 500.0
HASH_SHARE = 0.85


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("tiny", "1.1b", "7b", "70b-slice"), default="1.1b")
    parser.add_argument("--factors", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("undo", "verify"), help="one of the two groups")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep base and adapter for the next run")
    parser.add_argument("--results", type=Path, help="JSON file; NAME-undo and NAME-verify are written")
    options = parser.parse_args()
    workdir = options.workdir or Path(tempfile.mkdtemp(prefix="bench-verify-"))
    workdir.mkdir(parents=True, exist_ok=True)
    merged = workdir / "merged"
    measured: dict[str, list[interleave.Run]] = {}
    rates: tuple[float, float] | None = None
    try:
        place = prepare(options.shape, options.factors, workdir, manifest=False)
        interleave.remove([merged])
        tool, base, adapter = adaptertool(), str(place.base), str(place.adapter)
        out, check = str(place.out), [tool, "verify", base, adapter, str(merged)]
        threads = ["--threads", str(options.threads)] if options.threads else []
        merges = {
            REFERENCE: [tool, "merge", base, adapter, out, *threads],
            UNDO: [tool, "merge", base, adapter, out, "--undo", *threads],
        }
        checks = {
            REFERENCE: merges[REFERENCE],
            UNMERGE: [tool, "unmerge", str(merged), out, "--adapter", adapter, *threads],
            ROWS: [*check, *threads],
            FULL: [*check, "--sample", "full", *threads],
            RECEIPT: [tool, "verify", str(merged), "--receipt", *threads],
        }
        inputs = [place.base, place.adapter]
        if options.only != "verify":
            measured["undo"] = interleave.interleave(merges, options.runs, inputs=inputs, outputs=[place.out])
        if options.only != "undo":
            subprocess.run([tool, "merge", base, adapter, str(merged), "--undo", "-q"], check=True)
            size = (merged / "merge.undo").stat().st_size
            print(f"undo file: {size:,} bytes, {size / weight_bytes(place.base):.2%} of the base")
            inputs.append(merged)
            measured["verify"] = interleave.interleave(
                checks, options.runs, inputs=inputs, outputs=[place.out]
            )
            rates = hash_rates(place.base, options.threads or len(os.sched_getaffinity(0)), options.runs)
    finally:
        interleave.remove([merged])
        if not options.keep and options.workdir is None:
            interleave.remove([workdir])
    found = []
    for name, runs in measured.items():
        summaries = interleave.summarise(runs, REFERENCE)
        print(interleave.markdown(summaries))
        found += goals(summaries)
        if options.results:
            facts = interleave.machine_facts(Path.cwd())
            results = options.results.with_stem(f"{options.results.stem}-{name}")
            interleave.write_results(results, f"{name}, {options.shape}", runs, summaries, facts)
    if rates:
        print(f"hashing: {rates[0] / 1e9:.2f} GB/s, the library on the raw files {rates[1] / 1e9:.2f} GB/s")
        text = "hashing / blake3 on the raw files"
        found.append(Goal(text=text, measured=rates[0] / rates[1], limit=HASH_SHARE, at_least=True))
    for goal in found:
        print(f"{'met ' if goal.met else 'MISSED'}  {goal.text}: {goal.measured:.2f}, limit {goal.limit:.2f}")


def hash_rates(base: Path, threads: int, runs: int) -> tuple[float, float]:
    """Bytes a second of the content digest, and of the blake3 library on the raw files: the best ones."""
    from blake3 import blake3

    from adapterhub_tools.store.checkpoint import open_checkpoint
    from adapterhub_tools.store.digest import digest_checkpoint

    checkpoint = open_checkpoint(base)
    paths = sorted(base.glob("*.safetensors"))
    sizes = weight_bytes(base), sum(path.stat().st_size for path in paths)
    best = [float("inf"), float("inf")]
    for _ in range(max(3, runs)):
        begin = time.perf_counter()
        digest_checkpoint(checkpoint, threads=threads)
        middle = time.perf_counter()
        for path in paths:
            blake3(max_threads=threads).update_mmap(path).digest()
        best = [min(best[0], middle - begin), min(best[1], time.perf_counter() - middle)]
    return sizes[0] / best[0], sizes[1] / best[1]


def goals(summaries: list[interleave.Summary]) -> list[Goal]:
    """The promised figures."""
    found = [
        Goal(text=f"{item.command} / merge", measured=item.median_of_ratios, limit=LIMITS[item.command])
        for item in summaries
        if item.command in LIMITS
    ]
    return found + [
        Goal(text=f"peak RSS of {item.command}, MB", measured=item.peak_rss_bytes[2] / 1e6, limit=PEAK_MB)
        for item in summaries
        if item.command in (UNDO, UNMERGE, ROWS, FULL)
    ]


if __name__ == "__main__":
    main()
