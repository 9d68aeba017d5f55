"""What is peculiar to an architecture: other tied names, checkpoints that a hub keeps under other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5ForConditionalGeneration,
)

from tests.parity import models
from tests.parity.models import outputs_of, perturb_trainable
from tests.parity.oracle import (
    Case,
    adapt,
    assert_close,
    assert_same_outputs,
    assert_same_weights,
    check_parity,
    load_exactly,
    ours,
    stored,
)


def case(build: Callable[[], Any], *targets: str, **fields: Any) -> Case:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": list(targets), **fields}
    return Case(build=build, config=lambda: LoraConfig(**fields))


PLAIN = {
    "mixtral, attention": case(models.mixtral, "q_proj", "k_proj", "v_proj", "o_proj"),
    "bert, masked language": case(models.masked_bert, "query", "dense"),
    "bert, untied decoder": case(lambda: models.masked_bert(tied=False), "decoder", "query"),
    "bert, untied embedding": case(lambda: models.masked_bert(tied=False), "word_embeddings"),
    "bert, every bias": case(models.masked_bert, "query", bias="all"),
    "bert, position embedding": case(models.masked_bert, "position_embeddings"),
    "gpt2, untied head": case(lambda: models.gpt2(tied=False), "lm_head", "c_attn", "c_proj"),
    "gpt2, linear and Conv1D": case(lambda: models.gpt2(tied=False), "c_proj", "lm_head"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_merge_is_that_of_peft(name: str, tmp_path: Path) -> None:
    check_parity(PLAIN[name], tmp_path)


UNTIED = {
    "bert, embedding": case(models.masked_bert, "word_embeddings"),
    "bert, decoder": case(models.masked_bert, "decoder"),
    "bert, decoder trained whole": case(models.masked_bert, "query", modules_to_save=["decoder"]),
}


@pytest.mark.parametrize("name", UNTIED)
def test_a_pair_under_other_names_is_untied(name: str, tmp_path: Path) -> None:
    _, out = check_parity(UNTIED[name], tmp_path, reference_is_right=False)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert "cls.predictions.decoder.weight" in stored(out)


# --- checkpoints whose names are those of the bare model, as the hub keeps GPT-2 ---------------------------

HUB_GPT2 = {
    "blocks": ({"target_modules": ["c_attn", "c_proj"]}, True),
    "head": ({"target_modules": ["lm_head", "c_attn"]}, False),
    "embedding": ({"target_modules": ["wte"]}, False),
    "token rows": ({"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [3, 40]}}, True),
    "head trained whole": ({"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}, False),
}


@pytest.mark.parametrize("name", HUB_GPT2)
def test_a_checkpoint_with_the_names_of_the_bare_model(name: str, tmp_path: Path) -> None:
    fields, keeps_tie = HUB_GPT2[name]
    hub = Case(build=models.gpt2, config=lambda: LoraConfig(r=4, lora_alpha=6, **fields))
    models.gpt2().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    adapted = adapt(hub, tmp_path)
    report = ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert any(note.startswith("names: ") for note in report.notes)
    assert_same_outputs(load_exactly(GPT2LMHeadModel, tmp_path / "out"), adapted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is keeps_tie


# --- T5 1.1, whose head is its own though transformers 5 always writes that it is tied -------------------

T5_HEAD = {
    "head": case(models.t5, "lm_head", "q"),
    "head trained whole": case(models.t5, "q", modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", T5_HEAD)
def test_a_head_of_its_own_in_t5(name: str, tmp_path: Path) -> None:
    models.t5().save_pretrained(tmp_path / "base")
    weights, config = tmp_path / "base" / "model.safetensors", tmp_path / "base" / "config.json"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0) * 0.9
    save_file(tensors, weights, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    adapted = adapt(T5_HEAD[name], tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert_same_outputs(load_exactly(T5ForConditionalGeneration, tmp_path / "out"), adapted)


# --- heads that the checkpoint does not have ----------------------------------------------------------------


def test_a_classifier_on_a_language_model(tmp_path: Path) -> None:
    """The language model's head stays; the classifier that the adapter trained whole is added."""
    classifier = case(models.llama, "q_proj", "v_proj", task_type="SEQ_CLS")
    classifier.load_as, classifier.load = LlamaForSequenceClassification, {"num_labels": 3, "pad_token_id": 0}
    classifier.unused = "lm_head"
    report, out = check_parity(classifier, tmp_path)
    assert "added, the base has no such tensor: score.weight" in report.notes
    assert {"score.weight", "lm_head.weight"} <= set(stored(out))


def test_what_a_bare_model_trained_whole_finds_its_place(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaModel.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]),
    )
    perturb_trainable(model, 3)
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = outputs_of(model)
    report = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not any("no such tensor" in note for note in report.notes)
    merged = load_exactly(LlamaForCausalLM, tmp_path / "out")
    assert_close(outputs_of(merged.model), expected, "outputs", 1e-5)


@pytest.mark.parametrize("config_ties", [False, True])
def test_a_bare_checkpoint_has_no_pair_to_untie(config_ties: bool, tmp_path: Path) -> None:
    def build() -> LlamaModel:
        model = models.bare_llama()
        model.config.tie_word_embeddings = config_ties
        return model

    _, out = check_parity(case(build, "embed_tokens", "q_proj"), tmp_path)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is config_ties
    assert "lm_head.weight" not in stored(out)


# --- adapters of other writers and of older versions -------------------------------------------------------

FIELDS_OF_0_3 = (
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)


def older(adapter: Path, tensors: Any) -> None:
    """Rewrites an adapter with a config of PEFT 0.3 and the given change of its tensors."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    old = {name: config[name] for name in FIELDS_OF_0_3}
    old.update(enable_lora=None, merge_weights=False, target_modules=sorted(config["target_modules"]))
    file.write_text(json.dumps(old))
    weights = adapter / "adapter_model.safetensors"
    save_file(tensors(load_file(weights)), weights, {"format": "pt"})


RENAMED: dict[str, Callable[[str], str]] = {
    "as they are": lambda name: name,
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "DataParallel": lambda name: f"module.{name}",
    "FSDP": lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."),
    "wrapped twice": lambda name: name.replace("base_model.model.", "base_model.model.base_model.model.", 1),
}


@pytest.mark.parametrize("how", RENAMED)
def test_an_older_config_and_the_prefixes_of_wrappers(how: str, tmp_path: Path) -> None:
    adapted = adapt(case(models.llama, "q_proj", "v_proj"), tmp_path)
    expected = ours(adapted.base, adapted.adapter, tmp_path / "new")
    older(adapted.adapter, lambda tensors: {RENAMED[how](n): t for n, t in tensors.items()})
    found = ours(adapted.base, adapted.adapter, tmp_path / "old")
    assert found.digest == expected.digest
    assert_same_weights(adapted.loader(tmp_path / "old"), adapted.model.merge_and_unload())


def test_factors_of_two_precisions(tmp_path: Path) -> None:
    """A in float16 and B in bfloat16: the values count, not how they are stored."""
    adapted = adapt(case(models.llama, "q_proj", "v_proj"), tmp_path)
    file = adapted.adapter / "adapter_model.safetensors"
    mixed = {n: t.to(torch.float16 if "lora_A" in n else torch.bfloat16) for n, t in load_file(file).items()}
    save_file(mixed, file, {"format": "pt"})
    one = ours(adapted.base, adapted.adapter, tmp_path / "mixed")
    save_file({n: t.double() for n, t in mixed.items()}, file, {"format": "pt"})
    other = ours(adapted.base, adapted.adapter, tmp_path / "double")
    assert one.digest == other.digest


def test_masked_language_model_keeps_its_shared_bias(tmp_path: Path) -> None:
    """The decoder's bias is stored once; a bias that the adapter saved twice must end in it."""
    adapted = adapt(case(models.masked_bert, "query", bias="all"), tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert set(stored(tmp_path / "out")) == set(stored(adapted.base))
    assert_same_outputs(load_exactly(BertForMaskedLM, tmp_path / "out"), adapted)
