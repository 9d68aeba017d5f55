r"""A LoRA or DoRA adapter to PEFT's spelling: ``adapter_config.json`` and the names of the tensors.

What the config said before is kept where it still holds. ``rank_pattern`` and ``alpha_pattern`` name only
the modules that differ from the most frequent value, by the shortest end of a path that all modules with that
end agree on: PEFT reads a key as the regular expression ``(.*\.)?(key)$`` and takes the first that matches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_tools.dialects._peft.full import FullTensors
from adapterhub_tools.dialects._peft.keys import PREFIX, clean
from adapterhub_tools.dialects._peft.patterns import is_literal, key_matches
from adapterhub_tools.dialects._peft.settings import Settings
from adapterhub_tools.dialects._peft.targets import TargetRule
from adapterhub_tools.errors import Problem, UnsupportedError
from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
from adapterhub_tools.model.tensor import TensorSpec

_METHODS = ("lora", "dora")
_SUFFIXES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_EMBEDDING_SUFFIXES = {**_SUFFIXES, "A": "lora_embedding_A", "B": "lora_embedding_B"}
_SCALINGS = {"alpha/rank": False, "alpha/sqrt(rank)": True}
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
_FRESH: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": True,
    "lora_dropout": 0.0,
    "bias": "none",
    "modules_to_save": None,
    "init_lora_weights": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An adapter in PEFT's spelling.

    Attributes:
        config: the content of ``adapter_config.json``.
        tensors: the name that a tensor has in the description -> the tensor as PEFT stores it.
        adapter: the description with those names.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    adapter: Adapter


def write(adapter: Adapter, base_modules: Collection[str] | None) -> Written:
    """Returns config and tensor names; see ``dialects.peft.write``."""
    if adapter.method not in _METHODS or any(m.method not in _METHODS for m in adapter.modules):
        found = sorted({adapter.method, *(m.method for m in adapter.modules)} - set(_METHODS))
        raise UnsupportedError.of(
            "method",
            f"adapters of type {', '.join(found)} cannot be written in PEFT's form by this version.",
            remedy="Convert it to LoRA first: `adaptertool convert --to lora`.",
        )
    before = _before(adapter)
    tensors: dict[str, TensorSpec] = {}

    def rename(spec: TensorSpec, name: str) -> TensorSpec:
        if spec.name in tensors:
            raise ValueError(f"two tensors of the description are called {spec.name!r}")
        tensors[spec.name] = TensorSpec(name=name, dtype=spec.dtype, shape=spec.shape)
        return tensors[spec.name]

    modules = tuple(_named_module(module, rename) for module in adapter.modules)
    full = tuple(
        FullTensor(
            target=item.target,
            role=item.role,
            tensor=rename(item.tensor, _full_name(item, adapter)),
            rows=item.rows,
        )
        for item in adapter.full
    )
    config = {**_FRESH, **before}
    config["peft_type"] = "LORA"
    config["use_dora"] = adapter.method == "dora"
    config["lora_bias"] = any("bias" in module.factors for module in adapter.modules)
    config["fan_in_fan_out"] = any(_is_transposed(module) for module in adapter.modules)
    if adapter.base is not None and adapter.base.id is not None:
        config["base_model_name_or_path"] = adapter.base.id
        config["revision"] = adapter.base.revision or config["revision"]
    _write_scales(config, adapter, before)
    _write_targets(config, adapter, base_modules)
    _write_full(config, adapter, full, base_modules)
    described = Adapter(
        dialect="peft",
        method=adapter.method,
        hparams=adapter.hparams,
        modules=modules,
        full=full,
        base=adapter.base,
        ties=adapter.ties,
        unparsed={"config": config, "tensors": []},
    )
    return Written(config=config, tensors=tensors, adapter=described)


def _before(adapter: Adapter) -> dict[str, Any]:
    """Returns the config that the adapter was read from, if it was a LoRA of PEFT."""
    config = adapter.unparsed.get("config", {}) if adapter.dialect == "peft" else {}
    if not isinstance(config, dict):
        return {}
    if str(config.get("peft_type", "LORA")).upper() == "LORA":
        return {name: value for name, value in config.items() if name not in ("enable_lora", "merge_weights")}
    kept = (
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "modules_to_save",
        "target_modules",
        *_NARROWING,
    )
    return {name: config[name] for name in kept if name in config}


def _named_module(module: TargetModule, rename: Callable[[TensorSpec, str], TensorSpec]) -> TargetModule:
    suffixes = _EMBEDDING_SUFFIXES if module.kind == "embedding" else _SUFFIXES
    unknown = sorted(set(module.factors) - set(suffixes))
    if unknown:
        raise UnsupportedError.of(
            "factor",
            f"a factor {unknown[0]!r} has no place in a LoRA adapter of PEFT.",
            loc=module.path,
            remedy="Convert the adapter to plain LoRA first.",
        )
    path = module.path + ".base_layer" * int(module.hparams.get("nesting", 0))
    return TargetModule(
        path=module.path,
        method=module.method,
        kind=module.kind,
        hparams=module.hparams,
        factors={
            role: rename(spec, f"{PREFIX}{path}.{suffixes[role]}") for role, spec in module.factors.items()
        },
        base_shape=module.base_shape,
    )


def _full_name(item: FullTensor, adapter: Adapter) -> str:
    """Keeps the key of a tensor that PEFT wrote, wrappers aside; makes one for others."""
    if adapter.dialect == "peft" and PREFIX in item.tensor.name:
        (key,) = clean({item.tensor.name: item.tensor}, file="").specs
        return PREFIX + key
    if item.role == "token_rows":
        return f"{PREFIX}{item.target.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"
    path, _, leaf = item.target.rpartition(".")
    if item.role == "bias" and any(module.path == path for module in adapter.modules):
        return f"{PREFIX}{path}.base_layer.{leaf}"
    return f"{PREFIX}{item.target}"


def _is_transposed(module: TargetModule) -> bool:
    return module.kind == "conv1d" or module.hparams.get("fan_in_fan_out") is True


def _write_scales(config: dict[str, Any], adapter: Adapter, before: Mapping[str, Any]) -> None:
    """Writes rank, alpha and the rule between them, with patterns where modules differ."""
    rules = {module.hparams.get("scaling", "alpha/rank") for module in adapter.modules}
    if len(rules) > 1 or not rules <= set(_SCALINGS):
        raise UnsupportedError.of(
            "scaling",
            f"its modules are scaled by {', '.join(sorted(map(str, rules)))}; PEFT has one rule for all.",
            remedy="Fold the scales into the factors: `adaptertool convert --to lora --fold-scale`.",
        )
    config["use_rslora"] = _SCALINGS[rules.pop()] if rules else config.get("use_rslora", False)
    stacked = [module.path for module in adapter.modules if module.kind == "expert"]
    # Stacked experts have rank × experts rows, so their own rank stands only in the config before.
    known = Settings(before, stacked, "") if stacked else None
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    first: str | None = None
    for module in adapter.modules:
        expert = known is not None and module.kind == "expert"
        rank = known.ranks[module.path] if expert and known else module.hparams["rank"]
        for name in _looked_up(module, before) if expert else (module.path,):
            first = name if expert and first is None else first
            ranks[name] = rank
            alphas[name] = _bare(module.hparams["alpha"])
    if not ranks:
        config.setdefault("r", 1)
        config.setdefault("lora_alpha", 1)
        return
    # A reader finds the values of stacked experts by their module, so they are best the default.
    config["r"], config["rank_pattern"] = patterns(ranks, None if first is None else ranks[first])
    config["lora_alpha"], config["alpha_pattern"] = patterns(alphas, None if first is None else alphas[first])


def _looked_up(module: TargetModule, before: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what PEFT looks up for stacked experts: the path of each parameter (``_inject_parameters``)."""
    leaves = sorted({name.rpartition(".")[2] for name in before.get("target_parameters") or ()})
    return tuple(f"{module.path}.{leaf}" for leaf in leaves) or (module.path,)


def _bare(alpha: float) -> float:
    """Returns an integral alpha as an integer, as PEFT's own configs have it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def patterns(values: Mapping[str, Any], default: Any = None) -> tuple[Any, dict[str, Any]]:
    """Returns a default, the most frequent value if none is given, and PEFT patterns for paths with another.

    A key is the last part of a path, or the whole path, whichever first all modules that it matches agree on;
    where the path of one module is the end of another's, it is anchored. Ties between values go to the first
    in the order of paths.

    Args:
        values: module path -> value, at least one.
        default: the default.
    """
    if default is None:
        default = Counter(values.values()).most_common(1)[0][0]
    agreed: dict[str, Any] = {}
    split: set[str] = set()
    for path, value in values.items():
        for end in _ends(path):
            if agreed.setdefault(end, value) != value:
                split.add(end)
    keys: dict[str, Any] = {}
    for path, value in values.items():
        if value == default:
            continue
        last = path.rpartition(".")[2]
        end = last if last not in split else path
        keys[_anchored(path) if end in split else end if is_literal(end) else re.escape(end)] = value
    if keys and _resolve(keys, values, default) != dict(values):
        keys = {_anchored(path): value for path, value in values.items() if value != default}
    return default, keys


def _ends(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _anchored(path: str) -> str:
    return "^" + re.escape(path)


def _resolve(keys: Mapping[str, Any], values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Resolves patterns as PEFT does; see Settings."""
    listed = list(keys)
    found = key_matches(listed, list(values))
    return {
        path: keys[listed[hits[0]]] if hits else default for path, hits in zip(values, found, strict=True)
    }


def _write_targets(config: dict[str, Any], adapter: Adapter, base_modules: Collection[str] | None) -> None:
    """Keeps the config's target rule if it means exactly the adapter's modules; else lists them."""
    plain = [module.path for module in adapter.modules if module.kind != "expert"]
    paths = list(dict.fromkeys(plain))
    others = () if base_modules is None else sorted(set(base_modules) - set(paths))
    rule = TargetRule.from_config(config)
    given = config.get("target_modules") is not None or bool(config.get("target_parameters"))
    if given and (base_modules is None or not rule.needs_base):
        hits = rule.match(paths)
        if all(hits) and not any(rule.match(list(others))):
            return
        if len(plain) < len(adapter.modules) and not paths:
            return
    for name in _NARROWING:
        config.pop(name, None)
    config["target_modules"] = shortest_names(paths, others)


def shortest_names(paths: Sequence[str], others: Iterable[str], *, dotted: bool = True) -> list[str]:
    """Returns names that mean exactly these modules: the last part where no other module ends in it.

    Args:
        paths: the modules.
        others: modules that must not be meant.
        dotted: whether a name matches after a dot only (``target_modules``), or any end of the text
            (``modules_to_save``).
    """
    taken: set[str] = set()
    loose = list(others)
    for other in loose:
        taken.update(_ends(other))
    names: dict[str, None] = {}
    for path in paths:
        last = path.rpartition(".")[2]
        clear = last not in taken if dotted else not any(other.endswith(last) for other in loose)
        names[last if clear else path] = None
    if not dotted:  # "norm" means "input_norm" too, where that is no other module
        names = {name: None for name in names if not any(name.endswith(n) for n in names if n != name)}
    return sorted(names)


def _write_full(
    config: dict[str, Any],
    adapter: Adapter,
    full: Sequence[FullTensor],
    base_modules: Collection[str] | None,
) -> None:
    """Says which tensors are carried in full: the config's words if they cover them, else a new list."""
    if not any(item.role == "token_rows" for item in full):
        config.pop("trainable_token_indices", None)
    adapted = {module.path for module in adapter.modules}
    biases = [item.target.rpartition(".")[0] for item in full if item.role == "bias"]
    if not biases:
        config["bias"] = "none"
    elif config.get("bias") != "all":
        config["bias"] = "lora_only" if set(biases) <= adapted else "all"
    saved = [item for item in full if item.role in ("modules_to_save", "saved_embedding")]
    modules = sorted({item.target.rpartition(".")[0] for item in full if item.role == "modules_to_save"})
    if not modules:
        config["modules_to_save"] = None
        return
    stored = {item.tensor.name: item.tensor for item in saved}
    if config.get("modules_to_save") and not _complaints(config, adapted, stored):
        return
    others = _with_parents(base_modules or ()) - set(modules)
    config["modules_to_save"] = shortest_names(modules, sorted(others), dotted=False)


def _complaints(config: dict[str, Any], adapted: set[str], stored: dict[str, TensorSpec]) -> list[Problem]:
    """Returns what reading would say about the full tensors under this config."""
    reading = FullTensors(config, TargetRule.from_config(config), adapted, file="")
    reading.add(clean(stored, file="").specs)
    return [problem for problem in reading.problems if problem.kind != "saved-embedding"]


def _with_parents(paths: Iterable[str]) -> set[str]:
    """Returns the paths and every module that contains one."""
    found: set[str] = set()
    for path in paths:
        while path:
            found.add(path)
            path = path.rpartition(".")[0]
    return found
