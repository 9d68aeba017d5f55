"""The architectures that are promised, each with an adapter on all that it has, written by transformers 5.

One adapter per type lies on attention, MLP, embeddings and head, and has trained every norm whole; the merged
folder gives the adapted model's outputs. The slow half takes the pieces one by one, untied, tied and grown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterhub_tools.architectures import lookup
from adapterhub_tools.errors import MismatchError
from tests.parity import models
from tests.parity.model_types import name_of, small
from tests.parity.oracle import Case, adapt, check_parity, refused, stored

DECODERS = """llama mistral qwen2 qwen3 gemma2 gemma3 phi3 olmo2 cohere starcoder2 granite gpt2 gpt_neox bloom
falcon opt"""
OTHERS = "bert roberta distilbert t5 bart whisper vit clip"
TYPES = f"{DECODERS} {OTHERS}".split()
PLACED_BY_THEIR_OWN_CLASS = "embed_positions"
"""PEFT's LoRA cannot call these position embeddings of OPT, BART and Whisper; they are trained whole here."""


def embeddings(model: Any) -> list[str]:
    """Every table of rows that LoRA can adapt, by its path."""
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return [name for name in tables if not name.endswith(PLACED_BY_THEIR_OWN_CLASS)]


def heads(model: Any) -> list[str]:
    name = name_of(model, model.get_output_embeddings())
    return [] if name is None or not hasattr(model.get_output_embeddings(), "weight") else [name]


def linears(model: Any) -> list[str]:
    """Every linear layer but the head: attention, MLP, projections."""
    kinds = (nn.Linear, Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and n not in heads(model)]


def norms(model: Any) -> list[str]:
    """The last path parts of every norm."""
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    return sorted(found)


def trained_whole(model: Any) -> list[str]:
    return [*norms(model), *([PLACED_BY_THEIR_OWN_CLASS] if positions(model) else [])]


def positions(model: Any) -> bool:
    return any(name.endswith(PLACED_BY_THEIR_OWN_CLASS) for name, _ in model.named_modules())


def tied(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def lora(model_type: str, targets: list[str], **fields: Any) -> Case:
    whole = {"r": 4, "lora_alpha": 6, "target_modules": targets, **fields}
    return Case(build=lambda: small(model_type), config=lambda: LoraConfig(**whole))


@pytest.mark.parametrize("model_type", TYPES)
def test_all_at_once(model_type: str, tmp_path: Path) -> None:
    model = small(model_type)
    targets = [*linears(model), *embeddings(model), *heads(model)]
    case = lora(model_type, targets, modules_to_save=trained_whole(model))
    check_parity(case, tmp_path, reference_is_right=not tied(model))


# --- the pieces one by one, and what may be peculiar about the vocabulary -----------------------------------

PIECES = {
    "linear layers": lambda model: (linears(model), []),
    "embeddings": lambda model: (embeddings(model), []),
    "head": lambda model: (heads(model), []),
    "norms trained whole": lambda model: (linears(model)[:1], norms(model)),
    "head trained whole": lambda model: (linears(model)[:1], heads(model)),
}
WITHOUT_HEAD = ("vit", "clip")


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("model_type", TYPES)
def test_one_piece(model_type: str, piece: str, tmp_path: Path) -> None:
    model = small(model_type)
    targets, whole = PIECES[piece](model)
    if model_type in WITHOUT_HEAD and "head" in piece:
        assert not heads(model)
        return
    if not targets:
        assert (model_type, piece) == ("vit", "embeddings")
        return
    case = lora(model_type, targets, modules_to_save=whole or None)
    check_parity(case, tmp_path, reference_is_right=not tied(model))


TIES = [name for name in TYPES if name not in ("vit", "clip", "t5")]
"""T5 is always tied, ViT and CLIP have no head; each other type is made as it is not by default."""


@pytest.mark.slow
@pytest.mark.parametrize("side", ["embeddings", "head"])
@pytest.mark.parametrize("model_type", TIES)
def test_tied_where_it_is_usually_not_and_the_other_way_round(
    model_type: str, side: str, tmp_path: Path
) -> None:
    other = not tied(small(model_type))
    model = small(model_type, tied=other)
    targets, _ = PIECES[side](model)
    case = lora(model_type, targets)
    case.build = lambda: small(model_type, tied=other)
    _, out = check_parity(case, tmp_path, reference_is_right=not other)
    assert_written_apart(model, out)


def assert_written_apart(model: Any, out: Path) -> None:
    """The head lies on disk, under its name there, and the config says that it is not the embedding."""
    tensors = stored(out)
    (name,) = heads(model)
    known = lookup(model.config.model_type)
    assert known is not None
    assert known.on_disk(f"{name}.weight", tensors.keys()) in tensors
    config = json.loads((out / "config.json").read_text())
    said = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    assert said is False


GROWN = [(name, tied) for name in [*DECODERS.split(), "distilbert", "whisper"] for tied in (False, True)]
GROWN += [("bert", True), ("roberta", True), ("t5", True)]


def grown(model_type: str, *, ties: bool) -> Case:
    """PEFT saves the resized embedding and head beside the factors."""
    case = lora(model_type, linears(small(model_type, tied=ties))[:2])
    case.build = lambda: small(model_type, tied=ties)
    case.prepare = lambda base: base.resize_token_embeddings(models.VOCAB + 8, mean_resizing=False)
    case.save, case.rows = {"save_embedding_layers": True}, models.VOCAB + 8
    case.options = {"accept_embeddings": True}
    return case


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "ties"), GROWN)
def test_a_grown_vocabulary(model_type: str, ties: bool, tmp_path: Path) -> None:
    report, _ = check_parity(grown(model_type, ties=ties), tmp_path, reference_is_right=not ties)
    assert any("vocab_size 96 -> 104" in note for note in report.notes)


BIASED = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias", "bart": "final_logits_bias"}


@pytest.mark.parametrize("model_type", BIASED)
def test_a_grown_vocabulary_without_its_biases_is_refused(model_type: str, tmp_path: Path) -> None:
    """A bias with one value for each token is resized by transformers, and PEFT does not save it."""
    case = grown(model_type, ties=False)
    adapted = adapt(case, tmp_path)
    out = tmp_path / "out"
    problem = refused(MismatchError, "vocabulary", adapted.base, adapted.adapter, out, **case.options)
    assert BIASED[model_type] in str(problem)
