"""What must not be merged: each with its class of error and a remedy, and with nothing left at the output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adapterhub_tools.errors import (
    AdapterError,
    FormatError,
    IntegrityError,
    LossyError,
    MismatchError,
    UnsupportedError,
)
from adapterhub_tools.ops.init import init
from tests.parity import models
from tests.parity.oracle import (
    WEIGHTS,
    Adapted,
    Case,
    adapt,
    assert_close,
    assert_same_outputs,
    load_exactly,
    ours,
    refused,
    stored,
)

FACTOR_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
FACTOR_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
TARGET = "model.layers.1.self_attn.q_proj.weight"


def case(build: Callable[[], Any] = models.llama, **fields: Any) -> Case:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **fields}
    return Case(build=build, config=lambda: LoraConfig(**fields))


def edit_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors of a folder's only weight file in place."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def assert_refused(
    error: type[AdapterError], kind: str, adapted: Adapted, tmp_path: Path, **options: Any
) -> Any:
    return refused(error, kind, adapted.base, adapted.adapter, tmp_path / "out", **options)


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


# --- methods that do not exist here yet: when one lands, its line goes and parity tests come --------------

METHODS_WITHOUT_MERGE = {
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
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2},
    "VERA": {},
    "WAVEFT": {"n_frequency": 10},
    "PROMPT_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "PREFIX_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "P_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("name", METHODS_WITHOUT_MERGE)
def test_another_method_is_refused(name: str, tmp_path: Path) -> None:
    options = dict(METHODS_WITHOUT_MERGE[name])
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


def test_an_embedding_that_more_than_two_share(tmp_path: Path) -> None:
    adapted = adapt(case(models.t5, target_modules=["q", "shared"]), tmp_path)
    assert_refused(UnsupportedError, "tied-unsupported", adapted, tmp_path, accept_embeddings=True)


def test_two_adapters_that_replace_one_tensor(tmp_path: Path) -> None:
    adapted = adapt(case(modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(MismatchError) as caught:
        ours(adapted.base, [adapted.adapter, adapted.adapter], tmp_path / "out")
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
    init(adapted.adapter, base=adapted.base, cache=False)
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
