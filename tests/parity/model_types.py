"""Small models of every type in the architecture table, built from their configs, with seeded weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from tests.parity import models

SIZES = {
    32: "hidden_size n_embd d_model dim embed_dim embedding_size projection_dim word_embed_proj_dim",
    48: "intermediate_size ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_ff hidden_dim n_inner "
    "moe_intermediate_size shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_key_value_heads num_kv_heads num_experts_per_tok eos_token_id type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts rotary_dim patch_size",
    8: "head_dim d_kv query_pre_attn_scalar",
    16: "sliding_window local_attention image_size max_source_positions mm_tokens_per_image",
    64: "max_position_embeddings n_positions n_ctx max_seq_len original_max_position_embeddings",
    models.VOCAB: "vocab_size decoder_vocab_size",
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


CLASSES = {
    **dict.fromkeys(MASKED.split(), AutoModelForMaskedLM),
    **dict.fromkeys(["t5", "mt5", "bart", "mbart", "pegasus", "marian"], AutoModelForSeq2SeqLM),
    "whisper": AutoModelForSpeechSeq2Seq,
    "gemma3": AutoModelForImageTextToText,
    "vit": AutoModelForImageClassification,
    **dict.fromkeys(["clip", "clip_text_model", "clip_vision_model"], AutoModel),
}


def small(model_type: str, *, tied: bool | None = None) -> Any:
    """A small model of a type, every parameter random; ``tied`` where it is not to be the type's default."""
    config = AutoConfig.for_model(model_type)
    shrink(config)
    if tied is not None:
        config.tie_word_embeddings = tied
        config.get_text_config().tie_word_embeddings = tied
    torch.manual_seed(0)
    auto = CLASSES.get(model_type, AutoModelForCausalLM)
    model = auto.from_config(config, attn_implementation="eager")
    models.randomise(model, seed=7)
    return model.eval()


def name_of(model: Any, module: Any) -> str | None:
    """The path of a module in a model."""
    return next((name for name, found in model.named_modules() if found is module), None)
