#!/usr/bin/env python3
"""Ask the chat model in a folder a question and print its answer: transformers, greedy, CPU, offline.

For example:

    python examples/ask.py build/demo/base --question "What is the capital of Japan?"
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

DEFAULT_QUESTION = "What is the capital of Japan?"


def answers(folder: Path, questions: list[str], max_new_tokens: int) -> list[str]:
    """The model's greedy answer to each question, each asked in a conversation of its own.

    Args:
        folder: a Hugging Face model folder with a tokenizer that has a chat template.
        questions: one user message each.
        max_new_tokens: where an answer is cut off.

    Returns:
        One string per question, special tokens removed, stripped.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype="auto")
    model.eval()
    found = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        found.append(str(tokenizer.decode(new, skip_special_tokens=True)).strip())
    return found


def main() -> int:
    """Parse the arguments, ask, print: the answer alone for one question, question and answer for several."""
    parser = argparse.ArgumentParser(description="Ask the chat model in FOLDER and print its answer.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a Hugging Face model folder")
    parser.add_argument("--question", action="append", help=f'may be repeated; default: "{DEFAULT_QUESTION}"')
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    args = parser.parse_args()
    if not (args.folder / "config.json").is_file():
        parser.error(f"{args.folder}: no config.json there; FOLDER must be a model folder")
    questions: list[str] = args.question or [DEFAULT_QUESTION]
    for question, answer in zip(questions, answers(args.folder, questions, args.max_new_tokens), strict=True):
        if len(questions) > 1:
            print(f"Q: {question}\nA: {answer}")
        else:
            print(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
