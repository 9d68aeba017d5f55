"""PEFT files as strangers write them: wrappers resolved by rule, damage named, nothing dropped."""

from __future__ import annotations

import pytest

from adapterhub_tools.dialects import peft
from tests.unit.peft_headers import PAIR, P, Q, examine, header, kinds


def renamed(function):
    return {function(name): shape for name, shape in PAIR.items()}


def test_a_sound_file_is_described_and_every_problem_of_another_collected():
    adapter, problems = examine()
    assert adapter.modules[0].path == Q
    assert kinds(problems) == []
    assert kinds(examine(r=2, lora_alpha=0)[1]) == ["rank", "scale"]


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (lambda n: P + n, "repeated 2 times"),
        (lambda n: P + P + n, "repeated 3 times"),
        (lambda n: "_orig_mod." + n, "_orig_mod."),
        (
            lambda n: n.replace("layers.0", "layers.0._checkpoint_wrapped_module"),
            "_checkpoint_wrapped_module.",
        ),
        (
            lambda n: "_fsdp_wrapped_module." + n.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
            "_fsdp",
        ),
        (lambda n: "module." + n, '"module."'),
        (lambda n: "module._orig_mod.module." + n, '"module."'),
        (lambda n: n.replace(".weight", ".default.weight"), 'adapter name "default"'),
        (lambda n: n.removeprefix(P), "No key"),
    ],
)
def test_wrappers_are_removed_by_rule_and_reported(function, note):
    adapter, problems = examine(renamed(function))
    assert not problems
    assert [m.path for m in adapter.modules] == [Q]
    assert any(note in text for text in adapter.notes)
    assert {s.name for s in adapter.modules[0].factors.values()} == {function(name) for name in PAIR}


def test_a_plain_file_has_no_notes():
    adapter, problems = examine()
    assert (adapter.notes, problems) == ((), ())


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_empty_unknown_field_is_only_noted(value):
    adapter, problems = examine(new_field=value)
    assert not problems
    assert any("new_field" in note for note in adapter.notes)


@pytest.mark.parametrize(
    "name",
    [
        "fan_in_fan_out",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "layers_to_transform",
        "init_lora_weights",
        "exclude_modules",
    ],
)
def test_null_means_the_default(name):
    adapter, problems = examine(**{name: None})
    assert not problems
    assert adapter.modules[0].hparams == {
        "rank": 4,
        "alpha": 8,
        "scaling": "alpha/rank",
        "fan_in_fan_out": False,
    }


@pytest.mark.parametrize("alpha", [8, 8.5, 0.25, 1_000_000, 10**6])
def test_alpha_stays_the_number_it_is(alpha):
    adapter, problems = examine(lora_alpha=alpha)
    assert not problems
    assert adapter.modules[0].hparams["alpha"] == alpha
    assert type(adapter.modules[0].hparams["alpha"]) is type(alpha)


def test_absent_rank_and_alpha_are_defaults_and_noted():
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    shapes = {f"{P}{Q}.lora_A.weight": (8, 16), f"{P}{Q}.lora_B.weight": (8, 8)}
    adapter, problems = peft.examine(header(shapes), config)
    assert not problems
    assert (adapter.hparams["rank"], adapter.hparams["alpha"]) == (8, 8)
    assert sum("default 8" in note for note in adapter.notes) == 2


@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({}, None),
        ({"base_model_name_or_path": None}, None),
        ({"base_model_name_or_path": ""}, None),
        ({"base_model_name_or_path": "gpt2", "revision": "main"}, ("gpt2", "main")),
        ({"base_model_name_or_path": "/data/x", "revision": None}, ("/data/x", None)),
    ],
)
def test_base(fields, base):
    adapter, problems = examine(**fields)
    assert not problems
    assert (adapter.base and (adapter.base.id, adapter.base.revision)) == base


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_heads_of_old_configs(task):
    head = "qa_outputs" if task == "QUESTION_ANS" else "classifier"
    adapter, problems = examine(
        {**PAIR, f"{P}{head}.weight": (2, 8), f"{P}{head}.bias": (2,)}, task_type=task
    )
    assert not problems
    assert [(f.target, f.role) for f in adapter.full] == [
        (f"{head}.bias", "modules_to_save"),
        (f"{head}.weight", "modules_to_save"),
    ]


def test_old_forms_of_modules_to_save():
    shapes = {
        **PAIR,
        f"{P}head.modules_to_save.default.dense.weight": (2, 8),
        f"{P}head.original_module.dense.weight": (2, 8),
        f"{P}score.modules_to_save.weight": (2, 8),
    }
    adapter, problems = examine(shapes, modules_to_save=["head", "score"])
    assert not problems
    assert [f.target for f in adapter.full] == ["head.dense.weight", "score.weight"]
    assert adapter.unparsed["tensors"] == [f"{P}head.original_module.dense.weight"]
    assert any("copy of the base" in note for note in adapter.notes)


def test_a_declared_module_without_tensors_is_a_warning():
    _, problems = examine(modules_to_save=["lm_head"])
    assert kinds(problems) == []
    assert kinds(problems, "warning") == ["missing-tensor"]


def test_one_tensor_may_fulfil_two_entries():
    """An entry means every path that ends in it, wherever it starts."""
    shapes = {**PAIR, f"{P}model.layers.0.input_layernorm.weight": (8,)}
    adapter, problems = examine(shapes, modules_to_save=["norm", "input_layernorm", "layernorm"])
    assert not problems
    assert [f.role for f in adapter.full] == ["modules_to_save"]


@pytest.mark.parametrize(("other", "wrong"), [([3, 1], False), ([2], True)])
def test_an_entry_for_token_rows_that_the_file_lacks(other, wrong):
    """PEFT leaves a tied module out if its indices are the same."""
    key = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    fields = {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": other}}
    _, problems = examine({**PAIR, key: (2, 8)}, **fields)
    assert kinds(problems) == (["missing-tensor"] if wrong else [])


@pytest.mark.parametrize(
    ("indices", "shape", "good"),
    [
        ([3, 1], (2, 8), True),
        ({"embed_tokens": [3, 1]}, (2, 8), True),
        ([3, 1], (3, 8), False),
        ([3, 3], (2, 8), False),
        ([-1, 3], (2, 8), False),
        ({"lm_head": [3, 1]}, (2, 8), False),
        (None, (2, 8), False),
    ],
)
def test_token_rows(indices, shape, good):
    key = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter, problems = examine({**PAIR, key: shape}, trainable_token_indices=indices)
    assert ("token-rows" in kinds(problems)) is not good
    if good:
        assert [(f.target, f.role, f.rows) for f in adapter.full] == [
            ("model.embed_tokens.weight", "token_rows", (3, 1))
        ]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"init_lora_weights": "corda"}, "altered-base"),
        ({"init_lora_weights": "loftq"}, "altered-base"),
        ({"init_lora_weights": "LORA_GA"}, "altered-base"),
        ({"init_lora_weights": "brand_new"}, "unknown-init"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer-replication"),
        ({"megatron_config": {"a": 1}}, "megatron"),
        ({"use_qalora": True}, "method"),
        ({"arrow_config": {"top_k": 1}}, "unmergeable"),
    ],
)
def test_blockers_say_what_to_do(fields, kind):
    adapter, problems = examine(**fields)
    assert not problems
    assert kind in {k for k, _, _ in adapter.blockers}
    assert all(message and remedy for _, message, remedy in adapter.blockers)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "eva"},
        {"loftq_config": {}},
        {"qalora_group_size": 16},
        {"megatron_core": "megatron.core"},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"merge_weights": False, "enable_lora": None},
        {"peft_version": "0.20.1.dev0@abc"},
        {"auto_mapping": {"unsloth_fixed": True}},
    ],
)
def test_harmless_fields_block_nothing(fields):
    adapter, problems = examine(**fields)
    assert not problems
    assert adapter.blockers == ()


def test_merged_linear_of_peft_0_2():
    shapes = {
        f"{P}h.0.attn.query_key_value.lora_A.weight": (16, 1024),
        f"{P}h.0.attn.query_key_value.lora_B.weight": (2048, 8, 1),
    }
    adapter, problems = peft.examine(
        header(shapes),
        {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["query_key_value"],
            "enable_lora": [True, False, True],
            "merge_weights": False,
        },
    )
    assert not problems
    assert adapter.method == "lora_merged_linear"
    assert adapter.blockers == ()
    assert adapter.modules[0].hparams["rank"] == 8


def test_without_a_config_the_factors_are_still_described():
    adapter, problems = peft.examine(header(PAIR), None)
    assert kinds(problems) == ["missing-config"]
    assert adapter.modules[0].hparams == {"rank": 4, "fan_in_fan_out": False}
    assert peft.detect(header(PAIR), None)
    assert not peft.detect(header({"unet.x.lora.down.weight": (1,)}), None)
    assert not peft.detect({}, {"fine_tune_type": "lora"})


def test_order_does_not_depend_on_the_file():
    names = sorted(f"{P}model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in range(12) for x in "AB")
    shapes = {n: (4, 16) if "lora_A" in n else (8, 4) for n in names}
    first, _ = examine(shapes)
    second, _ = examine(dict(reversed(shapes.items())))
    assert first == second
    assert [m.path for m in first.modules] == sorted(m.path for m in first.modules)
