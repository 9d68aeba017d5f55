"""What a pickle would import, read from its instructions; nothing is ever unpickled.

A pickle is a program for a small machine. ``pickletools`` decodes its instructions without running them, and
that is all that happens here. Which names an import gets is followed as far as strings are pushed plainly;
a name that is computed counts as unknown, which is a finding of its own.

Sources: Python's ``Lib/pickletools.py`` (protocols 0 to 5); PyTorch's ``torch/serialization.py`` (ZIP form,
and the older form of several pickles in a row).
"""

from __future__ import annotations

import io
import lzma
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Source

MAX_BYTES = 16 << 20
"""The most bytes of pickles read from one file."""
MAX_MEMBERS = 10_000
"""The most members of an archive that are looked at."""

_MAX_DIRECTORY_BYTES = 16 << 20
_TAIL_BYTES = 1 << 17  # the end records of a ZIP archive, and the longest comment
_MAX_PICKLES = 8  # PyTorch's older form has five in a row
_BENIGN = re.compile(
    r"""
      collections\.OrderedDict
    | torch\._utils\._rebuild_(?:tensor(?:_v[23])?|parameter(?:_with_state)?|qtensor|sparse_tensor)
    | torch\.(?:\w+Storage|Size|device|dtype|bfloat16|float16|float32|float64|u?int\d+|bool)
    | torch\.storage\.(?:UntypedStorage|TypedStorage)
    | torch\.serialization\._get_layout
    | torch\.nn\.parameter\.Parameter
    | torch\._tensor\._rebuild_from_type_v2
    | numpy\.(?:dtype|ndarray|float\d+|int\d+)
    | numpy\.(?:_)?core\.multiarray\.(?:_reconstruct|scalar)
    | numpy\.core\.numeric\._frombuffer
    | _codecs\.encode
    | (?:builtins|__builtin__)\.(?:set|frozenset|list|dict|tuple|int|float|complex|bytes|bytearray|str|slice)
    """,
    re.VERBOSE,
)
# torch.storage._load_from_bytes is not among them: it calls torch.load again, on a second pickle.
_CALLS = {"REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
_STRINGS = {
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
}
UNKNOWN = "a computed name"


@dataclass(frozen=True, slots=True, kw_only=True)
class PickleImports:
    """What one or more pickles import.

    Attributes:
        names: ``module.name`` of every import, in order, each once.
        damage: why the instructions could not be followed to their end; empty if they could.
        members: the members of an archive that they were in.
    """

    names: tuple[str, ...] = ()
    damage: str = ""
    members: tuple[str, ...] = ()

    @property
    def suspicious(self) -> tuple[str, ...]:
        """The imports that rebuilding tensors does not need."""
        return tuple(name for name in self.names if not _BENIGN.fullmatch(name))


def starts_like_a_pickle(head: bytes) -> bool:
    """Returns whether a file's first bytes are instructions of a pickle.

    From protocol 2 on a pickle says so in its first two bytes, which a safetensors file may have by chance:
    the instructions after them have to make sense too. An older pickle has no mark, so it has to hold an
    import and a call.
    """
    with _quietly():
        return _starts_like_a_pickle(head)


def _starts_like_a_pickle(head: bytes) -> bool:
    marked = len(head) > 2 and head[0] == 0x80 and head[1] <= 5
    seen: set[str] = set()
    try:
        for count, (opcode, _, _) in enumerate(pickletools.genops(head)):
            seen.add(opcode.name)
            if marked and count >= 8:
                return True
    except (ValueError, IndexError, OverflowError) as error:
        if marked and _ran_out(error) and len(seen) > 2:
            return True
        return not marked and _ran_out(error) and bool(seen & {"GLOBAL", "INST"}) and bool(seen & _CALLS)
    return marked or (bool(seen & {"GLOBAL", "INST"}) and bool(seen & _CALLS))


def imports_of(source: Source) -> PickleImports:
    """Returns what a file's pickles import: one, several in a row, or those in a ZIP archive.

    Raises:
        StoreError: the file cannot be read.
    """
    if source.read(0, min(4, source.length)) == b"PK\x03\x04":
        return _in_archive(source)
    return _in_stream(source.read(0, min(source.length, MAX_BYTES)), whole=source.length <= MAX_BYTES)


def archive_members(source: Source) -> Iterator[tuple[str, bytes]]:
    """Yields the names in a ZIP archive, each with the first bytes of its content.

    Raises:
        zipfile.BadZipFile: it is none, or a damaged one.
        StoreError: the file cannot be read.
    """
    with _open_archive(source) as archive:
        for info in archive.infolist()[:MAX_MEMBERS]:
            if not info.is_dir():
                with archive.open(info) as member:
                    yield info.filename, member.read(512)


ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""What ``zipfile`` raises for damaged, encrypted and unusual archives."""


def _open_archive(source: Source) -> zipfile.ZipFile:
    """Opens a ZIP archive whose directory is of a size that can be read.

    Raises:
        zipfile.BadZipFile: the directory is larger than that of any checkpoint.
    """
    length = min(_TAIL_BYTES, source.length)
    tail = source.read(source.length - length, length)
    # The end record has the directory's size at byte 12 of it, that of large archives at byte 40.
    for magic, at, width in ((b"PK\x05\x06", 12, 4), (b"PK\x06\x06", 40, 8)):
        place = tail.rfind(magic)
        size = int.from_bytes(tail[place + at : place + at + width], "little") if place >= 0 else 0
        if _MAX_DIRECTORY_BYTES < size < 0xFFFFFFFF or (width == 8 and size > _MAX_DIRECTORY_BYTES):
            raise zipfile.BadZipFile("its directory is too large")
    return zipfile.ZipFile(reader(source))


def reader(source: Source) -> io.BufferedReader:
    """Returns a Source as a file object that can be read and sought."""
    return io.BufferedReader(_Raw(source), buffer_size=64 << 10)


class _Raw(io.RawIOBase):
    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.length}[whence]
        if start + offset < 0:
            raise ValueError("a position before the file")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._source.length - self._at))
        buffer[:count] = self._source.read(self._at, count)
        self._at += count
        return count


def _in_archive(source: Source) -> PickleImports:
    names: dict[str, None] = {}
    members: list[str] = []
    damage = ""
    try:
        with _open_archive(source) as archive:
            left = MAX_BYTES
            for info in archive.infolist()[:MAX_MEMBERS]:
                if info.is_dir() or left <= 0:
                    continue
                with archive.open(info) as member:
                    head = member.read(4096)
                    if not (info.filename.endswith((".pkl", ".pickle")) or starts_like_a_pickle(head)):
                        continue
                    data = head + member.read(left)
                left -= len(data)
                members.append(info.filename)
                found = _in_stream(data, whole=len(data) == info.file_size)
                names.update(dict.fromkeys(found.names))
                damage = damage or found.damage
    except ARCHIVE_ERRORS as error:
        damage = f"the ZIP archive cannot be read ({type(error).__name__})"
    return PickleImports(names=tuple(names), damage=damage, members=tuple(members))


def _in_stream(data: bytes, *, whole: bool) -> PickleImports:
    """Follows up to eight pickles in a row; what stands behind the last one is data of tensors."""
    names: dict[str, None] = {}
    stream = io.BytesIO(data)
    for number in range(_MAX_PICKLES):
        start = stream.tell()
        if start >= len(data):
            break
        if number and not starts_like_a_pickle(data[start : start + 4096]):
            break
        try:
            with _quietly():
                for name in _imports(stream):
                    names.setdefault(name)
        except (ValueError, IndexError, OverflowError) as error:
            cut = not whole and _ran_out(error)
            damage = (
                f"only its first {len(data):,} bytes were read" if cut else "its instructions are damaged"
            )
            return PickleImports(names=tuple(names), damage=damage)
    return PickleImports(names=tuple(names))


def _imports(stream: io.BytesIO) -> Iterator[str]:
    """Yields the imports of one pickle, and leaves the stream behind it."""
    strings: list[str | None] = []  # the strings pushed last; None for anything else
    memo: dict[int, str | None] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        top = strings[-1] if strings else None
        if name in _STRINGS:
            strings.append(str(argument))
        elif name in ("GLOBAL", "INST"):
            yield ".".join(str(argument).split(" ", 1))
            strings.append(None)
        elif name == "STACK_GLOBAL":
            pair = strings[-2:]
            known = len(pair) == 2 and all(part is not None for part in pair)
            yield f"{pair[0]}.{pair[1]}" if known else UNKNOWN
            strings.append(None)
        elif name in ("EXT1", "EXT2", "EXT4"):
            yield "copyreg extension"
            strings.append(None)
        elif name == "MEMOIZE":
            memo[len(memo)] = top
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = top
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(int(argument or 0)))
        elif name not in ("PROTO", "FRAME"):
            strings.append(None)
        del strings[:-4]


@contextmanager
def _quietly() -> Iterator[None]:
    """Text that is no pickle may hold escapes of which Python's decoder warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _ran_out(error: Exception) -> bool:
    """Whether the instructions made sense, but the bytes ended before them."""
    text = str(error)
    return "pickle exhausted before seeing STOP" in text or "not enough data" in text or "expected" in text
