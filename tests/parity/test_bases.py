"""The base: bare or with a head, under a wrapper, in shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    LlamaModel,
    OPTForCausalLM,
    OPTModel,
)

from adapterhub_tools.errors import MismatchError
from tests.parity import models
from tests.parity.models import outputs_of
from tests.parity.oracle import (
    TARGETS,
    Case,
    assert_close,
    assert_same_weights,
    assert_untouched_bits,
    changed_names,
    check_parity,
    load_exactly,
    lora,
    ours,
    refused,
    saved_with,
)

# --- bare models and models with a head ----------------------------------------------------------------

PAIRS = {
    "llama": (models.llama, LlamaForCausalLM, LlamaModel, TARGETS, {}),
    "llama, tied": (lambda: models.llama(tied=True), LlamaForCausalLM, LlamaModel, TARGETS, {}),
    "gpt2": (models.gpt2, GPT2LMHeadModel, GPT2Model, ["c_attn", "c_fc"], {"fan_in_fan_out": True}),
    "opt": (models.opt, OPTForCausalLM, OPTModel, ["q_proj", "fc2"], {"bias": "lora_only"}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_an_adapter_of_the_bare_model_on_a_checkpoint_with_a_head(name: str, tmp_path: Path) -> None:
    build, _, bare, targets, more = PAIRS[name]
    build().save_pretrained(tmp_path / "base")
    adapted = saved_with(
        bare.from_pretrained(tmp_path / "base"), lora(target_modules=targets, **more), tmp_path / "adapter"
    )
    expected = outputs_of(adapted)
    report = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert any(note.startswith("names: ") for note in report.notes)
    merged = load_exactly(bare, tmp_path / "out", unused="lm_head")
    assert_close(outputs_of(merged), expected, "outputs", 1e-5)
    assert_same_weights(merged, adapted.merge_and_unload())
    assert_untouched_bits(tmp_path / "out", tmp_path / "base", changed_names(report))


@pytest.mark.parametrize("name", PAIRS)
def test_an_adapter_of_the_model_with_a_head_on_a_bare_checkpoint(name: str, tmp_path: Path) -> None:
    build, with_head, bare, targets, more = PAIRS[name]
    build().save_pretrained(tmp_path / "whole")
    bare.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    adapted = saved_with(
        with_head.from_pretrained(tmp_path / "whole"),
        lora(target_modules=targets, **more),
        tmp_path / "adapter",
    )
    report = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert any(note.startswith("names: ") for note in report.notes)
    reference = adapted.merge_and_unload()
    inner = getattr(reference, reference.base_model_prefix)
    merged = load_exactly(bare, tmp_path / "out")
    assert_same_weights(merged, inner)
    assert_close(outputs_of(merged), outputs_of(inner), "outputs", 1e-5)


def test_a_head_that_only_the_adapter_knows_is_refused(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path / "whole")
    LlamaModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    saved_with(
        LlamaForCausalLM.from_pretrained(tmp_path / "whole"),
        lora(target_modules=["q_proj", "lm_head"]),
        tmp_path / "adapter",
    )
    problem = refused(
        MismatchError, "unknown-module", tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    )
    assert problem.loc == "lm_head"


class Wrapper(nn.Module):
    """A model that holds another under a name of its own, as sentence-transformers does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.auto_model = inner

    def forward(self, **inputs: Tensor) -> Any:
        return self.auto_model(**inputs)


def test_a_wrapper_around_the_model_is_taken_off(tmp_path: Path) -> None:
    models.bare_bert().save_pretrained(tmp_path / "base")
    wrapper = Wrapper(BertModel.from_pretrained(tmp_path / "base"))
    adapted = saved_with(wrapper, lora(target_modules=["query", "value"]), tmp_path / "adapter")
    report = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "names: 'auto_model.' taken off" in report.notes
    assert_same_weights(load_exactly(BertModel, tmp_path / "out"), adapted.merge_and_unload().auto_model)


# --- shards --------------------------------------------------------------------------------------------

SHARDED: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case(build=models.llama, config=lora),
    "head added to the pair": lambda: Case(
        build=lambda: models.llama(tied=True), config=lambda: lora(target_modules=["lm_head", "q_proj"])
    ),
    "grown vocabulary": lambda: Case(
        build=models.llama,
        config=lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
        prepare=lambda model: model.resize_token_embeddings(104, mean_resizing=False),
        rows=104,
    ),
}


@pytest.mark.parametrize("name", SHARDED)
def test_a_base_in_shards_keeps_its_layout(name: str, tmp_path: Path) -> None:
    case = SHARDED[name]()
    case.build().save_pretrained(tmp_path / "base", max_shard_size="16KB")
    before = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(before.values())) > 3
    _, out = check_parity(case, tmp_path, reference_is_right=name != "head added to the pair")
    after = json.loads((out / "model.safetensors.index.json").read_text())
    assert {tensor: after["weight_map"][tensor] for tensor in before} == before
    files = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert set(files) == set(before.values())
    for tensor, file in after["weight_map"].items():
        assert tensor in files[file]
    assert sum(map(len, files.values())) == len(after["weight_map"])
    assert after["metadata"]["total_size"] == sum(t.nbytes for file in files.values() for t in file.values())
