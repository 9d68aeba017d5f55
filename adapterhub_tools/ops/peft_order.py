"""What PEFT draws from torch's random numbers before it combines, and in which order it visits modules.

``add_weighted_adapter`` makes a new adapter first, whose factors are initialised with random numbers, and
then walks the model's modules in the order in which they were registered. The files do not tell that order.
It is rebuilt here from the names: numbers by value, and siblings as the models of transformers register them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ORDER = (
    *("shared", "wte", "wpe", "word_embeddings", "h", "embed_tokens", "embed_positions", "embed_in"),
    *(
        "embeddings",
        "embeddings_project",
        "encoder",
        "decoder",
        "self",
        "self_attn",
        "self_attention",
        "attention",
        "attn",
    ),
    *("SelfAttention", "query", "query_key_value", "key", "value", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("qkv_proj", "out_proj", "q", "k", "v", "o", "q_lin", "k_lin", "v_lin", "out_lin", "c_attn", "q_attn"),
    *("encoder_attn", "EncDecAttention", "intermediate", "mlp", "ffn", "gate_up_proj", "gate_proj"),
    *("up_proj", "down_proj", "fc1", "fc2", "fc_in", "fc_out", "lin1", "lin2", "c_fc", "c_proj", "wi"),
    *("wi_0", "wi_1", "wo", "dense_h_to_4h", "dense_4h_to_h", "DenseReluDense", "output", "dense"),
)
"""Siblings in the order in which models register them; other names come after, by name."""

_LAST = ("lm_head", "embed_out", "score", "classifier", "pooler")
_KEY_FIRST = ("bart", "clip", "codegen", "gpt_neo", "gptj", "m2m_100", "mbart", "opt", "pegasus", "whisper")
"""Model types that register k_proj and v_proj before q_proj."""


def module_order(paths: Sequence[str], model_type: str | None) -> list[str]:
    """Returns module paths in the order in which PEFT visits them, as far as names tell it.

    Args:
        paths: the modules.
        model_type: of the base's config, if it is known.
    """
    places = {name: place for place, name in enumerate(_ORDER)}
    if model_type in _KEY_FIRST:
        first = places["q_proj"]
        places.update(k_proj=first, v_proj=first + 1, q_proj=first + 2)

    def key(path: str) -> list[tuple[int, int, str]]:
        parts = path.split(".")
        return [
            (1, int(part), "")
            if part.isdecimal()
            else (2 if part in _LAST else 0, places.get(part, len(places)), part)
            for part in parts
        ]

    return sorted(paths, key=key)


def draw_initialisation(
    generator: torch.Generator,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    *,
    embedding: bool,
    bias: bool,
    init: object,
) -> None:
    """Draws the random numbers of one new module's initialisation, and throws them away.

    Args:
        generator: advanced as PEFT advances the global one.
        a_shape: of the new A.
        b_shape: of the new B.
        embedding: whether it is an embedding's.
        bias: whether B has a bias.
        init: the config's ``init_lora_weights``: True, False or ``"gaussian"``.
    """
    import torch

    if embedding:
        torch.randn(a_shape, generator=generator)
        torch.randn(b_shape, generator=generator)
        if init is not False:
            torch.empty(b_shape).normal_(generator=generator)
        return
    torch.empty(a_shape).uniform_(generator=generator)
    torch.empty(b_shape).uniform_(generator=generator)
    if bias:
        torch.empty(b_shape[0]).uniform_(generator=generator)
    if init is True:
        torch.empty(a_shape).uniform_(generator=generator)
    elif isinstance(init, str):
        torch.empty(a_shape).normal_(generator=generator)
