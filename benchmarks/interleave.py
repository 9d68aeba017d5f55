"""Run several commands in turn (A B C A B C ...) and compare their medians.

    python benchmarks/interleave.py --runs 5 --remove OUT 'copy=cp -r BASE OUT' 'link=cp -rl BASE OUT'

A figure alone says little on a shared machine; a ratio against a reference that ran a minute earlier says
more. Every command runs as a whole process. Before each timed run, outside the timed part, earlier outputs
are removed, dirty pages are written (``sync``) and the inputs are brought into a stated page-cache state, so
that no command pays or profits for its predecessor. No run is dropped; a command that fails ends the
benchmark.

This module imports neither numpy nor torch: the kernel starts the peak RSS of a child at what its parent
held.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGES = ("adaptertool", "torch", "numpy", "blake3", "safetensors", "peft", "transformers")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One whole process. ``peak_rss_bytes`` is the largest process of its tree."""

    round: int
    command: str
    wall_s: float
    user_s: float
    sys_s: float
    peak_rss_bytes: int
    load_before: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Minimum, median and maximum over the runs of one command, and its ratios to the reference."""

    command: str
    runs: int
    wall_s: tuple[float, float, float]
    user_s: tuple[float, float, float]
    sys_s: tuple[float, float, float]
    peak_rss_bytes: tuple[float, float, float]
    ratio_of_medians: float
    median_of_ratios: float


def measure(argv: Sequence[str], *, name: str, number: int, env: Mapping[str, str] | None = None) -> Run:
    """Run one command to its end; a non-zero exit raises ``SystemExit`` with the end of its output."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(max(0, output.seek(0, os.SEEK_END) - 4000))
            tail = output.read().decode(errors="replace")
            raise SystemExit(f"{name}: exit {process.returncode}: {shlex.join(argv)}\n{tail}")
    return Run(
        round=number,
        command=name,
        wall_s=wall,
        user_s=usage.ru_utime,
        sys_s=usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        load_before=load,
    )


def interleave(
    commands: Mapping[str, Sequence[str]],
    runs: int,
    *,
    inputs: Sequence[Path] = (),
    outputs: Sequence[Path] = (),
    cache: str = "warm",
    settle: bool = True,
    env: Mapping[str, str] | None = None,
    check: Callable[[str], None] | None = None,
) -> list[Run]:
    """Run every command ``runs`` times in turn.

    Args:
        commands: name -> argument list.
        runs: rounds.
        inputs: folders brought into the state ``cache`` before each run.
        outputs: paths removed before each run and at the end.
        cache: "warm" reads the inputs once, "cold" drops their pages, "as-is" leaves them alone.
        settle: sync before each run; only useful where commands write.
        env: environment of the commands; inherited when None.
        check: called with the name of the command after each run, while its output is there.
    """
    measured: list[Run] = []
    try:
        for number in range(1, runs + 1):
            for name, argv in commands.items():
                remove(outputs)
                if settle:
                    os.sync()
                for folder in inputs:
                    prepare_cache(folder, cache)
                run = measure(argv, name=name, number=number, env=env)
                if check:
                    check(name)
                measured.append(run)
                print(
                    f"  round {number}/{runs}  {name:<18} {run.wall_s:8.3f} s  user {run.user_s:7.3f}  "
                    f"sys {run.sys_s:7.3f}  {run.peak_rss_bytes / 1e6:7.0f} MB  load {run.load_before:.1f}",
                    flush=True,
                )
    finally:
        remove(outputs)
    return measured


def remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def prepare_cache(folder: Path, state: str) -> None:
    """Read every file of ``folder`` ("warm"), or drop its clean pages ("cold")."""
    if state == "as-is":
        return
    buffer = memoryview(bytearray(8 << 20))
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb", buffering=0) as file:
            if state == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.readinto(buffer):
                    pass


def summarise(measured: Sequence[Run], reference: str) -> list[Summary]:
    """One summary per command, in order of first run; ratios are of wall time to ``reference``."""
    by_name: dict[str, list[Run]] = {}
    for run in measured:
        by_name.setdefault(run.command, []).append(run)
    walls = {run.round: run.wall_s for run in by_name[reference]}
    middle = statistics.median(walls.values())
    return [
        Summary(
            command=name,
            runs=len(group),
            wall_s=_spread([run.wall_s for run in group]),
            user_s=_spread([run.user_s for run in group]),
            sys_s=_spread([run.sys_s for run in group]),
            peak_rss_bytes=_spread([run.peak_rss_bytes for run in group]),
            ratio_of_medians=statistics.median(run.wall_s for run in group) / middle,
            median_of_ratios=statistics.median(run.wall_s / walls[run.round] for run in group),
        )
        for name, group in by_name.items()
    ]


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def markdown(summaries: Sequence[Summary]) -> str:
    """A table: one row per command; spreads are min / median / max."""
    rows = [
        "| command | runs | wall s | user s | sys s | peak MB | ratio of medians | median ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in summaries:
        times = " | ".join(
            " / ".join(_digits(value) for value in spread)
            for spread in (item.wall_s, item.user_s, item.sys_s)
        )
        rows.append(
            f"| {item.command} | {item.runs} | {times} | {item.peak_rss_bytes[2] / 1e6:.0f} "
            f"| {item.ratio_of_medians:.2f} | {item.median_of_ratios:.2f} |"
        )
    return "\n".join(rows)


def _digits(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 1 else f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def machine_facts(workdir: Path) -> dict[str, object]:
    """What a reader has to know to compare: processor, memory, kernel, file system, versions."""
    facts: dict[str, object] = {
        "cpu": _first_field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "file_system": _file_system(workdir),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    git = shutil.which("git")
    if git:
        argv = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        described = subprocess.run(argv, capture_output=True, text=True, check=False)
        facts["commit"] = described.stdout.strip() or None
    return facts


def _first_field(path: Path, field: str) -> str | None:
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None


def _file_system(path: Path) -> str | None:
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return None
    path = path.resolve()
    best = ("", "")
    for line in mounts.read_text(encoding="utf-8").splitlines():
        _, point, kind, *_ = line.split()
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1] or None


def write_results(
    path: Path, title: str, measured: Sequence[Run], summaries: Sequence[Summary], facts: Mapping[str, object]
) -> None:
    """Write the JSON (every run) and, beside it, the markdown table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "title": title,
        "machine": dict(facts),
        "summaries": [asdict(item) for item in summaries],
        "runs": [asdict(run) for run in measured],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(f"{title}\n\n{markdown(summaries)}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="+", metavar="NAME=COMMAND", help="the first is the reference")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--input", type=Path, action="append", default=[], help="folder to warm or cool")
    parser.add_argument(
        "--remove", type=Path, action="append", default=[], help="output removed before each run"
    )
    parser.add_argument("--cache", choices=("warm", "cold", "as-is"), default="warm")
    parser.add_argument("--results", type=Path, help="JSON file; a .md table is written beside it")
    options = parser.parse_args()
    commands = {
        name: shlex.split(line) for name, _, line in (item.partition("=") for item in options.commands)
    }
    measured = interleave(
        commands, options.runs, inputs=options.input, outputs=options.remove, cache=options.cache
    )
    summaries = summarise(measured, next(iter(commands)))
    print(markdown(summaries))
    if options.results:
        write_results(options.results, "interleave", measured, summaries, machine_facts(Path.cwd()))


if __name__ == "__main__":
    main()
