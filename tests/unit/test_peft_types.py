"""The table of PEFT types against the installed PEFT."""

from __future__ import annotations

import dataclasses

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from adapterhub_tools import registry
from adapterhub_tools.dialects import peft
from adapterhub_tools.dialects._peft.config import table

TYPES = sorted(str(getattr(t, "value", t)) for t in PEFT_TYPE_TO_CONFIG_MAPPING)


def test_every_type_is_in_the_table():
    rows, common = table()
    assert set(TYPES) <= set(rows)
    assert {f.name for f in dataclasses.fields(PeftConfig)} <= common


@pytest.mark.parametrize("name", TYPES)
def test_every_field_is_known(name):
    rows, common = table()
    fields = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[name])}
    assert fields <= rows[name].fields | common
    assert set(rows[name].maths) <= rows[name].fields


@pytest.mark.parametrize("name", TYPES)
def test_every_layer_tensor_has_a_role(name):
    layer = getattr(PEFT_TYPE_TO_TUNER_MAPPING[name], "tuner_layer_cls", None)
    names = getattr(layer, "adapter_layer_names", None) or ()
    first = {part for suffix in table()[0][name].roles for part in suffix.split(".")}
    assert {part for part in names if part.split(".")[0] not in first} <= _never_saved(name)


def _never_saved(name):
    """AdaLoRA inherits LoRA's names but has no embeddings or magnitudes; dropout has no tensors."""
    if name == "ADALORA":
        return {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
    return {"shadow_dropout"} if name == "SHADOW" else set()


def test_methods_are_unique_and_reasons_given():
    rows = table()[0].values()
    assert len({row.method for row in rows}) == len(rows)
    assert all(bool(row.reason) is (row.merge == "none") for row in rows)
    assert {row.merge for row in rows} == {"additive", "base", "rows", "replace", "bias", "none"}


@pytest.mark.parametrize("name", [t for t in TYPES if t != "LORA"])
def test_every_type_without_a_method_is_blocked_with_a_remedy(name):
    adapter, problems = peft.examine({}, {"peft_type": name})
    assert [p.kind for p in problems] == ["empty"]
    row = table()[0][name]
    if row.method in registry.names("methods") or row.merge == "rows":
        assert not adapter.blockers
        return
    ((kind, message, remedy),) = adapter.blockers
    assert kind in ("method", "unmergeable")
    assert message
    assert remedy
