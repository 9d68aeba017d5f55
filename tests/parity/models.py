"""Tiny random models for the parity tests: every parameter seeded, none of them zero or one by default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

torch.set_num_threads(1)

VOCAB = 96
HIDDEN = 32


def randomise(model: nn.Module, seed: int, size: float = 0.15) -> None:
    """Adds seeded noise to every parameter and floating buffer, so that none keeps a default value.

    Running variances of batch normalisation stay positive.
    """
    generator = torch.Generator().manual_seed(seed)
    buffers = [b for n, b in model.named_buffers() if b.is_floating_point() and "running" in n]
    with torch.no_grad():
        for tensor in [*model.parameters(), *buffers]:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.add_((noise * size).abs() if tensor.ndim == 1 else noise * size)


def perturb_trainable(model: nn.Module, seed: int, size: float = 0.1) -> int:
    """Sets every trainable parameter to itself plus seeded noise; returns how many there are."""
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trainable:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_((noise * size).to(parameter.dtype))
    return len(trainable)


def llama_config(*, tied: bool = False, layers: int = 2) -> LlamaConfig:
    """A Llama of two layers with grouped keys."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def llama(*, tied: bool = False, layers: int = 2) -> LlamaForCausalLM:
    """A causal Llama."""
    return _made(LlamaForCausalLM(llama_config(tied=tied, layers=layers)))


def bare_llama() -> LlamaModel:
    """A Llama without a head."""
    return _made(LlamaModel(llama_config()))


def gpt2(*, tied: bool = True) -> GPT2LMHeadModel:
    """GPT-2, whose layers are Conv1D, stored as (in, out)."""
    return _made(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=64,
                n_embd=HIDDEN,
                n_layer=2,
                n_head=4,
                bos_token_id=1,
                eos_token_id=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                tie_word_embeddings=tied,
            )
        )
    )


def bert_config() -> BertConfig:
    """A BERT of two layers."""
    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
    )


def bert_classifier() -> BertForSequenceClassification:
    """A BERT with a classification head."""
    return _made(BertForSequenceClassification(bert_config()))


def bare_bert() -> BertModel:
    """A BERT without a head."""
    return _made(BertModel(bert_config()))


def pretraining_bert() -> BertForPreTraining:
    """A BERT with the heads of its pretraining."""
    return _made(BertForPreTraining(bert_config()))


def opt(*, tied: bool = False) -> OPTForCausalLM:
    """OPT: every linear layer has a bias."""
    return _made(
        OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=HIDDEN,
                tie_word_embeddings=tied,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    )


def masked_bert(*, tied: bool = True) -> BertForMaskedLM:
    """A BERT that predicts tokens, its decoder usually tied to the embedding."""
    config = bert_config()
    config.tie_word_embeddings = tied
    return _made(BertForMaskedLM(config))


def t5_config() -> T5Config:
    """Sizes of the models below."""
    return T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


def t5() -> T5ForConditionalGeneration:
    """An encoder, a decoder and a head that share one embedding."""
    return _made(T5ForConditionalGeneration(t5_config()))


def t5_encoder() -> T5EncoderModel:
    """The encoder of such a model."""
    return _made(T5EncoderModel(t5_config()))


def mixtral() -> MixtralForCausalLM:
    """A mixture of experts, whose experts are stacked in one parameter in memory."""
    return _made(
        MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                max_position_embeddings=64,
            )
        )
    )


def resnet() -> ResNetForImageClassification:
    """Convolutions of 7×7, 3×3 and 1×1 with strides, and batch normalisation."""
    return _made(
        ResNetForImageClassification(
            ResNetConfig(
                embedding_size=8,
                hidden_sizes=[16, 32],
                depths=[1, 1],
                layer_type="bottleneck",
                num_labels=3,
            )
        )
    )


def vit() -> ViTForImageClassification:
    """A vision transformer: one convolution makes the patches."""
    return _made(
        ViTForImageClassification(
            ViTConfig(
                hidden_size=HIDDEN,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=4,
                num_labels=3,
            )
        )
    )


class Convolutions(nn.Module):
    """Convolutions over one, two and three axes, with stride, padding and groups, and no config."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(4, 6, 5, stride=2, padding=2)
        self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.uneven = nn.Conv2d(6, 6, (1, 3), stride=(1, 2), padding=(0, 1), bias=False)
        self.deep = nn.Conv3d(2, 4, (2, 3, 3), padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, pixels: Tensor, signal: Tensor, volume: Tensor) -> Tensor:
        x = self.grouped(self.uneven(self.point(self.wide(pixels).tanh()))).tanh().mean((2, 3))
        x = x + self.along(signal).tanh().mean(2)
        x = x + self.deep(volume).tanh().mean((2, 3, 4)).repeat(1, 2)[:, :6]
        return self.head(x)


def convolutions() -> Convolutions:
    """The model above with seeded weights."""
    return _made(Convolutions())


def _made(model: Any) -> Any:
    randomise(model, seed=7)
    return model.eval()


def save_base(model: nn.Module, folder: Path, **options: object) -> Path:
    """Writes a model as a base; one that has no ``save_pretrained`` gets a config of its own."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, **options)
        return folder
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "convolutions"}))
    return folder


def example_inputs(model: nn.Module, rows: int = VOCAB) -> dict[str, Tensor]:
    """Returns a fixed batch for a model; for a language model every token up to ``rows`` occurs."""
    generator = torch.Generator().manual_seed(11)
    name = type(model).__name__
    if name == "Convolutions":
        return {
            "pixels": torch.randn(2, 3, 12, 12, generator=generator),
            "signal": torch.randn(2, 4, 20, generator=generator),
            "volume": torch.randn(2, 2, 5, 6, 6, generator=generator),
        }
    if name.startswith(("ResNet", "ViT", "CLIPVision")):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    length = 32
    count = -(-rows // length)
    order = torch.randperm(count * length, generator=generator) % rows
    inputs = {"input_ids": order.view(count, length)}
    if name.startswith(("T5For", "MT5For", "Marian", "Pegasus")):
        inputs["decoder_input_ids"] = order.flip(0).view(count, length)[:, :8]
    elif name.startswith("Whisper"):
        sound = torch.randn(count, 80, 32, generator=generator)
        inputs = {"input_features": sound, "decoder_input_ids": inputs["input_ids"]}
    elif name.startswith("CLIPModel"):
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    elif name.startswith("Gemma3ForConditional"):
        image = torch.full((count, 16), int(model.config.image_token_id))
        inputs["input_ids"] = torch.cat([image, inputs["input_ids"]], 1)
        inputs["pixel_values"] = torch.randn(count, 3, 16, 16, generator=generator)
    return inputs


def outputs_of(model: nn.Module, rows: int = VOCAB) -> Tensor:
    """Returns the model's logits (or last hidden state) on the fixed batch, without gradients."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        result = model.eval()(**example_inputs(core, rows))
    if isinstance(result, Tensor):
        return result
    for name in ("logits", "logits_per_image"):
        if hasattr(result, name):
            return getattr(result, name)
    return result.last_hidden_state


Builder = Callable[[], nn.Module]
