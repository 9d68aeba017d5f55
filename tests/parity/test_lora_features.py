"""Each way that PEFT can configure LoRA: our merge gives PEFT's weights and the adapted model's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import BertForSequenceClassification

from tests.parity import models
from tests.parity.models import Builder
from tests.parity.oracle import Case, check_parity

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPT_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def lora(build: Builder = models.llama, **fields: Any) -> Case:
    """A case that differs from plain LoRA of rank 4 in the fields given."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **fields}
    return Case(build=build, config=lambda: LoraConfig(**fields))


CASES = {
    # kinds of layer
    "linear": lora(target_modules=LINEAR),
    "linear with biases": lora(models.opt, target_modules=OPT_LINEAR),
    "conv1d, fan_in_fan_out true": lora(
        models.gpt2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    ),
    "conv1d, fan_in_fan_out false, which PEFT corrects": lora(
        models.gpt2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=False
    ),
    "linear, fan_in_fan_out true, which PEFT corrects": lora(target_modules=LINEAR, fan_in_fan_out=True),
    "conv2d 3×3": lora(models.convolutions, target_modules=["wide"]),
    "conv2d 1×1": lora(models.convolutions, target_modules=["point"]),
    "conv2d, uneven kernel and stride": lora(models.convolutions, target_modules=["uneven"]),
    "conv1d (nn.Conv1d)": lora(models.convolutions, target_modules=["along"]),
    "conv3d": lora(models.convolutions, target_modules=["deep"]),
    "all convolutions and a linear layer": lora(
        models.convolutions, target_modules=["wide", "point", "uneven", "along", "deep", "head"]
    ),
    "convolution, rank pattern": lora(
        models.convolutions,
        target_modules=["wide", "point"],
        rank_pattern={"point": 2},
        alpha_pattern={"^wide": 3},
    ),
    "convolution, rslora": lora(models.convolutions, target_modules=["wide", "deep"], use_rslora=True),
    "convolution, lora_bias": lora(models.convolutions, target_modules=["wide", "along"], lora_bias=True),
    "resnet": lora(models.resnet, target_modules="convolution|.*\\.convolution|classifier\\.1"),
    "vit with its patch convolution": lora(models.vit, target_modules=["projection", "classifier"]),
    "embedding": lora(target_modules=["embed_tokens"]),
    "embedding, rslora and a pattern": lora(
        target_modules=["embed_tokens", "q_proj"], use_rslora=True, rank_pattern={"embed_tokens": 3}
    ),
    "lm_head": lora(target_modules=["lm_head", "q_proj"]),
    "embedding and lm_head, untied": lora(target_modules=["embed_tokens", "lm_head"]),
    "position embedding": lora(models.gpt2, target_modules=["wpe", "c_attn"], fan_in_fan_out=True),
    "encoder-decoder": lora(models.t5, target_modules=["q", "v", "wi", "wo"]),
    # scaling
    "rslora": lora(use_rslora=True),
    "rslora, rank that is a square": lora(use_rslora=True, r=16),
    "alpha that is not an integer": lora(lora_alpha=3.3),
    "rank 1": lora(r=1, lora_alpha=1),
    "rank above the width": lora(r=40, lora_alpha=40),
    "rank_pattern, end of a path": lora(rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 7}),
    "rank_pattern, regular expression": lora(rank_pattern={r"layers\.\d+\.self_attn\.(q|k)_proj": 3}),
    "rank_pattern, anchored": lora(rank_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 5}),
    "rank_pattern, first of two": lora(rank_pattern={r".*\.0\..*q_proj": 2, "q_proj": 3}),
    "alpha_pattern, anchored and not": lora(alpha_pattern={r"^model\.layers\.0\..*v_proj": 1.5, "q_proj": 9}),
    "both patterns, rslora": lora(
        use_rslora=True, rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 2, r"^q_proj": 99}
    ),
    "patterns that match nothing": lora(rank_pattern={"nothing": 2}, alpha_pattern={"^proj": 2}),
    # which modules
    "targets as full paths": lora(
        target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    ),
    "targets as partial paths": lora(target_modules=["self_attn.q_proj", "0.mlp.up_proj"]),
    "targets as a regular expression": lora(target_modules=r".*\.layers\.[01]\.(self_attn|mlp)\.(q|up)_proj"),
    "all-linear": lora(target_modules="all-linear"),
    "all-linear, conv1d": lora(models.gpt2, target_modules="all-linear"),
    "all-linear, classifier": lora(models.bert_classifier, target_modules="all-linear", task_type="SEQ_CLS"),
    "layers_to_transform, a number": lora(layers_to_transform=1),
    "layers_to_transform, a list": lora(layers_to_transform=[0]),
    "layers_to_transform, layer 0": lora(layers_to_transform=0),
    "layers_to_transform with layers_pattern": lora(layers_to_transform=[1], layers_pattern="layers"),
    "layers_to_transform with two layers_patterns": lora(
        models.gpt2,
        target_modules=["c_attn"],
        layers_to_transform=[1],
        layers_pattern=["layers", "h"],
        fan_in_fan_out=True,
    ),
    "exclude_modules, list": lora(target_modules=LINEAR, exclude_modules=["k_proj", "layers.1.mlp.up_proj"]),
    "exclude_modules, regular expression": lora(target_modules=LINEAR, exclude_modules=r".*\.1\.mlp\..*"),
    "exclude_modules, all-linear": lora(target_modules="all-linear", exclude_modules=["down_proj"]),
    # biases
    "lora_bias": lora(models.opt, target_modules=OPT_LINEAR, lora_bias=True),
    "lora_bias, conv1d": lora(models.gpt2, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True),
    "lora_bias, rslora and patterns": lora(
        models.opt,
        target_modules=["q_proj", "fc1"],
        lora_bias=True,
        use_rslora=True,
        rank_pattern={"fc1": 2},
        alpha_pattern={"q_proj": 5},
    ),
    "bias all": lora(models.opt, bias="all"),
    "bias lora_only": lora(models.opt, bias="lora_only"),
    "bias all, bert": lora(models.bert_classifier, target_modules=["query", "value"], bias="all"),
    "bias all, bert, classifier saved": lora(
        models.bert_classifier, target_modules=["query"], bias="all", task_type="SEQ_CLS"
    ),
    "bias all, conv1d": lora(models.gpt2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    "bias lora_only, convolution": lora(
        models.convolutions, target_modules=["wide", "along"], bias="lora_only"
    ),
    # modules trained whole
    "modules_to_save, lm_head": lora(modules_to_save=["lm_head"]),
    "modules_to_save, embed_tokens": lora(modules_to_save=["embed_tokens"]),
    "modules_to_save, both": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "modules_to_save, a norm": lora(modules_to_save=["input_layernorm"]),
    "modules_to_save, a whole block": lora(modules_to_save=["mlp"]),
    "modules_to_save, classifier of the base": lora(
        models.bert_classifier, target_modules=["query", "value"], modules_to_save=["classifier"]
    ),
    "task type SEQ_CLS": lora(models.bert_classifier, target_modules=["query", "value"], task_type="SEQ_CLS"),
    # initialisations that leave the base as it is
    "gaussian initialisation": lora(init_lora_weights="gaussian"),
    "orthogonal initialisation": lora(init_lora_weights="orthogonal"),
    "random initialisation": lora(init_lora_weights=False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_merge_is_that_of_peft(name: str, tmp_path: Path) -> None:
    check_parity(CASES[name], tmp_path)


@pytest.mark.parametrize("bare_base", [True, False], ids=["bare base", "base with another head"])
def test_a_head_that_the_base_lacks_is_added(bare_base: bool, tmp_path: Path) -> None:
    case = lora(models.bare_bert, target_modules=["query", "value"], task_type="SEQ_CLS")
    case.load_as = BertForSequenceClassification
    case.load = {"num_labels": 3}
    if not bare_base:
        case.build = models.pretraining_bert
        case.unused = "cls."
    report, _ = check_parity(case, tmp_path)
    assert "added, the base has no such tensor: classifier.weight" in report.notes
