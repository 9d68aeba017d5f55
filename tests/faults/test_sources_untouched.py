"""Base and adapter are only read: the same bytes and times after every command, refusal and fault.

The loops of the other modules check it after their faults too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterhub_tools as at
from adapterhub_tools.errors import AdapterError, StoreError
from tests.faults.injection import inject
from tests.faults.outputs import InputState, tree_of
from tests.faults.scene import Scene
from tests.faults.small_model import make_adapter

MANIFEST = "adapter_manifest.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERTOOL_CACHE", str(tmp_path / "cache"))


COMMANDS: dict[str, Callable[[Scene], object]] = {
    "inspect adapter": lambda scene: at.inspect(scene.adapter, base=scene.base),
    "inspect base": lambda scene: at.inspect(scene.base),
    "validate": lambda scene: at.validate(scene.adapter, base=scene.base).raise_for_problems(),
    "hash": lambda scene: at.content_digest(scene.base),
    "adapter digest": lambda scene: at.adapter_digest(scene.adapter),
    "dry run": lambda scene: at.merge(**scene.keywords(dry_run=True)),
    "merge": lambda scene: at.merge(**scene.keywords()),
    "merge two": lambda scene: at.merge(**scene.keywords(adapter=[str(scene.adapter), str(scene.other)])),
    "merge to float32": lambda scene: at.merge(**scene.keywords(dtype="float32")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_after_a_command(scene: Scene, command: str) -> None:
    COMMANDS[command](scene)
    scene.check_inputs()


def test_init_adds_the_manifest_and_nothing_else(scene: Scene) -> None:
    at.init(scene.adapter, base=scene.base)
    at.init(scene.adapter, base=scene.base, replace=True)
    at.load_manifest(scene.adapter)
    at.validate(scene.adapter, base=scene.base).raise_for_problems()
    at.merge(**scene.keywords())
    now = InputState.of(scene.base, scene.adapter, scene.other).entries
    assert now.pop(str(scene.adapter / MANIFEST))
    del now[str(scene.adapter)]  # a folder's own time changes with what it holds
    before = {path: entry for path, entry in scene.inputs.entries.items() if path != str(scene.adapter)}
    assert now == before


def test_after_a_refusal(scene: Scene) -> None:
    wrong = make_adapter(scene.folder / "wrong", hidden=48)
    occupied = scene.folder / "occupied"
    occupied.mkdir()
    (occupied / "file").write_text("x")
    refusals: list[dict[str, Any]] = [
        {"adapter": str(wrong)},
        {"adapter": str(scene.base)},
        {"base": str(scene.adapter)},
        {"out": str(occupied)},
        {"out": str(scene.folder / "no" / "out")},
        {"scale": 1e39, "dtype": "float16"},
    ]
    for refusal in refusals:
        with pytest.raises(AdapterError):
            at.merge(**scene.keywords(**refusal))
        scene.check_inputs()
        assert list(scene.place.iterdir()) == [], refusal
    assert tree_of(occupied) == tree_of(occupied)
    assert [path.name for path in occupied.iterdir()] == ["file"]


@pytest.mark.usefixtures("injectable")
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=EIO"])
@pytest.mark.parametrize("call", ["preadv2", "pwrite64", "fsync"])
def test_after_a_fault(scene: Scene, call: str, fault: str) -> None:
    for when in (1, 3):
        scene.reset(replace=True)
        ended, hit = inject(scene.start(replace=True), scene.log, call, when, fault, follow=True)
        assert hit, f"no {call} to fail"
        assert not ended.done
        scene.check_inputs()


def test_sources_without_write_permission(scene: Scene) -> None:
    """For root the permissions are no obstacle, so the next test mounts the sources read-only."""
    folders = (scene.base, scene.adapter)
    for folder in folders:
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
    before = InputState.of(*folders)
    try:
        at.merge(**scene.keywords())
        assert tree_of(scene.out) == scene.new
        assert InputState.of(*folders) == before
        # What is written has the modes of new files, not those of the sources.
        mask = os.umask(0)
        os.umask(mask)
        assert {path.stat().st_mode & 0o777 for path in scene.out.iterdir()} == {0o666 & ~mask}
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.usefixtures("mountable")
def test_sources_on_a_read_only_file_system(scene: Scene) -> None:
    mounts = [{"source": str(f), "at": str(f), "read_only": True} for f in (scene.base, scene.adapter)]
    ended = scene.server.run(scene.keywords(), mounts=mounts)
    assert ended.done, ended
    assert tree_of(scene.out) == scene.new
    scene.check_inputs()


@pytest.mark.usefixtures("mountable")
def test_an_output_on_a_read_only_file_system(scene: Scene) -> None:
    place = str(scene.place)
    ended = scene.server.run(
        scene.keywords(), mounts=[{"source": place, "at": place, "read_only": True}], show=[place]
    )
    assert (ended.answer["error"], ended.answer["exit_code"]) == ("StoreError", StoreError.exit_code)
    problem = ended.answer["problems"][0]
    assert problem["kind"] in ("read-only", "permission"), problem
    assert problem["file"].startswith(place)
    assert problem["remedy"]
    assert ended.answer["shown"] == {place: {}}
    scene.check_inputs()


def outputs_over_an_input(scene: Scene, source: Path) -> Iterator[tuple[str, Path]]:
    """Yields names of one source, or of something in or around it, with the kind of the refusal."""
    links = scene.folder / "links"
    links.mkdir()
    (links / "to-source").symlink_to(source)
    (links / "to-parent").symlink_to(source.parent)
    yield "overlaps-input", source
    yield "overlaps-input", source / "."
    yield "overlaps-input", source / ".." / source.name
    yield "overlaps-input", Path(os.path.relpath(source))
    yield "overlaps-input", source / "inner"
    yield "overlaps-input", source.parent
    yield "overlaps-input", links / "to-parent" / source.name
    yield "overlaps-input", links / "to-source" / "inner"
    yield "symlink", links / "to-source"
    yield "symlink", links / "to-parent"


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_output_over_an_input_is_refused(scene: Scene, which: str, replace: bool) -> None:
    source: Path = getattr(scene, which)
    for kind, out in outputs_over_an_input(scene, source):
        with pytest.raises(StoreError) as caught:
            at.merge(**scene.keywords(out=str(out), replace=replace))
        found = caught.value.problems[0].kind
        # Without --replace a folder that is not empty is refused for that reason, whichever it is.
        assert found == kind or (not replace and found == "exists"), (out, found)
        assert caught.value.problems[0].remedy
        scene.check_inputs()


def test_an_input_named_by_a_link_is_known_again(scene: Scene) -> None:
    link = scene.folder / "link"
    link.symlink_to(scene.base)
    with pytest.raises(StoreError, match="is the input"):
        at.merge(**scene.keywords(base=str(link), out=str(scene.base), replace=True))
    at.merge(**scene.keywords(base=str(link)))
    assert tree_of(scene.out) == scene.new
    scene.check_inputs()


@pytest.mark.usefixtures("mountable")
@pytest.mark.parametrize("what", ["the base itself", "its parent", "inside it"])
def test_a_bind_mount_of_the_base_is_known_again(scene: Scene, what: str) -> None:
    mounted = scene.folder / "mounted"
    mounted.mkdir()
    source = scene.folder if what == "its parent" else scene.base
    out = {"the base itself": mounted, "its parent": mounted / "base", "inside it": mounted / "out"}[what]
    before = tree_of(scene.base)
    ended = scene.server.run(
        scene.keywords(out=str(out), replace=True), mounts=[{"source": str(source), "at": str(mounted)}]
    )
    assert (ended.answer.get("error"), ended.answer.get("exit_code")) == ("StoreError", 8), ended
    expected = {"overlaps-input", "mount-point"} if what == "the base itself" else {"overlaps-input"}
    assert ended.answer["problems"][0]["kind"] in expected, ended
    assert tree_of(scene.base) == before
    scene.check_inputs()


def test_an_old_output_that_shares_files_with_the_base(scene: Scene) -> None:
    """Hard links: the old output goes by removing its names, so the base's file is not written to."""
    scene.out.mkdir()
    for path in scene.base.iterdir():
        os.link(path, scene.out / path.name)
    at.merge(**scene.keywords(replace=True))
    assert tree_of(scene.out) == scene.new
    scene.check_inputs()
