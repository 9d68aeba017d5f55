"""A base model as it lies on disk: one safetensors file, or several with an index.

Opening reads headers and JSON only, checks them against each other, and collects every problem before it
refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import AdapterError, FormatError, Problem, UnsupportedError, escape
from adapterhub_tools.model.base import StoredTensor
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.model.protocols import Opener, OpenSource
from adapterhub_tools.store.adapter_files import AdapterFiles, open_adapter_files
from adapterhub_tools.store.files import FileStamp, LocalFile, is_folder, resolve_inside
from adapterhub_tools.store.folder import (
    PICKLE_REMEDY,
    PICKLE_SUFFIXES,
    STEMS,
    folder_kind,
    foreign_weights,
    names_in,
    raise_collected,
    read_optional_object,
)
from adapterhub_tools.store.header import SafetensorsHeader, read_header
from adapterhub_tools.store.strict_json import json_type, read_json_object

__all__ = ["AdapterFiles", "Checkpoint", "folder_kind", "open_adapter_files", "open_checkpoint"]

_INDEX_SUFFIX = ".safetensors.index.json"
_RESTORE = "Get the folder again from its source, every file of it."


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a checkpoint's tensors are made from, where it shows others than its files hold.

    Attributes:
        stored: the checkpoint on disk.
        made_from: tensor as it is shown -> the stored tensors that it is made from; those shown as they are
            stored are missing.
        opener: a weight file's name -> a source of the tensors that are shown.
    """

    stored: Checkpoint
    made_from: dict[str, tuple[str, ...]]
    opener: Opener


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A base model's files.

    Attributes:
        root: the folder.
        files: the weight files relative to ``root``: the single file, or the shards in order of their names.
        index_file: the index relative to ``root``, if there is one.
        tensors: name -> tensor and where its bytes are; files in order, by offset within each.
        headers: file -> its header.
        paths: file -> its real path, symbolic links followed.
        stamps: file -> its state when the header was read.
        config: the content of ``config.json``, if there is one.
        config_file: its name, if there is one.
        index_metadata: the ``metadata`` of the index; empty without one.
        opener: how its weight files are opened where they are not local; ``paths`` are empty files then, and
            ``stamps`` has none.
        view: what its tensors are made from, where they are not those of its files.
    """

    root: Path
    files: tuple[str, ...]
    index_file: str | None
    tensors: dict[str, StoredTensor]
    headers: dict[str, SafetensorsHeader]
    paths: dict[str, Path]
    stamps: dict[str, FileStamp]
    config: dict[str, Any] | None
    config_file: str | None
    index_metadata: dict[str, Any]
    opener: Opener | None = None
    view: View | None = None

    @property
    def on_disk(self) -> Checkpoint:
        """The checkpoint whose tensors are those of the files."""
        return self if self.view is None else self.view.stored

    def is_made(self, name: str) -> bool:
        """Tells whether a tensor's values are made from stored ones, not stored."""
        return self.view is not None and name in self.view.made_from

    def range_of(self, name: str) -> ByteRange:
        """Returns where a tensor's bytes are."""
        stored = self.tensors[name]
        return ByteRange(uri=self.uri(stored.file), offset=stored.offset, spec=stored.spec)

    def stored_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """Returns the stored tensors that so many of its tensors are made from, in their order."""
        made_from = {} if self.view is None else self.view.made_from
        return tuple(part for name in names for part in made_from.get(name, (name,)))

    @property
    def is_remote(self) -> bool:
        """Whether the weights are read over a network: once, from front to back, is what is fast then."""
        return self.opener is not None

    def uri(self, file: str) -> str:
        """Returns what a plan calls a weight file."""
        return str(self.paths[file]) if self.view is None else f"dequantized:{self.paths[file]}"

    @property
    def nbytes(self) -> int:
        """The number of bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def open(self, file: str) -> OpenSource:
        """Opens a weight file, which must still be in the state in which its header was read.

        Raises:
            StoreError: it was changed since, or cannot be opened.
        """
        if self.view is not None:
            return self.view.opener(file)
        if self.opener is not None:
            return self.opener(file)
        return LocalFile(self.paths[file], name=file, expect=self.stamps[file])


def open_checkpoint(path: Path | Checkpoint, *, opener: Opener | None = None) -> Checkpoint:
    """Opens a base model; one that is open already is returned as it is.

    Args:
        path: a folder that holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards
            (or the same as ``diffusion_pytorch_model``), or exactly one other ``.safetensors`` file; or such
            a file; or such an index.
        opener: how weight files are opened whose names alone stand in the folder.

    Raises:
        FormatError: no weights, or files that are not what they claim or contradict each other; every
            problem.
        UnsupportedError: the weights are pickles or of another format.
        StoreError: a file cannot be read.
    """
    if isinstance(path, Checkpoint):
        return path
    if is_folder(path):
        return _open_folder(path, opener)
    if path.name.endswith(_INDEX_SUFFIX):
        return _open_sharded(path.parent, path.name)
    if path.suffix != ".safetensors" and path.exists():
        raise foreign_weights(path.name)
    if path.name == "adapter_model.safetensors":
        raise _adapter_as_base(path.name)
    for stem in STEMS:
        index = path.with_name(stem + _INDEX_SUFFIX)
        if index.is_file():
            weight_map = read_json_object(index).get("weight_map")
            shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
            if path.name in shards and len(shards) > 1:
                message = f"it is one of the {len(shards)} shards that '{index.name}' lists."
                remedy = "Give the folder, so that the model is read as a whole."
                raise FormatError.of("single-shard", message, file=path.name, remedy=remedy)
    return _open_files(path.parent, (path.name,), None, {}, named=True)


def _open_folder(root: Path, opener: Opener | None) -> Checkpoint:
    names = names_in(root)
    weights = [stem + ".safetensors" for stem in STEMS if stem + ".safetensors" in names]
    indexes = [stem + _INDEX_SUFFIX for stem in STEMS if stem + _INDEX_SUFFIX in names]
    if (
        len(weights) > 1
        or len(indexes) > 1
        or (weights and indexes and not _lists(root, indexes[0], weights))
    ):
        found = ", ".join(indexes + weights)
        message = f"found {found}: it is not clear which of them is the model."
        remedy = "Give the path of the one that is meant, or remove the other."
        raise FormatError.of("ambiguous-base", message, file=root.name or str(root), remedy=remedy)
    if indexes:
        return _open_sharded(root, indexes[0], opener)
    if weights:
        return _open_files(root, (weights[0],), None, {}, opener=opener)
    others = [name for name in names if name.endswith(".safetensors")]
    if "adapter_model.safetensors" in others or "adapter_config.json" in names:
        raise _adapter_as_base(root.name or str(root))
    if len(others) == 1:
        return _open_files(root, (others[0],), None, {}, opener=opener)
    if others:
        shown = ", ".join(escape(name) for name in others[:5]) + (" and more" if len(others) > 5 else "")
        message = f"found {len(others)} .safetensors files ({shown}) and no index that joins them."
        remedy = "Give the path of one file, or add model.safetensors.index.json."
        raise FormatError.of("ambiguous-base", message, file=root.name or str(root), remedy=remedy)
    foreign = [name for name in names if name.endswith((*PICKLE_SUFFIXES, ".bin.index.json", ".gguf"))]
    if foreign:
        raise foreign_weights(foreign[0].removesuffix(".index.json"))
    message = (
        "found no weights; looked for model.safetensors, model.safetensors.index.json, "
        "diffusion_pytorch_model.safetensors (or its index), and a single other .safetensors file."
    )
    raise FormatError.of(
        "no-weights", message, file=root.name or str(root), remedy="Give the folder of a model."
    )


def _lists(root: Path, index: str, weights: list[str]) -> bool:
    """Returns whether an index says that all tensors are in the single file beside it."""
    weight_map = read_json_object(resolve_inside(root, index), file=index).get("weight_map")
    return (
        isinstance(weight_map, dict)
        and bool(weight_map)
        and all(v == weights[0] for v in weight_map.values())
    )


def _adapter_as_base(name: str) -> AdapterError:
    message = "this is an adapter; expected a model."
    remedy = "Give the base before the adapter; `adaptertool merge BASE ADAPTER OUT` makes a model of both."
    return FormatError.of("adapter-as-base", message, file=name, remedy=remedy)


def _open_sharded(root: Path, index_file: str, opener: Opener | None = None) -> Checkpoint:
    """Opens the shards of an index, and checks the index against them."""
    index = read_json_object(resolve_inside(root, index_file), file=index_file)
    problems: list[Problem] = []

    def add(kind: str, message: str, loc: str, remedy: str = _RESTORE) -> None:
        problems.append(Problem(kind=kind, message=message, file=index_file, loc=loc, remedy=remedy))

    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(metadata, dict):
        add("index-type", f"found {json_type(metadata)}, expected an object.", "metadata")
        metadata = {}
    if not isinstance(weight_map, dict):
        found = json_type(weight_map) if "weight_map" in index else "nothing"
        add("index-type", f"found {found}, expected an object of tensor name to shard.", "weight_map")
        weight_map = {}
    elif not weight_map:
        add("index-type", "the map is empty.", "weight_map")
    shards: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            add("index-type", f"the shard is {json_type(shard)}, expected a string.", name)
        elif shard.endswith(PICKLE_SUFFIXES):
            add("pickle", f"the shard '{escape(shard)}' is a Python pickle.", name, PICKLE_REMEDY)
        else:
            shards.add(shard)
    if problems:
        raise_collected(problems, index_file)
    checkpoint = _open_files(root, tuple(sorted(shards)), index_file, metadata, opener=opener)
    _check_index(checkpoint, weight_map, add)
    raise_collected(problems, index_file)
    return checkpoint


def _check_index(checkpoint: Checkpoint, weight_map: dict[str, str], add: Any) -> None:
    """Adds a problem for each difference between an index and the shards; both hold each tensor once."""
    tensors = checkpoint.tensors
    for name, shard in weight_map.items():
        if name not in tensors:
            add("missing-tensor", f"the index maps it to '{escape(shard)}', but no shard holds it.", name)
        elif tensors[name].file != shard:
            held = escape(tensors[name].file)
            add("map-mismatch", f"the index maps it to '{escape(shard)}', but '{held}' holds it.", name)
    for name, tensor in tensors.items():
        if name not in weight_map:
            add("unmapped-tensor", f"'{escape(tensor.file)}' holds it, but the index does not list it.", name)
    total = checkpoint.index_metadata.get("total_size")
    if total is not None and (isinstance(total, (bool, str, list, dict)) or total != checkpoint.nbytes):
        found = json_type(total) if isinstance(total, (bool, str, list, dict)) else f"{total:,}"
        message = f"found {found}, but the tensors have {checkpoint.nbytes:,} bytes."
        add("total-size", message, "metadata.total_size")


def _in_index(problem: Problem, index_file: str | None, shard: str) -> Problem:
    """Returns a problem of a shard's path as a problem of the index that gave the path."""
    if index_file is None or problem.kind != "path":
        return problem
    return Problem(kind="path", message=problem.message, file=index_file, loc=shard, remedy=problem.remedy)


def _open_files(
    root: Path,
    files: tuple[str, ...],
    index_file: str | None,
    index_metadata: dict[str, Any],
    *,
    named: bool = False,
    opener: Opener | None = None,
) -> Checkpoint:
    """Reads the headers of the weight files and the config; one tensor may lie in one file only.

    ``named``: the user named the file itself, so it may be a link to anywhere.
    """
    problems: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, SafetensorsHeader] = {}
    paths: dict[str, Path] = {}
    stamps: dict[str, FileStamp] = {}
    for file in files:
        try:
            real = root / file if named else resolve_inside(root, file)
            if index_file and not real.exists():
                message = "the index lists this shard, but it is missing."
                problems.append(Problem(kind="missing-file", message=message, file=file, remedy=_RESTORE))
                continue
            with LocalFile(real, name=file) if opener is None else opener(file) as source:
                header = read_header(source)
                paths[file], headers[file] = real, header
                if isinstance(source, LocalFile):
                    stamps[file] = source.stamp
        except (FormatError, UnsupportedError) as error:
            problems.extend(_in_index(problem, index_file, file) for problem in error.problems)
            continue
        for name, spec in header.tensors.items():
            if name in tensors:
                message = f"'{escape(tensors[name].file)}' and '{escape(file)}' both hold it."
                loc_file = index_file or file
                problems.append(
                    Problem(
                        kind="duplicate-tensor", message=message, file=loc_file, loc=name, remedy=_RESTORE
                    )
                )
            else:
                tensors[name] = StoredTensor(spec=spec, file=file, offset=header.offsets[name])
    config = read_optional_object(root, "config.json", names_in(root), problems)
    raise_collected(problems, index_file or files[0])
    return Checkpoint(
        root=root,
        files=files,
        index_file=index_file,
        tensors=tensors,
        headers=headers,
        paths=paths,
        stamps=stamps,
        config=config,
        config_file=None if config is None else "config.json",
        index_metadata=index_metadata,
        opener=opener,
    )
