"""Regular expressions from configs: the answers of ``re``, and never a hang."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_tools.dialects._peft import patterns
from adapterhub_tools.dialects._peft.patterns import Pattern, captures, key_matches, matches
from adapterhub_tools.errors import FormatError

UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\."
    r"[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|"
    r"fc2|o_proj|gate_proj|up_proj|down_proj)))"
)
PATHS = [
    f"model.{tower}.layers.{i}.{part}"
    for tower in ("language_model", "vision_tower.encoder")
    for i in range(30)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm")
] + ["model.layers.3.mlp.up_proj", "lm_head", "decoder.block.0.layer.1.EncDecAttention.q", "model.q_proj"]

HOSTILE = [
    r"(a+)+$",
    r"(a|a)*$",
    r"(a|aa)+$",
    r"(.*a){25}b",
    r"(?:a?){40}a{40}b",
    r"(?:(?:(?:a*)*)*)*b",
    r"([a-z]+)*\.x",
    r"(?=(a+)+b)a",
    r".*.*.*.*.*.*.*.*.*.*b",
    "(a|b|ab)*c",
]

INVALID = [
    "(",
    ")",
    "[a",
    "*",
    "a{2,1}",
    "(?P<x>a)(?P<x>b)",
    r"\1",
    "(?<=a+)b",
    "a**",
    "(?z)a",
    "(" * 300,
    "\\",
]


@pytest.mark.parametrize("mode", ["match", "fullmatch"])
@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r".*\.(q|k)_proj",
        r"(?i).*Q_PROJ",
        "lm_head",
    ],
)
def test_real_patterns_answer_as_re(pattern, mode):
    expected = [getattr(re, mode)(pattern, path) is not None for path in PATHS]
    assert any(expected)
    assert matches(Pattern(text=pattern, mode=mode), PATHS) == expected


@pytest.mark.parametrize("pattern", HOSTILE)
def test_no_pattern_hangs(pattern):
    texts = ["a" * 60, "a" * 60 + "!", "model.layers.0.self_attn.q_proj" * 8]
    start = time.monotonic()
    try:
        matches(Pattern(text=pattern, file="adapter_config.json", loc="target_modules"), texts)
    except FormatError as error:
        (problem,) = error.problems
        assert problem.kind == "regex"
        assert "1 s" in problem.message
        assert (problem.file, problem.loc) == ("adapter_config.json", "target_modules")
        assert problem.remedy
    # The limit is one second of processor time; the rest is for a busy machine.
    assert time.monotonic() - start < 6


def test_the_classic_pattern_is_stopped():
    with pytest.raises(FormatError, match="takes more than 1 s"):
        matches(Pattern(text="(a+)+$"), ["a" * 40 + "!"])


@pytest.mark.parametrize("pattern", INVALID)
def test_invalid_patterns_are_named(pattern):
    with pytest.raises(FormatError, match="is not valid") as caught:
        matches(Pattern(text=pattern, loc="exclude_modules"), ["a"])
    assert caught.value.problems[0].loc == "exclude_modules"


def test_a_long_pattern_is_refused_unread():
    with pytest.raises(FormatError, match="10000 are allowed"):
        matches(Pattern(text="a" * 10_001), ["a"])


def test_deep_nesting_is_an_answer_or_an_error_but_no_crash():
    pattern = "(" * 3000 + "a" + ")" * 3000
    with pytest.raises(FormatError) as caught:
        matches(Pattern(text=pattern), ["a"])
    assert caught.value.problems[0].kind == "regex"


def test_without_an_interpreter_a_costly_pattern_is_refused(monkeypatch):
    monkeypatch.setattr(patterns.sys, "executable", "")
    assert matches(Pattern(text="q_proj$"), ["q_proj"]) == [True]
    with pytest.raises(FormatError, match="separate process"):
        matches(Pattern(text="(a+)+$"), ["a"])


def test_captures_return_the_group():
    pattern = Pattern(text=r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.")
    assert captures(pattern, ["model.layers.12.mlp", "layers.0.x.layers.3.y", "mlp"], "idx") == [
        "12",
        "0",
        None,
    ]


def test_many_plain_keys_need_no_matcher(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a plain key was given to the matcher")

    monkeypatch.setattr(patterns, "_here", refuse)
    monkeypatch.setattr(patterns, "_in_child", refuse)
    paths = [f"model.layers.{i}.self_attn.{p}" for i in range(400) for p in ("q_proj", "v_proj")]
    start = time.process_time()
    assert key_matches(paths, paths) == [[i] for i in range(len(paths))]
    assert time.process_time() - start < 2


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\w",
        "[ab]",
        "[^a]",
        "(a|b)",
        "(?:ab)",
        "(a)?",
        "a*",
        "b+",
        ".*",
        ".*?",
        "a{2}",
        "a{1,3}",
        "^",
        "$",
        "|",
        "(",
        ")",
        "q_proj",
        r"\b",
        "[0-9]+",
        "(?P<n>a)",
        "(a*)*",
    ]
)
PATTERNS = st.lists(ATOMS, min_size=1, max_size=6).map("".join)
TEXTS = st.lists(st.text("ab.q_proj01", max_size=12), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(PATTERNS, TEXTS, st.sampled_from(["match", "fullmatch"]))
def test_any_small_pattern_answers_as_re(pattern, texts, mode):
    try:
        expected = [getattr(re, mode)(pattern, text) is not None for text in texts]
    except re.error:
        expected = None
    try:
        found = matches(Pattern(text=pattern, mode=mode), texts)
    except FormatError:
        found = None
    assert found == expected


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_pattern_is_never_run_in_this_process(pattern):
    work = patterns._work(pattern, ["a" * 60, "model.layers.0.self_attn.q_proj" * 8])
    assert work is None or work > patterns._WORK_HERE


def test_a_usual_pattern_starts_no_process(monkeypatch):
    monkeypatch.setattr(patterns, "_in_child", lambda jobs, texts: pytest.fail("a process was started"))
    assert any(matches(Pattern(text=r".*\.(q|k)_proj", mode="fullmatch"), PATHS))
    assert key_matches(["mlp.up_proj", r"q_proj|k_proj"], PATHS)[:3] == [[1], [1], []]
