"""Which files of a base model go with a merged model: an allow-list, so that nothing unknown slips through.

What stays behind is listed with a reason, so that a user can copy by hand what is wanted after all.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_tools.errors import FormatError
from adapterhub_tools.store.files import LocalFile, resolve_inside
from adapterhub_tools.store.folder import names_in
from adapterhub_tools.store.header import named_magic

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_TOKENIZER = re.compile(
    r"""
      tokenizer[\w.-]*\.json | [\w.-]+\.model(?:\.v\d+)? | [\w.-]+\.spm | [\w.-]+\.tiktoken
    | vocab[\w.-]*\.(?:json|txt) | merges\.txt | bpe\.codes | normalizer\.json
    | special_tokens_map\.json | added_tokens\.json
    | chat_template[\w.-]*\.(?:json|jinja) | additional_chat_templates/[\w.-]+\.jinja
    """,
    re.VERBOSE,
)
_COPIED = re.compile(
    r"""
      config\.json | configuration\.json | generation_config\.json
    | modules\.json | sentence_\w+_config\.json | config_sentence_transformers\.json
    | (?:[a-z]+_)?(?:pre)?processor_config\.json | feature_extractor_config\.json
    | \d+_[A-Z]\w*/config\.json
    | (?i:licen[sc]e|copying|notice|use_policy|acceptable_use_policy)(?:[._-][\w.-]*)?
    """,
    re.VERBOSE,
)
_LEFT: tuple[tuple[str, str], ...] = (
    (r".*\.safetensors|.*\.(?:gguf|ggml|onnx|h5|msgpack|ot|npz|tflite|mlmodel)", "weights"),
    (r".*\.index\.json", "an index of weights; the output has its own"),
    (r".*\.(?:bin|pt|pth|ckpt|pkl|pickle|joblib|dill)", "a Python pickle or unknown binary data"),
    (
        r".*\.(?:py|pyc|so|dll|dylib|ipynb|sh)",
        "code; copy it by hand after reading it, if the config names it",
    ),
    (r".*\.(?:zip|tar|gz|tgz|bz2|xz|7z|zst|rar|whl)", "an archive"),
    (r"adapter_.*", "belongs to an adapter, not to the model"),
    (r"merge_receipt\.json|.*_manifest\.json", "a record of other files than these"),
    (r".*\.(?:sig|sigstore|asc|pem|intoto\.jsonl)|model\.sig.*", "a signature over other files than these"),
    (r"(?i:readme)(?:\..*)?", "describes the base; write a new one for the merged model"),
    (r"\.git.*|\.cache", "belongs to version control or to a cache"),
    (r"quantize_config\.json|quant_config\.json|hf_quant_config\.json", "describes other weights than these"),
    (r"trainer_state\.json|training_args.*|.*_results\.json|runs|checkpoint-.*", "belongs to a training run"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """The files beside a model's weights.

    Attributes:
        copy: names that go to the output, sorted.
        left: names that stay behind, each with the reason, sorted.
    """

    copy: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def side_file_names(root: Path) -> tuple[str, ...]:
    """Returns the names in a model's folder, and those in its folders of modules and of chat templates.

    Other folders are named, with a final ``/``, but not opened.

    Raises:
        StoreError: a folder cannot be read.
    """
    found: list[str] = []
    for name in names_in(root):
        if not (root / name).is_dir():
            found.append(name)
        elif name == "additional_chat_templates" or re.fullmatch(r"\d+_[A-Z]\w*", name):
            found.extend(f"{name}/{inner}" for inner in names_in(root / name))
        else:
            found.append(name + "/")
    return tuple(sorted(found))


def classify(root: Path, names: Iterable[str] | None = None) -> SideFiles:
    """Returns which files go to the output and which stay behind.

    Configs, tokenizers, templates and licences go; they may be symbolic links to files inside the folder or
    inside the blobs of its Hub cache repository. Everything else stays, whatever it is.

    Args:
        root: the model's folder.
        names: names relative to it; ``side_file_names(root)`` if not given.

    Raises:
        StoreError: a file cannot be examined.
    """
    copy: list[str] = []
    left: list[tuple[str, str]] = []
    for name in sorted(side_file_names(root) if names is None else names):
        reason = _reason(root, name)
        if reason:
            left.append((name, reason))
        else:
            copy.append(name)
    return SideFiles(copy=tuple(copy), left=tuple(left))


def is_tokenizer_file(name: str) -> bool:
    """Returns whether a name is that of a tokenizer's file or of a chat template."""
    return _TOKENIZER.fullmatch(name) is not None


def is_side_file(name: str) -> bool:
    """Returns whether a name alone says that the file goes along; the file itself may still say otherwise."""
    return not _reason_by_name(name)


def _reason_by_name(name: str) -> str:
    for pattern, reason in _LEFT:
        if re.fullmatch(pattern, name.rstrip("/").rpartition("/")[2], re.DOTALL):
            return reason
    if name.endswith("/"):
        return "a folder"
    if not (_COPIED.fullmatch(name) or is_tokenizer_file(name)):
        return "not on the list of files that go with a model"
    return ""


def _reason(root: Path, name: str) -> str:
    """Returns why a file stays behind, or an empty string if it goes."""
    reason = _reason_by_name(name)
    if reason:
        return reason
    try:
        real = resolve_inside(root, name)
        if not os.path.lexists(real):
            return "a symbolic link to nothing"
        with LocalFile(real, name=name) as source:
            magic = named_magic(source.read(0, min(source.length, 24)))
    except FormatError as error:
        return error.problems[0].message.rstrip(".")
    return "" if magic is None else f"it is {magic[0]}"
