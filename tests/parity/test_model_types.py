"""Every language model of the architecture table, made small: linear layers, embedding and head of each.

Where the embeddings are tied, the adapted model itself is the reference; elsewhere PEFT's merge is one too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from adapterhub_tools.architectures import lookup
from adapterhub_tools.errors import MismatchError, UnsupportedError
from tests.parity import models
from tests.parity.oracle import Case, adapt, assert_same_outputs, check_parity, ours, refused, stored

SIZES = {
    32: "hidden_size n_embd d_model dim embed_dim embedding_size projection_dim word_embed_proj_dim",
    48: "intermediate_size ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_ff hidden_dim n_inner "
    "moe_intermediate_size shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_key_value_heads num_kv_heads num_experts_per_tok eos_token_id type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts rotary_dim patch_size",
    8: "head_dim d_kv query_pre_attn_scalar",
    16: "sliding_window local_attention image_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len original_max_position_embeddings",
    models.VOCAB: "vocab_size",
    0: "pad_token_id",
    1: "bos_token_id decoder_start_token_id",
}

CAUSAL = """llama mistral qwen2 qwen3 qwen2_moe gemma gemma2 gemma3_text phi phi3 olmo olmo2 cohere cohere2
starcoder2 granite stablelm gpt2 gpt_neo gpt_neox gptj gpt_bigcode codegen bloom falcon opt mpt smollm3
openai-gpt xglm biogpt"""
MASKED = "bert roberta distilbert electra deberta deberta-v2 albert camembert xlm-roberta modernbert mpnet"


def shrink(config: Any) -> None:
    """Makes a config of any model type small, its parts included, and takes dropout away."""
    for part in ("text_config", "vision_config"):
        if getattr(config, part, None) is not None:
            shrink(getattr(config, part))
    for size, names in SIZES.items():
        for name in names.split():
            fixed = isinstance(getattr(type(config), name, None), property)
            if isinstance(getattr(config, name, None), int) and not fixed:
                setattr(config, name, size)
    for name in ("layer_types", "mlp_only_layers", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:2])
    for name in vars(config):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    if config.model_type == "gpt_neo":
        config.attention_types = [[["global", "local"], 1]]
        config.attention_layers = ["global", "local"]
    if config.model_type == "phi3":
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}


def small(model_type: str) -> Any:
    """A small model of a type, every parameter random."""
    config = AutoConfig.for_model(model_type)
    shrink(config)
    auto = AutoModelForMaskedLM if model_type in MASKED.split() else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager")
    models.randomise(model, seed=7)
    return model.eval()


def name_of(model: Any, module: Any) -> str | None:
    return next((name for name, found in model.named_modules() if found is module), None)


def lora(model_type: str, **fields: Any) -> Case:
    return Case(
        build=lambda: small(model_type), config=lambda: LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})
    )


RUNS = f"{CAUSAL} {MASKED}".split()


@pytest.mark.parametrize("model_type", RUNS)
def test_linear_layers(model_type: str, tmp_path: Path) -> None:
    check_parity(lora(model_type, target_modules="all-linear"), tmp_path)


@pytest.mark.parametrize("model_type", RUNS)
def test_embedding(model_type: str, tmp_path: Path) -> None:
    model = small(model_type)
    name = name_of(model, model.get_input_embeddings())
    tied = model.config.get_text_config().tie_word_embeddings
    _, out = check_parity(lora(model_type, target_modules=[name]), tmp_path, reference_is_right=not tied)
    check_tie(model, tied, out)


HEADS_OF_ANOTHER_NAME = ("gpt_neox",)
"""Types whose head lies on disk under another name than in memory, which is refused."""


@pytest.mark.parametrize("model_type", RUNS)
def test_head(model_type: str, tmp_path: Path) -> None:
    model = small(model_type)
    name = name_of(model, model.get_output_embeddings())
    assert name is not None
    case = lora(model_type, target_modules=[name])
    if model_type in HEADS_OF_ANOTHER_NAME:
        adapted = adapt(case, tmp_path)
        refused(MismatchError, "unknown-module", adapted.base, adapted.adapter, tmp_path / "out")
        return
    tied = model.config.get_text_config().tie_word_embeddings
    _, out = check_parity(case, tmp_path, reference_is_right=not tied)
    check_tie(model, tied, out)


def check_tie(model: Any, tied: bool, out: Path) -> None:
    """The table knows the type, and a pair that was tied is written apart."""
    assert lookup(model.config.model_type) is not None
    if tied:
        assert f"{name_of(model, model.get_output_embeddings())}.weight" in stored(out)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("model_type", ["bart", "mbart"])
def test_encoder_decoder(model_type: str, tmp_path: Path) -> None:
    def build() -> Any:
        config = AutoConfig.for_model(model_type)
        shrink(config)
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
        models.randomise(model, seed=7)
        return model.eval()

    fields = {"r": 4, "target_modules": ["q_proj", "v_proj", "fc1"]}
    check_parity(Case(build=build, config=lambda: LoraConfig(**fields)), tmp_path)


# --- types and names that the table does not know ----------------------------------------------------------


def disguised(base: Path, *, declared: bool) -> None:
    """Gives a base a model type that no table knows; not declared is how transformers 4 writes a true tie."""
    file = base / "config.json"
    config = json.loads(file.read_text())
    config.update(model_type="llamalike", architectures=["LlamalikeForCausalLM"])
    if not declared:
        del config["tie_word_embeddings"]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "left out"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_a_tied_pair_of_an_unknown_type_is_refused(
    targets: list[str], declared: bool, tmp_path: Path
) -> None:
    fields = {"r": 4, "target_modules": targets}
    adapted = adapt(
        Case(build=lambda: models.llama(tied=True), config=lambda: LoraConfig(**fields)), tmp_path
    )
    disguised(adapted.base, declared=declared)
    error, kind = (
        (UnsupportedError, "tied-unsupported") if "q_proj" in targets else (MismatchError, "unknown-module")
    )
    refused(error, kind, adapted.base, adapted.adapter, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "left out"])
def test_the_linear_layers_of_an_unknown_type(tied: bool, declared: bool, tmp_path: Path) -> None:
    targets = ["q_proj"] if tied else ["q_proj", "embed_tokens", "lm_head"]
    fields = {"r": 4, "target_modules": targets}
    adapted = adapt(
        Case(build=lambda: models.llama(tied=tied), config=lambda: LoraConfig(**fields)), tmp_path
    )
    ours(adapted.base, adapted.adapter, tmp_path / "known")
    disguised(adapted.base, declared=declared)
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    known, unknown = stored(tmp_path / "known"), stored(tmp_path / "out")
    assert known.keys() == unknown.keys()
    assert all(torch.equal(known[name], unknown[name]) for name in known)


def gemma3(targets: list[str], folder: Path) -> Any:
    """An adapter of Gemma 3 with images: transformers 5 names its modules otherwise than checkpoints do."""

    def build() -> Any:
        config = AutoConfig.for_model("gemma3")
        shrink(config)
        config.mm_tokens_per_image = 16
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
        models.randomise(model, seed=7)
        return model.eval()

    return adapt(Case(build=build, config=lambda: LoraConfig(r=4, target_modules=targets)), folder)


def as_on_disk(adapter: Path) -> None:
    """Renames an adapter's keys as transformers 4 would have named them."""
    file = adapter / "adapter_model.safetensors"
    renamed = {
        name.replace("model.language_model.", "language_model.model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file, {"format": "pt"})


ATTENTION = r".*language_model\.(model\.)?layers\.\d+\.self_attn\.(q|v)_proj"


def test_names_that_only_memory_has_are_refused(tmp_path: Path) -> None:
    adapted = gemma3(ATTENTION, tmp_path)
    refused(MismatchError, "unknown-module", adapted.base, adapted.adapter, tmp_path / "out")


def test_names_as_they_are_on_disk_merge(tmp_path: Path) -> None:
    adapted = gemma3(ATTENTION, tmp_path)
    as_on_disk(adapted.adapter)
    ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert_same_outputs(adapted.loader(tmp_path / "out"), adapted)


def test_a_tied_pair_under_unexpected_names_is_refused(tmp_path: Path) -> None:
    adapted = gemma3(["language_model.embed_tokens"], tmp_path)
    as_on_disk(adapted.adapter)
    config = adapted.adapter / "adapter_config.json"
    fields = {**json.loads(config.read_text()), "target_modules": ["embed_tokens"]}
    config.write_text(json.dumps(fields))
    refused(
        UnsupportedError,
        "tied-unsupported",
        adapted.base,
        adapted.adapter,
        tmp_path / "out",
        accept_embeddings=True,
    )
