"""Checkpoints and adapters on disk: indexes against shards, and every way in which they can disagree."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_tools.errors import AdapterError, FormatError, StoreError, UnsupportedError
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.store.checkpoint import (
    Checkpoint,
    folder_kind,
    open_adapter_files,
    open_checkpoint,
)
from adapterhub_tools.store.layout import build_file

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_file(path: Path, **shapes: tuple[int, ...]) -> int:
    """Writes a file of float32 zeros; returns the bytes of its tensors."""
    specs = [TensorSpec(name=name, dtype="F32", shape=shape) for name, shape in shapes.items()]
    head, _ = build_file(specs, {"format": "pt"})
    nbytes = sum(spec.nbytes for spec in specs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(nbytes))
    return nbytes


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
    began = time.perf_counter()
    with pytest.raises(AdapterError) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - began < 2
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


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", a=(1,))
    (tmp_path / "config.json").write_text("[]")
    assert refused(tmp_path) == [("json-type", "config.json", "")]


def test_the_single_file_may_not_link_out_of_the_folder(tmp_path: Path) -> None:
    write_file(tmp_path / "outside.safetensors", a=(1,))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").symlink_to("../outside.safetensors")
    assert [kind for kind, _, _ in refused(tmp_path / "base")] == ["path"]


# --- adapters ----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    root = tmp_path / "adapter"
    write_file(root / "adapter_model.safetensors", a=(2,))
    (root / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return root


def refused_adapter(path: Path, error: type[AdapterError] = FormatError) -> list[tuple[str, str]]:
    with pytest.raises(AdapterError) as caught:
        open_adapter_files(path)
    assert type(caught.value) is error
    assert all(problem.remedy for problem in caught.value.problems)
    return [(problem.kind, problem.file) for problem in caught.value.problems]


def test_an_adapter(adapter: Path) -> None:
    (adapter / "README.md").touch()
    (adapter / "checkpoint-1").mkdir()
    found = open_adapter_files(adapter)
    assert found.root == adapter
    assert found.config == {"peft_type": "LORA"}
    assert (found.config_file, found.weights_file) == ("adapter_config.json", "adapter_model.safetensors")
    assert found.header is not None
    assert list(found.header.tensors) == ["a"]
    assert found.manifest is None
    assert found.other == ("README.md", "checkpoint-1/")
    assert found.pickles == ()
    with found.open_weights() as source:
        assert source.name == "adapter_model.safetensors"
    (adapter / "adapter_manifest.json").write_text('{"x": 1}')
    assert open_adapter_files(adapter).manifest == {"x": 1}
    assert open_adapter_files(adapter / "adapter_model.safetensors").config == {"peft_type": "LORA"}


def test_weights_of_another_name(tmp_path: Path) -> None:
    write_file(tmp_path / "pytorch_lora_weights.safetensors", a=(2,))
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        found = open_adapter_files(path)
        assert (found.config, found.weights_file) == (None, "pytorch_lora_weights.safetensors")


def test_a_pickled_adapter_is_described_not_opened(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    found = open_adapter_files(adapter)
    assert (found.weights_file, found.header, found.pickles) == (None, None, ("adapter_model.bin",))
    with pytest.raises(
        UnsupportedError, match=r"^adapter_model.bin: the weights are a Python pickle.*Convert it"
    ):
        found.open_weights()
    assert refused_adapter(adapter / "adapter_model.bin", UnsupportedError) == [
        ("not-safetensors", "adapter_model.bin")
    ]


def test_a_config_alone_is_described(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    found = open_adapter_files(adapter)
    assert (found.weights_file, found.pickles) == (None, ())
    with pytest.raises(UnsupportedError, match="there is no 'adapter_model"):
        found.open_weights()


def test_a_safetensors_copy_beside_the_pickle_is_used(adapter: Path) -> None:
    (adapter / "adapter_model.bin").touch()
    found = open_adapter_files(adapter)
    assert (found.weights_file, found.pickles) == ("adapter_model.safetensors", ("adapter_model.bin",))


def test_weights_changed_since_the_header_was_read(adapter: Path) -> None:
    found = open_adapter_files(adapter)
    write_file(adapter / "adapter_model.safetensors", a=(3,))
    with pytest.raises(StoreError, match="the file was changed"):
        found.open_weights()


def test_adapters_that_are_none(tmp_path: Path, sharded: Path, adapter: Path) -> None:
    assert refused_adapter(sharded) == [("base-as-adapter", "base")]
    assert refused_adapter(tmp_path) == [("no-adapter", tmp_path.name)]
    assert refused_adapter(tmp_path / "nothing", StoreError) == [("not-found", "nothing")]
    assert refused_adapter(adapter / "adapter_config.json", UnsupportedError) == [
        ("not-safetensors", "adapter_config.json")
    ]
    for name in ("x.safetensors", "y.safetensors"):
        write_file(tmp_path / "several" / name, a=(1,))
    assert refused_adapter(tmp_path / "several") == [("ambiguous-adapter", "several")]


def test_every_problem_of_an_adapter_is_listed(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"r": NaN}')
    (adapter / "adapter_manifest.json").write_text("[]")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert refused_adapter(adapter) == [
        ("json-number", "adapter_config.json"),
        ("json-type", "adapter_manifest.json"),
        ("header-too-small", "adapter_model.safetensors"),
    ]


def test_weights_that_link_out_of_the_folder(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter.parent / "outside")
    (adapter / "adapter_model.safetensors").symlink_to("../outside")
    assert refused_adapter(adapter) == [("path", "adapter_model.safetensors")]


def test_kinds_of_folder(tmp_path: Path, sharded: Path, adapter: Path) -> None:
    assert folder_kind(sharded) == folder_kind(sharded / FIRST) == folder_kind(tmp_path) == "checkpoint"
    assert folder_kind(adapter) == folder_kind(adapter / "adapter_model.safetensors") == "adapter"
    (adapter / "adapter_config.json").unlink()
    assert folder_kind(adapter) == "adapter"
    assert folder_kind(adapter / "adapter_model.safetensors") == "adapter"
