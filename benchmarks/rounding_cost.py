"""What correct rounding costs: nanoseconds per weight, against float64 arithmetic with torch's own cast.

    python benchmarks/rounding_cost.py
    python benchmarks/rounding_cost.py --dtype float32 --factors float32 --runs 9

Both sides add s·B·A to W on one thread in blocks of the same size and write the output dtype; the reference
leaves the rounding to torch, which rounds twice and so gets some weights wrong (the number is printed). The
two run in turn, and the ratio is that of the medians. Making the factors ready is outside the timed part, as
it is done once per tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.rounding import BLOCK_ELEMENTS, BlockRounder
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.methods.lora import LoRA

_NAMES = {item.torch_name: name for name, item in FORMATS.items()}


def main() -> None:
    """Measure and print one line, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--dtype", choices=sorted(_NAMES), default="bfloat16", help="of W and of the result")
    parser.add_argument("--factors", choices=sorted(_NAMES), default="bfloat16", help="of B and A")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(options)
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"{options.rows}x{options.columns} {options.dtype}, {options.factors} factors, r={options.rank}, "
        f"one thread, {options.runs} runs each: "
        f"exact {report['exact_ns']:.2f} ns a weight, torch {report['torch_ns']:.2f}, "
        f"ratio {report['ratio']:.2f}; {report['resolved']} weights decided exactly, "
        f"torch's cast got {report['torch_wrong']} wrong"
    )


def measure(options: argparse.Namespace) -> dict[str, float | int | str]:
    """Times both sides in turn; nanoseconds per weight are medians."""
    torch.manual_seed(0)
    of = FORMATS[_NAMES[options.dtype]]
    dtype = getattr(torch, options.dtype)
    factors = getattr(torch, options.factors)
    w = (torch.randn(options.rows, options.columns) * 0.02).to(dtype)
    b = (torch.randn(options.rows, options.rank) * 0.01).to(factors)
    a = (torch.randn(options.rank, options.columns) * 0.02).to(factors)
    method = LoRA(rank=options.rank, alpha=options.alpha)
    term = method.delta({"A": a, "B": b}, Weight(kind="linear", shape=tuple(w.shape)))
    rounder = BlockRounder(DeltaSum([term], options.rows), columns=options.columns, start=of, to=of)
    exact, plain = torch.empty_like(w), torch.empty_like(w)
    left, right, scale = term.left, term.right, float(method.scale)
    height = max(1, BLOCK_ELEMENTS // options.columns)
    wide = torch.empty(height, options.columns, dtype=torch.float64)

    def correctly_rounded() -> None:
        if rounder.round_rows(w, exact, 0) is not None:
            raise SystemExit("a result is not finite: choose a smaller --alpha")

    def reference() -> None:
        for first in range(0, options.rows, height):
            rows = slice(first, min(options.rows, first + height))
            block = wide[: rows.stop - first]
            block.copy_(w[rows])
            block.addmm_(left[rows] * scale, right)
            plain[rows].copy_(block)

    times = [(seconds(correctly_rounded), seconds(reference)) for _ in range(options.runs + 1)][1:]
    weights = options.rows * options.columns
    exact_s, torch_s = (statistics.median(side) for side in zip(*times, strict=True))
    return {
        "exact_ns": exact_s / weights * 1e9,
        "torch_ns": torch_s / weights * 1e9,
        "ratio": exact_s / torch_s,
        "resolved": rounder.resolved // (options.runs + 1),
        "torch_wrong": int((exact != plain).sum()),
        "runs": options.runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}",
        "torch": torch.__version__,
    }


def seconds(run: Callable[[], None]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
