"""Which weights of a base are quantised, and how: from names, headers and the few tensors that hold JSON."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterhub_tools.architectures import lookup
from adapterhub_tools.errors import AdapterError, FormatError, Problem, UnsupportedError, escape
from adapterhub_tools.model.json_fields import Fields
from adapterhub_tools.model.manifest import MANIFEST_NAME, Manifest
from adapterhub_tools.model.quant_parts import (
    FOUR_BIT_SUFFIXES,
    GET_AGAIN,
    INT8_NAMES,
    STATE_MARK,
    part_name,
    part_problems,
    wrong_part,
)
from adapterhub_tools.model.quant_scheme import FORMAT_BITS, QuantizedTensor, QuantScheme
from adapterhub_tools.model.tensor import DTYPE_NAMES, FLOAT_DTYPES, TensorSpec
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.strict_json import parse_json

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import OpenSource

_MAX_STATE_BYTES = 64 * 1024
_UNSUPPORTED = ("unknown-scheme",)


def quantised_weights(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    """Returns the quantised weights of a base by name, in the order of its files; none for a plain base.

    Args:
        checkpoint: the base on disk.

    Raises:
        FormatError: a part is missing, or is not what the weight's scheme asks for; every problem.
        UnsupportedError: a format of bitsandbytes that is not known here.
        StoreError: a file cannot be read.
    """
    problems: list[Problem] = []
    weights = read_quantised(checkpoint, problems)
    if problems:
        unsupported = all(problem.kind in _UNSUPPORTED for problem in problems)
        raise (UnsupportedError if unsupported else FormatError)(*problems)
    return weights


def read_quantised(checkpoint: Checkpoint, problems: list[Problem]) -> dict[str, QuantizedTensor]:
    """Returns the quantised weights of a base by name, and adds what is wrong with any.

    Args:
        checkpoint: the base on disk.
        problems: where problems go; a weight that has one is left out.

    Raises:
        StoreError: a file cannot be read.
    """
    with ExitStack() as files:
        return _Reader(checkpoint, problems, files).read()


def plain_tensors(checkpoint: Checkpoint, weights: Mapping[str, QuantizedTensor]) -> dict[str, TensorSpec]:
    """Returns what a base's tensors would be if it were not quantised, in the order of its files."""
    parts = {name for weight in weights.values() for name in weight.part_names} - weights.keys()
    return {
        name: weights[name].spec if name in weights else stored.spec
        for name, stored in checkpoint.tensors.items()
        if name not in parts
    }


def stored_scheme(weights: Mapping[str, QuantizedTensor]) -> QuantScheme | None:
    """Returns the scheme of most weights of a base; None if none is quantised.

    Mixed schemes are rare, and each weight has its own.
    """
    counts: dict[QuantScheme, int] = {}
    for weight in weights.values():
        counts[weight.scheme] = counts.get(weight.scheme, 0) + 1
    return max(counts, key=counts.__getitem__, default=None)


def recorded_scheme_problems(manifest: Manifest, weights: Mapping[str, QuantizedTensor]) -> list[Problem]:
    """Returns how a base that is stored quantised differs from the one that a manifest records.

    Args:
        manifest: an adapter's manifest.
        weights: the base's quantised weights; for a plain base nothing is compared, because most adapters
            are trained on one that is quantised while it is loaded.
    """
    scheme, recorded = stored_scheme(weights), manifest.base
    if scheme is None:
        return []
    found = []
    if recorded.quantisation is None and recorded.dtype in FLOAT_DTYPES:
        found.append((f"the manifest records a base in {recorded.dtype}", "/base/dtype"))
    elif recorded.quantisation is not None:
        try:
            declared = QuantScheme.from_json(recorded.quantisation)
            words = None if declared.same_values(scheme) else declared.words
        except UnsupportedError:
            words = escape(repr(recorded.quantisation.get("scheme")))
        if words is not None:
            found.append((f"the manifest records {words}", "/base/quantisation"))
    return [
        Problem(
            kind="base-quantisation",
            file=MANIFEST_NAME,
            loc=loc,
            message=f"the base is stored as {scheme.words}; {said}.",
            remedy="Use the base that the adapter was trained on, or --check-base off.",
        )
        for said, loc in found
    ]


def foreign_scheme(checkpoint: Checkpoint) -> Problem | None:
    """Returns what says that a base is quantised by a scheme that is not known here; None if nothing does.

    The config of a base whose weights are plain again may still say it.
    """
    said = (checkpoint.config or {}).get("quantization_config")
    packed = any(stored.spec.dtype not in FLOAT_DTYPES for stored in checkpoint.on_disk.tensors.values())
    if not isinstance(said, dict) or not packed:
        return None
    try:
        QuantScheme.from_config(said, file=checkpoint.config_file or "")
    except UnsupportedError as error:
        return error.problems[0]
    return None


def refuse_conv1d(checkpoint: Checkpoint, weights: Mapping[str, QuantizedTensor]) -> None:
    """Refuses to quantise Conv1D modules again: (in, out) in memory, (out, in) quantised.

    Raises:
        UnsupportedError: a weight is one.
    """
    architecture = lookup((checkpoint.config or {}).get("model_type"))
    for name in weights:
        if architecture is not None and architecture.is_conv1d(name.removesuffix(".weight")):
            raise UnsupportedError.of(
                "quantised-conv1d",
                "it is a Conv1D module, whose quantised weight is stored transposed; to quantise it again is "
                "not available.",
                file=checkpoint.tensors[name].file,
                loc=name,
                remedy="Merge --onto dequantized, and load the result with a quantisation config.",
            )


class _Reader:
    """Reads the quantised weights of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, problems: list[Problem], files: ExitStack) -> None:
        self._checkpoint, self._problems, self._files = checkpoint, problems, files
        self._sources: dict[str, OpenSource] = {}
        self._config = (checkpoint.config or {}).get("quantization_config")
        self._claimed: set[str] = set()

    def read(self) -> dict[str, QuantizedTensor]:
        weights: dict[str, QuantizedTensor] = {}
        for name in self._checkpoint.tensors:
            found = None
            if STATE_MARK in name:
                weight, _, scheme = name.partition(STATE_MARK)
                found = self._four_bit(weight, scheme, name)
            elif name.endswith(f".{INT8_NAMES['scales']}"):
                found = self._int8(name.removesuffix(INT8_NAMES["scales"]) + "weight", name)
            if found is not None and found.spec.name in weights:
                self._add(name, "it is a second scheme of one weight, expected one.")
            elif found is not None:
                problems = part_problems(found)
                self._problems.extend(problems)
                if not problems:
                    weights[found.spec.name] = found
        self._leftovers()
        order = {name: weights[name] for name in self._checkpoint.tensors if name in weights}
        self._check_layouts(order)
        return order

    def _add(self, name: str, message: str, kind: str = "quantised-part", remedy: str = GET_AGAIN) -> None:
        stored = self._checkpoint.tensors.get(name)
        file = "" if stored is None else stored.file
        self._problems.append(Problem(kind=kind, file=file, loc=name, message=message, remedy=remedy))

    def _four_bit(self, weight: str, scheme: str, state_name: str) -> QuantizedTensor | None:
        self._claim(weight, ("quant_state", *FOUR_BIT_SUFFIXES), scheme)
        if FORMAT_BITS.get(scheme) != 4:
            known = ", ".join(name for name, bits in FORMAT_BITS.items() if bits == 4)
            message = f"the 4-bit format is {escape(repr(scheme))}, expected one of {known}."
            remedy = "Merge onto the 16-bit base that was quantised."
            self._add(state_name, message, kind="unknown-scheme", remedy=remedy)
            return None
        if weight not in self._checkpoint.tensors:
            self._add(state_name, f"the weight {escape(weight)} that it describes is missing.")
            return None
        state = self._state(state_name, scheme)
        if state is None:
            return None
        ranges = self._ranges(weight, ("data", "quant_state", *FOUR_BIT_SUFFIXES), scheme)
        double = "nested_offset" in state
        said = self._said()
        how = QuantScheme(
            format=scheme,
            double=double,
            block_size=state["blocksize"],
            nested_block_size=state.get("nested_blocksize", 256),
            compute_dtype=None if said is None else said.compute_dtype,
            storage_dtype=ranges["data"].spec.dtype,
            skip_modules=None if said is None else said.skip_modules,
        )
        spec = TensorSpec(name=weight, dtype=DTYPE_NAMES[state["dtype"]], shape=tuple(state["shape"]))
        if not double:
            ranges = {role: part for role, part in ranges.items() if not role.startswith("nested_")}
        return QuantizedTensor(
            spec=spec, scheme=how, parts=ranges, nested_offset=state["nested_offset"] if double else None
        )

    def _int8(self, weight: str, scales_name: str) -> QuantizedTensor | None:
        self._claim(weight, tuple(INT8_NAMES), "int8")
        if weight not in self._checkpoint.tensors:
            self._add(scales_name, f"the weight {escape(weight)} that it scales is missing.")
            return None
        said = self._said()
        how = QuantScheme(
            format="int8", storage_dtype="I8", skip_modules=None if said is None else said.skip_modules
        )
        shape = self._checkpoint.tensors[weight].spec.shape
        spec = TensorSpec(name=weight, dtype=self._model_dtype(), shape=shape)
        return QuantizedTensor(
            spec=spec, scheme=how, parts=self._ranges(weight, ("data", *INT8_NAMES), "int8")
        )

    def _claim(self, weight: str, roles: tuple[str, ...], scheme: str) -> None:
        self._claimed |= {weight, *(part_name(weight, role, scheme) for role in roles)}

    def _ranges(self, weight: str, roles: tuple[str, ...], scheme: str) -> dict[str, Any]:
        names = {role: part_name(weight, role, scheme) for role in roles}
        stored = self._checkpoint.tensors
        return {role: self._checkpoint.range_of(name) for role, name in names.items() if name in stored}

    def _said(self) -> QuantScheme | None:
        """Returns what the config says, where it is about bitsandbytes."""
        if not isinstance(self._config, dict):
            return None
        try:
            return QuantScheme.from_config(self._config)
        except AdapterError:
            return None

    def _model_dtype(self) -> str:
        """Returns the dtype that int8 weights had before, which no file records: the model's own."""
        config = self._checkpoint.config or {}
        said = DTYPE_NAMES.get(str(config.get("dtype", config.get("torch_dtype"))))
        if said is not None:
            return said
        floats = [t.spec.dtype for t in self._checkpoint.tensors.values() if t.spec.dtype in FLOAT_DTYPES]
        halves = [dtype for dtype in floats if dtype in ("BF16", "F16")]
        return max(set(halves), key=halves.count, default="F16")

    def _bytes(self, name: str) -> bytes:
        stored = self._checkpoint.tensors[name]
        if stored.file not in self._sources:
            self._sources[stored.file] = self._files.enter_context(self._checkpoint.open(stored.file))
        return self._sources[stored.file].read(stored.offset, stored.nbytes)

    def _state(self, name: str, scheme: str) -> dict[str, Any] | None:
        """Reads and checks the JSON of a weight's state; None if something is wrong with it."""
        spec = self._checkpoint.tensors[name].spec
        if spec.dtype != "U8" or spec.nbytes > _MAX_STATE_BYTES:
            self._add(name, f"it is {spec.dtype} of {spec.nbytes:,} bytes, expected JSON text in U8.")
            return None
        try:
            data = parse_json(self._bytes(name), file=self._checkpoint.tensors[name].file)
        except FormatError as error:
            self._problems.extend(replace(p, loc=name, remedy=GET_AGAIN) for p in error.problems)
            return None
        found: list[Problem] = []
        fields = Fields(data, loc="", file=self._checkpoint.tensors[name].file, problems=found)
        kind = fields.text("quant_type", required=True)
        if kind is not None and kind != scheme:
            fields.complain("value", f"is {escape(kind)!r}, expected {scheme!r}.", at="quant_type")
        fields.integer("blocksize", required=True, at_least=1)
        dtype = fields.text("dtype", required=True)
        if dtype is not None and DTYPE_NAMES.get(dtype) not in ("BF16", "F16", "F32"):
            expected = "expected bfloat16, float16 or float32."
            fields.complain("value", f"is {escape(dtype)!r}, {expected}", at="dtype")
        fields.integers("shape", required=True)
        nested = any(key.startswith("nested_") for key in fields.data)
        fields.integer("nested_blocksize", required=nested, at_least=1)
        if fields.text("nested_dtype", required=nested) not in (None, "float32"):
            fields.complain("value", "is another dtype than float32.", at="nested_dtype")
        fields.number("nested_offset", required=nested)
        fields.refuse_rest()
        for problem in found:
            self._add(name, f"{problem.loc.removeprefix('/')}: {problem.message}")
        return None if found else fields.data

    def _leftovers(self) -> None:
        """Adds parts that belong to no weight, and packed weights without their parts."""
        bits = self._said()
        for name, stored in self._checkpoint.tensors.items():
            if name in self._claimed:
                continue
            suffix = next((s for s in FOUR_BIT_SUFFIXES.values() if name.endswith(f".weight{s}")), None)
            if suffix is not None:
                owner = name.removesuffix(suffix)
                self._claim(owner, ("quant_state", *FOUR_BIT_SUFFIXES), "nf4")
                self._add(
                    owner, f"it has {suffix[1:]} but no quant_state: its format and shape are not known."
                )
            elif name.endswith(".weight") and bits is not None:
                packed = stored.spec.dtype in ("U8", "I8")
                if packed:
                    parts = "scales (SCB)" if stored.spec.dtype == "I8" else "scales (absmax) and quant_state"
                    self._add(
                        name,
                        f"it is {stored.spec.dtype}, a weight of {bits.name}, but its {parts} are missing.",
                    )

    def _check_layouts(self, weights: dict[str, QuantizedTensor]) -> None:
        """Refuses int8 weights that are not stored row by row."""
        for name, weight in list(weights.items()):
            part = weight.parts.get("weight_format")
            if part is None:
                continue
            layout = self._bytes(part.spec.name)[0]
            if layout != 0:
                expected = "0, row by row"
                self._problems.append(
                    wrong_part(weight, "weight_format", f"the layout is number {layout}", expected)
                )
                del weights[name]
