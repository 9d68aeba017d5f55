"""Which weights a loader quantises when it quantises a base in 16 or 32 bits.

transformers replaces ``nn.Linear`` and ``Conv1D`` by quantised modules, except the output embedding, tied
weights, the last module, and what it is told to skip (``get_keys_to_not_convert`` and
``replace_with_bnb_linear``, transformers 5). A checkpoint does not say which class a module has, so the rule
here is one of names and shapes, and what it found is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterhub_tools.architectures import Architecture, head_names, lookup
from adapterhub_tools.errors import Problem, UnsupportedError
from adapterhub_tools.model.quant_scheme import QuantScheme
from adapterhub_tools.model.tensor import FLOAT_DTYPES
from adapterhub_tools.ops.fit import is_embedding
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.quantised_base import is_loaded_quantised
from adapterhub_tools.store.checkpoint import Checkpoint

_LAST = frozenset({"classifier", "qa_outputs", "score"})
"""Last parts of the paths of heads other than the output embedding."""
_TABLES = ("embed", "wpe", "wte", "relative_attention_bias")
"""What the last part of the path of a table of positions or tokens has in it."""
_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModules:
    """What a loader quantises.

    Attributes:
        weights: base tensor -> whether it is quantised as its transpose (Conv1D).
        note: in words.
    """

    weights: dict[str, bool]
    note: str


def loaded_modules(checkpoint: Checkpoint, scheme: QuantScheme, parts: Sequence[Part]) -> LoadedModules:
    """Returns the weights of a base that a loader quantises.

    Args:
        checkpoint: the base, in 16 or 32 bits.
        scheme: how they are quantised.
        parts: the adapters, fitted; what they know of a module's kind counts.

    Raises:
        UnsupportedError: a weight that is joined or split while it is loaded, or of a dtype that is not
            quantised.
    """
    architecture = lookup((checkpoint.config or {}).get("model_type"))
    kinds = {
        part.fit.placements[module.path].base_tensor: module.kind
        for part in parts
        for module in part.fit.modules
        if module.path in part.fit.placements
    }
    tie = parts[0].fit.tie if parts else None
    weights: dict[str, bool] = {}
    left: list[str] = []
    problems: list[Problem] = []
    for name, stored in checkpoint.tensors.items():
        if len(stored.spec.shape) != 2 or not name.endswith(".weight"):
            continue
        path = name.removesuffix(".weight")
        kind = kinds.get(name) or _kind(path, architecture)
        kept = (path,) if kind == "head" or is_embedding(name, tie, checkpoint) else ()
        if not is_loaded_quantised(path, "linear" if kind == "head" else kind, scheme, kept=kept):
            left.append(path)
            continue
        problems += _problems(name, stored.file, stored.spec.dtype, architecture)
        weights[name] = kind == "conv1d"
    if problems:
        raise UnsupportedError(*problems[:_SHOWN])
    rest = ", ".join(left[:_SHOWN]) + (f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else "")
    return LoadedModules(
        weights=weights,
        note=f"quantised while loading ({scheme.words}): {len(weights)} linear weights; "
        f"matrices that stay as stored: {rest or 'none'}",
    )


def _kind(path: str, architecture: Architecture | None) -> str:
    leaf = path.rpartition(".")[2]
    if any(word in leaf for word in _TABLES):
        return "embedding"
    if leaf in head_names() | _LAST:
        return "head"
    return "conv1d" if architecture is not None and architecture.is_conv1d(path) else "linear"


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
