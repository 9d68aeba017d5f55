"""Finds access keys in files; says where and of what kind, and never shows them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from adapterhub_tools.errors import Problem

_START = rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"
"""Where a key may begin: also behind an underscore, and behind a line break as JSON writes it."""

_PATTERNS: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("a Hugging Face token", re.compile(_START + rb"hf_[A-Za-z0-9]{30,}")),
    ("a Hugging Face organisation token", re.compile(_START + rb"api_org_[A-Za-z0-9]{30,}")),
    ("an AWS access key", re.compile(_START + rb"(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    (
        "an AWS secret key",
        re.compile(
            rb"(?i:aws_secret_access_key|secretaccesskey)[\"']?\s{0,8}[:=]\s{0,8}[\"']?([A-Za-z0-9/+]{40})"
        ),
    ),
    (
        "a Weights & Biases key",
        re.compile(rb"(?i:wandb_(?:api_)?key)[\"']?\s{0,8}[:=]\s{0,8}[\"']?([A-Za-z0-9_-]{40,})"),
    ),
    ("a GitHub token", re.compile(_START + rb"(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})")),
    ("a GitLab token", re.compile(_START + rb"glpat-[A-Za-z0-9_-]{20,}")),
    ("an OpenAI or Anthropic key", re.compile(_START + rb"sk-(?:ant-|proj-)?[A-Za-z0-9_-]{40,}")),
    ("a Google API key", re.compile(_START + rb"AIza[A-Za-z0-9_-]{35}\b")),
    ("an NVIDIA API key", re.compile(_START + rb"nvapi-[A-Za-z0-9_-]{60,}")),
    ("a Slack token", re.compile(_START + rb"xox[abposr]-[A-Za-z0-9-]{10,}")),
    ("a PyPI token", re.compile(_START + rb"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}")),
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
        re.compile(rb"\bmachine\s{1,8}\S{1,253}\s{1,8}login\s{1,8}\S{1,128}\s{1,8}password\s{1,8}(\S{8,})"),
    ),
)
"""A key that stands behind a name is the group of its pattern."""

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
    for kind, pattern in _PATTERNS:
        for found in pattern.finditer(data):
            if len(set(found.group(found.lastindex or 0))) < _FEWEST_CHARACTERS:
                continue
            line = data.count(b"\n", 0, found.start()) + 1
            yield Problem(
                kind="secret",
                message=f"holds what looks like {kind}.",
                file=name,
                loc=f"line {line}",
                remedy="Remove it from the file, and revoke it if it was ever published.",
            )
            break


def redacted(text: str) -> str:
    """Returns a text in which whatever looks like a secret is replaced.

    Args:
        text: a message that may quote a file.
    """
    data = text.encode("utf-8", "surrogatepass")
    for kind, pattern in _PATTERNS:
        data = pattern.sub(f"({kind})".encode(), data)
    return data.decode("utf-8", "surrogatepass")
