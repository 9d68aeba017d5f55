"""Files of the adapters library: described by config and keys, recorded, validated, never merged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import adapterhub_tools as at
from adapterhub_tools.dialects import adapters_lib, peft
from adapterhub_tools.errors import UnsupportedError
from adapterhub_tools.model.tensor import TensorSpec

BOTTLENECK = {
    "config": {
        "adapter_residual_before_ln": False,
        "inv_adapter": None,
        "leave_out": [],
        "non_linearity": "relu",
        "phm_layer": False,
        "reduction_factor": 16,
        "scaling": 1.0,
    },
    "hidden_size": 768,
    "model_class": "BertAdapterModel",
    "model_name": "bert-base-multilingual-cased",
    "model_type": "bert",
    "name": "md",
    "version": "adapters.1.0.1",
}
KEYS = {
    "bert.encoder.layer.0.output.adapters.md.adapter_down.0.weight": (48, 768),
    "bert.encoder.layer.0.output.adapters.md.adapter_down.0.bias": (48,),
    "bert.encoder.layer.0.output.adapters.md.adapter_up.weight": (768, 48),
    "bert.encoder.layer.0.output.adapters.md.adapter_up.bias": (768,),
}


def header(keys):
    return {name: TensorSpec(name=name, dtype="F32", shape=shape) for name, shape in keys.items()}


def write(folder, config=BOTTLENECK, keys=KEYS, file="adapter.safetensors"):
    folder.mkdir()
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: torch.ones(shape) for name, shape in keys.items()}, folder / file)
    return folder


def described(keys, config):
    """The adapter that the files describe, nothing being wrong with them."""
    adapter, problems = adapters_lib.examine(header(keys), config)
    assert [problem for problem in problems if problem.severity == "error"] == []
    return adapter


def with_architecture(name, **fields):
    return {**BOTTLENECK, "config": {"architecture": name, **fields}}


def test_a_bottleneck_adapter_is_described():
    adapter = described(KEYS, BOTTLENECK)
    assert (adapter.dialect, adapter.method) == ("adapters_lib", "bottleneck")
    assert adapter.hparams["reduction_factor"] == 16
    assert adapter.hparams["scale"] == 1.0
    assert adapter.base is not None
    assert (adapter.base.id, adapter.base.architecture) == ("bert-base-multilingual-cased", "bert")
    (module,) = adapter.modules
    assert module.path == "*"
    assert "bert.encoder.layer.0.output.adapters.adapter_up.weight" in module.factors
    assert adapter.parameters == 2 * 48 * 768 + 48 + 768


@pytest.mark.parametrize(
    ("architecture", "keys", "kind"),
    [
        ("lora", {"bert.layer.0.query.loras.md.lora_A": (8, 32)}, "method"),
        ("prefix_tuning", {"bert.layer.0.prefix_tunings.md.wte.weight": (3, 32)}, "unmergeable"),
        ("prompt_tuning", {"bert.prompt_tunings.md.prompt_embedding.weight": (3, 32)}, "unmergeable"),
        ("reft", {"bert.layer.0.refts.md.units.0.learned_source.weight": (3, 32)}, "unmergeable"),
        ("union", KEYS, "unmergeable"),
    ],
)
def test_other_architectures(architecture, keys, kind):
    adapter = described(keys, with_architecture(architecture, r=8, alpha=16))
    assert adapter.method == architecture
    assert adapter.hparams["rank"] == 8
    ((found, message, remedy),) = adapter.blockers
    assert found == kind
    assert message
    assert remedy


def test_a_preset_by_name():
    adapter = described(KEYS, {**BOTTLENECK, "config": "pfeiffer"})
    assert adapter.hparams == {"preset": "pfeiffer"}


def test_without_a_config_the_keys_tell():
    assert adapters_lib.detect(header(KEYS), None)
    _, problems = adapters_lib.examine(header(KEYS), None)
    assert [problem.kind for problem in problems] == ["missing-config"]


@pytest.mark.parametrize(
    ("keys", "config"),
    [
        ({"base_model.model.q.lora_A.weight": (4, 32)}, {"peft_type": "LORA", "r": 4}),
        ({"base_model.model.q.lora_A.weight": (4, 32)}, None),
        ({}, None),
        ({"heads.md.1.weight": (2, 32)}, None),
        ({}, {"config": {}, "peft_type": "LORA", "model_class": "X"}),
    ],
)
def test_other_files_are_not_taken(keys, config):
    assert not adapters_lib.detect(header(keys), config)


def test_peft_does_not_take_them():
    assert not peft.detect(header(KEYS), BOTTLENECK)
    assert not peft.detect(header(KEYS), None)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({**BOTTLENECK, "config": 7}, "config-type"),
        (with_architecture("novel"), "config-value"),
        (with_architecture(["a"]), "config-value"),
    ],
)
def test_damage_is_named(config, kind):
    _, problems = adapters_lib.examine(header(KEYS), config)
    assert [problem.kind for problem in problems] == [kind]
    assert problems[0].remedy


@pytest.mark.parametrize("rank", [0, -1, "eight", 2.5])
def test_a_rank_that_is_none_is_left_out(rank):
    adapter, _ = adapters_lib.examine(header(KEYS), with_architecture("lora", r=rank))
    assert "rank" not in adapter.hparams or adapter.hparams["rank"] == rank > 0


def test_no_tensors_of_an_adapter():
    adapter, problems = adapters_lib.examine(header({"heads.md.1.weight": (2, 32)}), BOTTLENECK)
    assert not adapter.modules
    assert {problem.kind for problem in problems} == {"unknown-key", "empty"}
    assert "empty" in {problem.kind for problem in adapters_lib.examine(header({}), BOTTLENECK)[1]}


def test_recorded_validated_and_refused(tmp_path):
    folder = write(tmp_path / "a")
    assert not at.inspect(folder).to_json()["mergeable"]
    assert at.validate(folder).ok
    manifest = at.init(folder).manifest
    assert manifest.digest
    assert manifest.adapter.method == "bottleneck"
    assert at.validate(folder).ok


def test_a_head_may_lie_beside(tmp_path):
    folder = write(tmp_path / "a")
    save_file({"heads.md.1.weight": torch.ones(2, 768)}, folder / "model_head.safetensors")
    report = at.validate(folder)
    assert report.ok
    assert at.inspect(folder).to_json()["method"] == "bottleneck"


def test_another_adapters_tensors_are_set_aside(tmp_path):
    other = {name.replace(".md.", ".other."): shape for name, shape in KEYS.items()}
    folder = write(tmp_path / "a", keys={**KEYS, **other})
    report = at.validate(folder)
    assert report.ok
    assert "unknown-key" in {problem.kind for problem in report.problems}
    assert at.init(folder).manifest.digest


def test_a_pickle_is_described_by_its_config_alone(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(BOTTLENECK))
    (folder / "pytorch_adapter.bin").write_bytes(b"\x80\x04.")
    assert at.inspect(folder).to_json()["method"] == "bottleneck"
    with pytest.raises(UnsupportedError, match="pickle"):
        at.init(folder)
