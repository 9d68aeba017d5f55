"""Adapters saved by PEFT itself: every tensor is accounted for, and nothing is reported that is not so."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from adapterhub_tools import registry
from adapterhub_tools.dialects import peft as dialect
from adapterhub_tools.model.tensor import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore")


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    config.use_cache = False
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=64,
            num_local_experts=4,
        )
    )


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv2d = torch.nn.Conv2d(8, 12, 3)
        self.conv1d = torch.nn.Conv1d(8, 12, 3)
        self.conv3d = torch.nn.Conv3d(8, 12, 3)
        self.grouped = torch.nn.Conv2d(8, 12, 3, groups=2)

    def forward(self, x):
        return x


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = torch.nn.MultiheadAttention(32, 4)

    def forward(self, x):
        return self.mha(x, x, x)[0]


def saved(model, config, path, **options):
    """Saves with PEFT and returns the header and the config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config).save_pretrained(path, **options)
    header = {}
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        for name in list(file.keys()):
            part = file.get_slice(name)
            header[name] = TensorSpec(name=name, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
    return header, json.loads((path / "adapter_config.json").read_text())


def accounted(adapter):
    names = [spec.name for module in adapter.modules for spec in module.factors.values()]
    return sorted([*names, *(f.tensor.name for f in adapter.full), *adapter.unparsed["tensors"]])


def examine(model, config, path, **options):
    """Returns the adapter and its problems after checking that every tensor has exactly one place."""
    header, fields = saved(model, config, path, **options)
    adapter, problems = dialect.examine(header, fields)
    assert accounted(adapter) == sorted(header)
    assert dialect.detect(header, fields)
    return adapter, [p for p in problems if p.severity == "error"]


def kinds(adapter):
    return {module.path: module.kind for module in adapter.modules}


def blockers(adapter):
    return {kind for kind, _, _ in adapter.blockers}


def test_linear(tmp_path):
    adapter, problems = examine(
        llama(), LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"]), tmp_path
    )
    assert not problems
    assert (adapter.dialect, adapter.method, adapter.blockers, adapter.notes) == ("peft", "lora", (), ())
    assert [m.path for m in adapter.modules] == [
        f"model.layers.{i}.{p}" for i in (0, 1) for p in ("mlp.down_proj", "self_attn.q_proj")
    ]
    module = adapter.modules[0]
    assert module.hparams == {"rank": 4, "alpha": 10, "scaling": "alpha/rank", "fan_in_fan_out": False}
    assert (module.kind, module.factors["A"].shape, module.factors["B"].shape) == ("linear", (4, 64), (64, 4))
    assert adapter.parameters == sum(4 * (64 + 64) for _ in range(4))
    assert adapter.base is None


def test_conv1d_of_gpt2(tmp_path):
    config = LoraConfig(r=4, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, use_rslora=True)
    adapter, problems = examine(gpt2(), config, tmp_path)
    assert not problems
    assert set(kinds(adapter).values()) == {"conv1d"}
    assert adapter.modules[0].hparams["fan_in_fan_out"] is True
    assert adapter.modules[0].hparams["scaling"] == adapter.hparams["scaling"] == "alpha/sqrt(rank)"


def test_convolutions(tmp_path):
    config = LoraConfig(r=4, target_modules=["conv1d", "conv2d", "conv3d", "grouped"])
    adapter, problems = examine(Convolutions(), config, tmp_path)
    assert not problems
    assert kinds(adapter) == {"conv1d": "convnd", "conv2d": "conv2d", "conv3d": "convnd", "grouped": "conv2d"}
    assert blockers(adapter) == {"grouped-convolution"}
    assert next(m for m in adapter.modules if m.path == "grouped").hparams["groups"] == 2


@pytest.mark.parametrize("names", [["conv2d", "conv3d"], ["q_proj"], ["embed_tokens"]])
def test_dora(names, tmp_path):
    model = Convolutions() if names[0] == "conv2d" else llama()
    adapter, problems = examine(model, LoraConfig(r=4, target_modules=names, use_dora=True), tmp_path)
    assert not problems
    assert adapter.method == "dora"
    assert not blockers(adapter)
    assert all("magnitude" in m.factors for m in adapter.modules)


def test_embedding_saves_the_base_too(tmp_path):
    adapter, problems = examine(llama(), LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path)
    assert not problems
    assert kinds(adapter) == {"model.embed_tokens": "embedding"}
    assert {r: s.shape for r, s in adapter.modules[0].factors.items()} == {"A": (4, 64), "B": (64, 4)}
    assert [(f.target, f.role) for f in adapter.full] == [("model.embed_tokens.weight", "saved_embedding")]


def test_embedding_and_head_by_regex(tmp_path):
    config = LoraConfig(r=4, target_modules=r".*(embed_tokens|lm_head|q_proj)")
    adapter, problems = examine(llama(), config, tmp_path)
    assert not problems
    assert [f.target for f in adapter.full] == ["lm_head.weight", "model.embed_tokens.weight"]


def test_embeddings_saved_on_request_need_the_flag(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    adapter, problems = examine(llama(), config, tmp_path, save_embedding_layers=True)
    assert [p.kind for p in problems] == ["saved-embedding", "saved-embedding"]
    assert all("--accept-embeddings" in p.remedy for p in problems)
    assert [(f.target, f.role) for f in adapter.full] == [
        ("lm_head.weight", "saved_embedding"),
        ("model.embed_tokens.weight", "saved_embedding"),
    ]


def test_patterns(tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.v_proj": 2, r"^model\..*\.0\..*q_proj": 3, "q_proj": 5},
        alpha_pattern={"v_proj": 16, "layers.1.self_attn.v_proj": 7},
    )
    adapter, problems = examine(llama(), config, tmp_path)
    assert not problems
    found = {
        m.path.removeprefix("model.layers."): (m.hparams["rank"], m.hparams["alpha"]) for m in adapter.modules
    }
    assert found == {
        "0.self_attn.q_proj": (3, 8),
        "0.self_attn.v_proj": (4, 16),
        "1.self_attn.q_proj": (5, 8),
        "1.self_attn.v_proj": (2, 7),  # saving sorted the keys, so the more precise one comes first now
    }
    _, problems = dialect.examine(*saved(llama(), config, tmp_path))
    assert [(p.kind, p.severity) for p in problems] == [("pattern-order", "warning")]


def test_narrowed_targets(tmp_path):
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
        exclude_modules=["v_proj"],
    )
    adapter, problems = examine(llama(), config, tmp_path)
    assert not problems
    assert list(kinds(adapter)) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("target", ["all-linear", r".*\.(q|v)_proj"])
def test_targets_as_text(target, tmp_path):
    adapter, problems = examine(llama(), LoraConfig(r=4, target_modules=target), tmp_path)
    assert not problems
    assert len(adapter.modules) == (14 if target == "all-linear" else 4)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("save", [None, ["o_proj"]])
def test_bias(bias, save, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], bias=bias, modules_to_save=save)
    adapter, problems = examine(llama(), config, tmp_path)
    assert not problems
    biases = {f.target for f in adapter.full if f.role == "bias"}
    parts = (
        ["q_proj"] if bias == "lora_only" else ["q_proj", "k_proj", "v_proj"] + ([] if save else ["o_proj"])
    )
    assert biases == {f"model.layers.{i}.self_attn.{p}.bias" for i in (0, 1) for p in parts}
    if save:
        whole = {f.target for f in adapter.full if f.role == "modules_to_save"}
        assert whole == {f"model.layers.{i}.self_attn.o_proj.{p}" for i in (0, 1) for p in ("weight", "bias")}


def test_lora_bias(tmp_path):
    adapter, problems = examine(llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), tmp_path)
    assert not problems
    assert adapter.modules[0].factors["bias"].shape == (64,)


def test_modules_to_save(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapter, problems = examine(llama(), config, tmp_path)
    assert not problems
    assert [(f.target, f.role) for f in adapter.full] == [
        ("lm_head.weight", "modules_to_save"),
        ("model.embed_tokens.weight", "modules_to_save"),
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[5, 3], {"embed_tokens": [5, 3]}])
def test_trainable_tokens(indices, tied, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices)
    adapter, problems = examine(llama(tied), config, tmp_path)
    assert not problems
    (full,) = adapter.full
    assert (full.target, full.role, full.rows) == ("model.embed_tokens.weight", "token_rows", (5, 3))


def test_weight_tying_is_kept(tmp_path):
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    adapter, problems = examine(llama(tied=True), config, tmp_path)
    assert not problems
    assert adapter.ties
    assert {f.role for f in adapter.full} == {"modules_to_save"}


def test_tied_targets(tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapter, problems = examine(llama(tied=True), config, tmp_path)
    assert not problems
    assert kinds(adapter) == {"lm_head": "linear", "model.embed_tokens": "embedding"}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"init_lora_weights": "pissa"}, "altered-base"),
        ({"init_lora_weights": "pissa_niter_2"}, "altered-base"),
        ({"init_lora_weights": "olora"}, "altered-base"),
        ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, "altered-base"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer-replication"),
        (
            {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
            "method",
        ),
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "unmergeable"),
    ],
)
def test_what_cannot_be_merged_says_why(options, kind, tmp_path):
    adapter, problems = examine(llama(), LoraConfig(r=4, target_modules=["q_proj"], **options), tmp_path)
    assert not problems
    assert kind in blockers(adapter)
    assert all(remedy for _, _, remedy in adapter.blockers)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False},
        {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
        {"monteclora_config": peft.tuners.lora.config.MontecloraConfig(num_samples=2)},
    ],
)
def test_what_only_shaped_training_does_not_block(options, tmp_path):
    adapter, problems = examine(llama(), LoraConfig(r=4, target_modules=["q_proj"], **options), tmp_path)
    assert not problems
    assert adapter.blockers == ()
    assert all(set(m.factors) == {"A", "B"} for m in adapter.modules)


def test_experts(tmp_path):
    config = LoraConfig(
        r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    adapter, problems = examine(mixtral(), config, tmp_path)
    assert not problems
    assert blockers(adapter) == {"experts"}
    assert [(m.path, m.kind, m.hparams.get("nesting", 0)) for m in adapter.modules] == [
        ("model.layers.0.mlp.experts", "expert", 0),
        ("model.layers.0.mlp.experts", "expert", 1),
    ]


def test_multihead_attention(tmp_path):
    adapter, problems = examine(Attention(), LoraConfig(r=4, target_modules=["mha"]), tmp_path)
    assert not problems
    assert sorted(kinds(adapter)) == ["mha", "mha.out_proj"]
    assert blockers(adapter) == {"multihead-attention"}


OPTIONS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "CPT": {
        "task_type": "CAUSAL_LM",
        "cpt_token_ids": [1, 2],
        "cpt_mask": [1, 1],
        "cpt_tokens_type_mask": [1, 2],
    },
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_tasks": 2},
    "OFT": {"oft_block_size": 8, "r": 0},
    "PEANUT": {"depth": 2},
    "PREFIX_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "PROMPT_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "P_TUNING": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "SHADOW": {"task_type": "CAUSAL_LM"},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2},
    "WAVEFT": {"n_frequency": 10},
}
LEFT_OUT = {
    "ADAMSS": "needs scikit-learn",
    "XLORA": "needs trained LoRA adapters on disk",
}
TYPES = sorted(str(getattr(t, "value", t)) for t in PEFT_TYPE_TO_CONFIG_MAPPING)


@pytest.mark.parametrize("name", [t for t in TYPES if t not in {"LORA", *LEFT_OUT}])
def test_every_other_type_is_described(name, tmp_path):
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    options = dict(OPTIONS.get(name, {}))
    if "target_modules" in config_class.__dataclass_fields__ and name != "ADAPTION_PROMPT":
        options.setdefault("target_modules", ["q_proj", "v_proj"])
    adapter, problems = examine(llama(), config_class(**options), tmp_path)
    assert not problems
    assert adapter.method == name.lower()
    assert adapter.modules or adapter.full
    known = adapter.method in registry.names("methods") or name == "TRAINABLE_TOKENS"
    expected = {"UNILORA": {"not-reproducible"}}.get(name, set() if known else {"method", "unmergeable"})
    assert blockers(adapter) <= expected
    assert bool(blockers(adapter)) is bool(expected)
    assert adapter.parameters > 0
