"""Writes adapterhub_tools/architectures/tables.json from the installed transformers.

For each model type it builds the model with one layer on the meta device (no weights), and records the path
of the embeddings, which parameters are one tensor, which modules store their weight as (in, out), which ones
stay in float32 and which one is last (no loader quantises them), and which names differ between memory and
disk (``transformers.conversion_mapping``; the names that ``save_pretrained`` writes are compared with those
that the table gives). Run it after an upgrade of transformers;
tests/unit/test_architectures.py compares the file with what this script would write.

    python tools/build_architectures.py            # writes the table
    python tools/build_architectures.py --check    # exits 1 if the file differs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "adapterhub_tools" / "architectures" / "tables.json"

# model type -> the auto class whose module names an adapter's paths and a checkpoint's names follow
MODELS = {
    "causal": """llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo
    olmo2
        cohere cohere2 starcoder2 granite stablelm gpt2 gpt_neo gpt_neox gptj gpt_bigcode codegen bloom falcon
        opt mpt smollm3 openai-gpt xglm biogpt""",
    "masked": "bert roberta distilbert electra deberta deberta-v2 albert camembert xlm-roberta "
    "modernbert mpnet",
    "seq2seq": "t5 mt5 bart mbart pegasus marian",
    "speech": "whisper",
    "image_text": "gemma3",
    "causal_image": "imagegpt",
    "image": "vit",
    "bare": "clip clip_text_model clip_vision_model siglip siglip_vision_model decision_transformer",
}

_SMALL = {
    "num_hidden_layers": 1, "n_layer": 1, "n_layers": 1, "num_layers": 1, "encoder_layers": 1,
    "decoder_layers": 1, "num_decoder_layers": 1, "num_experts": 2, "num_local_experts": 2,
    "num_experts_per_tok": 1,
}  # fmt: skip


def _classes(kind: str) -> Any:
    import transformers as t

    return {
        "causal": t.AutoModelForCausalLM,
        "masked": t.AutoModelForMaskedLM,
        "seq2seq": t.AutoModelForSeq2SeqLM,
        "speech": t.AutoModelForSpeechSeq2Seq,
        "image_text": t.AutoModelForImageTextToText,
        "image": t.AutoModelForImageClassification,
        "bare": t.AutoModel,
    }.get(kind)


def _shrink(config: Any) -> None:
    """Leaves one layer of everything, so that building takes no time."""
    for name in ("text_config", "vision_config"):
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            _shrink(part)
    for name, size in _SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, size)
    for name in ("layer_types", "mlp_only_layers", "no_rope_layers"):
        value = getattr(config, name, None)
        if isinstance(value, list) and value:
            setattr(config, name, value[:1])
    if config.model_type == "gpt_neo":
        config.attention_types = [[["global"], 1]]
        config.attention_layers = ["global"]


def _build(kind: str, model_type: str, tied: bool) -> Any:
    import torch
    import transformers as t

    config: Any = t.AutoConfig.for_model(model_type)
    _shrink(config)
    config.tie_word_embeddings = tied
    text: Any = getattr(config, "text_config", None)
    if text is not None and not isinstance(text, dict):
        text.tie_word_embeddings = tied
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad >= getattr(config, "vocab_size", pad + 1):
        config.pad_token_id = None
    with torch.device("meta"):
        if kind == "causal_image":
            return t.ImageGPTForCausalImageModeling(config)
        return _classes(kind).from_config(config)


def _path(model: Any, module: Any) -> str | None:
    if module is None:
        return None
    return next((name for name, other in model.named_modules() if other is module), None)


def _groups(model: Any) -> list[list[str]]:
    """Returns the names that are one parameter, the name that checkpoints store first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    left_out = set(getattr(model, "all_tied_weights_keys", {}) or {})
    groups = [sorted(group, key=lambda n: (n in left_out, n)) for group in names.values() if len(group) > 1]
    return sorted(groups)


def describe(kind: str, model_type: str) -> dict[str, Any]:
    """Returns the row of one model type."""
    import transformers as t
    from transformers.pytorch_utils import Conv1D

    model = _build(kind, model_type, tied=True)
    apart = _build(kind, model_type, tied=False)
    try:
        source = model.get_input_embeddings()
    except NotImplementedError:
        source = None
    if getattr(getattr(source, "weight", None), "ndim", 0) != 2:
        source = None  # patches of an image are no table of rows
    conv1d = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return {
        "base_prefix": model.base_model_prefix if hasattr(model, model.base_model_prefix) else "",
        "input_embedding": _path(model, source),
        "output_embedding": _path(model, model.get_output_embeddings()),
        "tied": _groups(model),
        "always_tied": _groups(apart),
        "tied_default": bool(getattr(t.AutoConfig.for_model(model_type), "tie_word_embeddings", False)),
        "unties": not t.AutoConfig.for_model(model_type, tie_word_embeddings=False).tie_word_embeddings,
        "conv1d_modules": sorted(conv1d),
        "float32_modules": sorted(model._keep_in_fp32_modules or ()),
        "last_module": _last(model),
        **names_apart(apart),
    }


def _last(model: Any) -> str | None:
    """Returns the path of the last parameter's module, ``*`` for its indices; None if that is no layer."""
    from torch import nn

    name = list(model.named_parameters())[-1][0]
    path, _, leaf = name.rpartition(".")
    if leaf != "weight" or not isinstance(model.get_submodule(path), nn.Linear):
        return None
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def names_apart(model: Any) -> dict[str, Any]:
    """Returns the ``renames`` and ``converters`` of a model: what its names on disk have of their own."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        apply_converters,
        apply_renamings,
        revert_weight_conversion,
    )

    given = get_model_conversion_mapping(model, add_legacy=False)
    prefixes = [item for item in given if isinstance(item, PrefixChange)]
    back = [item.reverse_transform() for item in reversed(given) if not isinstance(item, PrefixChange)]
    converters = [item for item in back if isinstance(item, WeightConverter)]
    renamings: list[Any] = [item for item in back if not isinstance(item, WeightConverter)]
    inner = f"{model.base_model_prefix}."
    renames: dict[str, list[str]] = {}
    written = set()
    for name in model.state_dict():
        if apply_converters(name, converters)[1] is None:
            on_disk = apply_renamings(name, renamings)
            written.add(on_disk)
            if on_disk != name:
                memory, disk = _where_they_differ(name, on_disk, inner)
                renames.setdefault(memory, [disk])
    saved = set(revert_weight_conversion(model, model.state_dict()))
    if not written <= saved or (not converters and written != saved):
        raise ValueError(f"{type(model).__name__} is saved otherwise than its conversion mapping says")
    for item in prefixes:
        if item.prefix_to_remove is None:
            raise ValueError(f"{type(model).__name__} adds a prefix that checkpoints lack: not foreseen here")
        scope = item.scope_prefix or ""
        names = [name for name, _ in model.named_modules()]
        memory = scope if scope in names or not scope else inner + scope
        usual = renames.setdefault(memory, [memory])
        usual.append(f"{usual[0]}.{item.prefix_to_remove}".lstrip("."))
    return {
        "renames": [{"memory": memory, "disk": disk} for memory, disk in sorted(renames.items())],
        "converters": [
            {
                "memory": [_plain(pattern) for pattern in item.source_patterns],
                "disk": [_plain(pattern) for pattern in item.target_patterns],
                "operations": [type(step.reverse_op).__name__ for step in reversed(item.operations)],
            }
            for item in reversed(converters)
        ],
    }


def _plain(pattern: str) -> str:
    """Returns a pattern of transformers as a dotted path; in those of experts ``*`` is an index."""
    return pattern.replace("\\", "").strip("^$.")


def _where_they_differ(memory: str, disk: str, inner: str) -> tuple[str, str]:
    """Returns the shortest start of two names that differs, indices as ``*``, without a shared prefix."""
    if memory.startswith(inner) and disk.startswith(inner):
        memory, disk = memory.removeprefix(inner), disk.removeprefix(inner)
    left, right = memory.split("."), disk.split(".")
    while min(len(left), len(right)) > 1 and left[-1] == right[-1]:
        left.pop()
        right.pop()
    starred = [".".join("*" if part.isdecimal() else part for part in parts) for parts in (left, right)]
    return starred[0], starred[1]


def table() -> dict[str, Any]:
    """Returns the whole table."""
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    rows = {name: describe(kind, name) for kind, names in MODELS.items() for name in names.split()}
    return {"source": f"transformers {transformers.__version__}", "architectures": rows}


def text(data: dict[str, Any]) -> str:
    """Returns the file's text: one line per model type."""
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in sorted(data["architectures"].items()))
    return f'{{\n "source": {json.dumps(data["source"])},\n "architectures": {{\n{rows}\n }}\n}}\n'


def main() -> int:
    """Writes or checks the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    arguments = parser.parse_args()
    new = text(table())
    if arguments.check:
        same = TABLE.read_text(encoding="utf-8") == new
        print("same" if same else f"{TABLE} differs from the installed transformers")
        return 0 if same else 1
    TABLE.write_text(new, encoding="utf-8")
    print(f"wrote {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
