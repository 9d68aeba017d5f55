"""Finds access keys in files; says where and of what kind, and never shows them.

A text is searched as it is, with its escapes undone, and in what its runs of base64 stand for.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from collections.abc import Iterator

from adapterhub_tools.errors import Problem


def _key(prefix: bytes, rest: bytes) -> re.Pattern[bytes]:
    """Returns the pattern of a key that begins in a way of its own.

    It may begin behind anything but a letter or digit, also behind a line break as JSON writes it. That is
    looked at behind the prefix, because only a pattern that begins with plain letters is searched for fast.

    Args:
        prefix: how it begins, plain letters first; of one length.
        rest: what follows.
    """
    return re.compile(prefix + rb"(?:(?<![A-Za-z0-9]" + prefix + rb")|(?<=\\[nrt]" + prefix + rb"))" + rest)


_PATTERNS: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("a Hugging Face token", _key(rb"hf_", rb"[A-Za-z0-9]{30,}")),
    ("a Hugging Face organisation token", _key(rb"api_org_", rb"[A-Za-z0-9]{30,}")),
    ("an AWS access key", _key(rb"A[KS]IA", rb"[A-Z0-9]{16}\b")),
    (
        "an AWS secret key",
        re.compile(
            rb"(?i:aws_secret_access_key|secretaccesskey)(?:\\?[\"'])?\s{0,8}[:=]\s{0,8}(?:\\?[\"'])?"
            rb"([A-Za-z0-9/+]{40})"
        ),
    ),
    (
        "a Weights & Biases key",
        re.compile(
            rb"(?i:wandb_(?:api_)?key)(?:\\?[\"'])?\s{0,8}[:=]\s{0,8}(?:\\?[\"'])?([A-Za-z0-9_-]{40,})"
        ),
    ),
    ("a GitHub token", _key(rb"gh[pousr]_", rb"[A-Za-z0-9]{36,}")),
    ("a GitHub token", _key(rb"github_pat_", rb"[A-Za-z0-9_]{50,}")),
    ("a GitLab token", _key(rb"glpat-", rb"[A-Za-z0-9_-]{20,}")),
    ("an OpenAI or Anthropic key", _key(rb"sk-", rb"(?:ant-|proj-)?[A-Za-z0-9_-]{40,}")),
    ("a Google API key", _key(rb"AIza", rb"[A-Za-z0-9_-]{35}\b")),
    ("an NVIDIA API key", _key(rb"nvapi-", rb"[A-Za-z0-9_-]{60,}")),
    ("a Slack token", _key(rb"xox[abposr]-", rb"[A-Za-z0-9-]{10,}")),
    ("a PyPI token", _key(rb"pypi-AgEIcHlwaS5vcmc", rb"[A-Za-z0-9_-]{50,}")),
    ("a private key", re.compile(rb"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY-----")),
    (
        "a URL with a password",
        re.compile(
            rb"\b[a-z][a-z0-9+.-]{1,15}:(?:\\?/){2}[^\s/:@\"']{1,64}:"
            rb"(?![$<{%\[*]|(?i:pass|password|passwd|pw|secret|token|x+)@)[^\s/:@\"']{3,128}@"
        ),
    ),
    (
        "a login of a .netrc file",
        re.compile(
            rb"machine(?<!\wmachine)\s{1,8}\S{1,253}\s{1,8}login\s{1,8}\S{1,128}"
            rb"\s{1,8}password\s{1,8}(\S{8,})"
        ),
    ),
)
"""A key that stands behind a name is the group of its pattern."""

_HINTS: dict[str, re.Pattern[bytes]] = {
    "a URL with a password": re.compile(rb":(?:\\?/){2}[^\s/:@\"']{1,64}:[^\s/:@\"']{3,128}@"),
}
_NAMES = {"an AWS secret key": b"secret", "a Weights & Biases key": b"wandb_"}
"""What is found fast, and is there wherever a pattern is found that is slow to search for: a pattern, or a
word in lower case."""

_ESCAPE = re.compile(rb"\\(?:u00|x)([2-7][0-9A-Fa-f])")
"""A printable character as JSON, Python and others may write it."""

_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{40,}(?:(?:\r?\n|\\n)[A-Za-z0-9+/_-]{4,})*={0,2}")
"""A run of base64, long enough for a key; on several lines, also as JSON writes these."""

_STANDARD = bytes.maketrans(b"-_", b"+/")
_MAX_DECODED_BYTES = 4 << 20
"""The most base64 of one file that is decoded."""

_FEWEST_CHARACTERS = 8
"""A key of fewer different characters is a placeholder, such as ``hf_xxxx…``."""


def secret_problems(name: str, data: bytes) -> Iterator[Problem]:
    """Yields a problem for each kind of secret in a file's content, with the line of the first.

    Args:
        name: the file.
        data: its content, or the part of it that is text.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", "ignore").encode("utf-8", "ignore")
    told: set[str] = set()
    for kind, line, how in _all_secrets(data):
        if kind in told:
            continue
        told.add(kind)
        yield Problem(
            kind="secret",
            message=f"holds what looks like {kind}{how}.",
            file=name,
            loc=f"line {line}",
            remedy="Remove it from the file, and revoke it if it was ever published.",
        )


def redacted(text: str) -> str:
    """Returns a text in which whatever looks like a secret is replaced.

    Args:
        text: a message that may quote a file.
    """
    data = text.encode("utf-8", "surrogatepass")
    plain = _unescaped(data)
    if any(True for _ in _secrets(plain)):
        data = plain
    data = _BASE64.sub(_without_secret, data)
    for kind, pattern in _PATTERNS:
        data = pattern.sub(f"({kind})".encode(), data)
    return data.decode("utf-8", "surrogatepass")


def _all_secrets(data: bytes) -> Iterator[tuple[str, int, str]]:
    """Yields kind, line and way of writing of each secret."""
    for kind, start in _secrets(data):
        yield kind, _line(data, start), ""
    plain = _unescaped(data)
    if plain != data:
        # No line break is undone, so that lines stay what they are.
        for kind, start in _secrets(plain):
            yield kind, _line(plain, start), ", written with escapes"
    left = _MAX_DECODED_BYTES
    for run in _BASE64.finditer(data):
        if len(run[0]) > left:
            # A shorter one behind it is still decoded.
            continue
        left -= len(run[0])
        for kind, _ in _secrets(_decoded(data, run)):
            yield kind, _line(data, run.start()), ", in base64"


def _secrets(data: bytes) -> Iterator[tuple[str, int]]:
    """Yields the kind of each secret in a text, and where it begins; the first of each pattern."""
    lower = data.lower()
    for kind, pattern in _PATTERNS:
        hint, word = _HINTS.get(kind), _NAMES.get(kind)
        if (hint is not None and hint.search(data) is None) or (word is not None and word not in lower):
            continue
        for found in pattern.finditer(data):
            if len(set(found.group(found.lastindex or 0))) >= _FEWEST_CHARACTERS:
                yield kind, found.start()
                break


def _line(data: bytes, start: int) -> int:
    return data.count(b"\n", 0, start) + 1


def _unescaped(data: bytes) -> bytes:
    if _ESCAPE.search(data) is None:
        return data
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), data)


def _decoded(data: bytes, run: re.Match[bytes]) -> bytes:
    """Returns the text that a run of base64 stands for; empty if that is no text."""
    # Behind a line break as JSON writes it, its letter stands before the run.
    start = run.start() + (data[run.start() - 1 : run.start()] == b"\\")
    joined = data[start : run.end()].replace(b"\\n", b"").translate(_STANDARD, b"\r\n=")
    try:
        found = base64.b64decode(joined + b"=" * (-len(joined) % 4))
        found.decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return b""
    return found.replace(b"\0", b"")  # text of two-byte characters


def _without_secret(run: re.Match[bytes]) -> bytes:
    for kind, _ in _secrets(_decoded(run.string, run)):
        return f"({kind}, in base64)".encode()
    return run[0]
