"""Pages that describe the tree name what is there: no folder is left out, nothing is named that is gone."""

from __future__ import annotations

import re

from tests.house.tree import PACKAGE, REPOSITORY

ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")


def folders_of(root: str) -> set[str]:
    return {path.name for path in (REPOSITORY / root).iterdir() if path.is_dir() and path.name[0] not in "._"}


def test_the_architecture_page_names_every_package() -> None:
    house = ARCHITECTURE.partition("```\n")[2].partition("```")[0]
    assert folders_of("adapterhub_tools") <= set(re.findall(r"(\w+)/", house))


def test_the_testing_page_names_every_folder_of_tests() -> None:
    page = (REPOSITORY / "docs" / "testing.md").read_text(encoding="utf-8")
    assert folders_of("tests") == set(re.findall(r"^\| `tests/(\w+)/`", page, re.MULTILINE))


def test_the_rooms_hold_what_the_architecture_page_says() -> None:
    rooms = re.findall(r"^\| `(\w+)` \| (.*?) \|", ARCHITECTURE, re.MULTILINE)
    named = [(room, name) for room, cell in rooms for name in re.findall(r"`([\w*.]+)`", cell)]
    assert {"engine", "linalg", "ops"} == {room for room, _ in named}
    gone = [f"{room}/{name}" for room, name in named if not list((PACKAGE / room).glob(name))]
    assert gone == []


def test_every_module_that_the_architecture_page_names_exists() -> None:
    packages = "|".join(sorted(folders_of("adapterhub_tools")))
    modules = re.findall(rf"`((?:{packages})\.\w+)`", ARCHITECTURE)
    files = re.findall(rf"`((?:{packages}|tests)/[\w/]+\.\w+)`", ARCHITECTURE)
    named = {f"{module.replace('.', '/')}.py" for module in modules} | {f for f in files if "NAME" not in f}
    assert len(named) > 20
    gone = sorted(n for n in named if not ((PACKAGE / n).exists() or (REPOSITORY / n).exists()))
    assert gone == []
