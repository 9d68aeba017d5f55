"""Embeddings that an encoder, a decoder and a head share: T5, whose config cannot untie them, and BART."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.parity.model_types import small
from tests.parity.oracle import Case, adapt, assert_same_outputs, check_parity, ours, stored


def case(model_type: str, targets: list[str], **fields: Any) -> Case:
    whole = {"r": 4, "lora_alpha": 6, "target_modules": targets, **fields}
    return Case(build=lambda: small(model_type), config=lambda: LoraConfig(**whole))


def shared_names(model_type: str) -> tuple[str, str, str, str]:
    inner = "" if "t5" in model_type else "model."
    parts = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    first, second, third = (f"{inner}{part}.weight" for part in parts)
    return first, second, third, "lm_head.weight"


PIECES = {
    "head": (["lm_head"], []),
    "both embeddings, each its own factors": (["embed_tokens"], []),
    "the encoder's": (["encoder.embed_tokens"], []),
    "the unused one": (["shared"], []),
    "all of them": (["shared", "embed_tokens", "lm_head"], []),
    "head trained whole": ([], ["lm_head"]),
    "decoder's trained whole": ([], ["decoder.embed_tokens"]),
}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_they_are_written_apart(model_type: str, piece: str, tmp_path: Path) -> None:
    targets, whole = PIECES[piece]
    layer = "q" if model_type == "t5" else "q_proj"
    made = case(model_type, [layer, *targets], modules_to_save=whole or None)
    report, out = check_parity(made, tmp_path, reference_is_right=False)
    (note,) = [line for line in report.notes if line.startswith("untied: ")]
    names = set(shared_names(model_type))
    config = json.loads((out / "config.json").read_text())
    if model_type == "bart":
        assert names <= stored(out).keys()
        assert config["tie_word_embeddings"] is False
        return
    assert config == json.loads((tmp_path / "base" / "config.json").read_text())
    assert "transformers 5 loads them apart" in note
    if piece == "head":
        assert names & stored(out).keys() == {"shared.weight", "lm_head.weight"}


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_a_merged_one_is_a_base_again(model_type: str, tmp_path: Path) -> None:
    first = case(model_type, ["embed_tokens", "lm_head"])
    _, out = check_parity(first, tmp_path, reference_is_right=False)
    second = tmp_path / "second"
    second.mkdir()
    out.rename(second / "base")
    check_parity(case(model_type, ["lm_head", "decoder.embed_tokens"]), second, reference_is_right=False)


@pytest.mark.parametrize("model_type", ["mt5", "mbart", "pegasus", "marian"])
def test_the_kin(model_type: str, tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head"]
    check_parity(case(model_type, targets), tmp_path, reference_is_right=False)


T5_1_1 = {
    "head": ["lm_head", "q"],
    "embeddings": ["embed_tokens"],
    "the unused one": ["shared"],
    "all": ["shared", "embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("declared", [False, True], ids=["as published", "as transformers 5 writes it"])
@pytest.mark.parametrize("piece", T5_1_1)
def test_a_head_of_its_own(piece: str, declared: bool, tmp_path: Path) -> None:
    """T5 1.1: its config says untied, which in memory means only that the logits are not scaled."""
    base = tmp_path / "base"
    small("t5").save_pretrained(base)
    weights, file = base / "model.safetensors", base / "config.json"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0) * 0.9
    save_file(tensors, weights, {"format": "pt"})
    config = json.loads(file.read_text())
    scale = {"tie_word_embeddings": declared, "scale_decoder_outputs": False}
    file.write_text(json.dumps({**config, **scale}))
    adapted = adapt(case("t5", T5_1_1[piece]), tmp_path)
    assert adapted.model.config.scale_decoder_outputs is False
    ours(base, adapted.adapter, tmp_path / "out")
    assert_same_outputs(adapted.loader(tmp_path / "out"), adapted)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, **scale}


@pytest.mark.parametrize("name", ["shared", "encoder.embed_tokens"])
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_single_token_rows(model_type: str, name: str, tmp_path: Path) -> None:
    layer = "q" if model_type == "t5" else "q_proj"
    made = case(model_type, [layer], trainable_token_indices={name: [3, 40]})
    check_parity(made, tmp_path, reference_is_right=False)
