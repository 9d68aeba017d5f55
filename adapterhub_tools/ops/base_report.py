"""What a base model is, from its headers and its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub_tools.architectures import lookup
from adapterhub_tools.errors import Problem
from adapterhub_tools.model.quant_scheme import QuantizedTensor
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.ops.adapter_reader import count_dtypes
from adapterhub_tools.ops.quantised_base import plain_tensors, read_quantised, stored_scheme
from adapterhub_tools.store.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReport:
    """What a base is.

    Attributes:
        path: where it lies, as given.
        architecture: the model type of its config; None without a config.
        classes: the model classes that its config names.
        parameters: values of all tensors; of quantised weights, those that they stand for.
        tensors: how many tensors.
        dtypes: dtype, or ``"nf4"`` and the like -> number of values, the most frequent first.
        bytes: of all tensors.
        files: the weight files in order.
        tied: True if input and output embeddings are one tensor; None if neither config nor names tell.
        vocabulary: rows of the input embedding, or what the config says.
        layers: number of layers, as its config says.
        hidden: width, as its config says.
        quantisation: how its weights are quantised: in words where they are read here, else the method that
            its config names; None for a plain base.
        quantised_weights: how many weights are quantised in a way that is read here.
        problems: what is wrong with quantised weights.
        notes: what is unusual.
    """

    path: str
    architecture: str | None
    classes: tuple[str, ...]
    parameters: int
    tensors: int
    dtypes: dict[str, int]
    bytes: int
    files: tuple[str, ...]
    tied: bool | None = None
    vocabulary: int | None = None
    layers: int | None = None
    hidden: int | None = None
    quantisation: str | None = None
    quantised_weights: int = 0
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "kind": "base",
            "path": self.path,
            "architecture": self.architecture,
            "classes": list(self.classes),
            "parameters": self.parameters,
            "tensors": self.tensors,
            "dtypes": self.dtypes,
            "bytes": self.bytes,
            "files": list(self.files),
            "tied": self.tied,
            "vocabulary": self.vocabulary,
            "layers": self.layers,
            "hidden": self.hidden,
            "quantisation": self.quantisation,
            "quantised_weights": self.quantised_weights,
            "problems": [problem.to_json() for problem in self.problems],
            "notes": list(self.notes),
        }


def report_base(path: Path, checkpoint: Checkpoint) -> BaseReport:
    """Says what an opened base is.

    Args:
        path: where it lies, for the report.
        checkpoint: the opened base.
    """
    config = checkpoint.config or {}
    problems: list[Problem] = []
    weights = read_quantised(checkpoint, problems)
    specs = plain_tensors(checkpoint, weights)
    quantisation = _quantisation(config, weights)
    notes = []
    if checkpoint.config is None:
        notes.append("there is no config.json, so only the tensors are described")
    if quantisation is not None and not weights:
        notes.append(f"the weights are quantised ({quantisation}): values of packed tensors count as stored")
    return BaseReport(
        path=str(path),
        architecture=_text(config.get("model_type")),
        classes=tuple(name for name in _list(config.get("architectures")) if isinstance(name, str)),
        parameters=sum(spec.elements for spec in specs.values()),
        tensors=len(checkpoint.tensors),
        dtypes=_count_dtypes(specs, weights),
        bytes=checkpoint.nbytes,
        files=checkpoint.files,
        tied=_tied(checkpoint, config),
        vocabulary=_vocabulary(checkpoint, config),
        layers=_number(config, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=_number(config, "hidden_size", "n_embd", "d_model"),
        quantisation=quantisation,
        quantised_weights=len(weights),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def main_dtype(checkpoint: Checkpoint) -> str | None:
    """Returns the dtype of most of a base's values, as they are stored."""
    counts = count_dtypes({name: tensor.spec for name, tensor in checkpoint.on_disk.tensors.items()})
    return next(iter(counts), None)


def _tied(checkpoint: Checkpoint, config: dict[str, Any]) -> bool | None:
    """Reads whether embeddings are tied; a stored output embedding beside the flag is a second copy."""
    said = _nested(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if isinstance(said, bool):
        return said
    known = lookup(_text(config.get("model_type")))
    if known is None:
        return None
    output = known.output_embedding
    if output is not None and f"{output}.weight" in checkpoint.tensors:
        return False
    return known.tied_default


def _vocabulary(checkpoint: Checkpoint, config: dict[str, Any]) -> int | None:
    known = lookup(_text(config.get("model_type")))
    if known is not None and known.input_embedding is not None:
        name = f"{known.input_embedding}.weight"
        for stored in (name, name.removeprefix(f"{known.base_prefix}.")):
            if stored in checkpoint.tensors and len(checkpoint.tensors[stored].spec.shape) == 2:
                return checkpoint.tensors[stored].spec.shape[0]
    return _number(config, "vocab_size")


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of the language model inside a model of several parts."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _number(config: dict[str, Any], *names: str) -> int | None:
    for source in (config, _nested(config)):
        for name in names:
            value = source.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _count_dtypes(specs: Mapping[str, TensorSpec], weights: Mapping[str, QuantizedTensor]) -> dict[str, int]:
    named = {
        name: spec if name not in weights else replace(spec, dtype=weights[name].scheme.format)
        for name, spec in specs.items()
    }
    return count_dtypes(named)


def _quantisation(config: dict[str, Any], weights: Mapping[str, QuantizedTensor]) -> str | None:
    scheme = stored_scheme(weights)
    if scheme is not None:
        others = sum(not weight.scheme.same_values(scheme) for weight in weights.values())
        rest = f", {others} otherwise" if others else ""
        return f"{len(weights)} weights: {scheme.words}{rest} (bitsandbytes)"
    found = config.get("quantization_config")
    return _text(found.get("quant_method")) or "unnamed" if isinstance(found, dict) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
