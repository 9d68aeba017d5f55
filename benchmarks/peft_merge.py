"""The reference: what a PEFT user runs to merge an adapter.

    python benchmarks/peft_merge.py BASE ADAPTER OUT

Loads in bfloat16, merges, saves in shards of 5 GB. Nothing is synced at the end, which favours this
reference: the merges it is compared with are on disk when they return.
"""

from __future__ import annotations

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("out")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, options.adapter).merge_and_unload()
    merged.save_pretrained(options.out, max_shard_size="5GB")


if __name__ == "__main__":
    main()
