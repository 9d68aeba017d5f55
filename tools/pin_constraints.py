"""Writes constraints.txt: the installed version of everything that adaptertool and its extras bring.

Run it in an environment whose versions have passed `make test-all`. It follows the requirements of the
installed distributions; what is in the environment for another reason is left out. A version that does
not support the oldest Python we support gets a marker, so that pip is free to choose there.
"""

from __future__ import annotations

import sys
from collections import deque
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = "adaptertool"
EXTRAS = frozenset({"test", "dev"})
LEFT_OUT = frozenset({ROOT, "pip", "setuptools"})  # installers belong to the environment, not to us
OLDEST_PYTHON = (3, 10)
PAGE = Path(__file__).resolve().parents[1] / "constraints.txt"
HEADER = """\
# The versions that `make test-all` last passed with, for reproducible checks: `make venv` installs with
# `-c constraints.txt`. The package itself accepts the ranges in pyproject.toml.
# Written by `python tools/pin_constraints.py`; do not edit by hand.
"""


def required(found: Distribution, extras: frozenset[str]) -> list[Requirement]:
    """The requirements of one distribution that hold on this machine, its chosen extras included."""
    wanted: list[Requirement] = []
    for text in found.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            wanted.append(requirement)
    return wanted


def closure() -> dict[str, Distribution]:
    """Every installed distribution reachable from adaptertool[test,dev], by canonical name."""
    seen: dict[str, set[str]] = {}
    found: dict[str, Distribution] = {}
    queue = deque([(ROOT, EXTRAS)])
    while queue:
        name, extras = queue.popleft()
        known = seen.get(name)
        if known is not None and extras <= known:
            continue
        seen.setdefault(name, set()).update(extras)
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            print(f"not installed, left out: {name}", file=sys.stderr)
            continue
        for requirement in required(found[name], frozenset(seen[name])):
            queue.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name: dist for name, dist in found.items() if name not in LEFT_OUT}


def marker(found: Distribution) -> str:
    """A marker for a version that needs a newer Python than the oldest one we support, else nothing."""
    needs = SpecifierSet(found.metadata["Requires-Python"] or "")
    if needs.contains(f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}"):
        return ""
    minor = next(m for m in range(OLDEST_PYTHON[1], 30) if needs.contains(f"3.{m}"))
    return f' ; python_version >= "3.{minor}"'


def main() -> int:
    """Write the file and say how many versions it pins."""
    lines = []
    for name, found in sorted(closure().items()):
        version = Version(found.version).public  # torch: without its local label, +cpu
        lines.append(f"{name}=={version}{marker(found)}\n")
    PAGE.write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"wrote constraints.txt, {len(lines)} versions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
