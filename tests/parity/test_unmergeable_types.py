"""PEFT types that are not merged: described, validated, recorded in a manifest, and refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import ArrowConfig
from safetensors.torch import save_file

import adapterhub_tools as at
from adapterhub_tools import registry
from adapterhub_tools.dialects._peft.config import table
from adapterhub_tools.errors import UnsupportedError
from tests.parity import models
from tests.parity.oracle import refused

CAUSAL = {"task_type": "CAUSAL_LM"}
PROMPT = {**CAUSAL, "num_virtual_tokens": 3}
LINEAR = {"target_modules": ["q_proj", "v_proj"]}

NONE = {
    "ADAPTION_PROMPT": {**CAUSAL, "adapter_len": 4, "adapter_layers": 1},
    "CARTRIDGE": PROMPT,
    "CPT": {**CAUSAL, "cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "LILY": LINEAR,
    "MULTITASK_PROMPT_TUNING": {**PROMPT, "num_tasks": 2},
    "POLY": LINEAR,
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": PROMPT,
    "SHADOW": CAUSAL,
}
"""Types for which no weight stands, and how to make one."""

BY_PEFT_ONLY = {
    "FROD": LINEAR,
    "GLORA": LINEAR,
    "OSF": LINEAR,
    "PEANUT": {**LINEAR, "depth": 2},
    "PSOFT": {**LINEAR, "r": 4},
    "TINYLORA": LINEAR,
}
"""Types that PEFT can merge, by what it computes when it loads them."""

ELSEWHERE = {"ADAMSS": "PEFT itself needs scikit-learn for it", "XLORA": "below", "TRAINABLE_TOKENS": "rows"}


def test_every_type_is_merged_or_refused_by_name():
    rows, _ = table()
    merged = {name for name, row in rows.items() if row.method in registry.names("methods")}
    known = {str(getattr(t, "value", t)) for t in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known - merged == set(NONE) | set(BY_PEFT_ONLY) | set(ELSEWHERE)


def base_of(folder: Path) -> Any:
    model = models.llama()
    models.save_base(model, folder / "base")
    return model


def save(name: str, folder: Path, options: dict[str, Any]) -> None:
    model = base_of(folder)
    model.config.use_cache = False
    adapted = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[name](**options))
    models.perturb_trainable(adapted, 3)
    adapted.save_pretrained(folder / "adapter")


def round_trip(folder: Path) -> Any:
    """Describes, validates, records, validates again; then a merge is refused."""
    adapter, base = folder / "adapter", folder / "base"
    assert not at.inspect(adapter).to_json()["mergeable"]
    assert at.validate(adapter).ok
    report = at.init(adapter)
    assert report.manifest.digest
    assert at.validate(adapter).ok
    return refused(UnsupportedError, expected_kind(adapter), base, adapter, folder / "out")


def expected_kind(adapter: Path) -> str:
    warnings = [problem for problem in at.validate(adapter).problems if problem.severity == "warning"]
    kinds = {problem.kind for problem in warnings if "cannot be merged" in problem.message}
    assert len(kinds) == 1, warnings
    return kinds.pop()


@pytest.mark.parametrize("name", NONE)
def test_no_weight_stands_for_it(name, tmp_path):
    save(name, tmp_path, NONE[name])
    problem = round_trip(tmp_path)
    assert problem.kind == "unmergeable"
    assert name in problem.message


@pytest.mark.parametrize("name", BY_PEFT_ONLY)
def test_only_peft_can_merge_it(name, tmp_path):
    save(name, tmp_path, BY_PEFT_ONLY[name])
    problem = round_trip(tmp_path)
    assert problem.kind == "method"
    assert name in problem.message
    assert "PEFT" in problem.remedy


def lora(folder: Path, **fields: Any) -> None:
    adapted = get_peft_model(models.llama(), LoraConfig(r=2, **LINEAR, **fields))
    models.perturb_trainable(adapted, 3)
    adapted.save_pretrained(folder)


def test_a_mixture_of_adapters(tmp_path):
    base_of(tmp_path)
    for name in ("one", "two"):
        lora(tmp_path / name)
    model = models.llama()
    model.config.use_cache = False
    config = XLoraConfig(
        hidden_size=models.HIDDEN,
        xlora_depth=1,
        adapters={"0": str(tmp_path / "one"), "1": str(tmp_path / "two")},
        **CAUSAL,
    )
    mixed = get_peft_model(model, config)
    mixed.save_pretrained(tmp_path / "adapter")
    # PEFT 0.21 saves no tensor of it; older releases saved the classifier.
    classifier = {n: t.contiguous() for n, t in mixed.state_dict().items() if "xlora_classifier" in n}
    save_file(classifier, tmp_path / "adapter" / "adapter_model.safetensors")
    assert round_trip(tmp_path).kind == "unmergeable"


def test_an_activated_adapter(tmp_path):
    base_of(tmp_path)
    lora(tmp_path / "adapter", alora_invocation_tokens=[5, 6], **CAUSAL)
    problem = round_trip(tmp_path)
    assert problem.kind == "unmergeable"
    assert "alora" in problem.message.lower()


def test_a_routed_set_of_adapters(tmp_path):
    base_of(tmp_path)
    lora(tmp_path / "one", **CAUSAL)
    lora(tmp_path / "two", **CAUSAL)
    routed = create_arrow_model(
        base_model=models.llama(),
        task_specific_adapter_paths=[str(tmp_path / "one"), str(tmp_path / "two")],
        arrow_config=ArrowConfig(top_k=1),
    )
    assert isinstance(routed, PeftModel)
    routed.save_pretrained(tmp_path / "routed", selected_adapters=["arrow_router"])
    adapter = tmp_path / "routed" / "arrow_router"
    adapter.rename(tmp_path / "adapter")
    kinds = {problem.kind for problem in at.validate(tmp_path / "adapter").problems}
    assert kinds & {"unmergeable", "empty"}
    with pytest.raises(UnsupportedError):
        at.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_prompts_are_not_compared_with_weights(tmp_path):
    """An adapter whose tensors belong to no module fits any base, and its manifest can record that base."""
    save("PROMPT_TUNING", tmp_path, NONE["PROMPT_TUNING"])
    manifest = at.init(tmp_path / "adapter", base=tmp_path / "base").manifest
    (module,) = manifest.adapter.modules
    assert module.path == "*"
    assert manifest.base.digest
    assert at.validate(tmp_path / "adapter", base=tmp_path / "base").ok
