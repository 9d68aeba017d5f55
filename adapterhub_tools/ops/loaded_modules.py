"""Which weights a loader quantises when it quantises a base in 16 or 32 bits.

transformers replaces ``nn.Linear`` and ``Conv1D`` by quantised modules, except those of a list:
``llm_int8_skip_modules`` where it was given, else the output embedding, what is tied to it, and the last
module; and in any case what the model keeps in float32 (``get_modules_to_not_convert`` and
``replace_with_bnb_linear``, transformers 5). A checkpoint does not say which class a module has, so the rule
here is one of names and shapes, and what it found is told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapterhub_tools.architectures import Architecture, head_names, lookup
from adapterhub_tools.dialects.peft import match_starts
from adapterhub_tools.errors import Problem, UnsupportedError, escape
from adapterhub_tools.model.quant_scheme import QuantScheme
from adapterhub_tools.model.tensor import FLOAT_DTYPES
from adapterhub_tools.ops.fit import is_embedding
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.tied import Tie
from adapterhub_tools.store.checkpoint import Checkpoint

_LAST = frozenset({"classifier", "qa_outputs", "score"})
"""Last parts of the paths of heads other than the output embedding."""
_TABLES = re.compile(r"embed|^wpe$|^wte$|^shared$|relative_attention_bias")
"""What the last part of the path of a table of positions or tokens has in it."""
_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModules:
    """What a loader quantises.

    Attributes:
        weights: base tensor -> whether it is quantised as its transpose (Conv1D).
        notes: in words.
    """

    weights: dict[str, bool]
    notes: tuple[str, ...]


def loaded_modules(checkpoint: Checkpoint, scheme: QuantScheme, parts: Sequence[Part]) -> LoadedModules:
    """Returns the weights of a base that a loader quantises.

    Args:
        checkpoint: the base, in 16 or 32 bits.
        scheme: how they are quantised; its ``skip_modules`` take the place of the loader's own choice.
        parts: the adapters, fitted, at least one; what they know of kinds and of names in memory counts.

    Raises:
        UnsupportedError: a weight that is joined or split while it is loaded, or of a dtype that is not
            quantised.
        FormatError: a pattern of ``skip_modules`` is invalid or takes too long.
    """
    architecture = lookup((checkpoint.config or {}).get("model_type"))
    matrices = [
        name.removesuffix(".weight")
        for name, stored in checkpoint.tensors.items()
        if len(stored.spec.shape) == 2 and name.endswith(".weight")
    ]
    linear = _linear(checkpoint, architecture, parts)
    names = [parts[0].fit.names.to_memory(path) for path in matrices]
    last = _last(names, architecture, tied=parts[0].fit.tie is not None)
    listed = scheme.skip_modules
    # Where a library renamed modules, a list may have either name: it means the same module.
    renamed = names if architecture is None else [architecture.in_memory(path) for path in matrices]
    skipped = [a | b for a, b in zip(*(skipping(listed or (), way) for way in (names, renamed)), strict=True)]
    kept = skipping(() if architecture is None else architecture.float32_modules, names)
    weights: dict[str, bool] = {}
    left: list[str] = []
    problems: list[Problem] = []
    for path, name, skips, keeps in zip(matrices, names, skipped, kept, strict=True):
        by_choice = listed is None and (name == last or _is_head(path, checkpoint, parts[0].fit.tie))
        if path not in linear or skips or keeps or by_choice:
            left.append(path)
            continue
        stored = checkpoint.tensors[f"{path}.weight"]
        problems += _problems(stored.spec.name, stored.file, stored.spec.dtype, architecture)
        weights[stored.spec.name] = linear[path]
    if problems:
        raise UnsupportedError(*problems[:_SHOWN])
    found = set[int]().union(*skipped)
    idle = [escape(pattern) for i, pattern in enumerate(listed or ()) if i not in found]
    notes = [
        f"quantised while loading ({scheme.words}): {len(weights)} linear weights; "
        f"matrices that stay as stored: {_shown(left)}"
    ]
    if idle:
        notes.append(f"skip modules that are no matrix of this base: {_shown(idle)}")
    return LoadedModules(weights=weights, notes=tuple(notes))


def _linear(
    checkpoint: Checkpoint, architecture: Architecture | None, parts: Sequence[Part]
) -> dict[str, bool]:
    """Returns the paths on disk of linear and Conv1D modules, and whether each is a Conv1D."""
    kinds = {
        part.fit.placements[module.path].base_tensor: module.kind
        for part in parts
        for module in part.fit.modules
        if module.path in part.fit.placements
    }
    found = {}
    for name in checkpoint.tensors:
        path = name.removesuffix(".weight")
        leaf = path.rpartition(".")[2]
        kind = kinds.get(name)
        if kind is None:
            named = _TABLES.search(leaf) is not None and leaf not in head_names()
            conv1d = architecture is not None and architecture.is_conv1d(path)
            kind = "conv1d" if conv1d else "linear"
            kind = "embedding" if named and f"{path}.bias" not in checkpoint.tensors else kind
        if kind in ("linear", "conv1d"):
            found[path] = kind == "conv1d"
    return found


def _is_head(path: str, checkpoint: Checkpoint, tie: Tie | None) -> bool:
    """Tells whether a loader leaves a module alone by its own choice: a head, or what is tied to it.

    It also leaves the last module, and takes the name of the last parameter for its name: where that is a
    bias, no module is called so, and the weight is quantised.
    """
    leaf = path.rpartition(".")[2]
    if leaf in head_names() or is_embedding(f"{path}.weight", tie, checkpoint):
        return True
    return leaf in _LAST and f"{path}.bias" not in checkpoint.tensors


def _last(names: Sequence[str], architecture: Architecture | None, *, tied: bool) -> str | None:
    """Returns the module with the last parameter, where that is a layer and not a head."""
    row = None if architecture is None else architecture.last_module
    if architecture is None or row is None or ("*" in row and not tied):
        return None
    end = re.escape(row.removeprefix(f"{architecture.base_prefix}.")).replace(r"\*", r"(\d+)")
    found = [(m, name) for name in names if (m := re.search(rf"(?:^|\.){end}$", name))]
    return max(found, key=lambda item: [int(index) for index in item[0].groups()], default=(None, None))[1]


def skipping(patterns: Sequence[str], paths: Sequence[str]) -> list[set[int]]:
    """Returns for each module which patterns keep it from being quantised, by their indices.

    A pattern is a regular expression for the start of a path, up to the end of one of its parts
    (``"model.layers.1"`` keeps ``model.layers.1.mlp``, not ``model.layers.11``), or the very characters at
    its end (``"fc1"``).

    Source: transformers 5, ``quantizers_utils.should_convert_module``.
    """
    starts = match_starts(patterns, paths, loc="skip_modules")
    return [
        {*found, *(i for i, pattern in enumerate(patterns) if path.endswith(pattern))}
        for path, found in zip(paths, starts, strict=True)
    ]


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def _problems(name: str, file: str, dtype: str, architecture: Architecture | None) -> list[Problem]:
    if dtype not in FLOAT_DTYPES or dtype == "F64":
        return [
            Problem(
                kind="dtype",
                file=file,
                loc=name,
                message=f"its values are {dtype}, expected BF16, F16 or F32 to quantise.",
                remedy="Save the base in one of them first.",
            )
        ]
    if architecture is None:
        return []
    dotted = f".{name}"
    converted = [
        end for item in architecture.converters for end in item.disk if _ends_like(dotted, f".{end}")
    ]
    if not converted:
        return []
    return [
        Problem(
            kind="converted-weight",
            file=file,
            loc=name,
            message="the loader joins it with others, and what it quantises then is not known here.",
            remedy="Merge onto the 16-bit base with --onto original.",
        )
    ]


def _ends_like(name: str, end: str) -> bool:
    """Says whether a dotted name ends with a pattern in which ``*`` is one part."""
    parts, wanted = name.split("."), end.split(".")[1:]
    tail = parts[-len(wanted) :]
    return len(tail) == len(wanted) and all(w in ("*", p) for p, w in zip(tail, wanted, strict=True))
