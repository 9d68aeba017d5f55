"""What an adapter is: target modules with their factors, and tensors carried in full. No data.

``method`` is only a name here, so an adapter whose method this tool cannot execute can still be described,
validated, moved and put under a manifest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adapterhub_tools.model.base import BaseRef
from adapterhub_tools.model.tensor import TensorSpec

WHOLE_MODEL = "*"
"""The path of factors that belong to no single module: random bases that all share, prompts, routers."""

KINDS = ("linear", "conv1d", "conv2d", "convnd", "embedding", "expert", "unknown")
"""Kinds of target module.

``linear`` stores its weight as (out, in); ``conv1d`` is the Conv1D of GPT-2, a linear layer stored as (in,
out);
``conv2d`` is (out, in/groups, kh, kw); ``convnd`` a convolution over one or three axes; ``embedding`` is
(rows, width); ``expert`` is a slice of a three-dimensional parameter.
"""

FULL_ROLES = ("modules_to_save", "bias", "saved_embedding", "token_rows", "base_bias")
"""Why an adapter carries a tensor in full.

``modules_to_save``: a module trained whole. ``bias``: a bias trained beside the factors.
``saved_embedding``: an embedding stored because it was resized or targeted. ``token_rows``: new values of
some rows (trainable tokens).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetModule:
    """One module that the adapter changes.

    Attributes:
        path: the module's path in memory, such as ``"model.layers.0.self_attn.q_proj"``.
        method: the method's name, such as ``"lora"``.
        kind: one of KINDS, as far as the adapter's own files tell; the base decides what they leave open.
        hparams: the module's own hyperparameters, patterns resolved: ``rank``, ``alpha``, ``scaling`` and
            others.
        factors: role -> tensor in the adapter's file: ``"A"``, ``"B"``, ``"bias"``, ``"magnitude"``.
        base_shape: the shape of the base weight, where the base is known.
    """

    path: str
    method: str
    kind: str
    hparams: dict[str, Any]
    factors: dict[str, TensorSpec]
    base_shape: tuple[int, ...] | None = None

    @property
    def parameters(self) -> int:
        """The number of trained values in the factors."""
        return sum(spec.elements for spec in self.factors.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the module as it stands in a manifest."""
        data: dict[str, Any] = {
            "path": self.path,
            "method": self.method,
            "kind": self.kind,
            "hyperparameters": self.hparams,
            "factors": {role: spec.to_json() for role, spec in sorted(self.factors.items())},
        }
        if self.base_shape is not None:
            data["base_shape"] = list(self.base_shape)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TargetModule:
        """Reads what ``to_json`` wrote."""
        shape = data.get("base_shape")
        return cls(
            path=data["path"],
            method=data["method"],
            kind=data["kind"],
            hparams=dict(data["hyperparameters"]),
            factors={role: TensorSpec.from_json(spec) for role, spec in data["factors"].items()},
            base_shape=None if shape is None else tuple(shape),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FullTensor:
    """A tensor that the adapter carries in full.

    Attributes:
        target: the name of the base tensor in memory, such as ``"lm_head.weight"``.
        role: one of FULL_ROLES.
        tensor: the tensor in the adapter's file.
        rows: for ``token_rows``, the row indices that the tensor's rows replace, in order.
    """

    target: str
    role: str
    tensor: TensorSpec
    rows: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the tensor as it stands in a manifest."""
        data: dict[str, Any] = {"target": self.target, "role": self.role, "tensor": self.tensor.to_json()}
        if self.rows is not None:
            data["rows"] = list(self.rows)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FullTensor:
        """Reads what ``to_json`` wrote."""
        rows = data.get("rows")
        return cls(
            target=data["target"],
            role=data["role"],
            tensor=TensorSpec.from_json(data["tensor"]),
            rows=None if rows is None else tuple(rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter as described by its files, whatever their dialect.

    Attributes:
        dialect: the naming scheme it was read from, such as ``"peft"``.
        method: the method's name, such as ``"lora"``, ``"dora"``, ``"ia3"``, ``"prefix_tuning"``.
        hparams: hyperparameters of the whole adapter: ``rank``, ``alpha``, ``scaling`` (``"alpha/rank"`` or
            ``"alpha/sqrt(rank)"``) and those of other methods.
        modules: the target modules, ordered by path.
        full: the tensors carried in full, ordered by target.
        base: the base it was trained on, as far as its files say.
        blockers: why it cannot be merged, if so, as ``(kind, message, remedy)``; empty when nothing stands
            against it.
        notes: what was resolved by rule while reading, for the report.
        unparsed: tensors and config fields that were understood by name only, kept for a lossless round trip.
        ties: True if the config asks that tied embeddings stay tied (``ensure_weight_tying``).
    """

    dialect: str
    method: str
    hparams: dict[str, Any]
    modules: tuple[TargetModule, ...]
    full: tuple[FullTensor, ...] = ()
    base: BaseRef | None = None
    blockers: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    unparsed: dict[str, Any] = field(default_factory=dict)
    ties: bool = False

    @property
    def parameters(self) -> int:
        """The number of trained values: factors and full tensors."""
        return sum(m.parameters for m in self.modules) + sum(f.tensor.elements for f in self.full)
