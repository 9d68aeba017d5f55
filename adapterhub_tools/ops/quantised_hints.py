"""Signs that an adapter was trained on a quantised base, where its manifest does not say so."""

from __future__ import annotations

import re
import shlex

from adapterhub_tools.errors import escape
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.store.files import resolve_inside

_ID = re.compile(r"(?i)(?:^|[-_./])(?:bnb[-_]?)?(?:4bit|8bit|int4|int8|nf4|fp4|gptq|awq|qlora)(?:$|[-_./])")
_CARD = re.compile(r"(?m)^- ((?:load_in_[48]bit): True|bnb_4bit_[a-z_]+: \S+|llm_int8_skip_modules: \[.+\])$")
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_MAX_CARD = 1 << 20
_MAX_SKIPS = 16


def signs(opened: OpenedAdapter) -> list[str]:
    """Returns what says that an adapter was trained on a quantised base; nothing if nothing does.

    Two places are looked at: the name of its base, and the training section that PEFT wrote into its card.
    """
    base = opened.adapter.base
    found = []
    if base is not None and base.id is not None and _ID.search(base.id):
        found.append(f"its base is {escape(base.id)}")
    lines = _card_lines(opened)
    if any(line.startswith("load_in_") for line in lines):
        found.append(f"its README says {', '.join(lines[:4])}")
    return found


def hint(opened: OpenedAdapter) -> str | None:
    """Returns the remark that a merge makes of those signs; None if there are none."""
    found = signs(opened)
    if not found:
        return None
    flags = _flags(_card_lines(opened))
    how = "--quant and --compute-dtype say it" if flags is None else f"by its README {flags} would say it"
    return (
        f"{opened.files.root.name} may have been trained on a quantised base ({'; '.join(found)}), but "
        f"nothing declares how: merged onto the base as it is stored ({how}, --onto original says that it "
        "was not)"
    )


def _flags(lines: list[str]) -> str | None:
    """Returns the flags that say what a card says of a quantised base; None if it does not say enough.

    PEFT 0.4 to 0.6 wrote every field of ``BitsAndBytesConfig``.
    """
    said = dict(line.split(": ", 1) for line in lines)
    kind = said.get("bnb_4bit_quant_type")
    compute = _SHORT.get(said.get("bnb_4bit_compute_dtype", ""))
    skips = re.findall(r"'([^']+)'", said.get("llm_int8_skip_modules", ""))
    known = "load_in_4bit" in said and kind in ("nf4", "fp4") and compute is not None
    if not known or len(skips) > _MAX_SKIPS:
        return None
    double = ",double" if said.get("bnb_4bit_use_double_quant") == "True" else ""
    more = "".join(f" --skip-modules {escape(shlex.quote(name))}" for name in skips)
    return f"--quant {kind}{double} --compute-dtype {compute}{more}"


def _card_lines(opened: OpenedAdapter) -> list[str]:
    if "README.md" not in opened.files.other:
        return []
    path = resolve_inside(opened.files.root, "README.md")
    if path.stat().st_size > _MAX_CARD:
        return []
    return _CARD.findall(path.read_text(encoding="utf-8", errors="replace"))
