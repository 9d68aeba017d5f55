"""How a base is quantised: the scheme, and one quantised weight with the tensors that it is stored as."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from adapterhub_tools.errors import FormatError, Problem, UnsupportedError, escape
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.model.tensor import DTYPE_NAMES, FLOAT_DTYPES, TensorSpec

FORMAT_BITS = {"nf4": 4, "fp4": 4, "int8": 8}
"""The formats that can be read and written -> bits per weight."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes has for 4-bit weights."""
DEFAULT_BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
"""The number of scales that share one scale under double quantisation."""
REMOTE_QUANTISED = "remote-quantised"
"""The kind of the problem with a base that must be on this machine, because it is read more than once."""

_LIBRARY = "bitsandbytes-"
_STORAGE = {**DTYPE_NAMES, "uint8": "U8", "int8": "I8"}
_KNOWN = ", ".join(_LIBRARY + name for name in FORMAT_BITS)
_REMEDY = f"Known are {_KNOWN}; for another scheme merge onto the 16-bit base that was quantised."


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How weights are quantised.

    Attributes:
        format: one of FORMAT_BITS.
        double: whether the scales are quantised as well.
        block_size: how many weights share a scale; None for ``"int8"``, where each output has one.
        nested_block_size: how many scales share a scale, where ``double``.
        compute_dtype: the safetensors dtype that weights have in a forward pass; None if unknown.
        storage_dtype: the dtype that packed bytes are stored as: ``"U8"`` (``"I8"`` for ``"int8"``), or a
            wider one where the shards of a trainer need it.
        skip_modules: patterns of modules that a loader leaves as they are (``llm_int8_skip_modules``); None
            for its own choice.
        version: of the quantising library; None if unknown.
    """

    format: str
    double: bool = False
    block_size: int | None = None
    nested_block_size: int = NESTED_BLOCK_SIZE
    compute_dtype: str | None = None
    storage_dtype: str | None = None
    skip_modules: tuple[str, ...] | None = None
    version: str | None = None

    @property
    def bits(self) -> int:
        """The bits per weight."""
        return FORMAT_BITS[self.format]

    @property
    def name(self) -> str:
        """What a manifest calls it, such as ``"bitsandbytes-nf4"``."""
        return _LIBRARY + self.format

    @property
    def words(self) -> str:
        """The scheme for a reader, such as ``"NF4 in blocks of 64, scales quantised"``."""
        if self.format == "int8":
            return "int8, a scale for each output"
        nested = ", scales quantised" if self.double else ""
        return f"{self.format.upper()} in blocks of {self.block_size}{nested}"

    @property
    def spelled(self) -> str:
        """What ``parse`` reads as a scheme of the same values, such as ``"nf4,double,64"``."""
        words = ["double"] * self.double + [str(size) for size in (self.block_size,) if size is not None]
        return ",".join((self.format, *words))

    def same_values(self, other: QuantScheme) -> bool:
        """Tells whether both give the same weights, however their bytes are stored."""
        mine = (self.format, self.double, self.block_size)
        return mine == (other.format, other.double, other.block_size)

    def to_json(self) -> dict[str, Any]:
        """Returns the object that a manifest's ``base.quantisation`` holds."""
        data: dict[str, Any] = {"scheme": self.name, "bits": self.bits}
        if self.block_size is not None:
            data |= {"block_size": self.block_size, "double": self.double}
        optional = {
            "compute_dtype": self.compute_dtype,
            "storage_dtype": self.storage_dtype,
            "version": self.version,
        }
        data |= {name: value for name, value in optional.items() if value is not None}
        return data if self.skip_modules is None else data | {"skip_modules": list(self.skip_modules)}

    @classmethod
    def from_json(cls, data: dict[str, Any], *, file: str = "", loc: str = "") -> QuantScheme:
        """Reads a manifest's ``base.quantisation``.

        Raises:
            UnsupportedError: a scheme that is not known here.
            FormatError: fields that contradict the scheme; all of them.
        """
        name = str(data.get("scheme"))
        scheme = name.removeprefix(_LIBRARY)
        if not name.startswith(_LIBRARY) or scheme not in FORMAT_BITS:
            raise unknown_scheme(name, file=file, loc=loc)
        problems = scheme_problems(data, file=file, loc=loc)
        if problems:
            raise FormatError(*problems)
        return cls(
            format=scheme,
            double=bool(data.get("double", False)),
            block_size=None if scheme == "int8" else data.get("block_size", DEFAULT_BLOCK_SIZE),
            compute_dtype=data.get("compute_dtype"),
            storage_dtype=data.get("storage_dtype"),
            skip_modules=tuple(data["skip_modules"]) if "skip_modules" in data else None,
            version=data.get("version"),
        )

    @classmethod
    def parse(cls, text: str, *, compute_dtype: str | None = None) -> QuantScheme:
        """Reads what a user types: ``"nf4"``, ``"nf4,double"``, ``"fp4,128"``, ``"int8"``; in any case.

        Args:
            text: the format, then ``double`` or a block size or both.
            compute_dtype: ``"bfloat16"`` and the like, or a safetensors dtype.

        Raises:
            UnsupportedError: an unknown format, word, block size or dtype.
        """
        name, *words = [part.strip().lower() for part in text.split(",")]
        name = name.removeprefix(_LIBRARY)
        if name not in FORMAT_BITS:
            raise unknown_scheme(text)
        double, size = False, None
        for word in words:
            if name != "int8" and word == "double" and not double:
                double = True
            elif name != "int8" and word.isdecimal() and int(word) in BLOCK_SIZES and size is None:
                size = int(word)
            else:
                sizes = ", ".join(map(str, BLOCK_SIZES))
                message = f"{escape(repr(word))} says nothing about {name}, or for the second time."
                remedy = f"Give 'double' or a block size ({sizes}) after nf4 or fp4; int8 has neither."
                raise UnsupportedError.of("unknown-scheme", message, loc=text, remedy=remedy)
        if name != "int8" and size is None:
            size = DEFAULT_BLOCK_SIZE
        return cls(
            format=name, double=double, block_size=size, compute_dtype=_compute_dtype(compute_dtype, text)
        )

    @classmethod
    def from_config(cls, data: dict[str, Any], *, file: str = "config.json") -> QuantScheme:
        """Reads the ``quantization_config`` that transformers writes.

        Raises:
            UnsupportedError: another library than bitsandbytes, or a format of it that is not known here.
        """
        loc = "quantization_config"
        method = str(data.get("quant_method", "bitsandbytes" if "load_in_4bit" in data else None))
        if method != "bitsandbytes":
            raise unknown_scheme(method, file=file, loc=f"{loc}.quant_method")
        skip = data.get("llm_int8_skip_modules")
        skips = tuple(map(str, skip)) if isinstance(skip, list) else None
        if data.get("load_in_8bit") or data.get("_load_in_8bit"):
            return cls(format="int8", storage_dtype="I8", skip_modules=skips)
        scheme = str(data.get("bnb_4bit_quant_type", "fp4"))
        if not (data.get("load_in_4bit") or data.get("_load_in_4bit")) or FORMAT_BITS.get(scheme) != 4:
            raise unknown_scheme(_LIBRARY + scheme, file=file, loc=f"{loc}.bnb_4bit_quant_type")
        return cls(
            format=scheme,
            double=data.get("bnb_4bit_use_double_quant") is True,
            block_size=DEFAULT_BLOCK_SIZE,
            compute_dtype=DTYPE_NAMES.get(str(data.get("bnb_4bit_compute_dtype"))),
            storage_dtype=_STORAGE.get(str(data.get("bnb_4bit_quant_storage"))),
            skip_modules=skips,
        )


def _compute_dtype(text: str | None, loc: str) -> str | None:
    if text is None:
        return None
    found = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}.get(text, DTYPE_NAMES.get(text, text))
    if found in FLOAT_DTYPES and found != "F64":
        return found
    message = f"the compute dtype is {escape(repr(text))}."
    raise UnsupportedError.of(
        "compute-dtype", message, loc=loc, remedy="Give bfloat16, float16 or float32 (bf16, fp16, fp32)."
    )


def unknown_scheme(name: str, *, file: str = "", loc: str = "") -> UnsupportedError:
    """Returns the error for a scheme that is not known here."""
    message = f"the quantisation scheme is {escape(repr(name))}, which is not known here."
    return UnsupportedError.of("unknown-scheme", message, file=file, loc=loc, remedy=_REMEDY)


def scheme_problems(data: dict[str, Any], *, file: str = "", loc: str = "") -> list[Problem]:
    """Returns what contradicts the scheme that an object names; nothing for unknown schemes."""
    name = str(data.get("scheme"))
    scheme = name.removeprefix(_LIBRARY)
    if not name.startswith(_LIBRARY) or scheme not in FORMAT_BITS:
        return []
    problems: list[Problem] = []

    def add(field: str, expected: str) -> None:
        message = f"{field} is {escape(repr(data[field]))}, but {name} has {expected}."
        where = f"{loc}/{field}" if loc.startswith("/") or not loc else f"{loc}.{field}"
        problems.append(
            Problem(
                kind="scheme", message=message, file=file, loc=where, remedy="Correct it, or leave it out."
            )
        )

    bits = FORMAT_BITS[scheme]
    if data.get("bits", bits) != bits:
        add("bits", str(bits))
    if scheme == "int8":
        if "block_size" in data:
            add("block_size", "no blocks")
        if data.get("double"):
            add("double", "no scales that are quantised")
    elif data.get("block_size", DEFAULT_BLOCK_SIZE) not in BLOCK_SIZES:
        add("block_size", f"one of {', '.join(map(str, BLOCK_SIZES))}")
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """One quantised weight of a checkpoint.

    Attributes:
        spec: the weight as if it were not quantised: its name, its shape (out, in), its dtype before.
        scheme: how it is quantised.
        parts: role -> the tensor that is stored: ``"data"`` holds the weights; for 4 bits also ``"absmax"``,
            ``"quant_map"``, ``"quant_state"`` and, where double, ``"nested_absmax"`` and
            ``"nested_quant_map"``; for int8 ``"scales"`` and, if stored, ``"weight_format"``.
        nested_offset: what was taken from the scales before they were quantised; None if they were not.
    """

    spec: TensorSpec
    scheme: QuantScheme
    parts: dict[str, ByteRange]
    nested_offset: float | None = None

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names on disk of all its tensors."""
        return tuple(part.spec.name for part in self.parts.values())

    @property
    def small_parts(self) -> dict[str, ByteRange]:
        """The parts beside the weights, which are read whole."""
        return {role: part for role, part in self.parts.items() if role != "data"}

    def to_json(self) -> dict[str, Any]:
        """Returns the weight as a JSON object, for a plan."""
        return {
            "spec": self.spec.to_json(),
            "scheme": {**self.scheme.to_json(), "nested_block_size": self.scheme.nested_block_size},
            "parts": {role: part.to_json() for role, part in sorted(self.parts.items())},
            "nested_offset": self.nested_offset,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QuantizedTensor:
        """Reads what ``to_json`` wrote."""
        said = data["scheme"]
        scheme = QuantScheme.from_json(said)
        return cls(
            spec=TensorSpec.from_json(data["spec"]),
            scheme=replace(scheme, nested_block_size=said["nested_block_size"]),
            parts={role: ByteRange.from_json(part) for role, part in data["parts"].items()},
            nested_offset=data["nested_offset"],
        )
