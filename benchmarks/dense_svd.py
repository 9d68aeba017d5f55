"""The dense reference of the low-rank algebra: what other tools do, on a sample of the same matrices.

    python benchmarks/dense_svd.py adapter ADAPTER RANK
    python benchmarks/dense_svd.py models BASE TUNED RANK

This is our own code, written for the comparison: it forms each ΔW in float32 and calls
``torch.linalg.svd(full_matrices=False)`` with every core, as the dense tools do. One matrix of each shape is
decomposed, and its time counts as often as the shape occurs; reading the files is left out, which favours the
reference. It prints one JSON object: seconds in all, and for each shape the count, the seconds of one matrix,
the relative error of the optimum and the name of the matrix.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open


def adapter_matrices(
    folder: Path,
) -> tuple[Counter[tuple[int, int]], dict[tuple[int, int], torch.Tensor], dict]:
    """Returns how often each shape occurs, and one delta of each."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    counts: Counter[tuple[int, int]] = Counter()
    one: dict[tuple[int, int], torch.Tensor] = {}
    names: dict[tuple[int, int], str] = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if "lora_A" not in name:
                continue
            b_name = name.replace("lora_A", "lora_B")
            shape = (file.get_slice(b_name).get_shape()[0], file.get_slice(name).get_shape()[1])
            counts[shape] += 1
            if shape not in one:
                a, b = file.get_tensor(name).float(), file.get_tensor(b_name).float()
                one[shape], names[shape] = scale * b @ a, name
    return counts, one, names


def model_matrices(
    base: Path, tuned: Path
) -> tuple[Counter[tuple[int, int]], dict[tuple[int, int], torch.Tensor], dict]:
    """Returns the same for the differences of two single-file models, embeddings and head aside."""
    counts: Counter[tuple[int, int]] = Counter()
    one: dict[tuple[int, int], torch.Tensor] = {}
    names: dict[tuple[int, int], str] = {}
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(tuned / "model.safetensors", "pt") as after,
    ):
        for name in before.keys():  # noqa: SIM118 - a file is no mapping
            shape = tuple(before.get_slice(name).get_shape())
            if len(shape) != 2 or "embed" in name or "lm_head" in name:
                continue
            counts[shape] += 1
            if shape not in one:
                one[shape] = after.get_tensor(name).float() - before.get_tensor(name).float()
                names[shape] = name
    return counts, one, names


def main() -> None:
    kind, *paths, rank = sys.argv[1:]
    find = adapter_matrices if kind == "adapter" else model_matrices
    counts, one, names = find(*map(Path, paths))
    rows, total = [], 0.0
    for shape, matrix in one.items():
        start = time.perf_counter()
        _, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        seconds = time.perf_counter() - start
        total += seconds * counts[shape]
        error = float(values[int(rank) :].double().norm() / values.double().norm())
        rows.append(
            {"shape": shape, "count": counts[shape], "seconds": seconds, "error": error, "name": names[shape]}
        )
    print(json.dumps({"seconds": total, "shapes": rows}))


if __name__ == "__main__":
    main()
