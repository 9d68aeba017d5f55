"""What identifies a base to an adapter: its digests, recorded in the manifest and compared before use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterhub_tools.errors import AdapterError, FormatError, MismatchError, Problem, UnsupportedError
from adapterhub_tools.model.base import BaseRef
from adapterhub_tools.model.manifest import MANIFEST_NAME
from adapterhub_tools.model.manifest_blocks import LOW_RANK_METHODS
from adapterhub_tools.model.scaling import scale_of
from adapterhub_tools.ops.base_config import tie_problems
from adapterhub_tools.ops.base_report import main_dtype
from adapterhub_tools.ops.fit import Fit, fit
from adapterhub_tools.ops.hash import tensor_digests
from adapterhub_tools.ops.manifest_record import OTHER_TARGETS
from adapterhub_tools.store.digest import DEFAULT, config_digest, root_digest, split_digest

if TYPE_CHECKING:
    from adapterhub_tools.model.adapter import Adapter, TargetModule
    from adapterhub_tools.model.manifest import Manifest
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.store.checkpoint import Checkpoint

CHECKS = ("full", "targets", "off")
"""Which recorded digest a base is compared with."""

_OTHER_BASE = "Use the base that the adapter was trained on; the manifest names it."
_UNSUPPORTED_KINDS = ("quantised-base", "unknown-scheme", "tied-unsupported")


def fit_problems(
    adapter: Adapter, checkpoint: Checkpoint, add: Callable[[type[AdapterError], Iterable[Problem]], None]
) -> Fit:
    """Fits an adapter to a base and reports what is wrong, each problem in its class.

    Modules whose factors or hyperparameters are incomplete, which reading has reported, have no shape to
    compare and are left out.

    Args:
        adapter: as read from its files.
        checkpoint: the opened base.
        add: takes a class of error and problems.
    """
    complete = tuple(module for module in adapter.modules if _has_shape(module))
    fitted = fit(replace(adapter, modules=complete), checkpoint)
    for problem in fitted.problems:
        add(UnsupportedError if problem.kind in _UNSUPPORTED_KINDS else MismatchError, [problem])
    add(FormatError, tie_problems(checkpoint, fitted.changed_names))
    return fitted


def _has_shape(module: TargetModule) -> bool:
    """Tells whether a low-rank module has both factors, as matrices, and a scale; others are not compared."""
    if module.method not in LOW_RANK_METHODS:
        return True
    factors = (module.factors.get("A"), module.factors.get("B"))
    return all(f is not None and len(f.shape) >= 2 for f in factors) and scale_of(module.hparams) is not None


def identify_base(
    known: BaseRef,
    checkpoint: Checkpoint,
    fitted: Fit,
    *,
    cache: bool,
    progress: Progress | None,
) -> tuple[BaseRef, tuple[str, ...]]:
    """Returns what a base is, with its digests, and the cache's warnings.

    Args:
        known: id, revision and quantisation as far as they are known.
        checkpoint: the opened base; of one that is stored quantised, its view as plain weights.
        fitted: how the adapter lies on it.
        cache: whether the digest cache may be used.
        progress: told how far it is.
    """
    tensors, warnings = tensor_digests(checkpoint.on_disk, algorithm=DEFAULT, cache=cache, progress=progress)
    config = checkpoint.config
    targets = {name: tensors[name] for name in checkpoint.stored_names(fitted.target_names)}
    model_type = None if config is None else config.get("model_type")
    base = replace(
        known,
        architecture=model_type if isinstance(model_type, str) else known.architecture,
        dtype=main_dtype(checkpoint),
        parameters=sum(tensor.spec.elements for tensor in checkpoint.tensors.values()),
        digest=root_digest(DEFAULT, tensors),
        targets_digest=root_digest(DEFAULT, targets) if targets else None,
        config_digest=None if config is None else config_digest(config),
    )
    return base, warnings


def base_problems(
    manifest: Manifest,
    checkpoint: Checkpoint,
    fitted: Fit,
    *,
    check_base: str,
    cache: bool,
    progress: Progress | None,
) -> list[Problem]:
    """Returns how a base differs from the one that a manifest records.

    Args:
        manifest: the adapter's manifest.
        checkpoint: the opened base; of one that is stored quantised, its view as plain weights.
        fitted: how the adapter lies on it.
        check_base: one of CHECKS; ``"off"`` compares nothing.
        cache: whether the digest cache may be used.
        progress: told how far it is.
    """
    problems: list[Problem] = []
    base = manifest.base
    if check_base == "off":
        return problems

    def compare(name: str, recorded: str | None, found: str, what: str, remedy: str = _OTHER_BASE) -> None:
        if recorded is not None and recorded != found:
            message = f"{what} has {found}; the manifest says {recorded}."
            problems.append(
                Problem(
                    kind=f"base-{name.replace('_', '-')}",
                    message=message,
                    file=MANIFEST_NAME,
                    loc=f"/base/{name}",
                    remedy=remedy,
                )
            )

    if checkpoint.config is not None:
        compare("config_digest", base.config_digest, config_digest(checkpoint.config), "the base's config")
    cached: dict[str, dict[str, bytes]] = {}

    def digests(algorithm: str) -> dict[str, bytes]:
        if algorithm not in cached:
            names = None if whole else targets
            cached[algorithm], _ = tensor_digests(
                checkpoint.on_disk, algorithm=algorithm, names=names, cache=cache, progress=progress
            )
        return cached[algorithm]

    targets = checkpoint.stored_names(fitted.target_names)
    whole = check_base == "full" and base.digest is not None
    if whole and base.digest is not None:
        algorithm, _ = split_digest(base.digest, file=MANIFEST_NAME, loc="/base/digest")
        compare("digest", base.digest, root_digest(algorithm, digests(algorithm)), "the base")
    if base.targets_digest is not None:
        algorithm, _ = split_digest(base.targets_digest, file=MANIFEST_NAME, loc="/base/targets_digest")
        of_targets = {name: digests(algorithm)[name] for name in targets}
        remedy = OTHER_TARGETS if whole and not problems else _OTHER_BASE
        what = "the target tensors of the base"
        compare("targets_digest", base.targets_digest, root_digest(algorithm, of_targets), what, remedy)
    return problems
