"""Small checkpoints that transformers quantises with bitsandbytes on the CPU and saves."""

from __future__ import annotations

import logging as standard_logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "nf4-in-bf16": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"
    ),
    "fp4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float16
    ),
    "fp4-double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
"""How the saved checkpoints are quantised."""


@pytest.fixture(autouse=True)
def quiet_references() -> Iterator[None]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    standard_logging.getLogger("bitsandbytes").setLevel(standard_logging.ERROR)
    with warnings.catch_warnings():
        for module in ("bitsandbytes", "peft", "transformers", "torch"):
            warnings.filterwarnings("ignore", module=module)
        yield


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16; its down projections have rows of two and a half blocks."""
    torch.manual_seed(7)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("plain") / "base"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(plain_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base as transformers saves it after quantising, by name of CONFIGS."""
    root = tmp_path_factory.mktemp("saved")
    for name, config in CONFIGS.items():
        model = LlamaForCausalLM.from_pretrained(plain_base, quantization_config=config)
        model.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="session")
def lora(plain_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that fits the base and every quantised form of it."""
    model = LlamaForCausalLM.from_pretrained(plain_base)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    get_peft_model(model, config).save_pretrained(folder)
    return folder
