"""Digests of configs and files, and the text form of digests."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from adapterhub_tools.errors import AdapterError, FormatError, StoreError, UnsupportedError
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.store.checkpoint import open_checkpoint
from adapterhub_tools.store.digest import (
    DEFAULT,
    TensorHasher,
    config_digest,
    digest_checkpoint,
    file_sha256,
    root_digest,
    split_digest,
)
from tests.unit.safetensors_bytes import write_file


def test_config_digest() -> None:
    config = {"name": "é", "a": {"dtype": "x"}, "model_type": "llama", "eps": 1e-05}
    text = '{"a":{"dtype":"x"},"eps":1e-05,"model_type":"llama","name":"é"}'
    expected = "config-sha256-v1:6957ea19dc8d205b91b50c4831035c21733c86629407cf0b09c3b5ca1c107d89"
    assert config_digest(config) == expected
    assert expected.endswith(hashlib.sha256(text.encode()).hexdigest())
    stored = {"_name_or_path": "x", "transformers_version": "5", "torch_dtype": "float16", "dtype": "float16"}
    assert config_digest({**config, **stored}) == expected
    assert config_digest({**config, "rope_theta": 1.0}) != expected
    assert (
        config_digest({**config, "a": {"dtype": "y"}}) != expected
    )  # only the top level says how it is stored


def test_file_sha256(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = random.Random(3).randbytes(3_000_000)
    path.write_bytes(data)
    assert file_sha256(path) == hashlib.sha256(data).hexdigest()
    path.write_bytes(b"")
    assert file_sha256(path) == hashlib.sha256(b"").hexdigest()
    with pytest.raises(FormatError):
        file_sha256(tmp_path)
    with pytest.raises(StoreError):
        file_sha256(tmp_path / "nothing")


def test_split_digest() -> None:
    text = f"{DEFAULT}:{'0a' * 32}"
    assert split_digest(text) == (DEFAULT, "0a" * 32)
    for bad in (
        "",
        "0a" * 32,
        text[:-1],
        text + "0",
        text.upper(),
        f" {text}",
        f"{text}\n",
        None,
        5,
        f"{DEFAULT}:",
    ):
        with pytest.raises(FormatError, match="expected '<algorithm>:"):
            split_digest(bad, file="adapter_manifest.json", loc="base.digest")
    with pytest.raises(
        UnsupportedError, match=r"^m: base: unknown digest algorithm 'md5'; known are tensor-tree"
    ) as caught:
        split_digest(f"md5:{'0' * 64}", file="m", loc="base")
    assert caught.value.problems[0].remedy


def test_an_unknown_algorithm(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", a=(2,))
    for call in (
        lambda: root_digest("md5", {}),
        lambda: digest_checkpoint(open_checkpoint(tmp_path), algorithm="md5"),
        lambda: TensorHasher("", TensorSpec(name="x", dtype="U8", shape=())),
    ):
        with pytest.raises(AdapterError) as caught:
            call()
        assert type(caught.value) is UnsupportedError
