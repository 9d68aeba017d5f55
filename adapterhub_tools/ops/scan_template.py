r"""Chat templates that reach for more than messages and strings.

A chat template is a Jinja program that comes with a tokenizer and runs where the model is served. In a
renderer without a sandbox (CVE-2024-34359), or one with a hole, ``x.__class__`` leads to every class of
Python. The rules look only inside ``{{ … }}`` and ``{% … %}``; text that is printed may hold anything.

Source: Jinja 3.1, ``jinja2/sandbox.py`` (what the sandbox refuses), its built-in filters and globals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# A string without an end goes to the end of the text; tried from every quote, that would take quadratic time.
_STRING = re.compile(r"'(?:[^'\\]|\\.)*(?:'|\\?\Z)|\"(?:[^\"\\]|\\.)*(?:\"|\\?\Z)", re.DOTALL)
_GGUF_KEY = re.compile(rb"tokenizer\.chat_template(?:\.[\w-]+)?(?=\x08\0\0\0)", re.ASCII)
_OPENING = re.compile(r"\{[{%#]")
# Inside a block a string may hold what looks like its end.
_ENDS = {
    "{{": re.compile(rf"{_STRING.pattern}|(?P<end>\}}\}})", re.DOTALL),
    "{%": re.compile(rf"{_STRING.pattern}|(?P<end>%\}})", re.DOTALL),
    "{#": re.compile(r"(?P<end>#\})"),
}
_DUNDER = re.compile(r"__[A-Za-z][A-Za-z_]*__")
_INTERNAL = re.compile(
    r"\b(?:func_globals|func_code|gi_frame|gi_code|cr_frame|cr_code|ag_frame|tb_frame|f_globals|f_builtins"
    r"|f_back|im_func|im_self|_TemplateReference__context|lipsum|getattr|setattr|subprocess|builtins)\b"
)
_CALL = re.compile(
    r"(?<![\w.])(?:eval|exec|compile|open|popen|system|__import__)\s*\(|\.(?:popen|system|mro)\s*\("
)
_ATTR_FILTER = re.compile(r"\|\s*attr\s*\(")
_LOADING = re.compile(r"\{%[-+]?\s*(include|import|extends|from)\b")
_ESCAPED_UNDERSCORE = re.compile(r"\\(?:x5f|u005f|U0000005f|137|N\{LOW LINE\})", re.IGNORECASE)
_HALF = re.compile(r"__[A-Za-z]*|[A-Za-z]*__|_")


def template_dangers(template: str) -> Iterator[tuple[int, str]]:
    """Yields each sort of danger in a template once: the line where it stands first, and what it is.

    Args:
        template: its text.
    """
    told: set[str] = set()
    for start, block in _blocks(template):
        for offset, danger in _dangers(block):
            if danger not in told:
                told.add(danger)
                yield template.count("\n", 0, start + offset) + 1, danger


def _blocks(template: str) -> Iterator[tuple[int, str]]:
    """Yields each ``{{ … }}`` and ``{% … %}`` with its place; one without an end goes to the text's."""
    position = 0
    while opening := _OPENING.search(template, position):
        matches = _ENDS[opening.group()].finditer(template, opening.end())
        position = next((found.end() for found in matches if found.group("end")), len(template))
        if opening.group() != "{#":
            yield opening.start(), template[opening.start() : position]


def _dangers(block: str) -> Iterator[tuple[int, str]]:
    """Yields what is dangerous in one ``{{ … }}`` or ``{% … %}``."""
    for found in _DUNDER.finditer(block):
        yield found.start(), f"uses {found.group()[:40]}"
    bare = _STRING.sub(lambda string: "'" + " " * (len(string.group()) - 2) + "'", block)
    for found in _INTERNAL.finditer(bare):
        yield found.start(), f"uses {found.group()}"
    for found in _CALL.finditer(bare):
        yield found.start(), f"calls {found.group().strip('.( ')}"
    for found in _ATTR_FILTER.finditer(bare):
        yield found.start(), "uses the filter attr, which reads attributes by computed names"
    for found in _LOADING.finditer(bare):
        yield found.start(), f"loads another template ({found.group(1)})"
    for string in _STRING.finditer(block):
        if _ESCAPED_UNDERSCORE.search(string.group()):
            yield string.start(), "writes underscores as escapes"
        elif _HALF.fullmatch(string.group()[1:-1]):
            yield string.start(), "has a part of a name with underscores, to be put together"


def templates_in(value: Any) -> Iterator[tuple[str, str]]:
    """Yields every chat template in a parsed JSON value, with the key path where it stands.

    It may be one text, or a list of texts by name, as tokenizers with several templates have.
    """
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, list):
            waiting.extend((f"{path}[{index}]", inner) for index, inner in enumerate(item))
        if not isinstance(item, dict):
            continue
        for key, inner in item.items():
            where = f"{path}.{key}" if path else str(key)
            if "chat_template" in str(key):
                yield from _texts(where, inner)
            else:
                waiting.append((where, inner))


def gguf_templates(data: bytes) -> Iterator[tuple[str, str]]:
    """Yields the chat templates among the metadata of a GGUF file, each with its key.

    A value is the key, four bytes of type (8 is a string), eight of length, and the text (ggml, ``gguf.md``).

    Args:
        data: the beginning of the file.
    """
    for found in _GGUF_KEY.finditer(data):
        kind, size = data[found.end() : found.end() + 4], data[found.end() + 4 : found.end() + 12]
        begin = found.end() + 12
        if int.from_bytes(kind, "little") == 8:
            text = data[begin : begin + int.from_bytes(size, "little")]
            yield found.group().decode(), text.decode("utf-8", "replace")


def _texts(where: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(f"{where}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(f"{where}.{key}", item)
