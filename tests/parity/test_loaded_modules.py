"""Which weights a quantising loader quantises: what transformers replaces by layers of bitsandbytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from adapterhub_tools.architectures import lookup
from adapterhub_tools.errors import FormatError
from adapterhub_tools.model.quant_scheme import QuantScheme
from adapterhub_tools.ops.loaded_modules import loaded_modules, skipping
from adapterhub_tools.ops.merge_inputs import fit_all, open_mergeable
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.store.checkpoint import open_checkpoint
from tests.parity.model_types import CAUSAL, CLASSES, small

PECULIAR = ("qwen2_moe", "falcon")
"""Experts are refused; Falcon's own subclass of nn.Linear is quantised by transformers 4 and not by 5."""
TYPES = [name for name in [*CAUSAL.split(), *CLASSES] if name not in PECULIAR and name != "gemma3"]
SKIPS = {
    "the loader's choice": None,
    "nothing": [],
    "a start": ["model.layers.1", "transformer.h.1", "lm_head"],
    "an end": ["q_proj", "wo", "_proj"],
    "an expression": [r".*\.(0|1)\..*(query|q_proj|fc1|c_attn)", "(model|transformer)", "encoder.layer."],
}


def quantised_by_transformers(model: Any, skip: list[str] | None) -> set[str]:
    """The paths that are layers of bitsandbytes afterwards; the model is changed."""
    config = BitsAndBytesConfig(load_in_4bit=True)
    listed = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, listed, config)
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def adapt_one_layer(model: Any, folder: Path) -> None:
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "." in n]
    config = LoraConfig(r=2, target_modules=rf"{re.escape(layers[0])}")
    get_peft_model(model, config).save_pretrained(folder)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_rule_is_that_of_transformers(model_type: str, tmp_path: Path) -> None:
    small(model_type).save_pretrained(tmp_path / "base")
    adapt_one_layer(small(model_type), tmp_path / "adapter")
    checkpoint = open_checkpoint(tmp_path / "base")
    opened = [open_mergeable(tmp_path / "adapter", MergeOptions())]
    parts = fit_all(opened, [tmp_path / "adapter"], [1.0], checkpoint)
    architecture = lookup(model_type)
    assert architecture is not None
    for case, skip in SKIPS.items():
        scheme = QuantScheme(format="nf4", block_size=64, skip_modules=None if skip is None else tuple(skip))
        found = loaded_modules(checkpoint, scheme, parts)
        paths = {architecture.in_memory(name).removesuffix(".weight") for name in found.weights}
        expected = quantised_by_transformers(small(model_type), skip)
        stored = {architecture.in_memory(name).removesuffix(".weight") for name in checkpoint.tensors}
        assert paths == expected & stored, case


PATHS = [
    "model.layers.1",
    "model.layers.1.mlp.fc1",
    "model.layers.11.mlp.fc1",
    "lm_head",
    "a.b",
    "fc1",
    "score",
]
PIECES = [
    "model",
    "layers",
    "1",
    "11",
    ".",
    "\\.",
    ".*",
    "|",
    "(",
    ")",
    "fc",
    "fc1",
    "lm_head",
    "[ab]",
    "?",
    "$",
    "b",
]


@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join), max_size=3))
@settings(max_examples=150, deadline=None)
def test_patterns_match_as_those_of_transformers(patterns: list[str]) -> None:
    try:
        for pattern in patterns:
            re.compile(f"(?:{pattern})")
    except re.error:
        with pytest.raises(FormatError) as caught:
            skipping(patterns, PATHS)
        assert caught.value.problems[0].kind == "regex"
        return
    expected = [not should_convert_module(path, patterns) for path in PATHS]
    assert [bool(found) for found in skipping(patterns, PATHS)] == expected
