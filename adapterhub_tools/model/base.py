"""What a base model is, and which one an adapter belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from adapterhub_tools.model.tensor import TensorSpec

_REPOSITORY_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)


def is_repository_id(text: str) -> bool:
    """Tells whether a name can be that of a repository on the Hub: ``"owner/name"``, or a bare ``"name"``.

    At most 96 letters, digits, ``-``, ``_`` and ``.``; neither part begins or ends with ``-`` or ``.``, and
    none holds ``--`` or ``..``.
    """
    return (
        len(text) <= 96
        and _REPOSITORY_ID.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not any(part[0] in "-." or part[-1] in "-." for part in text.split("/"))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRef:
    """The base that an adapter belongs to; every field but none is required.

    Attributes:
        id: a repository id such as ``"meta-llama/Llama-2-7b-hf"``.
        revision: the commit or tag.
        architecture: the model type of its config, such as ``"llama"``.
        dtype: the safetensors dtype of most of its weights, such as ``"BF16"``.
        parameters: the number of values of all its tensors.
        digest: the content digest of all tensors, ``"tensor-tree-blake3-v1:<hex>"``.
        targets_digest: the content digest of the adapter's target tensors alone.
        config_digest: the digest of its config, ``"config-sha256-v1:<hex>"``.
        random_digest: the content digest of the random tensors that the adapter does not store, as they
            are made from its seed for this base's shapes.
        quantisation: how the base was quantised while training, such as
            ``{"scheme": "bitsandbytes-nf4", "double": true, "compute_dtype": "BF16"}``.
    """

    id: str | None = None
    revision: str | None = None
    architecture: str | None = None
    dtype: str | None = None
    parameters: int | None = None
    digest: str | None = None
    targets_digest: str | None = None
    config_digest: str | None = None
    random_digest: str | None = None
    quantisation: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that are known."""
        pairs = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in pairs.items() if value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BaseRef:
        """Reads what ``to_json`` wrote; unknown fields are ignored."""
        return cls(**{name: data[name] for name in cls.__slots__ if name in data})


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor and where its bytes are.

    Attributes:
        spec: name, dtype and shape.
        file: the file's path relative to the checkpoint's folder, with forward slashes.
        offset: the byte offset of its data from the start of that file.
    """

    spec: TensorSpec
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """The number of bytes of its data."""
        return self.spec.nbytes
