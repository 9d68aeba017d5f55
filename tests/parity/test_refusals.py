"""What must not be merged: each with its class of error and a remedy, and with nothing left at the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from adapterhub_tools import registry
from adapterhub_tools.errors import (
    FormatError,
    MismatchError,
    UnsupportedError,
)
from tests.parity import models
from tests.parity.damage import (
    FACTOR_A,
    FACTOR_B,
    assert_refused,
    case,
    edit_config,
    edit_tensors,
)
from tests.parity.oracle import (
    Adapted,
    adapt,
    assert_same_outputs,
    load_exactly,
    ours,
    refused,
)

# --- adapters whose base was altered, or that no single weight stands for --------------------------------

INITIALISATIONS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA"]


@pytest.mark.parametrize("how", INITIALISATIONS)
def test_an_initialisation_that_altered_the_base(how: str, tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    edit_config(adapted.adapter, init_lora_weights=how)
    problem = assert_refused(UnsupportedError, "altered-base", adapted, tmp_path)
    assert "base" in problem.remedy


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("convert", [False, True], ids=["as trained", "converted"])
def test_an_altered_base_as_peft_saves_it(how: str, convert: bool, tmp_path: Path) -> None:
    """As trained it is refused; the form that PEFT converts for the plain base merges right."""
    models.llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=how),
    )
    if convert:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = how
    models.perturb_trainable(model, 3)
    outputs = models.outputs_of(model.eval())
    if not convert:
        model.save_pretrained(tmp_path / "adapter")
        refused(UnsupportedError, "altered-base", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        return
    model.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8  # the premise: the converted form has twice the rank
    ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    adapted = Adapted(
        base=tmp_path / "base",
        adapter=tmp_path / "adapter",
        model=model,
        outputs=outputs,
        rows=models.VOCAB,
        loader=lambda folder: load_exactly(LlamaForCausalLM, folder),
    )
    assert_same_outputs(adapted.loader(tmp_path / "out"), adapted)


VARIANTS = {
    "KaSA": ("altered-base", case(kasa_config=KasaConfig())),
    "aLoRA": ("unmergeable", case(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")),
    "layer replication": ("layer-replication", case(layer_replication=[[0, 2], [0, 2]])),
    "experts": (
        "experts",
        case(models.mixtral, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]),
    ),
    "grouped convolution": ("grouped-convolution", case(models.convolutions, target_modules=["grouped"])),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_cannot_be_merged(name: str, tmp_path: Path) -> None:
    kind, variant = VARIANTS[name]
    assert_refused(UnsupportedError, kind, adapt(variant, tmp_path), tmp_path)


@pytest.mark.parametrize("field", ["use_qalora", "use_bdlora", "arrow_config", "megatron_config"])
def test_a_variant_by_its_config(field: str, tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    edit_config(adapted.adapter, **{field: True if field == "use_qalora" else {"nblocks": 2}})
    with pytest.raises(UnsupportedError) as caught:
        ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert all(problem.remedy for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


# --- methods that do not exist here: one that lands in the registry has parity tests of its own -----------

OTHER_TYPES = {
    "DORA": {"use_dora": True},
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {},
    "LOKR": {},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8, "r": 0},
    "RANDLORA": {},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2},
    "VERA": {},
    "WAVEFT": {"n_frequency": 10},
    "PROMPT_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "PREFIX_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "P_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("name", [n for n in OTHER_TYPES if n.lower() not in registry.names("methods")])
def test_another_method_is_refused(name: str, tmp_path: Path) -> None:
    options = dict(OTHER_TYPES[name])
    config_class = LoraConfig if name == "DORA" else PEFT_TYPE_TO_CONFIG_MAPPING[name]
    if "target_modules" in config_class.__dataclass_fields__ and name != "ADAPTION_PROMPT":
        options.setdefault("target_modules", ["q_proj", "v_proj"])
    models.llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config_class(**options))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError) as caught:
        ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert {problem.kind for problem in caught.value.problems} <= {"method", "unmergeable"}
    assert all(problem.remedy for problem in caught.value.problems)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    (adapted.adapter / "adapter_model.safetensors").unlink()
    (adapted.adapter / "adapter_model.bin").write_bytes(b"never opened")
    problem = assert_refused(UnsupportedError, "pickle", adapted, tmp_path)
    assert "safetensors" in problem.remedy


# --- files that are incomplete or hold more than the config says -----------------------------------------


def test_an_extra_module(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        for name in (FACTOR_A, FACTOR_B):
            tensors[name.replace("q_proj", "o_proj")] = tensors[name].clone()

    edit_tensors(adapted.adapter, add)
    problem = assert_refused(FormatError, "unknown-key", adapted, tmp_path)
    assert "o_proj" in problem.loc


def test_an_extra_base_tensor(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    extra = "base_model.model.model.norm.weight"
    edit_tensors(adapted.adapter, lambda tensors: tensors.update({extra: torch.ones(models.HIDDEN)}))
    assert assert_refused(FormatError, "base-overwrite", adapted, tmp_path).loc == extra


@pytest.mark.parametrize("name", [FACTOR_A, FACTOR_B])
def test_a_factor_without_its_pair(name: str, tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    edit_tensors(adapted.adapter, lambda tensors: tensors.pop(name))
    problem = assert_refused(FormatError, "missing-pair", adapted, tmp_path)
    assert problem.loc in (FACTOR_A, FACTOR_B)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q|v)_proj", "all-linear"])
def test_a_layer_whose_module_is_missing(targets: Any, tmp_path: Path) -> None:
    adapted = adapt(case(target_modules=targets), tmp_path)

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[FACTOR_A], tensors[FACTOR_B]

    edit_tensors(adapted.adapter, drop)
    problem = assert_refused(MismatchError, "coverage", adapted, tmp_path)
    assert "model.layers.1.self_attn.q_proj" in str(problem)


def test_a_whole_layer_that_is_missing(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            del tensors[name]

    edit_tensors(adapted.adapter, drop)
    problem = assert_refused(MismatchError, "coverage", adapted, tmp_path)
    assert "model.layers.0.self_attn" in str(problem)


def test_a_kind_of_module_that_is_missing_everywhere(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "v_proj" in name]:
            del tensors[name]

    edit_tensors(adapted.adapter, drop)
    problem = assert_refused(MismatchError, "coverage", adapted, tmp_path)
    assert "v_proj" in str(problem)


def test_factors_of_integers(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    edit_tensors(adapted.adapter, lambda t: t.update({FACTOR_A: (t[FACTOR_A] * 100).to(torch.int8)}))
    assert assert_refused(FormatError, "dtype", adapted, tmp_path).loc == FACTOR_A


def test_the_rank_of_the_config_is_not_that_of_the_file(tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    edit_config(adapted.adapter, r=8)
    assert_refused(FormatError, "rank", adapted, tmp_path)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0, -4, 1e300])
def test_an_alpha_that_is_no_scale(alpha: float, tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    edit_config(adapted.adapter, lora_alpha=alpha)
    with pytest.raises(FormatError) as caught:
        ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert all(problem.remedy for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["alpha_pattern", "rank_pattern"])
def test_a_pattern_that_does_not_belong_to_the_file(pattern: str, tmp_path: Path) -> None:
    adapted = adapt(case(), tmp_path)
    edit_config(adapted.adapter, **{pattern: {"q_proj": -1}})
    with pytest.raises(FormatError) as caught:
        ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert all(problem.remedy for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()
