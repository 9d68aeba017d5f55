"""Canonical JSON: one text for one value, so that equal records are equal bytes.

Rules (docs/manifest.md, "Canonical JSON"): object keys sorted by code point, UTF-8 without escapes beyond
those that JSON requires, two-space indent, final newline, integers bare, floats in their shortest form that
reads back to the same binary64, no NaN and no infinity.
"""

from __future__ import annotations

import json
from typing import Any


def canonical_json(value: Any) -> str:
    """Returns the canonical text of a JSON value.

    Raises:
        ValueError: the value holds NaN, an infinity or something that JSON cannot express.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def compact_json(value: Any) -> bytes:
    """Returns the UTF-8 bytes of the same value on one line without spaces, as digests use it."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")
