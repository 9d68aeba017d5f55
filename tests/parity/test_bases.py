"""The base: bare or with a head, in shards, in any precision; and several adapters at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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
from tests.parity.exact import Factors, assert_exactly_rounded, nearest
from tests.parity.models import VOCAB, outputs_of, perturb_trainable
from tests.parity.oracle import (
    Case,
    adapt,
    assert_close,
    assert_same_outputs,
    assert_same_weights,
    assert_untouched_bits,
    changed_names,
    check_parity,
    load_exactly,
    ours,
    refused,
    stored,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields})


def saved_with(model: nn.Module, config: LoraConfig, folder: Path, seed: int = 3) -> PeftModel:
    """Adapts a model, perturbs all that is trainable, and saves the adapter."""
    adapted = get_peft_model(model, config)
    perturb_trainable(adapted, seed)
    adapted.eval().save_pretrained(folder)
    return adapted


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


# --- several adapters, scales ---------------------------------------------------------------------------


def factors_of(adapter: Path, module: str, **more: Any) -> Factors:
    """Reads one module's factors and its config as the exact formula wants them."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    prefix = f"base_model.model.{module}."
    a, b = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
    return Factors(
        a=a.flatten(1),
        b=b.flatten(1),
        alpha=config["lora_alpha"],
        rank=config["r"],
        root=config["use_rslora"],
        **more,
    )


def two_adapters(folder: Path) -> tuple[Path, Path, Path]:
    """A base and two adapters of different targets, rank, scaling and factor dtype."""
    models.llama().save_pretrained(folder / "base")
    for name, config, seed in (
        ("first", lora(target_modules=["q_proj", "v_proj"]), 3),
        ("second", lora(target_modules=["q_proj", "o_proj"], r=7, lora_alpha=5, use_rslora=True), 4),
    ):
        saved_with(LlamaForCausalLM.from_pretrained(folder / "base"), config, folder / name, seed)
    return folder / "base", folder / "first", folder / "second"


def test_two_adapters_are_summed_exactly_and_rounded_once(tmp_path: Path) -> None:
    base, first, second = two_adapters(tmp_path)
    ours(base, [first, second], tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    for layer in (0, 1):
        module = f"model.layers.{layer}.self_attn"
        both = [factors_of(adapter, f"{module}.q_proj") for adapter in (first, second)]
        name = f"{module}.q_proj.weight"
        assert_exactly_rounded(after[name], before[name], both, count=1024)
        for part, adapter in (("v_proj", first), ("o_proj", second)):
            name = f"{module}.{part}.weight"
            assert_exactly_rounded(after[name], before[name], [factors_of(adapter, f"{module}.{part}")])


def test_the_order_of_two_adapters_does_not_matter(tmp_path: Path) -> None:
    base, first, second = two_adapters(tmp_path)
    one = ours(base, [first, second], tmp_path / "one")
    other = ours(base, [second, first], tmp_path / "other")
    assert one.digest == other.digest


def test_two_adapters_give_the_outputs_of_both_at_once(tmp_path: Path) -> None:
    base, first, second = two_adapters(tmp_path)
    together = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), first, adapter_name="first")
    together.load_adapter(second, adapter_name="second")
    together.base_model.set_adapter(["first", "second"])
    ours(base, [first, second], tmp_path / "out")
    merged = load_exactly(LlamaForCausalLM, tmp_path / "out")
    assert_close(outputs_of(merged), outputs_of(together), "outputs", 1e-5)


@pytest.mark.parametrize("scale", [0.3, 2.0, -1.0, 1e-3])
def test_a_scale_multiplies_the_delta_exactly(scale: float, tmp_path: Path) -> None:
    adapted = adapt(Case(build=models.llama, config=lora), tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "out", scales=(scale,))
    name = "model.layers.1.mlp.down_proj"
    assert_exactly_rounded(
        stored(tmp_path / "out")[f"{name}.weight"],
        stored(adapted.base)[f"{name}.weight"],
        [factors_of(adapted.adapter, name, scale=scale)],
    )


def test_a_scale_is_peft_s_set_scale(tmp_path: Path) -> None:
    adapted = adapt(
        Case(build=models.opt, config=lambda: lora(lora_bias=True, target_modules=["fc1"])), tmp_path
    )
    for module in adapted.model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.25)
    adapted.outputs = outputs_of(adapted.model)
    ours(adapted.base, adapted.adapter, tmp_path / "out", scales=(0.25,))
    merged = adapted.loader(tmp_path / "out")
    assert_same_outputs(merged, adapted)
    assert_same_weights(merged, adapted.model.merge_and_unload())


def test_scale_zero_keeps_the_base_bits(tmp_path: Path) -> None:
    adapted = adapt(Case(build=models.llama, config=lora), tmp_path)
    ours(adapted.base, adapted.adapter, tmp_path / "out", scales=(0.0,))
    assert_untouched_bits(tmp_path / "out", adapted.base, set())


def test_scales_of_two_adapters(tmp_path: Path) -> None:
    base, first, second = two_adapters(tmp_path)
    ours(base, [first, second], tmp_path / "out", scales=(0.5, -0.7))
    name = "model.layers.0.self_attn.q_proj"
    parts = [factors_of(first, name, scale=0.5), factors_of(second, name, scale=-0.7)]
    assert_exactly_rounded(stored(tmp_path / "out")[f"{name}.weight"], stored(base)[f"{name}.weight"], parts)


def test_the_scale_does_not_reach_what_is_trained_whole(tmp_path: Path) -> None:
    adapted = adapt(Case(build=models.llama, config=lambda: lora(modules_to_save=["lm_head"])), tmp_path)
    report = ours(adapted.base, adapted.adapter, tmp_path / "out", scales=(0.5,))
    trained = load_file(adapted.adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(stored(tmp_path / "out")["lm_head.weight"], trained)
    assert any("does not apply to the 1 full tensors" in note for note in report.notes)


# --- precision ------------------------------------------------------------------------------------------

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def in_precision(
    folder: Path, base: torch.dtype, factors: torch.dtype, config: LoraConfig
) -> tuple[Path, Path]:
    """Saves a base and an adapter in given precisions; the values are those of the precision."""
    models.llama().to(base).save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=base)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    perturb_trainable(adapted, 3)
    adapted.save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({n: t.to(factors) for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("root", [False, True], ids=["alpha/r", "alpha/√r"])
@pytest.mark.parametrize("factors", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("base", ["bfloat16", "float16", "float32", "float64"])
def test_every_precision_is_the_exact_formula_rounded_once(
    base: str, factors: str, root: bool, tmp_path: Path
) -> None:
    """PEFT adds in the base's own precision and rounds at each step; the result here is the nearest value."""
    config = lora(target_modules=["q_proj", "down_proj"], r=8, lora_alpha=3, use_rslora=root)
    folders = in_precision(tmp_path, DTYPES[base], DTYPES[factors], config)
    ours(*folders, tmp_path / "out")
    before, after = stored(folders[0]), stored(tmp_path / "out")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        name = f"{module}.weight"
        assert after[name].dtype == DTYPES[base]
        assert_exactly_rounded(after[name], before[name], [factors_of(folders[1], module)])
    assert_untouched_bits(
        tmp_path / "out", folders[0], {n for n in before if "q_proj" in n or "down_proj" in n}
    )


def test_peft_s_own_bfloat16_merge_is_not_the_nearest_value(tmp_path: Path) -> None:
    """The premise of the test above: a good part of PEFT's weights are another bfloat16 value."""
    base, adapter = in_precision(tmp_path, torch.bfloat16, torch.bfloat16, lora())
    ours(base, adapter, tmp_path / "out")
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter, autocast_adapter_dtype=False
    )
    reference = model.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    found = stored(tmp_path / "out")[name]
    assert not torch.equal(found, reference[name])
    assert_close(found, reference[name], name, 2.0**-7)


def test_an_adapter_that_peft_kept_in_float32_over_a_bfloat16_base(tmp_path: Path) -> None:
    models.llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    saved_with(model, lora(modules_to_save=["lm_head"]), tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for n, t in saved.items() if "lora_" in n} == {torch.float32}
    ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.v_proj"
    assert_exactly_rounded(
        after[f"{name}.weight"], before[f"{name}.weight"], [factors_of(tmp_path / "adapter", name)], count=512
    )
    assert torch.equal(after["lm_head.weight"], saved["base_model.model.lm_head.weight"].to(torch.bfloat16))


@pytest.mark.parametrize("to", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("base", ["bfloat16", "float32"])
def test_the_dtype_flag_rounds_the_exact_value_once(base: str, to: str, tmp_path: Path) -> None:
    folders = in_precision(tmp_path, DTYPES[base], torch.float32, lora(target_modules=["q_proj"]))
    ours(*folders, tmp_path / "out", dtype=to)
    before, after = stored(folders[0]), stored(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {DTYPES[to]}
    name = "model.layers.0.self_attn.q_proj"
    assert_exactly_rounded(after[f"{name}.weight"], before[f"{name}.weight"], [factors_of(folders[1], name)])
    for other in before.keys() - {n for n in before if "q_proj" in n}:
        assert torch.equal(after[other], before[other].to(DTYPES[to])), other
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == to
    load_exactly(LlamaForCausalLM, tmp_path / "out", dtype=DTYPES[to])


def test_bfloat16_convolution_embedding_and_bias(tmp_path: Path) -> None:
    """The other layouts in bfloat16: each element against the formula of its kind."""
    made = models.convolutions().to(torch.bfloat16)
    base = models.save_base(made, tmp_path / "base")
    adapted = get_peft_model(
        made, lora(target_modules=["wide"], lora_bias=True), autocast_adapter_dtype=False
    )
    perturb_trainable(adapted, 3)
    adapted.save_pretrained(tmp_path / "adapter")
    ours(base, tmp_path / "adapter", tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    part = factors_of(tmp_path / "adapter", "wide")
    assert_exactly_rounded(after["wide.weight"].flatten(1), before["wide.weight"].flatten(1), [part])
    bias = load_file(tmp_path / "adapter/adapter_model.safetensors")["base_model.model.wide.lora_B.bias"]
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    whole = Factors(a=one, b=bias[:, None], alpha=part.alpha, rank=part.rank)
    assert_exactly_rounded(after["wide.bias"][:, None], before["wide.bias"][:, None], [whole])


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_embedding(tied: bool, tmp_path: Path) -> None:
    models.llama(tied=tied).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapted = get_peft_model(
        model, lora(target_modules=["embed_tokens"], use_rslora=True), autocast_adapter_dtype=False
    )
    perturb_trainable(adapted, 3)
    adapted.save_pretrained(tmp_path / "adapter")
    ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    part = Factors(a=tensors[f"{prefix}B"].t(), b=tensors[f"{prefix}A"].t(), alpha=6, rank=4, root=True)
    name = "model.embed_tokens.weight"
    before, after = stored(tmp_path / "base"), stored(tmp_path / "out")
    assert_exactly_rounded(after[name], before[name], [part])
    assert before[name].shape == (VOCAB, models.HIDDEN)
    if tied:
        assert torch.equal(after["lm_head.weight"], before[name])


def test_the_yardstick_itself() -> None:
    """``nearest`` agrees with torch where torch rounds once, and ties go to even."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(1)
    values = torch.randn(500, generator=generator) * torch.logspace(-44, 4, 500, base=10.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = values.to(dtype)
        for value, expected in zip(values.tolist(), rounded.tolist(), strict=True):
            assert nearest(Fraction(value), dtype) == Fraction(expected)
    assert nearest(Fraction(257), torch.bfloat16) == 256
    assert nearest(Fraction(259), torch.bfloat16) == 260


@pytest.mark.slow
@pytest.mark.parametrize("root", [False, True], ids=["alpha/r", "alpha/√r"])
def test_a_layer_of_real_width(root: bool, tmp_path: Path) -> None:
    """A bfloat16 matrix of 2048 × 1024 at rank 64: two thousand elements against the exact formula."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(1024, 2048, bias=False)).to(torch.bfloat16)
    base = models.save_base(layer, tmp_path / "base")
    adapted = get_peft_model(
        layer,
        lora(target_modules=["0"], r=64, lora_alpha=16, use_rslora=root),
        autocast_adapter_dtype=False,
    )
    perturb_trainable(adapted, 3, 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    ours(base, tmp_path / "adapter", tmp_path / "out")
    assert_exactly_rounded(
        stored(tmp_path / "out")["0.weight"],
        stored(base)["0.weight"],
        [factors_of(tmp_path / "adapter", "0")],
        count=2000,
    )
