"""The Python face: the same verbs and words as the command line, on paths and references.

What is read may be a local path, as text or ``pathlib.Path``, or a reference such as ``"hf://owner/name"``;
what is written is a local path. Nothing is printed; what was found or done is returned as a report that knows
its own JSON, and what is wrong is raised as a subclass of ``AdapterError``. What a reference names on another
machine may raise ``HubError`` in any function.
"""

from __future__ import annotations

from adapterhub_tools.api.combining import combine_adapters
from adapterhub_tools.api.description import (
    adapter_digest,
    content_digest,
    init,
    inspect,
    load_manifest,
    validate,
)
from adapterhub_tools.api.exchange import list_adapters, pull, push
from adapterhub_tools.api.low_rank import convert, extract, svd_shrink
from adapterhub_tools.api.merging import merge
from adapterhub_tools.api.paths import Reference
from adapterhub_tools.api.proof import sign, unmerge, verify
from adapterhub_tools.api.safety import scan
from adapterhub_tools.api.serving import fit

__all__ = [
    "Reference",
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
