"""Bases that an adapter does not fit, and values that no merge can have: refused, with nothing left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import adapterhub_tools as at
from adapterhub_tools.errors import (
    FormatError,
    IntegrityError,
    LossyError,
    MismatchError,
    UnsupportedError,
)
from tests.parity import models
from tests.parity.damage import (
    FACTOR_A,
    FACTOR_B,
    TARGET,
    assert_refused,
    case,
    edit_config,
    edit_tensors,
)
from tests.parity.oracle import (
    WEIGHTS,
    Adapted,
    adapt,
    assert_close,
    ours,
    refused,
    stored,
)

# --- another base ----------------------------------------------------------------------------------------


def test_a_module_that_the_base_does_not_have(tmp_path: Path) -> None:
    adapted = adapt(case(lambda: models.llama(layers=3)), tmp_path)
    models.llama().save_pretrained(tmp_path / "shallow")
    problem = refused(
        MismatchError, "unknown-module", tmp_path / "shallow", adapted.adapter, tmp_path / "out"
    )
    assert problem.loc == "model.layers.2.self_attn.q_proj"
    assert "near names are" in problem.message
    assert "model.layers.1.self_attn.q_proj" in problem.message


@pytest.mark.parametrize("inserted", ["language_model.", "wrong."])
def test_every_key_renamed(inserted: str, tmp_path: Path) -> None:
    """PEFT loads such a file with one warning and serves the base."""
    adapted = adapt(case(), tmp_path)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("base_model.model.", f"base_model.model.{inserted}")] = tensors.pop(name)

    edit_tensors(adapted.adapter, rename)
    assert_refused(MismatchError, "unknown-module", adapted, tmp_path)


def test_a_base_of_another_width(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    config = models.llama_config()
    config.hidden_size, config.head_dim = 48, 12
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    problem = refused(MismatchError, "shape", tmp_path / "wider", adapted.adapter, tmp_path / "out")
    assert "32×32" in problem.message
    assert "48×48" in problem.message


def test_a_module_to_save_of_another_shape(tmp_path: Path) -> None:
    adapted = adapt(case(modules_to_save=["norm"]), tmp_path)
    edit_tensors(
        adapted.adapter, lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(5)})
    )
    assert_refused(MismatchError, "shape", adapted, tmp_path)


def test_a_bias_that_the_base_does_not_have(tmp_path: Path) -> None:
    """PEFT refuses to make such an adapter for a layer without bias, so one for biased layers is borrowed."""
    adapted = adapt(case(models.opt, target_modules=["q_proj"], lora_bias=True), tmp_path)
    edit_tensors(adapted.base, lambda tensors: [tensors.pop(n) for n in list(tensors) if "q_proj.bias" in n])
    assert_refused(MismatchError, "bias", adapted, tmp_path)


def test_a_base_that_is_quantised(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    edit_tensors(
        adapted.base, lambda tensors: tensors.update({TARGET: (tensors[TARGET] * 99).to(torch.int8)})
    )
    problem = assert_refused(UnsupportedError, "quantised-base", adapted, tmp_path)
    assert problem.loc == TARGET


def test_token_rows_beyond_the_vocabulary(tmp_path: Path) -> None:
    adapted = adapt(case(trainable_token_indices=[3, 90]), tmp_path)
    edit_config(adapted.adapter, trainable_token_indices=[3, 96])
    assert_refused(MismatchError, "shape", adapted, tmp_path)


def test_a_vocabulary_that_grows_on_one_side_only(tmp_path: Path) -> None:
    adapted = adapt(case(modules_to_save=["embed_tokens"]), tmp_path)
    name = "base_model.model.model.embed_tokens.weight"
    edit_tensors(adapted.adapter, lambda tensors: tensors.update({name: torch.randn(104, models.HIDDEN)}))
    assert_refused(MismatchError, "vocabulary", adapted, tmp_path)


@pytest.mark.parametrize("target", ["shared", "encoder.embed_tokens"])
def test_a_shared_embedding_of_a_base_without_its_head(target: str, tmp_path: Path) -> None:
    """An encoder alone shares its embedding too; what else did is known only of the whole model."""
    adapted = adapt(case(models.t5_encoder, target_modules=["q", target]), tmp_path)
    assert_refused(UnsupportedError, "tied-unsupported", adapted, tmp_path, accept_embeddings=True)


def test_tying_that_is_asked_for_where_more_than_two_share(tmp_path: Path) -> None:
    adapted = adapt(case(models.t5, target_modules=["q", "shared"]), tmp_path)
    edit_config(adapted.adapter, ensure_weight_tying=True)
    assert_refused(UnsupportedError, "tied-unsupported", adapted, tmp_path, accept_embeddings=True)


def test_two_adapters_that_replace_one_tensor(tmp_path: Path) -> None:
    made = case(modules_to_save=["lm_head"])
    adapted = adapt(made, tmp_path)
    other = adapt(replace(made, seed=4), tmp_path, "other")
    with pytest.raises(MismatchError) as caught:
        ours(adapted.base, [adapted.adapter, other.adapter], tmp_path / "out")
    assert [problem.kind for problem in caught.value.problems] == ["replaced-twice"]
    assert not (tmp_path / "out").exists()


class Layouts(nn.Module):
    """Layers of GPT-2's class and of the usual one, which no table knows; two of them are square."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Conv1D(48, models.HIDDEN)
        self.square = Conv1D(models.HIDDEN, models.HIDDEN)
        self.up = nn.Linear(models.HIDDEN, 48)
        self.even = nn.Linear(models.HIDDEN, models.HIDDEN)


LAYOUTS = {
    "one class, (in, out)": (["wide", "square"], True),
    "one class, (out, in)": (["up", "even"], True),
    "only square ones": (["square"], True),
    "both classes, none square": (["wide", "up"], True),
    "both classes, (in, out) square": (["wide", "square", "up"], False),
    "both classes, (out, in) square": (["wide", "up", "even"], False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_neither_shape_nor_config_tells(name: str, tmp_path: Path) -> None:
    """The adapter's config has one flag for all modules, so a square weight of a mixed model is refused."""
    targets, merges = LAYOUTS[name]
    model = Layouts()
    models.randomise(model, seed=7)
    base = models.save_base(model, tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    models.perturb_trainable(adapted, 3)
    adapted.save_pretrained(tmp_path / "adapter")
    if not merges:
        refused(UnsupportedError, "unknown-layout", base, tmp_path / "adapter", tmp_path / "out")
        return
    ours(base, tmp_path / "adapter", tmp_path / "out")
    merged = stored(tmp_path / "out")
    for tensor, expected in adapted.merge_and_unload().state_dict().items():
        assert_close(merged[tensor], expected, tensor, WEIGHTS)


def test_a_shared_bias_that_is_changed_in_two_ways(tmp_path: Path) -> None:
    adapted = adapt(case(models.masked_bert, target_modules=["query"], bias="all"), tmp_path)
    name = "base_model.model.cls.predictions.bias"
    edit_tensors(adapted.adapter, lambda tensors: tensors.update({name: tensors[name] + 1}))
    assert_refused(UnsupportedError, "tied-unsupported", adapted, tmp_path)


# --- the base that a manifest records --------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Adapted:
    """An adapter with a manifest that records its base."""
    adapted = adapt(case(), tmp_path)
    at.init(adapted.adapter, base=adapted.base, cache=False)
    return adapted


def nudge(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[7] += 1e-3

    return change


def test_the_recorded_base_is_accepted(recorded: Adapted, tmp_path: Path) -> None:
    report = ours(recorded.base, recorded.adapter, tmp_path / "out")
    assert report.receipt is not None
    assert report.receipt.base.checked == "full"


@pytest.mark.parametrize("check", ["full", "targets"])
def test_another_value_in_a_target(check: str, recorded: Adapted, tmp_path: Path) -> None:
    edit_tensors(recorded.base, nudge(TARGET))
    kind = "base" if check == "full" else "base-targets"
    problem = assert_refused(IntegrityError, kind, recorded, tmp_path, check_base=check)
    assert "records" in problem.message


def test_another_value_elsewhere(recorded: Adapted, tmp_path: Path) -> None:
    edit_tensors(recorded.base, nudge("model.layers.0.mlp.up_proj.weight"))
    assert_refused(IntegrityError, "base", recorded, tmp_path)
    report = ours(recorded.base, recorded.adapter, tmp_path / "out", check_base="targets")
    assert report.receipt is not None
    assert report.receipt.base.checked == "targets"


def test_another_config(recorded: Adapted, tmp_path: Path) -> None:
    file = recorded.base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-3}))
    assert_refused(IntegrityError, "base-config", recorded, tmp_path)


def test_the_check_can_be_turned_off(recorded: Adapted, tmp_path: Path) -> None:
    edit_tensors(recorded.base, nudge(TARGET))
    report = ours(recorded.base, recorded.adapter, tmp_path / "out", check_base="off")
    assert report.receipt is not None
    assert report.receipt.base.checked == "off"


# --- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [FACTOR_A, FACTOR_B, TARGET, "base_model.model.lm_head.weight"])
def test_a_value_that_is_not_finite(where: str, value: float, tmp_path: Path) -> None:
    adapted = adapt(case(modules_to_save=["lm_head"]), tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[where][2, 3] = value

    edit_tensors(adapted.base if where == TARGET else adapted.adapter, spoil)
    problem = assert_refused(FormatError, "non-finite", adapted, tmp_path)
    assert problem.loc == where
    assert "[2, 3]" in problem.message


def test_trained_rows_that_are_not_finite(tmp_path: Path) -> None:
    adapted = adapt(case(trainable_token_indices=[3, 90]), tmp_path)
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][1, 5] = float("nan")

    edit_tensors(adapted.adapter, spoil)
    problem = assert_refused(FormatError, "non-finite", adapted, tmp_path)
    assert problem.loc == name
    assert "[1, 5]" in problem.message


def test_a_convolution_names_the_index_along_every_axis(tmp_path: Path) -> None:
    adapted = adapt(case(models.convolutions, target_modules=["wide"]), tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["wide.weight"][5, 2, 0, 1] = float("nan")

    edit_tensors(adapted.base, spoil)
    assert "[5, 2, 0, 1]" in assert_refused(FormatError, "non-finite", adapted, tmp_path).message


def test_what_is_not_merged_may_hold_anything(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    name = "model.norm.weight"
    edit_tensors(adapted.base, lambda tensors: tensors[name].fill_(float("nan")))
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert stored(tmp_path / "out")[name].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_result_that_overflows(dtype: torch.dtype, tmp_path: Path) -> None:
    models.llama().to(dtype).save_pretrained(tmp_path / "base")
    adapted = adapt(case(), tmp_path)
    largest = torch.finfo(dtype).max

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[FACTOR_A].fill_(1.0)
        tensors[FACTOR_B].zero_()
        tensors[FACTOR_B][6, :] = largest / 4

    edit_tensors(adapted.adapter, enlarge)
    problem = assert_refused(LossyError, "overflow", adapted, tmp_path)
    assert problem.loc == TARGET
    assert "[6, 0]" in problem.message
    assert "--dtype" in problem.remedy


def test_the_dtype_flag_overflows(tmp_path: Path) -> None:
    """A tensor that is only cast must not become infinite either."""
    adapted = adapt(case(), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[name][4, 9] = 7e4

    edit_tensors(adapted.base, enlarge)
    problem = assert_refused(LossyError, "overflow", adapted, tmp_path, dtype="float16")
    assert problem.loc == name
    assert "[4, 9]" in problem.message


def test_an_attention_module_with_one_input_projection(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(models.HIDDEN, 4, batch_first=True)

    base = models.save_base(Attention(), tmp_path / "base")
    adapted = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["mha"]))
    adapted.save_pretrained(tmp_path / "adapter")
    refused(UnsupportedError, "multihead-attention", base, tmp_path / "adapter", tmp_path / "out")
