"""Files that lack something which their config declares and the base has: each is refused, and by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

import adapterhub_tools as at
from adapterhub_tools.errors import FormatError, MismatchError
from tests.parity import models
from tests.parity.damage import assert_refused, case, edit_config, edit_tensors
from tests.parity.oracle import Adapted, Case, adapt, check_parity, ours

QUERY = {"target_modules": ["query"]}
ALL_NORMS = {"modules_to_save": ["norm", "input_layernorm"]}


def drop(adapted: Adapted, gone: Callable[[str], bool]) -> int:
    """Removes tensors from an adapter's file; returns how many."""
    names: list[str] = []

    def change(tensors: dict[str, Any]) -> None:
        names.extend(name for name in tensors if gone(name))
        for name in names:
            del tensors[name]

    edit_tensors(adapted.adapter, change)
    return len(names)


INCOMPLETE = {
    "a layer of a module trained whole": (
        models.llama,
        {"modules_to_save": ["mlp"]},
        lambda n: "layers.1.mlp" in n,
        "model.layers.1.mlp",
    ),
    "a kind of tensor of a module trained whole": (
        models.llama,
        {"modules_to_save": ["mlp"]},
        lambda n: "mlp.down_proj" in n,
        "mlp.down_proj.weight",
    ),
    "all of a module trained whole": (
        models.llama,
        {"modules_to_save": ["mlp"]},
        lambda n: ".mlp." in n,
        "model.layers.0.mlp",
    ),
    "the head of two modules trained whole": (
        models.llama,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        lambda n: "lm_head" in n,
        "lm_head.weight",
    ),
    "a norm that an entry means by its end only": (
        models.llama,
        ALL_NORMS,
        lambda n: "layers.1.post_attention_layernorm" in n,
        "model.layers.1.post_attention_layernorm.weight",
    ),
    "the biases of one layer": (
        models.gpt2,
        {"bias": "all", "target_modules": ["c_attn"]},
        lambda n: ".h.1." in n and n.endswith(".bias"),
        "transformer.h.1.",
    ),
    "every bias": (
        models.gpt2,
        {"bias": "all", "target_modules": ["c_attn"]},
        lambda n: n.endswith(".bias"),
        "transformer.h.0.",
    ),
    "the final norm's bias": (
        models.gpt2,
        {"bias": "all", "target_modules": ["c_attn"]},
        lambda n: n.endswith("ln_f.bias"),
        "transformer.ln_f.bias",
    ),
    "the bias of a target": (
        models.gpt2,
        {"bias": "lora_only", "target_modules": ["c_attn"]},
        lambda n: ".h.1." in n and n.endswith(".bias"),
        "transformer.h.1.attn.c_attn.bias",
    ),
    "the head of a task": (
        models.bert_classifier,
        {**QUERY, "task_type": "SEQ_CLS"},
        lambda n: "classifier" in n,
        "classifier.",
    ),
    "the bias of a head of a task": (
        models.bert_classifier,
        {**QUERY, "task_type": "SEQ_CLS"},
        lambda n: n.endswith("classifier.bias"),
        "classifier.bias",
    ),
    "an embedding that is listed as a target": (
        models.bert_classifier,
        {"target_modules": ["query", "word_embeddings"]},
        lambda n: "word_embeddings" in n,
        "bert.embeddings.word_embeddings",
    ),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_an_incomplete_file(name: str, tmp_path: Path) -> None:
    build, fields, gone, missing = INCOMPLETE[name]
    adapted = adapt(case(build, **fields), tmp_path)
    assert drop(adapted, gone)
    problem = assert_refused(MismatchError, "coverage", adapted, tmp_path)
    assert missing in problem.message
    assert "save the adapter again" in problem.remedy
    report = at.validate(adapted.adapter, base=adapted.base)
    assert not report.ok
    assert "coverage" in {found.kind for found in report.problems}


def test_token_rows_of_one_of_two_modules(tmp_path: Path) -> None:
    """With other indices than the embedding's, the head has rows of its own, tied or not."""
    rows = {"embed_tokens": [3, 1], "lm_head": [2]}
    adapted = adapt(case(trainable_token_indices=rows), tmp_path)
    assert drop(adapted, lambda n: "lm_head" in n) == 1
    assert "lm_head" in assert_refused(FormatError, "missing-tensor", adapted, tmp_path).message
    edit_config(adapted.adapter, trainable_token_indices={**rows, "lm_head": [3, 1]})
    problem = assert_refused(MismatchError, "coverage", adapted, tmp_path)
    assert problem.loc == "lm_head.weight"


def test_token_rows_that_tied_modules_share(tmp_path: Path) -> None:
    rows = {"embed_tokens": [3, 1], "lm_head": [3, 1]}
    adapted = adapt(case(lambda: models.llama(tied=True), trainable_token_indices=rows), tmp_path)
    assert ours(adapted.base, adapted.adapter, tmp_path / "out").changed


COMPLETE = {
    "norms": (models.llama, ALL_NORMS),
    "a tied embedding": (
        lambda: models.llama(tied=True),
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "all biases of tied ones": (models.masked_bert, {**QUERY, "bias": "all"}),
    "biases of targets": (models.gpt2, {"bias": "lora_only", "target_modules": ["c_attn"]}),
    "a pooler and a head": (
        models.bert_classifier,
        {**QUERY, "modules_to_save": ["pooler"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_a_complete_file_has_no_warning(name: str, tmp_path: Path) -> None:
    build, fields = COMPLETE[name]
    adapted = adapt(case(build, **fields), tmp_path)
    report = at.validate(adapted.adapter, base=adapted.base)
    assert report.ok
    assert not report.problems


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (BertForSequenceClassification, {"task_type": "SEQ_CLS", "bias": "all"}),
        (BertForSequenceClassification, {"task_type": "SEQ_CLS", "modules_to_save": ["LayerNorm"]}),
        (BertForTokenClassification, {"task_type": "TOKEN_CLS", "bias": "all"}),
        (BertForMaskedLM, {"bias": "all"}),
    ],
    ids=["biases", "norms", "no pooler", "no second head"],
)
def test_what_a_base_has_for_other_tasks_is_a_note(cls: Any, fields: Any, tmp_path: Path) -> None:
    """A base that was saved with its pre-training heads, adapted as a class that has other heads."""
    made = case(models.pretraining_bert, **QUERY, **fields)
    adapted = adapt(Case(build=made.build, config=made.config, load_as=cls), tmp_path)
    report = ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert any("cls.seq_relationship" in note or "cls.predictions" in note for note in report.notes)


def test_biases_of_a_target_as_in_peft(tmp_path: Path) -> None:
    check_parity(case(models.gpt2, bias="lora_only", target_modules=["c_attn"]), tmp_path)
