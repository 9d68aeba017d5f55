"""Says what an adapter or a base is, from headers and configs alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.scaling import scale_of
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, count_dtypes, examine_adapter
from adapterhub_tools.ops.base_report import BaseReport, report_base
from adapterhub_tools.registry import load, names
from adapterhub_tools.store.adapter_files import AdapterFiles
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.files import LocalFile, is_folder
from adapterhub_tools.store.folder import folder_kind
from adapterhub_tools.store.header import read_header

if TYPE_CHECKING:
    from adapterhub_tools.model.adapter import Adapter, TargetModule

_TRANSPOSED = ("conv1d", "embedding")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetGroup:
    """Target modules that differ only in the layer they stand in.

    Attributes:
        name: the last part of their paths, such as ``"q_proj"``.
        kind: linear, conv1d, conv2d, convnd, embedding, expert or unknown.
        modules: how many.
        ranks: the ranks that occur, sorted.
        shapes: the weight shapes that their factors give, where rank factors A and B do, sorted.
        parameters: trained values.
    """

    name: str
    kind: str
    modules: int
    ranks: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    parameters: int

    def to_json(self) -> dict[str, Any]:
        """Returns the group as a JSON object."""
        return {
            "name": self.name,
            "kind": self.kind,
            "modules": self.modules,
            "ranks": list(self.ranks),
            "shapes": [list(shape) for shape in self.shapes],
            "parameters": self.parameters,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """What an adapter is.

    Attributes:
        path: where it lies, as given.
        adapter: the description that everything else is derived from.
        ranks: rank -> number of modules.
        alphas: alpha -> number of modules.
        scales: effective scale -> number of modules.
        groups: the target modules, grouped.
        full_parameters: values of the tensors carried in full.
        dtypes: dtype -> number of values, the most frequent first.
        weights_file: the weight file; None if there is none that can be read.
        weights_bytes: its size.
        base_parameters: values of the base, if one was given or the manifest knows it.
        manifest_version: the manifest's schema version; None without one.
        digest: the adapter digest as its manifest records it, not recomputed.
        problems: what is wrong with config or tensors, and warnings; files that cannot be read are raised.
        notes: what was resolved by rule.
    """

    path: str
    adapter: Adapter
    ranks: dict[int, int]
    alphas: dict[float, int]
    scales: dict[float, int]
    groups: tuple[TargetGroup, ...]
    full_parameters: int
    dtypes: dict[str, int]
    weights_file: str | None
    weights_bytes: int
    base_parameters: int | None = None
    manifest_version: str | None = None
    digest: str | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """The number of trained values: factors and tensors carried in full."""
        return self.adapter.parameters

    @property
    def share(self) -> float | None:
        """Trained values as a share of the base's; None if the base's number is not known."""
        return self.parameters / self.base_parameters if self.base_parameters else None

    @property
    def mergeable(self) -> bool:
        """Whether nothing that the adapter's own files say stands against a merge."""
        wrong = any(problem.severity == "error" for problem in self.problems)
        return not self.adapter.blockers and not wrong and self.weights_file is not None

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        adapter = self.adapter
        return {
            "kind": "adapter",
            "path": self.path,
            "dialect": adapter.dialect,
            "method": adapter.method,
            "hyperparameters": adapter.hparams,
            "modules": len(adapter.modules),
            "ranks": {str(key): value for key, value in self.ranks.items()},
            "alphas": {str(key): value for key, value in self.alphas.items()},
            "scales": {str(key): value for key, value in self.scales.items()},
            "targets": [group.to_json() for group in self.groups],
            "full": [full.to_json() for full in adapter.full],
            "parameters": self.parameters,
            "full_parameters": self.full_parameters,
            "base_parameters": self.base_parameters,
            "share": self.share,
            "dtypes": self.dtypes,
            "weights_file": self.weights_file,
            "weights_bytes": self.weights_bytes,
            "base": None if adapter.base is None else adapter.base.to_json(),
            "manifest_version": self.manifest_version,
            "digest": self.digest,
            "mergeable": self.mergeable,
            "blockers": [{"kind": k, "message": m, "remedy": r} for k, m, r in adapter.blockers],
            "problems": [problem.to_json() for problem in self.problems],
            "notes": list(self.notes),
        }


_FACTOR = re.compile(
    r"lora|hada_w|lokr_w|oft_(?:blocks|R)|dora_scale|:(?:down|up)$|\.alpha$|adapter_(?:down|up)"
)


def inspect(
    path: Path | Checkpoint | AdapterFiles, *, base: Path | Checkpoint | None = None
) -> AdapterReport | BaseReport:
    """Says what lies at a path.

    Args:
        path: an adapter or a base: a folder, or a ``.safetensors`` file; or what is open already.
        base: the base of an adapter, to tell the share of its parameters that the adapter trains.

    Raises:
        FormatError: a file is broken; every problem.
        UnsupportedError: of a format that cannot be read.
        StoreError: a file cannot be read.
    """
    if isinstance(path, Checkpoint):
        return report_base(path.root, path)
    if isinstance(path, AdapterFiles) or _is_adapter(path):
        return _report_adapter(path, base)
    return report_base(path, open_checkpoint(path))


def _is_adapter(path: Path) -> bool:
    """Tells an adapter from a base; a single file without a config shows it by its tensors' names."""
    if folder_kind(path) == "adapter":
        return True
    folder = path if is_folder(path) else path.parent
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".safetensors" or not files[0].is_file():
        return False
    if (folder / "config.json").exists():
        return False
    with LocalFile(files[0], name=files[0].name) as source:
        tensors = read_header(source).tensors
    known = any(load("dialects", name).detect(tensors, None) for name in names("dialects"))
    # Other tools' adapters are named as such and refused, not described as a strange little base.
    return known or sum(_FACTOR.search(name) is not None for name in tensors) * 2 > len(tensors)


def _report_adapter(path: Path | AdapterFiles, base: Path | Checkpoint | None) -> AdapterReport:
    opened = examine_adapter(path)
    adapter, files = opened.adapter, opened.files
    header = files.header
    pickles = tuple(f"{name} is a pickle: it was not read" for name in files.pickles)
    return AdapterReport(
        path=str(path.root if isinstance(path, AdapterFiles) else path),
        adapter=_with_manifest_base(opened),
        ranks=_count(module.hparams.get("rank") for module in adapter.modules),
        alphas=_count(module.hparams.get("alpha") for module in adapter.modules),
        scales=_count(scale_of(module.hparams) for module in adapter.modules),
        groups=group_targets(adapter.modules),
        full_parameters=sum(full.tensor.elements for full in adapter.full),
        dtypes=count_dtypes({} if header is None else header.tensors),
        weights_file=files.weights_file,
        weights_bytes=0 if header is None else header.length,
        base_parameters=_base_parameters(opened, base),
        manifest_version=None if opened.manifest is None else opened.manifest.schema_version,
        digest=None if opened.manifest is None else opened.manifest.digest,
        problems=opened.problems,
        notes=(*adapter.notes, *pickles),
    )


def _with_manifest_base(opened: OpenedAdapter) -> Adapter:
    """Returns the adapter with the base that its manifest knows, which says more than a config does."""
    if opened.manifest is None:
        return opened.adapter
    return replace(opened.adapter, base=opened.manifest.base)


def _base_parameters(opened: OpenedAdapter, base: Path | Checkpoint | None) -> int | None:
    if base is not None:
        return report_base(Path(), open_checkpoint(base)).parameters
    return None if opened.manifest is None else opened.manifest.base.parameters


def _count(values: Iterable[Any]) -> dict[Any, int]:
    counts = Counter(value for value in values if value is not None)
    return dict(sorted(counts.items()))


def group_targets(modules: Iterable[TargetModule]) -> tuple[TargetGroup, ...]:
    """Groups modules by the last part of their path and their kind, in the order of first occurrence."""
    found: dict[tuple[str, str], list[TargetModule]] = {}
    for module in modules:
        parts = module.path.split(".")
        # A number alone, as in "to_out.0", says nothing.
        name = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
        found.setdefault((name, module.kind), []).append(module)
    return tuple(
        TargetGroup(
            name=name,
            kind=kind,
            modules=len(members),
            ranks=tuple(sorted({m.hparams["rank"] for m in members if m.hparams.get("rank") is not None})),
            shapes=tuple(sorted({shape for m in members if (shape := _weight_shape(m)) is not None})),
            parameters=sum(m.parameters for m in members),
        )
        for (name, kind), members in found.items()
    )


def _weight_shape(module: TargetModule) -> tuple[int, ...] | None:
    """The shape of the weight as the base stores it."""
    if module.base_shape is not None:
        return module.base_shape
    a, b = module.factors.get("A"), module.factors.get("B")
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
        return None
    return (a.shape[1], b.shape[0]) if module.kind in _TRANSPOSED else (b.shape[0], *a.shape[1:])
