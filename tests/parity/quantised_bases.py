"""Tiny bases that bitsandbytes quantises while they are loaded, and adapters that PEFT trains on them."""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from tests.parity.models import perturb_trainable

IDS = torch.arange(24)[None] * 2


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """How a base is quantised: by the loader's config, and in the words of ``--quant``.

    Attributes:
        words: as ``--quant`` has it.
        config: the loader's arguments without dtypes.
    """

    words: str
    config: dict[str, Any]

    def loader(self, compute: torch.dtype = torch.float32) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(**self.config, bnb_4bit_compute_dtype=compute)


def four_bit(kind: str, *, double: bool) -> Quantised:
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    return Quantised(words=f"{kind},double" if double else kind, config=config)


NF4_DOUBLE = four_bit("nf4", double=True)
SCHEMES = {
    "nf4,double": NF4_DOUBLE,
    "nf4": four_bit("nf4", double=False),
    "fp4": four_bit("fp4", double=False),
    "fp4,double": four_bit("fp4", double=True),
    "int8": Quantised(words="int8", config={"load_in_8bit": True}),
}


def save_plain(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    """Saves a Llama of two layers; the loader quantises all of its matrices but embedding and head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        **{"tie_word_embeddings": False, **changes},
    )
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path, quantised: Quantised | None = None, compute: torch.dtype = torch.float32) -> Any:
    """Loads a folder in the dtype of its config."""
    config = None if quantised is None else quantised.loader(compute)
    extra = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **extra).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # A kernel of some processors computes in bfloat16, whatever the compute dtype.
            module.support_avx512bf16_for_cpu = False
    return model


def adapted(model: Any, config: PeftConfig, folder: Path, *, steps: int = 0, size: float = 0.05) -> PeftModel:
    """Adapts a loaded model, trains it with LoRA+ for some steps or perturbs it, and saves the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, config)
        assert perturb_trainable(peft, 3, size)
        if steps:
            optimiser = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
            for _ in range(steps):
                peft(IDS, labels=IDS).loss.backward()
                optimiser.step()
                optimiser.zero_grad()
        peft.eval().save_pretrained(folder)
    return peft


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits.float()
    return found


def dequantised(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the weights that bitsandbytes quantised as it multiplies with them in a dtype."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy(module.weight.quant_state)
            state.dtype = dtype
            found[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            values = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
            found[f"{name}.weight"] = values.to(dtype)
    return found
