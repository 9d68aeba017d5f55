"""Damaged and hostile PEFT files: each problem named, all collected, no exception, no delay."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_tools.dialects import peft
from tests.unit.peft_headers import PAIR, P, Q, examine, header, kinds


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"_orig_mod." + name: shape for name, shape in PAIR.items()}, "duplicate-key"),
        ({P + name: shape for name, shape in PAIR.items()}, "duplicate-key"),
        ({f"{P}{Q}.lora_A.default.weight": (4, 16)}, "duplicate-key"),
        ({f"{P}{Q}.lora_embedding_A": (4, 16)}, "duplicate-key"),
        ({"model.layers.1.self_attn.q_proj.lora_A.weight": (4, 16)}, "mixed-prefix"),
    ],
)
def test_two_tensors_for_one_place(extra, kind):
    _, problems = examine({**PAIR, **extra})
    assert kind in kinds(problems)


def test_several_adapters_in_one_file():
    shapes = {
        name.replace(".weight", f".{a}.weight"): s for name, s in PAIR.items() for a in ("default", "other")
    }
    _, problems = examine(shapes)
    assert "several-adapters" in kinds(problems)


@pytest.mark.parametrize(
    ("shapes", "fields", "kind"),
    [
        ({f"{P}{Q}.lora_A.weight": (4, 16)}, {}, "missing-pair"),
        ({f"{P}{Q}.lora_B.weight": (8, 4)}, {}, "missing-pair"),
        ({f"{P}{Q}.lora_A.weight": (4, 16), f"{P}{Q}.lora_B.weight": (8, 2)}, {}, "shape"),
        ({f"{P}{Q}.lora_A.weight": (4, 0), f"{P}{Q}.lora_B.weight": (8, 4)}, {}, "shape"),
        ({f"{P}{Q}.lora_A.weight": (0,), f"{P}{Q}.lora_B.weight": (8, 4)}, {}, "shape"),
        ({f"{P}{Q}.lora_A.weight": (4, 16), f"{P}{Q}.lora_B.weight": (8, 4, 1, 1)}, {}, "shape"),
        ({f"{P}{Q}.lora_A.weight": (4, 16, 3, 3), f"{P}{Q}.lora_B.weight": (8, 4, 3, 3)}, {}, "shape"),
        (PAIR, {"r": 2}, "rank"),
        (PAIR, {"r": 0}, "rank"),
        (PAIR, {"r": -4}, "rank"),
        (PAIR, {"rank_pattern": {"q_proj": 8}}, "rank"),
        (PAIR, {"lora_alpha": 0}, "scale"),
        (PAIR, {"lora_alpha": -1}, "scale"),
        (PAIR, {"lora_alpha": 1_000_001}, "scale"),
        (PAIR, {"lora_alpha": 10**400}, "scale"),
        (PAIR, {"lora_alpha": math.nan}, "scale"),
        (PAIR, {"lora_alpha": math.inf}, "scale"),
        (PAIR, {"alpha_pattern": {"q_proj": 0.0}}, "scale"),
        (PAIR, {"lora_bias": True}, "missing-tensor"),
        (PAIR, {"use_dora": True}, "missing-tensor"),
        (PAIR, {"kasa_config": {"beta": 1.0}}, "missing-tensor"),
        (PAIR, {"trainable_token_indices": [1]}, "missing-tensor"),
        ({**PAIR, f"{P}{Q}.lora_B.bias": (8,)}, {}, "unknown-key"),
        ({**PAIR, f"{P}{Q}.lora_magnitude_vector": (8,)}, {}, "unknown-key"),
        ({**PAIR, f"{P}{Q}.lora_B.bias": (4,)}, {"lora_bias": True}, "shape"),
        ({**PAIR, f"{P}{Q}.lora_magnitude_vector": (16,)}, {"use_dora": True}, "shape"),
        ({**PAIR, f"{P}{Q}.lora_new.weight": (8,)}, {}, "unknown-key"),
        (
            {**PAIR, f"{P}lm_head2.lora_A.weight": (4, 8), f"{P}lm_head2.lora_B.weight": (8, 4)},
            {},
            "unknown-key",
        ),
        (PAIR, {"target_modules": ["v_proj"]}, "unknown-key"),
        (PAIR, {"exclude_modules": ["q_proj"]}, "unknown-key"),
        ({**PAIR, f"{P}model.norm.weight": (8,)}, {}, "base-overwrite"),
        ({**PAIR, f"{P}{Q}.weight": (8, 16)}, {}, "base-overwrite"),
        ({**PAIR, f"{P}{Q}.base_layer.weight": (8, 16)}, {}, "base-overwrite"),
        ({**PAIR, f"{P}{Q}.bias": (8,)}, {}, "base-overwrite"),
        ({**PAIR, f"{P}{Q}.base_layer.bias": (8,)}, {"bias": "none"}, "base-overwrite"),
        ({**PAIR, f"{P}model.k_proj.bias": (8,)}, {"bias": "lora_only"}, "base-overwrite"),
        ({**PAIR, f"{P}lm_head.weight": (9, 8)}, {}, "saved-embedding"),
        ({**PAIR, f"{P}model.embed_tokens.base_layer.weight": (9, 8)}, {}, "saved-embedding"),
        ({**PAIR, f"{P}head.original_module.weight": (9, 8)}, {"modules_to_save": ["head"]}, "unknown-key"),
        ({**PAIR, f"{P}head.modules_to_save.default.weight": (9, 8)}, {}, "base-overwrite"),
        ({}, {}, "empty"),
        (PAIR, {"new_scaling": 2.0}, "unknown-field"),
        (PAIR, {"r": "4"}, "config-type"),
        (PAIR, {"r": True}, "config-type"),
        (PAIR, {"r": 4.0}, "config-type"),
        (PAIR, {"lora_alpha": "8"}, "config-type"),
        (PAIR, {"rank_pattern": {"q_proj": "4"}}, "config-type"),
        (PAIR, {"alpha_pattern": [4]}, "config-type"),
        (PAIR, {"target_modules": {"q": 1}}, "config-type"),
        (PAIR, {"modules_to_save": "head"}, "config-type"),
        (PAIR, {"use_rslora": "yes"}, "config-type"),
        (PAIR, {"bias": "some"}, "config-type"),
        (PAIR, {"target_modules": ".*q_proj", "layers_to_transform": [0]}, "config-type"),
        (PAIR, {"target_modules": "("}, "regex"),
        (PAIR, {"rank_pattern": {"(": 4}}, "regex"),
        (PAIR, {"alpha_pattern": {"(a+)+": 4, "(": 3}}, "regex"),
        (PAIR, {"peft_type": "LORAX"}, "peft-type"),
        (PAIR, {"peft_type": None}, "peft-type"),
        (PAIR, {"peft_type": 3}, "peft-type"),
    ],
)
def test_damage_is_named(shapes, fields, kind):
    _, problems = examine(shapes, **fields)
    found = [p for p in problems if p.kind == kind and p.severity == "error"]
    assert found, kinds(problems)
    for problem in found:
        assert problem.remedy
        assert problem.message
        assert problem.file in ("adapter_model.safetensors", "adapter_config.json")


@pytest.mark.parametrize("dtype", ["I8", "U8", "BOOL", "I64", "F8_E4M3", "F8_E5M2", "C64"])
def test_factors_are_floating(dtype):
    _, problems = examine(dtype=dtype)
    assert kinds(problems) == ["dtype"]


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
def test_floating_factors_are_read(dtype):
    assert not examine(dtype=dtype)[1]


def test_every_problem_is_collected():
    shapes = {**PAIR, f"{P}x.lora_A.weight": (4, 16), f"{P}model.norm.weight": (8,)}
    _, problems = examine(shapes, r=3, lora_alpha=-1, unknown=1)
    assert {"missing-pair", "base-overwrite", "rank", "scale", "unknown-field", "unknown-key"} <= set(
        kinds(problems)
    )


def test_a_flood_is_counted():
    shapes = {f"{P}l{i}.other.weight": (1,) for i in range(5000)}
    _, problems = examine({**PAIR, **shapes})
    assert len(problems) == 101
    assert "4900 more" in problems[-1].message


def test_large_adapters_are_read_quickly():
    names = [f"{P}model.layers.{i}.block.{j}.q_proj" for i in range(100) for j in range(100)]
    shapes = {f"{n}.lora_{x}.weight": ((4, 16) if x == "A" else (8, 4)) for n in names for x in "AB"}
    start = time.process_time()
    adapter, problems = examine(shapes, rank_pattern={n.removeprefix(P): 4 for n in names})
    assert len(adapter.modules) == 10_000
    assert not problems
    assert time.process_time() - start < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "fan_in_fan_out",
        "init_lora_weights",
        "trainable_token_indices",
        "target_parameters",
        "enable_lora",
        "use_bdlora",
        "kasa_config",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "ensure_weight_tying",
        "token_indices",
        "other",
    ]
)
PART = st.sampled_from(
    [
        "base_model",
        "model",
        "lora_A",
        "lora_B",
        "weight",
        "bias",
        "default",
        "base_layer",
        "q_proj",
        "lora_embedding_A",
        "lora_magnitude_vector",
        "modules_to_save",
        "original_module",
        "0",
        "token_adapter",
        "trainable_tokens_delta",
        "embed_tokens",
        "_orig_mod",
        "module",
        "prompt_embeddings",
        "hada_w1_a",
        "vera_A",
        "é",
        "",
    ]
)
NAME = st.lists(PART, min_size=1, max_size=7).map(".".join) | st.lists(PART, max_size=4).map(
    lambda p: P + ".".join(p)
)
SHAPE = st.lists(st.integers(0, 5), max_size=5).map(tuple)
TYPES = st.sampled_from(
    ["LORA", "LORA", "LORA", "ADALORA", "LOHA", "VERA", "TRAINABLE_TOKENS", "PREFIX_TUNING", "IA3"]
)


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(NAME, SHAPE, max_size=6),
    st.dictionaries(FIELDS, JSON, max_size=6),
    TYPES,
    st.sampled_from(["F32", "I8"]),
)
def test_nothing_makes_it_raise(shapes, fields, name, dtype):
    config = {"peft_type": name, **fields}
    adapter, problems = peft.examine(header(shapes, dtype), config)
    for problem in problems:
        json.dumps(problem.to_json())
    if not any(p.severity == "error" for p in problems):
        names = [s.name for m in adapter.modules for s in m.factors.values()]
        names += [f.tensor.name for f in adapter.full] + adapter.unparsed["tensors"]
        assert sorted(names) == sorted(shapes)
