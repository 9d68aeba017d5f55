"""A base on the Hub that is quantised, or was while it was loaded: the same bytes as from a local folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_tools import registry
from adapterhub_tools.model.quant_scheme import QuantScheme
from tests.hub.forked_client import ForkedClient
from tests.hub.hub_process import HubServer
from tests.hub.test_remote import done, seed_folder
from tests.tiny_files import base_config, make_adapter, make_base, write_json

FLAGS = ["--quant", "nf4,double", "--compute-dtype", "bf16"]


def quantised(plain: Path, folder: Path) -> Path:
    """The linear layers of a base in NF4 with double quantisation."""
    folder.mkdir()
    scheme = QuantScheme.parse("nf4,double")
    codec = registry.load("quant", "nf4").IMPLEMENTATION
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        encoder = codec.encoder(scheme, tuple(weight.shape), weight.dtype)
        data = encoder.add(weight)
        rest, parts = encoder.finish()
        for role, spec in encoder.part_specs(name).items():
            values = torch.cat([data, rest]) if role == "data" else parts[role]
            tensors[spec.name] = values.reshape(spec.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    how = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    write_json(
        folder / "config.json", base_config(quantization_config={"quant_method": "bitsandbytes", **how})
    )
    return folder


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """``plain`` and ``stored``, two bases, and ``adapter``."""
    make_base(tmp_path / "plain", dtype="BF16")
    quantised(tmp_path / "plain", tmp_path / "stored")
    make_adapter(tmp_path / "adapter")
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "merge_receipt.json"}


@pytest.mark.parametrize(
    ("base", "options"),
    [("stored", []), ("stored", ["--onto", "quantized", "--allow-loss"]), ("plain", FLAGS)],
)
def test_it_is_merged_as_a_local_one(
    hub_server: HubServer, client: ForkedClient, scene: Path, base: str, options: list[str]
) -> None:
    repo = seed_folder(hub_server, scene / base)
    command = ["merge", f"hf://{repo}", scene / "adapter"]
    remote = done(client.run(*command, scene / "remote", "--json", *options))
    done(client.run("merge", scene / base, scene / "adapter", scene / "local", "--json", *options))
    assert files_of(scene / "remote") == files_of(scene / "local")
    assert any(f"brought into a temporary folder from hf://{repo}" in note for note in remote["notes"])
    assert not any("streamed" in note or "left behind" in note for note in remote["notes"])


def test_what_needs_no_weights_reads_headers_alone(
    hub_server: HubServer, client: ForkedClient, scene: Path
) -> None:
    """A dry run: its plan is that of the local base."""
    repo = seed_folder(hub_server, scene / "stored")
    planned = done(client.run("merge", f"hf://{repo}", scene / "adapter", scene / "x", "--dry-run", "--json"))
    local = done(client.run("merge", scene / "stored", scene / "adapter", scene / "x", "--dry-run", "--json"))
    for name in ("changed", "expected", "tensors", "nbytes"):
        assert planned[name] == local[name], name
    assert not any("brought" in note for note in planned["notes"])


def test_it_is_validated_recorded_and_hashed(
    hub_server: HubServer, client: ForkedClient, scene: Path
) -> None:
    repo = seed_folder(hub_server, scene / "stored")
    done(client.run("init", scene / "adapter", "--base", f"hf://{repo}", "--json"))
    manifest = done(client.run("inspect", scene / "adapter", "--json"))
    assert "nf4" in str(manifest).lower()
    for base in (f"hf://{repo}", scene / "stored"):
        done(client.run("validate", scene / "adapter", "--base", base, "--json"))
    ran = client.run("validate", scene / "adapter", "--base", scene / "plain", "--json")
    assert ran.code == 1


@pytest.mark.parametrize("which", [0, 1])
def test_other_bytes_on_the_way_never_reach_the_output(
    hub_server: HubServer, client: ForkedClient, scene: Path, which: int
) -> None:
    repo = seed_folder(hub_server, scene / "stored")
    hub_server.arm("flip", origin="cdn", skip=which, times=1, position=4_000, bit=0)
    ran = client.run("merge", f"hf://{repo}", scene / "adapter", scene / "out", "--json")
    assert hub_server.fired()
    if ran.code == 0:  # it was noticed and fetched again
        done(client.run("merge", scene / "stored", scene / "adapter", scene / "local", "--json"))
        assert files_of(scene / "out") == files_of(scene / "local")
    else:
        assert ran.code in (3, 7), ran.out  # a state that is no JSON any more, or another digest
        assert not (scene / "out").exists()
    assert not list(scene.glob(".out*"))
