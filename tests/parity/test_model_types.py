"""Every language model of the architecture table, made small: linear layers, embedding and head of each.

Where the embeddings are tied, the adapted model itself is the reference; elsewhere PEFT's merge is one too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from adapterhub_tools.architectures import lookup
from adapterhub_tools.errors import MismatchError, UnsupportedError
from tests.parity import models
from tests.parity.model_types import CAUSAL, MASKED, name_of, small
from tests.parity.oracle import Case, adapt, check_parity, ours, refused, stored


def lora(model_type: str, **fields: Any) -> Case:
    return Case(
        build=lambda: small(model_type), config=lambda: LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})
    )


RUNS = f"{CAUSAL} {MASKED}".split()


@pytest.mark.parametrize("model_type", RUNS)
def test_linear_layers(model_type: str, tmp_path: Path) -> None:
    check_parity(lora(model_type, target_modules="all-linear"), tmp_path)


@pytest.mark.parametrize("model_type", RUNS)
def test_embedding(model_type: str, tmp_path: Path) -> None:
    model = small(model_type)
    name = name_of(model, model.get_input_embeddings())
    tied = model.config.get_text_config().tie_word_embeddings
    _, out = check_parity(lora(model_type, target_modules=[name]), tmp_path, reference_is_right=not tied)
    check_tie(model, tied, out)


@pytest.mark.parametrize("model_type", RUNS)
def test_head(model_type: str, tmp_path: Path) -> None:
    model = small(model_type)
    name = name_of(model, model.get_output_embeddings())
    assert name is not None
    tied = model.config.get_text_config().tie_word_embeddings
    case = lora(model_type, target_modules=[name])
    # PEFT saves the whole head beside the factors; a bias is there as it was.
    case.same = int(not tied and getattr(model.get_output_embeddings(), "bias", None) is not None)
    _, out = check_parity(case, tmp_path, reference_is_right=not tied)
    check_tie(model, tied, out)


def check_tie(model: Any, tied: bool, out: Path) -> None:
    """The table knows the type, and a pair that was tied is written apart, under its names on disk."""
    known = lookup(model.config.model_type)
    assert known is not None
    if tied:
        tensors = stored(out)
        name = f"{name_of(model, model.get_output_embeddings())}.weight"
        assert known.on_disk(name, tensors.keys()) in tensors
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


# --- types and names that the table does not know ----------------------------------------------------------


def disguised(base: Path, *, declared: bool) -> None:
    """Gives a base a model type that no table knows; not declared is how transformers 4 writes a true tie."""
    file = base / "config.json"
    config = json.loads(file.read_text())
    config.update(model_type="llamalike", architectures=["LlamalikeForCausalLM"])
    if not declared:
        del config["tie_word_embeddings"]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "left out"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_a_tied_pair_of_an_unknown_type_is_refused(
    targets: list[str], declared: bool, tmp_path: Path
) -> None:
    fields = {"r": 4, "target_modules": targets}
    adapted = adapt(
        Case(build=lambda: models.llama(tied=True), config=lambda: LoraConfig(**fields)), tmp_path
    )
    disguised(adapted.base, declared=declared)
    error, kind = (
        (UnsupportedError, "tied-unsupported") if "q_proj" in targets else (MismatchError, "unknown-module")
    )
    refused(error, kind, adapted.base, adapted.adapter, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "left out"])
def test_the_linear_layers_of_an_unknown_type(tied: bool, declared: bool, tmp_path: Path) -> None:
    targets = ["q_proj"] if tied else ["q_proj", "embed_tokens", "lm_head"]
    fields = {"r": 4, "target_modules": targets}
    adapted = adapt(
        Case(build=lambda: models.llama(tied=tied), config=lambda: LoraConfig(**fields)), tmp_path
    )
    ours(adapted.base, adapted.adapter, tmp_path / "known")
    disguised(adapted.base, declared=declared)
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    known, unknown = stored(tmp_path / "known"), stored(tmp_path / "out")
    assert known.keys() == unknown.keys()
    assert all(torch.equal(known[name], unknown[name]) for name in known)
