"""Checkpoints on disk: indexes against shards, and every way in which they can disagree."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_tools.errors import AdapterError, FormatError, StoreError, UnsupportedError
from adapterhub_tools.store import folder
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from tests.unit.safetensors_bytes import write_file

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(root: Path, weight_map: object, **metadata: object) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    root = tmp_path / "base"
    total = write_file(root / FIRST, a=(2, 3), b=(4,)) + write_file(root / SECOND, c=(5,))
    write_index(root, {"c": SECOND, "a": FIRST, "b": FIRST}, total_size=total)
    (root / "config.json").write_text('{"model_type": "llama"}')
    return root


def refused(path: Path, error: type[AdapterError] = FormatError) -> list[tuple[str, str, str]]:
    """Returns kind, file and key of each problem for which a checkpoint is refused."""
    began = time.process_time()
    with pytest.raises(AdapterError) as caught:
        open_checkpoint(path)
    assert time.process_time() - began < 2
    assert type(caught.value) is error
    assert all(problem.remedy for problem in caught.value.problems)
    return [(problem.kind, problem.file, problem.loc) for problem in caught.value.problems]


# --- what is accepted --------------------------------------------------------------------------------


def check_sharded(found: Checkpoint) -> None:
    assert found.files == (FIRST, SECOND)
    assert found.index_file == INDEX
    assert list(found.tensors) == ["a", "b", "c"]
    assert [tensor.file for tensor in found.tensors.values()] == [FIRST, FIRST, SECOND]
    assert found.config == {"model_type": "llama"}
    assert found.config_file == "config.json"
    assert found.index_metadata == {"total_size": found.nbytes}
    assert found.nbytes == 60


def test_shards(sharded: Path) -> None:
    check_sharded(open_checkpoint(sharded))


def test_the_index_itself_may_be_given(sharded: Path) -> None:
    check_sharded(open_checkpoint(sharded / INDEX))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "weights.safetensors"]
)
def test_a_single_file(tmp_path: Path, name: str) -> None:
    write_file(tmp_path / name, a=(2,))
    (tmp_path / "optimizer.pt").touch()
    for path in (tmp_path, tmp_path / name):
        found = open_checkpoint(path)
        assert (found.root, found.files, found.index_file) == (tmp_path, (name,), None)
        assert found.tensors["a"].offset % 64 == 0
        assert (found.config, found.config_file) == (None, None)
        assert found.headers[name].metadata == {"format": "pt"}


def test_the_model_is_preferred_to_other_files(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", a=(2,))
    write_file(tmp_path / "model.fp16.safetensors", b=(2,))
    write_file(tmp_path / "consolidated.safetensors", c=(2,))
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_an_index_of_the_single_file_beside_it(tmp_path: Path) -> None:
    total = write_file(tmp_path / "model.safetensors", a=(2,))
    write_index(tmp_path, {"a": "model.safetensors"}, total_size=total)
    assert open_checkpoint(tmp_path).files == ("model.safetensors",)


@pytest.mark.parametrize("metadata", [{}, {"total_size": 60.0}, {"total_size": 60, "total_parameters": 15}])
def test_index_metadata(sharded: Path, metadata: dict[str, object]) -> None:
    write_index(sharded, {"c": SECOND, "a": FIRST, "b": FIRST}, **metadata)
    assert open_checkpoint(sharded).index_metadata == metadata


def test_a_snapshot_of_the_hub_cache(tmp_path: Path, sharded: Path) -> None:
    """All files are links into the blobs folder of the repository."""
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "rev", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    check_sharded(open_checkpoint(snapshot))


def test_a_link_that_the_user_names(tmp_path: Path) -> None:
    write_file(tmp_path / "real" / "x.safetensors", a=(2,))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "link.safetensors").symlink_to(tmp_path / "real" / "x.safetensors")
    assert list(open_checkpoint(tmp_path / "there" / "link.safetensors").tensors) == ["a"]


def test_opening_notices_a_change_since_the_header_was_read(sharded: Path) -> None:
    found = open_checkpoint(sharded)
    with found.open(SECOND) as source:
        assert source.name == SECOND
    write_file(sharded / SECOND, c=(6,))
    with pytest.raises(StoreError, match=f"^{SECOND}: the file was changed"):
        found.open(SECOND)


# --- indexes that lie, rows 48 to 62 -----------------------------------------------------------------


def remap(**changes: object) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        for name, shard in changes.items():
            index["weight_map"][name] = shard
        (root / INDEX).write_text(json.dumps(index))

    return apply


def link_outside(root: Path) -> None:
    (root / SECOND).rename(root.parent / "outside.safetensors")
    (root / SECOND).symlink_to("../outside.safetensors")


def link_loop(root: Path) -> None:
    (root / SECOND).unlink()
    (root / SECOND).symlink_to("other")
    (root / "other").symlink_to(SECOND)


def remove_shard(root: Path) -> None:
    (root / SECOND).unlink()


def in_two_shards(root: Path) -> None:
    write_file(root / SECOND, b=(4,), c=(1,))


def not_mapped(root: Path) -> None:
    write_file(root / SECOND, c=(5,), d=(0,))


def not_held(root: Path) -> None:
    write_file(root / SECOND, e=(5,))
    remap(e=SECOND)(root)


def duplicate_in_map(root: Path) -> None:
    text = (root / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{"a": "{FIRST}", ')
    (root / INDEX).write_text(text)


def index_with(**parts: object) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        index.update(parts)
        (root / INDEX).write_text(json.dumps({k: v for k, v in index.items() if v != "absent"}))

    return apply


def single_too(root: Path) -> None:
    write_file(root / "model.safetensors", a=(2, 3), b=(4,), c=(5,), d=(1,))


def huge_index(root: Path) -> None:
    with (root / INDEX).open("r+b") as file:
        file.truncate(200_000_000)  # sparse


def folder_as_shard(root: Path) -> None:
    (root / SECOND).unlink()
    (root / SECOND).mkdir()


ROWS: dict[str, tuple[Callable[[Path], None], list[tuple[str, str, str]]]] = {
    "48 parent folder": (remap(c="../x.safetensors"), [("path", INDEX, "../x.safetensors")]),
    "49 absolute": (remap(c="/x.safetensors"), [("path", INDEX, "/x.safetensors")]),
    "49 drive": (remap(c="C:\\x.safetensors"), [("path", INDEX, "C:\\x.safetensors")]),
    "49 UNC": (remap(c="\\\\server\\x.safetensors"), [("path", INDEX, "\\\\server\\x.safetensors")]),
    "49 NUL": (remap(c="x\0.safetensors"), [("path", INDEX, "x\0.safetensors")]),
    "49 empty": (remap(c=""), [("path", INDEX, "")]),
    "50 link out of the folder": (link_outside, [("path", INDEX, SECOND)]),
    "51 loop of links": (link_loop, [("path", INDEX, SECOND)]),
    "52 missing shard": (remove_shard, [("missing-file", SECOND, "")]),
    "53 tensor in two shards": (in_two_shards, [("duplicate-tensor", INDEX, "b")]),
    "54 tensor in another shard": (
        remap(c=FIRST, a=SECOND),
        [("map-mismatch", INDEX, "a"), ("map-mismatch", INDEX, "c")],
    ),
    "55 mapped tensor absent": (not_held, [("missing-tensor", INDEX, "c")]),
    "56 tensor not mapped": (not_mapped, [("unmapped-tensor", INDEX, "d")]),
    "57 duplicate key": (duplicate_in_map, [("duplicate-key", INDEX, "")]),
    "59 no weight_map": (index_with(weight_map="absent"), [("index-type", INDEX, "weight_map")]),
    "59 weight_map is an array": (index_with(weight_map=[]), [("index-type", INDEX, "weight_map")]),
    "59 weight_map is null": (index_with(weight_map=None), [("index-type", INDEX, "weight_map")]),
    "59 weight_map is empty": (index_with(weight_map={}), [("index-type", INDEX, "weight_map")]),
    "59 shard is a number": (remap(c=2), [("index-type", INDEX, "c")]),
    "59 metadata is an array": (index_with(metadata=[]), [("index-type", INDEX, "metadata")]),
    "60 total_size wrong": (
        index_with(metadata={"total_size": 61}),
        [("total-size", INDEX, "metadata.total_size")],
    ),
    "60 total_size is text": (
        index_with(metadata={"total_size": "60"}),
        [("total-size", INDEX, "metadata.total_size")],
    ),
    "60 total_size is true": (
        index_with(metadata={"total_size": True}),
        [("total-size", INDEX, "metadata.total_size")],
    ),
    "61 index and single file": (single_too, [("ambiguous-base", "base", "")]),
    "62 index of 200 MB": (huge_index, [("json-size", INDEX, "")]),
    "46 a folder as shard": (folder_as_shard, [("not-regular", SECOND, "")]),
}


@pytest.mark.parametrize("row", ROWS)
def test_index_rows(row: str, sharded: Path) -> None:
    damage, expected = ROWS[row]
    damage(sharded)
    if row.startswith("53"):
        # The second copy also leaves the sizes wrong: every problem is listed.
        assert set(expected) <= set(refused(sharded))
    elif row.startswith("54"):
        assert sorted(refused(sharded)) == expected
    else:
        assert refused(sharded) == expected


def test_row_58_a_pickle_in_a_safetensors_index(sharded: Path) -> None:
    remap(c="pytorch_model-00002-of-00002.bin")(sharded)
    assert refused(sharded, UnsupportedError) == [("pickle", INDEX, "c")]
    remap(a=1)(sharded)
    assert sorted(refused(sharded)) == [("index-type", INDEX, "a"), ("pickle", INDEX, "c")]


def test_every_row_is_here() -> None:
    assert {int(row.split()[0]) for row in ROWS} - {46} | {58} == set(range(48, 63))


def test_every_problem_is_listed(sharded: Path) -> None:
    write_file(sharded / SECOND, d=(5,))
    remap(a=SECOND)(sharded)
    index_with(metadata={"total_size": 1})(sharded)
    assert sorted(refused(sharded)) == [
        ("map-mismatch", INDEX, "a"),
        ("missing-tensor", INDEX, "c"),
        ("total-size", INDEX, "metadata.total_size"),
        ("unmapped-tensor", INDEX, "d"),
    ]


def test_problems_of_all_shards_and_of_the_config_are_listed(sharded: Path) -> None:
    (sharded / FIRST).write_bytes(b"")
    (sharded / SECOND).write_bytes(b"GGUF" + bytes(30))
    (sharded / "config.json").write_text("{")
    assert refused(sharded) == [
        ("header-too-small", FIRST, "header"),
        ("not-safetensors", SECOND, "header"),
        ("json", "config.json", ""),
    ]


# --- folders and files that are no checkpoint --------------------------------------------------------


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refused(tmp_path) == [("no-weights", tmp_path.name, "")]
    with pytest.raises(FormatError, match=r"looked for model\.safetensors, model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing", StoreError) == [("not-found", "nothing", "")]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folder.os, "listdir", fail)  # root may list any
    assert refused(tmp_path, StoreError) == [("permission", str(tmp_path), "")]


def test_several_files_without_index(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        write_file(tmp_path / name, a=(1,))
    assert refused(tmp_path) == [("ambiguous-base", tmp_path.name, "")]


def test_two_models(tmp_path: Path) -> None:
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        write_file(tmp_path / name, a=(1,))
    assert refused(tmp_path) == [("ambiguous-base", tmp_path.name, "")]


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt", "model.gguf"],
)
def test_other_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    assert [kind for kind, _, _ in refused(tmp_path, UnsupportedError)] == ["not-safetensors"]
    assert [kind for kind, _, _ in refused(tmp_path / name, UnsupportedError)] == ["not-safetensors"]


def test_the_remedy_for_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UnsupportedError, match="safe_serialization=True"):
        open_checkpoint(tmp_path)


def test_an_adapter_as_base(tmp_path: Path) -> None:
    write_file(tmp_path / "adapter_model.safetensors", a=(1,))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refused(tmp_path) == [("adapter-as-base", tmp_path.name, "")]
    file = tmp_path / "adapter_model.safetensors"
    assert refused(file) == [("adapter-as-base", "adapter_model.safetensors", "")]


def test_one_shard_as_base(sharded: Path) -> None:
    assert refused(sharded / FIRST) == [("single-shard", FIRST, "")]


def test_a_file_that_the_index_beside_it_does_not_list(sharded: Path) -> None:
    write_file(sharded / "extra.safetensors", x=(1,))
    assert list(open_checkpoint(sharded / "extra.safetensors").tensors) == ["x"]


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", a=(1,))
    (tmp_path / "config.json").write_text("[]")
    assert refused(tmp_path) == [("json-type", "config.json", "")]


def test_the_single_file_may_not_link_out_of_the_folder(tmp_path: Path) -> None:
    write_file(tmp_path / "outside.safetensors", a=(1,))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").symlink_to("../outside.safetensors")
    assert [kind for kind, _, _ in refused(tmp_path / "base")] == ["path"]
