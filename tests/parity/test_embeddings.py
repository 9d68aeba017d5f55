"""Embeddings: tied and untied, adapted, trained whole, resized, or with single rows trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from safetensors import safe_open
from safetensors.torch import save_file

import adapterhub_tools as at
from adapterhub_tools.errors import FormatError
from tests.parity import models
from tests.parity.models import VOCAB
from tests.parity.oracle import (
    Case,
    adapt,
    assert_same_outputs,
    changed_names,
    check_parity,
    ours,
    refused,
    stored,
)

ROWS = [3, 40, 90]


def tied() -> Any:
    return models.llama(tied=True)


def tied_opt() -> Any:
    return models.opt(tied=True)


def case(build: Callable[[], Any] = models.llama, **fields: Any) -> Case:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **fields}
    return Case(build=build, config=lambda: LoraConfig(**fields))


def tied_in_config(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


KEPT = {
    "nothing of the pair is touched": case(tied),
    "token rows, list": case(tied, trainable_token_indices=ROWS),
    "token rows, named": case(tied, trainable_token_indices={"embed_tokens": ROWS}),
    "token rows, both sides named": case(
        tied, trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS}
    ),
    "token rows, tying asked for": case(tied, trainable_token_indices=ROWS, ensure_weight_tying=True),
    "token rows, opt": case(tied_opt, trainable_token_indices=ROWS),
    "embedding saved, tying asked for": case(
        tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "head saved, tying asked for": case(tied, modules_to_save=["lm_head"], ensure_weight_tying=True),
    "both saved, tying asked for": case(
        tied, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "embedding adapted, tying asked for": case(
        tied, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    ),
    "both adapted, tying asked for": case(
        tied, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "embedding adapted with rslora, tying asked for": case(
        tied, target_modules=["embed_tokens"], ensure_weight_tying=True, use_rslora=True
    ),
}
"""The tie stays: one tensor is stored, and the config still says so."""

UNTIED = {
    "embedding adapted": case(tied, target_modules=["embed_tokens", "q_proj"]),
    "head adapted": case(tied, target_modules=["lm_head", "q_proj"]),
    "both adapted": case(tied, target_modules=["embed_tokens", "lm_head"]),
    "embedding adapted, gpt2": case(models.gpt2, target_modules=["wte", "c_attn"], fan_in_fan_out=True),
    "head adapted, gpt2": case(models.gpt2, target_modules=["lm_head"]),
    "head adapted, opt": case(tied_opt, target_modules=["lm_head"]),
    "embedding saved": case(tied, modules_to_save=["embed_tokens"]),
    "head saved": case(tied, modules_to_save=["lm_head"]),
    "both saved, trained apart": case(tied, modules_to_save=["embed_tokens", "lm_head"]),
    "token rows of each side": case(tied, trainable_token_indices={"embed_tokens": ROWS, "lm_head": [5, 6]}),
    "token rows of the head": case(tied, trainable_token_indices={"lm_head": ROWS}),
    "token rows of the head, tying asked for": case(
        tied, trainable_token_indices={"lm_head": ROWS}, ensure_weight_tying=True
    ),
    "head saved, embedding adapted": case(tied, target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
    "embedding saved, head adapted": case(tied, target_modules=["lm_head"], modules_to_save=["embed_tokens"]),
}
"""The two sides differ: both are stored, and the config says that they are not tied."""


@pytest.mark.parametrize("name", KEPT)
def test_a_tie_is_kept_where_both_sides_stay_equal(name: str, tmp_path: Path) -> None:
    _, out = check_parity(KEPT[name], tmp_path, reference_is_right=False)
    assert tied_in_config(out)
    assert "lm_head.weight" not in stored(out)


@pytest.mark.parametrize("name", UNTIED)
def test_a_pair_is_untied_where_the_adapter_changes_one_side(name: str, tmp_path: Path) -> None:
    report, out = check_parity(UNTIED[name], tmp_path, reference_is_right=False)
    assert not tied_in_config(out)
    assert "lm_head.weight" in stored(out)
    assert any(note.startswith("untied: ") for note in report.notes)


UNTIED_BASE = {
    "token rows, list": case(trainable_token_indices=ROWS),
    "token rows, named": case(trainable_token_indices={"embed_tokens": ROWS}),
    "token rows of the head": case(trainable_token_indices={"lm_head": ROWS}),
    "token rows of each side": case(trainable_token_indices={"embed_tokens": ROWS, "lm_head": [5, 6]}),
    "token rows, full path": case(trainable_token_indices={"model.embed_tokens": ROWS}),
    "token rows out of order": case(trainable_token_indices=[90, 3, 40]),
    "token rows, gpt2": case(
        lambda: models.gpt2(tied=False),
        target_modules=["c_attn"],
        trainable_token_indices=ROWS,
        fan_in_fan_out=True,
    ),
    "embedding adapted, embeddings saved with it": case(target_modules=["embed_tokens", "q_proj"]),
    "both adapted, embeddings saved with them": case(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "embedding adapted, regular expression": case(target_modules=r".*embed_tokens|.*q_proj"),
    "embedding adapted, embeddings not saved": replace(
        case(target_modules=["embed_tokens", "q_proj"]), save={"save_embedding_layers": False}
    ),
    "embeddings saved on purpose": replace(
        case(), save={"save_embedding_layers": True}, options={"accept_embeddings": True}, same=2
    ),
}


@pytest.mark.parametrize("name", UNTIED_BASE)
def test_embeddings_of_an_untied_base(name: str, tmp_path: Path) -> None:
    check_parity(UNTIED_BASE[name], tmp_path)


@pytest.mark.parametrize("pair_is_tied", [False, True])
def test_an_adapter_of_token_rows_alone(pair_is_tied: bool, tmp_path: Path) -> None:
    """The type TRAINABLE_TOKENS replaces rows without any factors."""
    rows = Case(
        build=lambda: models.llama(tied=pair_is_tied),
        config=lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=ROWS),
    )
    _, out = check_parity(rows, tmp_path, reference_is_right=not pair_is_tied)
    assert tied_in_config(out) is pair_is_tied


GROWN = 104


def resized(rows: int) -> Callable[[Any], None]:
    def resize(model: Any) -> None:
        torch.manual_seed(2)
        model.resize_token_embeddings(rows, mean_resizing=False)

    return resize


def grown(build: Callable[[], Any], rows: int = GROWN, **fields: Any) -> Case:
    made = case(build, **fields)
    made.prepare, made.rows = resized(rows), rows
    return made


RESIZED = {
    "untied, both trained": grown(models.llama, modules_to_save=["embed_tokens", "lm_head"]),
    "tied, embedding trained, tying asked for": grown(
        tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "tied, both trained": grown(tied, modules_to_save=["embed_tokens", "lm_head"]),
    "untied, embeddings saved": replace(
        grown(models.llama), save={"save_embedding_layers": True}, options={"accept_embeddings": True}
    ),
    "untied, embeddings saved by PEFT's own choice": replace(
        grown(models.llama), options={"accept_embeddings": True}
    ),
    "tied, embeddings saved by PEFT's own choice": replace(grown(tied), options={"accept_embeddings": True}),
    "tied, only the head adapted": grown(tied, target_modules=["lm_head", "q_proj"]),
    "tied, both adapted": grown(tied, target_modules=["lm_head", "embed_tokens"]),
    "untied, embeddings adapted": grown(models.llama, target_modules=["embed_tokens", "lm_head"]),
    "tied, new rows trained": replace(
        grown(tied, trainable_token_indices=list(range(VOCAB, GROWN))), options={"accept_embeddings": True}
    ),
    "untied, new rows trained": replace(
        grown(models.llama, trainable_token_indices=list(range(VOCAB, GROWN))),
        options={"accept_embeddings": True},
    ),
    "fewer rows": replace(grown(models.llama, rows=88), options={"accept_embeddings": True}),
}


@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary(name: str, tmp_path: Path) -> None:
    resized_case = RESIZED[name]
    report, out = check_parity(resized_case, tmp_path, reference_is_right=False)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == resized_case.rows
    assert stored(out)["model.embed_tokens.weight"].shape[0] == resized_case.rows
    assert any("vocab_size" in note for note in report.notes)


def test_an_embedding_that_the_config_does_not_mention_needs_a_flag(tmp_path: Path) -> None:
    adapted = adapt(replace(case(), save={"save_embedding_layers": True}), tmp_path)
    problem = refused(FormatError, "saved-embedding", adapted.base, adapted.adapter, tmp_path / "out")
    assert "--accept-embeddings" in problem.remedy


def store_head(base: Path, change: float) -> None:
    """Stores the tied head beside the embedding, its values changed by so much."""
    tensors = stored(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["head adapted", "embedding adapted", "both saved, trained apart"])
def test_a_tied_base_that_stores_both_is_untied_alike(name: str, tmp_path: Path) -> None:
    adapted = adapt(UNTIED[name], tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "one")
    store_head(adapted.base, 0.0)
    ours(adapted.base, adapted.adapter, tmp_path / "both")
    one, both = stored(tmp_path / "one"), stored(tmp_path / "both")
    assert one.keys() == both.keys()
    assert all(torch.equal(one[tensor], both[tensor]) for tensor in one)
    assert not tied_in_config(tmp_path / "both")


@pytest.mark.parametrize("name", ["token rows, list", "embedding adapted, tying asked for"])
def test_a_tied_base_that_stores_both_changes_both(name: str, tmp_path: Path) -> None:
    adapted = adapt(KEPT[name], tmp_path)
    store_head(adapted.base, 0.0)
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert tied_in_config(tmp_path / "out")
    after = stored(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert_same_outputs(adapted.loader(tmp_path / "out"), adapted)


def test_a_tied_base_that_stores_two_different_tensors(tmp_path: Path) -> None:
    """transformers 4 and 5 load different models from it, so an adapter of the pair fits neither surely."""
    adapted = adapt(UNTIED["head adapted"], tmp_path)
    store_head(adapted.base, 0.5)
    problem = refused(FormatError, "tie", adapted.base, adapted.adapter, tmp_path / "out")
    assert problem.loc == "tie_word_embeddings"


def test_such_a_base_is_no_matter_to_an_adapter_that_leaves_the_pair_alone(tmp_path: Path) -> None:
    adapted = adapt(KEPT["nothing of the pair is touched"], tmp_path)
    store_head(adapted.base, 0.5)
    report = ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & changed_names(report)


def test_the_adapter_saved_its_embeddings(tmp_path: Path) -> None:
    """The premise of the cases above: PEFT writes an adapted embedding's base into the file."""
    adapted = adapt(UNTIED_BASE["embedding adapted, embeddings saved with it"], tmp_path)
    with safe_open(adapted.adapter / "adapter_model.safetensors", "pt") as file:
        assert any(key.endswith("embed_tokens.base_layer.weight") for key in file.keys())  # noqa: SIM118 - no mapping


def test_a_head_that_was_tied_keeps_the_dtype_of_the_base(tmp_path: Path) -> None:
    made = adapt(case(tied, target_modules=["lm_head", "embed_tokens"]), tmp_path)
    weights = stored(made.adapter)
    held = "base_model.model.lm_head.base_layer.weight"
    assert held in weights
    halves = {name: value.bfloat16() if "base_layer" in name else value for name, value in weights.items()}
    save_file(halves, made.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    at.merge(made.base, made.adapter, tmp_path / "out")
    assert {value.dtype for value in stored(tmp_path / "out").values()} == {torch.float32}
