"""Configs that make a loader run code, import modules or read elsewhere; templates and paths in them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from adapterhub_tools.errors import escape
from adapterhub_tools.ops import scan_rules as rules
from adapterhub_tools.ops.scan_template import template_dangers, templates_in
from adapterhub_tools.ops.validation_report import Finding
from adapterhub_tools.store.files import path_reason
from adapterhub_tools.store.strict_json import examine_json

MAX_CONFIG_BYTES = 16 << 20
"""The largest JSON file that is parsed."""

_LOADED = re.compile(
    r"""
      (?:.*/)?(?:[\w.-]*config[\w.-]*|model_index|modules|special_tokens_map|added_tokens|adapter_manifest
      |chat_template[\w.-]*|.*\.index)\.json
    """,
    re.VERBOSE,
)
_TOLD_BY_VALIDATE = ("json-number",)  # an Infinity, which some models' own configs hold
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_code")
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_KERNEL = re.compile(r"(?:\w+\|)?[\w.-]+/[\w.-]+(?:@[^:]+)?(?::\w+)?")
_KNOWN_LIBRARIES = frozenset(
    {
        "accelerate", "adapters", "colpali_engine", "diffusers", "flair", "gliner", "gliner2", "megatron",
        "open_clip", "optimum", "peft", "pylate", "sentence_transformers", "setfit", "timm", "torch",
        "transformers", "trl", "unsloth",
    }
)  # fmt: skip
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(?:[^/@\s]*@)?([^/\s]*)")


def is_loaded_config(name: str) -> bool:
    """Returns whether a loader of models, tokenizers or adapters reads this JSON file."""
    return _LOADED.fullmatch(name) is not None


def config_findings(name: str, data: bytes) -> Iterator[Finding]:
    """Yields what is wrong with a JSON file.

    Args:
        name: the file.
        data: its content.
    """
    value, problems = examine_json(data, file=name, max_bytes=MAX_CONFIG_BYTES)
    if is_loaded_config(name):
        ambiguous = [problem for problem in problems if problem.kind not in _TOLD_BY_VALIDATE]
        for problem in ambiguous[:3]:
            where = f"{problem.loc}: " if problem.loc else ""
            yield rules.BROKEN_CONFIG.finding(f"{where}{problem.message}", file=name)
    if value is None:
        return
    for path, item in _entries(value):
        yield from _code(name, path, item)
    for path, template in templates_in(value):
        yield from template_findings(name, template, loc=path)
    last = name.rpartition("/")[2]
    if not isinstance(value, dict):
        if last == "modules.json":
            yield from _module_types(name, value)
        return
    if last == "adapter_config.json":
        yield from _base_name(name, value.get("base_model_name_or_path"))
        yield from _imports(name, value)
    elif last == "model_index.json":
        yield from _components(name, value)
    elif last.endswith(".index.json"):
        weight_map = value.get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        yield from _paths(name, "weight_map", (shard for shard in shards if isinstance(shard, str)))
    elif last == "adapter_manifest.json":
        files = value.get("files")
        records = files if isinstance(files, list) else []
        paths = (record.get("path") for record in records if isinstance(record, dict))
        yield from _paths(name, "files", (path for path in paths if isinstance(path, str)))


def template_findings(name: str, template: str, *, loc: str = "") -> Iterator[Finding]:
    """Yields what is dangerous in a chat template.

    Args:
        name: its file.
        template: its text.
        loc: the key where it stands, if the file is JSON.
    """
    for line, danger in template_dangers(template):
        where = f"{loc}, line {line} of the template" if loc else f"line {line}"
        yield rules.TEMPLATE_CODE.finding(f"the chat template {escape(danger)}.", file=name, loc=where)


def base_place(name: object) -> str:
    """Returns what a ``base_model_name_or_path`` is if it is no repository id; empty if it is one.

    A URL is shown without what stands before ``@`` and without its path, since these may hold passwords.
    """
    if not isinstance(name, str) or not name:
        return ""
    if found := _URL.match(name):
        return f"a URL ({escape(found.group(1))}://{escape(found.group(2))}/…)"
    if name.startswith(("/", ".", "~")) or "\\" in name or name[1:2] == ":" or name.count("/") > 1:
        return f"a local path ({escape(name)})"
    return ""


def _entries(value: Any) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yields every key of every object, with the path to it."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                where = f"{path}.{key}" if path else str(key)
                yield where, (str(key), inner)
                waiting.append((where, inner))
        elif isinstance(item, list):
            waiting.extend((f"{path}[{index}]", inner) for index, inner in enumerate(item))


def _code(name: str, path: str, entry: tuple[str, Any]) -> Iterator[Finding]:
    key, value = entry
    if key in _CODE_KEYS and isinstance(value, (dict, list, str)) and value:
        shown = ", ".join(sorted(map(str, value))) if isinstance(value, (dict, list)) else value
        yield rules.REMOTE_CODE.finding(f"makes a loader run code for {escape(shown)}.", file=name, loc=path)
    if key in _KERNEL_KEYS and isinstance(value, str) and _KERNEL.fullmatch(value):
        message = f"makes a loader fetch and run the kernels of {escape(value)}."
        yield rules.REMOTE_CODE.finding(message, file=name, loc=path)


def _foreign(
    name: str, loc: str, module: object, known: frozenset[str] = _KNOWN_LIBRARIES
) -> Iterator[Finding]:
    if isinstance(module, str) and module and module.partition(".")[0] not in known:
        message = f"names the module {escape(module)}, of none of the known libraries."
        yield rules.FOREIGN_IMPORT.finding(message, file=name, loc=loc)


def _imports(name: str, config: dict[str, Any]) -> Iterator[Finding]:
    """PEFT imports ``auto_mapping.parent_library`` and ``megatron_core`` by these names."""
    mapping = config.get("auto_mapping")
    if isinstance(mapping, dict):
        yield from _foreign(name, "auto_mapping.parent_library", mapping.get("parent_library"))
    yield from _foreign(name, "megatron_core", config.get("megatron_core"))


def _module_types(name: str, value: Any) -> Iterator[Finding]:
    """sentence-transformers imports the ``type`` of each module."""
    for index, module in enumerate(value if isinstance(value, list) else []):
        if isinstance(module, dict):
            yield from _foreign(name, f"[{index}].type", module.get("type"))


def _components(name: str, value: dict[str, Any]) -> Iterator[Finding]:
    """Diffusers imports each component from a library, or from a file of the repository."""
    for key, item in value.items():
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
            continue
        if key == "_class_name":
            message = f"makes a loader run the file {escape(item[0])}.py."
            yield rules.REMOTE_CODE.finding(message, file=name, loc=key)
        elif item[0].partition(".")[0] in sys.stdlib_module_names:
            # Other names may be folders of diffusers' own pipelines, which are too many to know.
            yield from _foreign(name, key, item[0])


def _base_name(name: str, value: object) -> Iterator[Finding]:
    place = base_place(value)
    if place:
        yield rules.LOCAL_BASE.finding(f"the base is {place}.", file=name, loc="base_model_name_or_path")


def _paths(name: str, loc: str, paths: Iterator[str]) -> Iterator[Finding]:
    for path in sorted(set(paths)):
        reason = path_reason(path)
        if reason:
            message = f"names the path {escape(repr(path))}, which {reason}."
            yield rules.PATH_ESCAPE.finding(message, file=name, loc=loc)
