"""Adapters of every PEFT type but LoRA, described from their files by types.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adapterhub_tools import registry
from adapterhub_tools.dialects._peft.blockers import Blocker, method_blockers, replication
from adapterhub_tools.dialects._peft.config import PeftType
from adapterhub_tools.dialects._peft.keys import Factors
from adapterhub_tools.dialects._peft.module_settings import of_modules
from adapterhub_tools.dialects._peft.variants import not_merged, variant_blockers
from adapterhub_tools.errors import Problem
from adapterhub_tools.model.adapter import WHOLE_MODEL, FullTensor, TargetModule
from adapterhub_tools.model.tensor import TensorSpec

_WHOLE = ("", "base_model")
"""Paths of keys that belong to no module."""

_EMBEDDING = "embedding_"
"""How the roles of an embedding's factors begin."""


def build(
    factors: Factors, config: Mapping[str, Any], kind: PeftType, *, file: str, config_file: str
) -> tuple[list[TargetModule], list[Problem]]:
    """Makes target modules of the factors: path, roles and the module's own hyperparameters.

    Args:
        factors: module path -> role -> tensor.
        config: the adapter's config.
        kind: its type.
        file: the tensors' file, for messages.
        config_file: the config file, for messages.
    """
    paths = sorted(factors)
    settings, problems = of_modules(config, kind, paths, file=config_file)
    modules = [
        TargetModule(
            path=WHOLE_MODEL if path in _WHOLE else path,
            method=kind.method,
            kind="embedding" if any(role.startswith(_EMBEDDING) for role in factors[path]) else "unknown",
            hparams=hparams,
            factors={role.removeprefix(_EMBEDDING): spec for role, spec in sorted(factors[path].items())},
        )
        for path, hparams in zip(paths, settings, strict=True)
    ]
    if kind.method in registry.names("methods"):
        problems.extend(_damaged(factors, file))
    return modules, problems


def _damaged(factors: Factors, file: str) -> Iterator[Problem]:
    """Yields the factors that hold nothing: a sharded save left them empty."""
    for roles in factors.values():
        for role, spec in roles.items():
            if 0 in spec.shape and role not in ("A", "B", "E"):
                yield Problem(
                    kind="shape",
                    message=f"factor {role} has shape {list(spec.shape)}; a sharded save left it incomplete.",
                    file=file,
                    loc=spec.name,
                    remedy="Gather the shards (DeepSpeed ZeRO-3, FSDP) before saving, and save again.",
                )


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


def blockers(kind: PeftType, config: Mapping[str, Any], modules: Iterable[TargetModule]) -> list[Blocker]:
    """Returns why an adapter of this type cannot be merged as it stands.

    Args:
        kind: its type.
        config: its config.
        modules: its target modules.
    """
    if kind.merge == "none":
        return [("unmergeable", f"{kind.name}: {kind.reason}", "Load it as an adapter with PEFT.")]
    if kind.merge == "rows":
        # Rows that replace the base's need no method.
        return []
    roles = {role for module in modules for role in module.factors}
    own = not_merged(kind.name) or method_blockers(kind.method)
    own = own or variant_blockers(kind.name, config, roles)
    return [*replication(config), *own]
