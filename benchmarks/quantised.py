"""Time and memory of merging onto a quantised base, against the plain merge of the same shape.

    python benchmarks/quantised.py --shape 1.1b --runs 5
    python benchmarks/quantised.py --shape 7b --runs 3

The base is the synthetic one of benchmarks/synthetic.py in bfloat16, and the same quantised to NF4 with
double quantisation, as bitsandbytes quantises it. The merges run in turn as whole processes with
``--check-base full``: plain; from stored NF4 to bfloat16; from bfloat16 with ``--quant``, which quantises
while it reads; back into NF4; and DoRA on both bases. Ratios are given of whole times, and per byte of
weights written. Promised for 7B: NF4 to bfloat16 within 1.5 per byte, NF4 to NF4 within 4 (whole times: it
writes a quarter of the bytes), and 600 MB at most. The work folder is removed at the end unless --keep is
given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import interleave
import synthetic
from merge import Goal, Place, adaptertool, goal_table, prepare, weight_bytes
from methods import make_adapter

RESULTS = Path(__file__).resolve().parent / "results"
PLAIN, STORED, LOADED, PACKED = "plain", "nf4 to bf16", "bf16 quantised to bf16", "nf4 to nf4"
DORA, DORA_STORED = "dora, plain", "dora, nf4 to bf16"
PEAK_BYTES = 600e6


def quantise_base(base: Path, out: Path, shape: synthetic.Shape) -> None:
    """Writes a base again with its linear layers in NF4, shard by shard."""
    import torch
    from safetensors.torch import load_file, save_file

    from adapterhub_tools import registry
    from adapterhub_tools.model.quant_scheme import QuantScheme

    codec = registry.load("quant", "nf4").IMPLEMENTATION
    scheme = QuantScheme.parse("nf4,double")
    linear = tuple(synthetic.linear_layers(shape))
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for file in sorted(base.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in load_file(file).items():
            if not name.removesuffix(".weight").endswith(linear):
                tensors[name] = weight
                continue
            encoder = codec.encoder(scheme, tuple(weight.shape), weight.dtype)
            data = encoder.add(weight)
            rest, parts = encoder.finish()
            parts["data"] = torch.cat([data, rest])
            for role, spec in encoder.part_specs(name).items():
                tensors[spec.name] = parts[role].reshape(spec.shape)
        save_file(tensors, out / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    if (base / "model.safetensors.index.json").exists():
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def prepare_all(options: argparse.Namespace, workdir: Path) -> dict[str, Place]:
    """Makes both bases, and each adapter once for each base, with the digest of the base in its manifest."""
    plain = prepare(options.shape, options.factors, workdir, manifest=True)
    quantised = workdir / f"base-{options.shape}-nf4"
    if not quantised.with_name(quantised.name + ".complete").exists():
        interleave.remove([quantised])
        # In a process of its own: what this one has held would count as the memory of its children.
        make = [
            sys.executable,
            __file__,
            "--shape",
            options.shape,
            "--quantise",
            str(plain.base),
            str(quantised),
        ]
        subprocess.run(make, check=True)
        quantised.with_name(quantised.name + ".complete").touch()
    dora = workdir / f"adapter-{options.shape}-{options.factors}-dora"
    if not dora.exists():
        make_adapter("dora", options.shape, dora, options.factors)
        subprocess.run([adaptertool(), "init", str(dora), "--base", str(plain.base)], check=True)
    places = {PLAIN: plain, DORA: Place(base=plain.base, adapter=dora, out=plain.out)}
    for name, place in ((STORED, plain), (DORA_STORED, places[DORA])):
        adapter = place.adapter.with_name(f"{place.adapter.name}-nf4")
        if not adapter.exists():
            shutil.copytree(place.adapter, adapter)
            (adapter / "adapter_manifest.json").unlink()
            subprocess.run([adaptertool(), "init", str(adapter), "--base", str(quantised)], check=True)
        places[name] = Place(base=quantised, adapter=adapter, out=place.out)
    return places | {LOADED: plain, PACKED: places[STORED]}


def run(options: argparse.Namespace, workdir: Path) -> None:
    places = prepare_all(options, workdir)
    extra = {
        PLAIN: ["--onto", "original"],
        STORED: ["--onto", "dequantized"],
        LOADED: ["--onto", "dequantized", "--quant", "nf4,double", "--compute-dtype", "bf16"],
        PACKED: ["--onto", "quantized", "--allow-loss"],
        DORA: ["--onto", "original"],
        DORA_STORED: ["--onto", "dequantized"],
    }
    wanted = [name for name in extra if name == PLAIN or not options.only or name in options.only]
    commands = {
        name: [
            adaptertool(),
            "merge",
            *map(str, (places[name].base, places[name].adapter, places[name].out)),
            "--check-base",
            "full",
            *extra[name],
        ]
        for name in wanted
    }
    title = f"merge {options.shape} onto quantised bases, LoRA and DoRA, factors in {options.factors}"
    print(title, flush=True)
    written: dict[str, int] = {}

    def check(name: str) -> None:
        written[name] = weight_bytes(places[name].out)
        if not (places[name].out / "merge_receipt.json").exists():
            raise SystemExit(f"{name}: no merge_receipt.json")

    measured = interleave.interleave(
        commands,
        options.runs,
        inputs=sorted({p for name in wanted for p in (places[name].base, places[name].adapter)}),
        outputs=[places[PLAIN].out],
        cache="warm",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=check,
    )
    summaries = interleave.summarise(measured, PLAIN)
    by_name = {item.command: item for item in summaries}
    per_byte = {name: by_name[name].wall_s[1] / written[name] for name in wanted}
    lines = ["| merge | bytes written | wall / plain | per byte written / plain |", "|---|---|---|---|"]
    for name in wanted:
        wall = by_name[name].wall_s[1] / by_name[PLAIN].wall_s[1]
        lines.append(f"| {name} | {written[name]:,} | {wall:.2f} | {per_byte[name] / per_byte[PLAIN]:.2f} |")
    limits = ((STORED, PLAIN, 1.5), (LOADED, PLAIN, 1.5), (DORA_STORED, DORA, 1.5))
    goals = [
        Goal(
            text=f"{name} / {reference}, per byte written",
            measured=per_byte[name] / per_byte[reference],
            limit=limit,
        )
        for name, reference, limit in limits
        if name in per_byte and reference in per_byte
    ]
    if PACKED in per_byte:
        ratio = by_name[PACKED].wall_s[1] / by_name[PLAIN].wall_s[1]
        goals.append(Goal(text=f"{PACKED} / {PLAIN}, whole", measured=ratio, limit=4.0))
    peak = max(by_name[name].peak_rss_bytes[2] for name in wanted) / 1e6
    goals.append(Goal(text="peak RSS, MB (largest run)", measured=peak, limit=PEAK_BYTES / 1e6))
    tables = "\n".join(["", *lines, "", goal_table(goals)])
    print(interleave.markdown(summaries), tables, sep="\n")
    results = RESULTS / f"quantised-{options.shape}-{options.factors}.json"
    interleave.write_results(results, title, measured, summaries, interleave.machine_facts(workdir))
    with results.with_suffix(".md").open("a", encoding="utf-8") as file:
        file.write(f"{tables}\n")
    print(f"written: {results}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(synthetic.SHAPES), default="1.1b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--only",
        action="append",
        choices=(STORED, LOADED, PACKED, DORA, DORA_STORED),
        help="beside the plain merge; default: all",
    )
    parser.add_argument("--factors", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workdir", type=Path, help="where the work folder is made")
    parser.add_argument(
        "--quantise", type=Path, nargs=2, metavar=("BASE", "OUT"), help="only write BASE in NF4"
    )
    parser.add_argument("--keep", action="store_true", help="leave everything in --workdir")
    options = parser.parse_args()
    if options.quantise:
        quantise_base(*options.quantise, synthetic.SHAPES[options.shape])
        return
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
