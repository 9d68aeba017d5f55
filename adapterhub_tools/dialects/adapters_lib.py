"""The format of the adapters library (AdapterHub): described and moved, but not merged.

Its ``adapter_config.json`` has a ``config`` beside the ``model_class``, its weights are
``adapter.safetensors`` or ``pytorch_adapter.bin``. Bottleneck adapters are layers of their own between those
of the base; what else the library saves (LoRA, prefixes, prompts, unions) has other names and scales than in
PEFT.

Source: adapters 1.2, src/adapters/loading.py and configuration/adapter_config.py; real files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_tools.errors import Problem, escape
from adapterhub_tools.model.adapter import WHOLE_MODEL, Adapter, TargetModule
from adapterhub_tools.model.base import BaseRef
from adapterhub_tools.model.tensor import TensorSpec

__all__ = ["detect", "examine", "targeted"]

WEIGHTS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"

_CONTAINERS = (
    "adapters",
    "loras",
    "prefix_tunings",
    "prompt_tunings",
    "refts",
    "invertible_adapters",
    "shared_parameters",
    "attention_text_task_adapters",
    "attention_text_lang_adapters",
    "layer_text_task_adapters",
    "layer_text_lang_adapters",
)
"""Parts of a key that hold adapters by name: ``<path>.adapters.<name>.adapter_down.0.weight``."""

_RENAMED = {"r": "rank", "scaling": "scale"}
"""Config field -> hyperparameter; ``scaling`` is the name of a rule in this package."""

_SERVE = "Load it with the adapters library."
_OWN_FORM = "Merge it with the adapters library (merge_adapter), or train it with PEFT, whose form is merged."
_WHY = {
    "bottleneck": (
        "unmergeable",
        "it adds layers of its own, with a non-linearity, between those of the base; no weight stands for "
        "them",
        _SERVE,
    ),
    "prefix_tuning": (
        "unmergeable",
        "it puts keys and values before those of the input; there is no weight to change",
        _SERVE,
    ),
    "prompt_tuning": (
        "unmergeable",
        "it puts vectors before the input; there is no weight to change",
        _SERVE,
    ),
    "reft": (
        "unmergeable",
        "it changes hidden states at chosen positions; no weight stands for that",
        _SERVE,
    ),
    "union": (
        "unmergeable",
        "it is several adapters in one, of which some are no change of a weight",
        _SERVE,
    ),
    "lora": (
        "method",
        "the adapters library keeps LoRA and (IA)³ in a form of its own, whose scale depends on its version",
        _OWN_FORM,
    ),
}
"""Architecture -> why it is not merged: kind, message, remedy."""


def detect(header: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> bool:
    """Tells whether files look like the library's: its config, or without one the names of its tensors.

    Args:
        header: stored name -> tensor; may be empty.
        config: the parsed ``adapter_config.json``, or None if there is none.
    """
    if config is not None:
        return "config" in config and isinstance(config.get("model_class"), str) and "peft_type" not in config
    return bool(header) and all(_container(name.split(".")) is not None for name in header)


def examine(
    header: Mapping[str, TensorSpec],
    config: Mapping[str, Any] | None,
    *,
    file: str = WEIGHTS_FILE,
    config_file: str = CONFIG_FILE,
) -> tuple[Adapter, tuple[Problem, ...]]:
    """Returns the adapter as far as it can be described, and every problem; never raises for content.

    All its tensors are factors of the whole model: the layers that they belong to are not the base's.

    Args:
        header: stored name -> tensor.
        config: the parsed config, or None if there is none.
        file: the name of the tensors' file, for messages.
        config_file: the name of the config file, for messages.
    """
    problems: list[Problem] = []
    fields: Mapping[str, Any] = config or {}
    method, hparams = _method(fields, config_file, problems)
    if config is None:
        message = f"there is no {config_file}, so the sort of adapter and its base are unknown."
        remedy = f"Put the {config_file} that was saved with the tensors beside them."
        problems.append(Problem(kind="missing-config", message=message, file=config_file, remedy=remedy))
    factors: dict[str, TensorSpec] = {}
    others: list[str] = []
    for name, spec in sorted(header.items()):
        role = _role(name, fields.get("name"))
        if role is None or role in factors:
            others.append(name)
        else:
            factors[role] = spec
    problems.extend(_others(others, file))
    if not factors:
        message = "the file holds no tensors of an adapter."
        remedy = "The file is empty, or a head's or another tool's; save the adapter again."
        problems.append(Problem(kind="empty", message=message, file=file, remedy=remedy))
    modules: tuple[TargetModule, ...] = ()
    if factors:
        whole = TargetModule(
            path=WHOLE_MODEL, method=method, kind="unknown", hparams=dict(hparams), factors=factors
        )
        modules = (whole,)
    kind, why, remedy = _WHY.get(method, _WHY["lora"])
    adapter = Adapter(
        dialect="adapters_lib",
        method=method,
        hparams=hparams,
        modules=modules,
        base=_base(fields),
        blockers=((kind, f"{method}: {why}.", remedy),),
        unparsed={"config": dict(fields), "tensors": others},
    )
    return adapter, tuple(problems)


def targeted(
    adapter: Adapter,  # noqa: ARG001 - whatever it says
    paths: Sequence[str],  # noqa: ARG001 - and whatever the base has
) -> tuple[list[str], bool]:
    """Returns that the config names no module of the base: its layers are the adapter's own."""
    return [], True


def _method(
    config: Mapping[str, Any], config_file: str, problems: list[Problem]
) -> tuple[str, dict[str, Any]]:
    """Returns the method's name and hyperparameters; an old config has only the name of a preset."""
    inner = config.get("config")
    if isinstance(inner, str):
        return "bottleneck", {"preset": inner}
    if not isinstance(inner, Mapping):
        if config:
            message = '"config" is neither an object nor the name of a preset.'
            remedy = "Save the adapter again with the adapters library."
            problems.append(
                Problem(kind="config-type", message=message, file=config_file, loc="config", remedy=remedy)
            )
        return "bottleneck", {}
    architecture = inner.get("architecture")
    method = "bottleneck" if architecture is None else str(architecture)
    if method not in _WHY:
        message = f'"architecture" is "{escape(method)}"; known are {", ".join(sorted(_WHY))} and null.'
        remedy = "Use a later version of adaptertool if the adapters library added it."
        problems.append(
            Problem(kind="config-value", message=message, file=config_file, loc="architecture", remedy=remedy)
        )
        method = "bottleneck"
    hparams: dict[str, Any] = {
        _RENAMED.get(str(name), str(name)): value
        for name, value in inner.items()
        if isinstance(value, (bool, int, float, str, list)) and name != "architecture"
    }
    rank = hparams.get("rank")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        del hparams["rank"]
    return method, hparams


def _container(parts: Sequence[str]) -> int | None:
    """Returns where in a key the part stands that holds adapters by name; a name and a role follow it."""
    return next((i for i, part in enumerate(parts) if part in _CONTAINERS and len(parts) > i + 2), None)


def _role(name: str, adapter_name: object) -> str | None:
    """Returns a key without the adapter's name, or None if it is no adapter's."""
    parts = name.split(".")
    at = _container(parts)
    if at is None:
        return None
    if isinstance(adapter_name, str) and adapter_name and parts[at + 1] != adapter_name:
        return None
    return ".".join((*parts[: at + 1], *parts[at + 2 :]))


def _others(names: Sequence[str], file: str) -> list[Problem]:
    if not names:
        return []
    message = f"{len(names)} tensors are not this adapter's: heads, or another adapter's."
    return [
        Problem(
            kind="unknown-key",
            message=message,
            file=file,
            loc=names[0],
            remedy="Save the adapter alone with save_adapter.",
            severity="warning",
        )
    ]


def _base(config: Mapping[str, Any]) -> BaseRef | None:
    name, kind = config.get("model_name"), config.get("model_type")
    id_ = name if isinstance(name, str) and name else None
    architecture = kind if isinstance(kind, str) and kind else None
    return BaseRef(id=id_, architecture=architecture) if id_ or architecture else None
