"""Adapters of every PEFT type but LoRA, described from their files by types.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_tools.dialects._peft.blockers import Blocker
from adapterhub_tools.dialects._peft.config import PeftType
from adapterhub_tools.dialects._peft.keys import Factors
from adapterhub_tools.errors import Problem
from adapterhub_tools.model.adapter import FullTensor, TargetModule
from adapterhub_tools.model.tensor import TensorSpec

WHOLE_MODEL = "*"
"""The path of factors that belong to no single module: shared bases, prompts, routers."""

_FIELD_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "psoft_alpha": "alpha",
    "randlora_alpha": "alpha",
    "shadow_alpha": "alpha",
    "scaling": "scale",
}
"""Config field -> hyperparameter; ``scaling`` is the name of a rule in this package."""


def hyperparameters(config: Mapping[str, Any], kind: PeftType) -> dict[str, Any]:
    """Returns the config fields that enter the maths of this type; a rank of 0 is none (OFT)."""
    found = {
        _FIELD_NAMES.get(name, name): config[name] for name in kind.maths if config.get(name) is not None
    }
    if found.get("rank") == 0:
        del found["rank"]
    return found


def build(factors: Factors, config: Mapping[str, Any], kind: PeftType) -> list[TargetModule]:
    """Makes target modules of the factors: path, roles and the hyperparameters of the whole adapter.

    Patterns are not resolved: how they apply is the method's business, which this package may not have.
    """
    hparams = hyperparameters(config, kind)
    return [
        TargetModule(
            path=path or WHOLE_MODEL,
            method=kind.method,
            kind="unknown",
            hparams=dict(hparams),
            factors=dict(sorted(f.items())),
        )
        for path, f in sorted(factors.items())
    ]


def token_rows(
    factors: Factors, config: Mapping[str, Any], *, file: str, config_file: str
) -> tuple[list[FullTensor], list[Problem]]:
    """Makes full tensors of a TRAINABLE_TOKENS adapter, whose rows replace the base's."""
    indices = config.get("token_indices")
    full: list[FullTensor] = []
    problems: list[Problem] = []
    for path, have in sorted(factors.items()):
        spec: TensorSpec = have["rows"]
        good = isinstance(indices, list) and all(isinstance(i, int) and i >= 0 for i in indices)
        rows = tuple(indices) if good and isinstance(indices, list) else ()
        if not good or len(spec.shape) != 2 or spec.shape[0] != len(rows) or len(set(rows)) != len(rows):
            message = (
                f"trained token rows have shape {list(spec.shape)}; the config gives {len(rows)} good "
                "indices."
            )
            remedy = f'Correct "token_indices" in {config_file}, or save the adapter again.'
            problems.append(
                Problem(kind="token-rows", message=message, file=file, loc=spec.name, remedy=remedy)
            )
        full.append(FullTensor(target=f"{path}.weight", role="token_rows", tensor=spec, rows=rows))
    return full, problems


def blockers(kind: PeftType) -> list[Blocker]:
    """Returns why an adapter of this type cannot be merged by this version."""
    if kind.merge == "none":
        return [("unmergeable", f"{kind.name}: {kind.reason}", "Load it as an adapter with PEFT.")]
    message = f'merging the method "{kind.method}" is not available yet.'
    remedy = "Merge it with PEFT (merge_and_unload), or use a version of adaptertool that lists this method."
    return [("method", message, remedy)]
