"""The order in which models register their modules, rebuilt from names, against transformers."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from adapterhub_tools.ops.peft_order import module_order

TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "bert", "roberta", "opt"),
    *("t5", "gpt_neox", "falcon", "phi", "gptj", "gpt_neo", "bart", "whisper", "distilbert", "electra"),
)


@pytest.mark.parametrize("model_type", TYPES)
def test_names_tell_the_order(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    kinds = (nn.Linear, nn.Embedding)
    paths = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, kinds) or type(module).__name__ == "Conv1D")
        and not name.endswith(("position_embeddings", "token_type_embeddings"))  # nobody targets these
    ]
    assert len(paths) > 10
    shuffled = random.Random(1).sample(paths, len(paths))
    assert module_order(shuffled, model_type) == paths
