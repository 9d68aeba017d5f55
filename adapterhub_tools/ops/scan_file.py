"""The rules that one file is held against."""

from __future__ import annotations

import re
from collections.abc import Iterator

from adapterhub_tools.errors import FormatError, Problem, UnsupportedError, escape
from adapterhub_tools.model.protocols import Source
from adapterhub_tools.ops import scan_kinds as kinds
from adapterhub_tools.ops import scan_rules as rules
from adapterhub_tools.ops.scan_config import (
    MAX_CONFIG_BYTES,
    config_findings,
    is_loaded_config,
    template_findings,
)
from adapterhub_tools.ops.scan_pickle import ARCHIVE_ERRORS, archive_members, imports_of
from adapterhub_tools.ops.scan_template import gguf_templates
from adapterhub_tools.ops.secrets import secret_problems
from adapterhub_tools.ops.validation_report import Finding
from adapterhub_tools.store.files import LFS_REMEDY, is_lfs_pointer
from adapterhub_tools.store.header import MAX_HEADER_BYTES, read_header

MAX_TEXT_BYTES = 64 << 20
"""The most of one file that is searched for secrets."""

_TAIL_BYTES = 22 + 0xFFFF  # the end record of a ZIP archive, and the longest comment behind it
_MAX_SECRET_SEARCH_OF_WEIGHTS = 1 << 20
_OBJECTS = re.compile(rb"'[|<>=]?O\d*'")
_NAMES_SHOWN = 8
_PLAIN_JSON = re.compile(r"(?:.*/)?(?:tokenizer|vocab)\.json")


def file_findings(name: str, source: Source) -> Iterator[Finding | Problem]:
    """Yields what is wrong with a file, and as a Problem what could not be checked.

    Args:
        name: the file, relative to its folder.
        source: its content; read in part.

    Raises:
        StoreError: it cannot be read.
    """
    head = source.read(0, min(kinds.HEAD_BYTES, source.length))
    if is_lfs_pointer(head):
        message = "a Git LFS pointer stands in place of the file, so it could not be scanned."
        yield Problem(kind="lfs-pointer", message=message, file=name, remedy=LFS_REMEDY)
        return
    kind = kinds.kind_of(head)
    if name.lower().endswith(".safetensors"):
        broken = list(_safetensors(name, source))
        yield from broken
        # The first bytes of a sound file are a length, and may look like those of another kind by chance; but
        # a length that makes sense as a pickle's instructions was made so.
        if not broken and kind != kinds.PICKLE:
            kind = ""
    other = kinds.promise_broken(name, kind, head)
    if other:
        yield rules.DISGUISED.finding(f"is {other}, which its name does not say.", file=name)
    yield from _by_kind(name, kind, source)
    if kind not in kinds.ZIP and _ends_as_archive(source):
        yield rules.POLYGLOT.finding("ends as a ZIP archive does, and begins as another file.", file=name)
    yield from _secrets(name, kind, source)
    yield from _text(name, source)


def _safetensors(name: str, source: Source) -> Iterator[Finding]:
    try:
        read_header(source)
    except UnsupportedError:
        return  # sound, of a dtype that cannot be read
    except FormatError as error:
        # Some writers store null as the metadata, which every reader takes for none.
        harmful = [problem for problem in error.problems if problem.kind != "metadata-type"]
        for problem in harmful[:5]:
            where = problem.loc
            yield rules.BROKEN_SAFETENSORS.finding(f"{problem.kind}: {problem.message}", file=name, loc=where)


def _by_kind(name: str, kind: str, source: Source) -> Iterator[Finding]:
    """Yields what follows from what the file is, by its first bytes or its name."""
    if kind in kinds.ZIP:
        yield from _archive(name, source)
    elif kind == kinds.PICKLE or (kinds.named_pickle(name) and kind in ("", kinds.SCRIPT)):
        yield from _pickle(name, source, "is a Python pickle" if kind else "is a pickle by its name")
    elif kind == "a NumPy array":
        if _OBJECTS.search(source.read(0, min(512, source.length))):
            yield rules.PICKLE.finding("holds Python objects, which NumPy stores as a pickle.", file=name)
    else:
        yield from _by_name(name, kind)


def _by_name(name: str, kind: str) -> Iterator[Finding]:
    if kind in kinds.NATIVE or kinds.named_native(name):
        yield rules.NATIVE_CODE.finding(f"is {kind or 'machine code by its name'}.", file=name)
    elif kind == "an HDF5 file" or kinds.named_executable_format(name):
        yield rules.EXECUTABLE_FORMAT.finding(f"is {kind or 'a format that can carry code'}.", file=name)
    elif kinds.named_pickle(name) and not kind:
        yield rules.PICKLE.finding("is a pickle by its name.", file=name)
    elif kind in kinds.ARCHIVES or kinds.named_archive(name):
        yield rules.ARCHIVE.finding(f"is {kind or 'an archive by its name'}.", file=name)
    elif kind == kinds.BYTE_CODE or kinds.named_python(name):
        yield rules.PYTHON_CODE.finding(
            f"is {kind if kind == kinds.BYTE_CODE else 'Python code'}.", file=name
        )
    elif kinds.ending(name) == "ipynb":
        yield rules.NOTEBOOK.finding("is a notebook.", file=name)
    elif kind == kinds.SCRIPT or kinds.named_script(name):
        yield rules.SCRIPT.finding("is a script.", file=name)


def _pickle(name: str, source: Source, what: str) -> Iterator[Finding]:
    found = imports_of(source)
    where = f" ({escape(', '.join(found.members))})" if found.members else ""
    yield rules.PICKLE.finding(f"{what}{where}.", file=name)
    if found.suspicious:
        shown = ", ".join(escape(name) for name in found.suspicious[:_NAMES_SHOWN])
        more = f" and {len(found.suspicious) - _NAMES_SHOWN} more" * (len(found.suspicious) > _NAMES_SHOWN)
        yield rules.PICKLE_CODE.finding(f"imports {shown}{more}.", file=name)
    elif found.damage:
        yield rules.PICKLE_CODE.finding(f"could not be followed: {found.damage}.", file=name)


def _archive(name: str, source: Source) -> Iterator[Finding]:
    """A ZIP archive: arrays of NumPy, a checkpoint of PyTorch, a Keras model, or anything."""
    end = kinds.ending(name)
    if kinds.named_executable_format(name):
        yield rules.EXECUTABLE_FORMAT.finding("is a model format that can carry code.", file=name)
        return
    if end == "npz":
        yield from _arrays(name, source)
        return
    if kinds.named_pickle(name) or imports_of(source).members:
        yield from _pickle(name, source, "is a ZIP archive with a Python pickle")
        return
    yield rules.ARCHIVE.finding("is a ZIP archive.", file=name)


def _arrays(name: str, source: Source) -> Iterator[Finding]:
    try:
        for member, head in archive_members(source):
            if not head.startswith(b"\x93NUMPY"):
                message = f"holds {escape(member)}, which is no NumPy array."
                yield rules.ARCHIVE.finding(message, file=name, loc=member)
            elif _OBJECTS.search(head):
                message = "holds Python objects, which NumPy stores as a pickle."
                yield rules.PICKLE.finding(message, file=name, loc=member)
    except ARCHIVE_ERRORS as error:
        yield rules.ARCHIVE.finding(f"its members cannot be read ({type(error).__name__}).", file=name)


def _ends_as_archive(source: Source) -> bool:
    """Whether a ZIP reader would find an archive from the end of the file."""
    length = min(_TAIL_BYTES, source.length)
    tail = source.read(source.length - length, length)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0:
        if len(tail) >= at + 22 and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail):
            return True
        at = tail.rfind(b"PK\x05\x06", 0, at)
    return False


def _secrets(name: str, kind: str, source: Source) -> Iterator[Finding]:
    weights = kind in ("a GGUF file", "a NumPy array", "an HDF5 file", kinds.PICKLE) or kind in kinds.ARCHIVES
    weights = weights or kinds.named_pickle(name)
    if name.lower().endswith(".safetensors"):
        size = int.from_bytes(source.read(0, min(8, source.length)), "little")
        data = source.read(8, min(size, MAX_HEADER_BYTES, source.length - 8)) if source.length > 8 else b""
    elif weights and source.length > _MAX_SECRET_SEARCH_OF_WEIGHTS:
        return
    else:
        data = source.read(0, min(source.length, MAX_TEXT_BYTES))
        if source.length > MAX_TEXT_BYTES:
            message = f"has {source.length:,} bytes; the first {MAX_TEXT_BYTES:,} were searched for secrets."
            yield rules.LARGE_TEXT.finding(message, file=name)
    for problem in secret_problems(name, data):
        yield rules.SECRET.finding(problem.message, file=name, loc=problem.loc)


def _text(name: str, source: Source) -> Iterator[Finding]:
    """Configs and chat templates."""
    lower = name.lower()
    if lower.endswith(".json") and not _PLAIN_JSON.fullmatch(lower):
        if source.length <= MAX_CONFIG_BYTES:
            yield from config_findings(name, source.read(0, source.length))
        elif is_loaded_config(name):
            message = f"has {source.length:,} bytes; a config has at most {MAX_CONFIG_BYTES:,}."
            yield rules.OVERSIZED.finding(message, file=name)
    elif lower.endswith(".gguf"):
        for key, template in gguf_templates(source.read(0, min(source.length, MAX_CONFIG_BYTES))):
            yield from template_findings(name, template, loc=key)
    elif lower.endswith((".jinja", ".jinja2", ".j2")):
        text = source.read(0, min(source.length, MAX_CONFIG_BYTES)).decode("utf-8", "replace")
        yield from template_findings(name, text)
        if source.length > MAX_CONFIG_BYTES:
            message = f"has {source.length:,} bytes; a template has at most {MAX_CONFIG_BYTES:,}."
            yield rules.OVERSIZED.finding(message, file=name)
