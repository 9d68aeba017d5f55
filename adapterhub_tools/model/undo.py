"""The undo file of a merge: what brings the base back, bit for bit, from the merged model and the adapters.

Specified in docs/undo.md and ``schema/merge-undo-1.0.schema.json``. It is a safetensors file by content, but
is not named like one: loaders that take every ``*.safetensors`` of a folder would take it for weights.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from adapterhub_tools.model.plan import Placement
from adapterhub_tools.model.tensor import TensorSpec

UNDO_FILE = "merge.undo"
UNDO_FORMAT = "1.0"
UNDO_SCHEMA = "merge-undo-1.0"
FRAME = struct.Struct("<II")
"""Before each piece of a packed blob: the size of its zstd frame, and that of its content."""
PIECE_BYTES = 4 << 20
"""The most content of a piece."""
DOCUMENT = "undo.json"
"""The tensor that holds the description; the others are numbered."""
NEGATED_SUM = "negated-sum-1"
"""Predicts a base weight as the merged one less the exact deltas, correctly rounded; kept for ever."""
SCALED = "scaled-1"
"""Predicts a base weight as the merged one times a gain for its row or column, which is kept, less the exact
delta, correctly rounded; kept for ever."""
MERGED = "merged-1"
"""Predicts a base weight as the merged one itself, correctly rounded to the base's dtype; kept for ever."""
ZERO = "zero-1"
"""Predicts zeros: the base tensor is stored as it is."""
COPY = "copy"
"""The merged tensor is the base tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoTerm:
    """One module's contribution to a tensor, without paths.

    Attributes:
        module: the module's path.
        method: the method's name.
        hparams: as in the plan of the merge.
        adapter: which adapter, counted in the receipt's order.
        factors: role -> the tensor in the adapter's file.
        placement: where in the tensor it acts.
    """

    module: str
    method: str
    hparams: dict[str, Any]
    adapter: int
    factors: dict[str, TensorSpec]
    placement: Placement

    def to_json(self) -> dict[str, Any]:
        """Returns the term as a JSON object."""
        return {
            "module": self.module,
            "method": self.method,
            "hparams": self.hparams,
            "adapter": self.adapter,
            "factors": {role: spec.to_json() for role, spec in sorted(self.factors.items())},
            "placement": self.placement.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UndoTerm:
        """Reads what ``to_json`` wrote."""
        return cls(
            module=data["module"],
            method=data["method"],
            hparams=data["hparams"],
            adapter=data["adapter"],
            factors={role: TensorSpec.from_json(spec) for role, spec in data["factors"].items()},
            placement=Placement.from_json(data["placement"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoTensor:
    """How one base tensor comes back.

    Attributes:
        predictor: COPY, NEGATED_SUM, SCALED, MERGED or ZERO.
        blob: the tensor of the undo file with its records; None for COPY.
        terms: for NEGATED_SUM and SCALED, what the merge did.
        gains: for SCALED, the blob with the gains, one for each row or column.
    """

    predictor: str
    blob: str | None = None
    terms: tuple[UndoTerm, ...] = ()
    gains: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the entry as a JSON object."""
        data = {
            "predictor": self.predictor,
            "blob": self.blob,
            "terms": [term.to_json() for term in self.terms],
        }
        return data if self.gains is None else {**data, "gains": self.gains}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UndoTensor:
        """Reads what ``to_json`` wrote."""
        return cls(
            predictor=data["predictor"],
            blob=data["blob"],
            terms=tuple(UndoTerm.from_json(item) for item in data["terms"]),
            gains=data.get("gains"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo:
    """The description in an undo file.

    Attributes:
        base_digest: of all tensors of the base.
        base_config_digest: of its config, or None.
        output_digest: of the merged model, so that the undo file of another merge is refused.
        adapters: the adapters' digests in the receipt's order.
        headers: weight file of the base -> the blob of its bytes before the data.
        tensors: base tensor -> how it comes back.
        files: other file of the base -> the blob of its content; None where the merged model has it
            unchanged.
        left: files of the base that did not go along, and so do not come back.
    """

    base_digest: str
    base_config_digest: str | None
    output_digest: str
    adapters: tuple[str, ...]
    headers: dict[str, str]
    tensors: dict[str, UndoTensor]
    files: dict[str, str | None]
    left: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the description as a JSON object."""
        return {
            "format": UNDO_FORMAT,
            "base": {"digest": self.base_digest, "config_digest": self.base_config_digest},
            "output": {"digest": self.output_digest},
            "adapters": list(self.adapters),
            "headers": self.headers,
            "tensors": {name: tensor.to_json() for name, tensor in self.tensors.items()},
            "files": self.files,
            "left": list(self.left),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Undo:
        """Reads what ``to_json`` wrote; the caller has checked it against the schema."""
        return cls(
            base_digest=data["base"]["digest"],
            base_config_digest=data["base"]["config_digest"],
            output_digest=data["output"]["digest"],
            adapters=tuple(data["adapters"]),
            headers=data["headers"],
            tensors={name: UndoTensor.from_json(item) for name, item in data["tensors"].items()},
            files=data["files"],
            left=tuple(data["left"]),
        )
