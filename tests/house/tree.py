"""Where the repository is and which files belong to it, for the tests of the house."""

from __future__ import annotations

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "adapterhub_tools"
SCHEMAS = REPOSITORY / "schema"
SOURCE_FOLDERS = ("adapterhub_tools", "tests", "tools", "benchmarks", "examples")


def repository_files() -> list[Path]:
    """Every file that git tracks or would track: what a clone or a source archive holds."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    ).stdout.decode()
    return sorted(path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file())


def source_files() -> list[Path]:
    """The Python and shell files of the package, its tests, tools, benchmarks and examples."""
    return [
        path
        for path in repository_files()
        if path.suffix in {".py", ".sh"} and path.relative_to(REPOSITORY).parts[0] in SOURCE_FOLDERS
    ]
