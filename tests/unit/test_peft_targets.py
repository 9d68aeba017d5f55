"""Target rules and patterns: PEFT's own functions are the oracle."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapterhub_tools.dialects._peft.patterns import key_matches
from adapterhub_tools.dialects._peft.targets import TargetRule
from adapterhub_tools.errors import FormatError

PARTS = [
    "model",
    "layers",
    "h",
    "block",
    "0",
    "1",
    "2",
    "10",
    "self_attn",
    "mlp",
    "q_proj",
    "v_proj",
    "q",
    "experts",
    "lm_head",
    "embed_tokens",
    "classifier",
    "score",
    "q.proj",
    "xq_proj",
]
PATHS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=7).map(".".join)
NAMES = st.lists(st.sampled_from([*PARTS, "self_attn.q_proj", "layers.0.self_attn.q_proj"]), max_size=4)
REGEXES = st.sampled_from(
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.[01]\..*",
        ".*",
        "lm_head",
        r".*q.*|.*mlp$",
        r"(?:.*\.)?layers\.\d+\.mlp",
        "q_proj",
        "",
        r".*attn\.[qv]_proj$",
        "all-linear-not",
    ]
)


@st.composite
def configs(draw):
    """A config that LoraConfig accepts."""
    regex = draw(st.booleans())
    layers = None if regex else draw(st.sampled_from([None, 0, 1, [], [0], [1, 2], [0, 10]]))
    patterns = [
        None,
        [],
        "",
        "layers",
        "h",
        ["h", "layers"],
        ["layers", "block"],
        "l.yers",
        "experts",
        r"\w+",
    ]
    return {
        "target_modules": draw(REGEXES) if regex else draw(NAMES),
        "exclude_modules": draw(st.one_of(st.none(), NAMES, REGEXES)),
        "modules_to_save": draw(
            st.sampled_from([None, [], ["classifier"], ["score", "mlp"], ["q.proj"], ["c.*r|mlp"]])
        ),
        "layers_to_transform": layers,
        "layers_pattern": draw(st.sampled_from(patterns)) if layers is not None else None,
    }


def ask_peft(config, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(check_target_module_exists(LoraConfig(**config), path))


@settings(max_examples=600, deadline=None)
@given(configs(), st.lists(PATHS, min_size=1, max_size=6))
def test_rules_answer_as_peft(config, paths):
    expected = [ask_peft(config, path) for path in paths]
    assert TargetRule.from_config(config).match(paths) == expected


KEYS = st.lists(
    st.sampled_from(
        [
            "q_proj",
            "v_proj",
            "layers.0.mlp",
            "^model",
            r"^model\.layers\.0",
            "q|v_proj",
            r"layers\.\d+\.mlp",
            "",
            "x)|(q",
            "[qv]_proj",
            "l.yers",
            "model.layers.0.self_attn.q_proj",
            "0",
            r".*attn",
            "q.proj",
            "(self_attn)",
        ]
    ),
    max_size=5,
    unique=True,
)


@settings(max_examples=600, deadline=None)
@given(KEYS, st.lists(PATHS, min_size=1, max_size=6))
def test_rank_patterns_answer_as_peft(keys, paths):
    for path, hits in zip(paths, key_matches(keys, paths), strict=True):
        assert (keys[hits[0]] if hits else path) == get_pattern_key(keys, path)
        assert hits == [
            i for i, key in enumerate(keys) if get_pattern_key([key], path) == key != path or key == path
        ]


def test_a_whole_path_counts_in_every_layer():
    config = {"target_modules": ["model.layers.3.mlp", "q_proj"], "layers_to_transform": [0]}
    rule = TargetRule.from_config(config)
    paths = ["model.layers.3.mlp", "model.layers.0.q_proj", "model.layers.1.q_proj"]
    assert rule.match(paths) == [True, True, False]
    assert [ask_peft(config, path) for path in paths] == [True, True, False]


@pytest.mark.parametrize("value", ["all-linear", "All-Linear", None])
def test_what_only_the_base_can_tell(value):
    rule = TargetRule.from_config({"target_modules": value, "exclude_modules": ["lm_head"]})
    assert rule.needs_base
    assert rule.entries == ()
    assert rule.match(["model.q_proj", "lm_head"]) == [True, False]


def test_parameters_name_the_module_they_are_in():
    rule = TargetRule.from_config({"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]})
    assert not rule.needs_base
    assert rule.match(["model.layers.0.mlp.experts"]) == [False]
    assert rule.match_parameters(["model.layers.0.mlp.experts", "model.layers.0.mlp"]) == [True, False]


def test_a_hostile_exclude_pattern_names_its_field():
    rule = TargetRule.from_config({"target_modules": ["q"], "exclude_modules": "(a+)+$"})
    with pytest.raises(FormatError) as caught:
        rule.match(["a" * 50 + "!"])
    assert caught.value.problems[0].loc == "exclude_modules"


def test_long_lists_are_no_burden():
    names = [f"layer_{i}" for i in range(50_000)]
    config = {"target_modules": names, "modules_to_save": None, "exclude_modules": names[1::2]}
    rule = TargetRule.from_config(config)
    assert sum(rule.match([f"model.{name}" for name in names])) == 25_000
