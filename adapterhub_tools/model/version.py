"""The version of this package, as records of what it made name it; pyproject.toml has the same."""

from __future__ import annotations

VERSION = "0.1.0"
