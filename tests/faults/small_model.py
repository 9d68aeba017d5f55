"""A small base in shards with an index and side files, and a LoRA adapter for it, the same at every call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = 2
VOCABULARY = 24
TARGETS = ("q_proj", "v_proj")
SIDE_FILES = {
    "generation_config.json": b'{"eos_token_id": 2}\n',
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}\n',
    "tokenizer_config.json": b'{"model_max_length": 64}\n',
    "LICENSE": b"Do as you like.\n",
}
LEFT_BEHIND = {"README.md": b"# A base\n"}


def make_base(folder: Path, *, hidden: int = 32, shards: int = 3, dtype: str = "bfloat16") -> Path:
    """Writes a base; the tensors depend on ``hidden`` and ``dtype`` alone, not on the shards."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = _base_tensors(hidden, dtype)
    names = sorted(tensors)
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    )
    placed = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if placed[n] == file}, folder / file, {"format": "pt"})
    if shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in {**SIDE_FILES, **LEFT_BEHIND}.items():
        (folder / name).write_bytes(content)
    return folder


def make_adapter(folder: Path, *, hidden: int = 32, seed: int = 1, rank: int = 4) -> Path:
    """Writes a LoRA adapter with factors in bfloat16; another seed gives other factors."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(LAYERS):
        for target in TARGETS:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            for role, shape in (("A", (rank, hidden)), ("B", (hidden, rank))):
                values = torch.randn(shape, generator=generator) / 4
                factors[f"{prefix}.lora_{role}.weight"] = values.to(torch.bfloat16)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "example/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def _base_tensors(hidden: int, dtype: str) -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    for layer in range(LAYERS):
        for name in (*TARGETS, "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (hidden, hidden)
    return {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for name, shape in sorted(shapes.items())
    }
