"""Files stay small enough to read at once, and are named after what they hold."""

from __future__ import annotations

from tests.house.tree import PACKAGE, REPOSITORY, source_files

MAX_LINES = 400
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc"}


def test_the_search_sees_the_package() -> None:
    found = source_files()
    assert PACKAGE / "errors.py" in found
    assert REPOSITORY / "tests" / "house" / "tree.py" in found


def test_no_source_file_is_longer_than_the_limit() -> None:
    too_long = {}
    for path in source_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            too_long[str(path.relative_to(REPOSITORY))] = lines
    assert too_long == {}, f"split these, or move their tables into data files: {too_long}"


def test_no_file_or_folder_has_a_name_that_says_nothing() -> None:
    named_so = [
        str(path.relative_to(REPOSITORY))
        for path in source_files()
        if NAMES_THAT_SAY_NOTHING
        & {part.lower() for part in path.relative_to(REPOSITORY).with_suffix("").parts}
    ]
    assert named_so == []
