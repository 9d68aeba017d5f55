"""What folders of models and of adapters have in common."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import FormatError, Problem, UnsupportedError
from adapterhub_tools.store.files import is_folder, resolve_inside, store_error
from adapterhub_tools.store.strict_json import read_json_object, trimmed

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

STEMS = ("model", "diffusion_pytorch_model")
"""The names that weights have in a model folder, without their ending, in the order they are looked for."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that are loaded by unpickling, which this package never does."""
PICKLE_REMEDY = (
    "Pickles can run code and are never loaded. Convert it where it was made: load it there and save it "
    "again with safe_serialization=True, or use a safetensors copy."
)


def folder_kind(path: Path) -> str:
    """Returns ``"adapter"`` if the folder, or that of the file, holds an adapter, else ``"checkpoint"``."""
    folder = path if is_folder(path) else path.parent
    if path.name.startswith("adapter_model.") or (folder / "adapter_config.json").is_file():
        return "adapter"
    if path.is_dir() and any(
        (folder / name).exists() for name in ("adapter_model.safetensors", "adapter_model.bin")
    ):
        return "adapter"
    return "checkpoint"


def names_in(folder: Path) -> tuple[str, ...]:
    """Returns the sorted names in a folder.

    Raises:
        StoreError: the folder cannot be read.
    """
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError as error:
        raise store_error(error, "list the folder", folder) from error


def read_optional_object(
    root: Path, name: str, names: Iterable[str], problems: list[Problem]
) -> dict[str, Any] | None:
    """Returns the object in a JSON file of a folder, or None if there is none; adds what is wrong."""
    if name not in names:
        return None
    try:
        return read_json_object(resolve_inside(root, name), file=name)
    except FormatError as error:
        problems.extend(error.problems)
        return None


def foreign_weights(name: str) -> UnsupportedError:
    """Returns the error for weights that are not safetensors."""
    if name.endswith(PICKLE_SUFFIXES):
        message, remedy = "the weights are a Python pickle.", PICKLE_REMEDY
    elif name.endswith(".gguf"):
        message, remedy = "the weights are a GGUF file.", "Convert it to safetensors first."
    else:
        message, remedy = "expected a folder or a .safetensors file.", "Give the folder of the model."
    return UnsupportedError(Problem(kind="not-safetensors", message=message, file=name, remedy=remedy))


def raise_collected(problems: list[Problem], file: str) -> None:
    """Raises every problem: UnsupportedError if pickles are all that is wrong, FormatError otherwise."""
    if not problems:
        return
    only_pickles = all(problem.kind == "pickle" for problem in problems)
    raise (UnsupportedError if only_pickles else FormatError)(*trimmed(problems, file))
