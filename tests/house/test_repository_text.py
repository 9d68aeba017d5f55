"""What is in the repository holds on every machine: no paths of one machine, no large files."""

from __future__ import annotations

import re

from tests.house.tree import REPOSITORY, repository_files

MAX_BYTES = 1_000_000
EXAMPLE_ADAPTER_MAX_BYTES = 2_000_000
# A path such as the home folder of somebody: written in pieces, so that this file does not match itself.
MACHINE_PATH = re.compile(rb"(?<![\w.}~*-])/(?:" + b"|".join([b"root", b"work", b"home/[a-z]\\w*"]) + rb")/")
BINARY = {".safetensors", ".npz", ".gguf", ".bin", ".png"}


def test_the_pattern_finds_machine_paths() -> None:
    for text in ["see /" + "root/x", '"/' + 'work/y"', "=/" + "home/ann/z"]:
        assert MACHINE_PATH.search(text.encode()), text
    for text in ["frame/work/x", "https://example.org/home/", "a/root/b"]:
        assert MACHINE_PATH.search(text.encode()) is None, text


def test_no_machine_paths() -> None:
    found = []
    for path in repository_files():
        if path.suffix in BINARY:
            continue
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line[:120]!r}")
    assert found == [], "\n".join(found)


def test_text_files_are_utf8_with_unix_line_ends() -> None:
    wrong = []
    for path in repository_files():
        if path.suffix not in {".py", ".md", ".toml", ".sh", ".txt", ".json"} or "golden" in path.parts:
            continue
        if path.name == "adapter_config.json":
            continue  # as PEFT writes it; its digest is in the manifest beside it
        content = path.read_bytes()
        content.decode("utf-8")
        if b"\r" in content or (content and not content.endswith(b"\n")):
            wrong.append(str(path.relative_to(REPOSITORY)))
    assert wrong == []


def test_no_large_files() -> None:
    large = {}
    for path in repository_files():
        name = path.relative_to(REPOSITORY)
        example = name.parts[0] == "examples" and name.name == "adapter_model.safetensors"
        if path.stat().st_size > (EXAMPLE_ADAPTER_MAX_BYTES if example else MAX_BYTES):
            large[str(name)] = path.stat().st_size
    assert large == {}
