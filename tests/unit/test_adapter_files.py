"""Adapters on disk: their weights, config and manifest, and what is no adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_tools.errors import AdapterError, FormatError, StoreError, UnsupportedError
from adapterhub_tools.store.checkpoint import folder_kind, open_adapter_files
from tests.unit.safetensors_bytes import write_file


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_file(tmp_path / "base" / "model.safetensors", a=(2,))
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    root = tmp_path / "adapter"
    write_file(root / "adapter_model.safetensors", a=(2,))
    (root / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return root


def refused_adapter(path: Path, error: type[AdapterError] = FormatError) -> list[tuple[str, str]]:
    with pytest.raises(AdapterError) as caught:
        open_adapter_files(path)
    assert type(caught.value) is error
    assert all(problem.remedy for problem in caught.value.problems)
    return [(problem.kind, problem.file) for problem in caught.value.problems]


def test_an_adapter(adapter: Path) -> None:
    (adapter / "README.md").touch()
    (adapter / "checkpoint-1").mkdir()
    found = open_adapter_files(adapter)
    assert found.root == adapter
    assert found.config == {"peft_type": "LORA"}
    assert (found.config_file, found.weights_file) == ("adapter_config.json", "adapter_model.safetensors")
    assert found.header is not None
    assert list(found.header.tensors) == ["a"]
    assert found.manifest is None
    assert found.other == ("README.md", "checkpoint-1/")
    assert found.pickles == ()
    with found.open_weights() as source:
        assert source.name == "adapter_model.safetensors"
    (adapter / "adapter_manifest.json").write_text('{"x": 1}')
    assert open_adapter_files(adapter).manifest == {"x": 1}
    assert open_adapter_files(adapter / "adapter_model.safetensors").config == {"peft_type": "LORA"}


def test_weights_of_another_name(tmp_path: Path) -> None:
    write_file(tmp_path / "pytorch_lora_weights.safetensors", a=(2,))
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        found = open_adapter_files(path)
        assert (found.config, found.weights_file) == (None, "pytorch_lora_weights.safetensors")


def test_a_pickled_adapter_is_described_not_opened(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    found = open_adapter_files(adapter)
    assert (found.weights_file, found.header, found.pickles) == (None, None, ("adapter_model.bin",))
    with pytest.raises(
        UnsupportedError, match=r"^adapter_model.bin: the weights are a Python pickle.*Convert it"
    ):
        found.open_weights()
    assert refused_adapter(adapter / "adapter_model.bin", UnsupportedError) == [
        ("not-safetensors", "adapter_model.bin")
    ]


def test_a_config_alone_is_described(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    found = open_adapter_files(adapter)
    assert (found.weights_file, found.pickles) == (None, ())
    with pytest.raises(UnsupportedError, match="there is no 'adapter_model"):
        found.open_weights()


def test_a_safetensors_copy_beside_the_pickle_is_used(adapter: Path) -> None:
    (adapter / "adapter_model.bin").touch()
    found = open_adapter_files(adapter)
    assert (found.weights_file, found.pickles) == ("adapter_model.safetensors", ("adapter_model.bin",))


def test_weights_changed_since_the_header_was_read(adapter: Path) -> None:
    found = open_adapter_files(adapter)
    write_file(adapter / "adapter_model.safetensors", a=(3,))
    with pytest.raises(StoreError, match="the file was changed"):
        found.open_weights()


def test_adapters_that_are_none(tmp_path: Path, base: Path, adapter: Path) -> None:
    assert refused_adapter(base) == [("base-as-adapter", "base")]
    assert refused_adapter(tmp_path) == [("no-adapter", tmp_path.name)]
    assert refused_adapter(tmp_path / "nothing", StoreError) == [("not-found", "nothing")]
    assert refused_adapter(adapter / "adapter_config.json", UnsupportedError) == [
        ("not-safetensors", "adapter_config.json")
    ]
    for name in ("x.safetensors", "y.safetensors"):
        write_file(tmp_path / "several" / name, a=(1,))
    assert refused_adapter(tmp_path / "several") == [("ambiguous-adapter", "several")]


def test_every_problem_of_an_adapter_is_listed(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"r": NaN}')
    (adapter / "adapter_manifest.json").write_text("[]")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert refused_adapter(adapter) == [
        ("json-number", "adapter_config.json"),
        ("json-type", "adapter_manifest.json"),
        ("header-too-small", "adapter_model.safetensors"),
    ]


def test_weights_that_link_out_of_the_folder(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter.parent / "outside")
    (adapter / "adapter_model.safetensors").symlink_to("../outside")
    assert refused_adapter(adapter) == [("path", "adapter_model.safetensors")]


def test_kinds_of_folder(tmp_path: Path, base: Path, adapter: Path) -> None:
    assert (
        folder_kind(base) == folder_kind(base / "model.safetensors") == folder_kind(tmp_path) == "checkpoint"
    )
    assert folder_kind(adapter) == folder_kind(adapter / "adapter_model.safetensors") == "adapter"
    (adapter / "adapter_config.json").unlink()
    assert folder_kind(adapter) == "adapter"
    assert folder_kind(adapter / "adapter_model.safetensors") == "adapter"
