"""Time and memory of ``adaptertool merge`` against copying the base, and against PEFT.

    python benchmarks/merge.py --shape 1.1b --runs 7
    python benchmarks/merge.py --shape 7b --runs 5 --with-peft

Commands, run in turn as whole processes:

    cp + sync      cp -r BASE OUT && sync: the base copied durably, and the reference of all ratios
    merge          adaptertool merge BASE ADAPTER OUT --check-base full: digests of the base checked,
                   digests of the output recorded, everything synced
    peft           peft_merge.py: load, merge_and_unload, save_pretrained; not synced (--with-peft)
    import torch   python -c "import torch": the part of a merge that does not depend on the base

7B takes about 27 GB of disk in the work folder while it runs; everything made there is removed at the end
unless --keep is given, and a kept base is used again by the next run with the same --workdir.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import interleave

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
COPY, MERGE, PEFT, IMPORT = "cp + sync", "merge", "peft", "import torch"
PEAK_BYTES = 450_000_000
WEIGHT_BYTES = {"tiny": 2e5, "1.1b": 2.21e9, "7b": 13.5e9, "70b-slice": 14.8e9}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One figure that the project promises."""

    text: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folders of one benchmark."""

    base: Path
    adapter: Path
    out: Path


def prepare(shape: str, factors: str, workdir: Path, *, manifest: bool) -> Place:
    """Make base and adapter, unless a complete one is there, and give the adapter its manifest."""
    place = Place(
        base=workdir / f"base-{shape}", adapter=workdir / f"adapter-{shape}-{factors}", out=workdir / "out"
    )
    synthetic = [sys.executable, str(HERE / "synthetic.py")]
    for kind, folder, extra in (
        ("base", place.base, []),
        ("adapter", place.adapter, ["--factors", factors, "--base-id", str(place.base)]),
    ):
        complete = folder.with_name(folder.name + ".complete")
        if complete.exists():
            continue
        interleave.remove([folder])
        subprocess.run([*synthetic, kind, shape, str(folder), *extra], check=True)
        complete.touch()
    if manifest and not (place.adapter / "adapter_manifest.json").exists():
        subprocess.run([adaptertool(), "init", str(place.adapter), "--base", str(place.base)], check=True)
    return place


def adaptertool() -> str:
    """The command installed beside this interpreter."""
    path = Path(sys.executable).with_name("adaptertool")
    if not path.exists():
        raise SystemExit(f"{path} does not exist: install the package into this environment first")
    return str(path)


def commands(place: Place, names: Sequence[str], merge_options: Sequence[str]) -> dict[str, list[str]]:
    base, adapter, out = str(place.base), str(place.adapter), str(place.out)
    known = {
        COPY: ["sh", "-c", 'cp -r "$0" "$1" && sync', base, out],
        MERGE: ["adaptertool", "merge", base, adapter, out, "--check-base", "full", *merge_options],
        PEFT: [sys.executable, str(HERE / "peft_merge.py"), base, adapter, out],
        IMPORT: [sys.executable, "-c", "import torch"],
    }
    if MERGE in names:
        known[MERGE][0] = adaptertool()
    return {name: known[name] for name in known if name in names}


def check_output(place: Place, command: str) -> None:
    """A run only counts if it left what it should leave."""
    if command == IMPORT:
        return
    expected = weight_bytes(place.base)
    found = weight_bytes(place.out)
    if found != expected:
        raise SystemExit(f"{command}: {found:,} bytes of weights in {place.out}, expected {expected:,}")
    if command == MERGE and not (place.out / "merge_receipt.json").exists():
        raise SystemExit(f"{command}: no merge_receipt.json in {place.out}")


def weight_bytes(folder: Path) -> int:
    """Bytes of tensor data in the safetensors files of a folder, headers not counted."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def goals(shape: str, summaries: Sequence[interleave.Summary]) -> list[Goal]:
    """The promised figures that these commands allow to compute."""
    by_name = {item.command: item for item in summaries}
    if MERGE not in by_name:
        return []
    merge = by_name[MERGE]
    found = [
        Goal(
            text="peak RSS of merge, MB (largest run)",
            measured=merge.peak_rss_bytes[2] / 1e6,
            limit=PEAK_BYTES / 1e6,
        )
    ]
    if COPY in by_name:
        copy_s = by_name[COPY].wall_s[1]
        if shape in ("7b", "70b-slice"):
            found.append(Goal(text="merge / (cp + sync)", measured=merge.wall_s[1] / copy_s, limit=0.8))
        elif IMPORT in by_name:
            ratio = (merge.wall_s[1] - by_name[IMPORT].wall_s[1]) / copy_s
            found.append(Goal(text="(merge − import torch) / (cp + sync)", measured=ratio, limit=1.6))
    if PEFT in by_name:
        ratio = by_name[PEFT].wall_s[1] / merge.wall_s[1]
        found.append(Goal(text="peft / merge", measured=ratio, limit=4.0, at_least=True))
    return found


def goal_table(found: Sequence[Goal]) -> str:
    rows = ["| promised (medians) | measured | limit | met |", "|---|---|---|---|"]
    for goal in found:
        sign = "≥" if goal.at_least else "≤"
        rows.append(
            f"| {goal.text} | {goal.measured:.2f} | {sign} {goal.limit:g} | {'yes' if goal.met else 'no'} |"
        )
    return "\n".join(rows)


def run(options: argparse.Namespace, workdir: Path) -> None:
    needed = WEIGHT_BYTES[options.shape] * 2.2
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise SystemExit(f"{workdir}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed")
    names = [name for name in (COPY, MERGE, PEFT, IMPORT) if name not in options.without]
    if not options.with_peft and PEFT in names:
        names.remove(PEFT)
    if COPY not in names:
        raise SystemExit(f"{COPY!r} is the reference and cannot be left out")
    place = prepare(options.shape, options.factors, workdir, manifest=MERGE in names)
    adapter = f"LoRA r=16 on all linear layers in {options.factors}"
    title = f"merge {options.shape}, {adapter}, {options.cache} cache"
    print(title, flush=True)
    measured = interleave.interleave(
        commands(place, names, options.merge_option),
        options.runs,
        inputs=[place.base, place.adapter],
        outputs=[place.out],
        cache=options.cache,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        check=lambda command: check_output(place, command),
    )
    summaries = interleave.summarise(measured, COPY)
    print(interleave.markdown(summaries))
    found = goals(options.shape, summaries)
    if found:
        print(goal_table(found))
    peft = "-peft" if PEFT in names else ""
    results = RESULTS / f"merge-{options.shape}-{options.factors}-{options.cache}{peft}.json"
    facts = {
        **interleave.machine_facts(workdir),
        "page_cache": options.cache,
        "merge_options": options.merge_option,
    }
    interleave.write_results(results, title, measured, summaries, facts)
    if found:
        with results.with_suffix(".md").open("a", encoding="utf-8") as file:
            file.write(f"\n{goal_table(found)}\n")
    print(f"written: {results}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(WEIGHT_BYTES), default="1.1b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--with-peft", action="store_true", help="also run the PEFT reference")
    parser.add_argument(
        "--factors", choices=("float32", "bfloat16"), default="float32", help="dtype of A and B"
    )
    parser.add_argument(
        "--cache",
        choices=("warm", "cold", "as-is"),
        default="warm",
        help="page cache of the inputs before each run",
    )
    parser.add_argument(
        "--workdir", type=Path, help="where the work folder is made (default: the temporary folder)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave base and adapter in --workdir for another run"
    )
    parser.add_argument(
        "--without", action="append", default=[], choices=(MERGE, IMPORT), help="leave a command out"
    )
    parser.add_argument(
        "--merge-option",
        action="append",
        default=[],
        metavar="=OPTION",
        help="passed on to adaptertool merge",
    )
    options = parser.parse_args()
    if options.keep and not options.workdir:
        parser.error("--keep needs --workdir")
    if options.workdir:
        options.workdir.mkdir(parents=True, exist_ok=True)
    if options.keep:
        run(options, options.workdir)
    else:
        with tempfile.TemporaryDirectory(prefix="adaptertool-bench-", dir=options.workdir) as name:
            run(options, Path(name))


if __name__ == "__main__":
    main()
