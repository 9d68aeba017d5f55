"""The content digest of a base: what the tensors are, not how they are stored; the cache is never wrong."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import adapterhub_tools as at
from tests.tiny_files import Tensor, base_tensors, make_base, write_json, write_safetensors


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int) -> None:
    names = list(tensors)
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = names[number::count]
        write_safetensors(folder / file, {name: tensors[name] for name in part}, pad=8 * number)
        weight_map.update(dict.fromkeys(part, file))
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


@pytest.mark.parametrize("shards", [2, 7])
def test_shards_order_padding_and_metadata_do_not_matter(tmp_path: Path, shards: int) -> None:
    one = at.content_digest(make_base(tmp_path / "one"), cache=False)
    tensors = list(base_tensors().items())
    random.Random(shards).shuffle(tensors)
    (tmp_path / "many").mkdir()
    write_shards(tmp_path / "many", dict(tensors), shards)
    many = at.content_digest(tmp_path / "many", cache=False)
    assert many.digest == one.digest
    assert len(many.files) == shards
    assert many.config_digest is None


def test_every_flipped_bit_rename_and_swap_matters(tmp_path: Path) -> None:
    tensors = base_tensors()
    names = list(tensors)
    seen = {at.content_digest(make_base(tmp_path / "base"), cache=False).digest}
    path = tmp_path / "changed.safetensors"

    def digest_of(changed: dict[str, Tensor]) -> str:
        write_safetensors(path, changed)
        return at.content_digest(path, cache=False).digest

    chance = random.Random(5)
    for number in range(20):
        name = chance.choice(names)
        dtype, shape, data = tensors[name]
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        seen.add(digest_of({**tensors, name: (dtype, shape, bytes(flipped))}))
        assert len(seen) == number + 2
    a, b = names[1], "model.layers.1.self_attn.q_proj.weight"
    swapped = {**tensors, a: tensors[b], b: tensors[a]}
    renamed = {name + "x" * (name == a): tensor for name, tensor in tensors.items()}
    dtype = {**tensors, a: ("F64", (4, *tensors[a][1][1:]), tensors[a][2])}
    before = len(seen)
    seen |= {digest_of(swapped), digest_of(renamed), digest_of(dtype)}
    assert len(seen) == before + 3


def test_the_config_has_its_own_digest(tmp_path: Path) -> None:
    a = at.content_digest(make_base(tmp_path / "a"), cache=False)
    b = at.content_digest(make_base(tmp_path / "b", torch_dtype="bfloat16", _name_or_path="x"), cache=False)
    c = at.content_digest(make_base(tmp_path / "c", rope_theta=5.0), cache=False)
    assert a.digest == b.digest == c.digest
    assert a.config_digest == b.config_digest != c.config_digest


def test_algorithms(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    found = at.content_digest(base, algorithm="sha256")
    assert found.digest.startswith("tensor-tree-sha256-v1:")
    assert str(found) == found.digest
    with pytest.raises(at.UnsupportedError, match="blake3, sha256"):
        at.content_digest(base, algorithm="md5")


def test_a_cached_digest_is_used_and_a_changed_file_is_not_taken_for_the_old_one(
    tmp_path: Path, own_cache: Path
) -> None:
    base = make_base(tmp_path / "base")
    weights = base / "model.safetensors"
    os.utime(weights, ns=(10**18, 10**18))  # old enough to be cached
    first = at.content_digest(base)
    assert own_cache.exists()
    assert at.content_digest(base) == first
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = at.content_digest(base)
    assert second.digest != first.digest
    assert second.digest == at.content_digest(base, cache=False).digest


def test_a_broken_cache_is_reported_and_harmless(tmp_path: Path, own_cache: Path) -> None:
    base = make_base(tmp_path / "base")
    own_cache.write_bytes(b"this is no database" * 100)
    found = at.content_digest(base)
    assert found.digest == at.content_digest(base, cache=False).digest
    assert found.warnings


def test_without_cache_none_is_made(tmp_path: Path, own_cache: Path) -> None:
    at.content_digest(make_base(tmp_path / "base"), cache=False)
    assert not own_cache.exists()
