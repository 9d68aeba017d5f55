"""The table of architectures: complete, and what the installed transformers says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import transformers

from adapterhub_tools.architectures import embedding_names, lookup, table

ROOT = Path(__file__).parents[2]
EXPECTED = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi",
    "phi3",
    "olmo",
    "olmo2",
    "cohere",
    "cohere2",
    "starcoder2",
    "granite",
    "stablelm",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "gpt_bigcode",
    "codegen",
    "bloom",
    "falcon",
    "opt",
    "mpt",
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "deberta-v2",
    "albert",
    "camembert",
    "xlm-roberta",
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
    "whisper",
    "vit",
    "clip",
    "smollm3",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
]


def builder():
    spec = importlib.util.spec_from_file_location(
        "build_architectures", ROOT / "tools" / "build_architectures.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_script_writes():
    build = builder()
    stored = build.TABLE.read_text(encoding="utf-8")
    data = json.loads(stored)
    assert build.text(data) == stored
    made_with = data["source"].removeprefix("transformers ")
    now = build.table()["architectures"]
    different = {name: row for name, row in now.items() if data["architectures"].get(name) != row}
    hint = f"made with {made_with}, installed {transformers.__version__}: run tools/build_architectures.py"
    assert not different, hint
    assert set(now) == set(data["architectures"])


@pytest.mark.parametrize("name", EXPECTED)
def test_every_expected_architecture_is_there(name):
    row = lookup(name)
    assert row is not None
    assert row.model_type == name
    assert row.conv1d_modules in ((), ("c_attn", "c_fc", "c_proj"))


def test_what_is_unknown_is_none():
    assert lookup("no_such_model") is None
    assert lookup(None) is None


def test_gpt2():
    row = lookup("gpt2")
    assert row.is_conv1d("transformer.h.0.attn.c_attn")
    assert not row.is_conv1d("transformer.wte")
    assert row.tied_default
    assert (row.base_prefix, row.input_embedding, row.output_embedding) == (
        "transformer",
        "transformer.wte",
        "lm_head",
    )
    group = ("transformer.wte.weight", "lm_head.weight")
    assert row.tied_group("lm_head.weight", tied=True) == group
    assert row.tied_group("transformer.wte.weight", tied=True) == group
    assert row.tied_group("lm_head.weight", tied=False) == ("lm_head.weight",)


def test_t5_ties_four_names_and_stores_the_shared_one():
    group = lookup("t5").tied_group("lm_head.weight", tied=True)
    assert group[0] == "shared.weight"
    assert set(group) == {
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize(
    ("name", "tied"), [("llama", False), ("gemma2", True), ("opt", True), ("gptj", False)]
)
def test_default_of_tying(name, tied):
    assert lookup(name).tied_default is tied


def test_groups_start_with_the_stored_name_and_do_not_overlap():
    for row in table().values():
        names = [name for group in row.tied for name in group]
        assert len(names) == len(set(names))
        assert all(len(group) > 1 for group in (*row.tied, *row.always_tied))


def test_embedding_names():
    assert {"embed_tokens", "lm_head", "wte", "embed_in", "shared", "word_embeddings"} <= embedding_names()
    assert "q_proj" not in embedding_names()


def test_a_saved_tied_model_stores_the_first_name(tmp_path):
    from safetensors import safe_open
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)).save_pretrained(
        tmp_path
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    (group,) = lookup("gpt2").tied
    assert group[0] in names
    assert not names & set(group[1:])
