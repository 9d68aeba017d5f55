"""Time and memory of merging by other methods, against merging a LoRA of the same targets.

    python benchmarks/methods.py --shape 1.1b --runs 5
    python benchmarks/methods.py --shape 7b --runs 3 --method dora

Each method has an adapter of its own for all linear layers of one synthetic base, of rank 16 where it has a
rank, and the merges run in turn as whole processes with ``--check-base full``. Promised: DoRA takes at most
1.6 times as long as LoRA on 7B. The work folder is removed at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import interleave
import synthetic
from merge import Goal, Place, adaptertool, check_output, goal_table, prepare

RESULTS = Path(__file__).resolve().parent / "results"
RANK = 16
PREFIX = "base_model.model.model.layers"


def _lokr(rows: int, columns: int) -> synthetic.Layout:
    """Factors near the square root of each side, as PEFT chooses them."""
    (a, b), (c, d) = (_near_root(size) for size in (rows, columns))
    return {"lokr_w1": (a, c), "lokr_w2_a": (b, RANK), "lokr_w2_b": (RANK, d)}


def _near_root(size: int) -> tuple[int, int]:
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


METHODS: dict[str, tuple[dict[str, object], Callable[[int, int], synthetic.Layout]]] = {
    "dora": (
        {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "use_dora": True},
        lambda rows, columns: {
            "lora_A.weight": (RANK, columns),
            "lora_B.weight": (rows, RANK),
            "lora_magnitude_vector": (rows,),
        },
    ),
    "ia3": (
        {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
        lambda rows, _: {"ia3_l": (rows, 1)},
    ),
    "adalora": (
        {"peft_type": "ADALORA", "init_r": RANK, "target_r": 8, "lora_alpha": 2 * RANK, "total_step": 100},
        lambda rows, columns: {"lora_A": (RANK, columns), "lora_B": (rows, RANK), "lora_E": (RANK, 1)},
    ),
    "loha": (
        {"peft_type": "LOHA", "r": RANK, "alpha": RANK},
        lambda rows, columns: {
            "hada_w1_a": (rows, RANK),
            "hada_w1_b": (RANK, columns),
            "hada_w2_a": (rows, RANK),
            "hada_w2_b": (RANK, columns),
        },
    ),
    "lokr": ({"peft_type": "LOKR", "r": RANK, "alpha": RANK}, _lokr),
    "hira": (
        {"peft_type": "HIRA", "r": RANK},
        lambda rows, columns: {"hira_A": (RANK, columns), "hira_B": (rows, RANK)},
    ),
}


def make_adapter(method: str, shape_name: str, folder: Path, factors: str) -> None:
    """Writes the adapter of one method, every tensor of random numbers."""
    config, factors_of = METHODS[method]
    shape = synthetic.SHAPES[shape_name]
    layers = synthetic.linear_layers(shape)
    tensors: synthetic.Layout = {}
    for layer in range(shape.layers):
        for path, (rows, columns) in layers.items():
            own = factors_of(rows, columns)
            if method == "ia3" and path == "mlp.down_proj":
                own = {"ia3_l": (1, columns)}
            tensors |= {f"{PREFIX}.{layer}.{path}.{name}": size for name, size in own.items()}
    folder.mkdir(parents=True)
    pool = synthetic.Pool(synthetic.FACTOR_STD, factors)
    synthetic.write_safetensors(
        folder / "adapter_model.safetensors", dict(sorted(tensors.items())), factors, pool
    )
    targets = [path.rpartition(".")[2] for path in layers]
    common = {"base_model_name_or_path": None, "task_type": "CAUSAL_LM", "target_modules": targets}
    text = json.dumps({**common, **config}, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def run(options: argparse.Namespace, workdir: Path) -> None:
    lora = prepare(options.shape, options.factors, workdir, manifest=True)
    places = {"lora": lora}
    for method in options.method or METHODS:
        folder = workdir / f"adapter-{options.shape}-{options.factors}-{method}"
        if not folder.exists():
            make_adapter(method, options.shape, folder, options.factors)
            subprocess.run([adaptertool(), "init", str(folder), "--base", str(lora.base)], check=True)
        places[method] = Place(base=lora.base, adapter=folder, out=lora.out)
    merge = [adaptertool(), "merge"]
    commands = {
        method: [*merge, str(place.base), str(place.adapter), str(place.out), "--check-base", "full"]
        for method, place in places.items()
    }
    title = f"merge {options.shape} by method, all linear layers, factors in {options.factors}"
    print(title, flush=True)

    def check(_: str) -> None:
        check_output(lora, "merge")

    measured = interleave.interleave(
        commands,
        options.runs,
        inputs=[lora.base, *(place.adapter for place in places.values())],
        outputs=[lora.out],
        cache="warm",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=check,
    )
    summaries = interleave.summarise(measured, "lora")
    print(interleave.markdown(summaries))
    by_name = {item.command: item for item in summaries}
    goals = []
    if "dora" in by_name and options.shape == "7b":
        ratio = by_name["dora"].wall_s[1] / by_name["lora"].wall_s[1]
        goals.append(Goal(text="DoRA / LoRA", measured=ratio, limit=1.6))
        print(goal_table(goals))
    results = RESULTS / f"methods-{options.shape}-{options.factors}.json"
    interleave.write_results(results, title, measured, summaries, interleave.machine_facts(workdir))
    if goals:
        with results.with_suffix(".md").open("a", encoding="utf-8") as file:
            file.write(f"\n{goal_table(goals)}\n")
    print(f"written: {results}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(synthetic.SHAPES), default="1.1b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--method", action="append", choices=sorted(METHODS), help="default: all")
    parser.add_argument("--factors", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workdir", type=Path, help="where the work folder is made")
    parser.add_argument("--keep", action="store_true", help="leave everything in --workdir")
    options = parser.parse_args()
    if options.keep and not options.workdir:
        parser.error("--keep needs --workdir")
    if options.workdir:
        options.workdir.mkdir(parents=True, exist_ok=True)
    if options.keep:
        run(options, options.workdir)
        return
    with tempfile.TemporaryDirectory(prefix="adaptertool-bench-", dir=options.workdir) as name:
        run(options, Path(name))


if __name__ == "__main__":
    sys.exit(main())
