"""Why a LoRA adapter cannot be merged as it stands, read from its config: each with what to do instead.

Checked against every field of PEFT 0.21's ``LoraConfig``. Fields that only shape training leave no mark here:
dropout, the initialisations that keep the base (``gaussian``, ``eva``, ``orthogonal``, ``mica``), VeLoRA's
compressed activations and MonteCLoRA's sampling, which PEFT itself ignores outside training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_tools import registry
from adapterhub_tools.errors import escape

Blocker = tuple[str, str, str]
"""Kind, message, remedy."""

_ALTERED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEPT = ("gaussian", "eva", "orthogonal", "mica", "true", "false")

_ALTERED_REMEDY = (
    "Save it again with save_pretrained(path_initial_model_for_weight_conversion=...), which turns it into a "
    "plain LoRA for the original base; or merge with PEFT onto the altered base that was saved with it."
)
_LOFTQ_REMEDY = (
    "Merge onto the base that LoftQ wrote (its quantised weights, dequantised), after setting "
    '"init_lora_weights" to true in a copy of the config.'
)
_METHOD_REMEDY = (
    "Merge it with PEFT (merge_and_unload), or use a version of adaptertool that lists this method."
)


def blockers(config: Mapping[str, Any], *, method: str) -> list[Blocker]:
    """Returns what stands against merging a LoRA adapter with this config.

    Args:
        config: the adapter's config.
        method: the method's name that was found, ``"lora"``, ``"dora"`` and others.
    """
    found: list[Blocker] = []
    found.extend(_initialisation(config.get("init_lora_weights")))
    found.extend(replication(config))
    found.extend(method_blockers(method))
    for name, why in _VARIANTS.items():
        if config.get(name):
            found.append((why[0], why[1], why[2]))
    return found


def replication(config: Mapping[str, Any]) -> list[Blocker]:
    """Returns a blocker if the config repeats layers: in PEFT the copies share their weights."""
    if not config.get("layer_replication"):
        return []
    message = '"layer_replication" repeats layers of the base, so the adapter belongs to a larger model.'
    remedy = "Build the larger base first (for example a passthrough merge), then name it as the base."
    return [("layer-replication", message, remedy)]


def method_blockers(method: str) -> list[Blocker]:
    """Returns a blocker if ``methods/`` has no method of this name."""
    if method in registry.names("methods"):
        return []
    return [("method", f'merging the method "{method}" is not available yet.', _METHOD_REMEDY)]


_VARIANTS: dict[str, Blocker] = {
    "alora_invocation_tokens": (
        "unmergeable",
        "aLoRA applies its delta only after the invocation tokens, so no single weight stands for it.",
        "Serve it as an adapter.",
    ),
    "arrow_config": (
        "unmergeable",
        "Arrow routes every token among several adapters, so no single weight stands for it.",
        "Merge one of the task adapters, or serve it with PEFT.",
    ),
    "megatron_config": (
        "megatron",
        "the adapter was trained on Megatron's parallel layers, whose names and shards are not the "
        "checkpoint's.",
        "Export it from Megatron to the Hugging Face layout first.",
    ),
    "target_parameters": (
        "experts",
        '"target_parameters" adapts stacked expert parameters, which merge cannot do yet.',
        _METHOD_REMEDY,
    ),
    "use_qalora": (
        "method",
        "QALoRA averages inputs in groups; merging it is not available yet.",
        _METHOD_REMEDY,
    ),
    "use_bdlora": (
        "method",
        "BD-LoRA has block-diagonal factors; merging it is not available yet.",
        _METHOD_REMEDY,
    ),
    "kasa_config": (
        "altered-base",
        "KaSA removes the smallest singular components of the base weights, so its factors fit an "
        "altered base.",
        "Merge it with PEFT (merge_and_unload), which repeats the truncation.",
    ),
}


def _initialisation(value: object) -> list[Blocker]:
    """Returns a blocker for initialisations that altered the base, and for ones that are not known."""
    if not isinstance(value, str):
        return []
    text = value.lower()
    shown = escape(value)
    if text.startswith(_ALTERED):
        message = f'"init_lora_weights" is "{shown}", which altered the base weights before training.'
        return [("altered-base", message, _LOFTQ_REMEDY if text == "loftq" else _ALTERED_REMEDY)]
    if text in _KEPT:
        return []
    message = f'"init_lora_weights" is "{shown}", which is not known; it may have altered the base weights.'
    remedy = "Set it to true in a copy of the config if you know that the base weights were left alone."
    return [("unknown-init", message, remedy)]
