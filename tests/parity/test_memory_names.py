"""Modules that transformers 5 names otherwise than checkpoints do: what the table renames and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM, ViTForImageClassification

from adapterhub_tools.errors import MismatchError, UnsupportedError
from tests.parity import models
from tests.parity.model_types import small
from tests.parity.oracle import (
    Adapted,
    Case,
    adapt,
    assert_same_outputs,
    check_parity,
    load_exactly,
    ours,
    refused,
    stored,
)

ATTENTION = r".*language_model\.(model\.)?layers\.\d+\.self_attn\.(q|v)_proj"


def case(model_type: str, targets: Any, **fields: Any) -> Case:
    whole = {"r": 4, "lora_alpha": 6, "target_modules": targets, **fields}
    return Case(build=lambda: small(model_type), config=lambda: LoraConfig(**whole))


def renamed(folder: Path, file: str, change: Callable[[str], str]) -> None:
    """Rewrites the tensor names of a file."""
    path = folder / file
    save_file({change(name): t for name, t in load_file(path).items()}, path, {"format": "pt"})


CASES = {
    "gemma3, attention": (case("gemma3", ATTENTION), "'model.language_model.layers.0.self_attn.q_proj' is"),
    "gemma3, images": (case("gemma3", r".*vision_tower.*\.(q_proj|fc1)"), "'model.vision_tower.encoder"),
    "gpt_neox, head": (case("gpt_neox", ["embed_out", "lm_head"]), "'lm_head' is 'embed_out' on disk"),
    "vit, blocks": (case("vit", r".*\.(q_proj|o_proj|fc1|fc2)"), "'vit.layers.0.attention.o_proj' is"),
    "vit, a classifier too": (case("vit", ["k_proj", "classifier"]), "'vit.layers.0.attention.k_proj' is"),
}


@pytest.mark.parametrize("name", CASES)
def test_names_that_only_memory_has(name: str, tmp_path: Path) -> None:
    made, note = CASES[name]
    report, out = check_parity(made, tmp_path)
    (said,) = [line for line in report.notes if line.startswith("names: ")]
    assert "renamed as in transformers " in said
    assert note in said
    assert stored(out).keys() == stored(tmp_path / "base").keys()


WHOLE = {
    "gpt_neox, head": ("gpt_neox", ["query_key_value"], ["lm_head"], "embed_out.weight"),
    "gemma3, norm": ("gemma3", ATTENTION, ["multi_modal_projector"], None),
    "vit, norms": ("vit", ["q_proj"], ["layernorm_after"], None),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_trained_whole_takes_its_place_on_disk(name: str, tmp_path: Path) -> None:
    """Also where every adapted module has the same name on both sides, as in GPT-NeoX."""
    model_type, targets, whole, there = WHOLE[name]
    report, out = check_parity(case(model_type, targets, modules_to_save=whole), tmp_path)
    assert not any("no such tensor" in note for note in report.notes)
    assert stored(out).keys() == stored(tmp_path / "base").keys()
    assert there is None or there in stored(out)


def test_names_as_they_are_on_disk(tmp_path: Path) -> None:
    """An adapter of transformers 4 has the names that checkpoints have."""
    adapted = adapt(case("gemma3", ATTENTION), tmp_path)
    renamed(
        adapted.adapter,
        "adapter_model.safetensors",
        lambda name: name.replace("model.language_model.", "language_model.model."),
    )
    report = ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert not any(note.startswith("names: ") for note in report.notes)
    assert_same_outputs(adapted.loader(tmp_path / "out"), adapted)


def test_the_older_of_two_names_on_disk(tmp_path: Path) -> None:
    """Published Gemma 3 checkpoints hold the vision tower one level deeper than transformers 5 writes it."""
    small("gemma3").save_pretrained(tmp_path / "base")
    renamed(
        tmp_path / "base",
        "model.safetensors",
        lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    )
    report, out = check_parity(case("gemma3", r".*vision_tower.*\.(q_proj|fc1)"), tmp_path)
    assert any("'vision_tower.vision_model.encoder" in note.split(" is ")[-1] for note in report.notes)
    assert stored(out).keys() == stored(tmp_path / "base").keys()


def bare(model_type: str, inner: str, targets: list[str], cls: Any, folder: Path) -> Adapted:
    """An adapter of the bare model, on the checkpoint of the model with its head."""
    whole = small(model_type)
    whole.save_pretrained(folder / "base")
    loaded = load_exactly(cls, folder / "base")
    body = get_peft_model(getattr(loaded, inner), LoraConfig(r=4, target_modules=targets))
    models.perturb_trainable(body, 3)
    body.eval().save_pretrained(folder / "adapter")
    return Adapted(
        base=folder / "base",
        adapter=folder / "adapter",
        model=body,
        outputs=models.outputs_of(loaded),
        rows=models.VOCAB,
        loader=lambda out: load_exactly(cls, out),
    )


BARE = {
    "vit": ("vit", "vit", ["q_proj", "fc2"], ViTForImageClassification),
    "gpt_neox": ("gpt_neox", "gpt_neox", ["query_key_value"], GPTNeoXForCausalLM),
}


@pytest.mark.parametrize("name", BARE)
def test_an_adapter_of_the_bare_model(name: str, tmp_path: Path) -> None:
    adapted = bare(*BARE[name], tmp_path)
    report = ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert any("put before" in note for note in report.notes)
    assert_same_outputs(adapted.loader(tmp_path / "out"), adapted)


# --- what is refused ---------------------------------------------------------------------------------------


def aimed_at(adapter: Path, old: str, new: str) -> None:
    """Makes an adapter of ``q_proj`` one of another module, in its config and its names."""
    renamed(adapter, "adapter_model.safetensors", lambda name: name.replace(old, new))
    file = adapter / "adapter_config.json"
    config = {**json.loads(file.read_text()), "target_modules": [new.rpartition(".")[2]]}
    file.write_text(json.dumps(config))


def test_stacked_experts_are_refused_by_name(tmp_path: Path) -> None:
    adapted = adapt(case("qwen3_moe", ["q_proj"]), tmp_path)
    aimed_at(adapted.adapter, "self_attn.q_proj", "mlp.experts.gate_up_proj")
    out = tmp_path / "out"
    problem = refused(UnsupportedError, "converted-weight", adapted.base, adapted.adapter, out)
    assert "mlp.experts.*.gate_proj.weight" in problem.message
    assert "MergeModulelist, Concatenate" in problem.message


def test_a_name_that_no_rule_places_lists_near_ones(tmp_path: Path) -> None:
    adapted = adapt(case("vit", ["q_proj"]), tmp_path)
    aimed_at(adapted.adapter, "q_proj", "query_proj")
    problem = refused(MismatchError, "unknown-module", adapted.base, adapted.adapter, tmp_path / "out")
    assert "near names are vit.encoder.layer.0.attention" in problem.message
