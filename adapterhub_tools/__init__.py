"""File-level toolkit for parameter-efficient adapters: inspect, validate, hash and merge them exactly.

    import adapterhub_tools as at

    at.inspect("adapter/")
    at.merge("base/", "adapter/", "out/")

Names are loaded when they are first used, so importing the package loads no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_tools.model.version import VERSION

if TYPE_CHECKING:
    from adapterhub_tools.api import (
        adapter_digest,
        combine_adapters,
        content_digest,
        convert,
        extract,
        fit,
        init,
        inspect,
        list_adapters,
        load_manifest,
        merge,
        pull,
        push,
        scan,
        sign,
        svd_shrink,
        unmerge,
        validate,
        verify,
    )
    from adapterhub_tools.errors import (
        AdapterError,
        DeviceError,
        FormatError,
        HubError,
        IntegrityError,
        LossyError,
        MismatchError,
        Problem,
        StoreError,
        UnsupportedError,
        UnsupportedVersionError,
    )
    from adapterhub_tools.hub.listing import ListReport
    from adapterhub_tools.hub.pull import PullReport
    from adapterhub_tools.hub.push import PushReport
    from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
    from adapterhub_tools.model.base import BaseRef
    from adapterhub_tools.model.manifest import FileRecord, HistoryEntry, HistoryInput, Manifest
    from adapterhub_tools.model.protocols import Progress, SilentProgress
    from adapterhub_tools.model.tensor import TensorSpec
    from adapterhub_tools.ops.base_report import BaseReport
    from adapterhub_tools.ops.combine_report import CombinedInput, CombineReport
    from adapterhub_tools.ops.hash import ContentDigest
    from adapterhub_tools.ops.init import InitReport
    from adapterhub_tools.ops.inspect import AdapterReport
    from adapterhub_tools.ops.merge_report import MergeReport
    from adapterhub_tools.ops.server_report import ServerReport
    from adapterhub_tools.ops.shrink_report import LowRankReport, ModuleReport
    from adapterhub_tools.ops.sign import SignReport
    from adapterhub_tools.ops.unmerge_report import UnmergeReport
    from adapterhub_tools.ops.validation_report import ValidationReport
    from adapterhub_tools.ops.verify_report import TensorVerdict, VerifyReport

__version__ = VERSION

# Where public names are defined; one that stands nowhere here is a function of api.
_HOMES = {
    "errors": (
        "AdapterError",
        "DeviceError",
        "FormatError",
        "HubError",
        "IntegrityError",
        "LossyError",
        "MismatchError",
        "Problem",
        "StoreError",
        "UnsupportedError",
        "UnsupportedVersionError",
    ),
    "hub.listing": ("ListReport",),
    "hub.pull": ("PullReport",),
    "hub.push": ("PushReport",),
    "model.adapter": ("Adapter", "FullTensor", "TargetModule"),
    "model.base": ("BaseRef",),
    "model.manifest": ("FileRecord", "HistoryEntry", "HistoryInput", "Manifest"),
    "model.protocols": ("Progress", "SilentProgress"),
    "model.tensor": ("TensorSpec",),
    "ops.combine_report": ("CombinedInput", "CombineReport"),
    "ops.hash": ("ContentDigest",),
    "ops.init": ("InitReport",),
    "ops.base_report": ("BaseReport",),
    "ops.inspect": ("AdapterReport",),
    "ops.merge_report": ("MergeReport",),
    "ops.server_report": ("ServerReport",),
    "ops.shrink_report": ("LowRankReport", "ModuleReport"),
    "ops.sign": ("SignReport",),
    "ops.unmerge_report": ("UnmergeReport",),
    "ops.validation_report": ("ValidationReport",),
    "ops.verify_report": ("TensorVerdict", "VerifyReport"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterReport",
    "BaseRef",
    "BaseReport",
    "CombineReport",
    "CombinedInput",
    "ContentDigest",
    "DeviceError",
    "FileRecord",
    "FormatError",
    "FullTensor",
    "HistoryEntry",
    "HistoryInput",
    "HubError",
    "InitReport",
    "IntegrityError",
    "ListReport",
    "LossyError",
    "LowRankReport",
    "Manifest",
    "MergeReport",
    "MismatchError",
    "ModuleReport",
    "Problem",
    "Progress",
    "PullReport",
    "PushReport",
    "ServerReport",
    "SignReport",
    "SilentProgress",
    "StoreError",
    "TargetModule",
    "TensorSpec",
    "TensorVerdict",
    "UnmergeReport",
    "UnsupportedError",
    "UnsupportedVersionError",
    "ValidationReport",
    "VerifyReport",
    "__version__",
    "adapter_digest",
    "combine_adapters",
    "content_digest",
    "convert",
    "extract",
    "fit",
    "init",
    "inspect",
    "list_adapters",
    "load_manifest",
    "merge",
    "pull",
    "push",
    "scan",
    "sign",
    "svd_shrink",
    "unmerge",
    "validate",
    "verify",
]


def __getattr__(name: str) -> object:
    """Loads a public name from the module that defines it (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME_OF.get(name, "api")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted(__all__)
