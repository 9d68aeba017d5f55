"""The naming scheme of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors`` to an Adapter.

Reads configs of PEFT 0.1 to 0.21. LoRA is read in full; every other ``peft_type`` is described by the table
``_peft/types.json``. Nothing here opens a file or holds a tensor: a header and a config go in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from adapterhub_tools.dialects._peft import blockers as lora_blockers
from adapterhub_tools.dialects._peft import declared as declarations
from adapterhub_tools.dialects._peft import generic, lora
from adapterhub_tools.dialects._peft.config import PeftType, base_ref, check_fields, table
from adapterhub_tools.dialects._peft.full import FullTensors
from adapterhub_tools.dialects._peft.keys import PREFIX, Factors, clean, json_kind, limited, split
from adapterhub_tools.dialects._peft.module_settings import hyperparameters
from adapterhub_tools.dialects._peft.patterns import key_matches, start_matches
from adapterhub_tools.dialects._peft.settings import DEFAULT_ALPHA, DEFAULT_RANK
from adapterhub_tools.dialects._peft.targets import TargetRule
from adapterhub_tools.dialects._peft.writing import Written
from adapterhub_tools.dialects._peft.writing import write as _write
from adapterhub_tools.errors import Problem, escape
from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
from adapterhub_tools.model.declared import Declared
from adapterhub_tools.model.tensor import TensorSpec

__all__ = [
    "TargetRule",
    "Written",
    "declared",
    "detect",
    "examine",
    "match_keys",
    "match_starts",
    "targeted",
    "write",
]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def detect(header: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> bool:
    """Tells whether files look like PEFT's: a config with ``peft_type``, or keys with PEFT's prefix.

    Args:
        header: stored name -> tensor; may be empty.
        config: the parsed ``adapter_config.json``, or None if there is none.
    """
    if config is not None:
        return isinstance(config.get("peft_type"), str)
    return any(PREFIX in name for name in header)


def examine(
    header: Mapping[str, TensorSpec],
    config: Mapping[str, Any] | None,
    *,
    file: str = WEIGHTS_FILE,
    config_file: str = CONFIG_FILE,
) -> tuple[Adapter, tuple[Problem, ...]]:
    """Returns the adapter as far as it can be described, and every problem; never raises for content.

    Args:
        header: stored name -> tensor.
        config: the parsed config, or None if there is none.
        file: the name of the tensors' file, for messages.
        config_file: the name of the config file, for messages.

    Returns:
        The adapter, and problems of severity "error" or "warning"; at most a hundred of a kind.
    """
    problems: list[Problem] = []
    kind = _kind(header, config, config_file, problems)
    fields: Mapping[str, Any] = config or {}
    keys = clean(header, file=file)
    notes: list[str] = []
    if config is not None and kind is not None:
        found, notes = check_fields(fields, kind, file=config_file)
        problems.extend(found)
        fields = _usable(fields, found)
    factors, rest = split(keys, {} if kind is None else kind.roles, file=file)
    parts = _Parts(file=file, config_file=config_file, names=keys.names)
    if kind is None:
        _all_unknown(rest, parts)
    elif kind.name == "LORA":
        _lora(factors, rest, fields, parts)
    else:
        _other(factors, rest, fields, kind, parts)
    adapter = Adapter(
        dialect="peft",
        method=parts.method,
        hparams=parts.hparams,
        modules=tuple(parts.modules),
        full=tuple(parts.full),
        base=base_ref(fields),
        blockers=tuple(parts.blockers),
        notes=(*keys.notes, *notes, *parts.notes),
        unparsed={"config": dict(config or {}), "tensors": sorted(parts.unparsed)},
        ties=fields.get("ensure_weight_tying") is True,
    )
    return adapter, limited((*problems, *keys.problems, *parts.problems))


def targeted(adapter: Adapter, paths: Sequence[str]) -> tuple[list[str], bool]:
    """Returns which modules of a base the adapter's config means.

    Args:
        adapter: as read by ``examine``.
        paths: module paths in memory.

    Returns:
        The paths that are meant, and whether the config names them; False where it leaves the choice to the
        base's class (``all-linear``), and then every path is returned.

    Raises:
        FormatError: a regular expression of the config is invalid or takes too long.
    """
    rule = TargetRule.from_config(adapter.unparsed.get("config", {}))
    hits = rule.match(paths)
    return [path for path, hit in zip(paths, hits, strict=True) if hit], not rule.needs_base


def declared(adapter: Adapter) -> Declared:
    """Returns what the adapter's config declares beside the factors, as read by ``examine``."""
    return declarations.from_config(adapter.unparsed.get("config", {}))


def match_keys(keys: Sequence[str], paths: Sequence[str], *, loc: str = "") -> list[list[int]]:
    """Returns for each path which keys match it, in order, as ``rank_pattern`` and ``alpha_pattern`` do.

    Args:
        keys: regular expressions for the end of a path.
        paths: module paths.
        loc: where the keys come from, for messages.

    Raises:
        FormatError: a key is invalid or takes too long.
    """
    return key_matches(keys, paths, loc=loc)


def match_starts(keys: Sequence[str], paths: Sequence[str], *, loc: str = "") -> list[list[int]]:
    """Returns for each path which keys match it from its start to the end of a part of it, in order.

    Args:
        keys: regular expressions.
        paths: module paths.
        loc: where the keys come from, for messages.

    Raises:
        FormatError: a key is invalid or takes too long.
    """
    return start_matches(keys, paths, loc=loc)


def write(adapter: Adapter, *, base_modules: Collection[str] | None = None) -> Written:
    """Returns config and tensor names of a LoRA or DoRA adapter, as PEFT 0.21 reads them.

    Args:
        adapter: the description; the names of its tensors are any that differ, and each module has ``rank``,
            ``alpha`` and ``scaling``. The config in ``unparsed`` is kept where it still holds.
        base_modules: paths of the base's modules that have weights, so that the targets mean no other
            module; None if the base is not known, and then targets that are new are listed by their last
            part.

    Raises:
        UnsupportedError: another method, a factor that PEFT has no place for, or scaling rules that differ.
    """
    return _write(adapter, base_modules)


class _Parts:
    """What becomes of an adapter's files while they are read."""

    def __init__(self, *, file: str, config_file: str, names: Set[str]) -> None:
        self.file, self.config_file, self.names = file, config_file, names
        self.method = "unknown"
        self.hparams: dict[str, Any] = {}
        self.modules: list[TargetModule] = []
        self.full: list[FullTensor] = []
        self.blockers: list[tuple[str, str, str]] = []
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.unparsed: list[str] = []


def _kind(
    header: Mapping[str, TensorSpec],
    config: Mapping[str, Any] | None,
    config_file: str,
    problems: list[Problem],
) -> PeftType | None:
    """Returns the row of the adapter's type; without a config it is LoRA if the keys say so."""
    rows = table()[0]
    if config is None:
        message = f"there is no {config_file}, so rank, alpha and targets are unknown."
        remedy = f"Put the {config_file} that was saved with the tensors beside them."
        problems.append(Problem(kind="missing-config", message=message, file=config_file, remedy=remedy))
        return rows["LORA"] if any(".lora_" in name for name in header) else None
    name = config.get("peft_type")
    row = rows.get(name.upper()) if isinstance(name, str) else None
    if row is None:
        found = f'"{escape(name)}"' if isinstance(name, str) else json_kind(name)
        message = f'"peft_type" is {found}; expected one of the {len(rows)} types of PEFT up to 0.21.'
        remedy = "If this is another tool's config, convert the adapter to PEFT's form first."
        problems.append(
            Problem(kind="peft-type", message=message, file=config_file, loc="peft_type", remedy=remedy)
        )
    return row


def _usable(config: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Returns the config without the fields whose type was wrong, so that reading can go on."""
    wrong = {problem.loc for problem in problems if problem.kind == "config-type"}
    return {name: value for name, value in config.items() if name not in wrong}


def _all_unknown(rest: Mapping[str, TensorSpec], parts: _Parts) -> None:
    for spec in rest.values():
        remedy = "Correct the config's peft_type first."
        parts.problems.append(
            Problem(
                kind="unknown-key",
                message="its role is unknown.",
                file=parts.file,
                loc=spec.name,
                remedy=remedy,
            )
        )


def _lora(factors: Factors, rest: Mapping[str, TensorSpec], config: Mapping[str, Any], parts: _Parts) -> None:
    """Reads a LoRA adapter, with its variants."""
    merged_linear = bool(config.get("enable_lora"))
    dora = config.get("use_dora") is True or any("magnitude" in have for have in factors.values())
    parts.method = "dora" if dora else "lora_merged_linear" if merged_linear else "lora"
    rule = TargetRule.from_config(config, file=parts.config_file)
    found = lora.build(factors, config, rule, method=parts.method, file=parts.file)
    parts.modules, parts.problems, parts.notes = found.modules, found.problems, found.notes
    full = FullTensors(
        config, rule, {module.path for module in found.modules}, file=parts.file, names=parts.names
    )
    full.add(rest)
    parts.full = full.full
    parts.problems.extend(full.problems)
    parts.notes.extend(full.notes)
    _set_aside(found.training, "needed for training only", parts)
    _set_aside(full.copies, "an untouched copy of the base", parts)
    if config:
        parts.hparams = {
            "rank": config.get("r", DEFAULT_RANK),
            "alpha": config.get("lora_alpha", DEFAULT_ALPHA),
            "scaling": "alpha/sqrt(rank)" if config.get("use_rslora") is True else "alpha/rank",
            "fan_in_fan_out": config.get("fan_in_fan_out") is True,
        }
    if merged_linear:
        parts.hparams["enable_lora"] = config["enable_lora"]
    parts.blockers = lora_blockers.blockers(config, method=parts.method)
    _more_blockers(found, parts)
    if not parts.modules and not parts.full:
        message = "the file holds no LoRA tensors."
        remedy = "The file is empty or incomplete; save the adapter again."
        parts.problems.append(Problem(kind="empty", message=message, file=parts.file, remedy=remedy))


def _more_blockers(found: lora.Lora, parts: _Parts) -> None:
    """Adds what only the tensors tell."""
    if found.grouped:
        message = (
            f'"{escape(found.grouped[0])}" is a convolution in groups; PEFT does not merge those either.'
        )
        parts.blockers.append(("grouped-convolution", message, "Serve it as an adapter."))
    if found.attention:
        message = (
            f'"{escape(found.attention[0])}" belongs to a multi-head attention module with one input '
            "projection."
        )
        parts.blockers.append(("multihead-attention", message, "Merge it with PEFT (merge_and_unload)."))


def _set_aside(specs: list[TensorSpec] | list[str], why: str, parts: _Parts) -> None:
    """Accounts for tensors that do not enter a merge."""
    names = [spec if isinstance(spec, str) else spec.name for spec in specs]
    if names:
        parts.notes.append(f'Set aside {len(names)} tensors, {why}; the first is "{escape(min(names))}".')
        parts.unparsed.extend(names)


def _other(
    factors: Factors, rest: Mapping[str, TensorSpec], config: Mapping[str, Any], kind: PeftType, parts: _Parts
) -> None:
    """Reads an adapter of any other type."""
    parts.method = kind.method
    parts.hparams = hyperparameters(config, kind)
    rule = TargetRule.from_config(config, file=parts.config_file)
    full = FullTensors(config, rule, set(factors), file=parts.file, names=parts.names)
    full.add(rest)
    if kind.name == "TRAINABLE_TOKENS":
        rows, problems = generic.token_rows(factors, config, file=parts.file, config_file=parts.config_file)
        parts.full = sorted([*rows, *full.full], key=lambda f: (f.target, f.role))
        parts.problems.extend(problems)
    else:
        parts.modules, problems = generic.build(
            factors, config, kind, file=parts.file, config_file=parts.config_file
        )
        parts.problems.extend(problems)
        parts.full = full.full
    parts.problems.extend(full.problems)
    parts.notes.extend(full.notes)
    _set_aside(full.copies, "an untouched copy of the base", parts)
    parts.blockers = generic.blockers(kind, config, parts.modules)
    if not parts.modules and not parts.full:
        message = f"the file holds no {kind.name} tensors."
        remedy = "The file is empty or incomplete; save the adapter again."
        parts.problems.append(Problem(kind="empty", message=message, file=parts.file, remedy=remedy))
