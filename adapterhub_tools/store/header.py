"""The header of a safetensors file, checked strictly.

A file is eight bytes (the header's length N, little-endian), N bytes of JSON, and the data. The format's own
library accepts files that two readers could understand differently (duplicate keys, unknown fields) or that
exhaust one (large headers, empty tensors by the million). Here each of these is an error, and the limits hold
before anything is read or built.

Source: the format description of safetensors 0.8 (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import FormatError, Problem, UnsupportedError, escape, raise_for
from adapterhub_tools.model.tensor import DTYPE_BITS, TensorSpec
from adapterhub_tools.store.files import LFS_REMEDY, is_lfs_pointer
from adapterhub_tools.store.strict_json import examine_json, json_type, trimmed

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Source

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""The longest header."""
MAX_TENSORS = 200_000
"""The most tensors in one file."""
MAX_RANK = 8
"""The most dimensions of a tensor."""
MAX_DIM = 2**48 - 1
"""The largest dimension."""
MAX_NAME_BYTES = 1000
"""The longest tensor name, in bytes of UTF-8."""

_FIELDS = ("dtype", "shape", "data_offsets")
_UNREADABLE_DTYPES = ("F6_E2M3", "F6_E3M2")
_REMEDY = "The file is damaged or was made by a faulty writer; get it again from its source."
# Control characters, and those that change the direction of the text around them.
_BAD_CHARACTERS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]")
_PARENT_PART = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)")
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file", "Convert it to safetensors first."),
    (
        b"PK\x03\x04",
        "a ZIP archive, such as a PyTorch checkpoint",
        "Convert it to safetensors where it was made.",
    ),
    (b"PK\x05\x06", "an empty ZIP archive", "Get the file again from its source."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it with a tool that you trust."),
    (b"\x1f\x8b", "a gzip file", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "Unpack it first."),
    (b"\x93NUMPY", "a NumPy file", "Convert it to safetensors first."),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "Convert it to safetensors first."),
    (b"%PDF", "a PDF document", "Get the file again from its source."),
    (b"<", "an HTML or XML page", "The download was answered with a page; download the file again."),
    (
        b"\x80\x02",
        "a Python pickle",
        "Convert it to safetensors where it was made; pickles are never loaded.",
    ),
    (
        b"\x80\x03",
        "a Python pickle",
        "Convert it to safetensors where it was made; pickles are never loaded.",
    ),
    (
        b"\x80\x04",
        "a Python pickle",
        "Convert it to safetensors where it was made; pickles are never loaded.",
    ),
    (
        b"\x80\x05",
        "a Python pickle",
        "Convert it to safetensors where it was made; pickles are never loaded.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """What a safetensors file holds.

    Attributes:
        name: the file, for messages.
        tensors: name -> tensor, in the order of their data.
        offsets: name -> the byte offset of its data from the start of the file.
        metadata: the strings under ``__metadata__``.
        data_start: where the data begins, in bytes from the start of the file.
        length: the length of the file in bytes.
    """

    name: str
    tensors: dict[str, TensorSpec]
    offsets: dict[str, int]
    metadata: dict[str, str]
    data_start: int
    length: int


def read_header(source: Source) -> SafetensorsHeader:
    """Reads and checks the header of a safetensors file; of the data nothing is read.

    Accepted: what the format describes, with the header in any JSON spacing, padded with spaces or not. The
        data
    must be covered by the tensors without gap, overlap or rest.

    Limits: header 16 MiB (checked before it is read), 200,000 tensors, 8 dimensions below 2**48 each.

    Raises:
        FormatError: the file breaks the format or a limit; lists every problem of a header that could be
            parsed.
        UnsupportedError: the header is sound, but a dtype (6-bit floats) cannot be read.
        StoreError: the file cannot be read.
    """
    text, data_start = _read_text(source)
    value, problems = examine_json(
        text.rstrip(b" "), file=source.name, loc="header", max_bytes=MAX_HEADER_BYTES
    )
    if not isinstance(
        value, dict
    ):  # it starts with a brace, so it could not be parsed, and the problems say why
        raise FormatError(*problems)
    check = _Check(source.name, source.length - data_start, problems)
    check.run(value)
    raise_for(trimmed(check.problems, source.name), FormatError)
    raise_for(trimmed(check.unsupported, source.name), UnsupportedError)
    return SafetensorsHeader(
        name=source.name,
        tensors=check.tensors,
        offsets={name: data_start + check.ranges[name][0] for name in check.tensors},
        metadata=check.metadata,
        data_start=data_start,
        length=source.length,
    )


def named_magic(first: bytes) -> tuple[str, str] | None:
    """Returns what a file really is, and the remedy, if its first bytes say so; None if they do not."""
    if is_lfs_pointer(first):
        return "a Git LFS pointer in place of the file", LFS_REMEDY
    return next((found[1:] for found in _MAGIC if first.startswith(found[0])), None)


def _read_text(source: Source) -> tuple[bytes, int]:
    """Returns the header's JSON and the offset of the data, having checked both ends of it."""

    def refuse(kind: str, message: str, remedy: str = _REMEDY) -> FormatError:
        return FormatError(Problem(kind=kind, message=message, file=source.name, loc="header", remedy=remedy))

    first = source.read(0, min(source.length, 24))
    magic = named_magic(first)
    size = int.from_bytes(first[:8], "little")
    if magic and (len(first) < 8 or size > MAX_HEADER_BYTES):
        kind = "lfs-pointer" if is_lfs_pointer(first) else "not-safetensors"
        raise refuse(kind, f"found {magic[0]}, expected a safetensors file.", magic[1])
    if len(first) < 8:
        raise refuse(
            "header-too-small", f"the file has {len(first)} bytes; a safetensors file has at least 10."
        )
    if size == 0:
        raise refuse("header-empty", "the header has 0 bytes.")
    if size > MAX_HEADER_BYTES:
        raise refuse("header-too-large", f"the header has {size:,} bytes; the limit is {MAX_HEADER_BYTES:,}.")
    if 8 + size > source.length:
        message = f"the header ends at byte {8 + size:,}, but the file has {source.length:,} bytes."
        raise refuse("header-truncated", message)
    text = source.read(8, size)
    if text[:1] != b"{":
        if text[:1] == b"[":
            raise refuse("not-an-object", "the header is an array, expected an object.")
        raise refuse("header-start", f"the header starts with byte 0x{text[0]:02x}, expected '{{'.")
    # Each tensor has this key, and inside a string its quotes would be escaped: no need to parse first.
    count = text.count(b'"data_offsets"')
    if count > MAX_TENSORS + 1:
        raise refuse("too-many-tensors", f"about {count:,} tensors; the limit is {MAX_TENSORS:,}.")
    stripped = text.rstrip(b" ")
    if stripped[-1:] != b"}":
        message = f"byte 0x{stripped[-1]:02x} follows the header; only '}}' and then spaces may end it."
        raise refuse("header-trailing-bytes", message)
    return text, 8 + size


class _Check:
    """Collects what a parsed header holds and every problem of it."""

    def __init__(self, file: str, data_bytes: int, problems: list[Problem]) -> None:
        self.file = file
        self.data_bytes = data_bytes
        self.problems = problems
        self.unsupported: list[Problem] = []
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.ranges: dict[str, tuple[int, int]] = {}
        self.complete = True  # every entry gave a range, so that their order can be judged

    def add(self, kind: str, message: str, loc: str) -> None:
        if len(self.problems) <= 100:
            problem = Problem(kind=kind, message=message, file=self.file, loc=loc, remedy=_REMEDY)
            self.problems.append(problem)

    def run(self, value: dict[str, Any]) -> None:
        count = len(value) - ("__metadata__" in value)
        if count > MAX_TENSORS:
            self.add("too-many-tensors", f"{count:,} tensors; the limit is {MAX_TENSORS:,}.", "header")
            return
        if count == 0:
            self.add("no-tensors", "the file holds no tensor.", "header")
        for name, entry in value.items():
            if name == "__metadata__":
                self.read_metadata(entry)
            else:
                self.read_entry(name, entry)
        if self.complete and count:
            self.check_coverage()

    def read_metadata(self, entry: Any) -> None:
        if not isinstance(entry, dict):
            self.add("metadata-type", f"found {json_type(entry)}, expected an object.", "__metadata__")
            return
        for key, text in entry.items():
            if isinstance(text, str):
                self.metadata[key] = text
            else:
                message = f"the value of '{escape(key)}' is {json_type(text)}, expected a string."
                self.add("metadata-type", message, "__metadata__")

    def read_entry(self, name: str, entry: Any) -> None:
        reason = _name_reason(name)
        if reason:
            self.add("tensor-name", f"the tensor's name {reason}.", name or "(empty name)")
        if not isinstance(entry, dict):
            self.add("entry-type", f"found {json_type(entry)}, expected an object.", name)
            self.complete = False
            return
        complete = len(entry) == 3 and all(field in entry for field in _FIELDS)
        if not complete:
            for field in entry:
                if field not in _FIELDS:
                    self.add("unknown-field", f"unknown field '{escape(field)}'.", name)
            for field in _FIELDS:
                if field not in entry:
                    self.add("missing-field", f"the field '{field}' is missing.", name)
        bits = self.read_dtype(name, entry.get("dtype", "U8"))
        shape = self.read_shape(name, entry.get("shape", []))
        span = self.read_offsets(name, entry.get("data_offsets"))
        if span is None:
            self.complete = False
            return
        self.ranges[name] = span
        if bits is None or shape is None or not complete:
            return
        self.tensors[name] = TensorSpec(name=name, dtype=entry["dtype"], shape=shape)
        self.check_size(name, bits, shape, span)

    def read_dtype(self, name: str, dtype: Any) -> int | None:
        if not isinstance(dtype, str):
            self.add("dtype", f"dtype is {json_type(dtype)}, expected a string.", name)
            return None
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            message = f"unknown dtype '{escape(dtype)}', expected one of {', '.join(DTYPE_BITS)}."
            self.add("dtype", message, name)
        elif dtype in _UNREADABLE_DTYPES:
            message = f"dtype {dtype}: values of 6 bits cannot be read."
            remedy = "Store the tensor in another dtype."
            self.unsupported.append(
                Problem(kind="dtype", message=message, file=self.file, loc=name, remedy=remedy)
            )
        return bits

    def read_shape(self, name: str, shape: Any) -> tuple[int, ...] | None:
        if not isinstance(shape, list):
            self.add("shape-type", f"shape is {json_type(shape)}, expected an array of integers.", name)
            return None
        if len(shape) > MAX_RANK:
            self.add("rank-limit", f"{len(shape):,} dimensions; the limit is {MAX_RANK}.", name)
            return None
        for dim in shape:
            if type(dim) is not int or dim < 0:
                found = escape(dim) if type(dim) in (int, float) else json_type(dim)
                self.add("shape-type", f"a dimension is {found}, expected an integer of at least 0.", name)
                return None
            if dim > MAX_DIM:
                self.add("dim-limit", f"a dimension is {dim}; the limit is {MAX_DIM} (2**48 - 1).", name)
                return None
        return tuple(shape)

    def read_offsets(self, name: str, offsets: Any) -> tuple[int, int] | None:
        if not isinstance(offsets, list) or len(offsets) != 2:
            found = f"an array of {len(offsets)}" if isinstance(offsets, list) else json_type(offsets)
            self.add("offsets-type", f"data_offsets is {found}, expected [begin, end].", name)
            return None
        begin, end = offsets
        if type(begin) is not int or type(end) is not int or begin < 0 or end < begin:
            found = escape([begin, end])
            message = f"data_offsets is {found}, expected two integers with 0 <= begin <= end."
            self.add("offsets-type", message, name)
            return None
        return begin, end

    def check_size(self, name: str, bits: int, shape: tuple[int, ...], span: tuple[int, int]) -> None:
        total = bits
        for dim in shape:  # in order, so that a zero after an overflow does not hide it
            total *= dim
            if total >= 2**64:
                self.add("size-overflow", f"the shape {list(shape)} has more than 2**64 bits.", name)
                return
        stored = span[1] - span[0]
        if total % 8:
            message = f"{total} bits (shape {list(shape)}) do not fill whole bytes."
            self.add("sub-byte-alignment", message, name)
        elif total // 8 != stored:
            message = f"shape {list(shape)} needs {total // 8:,} bytes, data_offsets gives {stored:,}."
            self.add("size-mismatch", message, name)

    def check_coverage(self) -> None:
        """Checks that the tensors cover the data without gap, overlap or rest; sorts them by it."""
        order = sorted(self.ranges, key=self.ranges.__getitem__)
        position = 0
        for name in order:
            begin, end = self.ranges[name]
            if begin > position:
                message = f"bytes {position:,} to {begin:,} of the data belong to no tensor."
                self.add("gap", message, name)
            elif begin < position:
                message = f"its data begins at byte {begin:,}, but the tensor before it ends at {position:,}."
                self.add("overlap", message, name)
            position = max(position, end)
        if position > self.data_bytes:
            message = f"the data ends at byte {self.data_bytes:,}, but this tensor ends at {position:,}."
            self.add("data-truncated", message, order[-1])
        elif position < self.data_bytes:
            message = f"{self.data_bytes - position:,} bytes follow the last tensor."
            self.add("trailing-data", message, order[-1])
        self.tensors = {name: self.tensors[name] for name in order if name in self.tensors}


def _name_reason(name: str) -> str:
    """Returns what is wrong with a tensor's name, or an empty string."""
    if not name:
        return "is empty"
    if len(name) > MAX_NAME_BYTES or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        return f"has {len(name.encode('utf-8', 'surrogatepass')):,} bytes; the limit is {MAX_NAME_BYTES:,}"
    if _BAD_CHARACTERS.search(name):
        return "holds a control character"
    if _PARENT_PART.search(name):
        return "holds the path part '..'"
    return ""
