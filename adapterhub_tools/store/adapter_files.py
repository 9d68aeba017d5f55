"""An adapter as it lies on disk: its weights' header, its config, its manifest and what else is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import FormatError, Problem, UnsupportedError, escape
from adapterhub_tools.model.protocols import Opener, OpenSource
from adapterhub_tools.store.files import FileStamp, LocalFile, is_folder, resolve_inside
from adapterhub_tools.store.folder import (
    PICKLE_SUFFIXES,
    STEMS,
    foreign_weights,
    names_in,
    raise_collected,
    read_optional_object,
)
from adapterhub_tools.store.header import SafetensorsHeader, read_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OTHER_WEIGHTS_FILES = ("adapter.safetensors",)
"""What the adapters library calls them; a head may lie beside them in a file of its own."""
_PICKLE_STEMS = ("adapter_model.", "pytorch_adapter.")
MANIFEST_FILE = "adapter_manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter's files.

    Attributes:
        root: the folder.
        config: the content of ``adapter_config.json``, if there is one.
        config_file: its name, if there is one.
        weights_file: the safetensors file, if there is one.
        header: its header.
        path: its real path, symbolic links followed.
        stamp: its state when the header was read.
        manifest: the content of ``adapter_manifest.json``, if there is one; not checked against its schema.
        pickles: weights that are pickles, which are never loaded.
        other: the other names in the folder, sorted; folders end in ``/``.
        opener: how the weights are opened where they are not local; ``path`` is an empty file then.
    """

    root: Path
    config: dict[str, Any] | None = None
    config_file: str | None = None
    weights_file: str | None = None
    header: SafetensorsHeader | None = None
    path: Path | None = None
    stamp: FileStamp | None = None
    manifest: dict[str, Any] | None = None
    pickles: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    opener: Opener | None = None

    def open_weights(self) -> OpenSource:
        """Opens the weights, which must still be in the state in which their header was read.

        Raises:
            UnsupportedError: there are only pickles, or no weights at all.
            StoreError: the file was changed since, or cannot be opened.
        """
        if self.weights_file is None or self.path is None:
            if self.pickles:
                raise foreign_weights(self.pickles[0])
            message = f"there is no '{WEIGHTS_FILE}'."
            remedy = "Get the adapter again from its source, every file of it."
            raise UnsupportedError.of("no-weights", message, file=self.root.name, remedy=remedy)
        if self.opener is not None:
            return self.opener(self.weights_file)
        return LocalFile(self.path, name=self.weights_file, expect=self.stamp)


def open_adapter_files(path: Path | AdapterFiles, *, opener: Opener | None = None) -> AdapterFiles:
    """Opens an adapter; one that is open already is returned as it is.

    Args:
        path: a folder that holds ``adapter_config.json`` and ``adapter_model.safetensors``, or whose only
            weights are one other ``.safetensors`` file; or a ``.safetensors`` file. With
            ``adapter_model.bin`` alone the adapter can be described by its config, and ``weights_file`` is
            None.
        opener: how weights are opened whose name alone stands in the folder.

    Raises:
        FormatError: no adapter, or files that are not what they claim; every problem.
        UnsupportedError: the path is a file of another format.
        StoreError: a file cannot be read.
    """
    if isinstance(path, AdapterFiles):
        return path
    if is_folder(path):
        return _open_folder(path, opener)
    if path.suffix != ".safetensors" and path.exists():
        raise foreign_weights(path.name)
    names = names_in(path.parent) if path.parent.is_dir() else ()
    return _read(path.parent, names, path.name, (), linked=True)


def _open_folder(root: Path, opener: Opener | None) -> AdapterFiles:
    names = names_in(root)
    safetensors = [name for name in names if name.endswith(".safetensors")]
    pickles = tuple(
        name for name in names if name.startswith(_PICKLE_STEMS) and name.endswith(PICKLE_SUFFIXES)
    )
    base_names = [stem + end for stem in STEMS for end in (".safetensors", ".safetensors.index.json")]
    known = [name for name in (WEIGHTS_FILE, *OTHER_WEIGHTS_FILES) if name in safetensors]
    if known:
        weights: str | None = known[0]
    elif CONFIG_FILE not in names and any(name in names for name in base_names):
        message = f"this is a base model: it has no '{CONFIG_FILE}'; expected an adapter."
        remedy = "Give an adapter's folder in this place; a base comes before it, or as --base."
        raise FormatError.of("base-as-adapter", message, file=root.name or str(root), remedy=remedy)
    elif pickles or not safetensors:
        weights = None
    elif len(safetensors) == 1:
        weights = safetensors[0]
    else:
        shown = ", ".join(escape(name) for name in safetensors[:5])
        message = f"found {len(safetensors)} .safetensors files ({shown}), none of them '{WEIGHTS_FILE}'."
        remedy = "Give the path of one of them."
        raise FormatError.of("ambiguous-adapter", message, file=root.name or str(root), remedy=remedy)
    if weights is None and not pickles and CONFIG_FILE not in names:
        message = (
            f"found no adapter; looked for {CONFIG_FILE}, {WEIGHTS_FILE} and a single .safetensors file."
        )
        raise FormatError.of(
            "no-adapter", message, file=root.name or str(root), remedy="Give the folder of an adapter."
        )
    return _read(root, names, weights, pickles, linked=False, opener=opener)


def _read(
    root: Path,
    names: tuple[str, ...],
    weights: str | None,
    pickles: tuple[str, ...],
    *,
    linked: bool,
    opener: Opener | None = None,
) -> AdapterFiles:
    """Reads what there is; ``linked`` allows that the weights, named by the user, are a link to anywhere."""
    problems: list[Problem] = []
    config = read_optional_object(root, CONFIG_FILE, names, problems)
    manifest = read_optional_object(root, MANIFEST_FILE, names, problems)
    header = real = stamp = None
    if weights is not None:
        try:
            real = root / weights if linked else resolve_inside(root, weights)
            with LocalFile(real, name=weights) if opener is None else opener(weights) as source:
                header = read_header(source)
                stamp = source.stamp if isinstance(source, LocalFile) else None
        except (FormatError, UnsupportedError) as error:
            problems.extend(error.problems)
    raise_collected(problems, root.name or str(root))
    known = {CONFIG_FILE, MANIFEST_FILE, weights, *pickles}
    return AdapterFiles(
        root=root,
        config=config,
        config_file=None if config is None else CONFIG_FILE,
        weights_file=weights,
        header=header,
        path=real,
        stamp=stamp,
        manifest=manifest,
        pickles=pickles,
        opener=opener,
        other=tuple(name + "/" * (root / name).is_dir() for name in names if name not in known),
    )
