"""The model card: metadata that the Hub understands, and a table for people, kept current in their text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from adapterhub_tools.errors import FormatError, escape
from adapterhub_tools.hub.reference import HubReference, check_id
from adapterhub_tools.model.manifest import Manifest

BEGIN = "<!-- adaptertool: begin -->"
END = "<!-- adaptertool: end -->"

_SECTION = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END) + r"\n?", re.DOTALL)
_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_ORDER = ("base_model", "base_model_relation", "library_name", "license", "tags")
_TEMPLATE_MARK = "[More Information Needed]"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#])")


def is_unfilled(text: str) -> bool:
    """Returns whether a card is the template that PEFT saves with every adapter, left as it was."""
    return text.count(_TEMPLATE_MARK) > 5


def render(manifest: Manifest, reference: HubReference | str, existing: str | None) -> str:
    """Returns the card of an adapter.

    Args:
        manifest: what the adapter is.
        reference: where it will be.
        existing: the card so far, whose text and other metadata are kept; None for none.

    Raises:
        FormatError: the metadata of the card so far cannot be read.
    """
    metadata, body = ({}, "") if existing is None else _split(existing)
    if existing is None or is_unfilled(existing):
        name = str(getattr(reference, "id", reference)).rpartition("/")[2]
        body = f"\n# {_escaped(name)}\n\n{BEGIN}{END}\n"
    section = f"{BEGIN}\n{_table(manifest)}\n{_usage(manifest, reference)}{END}\n"
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: section, body, count=1)
    else:
        body = body.rstrip("\n") + "\n\n" + section
    updated = _yaml(_metadata(metadata, manifest))
    return f"---\n{updated}---\n" + ("" if body.startswith("\n") else "\n") + body


def hub_id(name: str | None) -> str | None:
    """Returns a base's name if it is an id on the Hub rather than a local path."""
    try:
        return check_id(name) if name and name.count("/") <= 1 else None
    except FormatError:
        return None


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Returns the metadata of a card and its text.

    Raises:
        FormatError: the metadata is not a YAML mapping.
    """
    import yaml

    found = _FRONT.match(text)
    if found is None:
        return {}, text
    try:
        data = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        data = error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        reason = escape(data) if isinstance(data, Exception) else "it is no mapping"
        raise FormatError.of(
            "card",
            f"its metadata cannot be read: {reason}.",
            file="README.md",
            remedy="Correct the YAML between the two '---' lines.",
        )
    return {str(key): value for key, value in data.items()}, text[found.end() :]


def _yaml(metadata: dict[str, Any]) -> str:
    import yaml

    known = {name: metadata[name] for name in _ORDER if name in metadata}
    return str(yaml.safe_dump({**known, **metadata}, sort_keys=False, allow_unicode=True))


def _metadata(before: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Returns the metadata with what is known of the adapter; everything else stays."""
    made = {key: value for key, value in before.items() if key != "base_model"}
    base = hub_id(manifest.base.id)
    known = before.get("base_model")
    if base is not None and not (isinstance(known, list) and base in known):
        known = base
    names = known if isinstance(known, list) else [known]
    if known and all(isinstance(name, str) and hub_id(name) for name in names):
        made = {"base_model": known, **made}
    made["base_model_relation"] = "adapter"
    made["library_name"] = "peft"
    if manifest.licence is not None:
        made["license"] = manifest.licence
    tags = before.get("tags") if isinstance(before.get("tags"), list) else []
    made["tags"] = list(dict.fromkeys([*(tags or []), *manifest.tags, manifest.adapter.method]))
    return made


def _table(manifest: Manifest) -> str:
    adapter, base = manifest.adapter, manifest.base
    weights = [file for file in manifest.files if file.path.endswith(".safetensors")]
    rows: list[tuple[str, str | None]] = [
        ("Method", adapter.method),
        ("Rank", _counted(module.hparams.get("rank") for module in adapter.modules)),
        ("Alpha", _counted(module.hparams.get("alpha") for module in adapter.modules)),
        ("Scaling", _text(adapter.hparams.get("scaling"))),
        ("Target modules", _targets(manifest)),
        ("Tensors in full", str(len(adapter.full)) if adapter.full else None),
        ("Trained parameters", f"{adapter.parameters:,}"),
        ("Base", base.id),
        ("Base revision", base.revision),
        ("Base content", base.digest),
        ("Adapter digest", manifest.digest),
        ("Licence", manifest.licence),
    ]
    rows += [(f"File {file.path}", f"{file.size:,} bytes, SHA-256 {file.sha256}") for file in weights]
    lines = ["| | |", "|---|---|"]
    lines += [f"| {_escaped(name)} | {_escaped(value)} |" for name, value in rows if value is not None]
    return "\n".join(lines)


def _usage(manifest: Manifest, reference: HubReference | str) -> str:
    base = hub_id(manifest.base.id) or "BASE"
    id, folder = getattr(reference, "id", "adapter"), getattr(reference, "folder", "")
    inside = f', subfolder="{folder}"' if folder else ""
    return (
        "\nLoad it with PEFT:\n\n```python\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{id}"{inside})\n```\n'
        "\nVerify it, and merge it into its base, with `adaptertool`:\n\n```sh\n"
        f"adaptertool pull {reference} adapter\nadaptertool validate adapter\n"
        f"adaptertool merge BASE-FOLDER adapter merged\n```\n"
    )


def _targets(manifest: Manifest) -> str:
    names = Counter(module.path.rpartition(".")[2] for module in manifest.adapter.modules)
    shown = [f"{name} × {count}" for name, count in names.most_common(12)]
    return f"{len(manifest.adapter.modules)}: " + ", ".join(shown) + (" …" if len(names) > 12 else "")


def _counted(values: Iterable[Any]) -> str | None:
    counts = Counter(value for value in values if value is not None)
    if not counts:
        return None
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({count})" for value, count in sorted(counts.items()))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _escaped(text: str) -> str:
    """Returns text for one table cell: no markup of its own, no line break."""
    plain = "".join(char if char.isprintable() else " " for char in text)
    return _MARKDOWN.sub(r"\\\1", plain)
