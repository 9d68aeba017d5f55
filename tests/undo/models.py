"""Small bases and LoRA adapters of any dtype and delta, tied or not, with full tensors and more rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, LAYERS = 24, 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def make_base(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    hidden: int = 32,
    seed: int = 0,
    shards: int = 1,
    tied: bool = False,
    specials: bool = False,
) -> Path:
    """Writes a Llama-like base; ``specials`` adds zeros of both signs, subnormal and large values."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator) * 0.05
        if specials:
            flat = values.view(-1)
            few = torch.tensor([0.0, -0.0, 1e-7, -6e-8, 3.0, 1000.0])
            flat[: len(few)] = few
        return values.to(DTYPES[dtype])

    tensors = {"model.embed_tokens.weight": random(VOCAB, hidden), "model.norm.weight": random(hidden)}
    if not tied:
        tensors["lm_head.weight"] = random(VOCAB, hidden)
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        for name, rows in (("q_proj", hidden), ("k_proj", hidden // 2), ("v_proj", hidden // 2)):
            tensors[f"{stem}.self_attn.{name}.weight"] = random(rows, hidden)
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    placed = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        save_file({n: tensors[n] for n in names if placed[n] == file}, folder / file, {"format": "pt"})
    if shards > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    (folder / "generation_config.json").write_bytes(b"{}")
    return folder


def make_adapter(
    folder: Path,
    *,
    delta: float = 0.05,
    hidden: int = 32,
    rank: int = 4,
    seed: int = 1,
    dtype: str = "float32",
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    head: bool = False,
    saved: dict[str, Tensor] | None = None,
    **config: object,
) -> Path:
    """Writes a LoRA adapter whose delta has about ``delta`` times the size of the base's weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def add(path: str, rows: int) -> None:
        A = torch.randn(rank, hidden, generator=generator)
        B = torch.randn(rows, rank, generator=generator) * (0.05 * delta / rank**0.5 / 2)
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.to(DTYPES[dtype])
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.to(DTYPES[dtype])

    for layer in range(LAYERS):
        for name in targets:
            add(f"model.layers.{layer}.self_attn.{name}", hidden if name == "q_proj" else hidden // 2)
    if head:
        add("lm_head", VOCAB)
    for name, tensor in (saved or {}).items():
        tensors[f"base_model.model.{name}.weight"] = tensor
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": "example/tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": [*targets, *(["lm_head"] if head else [])],
        "modules_to_save": sorted(name.rpartition(".")[2] for name in saved) if saved else None,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def files_of(folder: Path) -> dict[str, str]:
    """Returns path -> SHA-256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
