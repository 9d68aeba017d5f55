"""A plan of work: independent steps, one for each output tensor, that are plain JSON.

Threads of this process run them here; another process or another machine may run the same step and must
give the same bytes. A step holds no tensors, no pickles and no credentials.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterhub_tools.model.combination import Combination
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from adapterhub_tools.model.packed import PackedOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A tensor's bytes in an input file.

    Attributes:
        uri: the file.
        offset: where the data begins.
        spec: name, dtype and shape there.
    """

    uri: str
    offset: int
    spec: TensorSpec

    def to_json(self) -> dict[str, Any]:
        """Returns the range as a JSON object."""
        return {"uri": self.uri, "offset": self.offset, **self.spec.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ByteRange:
        """Reads what ``to_json`` wrote."""
        return cls(uri=data["uri"], offset=data["offset"], spec=TensorSpec.from_json(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which part of a base tensor a target module is, and how it lies there.

    Attributes:
        base_tensor: the name on disk.
        rows: the half-open row range, or None for all: several modules may share one tensor (fused QKV).
        columns: likewise for columns.
        expert: the index along the first axis of a three-dimensional parameter, or None.
        transposed: True where the tensor is stored as (in, out): Conv1D, and the (rows, width) of an
            embedding, whose low-rank product is (width, rows).
    """

    base_tensor: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    expert: int | None = None
    transposed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the placement as a JSON object."""
        return {
            "base_tensor": self.base_tensor,
            "rows": None if self.rows is None else list(self.rows),
            "columns": None if self.columns is None else list(self.columns),
            "expert": self.expert,
            "transposed": self.transposed,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Placement:
        """Reads what ``to_json`` wrote."""
        rows, columns = data["rows"], data["columns"]
        return cls(
            base_tensor=data["base_tensor"],
            rows=None if rows is None else (rows[0], rows[1]),
            columns=None if columns is None else (columns[0], columns[1]),
            expert=data["expert"],
            transposed=data["transposed"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One module's contribution to an output tensor.

    Attributes:
        module: the module's path, for messages.
        method: the method's name.
        hparams: its hyperparameters, with the caller's multiplier as ``"multiplier"``.
        factors: role -> bytes.
        placement: where in the tensor it acts.
    """

    module: str
    method: str
    hparams: dict[str, Any]
    factors: dict[str, ByteRange]
    placement: Placement

    def to_json(self) -> dict[str, Any]:
        """Returns the term as a JSON object."""
        return {
            "module": self.module,
            "method": self.method,
            "hparams": self.hparams,
            "factors": {role: item.to_json() for role, item in sorted(self.factors.items())},
            "placement": self.placement.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Term:
        """Reads what ``to_json`` wrote."""
        return cls(
            module=data["module"],
            method=data["method"],
            hparams=data["hparams"],
            factors={role: ByteRange.from_json(item) for role, item in data["factors"].items()},
            placement=Placement.from_json(data["placement"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPatch:
    """Rows of the output that are replaced by rows of another tensor (trainable tokens).

    Attributes:
        rows: the row indices in the output, in the order of the source's rows.
        source: the tensor that holds the new rows.
    """

    rows: tuple[int, ...]
    source: ByteRange

    def to_json(self) -> dict[str, Any]:
        """Returns the patch as a JSON object."""
        return {"rows": list(self.rows), "source": self.source.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RowPatch:
        """Reads what ``to_json`` wrote."""
        return cls(rows=tuple(data["rows"]), source=ByteRange.from_json(data["source"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How one output tensor comes about: ``round(start + terms)``, then replaced rows.

    Attributes:
        action: ``"copy"`` (the same bytes), ``"cast"`` (the same values in another dtype), ``"merge"`` (with
            terms or rows) or ``"replace"`` (the adapter's tensor).
        start: where its values begin: the base tensor, or the adapter's where it replaces it.
        terms: contributions that are added exactly and rounded once.
        patch: rows to replace after that, if any.
        output: name, dtype and shape of the result.
        file: the output file, relative to the output folder.
        offset: where the result's bytes go in it.
        base_name: the base tensor whose content digest this step's ``start`` gives, or None.
        packed: how the rounded result is quantised, and the tensors that it lies in then; None for a plain
            tensor. ``output`` is the result before that, ``file`` and ``offset`` those of its data.
        combination: how the terms of several adapters are combined; None where they are added.
    """

    action: str
    start: ByteRange
    output: TensorSpec
    file: str
    offset: int
    terms: tuple[Term, ...] = ()
    patch: RowPatch | None = None
    base_name: str | None = None
    packed: PackedOutput | None = None
    combination: Combination | None = None

    @property
    def written(self) -> tuple[tuple[TensorSpec, str], ...]:
        """The tensors that it writes, and the file of each."""
        if self.packed is None:
            return ((self.output, self.file),)
        return tuple((part.spec, part.file) for part in self.packed.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the step as a JSON object."""
        return {
            "action": self.action,
            "start": self.start.to_json(),
            "terms": [term.to_json() for term in self.terms],
            "patch": None if self.patch is None else self.patch.to_json(),
            "output": self.output.to_json(),
            "file": self.file,
            "offset": self.offset,
            "base_name": self.base_name,
            **({} if self.packed is None else {"packed": self.packed.to_json()}),
            **({} if self.combination is None else {"combination": self.combination.to_json()}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Step:
        """Reads what ``to_json`` wrote."""
        from adapterhub_tools.model.packed import PackedOutput

        patch, packed, combination = data["patch"], data.get("packed"), data.get("combination")
        return cls(
            action=data["action"],
            start=ByteRange.from_json(data["start"]),
            terms=tuple(Term.from_json(item) for item in data["terms"]),
            patch=None if patch is None else RowPatch.from_json(patch),
            output=TensorSpec.from_json(data["output"]),
            file=data["file"],
            offset=data["offset"],
            base_name=data["base_name"],
            packed=None if packed is None else PackedOutput.from_json(packed),
            combination=None if combination is None else Combination.from_json(combination),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file that the steps fill.

    Attributes:
        name: relative to the output folder.
        header: the bytes that stand before the tensors.
        length: the whole length in bytes.
    """

    name: str
    header: bytes
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a run will do.

    Attributes:
        steps: one per output tensor, in file order.
        files: the files they fill.
        peak_bytes: an upper estimate of the memory for buffers with the given threads, start-up excluded.
        digest_only: base tensors that no step reads although the base check needs them.
        notes: what was decided by rule.
    """

    steps: tuple[Step, ...]
    files: tuple[OutputFile, ...]
    peak_bytes: int
    digest_only: tuple[ByteRange, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def read_bytes(self) -> int:
        """Bytes read from the base and from replacing tensors."""
        return sum(s.start.spec.nbytes for s in self.steps) + sum(r.spec.nbytes for r in self.digest_only)

    @property
    def written_bytes(self) -> int:
        """Bytes of all output files."""
        return sum(item.length for item in self.files)
