"""Names in memory and on disk: indices, prefixes, several names on disk, weights that are joined."""

from __future__ import annotations

import pytest

from adapterhub_tools.architectures import lookup, source, table

PAIRS = [
    ("gpt_neox", "lm_head", ("embed_out",)),
    ("gpt_neox", "gpt_neox.layers.0.mlp", ()),
    ("gemma3", "lm_head.weight", ("language_model.lm_head.weight",)),
    ("gemma3", "model.language_model.layers.3.mlp", ("language_model.model.layers.3.mlp",)),
    ("vit", "vit.layers.11.attention.q_proj", ("vit.encoder.layer.11.attention.attention.query",)),
    ("vit", "layers.11.mlp.fc2.bias", ("encoder.layer.11.output.dense.bias",)),
    ("vit", "vit.layers.2.layernorm_after", ("vit.encoder.layer.2.layernorm_after",)),
    ("vit", "vit.layersX.2", ()),
    ("vit", "vit.embeddings.cls_token", ()),
    ("gemma3", "model.vision_tower.post", ("vision_tower.post", "vision_tower.vision_model.post")),
    ("clip_text_model", "encoder.layers.0", ("encoder.layers.0", "text_model.encoder.layers.0")),
    ("mixtral", "model.layers.1.mlp.gate", ("model.layers.1.block_sparse_moe.gate",)),
    ("llama", "model.layers.1.mlp.gate_proj", ()),
]


@pytest.mark.parametrize(("model_type", "memory", "disk"), PAIRS)
def test_there_and_back(model_type, memory, disk):
    renames = lookup(model_type).renames
    assert renames.to_disk(memory) == disk
    for name in disk:
        assert renames.to_memory(name) == memory


def test_the_stored_one_of_two_names():
    known = lookup("gemma3")
    name = "model.vision_tower.post.weight"
    assert known.on_disk(name, []) == "vision_tower.post.weight"
    old = "vision_tower.vision_model.post.weight"
    assert known.on_disk(name, [old]) == old
    assert known.in_memory(old) == name
    assert known.on_disk("model.other", []) == "model.other"


def test_no_rename_maps_two_modules_to_one():
    for row in table().values():
        disk = [name for pair in row.renames.pairs for name in pair.disk]
        assert len(disk) == len(set(disk))
        assert len({pair.memory for pair in row.renames.pairs}) == len(row.renames.pairs)
        for pair in row.renames.pairs:
            assert all(name.count("*") == pair.memory.count("*") for name in pair.disk)


def test_weights_that_are_joined():
    (gate_up, down) = lookup("qwen3_moe").converters
    assert gate_up.operations == ("MergeModulelist", "Concatenate")
    assert gate_up.disk == ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight")
    assert gate_up.makes("model.layers.0.mlp.experts.gate_up_proj")
    assert gate_up.makes("model.layers.0.mlp.experts")
    assert not gate_up.makes("model.layers.0.mlp.gate")
    assert not gate_up.makes("model.layers.0.mlp.experts.3.gate_proj")
    assert down.operations == ("MergeModulelist",)
    assert not lookup("llama").converters


def test_the_config_of_t5_alone_cannot_untie():
    assert {name for name, row in table().items() if not row.unties} == {"t5", "mt5"}


def test_the_source_has_a_version():
    assert source().startswith("transformers 5.")
