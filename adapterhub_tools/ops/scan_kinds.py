"""What a file is, by its first bytes, and what its name says it is."""

from __future__ import annotations

import re

from adapterhub_tools.ops.scan_pickle import starts_like_a_pickle

HEAD_BYTES = 64 << 10
"""The bytes from which a kind is told."""

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x7fELF", "an ELF program"),
    (b"\xfe\xed\xfa\xce", "a Mach-O program"),
    (b"\xfe\xed\xfa\xcf", "a Mach-O program"),
    (b"\xce\xfa\xed\xfe", "a Mach-O program"),
    (b"\xcf\xfa\xed\xfe", "a Mach-O program"),
    (b"\xca\xfe\xba\xbe", "a Mach-O program or Java class"),
    (b"\x00asm", "a WebAssembly module"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b\x08", "a gzip file"),
    (b"BZh91AY&SY", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\x04\x22\x4d\x18", "an LZ4 file"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"%PDF-", "a PDF document"),
)
NATIVE = frozenset(
    {
        "an ELF program",
        "a PE program",
        "a Mach-O program",
        "a Mach-O program or Java class",
        "a WebAssembly module",
    }
)
ZIP = frozenset({"a ZIP archive", "an empty ZIP archive"})
ARCHIVES = ZIP | {
    "a 7z archive",
    "a gzip file",
    "a bzip2 file",
    "an xz file",
    "a Zstandard file",
    "an LZ4 file",
    "a RAR archive",
    "a tar archive",
}
PICKLE = "a Python pickle"
SCRIPT = "a script"
BYTE_CODE = "Python byte code"
BINARY = "binary data"
PAGE = "an HTML page"

# What a name promises: its ending -> the kinds that the file may be. None of them: no kind may be recognised.
_TEXT = "json jsonl txt md rst jinja jinja2 j2 yaml yml toml cfg ini csv tsv py ipynb gitattributes gitignore"
_MEDIA = "png jpg jpeg gif webp svg bmp wav mp3 flac mp4"
_PROMISES: dict[str, frozenset[str]] = {
    **dict.fromkeys(_TEXT.split(), frozenset()),
    **dict.fromkeys(_MEDIA.split(), frozenset()),
    **dict.fromkeys(("safetensors", "model", "spm", "tiktoken"), frozenset()),
    "py": frozenset({SCRIPT}),
    "gguf": frozenset({"a GGUF file"}),
    "npy": frozenset({"a NumPy array"}),
    "npz": ZIP,
    "pdf": frozenset({"a PDF document"}),
    **dict.fromkeys(("bin", "pt", "pth", "ckpt", "pkl", "pickle"), ZIP | {PICKLE}),
    **dict.fromkeys(("h5", "hdf5"), frozenset({"an HDF5 file"})),
    "keras": ZIP | {"an HDF5 file"},
}
_TEXT_ENDINGS = frozenset(_TEXT.split())

_NATIVE_NAME = re.compile(
    r".*\.(?:so(?:\.\d+)*|dll|dylib|exe|pyd|o|a|lib|class|jar|wasm|msi|scr|llamafile|ko)"
)
_FORMAT_NAME = re.compile(
    r".*\.(?:keras|h5|hdf5|pb|joblib|dill|mar|nemo|mlmodel|mlpackage|pmml|rds|rdata|skops|cloudpickle|tflite)"
)
_PICKLE_NAME = re.compile(r".*\.(?:bin|pt|pth|ckpt|pkl|pickle|pt2|torch)")
_ARCHIVE_NAME = re.compile(
    r".*\.(?:zip|tar|gz|tgz|bz2|xz|txz|7z|zst|rar|lz4|lzma|whl|egg|iso|cab|deb|rpm|apk)"
)
_SCRIPT_NAME = re.compile(
    r".*\.(?:sh|bash|zsh|fish|bat|cmd|ps1|psm1|vbs|js|mjs|ts|rb|pl|php|lua|r|jl|applescript|command)"
)
_PYTHON_NAME = re.compile(r".*\.(?:py|pyi|pyw|pyc|pyo|pyx|pxd)")
_SHEBANG = re.compile(rb"#! ?/")
_HTML = re.compile(rb"\s*<(?:!doctype html|html[\s>])", re.IGNORECASE)


def ending(name: str) -> str:
    """Returns what stands behind the last dot of a file's name, in lower case; empty if there is none."""
    last = name.rpartition("/")[2]
    return last.rpartition(".")[2].lower() if "." in last else ""


def kind_of(head: bytes) -> str:
    """Returns what a file is by its first bytes; empty if they do not say."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:2] == b"MZ" and b"\0" in head[:64]:
        return "a PE program"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[2:4] == b"\r\n" and len(head) >= 16 and 3000 <= int.from_bytes(head[:2], "little") < 4000:
        return BYTE_CODE
    if starts_like_a_pickle(head):
        return PICKLE
    if _SHEBANG.match(head):
        return SCRIPT
    return PAGE if _HTML.match(head) else ""


def promise_broken(name: str, kind: str, head: bytes) -> str:
    """Returns what a file really is, if that is not what its name says; empty otherwise.

    Args:
        name: the file.
        kind: what it is by its first bytes.
        head: these bytes.
    """
    end = ending(name)
    allowed = _PROMISES.get(end)
    if kind in (SCRIPT, PAGE):
        return kind if allowed is not None and not allowed and end not in _READABLE else ""
    if kind:
        return kind if allowed is not None and kind not in allowed else ""
    if end in _TEXT_ENDINGS and b"\0" in head[:4096] and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return BINARY
    return ""


_READABLE = _TEXT_ENDINGS - {"json", "jsonl"} | {"svg"}
"""Text in which a first line like that of a script or a page is nothing unusual."""


def named_native(name: str) -> bool:
    """Returns whether a name is that of machine code."""
    return _NATIVE_NAME.fullmatch(_last(name)) is not None


def named_executable_format(name: str) -> bool:
    """Returns whether a name is that of a model format that can carry code."""
    return _FORMAT_NAME.fullmatch(_last(name)) is not None


def named_pickle(name: str) -> bool:
    """Returns whether a name is that of a file that is loaded by unpickling."""
    return _PICKLE_NAME.fullmatch(_last(name)) is not None


def named_archive(name: str) -> bool:
    """Returns whether a name is that of an archive or a compressed file."""
    return _ARCHIVE_NAME.fullmatch(_last(name)) is not None


def named_script(name: str) -> bool:
    """Returns whether a name is that of a script in another language than Python."""
    return _SCRIPT_NAME.fullmatch(_last(name)) is not None


def named_python(name: str) -> bool:
    """Returns whether a name is that of Python source or byte code."""
    return _PYTHON_NAME.fullmatch(_last(name)) is not None


def _last(name: str) -> str:
    return name.rpartition("/")[2].lower()
