"""Writes docs/methods.md from the methods' own pages, or checks with `--check` that it is up to date.

What a method is comes from its module's docstring, what it can do from its `IMPLEMENTATION`; the types that
are not merged come from the table of the PEFT dialect.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from adapterhub_tools import registry
from adapterhub_tools.dialects._peft.config import table
from generated_file import write_or_check

INTRODUCTION = """\
# Methods

This page is generated from `adapterhub_tools/methods/`. Change a method's docstring, then run `make docs`.

W is a base weight, W' the merged one. Every method below is described, validated, recorded in a manifest and
merged.

- **Guarantee.** `exact`: W' is the correctly rounded value of the formula, the same bytes everywhere
  ([numerics.md](numerics.md)). `tolerance`: evaluated in float64 and rounded once.
- **Sum.** Several adapters that only add to a tensor are summed and rounded once. The others share a tensor
  with nothing: merge one after the other.
- **Taken back.** What can be computed from the merged weight and the adapter alone.
- **Bias.** Whether the module's bias changes too.
"""
HEADING = "| method | formula | guarantee | sum | taken back | bias |\n|---|---|---|---|---|---|"


def parts_of(module: ModuleType) -> tuple[str, str, str]:
    """The summary, the details and the source that a method's docstring gives."""
    text = inspect.cleandoc(module.__doc__ or "")
    before, mark, source = text.partition("Source:")
    if not mark:
        raise ValueError(f"{module.__name__} names no source")
    summary, _, details = before.partition("\n\n")
    return one_line(summary), one_line(details), one_line(source)


def one_line(text: str) -> str:
    """The text without line breaks, with Markdown's mark for code."""
    return " ".join(text.split()).replace("``", "`")


def taken_back(implementation: Any) -> str:
    """How the weight before the merge is found."""
    if implementation.additive:
        return "yes, the delta is known" + (" exactly" if implementation.guarantee == "exact" else "")
    inverse = getattr(implementation, "inverse", None)
    if inverse is None or (inverse.__doc__ or "").startswith("Refuses"):
        return "no"
    aux = [p for p in inspect.signature(inverse).parameters if p == "aux"]
    needed = "norms" in (inverse.__doc__ or "") and aux
    return "yes, in float64, with the norms that the merge had" if needed else "yes, in float64"


def methods() -> Iterator[tuple[str, ModuleType]]:
    """Every method by name."""
    for name in registry.names("methods"):
        yield name, registry.load("methods", name)


def rows() -> Iterator[str]:
    """The table."""
    yield HEADING
    for name, module in methods():
        implementation = module.IMPLEMENTATION
        title, _, formula = parts_of(module)[0].partition(": ")
        bias = "yes" if hasattr(implementation, "bias_roles") else "no"
        cells = [
            f"[{title if formula else name}](#{name})",
            (formula or title).rstrip(".").replace("|", "\\|"),
            f"`{implementation.guarantee}`",
            "yes" if implementation.additive else "no",
            taken_back(implementation),
            bias,
        ]
        yield "| " + " | ".join(cells) + " |"


def sections() -> Iterator[str]:
    """A section for each method: what it computes, its hyperparameters, and the source."""
    for name, module in methods():
        summary, details, source = parts_of(module)
        yield f"### {name}\n\n{summary}\n"
        if details:
            yield f"{details}\n"
        yield f"Source: {source}\n"


def refused() -> Iterator[str]:
    """The PEFT types without a method, with the reason."""
    known = set(registry.names("methods"))
    yield "| type | why it is not merged |\n|---|---|"
    for name, row in sorted(table()[0].items()):
        if row.method in known or row.merge == "rows":
            continue
        why = row.reason or "Not available here; PEFT's `merge_and_unload` can."
        yield f"| {name} | {why} |"


FORMATS = """\
## Quantised bases

A base may be stored in one of these formats, or be quantised so while it is loaded for training. Either way
it is read to the bits that bitsandbytes gives, and `merge --onto quantized` writes the same format:
[quantised-bases.md](quantised-bases.md).
"""


def base_formats() -> Iterator[str]:
    """The quantised formats of a base, from the docstrings of `quant/`."""
    for name in registry.names("quant"):
        summary, details, source = parts_of(registry.load("quant", name))
        yield f"### {name}\n\n{summary}\n"
        if details:
            yield f"{details}\n"
        yield f"Source: {source}\n"


def page() -> str:
    """The whole page as text."""
    text = [INTRODUCTION, *rows(), "", "## Each method\n", *sections()]
    text += [
        "## Described and refused\n",
        "Inspected, validated, recorded and moved like the others.\n",
        *refused(),
    ]
    text += ["", FORMATS, *base_formats()]
    return "\n".join(text).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check("docs/methods.md", page, remedy="run `make docs` and commit it."))
