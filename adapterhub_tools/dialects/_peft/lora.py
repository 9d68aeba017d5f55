"""LoRA in PEFT's spelling: factors to target modules, ranks and alphas resolved, everything checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterhub_tools.architectures import embedding_names
from adapterhub_tools.dialects._peft.keys import Factors, without_base_layer
from adapterhub_tools.dialects._peft.settings import Settings
from adapterhub_tools.dialects._peft.targets import TargetRule
from adapterhub_tools.errors import FormatError, Problem, escape
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.tensor import FLOAT_DTYPES, TensorSpec

_PAIRS = {"A": "B", "B": "A", "embedding_A": "embedding_B", "embedding_B": "embedding_A"}
_SHORT = {"embedding_A": "A", "embedding_B": "B"}
_KINDS_BY_RANK = {2: "linear", 3: "convnd", 4: "conv2d", 5: "convnd"}


@dataclass(slots=True, kw_only=True)
class Lora:
    """What was made of the factors.

    Attributes:
        modules: the target modules, ordered by path.
        problems: what is wrong.
        notes: what was resolved by rule.
        training: tensors that only training needed, by stored name.
        grouped: paths of convolutions in groups.
        attention: paths of multi-head attention modules.
    """

    modules: list[TargetModule] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    training: list[TensorSpec] = field(default_factory=list)
    grouped: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)


def build(factors: Factors, config: Mapping[str, Any], rule: TargetRule, *, method: str, file: str) -> Lora:
    """Makes target modules of the factors of a LoRA (or DoRA) adapter.

    Args:
        factors: module path -> role -> tensor, as ``keys.split`` returns them.
        config: the adapter's config; fields of a wrong type must have been reported already.
        rule: the config's target rule.
        method: the method's name for the modules.
        file: the tensors' file, for messages.
    """
    lora = Lora()
    paths = sorted(factors)
    outer = {path: without_base_layer(path) for path in paths}
    targets = [outer[path] for path in paths]
    settings = Settings(config, targets, rule.file)
    lora.problems.extend(settings.problems)
    lora.notes.extend(settings.notes)
    named = _matched(rule, targets, lora)
    tied = _tied_targets(config, named)
    in_parameters = dict(zip(targets, rule.match_parameters(targets), strict=True))
    for path in paths:
        have = _without_training(factors[path], lora)
        if not have:
            continue
        target, depth = outer[path], path.split(".").count("base_layer")
        expert = in_parameters[target] and (bool(rule.parameters) and not _is_plain(rule, named, target))
        if depth and path.endswith(".base_layer.out_proj"):
            lora.attention.append(target)
        elif target in tied:
            lora.notes.append(f'"{escape(target)}" is adapted because it is tied ("ensure_weight_tying").')
        elif not named[target] and not in_parameters[target] and not _inside_attention(path, named):
            _unmatched(target, have, rule, file, lora)
        module = _module(
            target, have, settings, method=method, expert=expert, depth=depth, file=file, lora=lora
        )
        lora.modules.append(module)
    if lora.attention:
        lora.notes.append(f'Removed "base_layer." from {len(lora.attention)} paths of multi-head attention.')
    lora.modules.sort(key=lambda m: (m.path, m.hparams.get("nesting", 0)))
    return lora


def _tied_targets(config: Mapping[str, Any], named: Mapping[str, bool]) -> set[str]:
    """Returns embeddings that PEFT adapts because another one is a target and the two shall stay tied."""
    if config.get("ensure_weight_tying") is not True:
        return set()
    embeddings = {path for path in named if path.rpartition(".")[2] in embedding_names()}
    return (
        {path for path in embeddings if not named[path]} if any(named[path] for path in embeddings) else set()
    )


def _is_plain(rule: TargetRule, named: Mapping[str, bool], target: str) -> bool:
    """Tells whether a module is a target by its own name rather than by one of its parameters."""
    return rule.target_modules not in (None, ()) and named[target]


def _inside_attention(path: str, named: Mapping[str, bool]) -> bool:
    return ".base_layer." in path and named.get(path.partition(".base_layer.")[0], False)


def _without_training(have: dict[str, TensorSpec], lora: Lora) -> dict[str, TensorSpec]:
    """Sets aside what training alone needed: VeLoRA's projections, MonteCLoRA's sampler."""
    lora.training.extend(spec for role, spec in have.items() if role.startswith("training."))
    return {role: spec for role, spec in have.items() if not role.startswith("training.")}


def _matched(rule: TargetRule, paths: Sequence[str], lora: Lora) -> dict[str, bool]:
    """Evaluates the target rule; where its patterns cannot be, that is reported and everything matches."""
    try:
        found = rule.match(paths)
    except FormatError as error:
        lora.problems.extend(error.problems)
        return dict.fromkeys(paths, True)
    return dict(zip(paths, found, strict=True))


def _unmatched(path: str, have: Mapping[str, TensorSpec], rule: TargetRule, file: str, lora: Lora) -> None:
    name = min(spec.name for spec in have.values())
    message = (
        f'the config\'s target rules do not name the module "{escape(path)}", so PEFT would not load it.'
    )
    remedy = f'Add it to "target_modules" in {rule.file} if it belongs to the adapter, or remove its tensors.'
    lora.problems.append(Problem(kind="unknown-key", message=message, file=file, loc=name, remedy=remedy))


def _module(
    path: str,
    have: dict[str, TensorSpec],
    settings: Settings,
    *,
    method: str,
    expert: bool,
    depth: int,
    file: str,
    lora: Lora,
) -> TargetModule:
    """Makes one target module and checks its factors against each other and the config."""
    say = _Say(path, file, lora)
    factors: dict[str, TensorSpec] = {}
    for role, spec in sorted(have.items()):
        short = _SHORT.get(role, role)
        if short in factors:
            say("duplicate-key", f'both "{escape(factors[short].name)}" and this give factor {short}.', spec)
        factors[short] = spec
        if spec.dtype not in FLOAT_DTYPES:
            say(
                "dtype",
                f"factor {short} has dtype {spec.dtype}; expected one of {', '.join(FLOAT_DTYPES)}.",
                spec,
                "Save the adapter in BF16, F16 or F32.",
            )
        if 0 in spec.shape or (short in ("A", "B") and len(spec.shape) < 2):
            say(
                "shape",
                f"factor {short} has shape {list(spec.shape)}; a sharded save left it incomplete.",
                spec,
                "Gather the shards (DeepSpeed ZeRO-3, FSDP) before save_pretrained and save again.",
            )
    embedding = "embedding_A" in have or "embedding_B" in have
    kind = _kind(factors, settings, embedding=embedding, expert=expert)
    for role in ("A", "B", "embedding_A", "embedding_B"):
        if role in have and _PAIRS[role] not in have:
            say(
                "missing-pair",
                f"factor {_SHORT.get(role, role)} stands without {_SHORT.get(_PAIRS[role], _PAIRS[role])}.",
                have[role],
                "The file is incomplete; save the adapter again.",
            )
    rank = None
    if "A" in factors and "B" in factors and min(len(factors["A"].shape), len(factors["B"].shape)) >= 2:
        rank = _check_pair(path, factors, settings, kind, say, lora)
    elif "A" not in factors and "B" not in factors:
        say(
            "missing-pair",
            "the module has neither A nor B.",
            next(iter(have.values())),
            "The file is incomplete; save the adapter again.",
        )
    _check_extras(factors, settings, kind, say)
    hparams = settings.of(path, rank)
    hparams["fan_in_fan_out"] = settings.fan_in_fan_out and kind in ("linear", "conv1d")
    if depth and expert:
        hparams["nesting"] = depth
    if settings.merged_linear:
        hparams["enable_lora"] = settings.enable_lora
    if path in lora.grouped:
        hparams["groups"] = factors["A"].shape[0] // max(factors["B"].shape[1], 1)
    return TargetModule(path=path, method=method, kind=kind, hparams=hparams, factors=factors)


class _Say:
    """Collects problems about one module."""

    def __init__(self, path: str, file: str, lora: Lora) -> None:
        self.path, self.file, self.lora = path, file, lora

    def __call__(self, kind: str, message: str, spec: TensorSpec | None = None, remedy: str = "") -> None:
        self.lora.problems.append(
            Problem(
                kind=kind,
                message=message,
                file=self.file,
                loc=self.path if spec is None else spec.name,
                remedy=remedy or "The config and the tensors do not belong together; save the adapter again.",
            )
        )


def _kind(factors: Mapping[str, TensorSpec], settings: Settings, *, embedding: bool, expert: bool) -> str:
    if expert:
        return "expert"
    if embedding:
        return "embedding"
    spec = factors.get("A") or factors.get("B")
    kind = "unknown" if spec is None else _KINDS_BY_RANK.get(len(spec.shape), "unknown")
    return "conv1d" if kind == "linear" and settings.fan_in_fan_out else kind


def _check_pair(
    path: str,
    factors: Mapping[str, TensorSpec],
    settings: Settings,
    kind: str,
    say: _Say,
    lora: Lora,
) -> int:
    """Checks that A and B fit each other and the config's rank; returns the rank that the tensors have."""
    a, b = factors["A"], factors["B"]
    rank, across = a.shape[0], b.shape[1]
    if settings.merged_linear:
        return across  # A stacks one factor for each enabled slice, B is a grouped convolution
    if len(a.shape) != len(b.shape):
        say("shape", f"A has shape {list(a.shape)} and B {list(b.shape)}; expected as many dimensions.", b)
        return rank
    if settings.blocks:
        return rank  # block-diagonal factors are narrower; their method checks them
    if across != rank:
        if kind in ("conv2d", "convnd") and across and rank % across == 0:
            lora.grouped.append(path)
        else:
            say(
                "shape",
                f"A has shape {list(a.shape)} and B {list(b.shape)}; the ranks {rank} and {across} differ.",
                b,
            )
    if kind in ("conv2d", "convnd") and any(n != 1 for n in b.shape[2:]):
        say("shape", f"B of a convolution has shape {list(b.shape)}; expected a kernel of size 1.", b)
    want = settings.ranks.get(path)
    if not settings.known or not isinstance(want, int) or want <= 0:
        return rank
    if rank != want and kind != "expert":  # stacked experts have rank × experts rows
        say(
            "rank",
            f"A has shape {list(a.shape)}, so rank {rank}; the config says {want}.",
            a,
            f'Correct "r" or "rank_pattern" in {settings.file}, or use the config that belongs to these '
            "tensors.",
        )
    return rank


def _check_extras(factors: Mapping[str, TensorSpec], settings: Settings, kind: str, say: _Say) -> None:
    """Checks bias, magnitude and diagonal: there exactly if the config says so, and of the right shape."""
    out = factors["B"].shape[0] if "B" in factors and factors["B"].shape else None
    rank = factors["A"].shape[0] if "A" in factors and factors["A"].shape else None
    declared = {
        "bias": (settings.lora_bias, "lora_bias", (out,)),
        "magnitude": (settings.dora, "use_dora", _magnitude_shape(factors, kind, out)),
        "diag": (settings.kasa, "kasa_config", (rank,)),
    }
    for role, (wanted, name, shape) in declared.items():
        spec = factors.get(role)
        if spec is None:
            if wanted and (role != "bias" or kind != "embedding"):
                say("missing-tensor", f'the config sets "{name}", but the {role} is missing.')
            continue
        if not wanted and settings.known:
            say(
                "unknown-key",
                f'the file has a {role}, but the config does not set "{name}"; PEFT would drop it.',
                spec,
                f'Set "{name}" in {settings.file} if it was trained so, or remove the tensor.',
            )
        if None not in shape and spec.shape != shape:
            say("shape", f"the {role} has shape {list(spec.shape)}; expected {list(shape)}.", spec)


def _magnitude_shape(factors: Mapping[str, TensorSpec], kind: str, out: int | None) -> tuple[int | None, ...]:
    if kind in ("conv2d", "convnd") and "B" in factors:
        return (1, out, *(1 for _ in factors["B"].shape[2:]))
    return (out,)
