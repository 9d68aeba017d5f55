"""References where paths are expected: headers by range, a base that streams, and the same bytes as local."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.hub.forked_client import ForkedClient, Ran
from tests.hub.hub_process import HubServer
from tests.hub.small_adapter import weights, write_adapter
from tests.tiny_files import Tensor, base_config, make_adapter, make_base, write_json, write_safetensors

MAX_REQUESTS = 10
MAX_BYTES = 200_000


def done(ran: Ran) -> Any:
    assert ran.code == 0, ran.err or ran.out
    return ran.json


def seed_folder(server: HubServer, folder: Path, **options: Any) -> str:
    repo = server.repo_name(folder.name)
    server.seed(repo, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}, **options)
    return repo


def random_base(folder: Path, *, rows: int, shards: int) -> Path:
    """A base of the tiny shape whose embedding is large enough to need several windows."""
    folder.mkdir()
    from tests.tiny_files import base_tensors

    tensors = base_tensors()
    # A pattern that no window repeats: its length and that of a window have no common divisor but 4.
    words = struct.unpack("<10007I", random.Random(7).randbytes(4 * 10007))
    pattern = struct.pack("<10007I", *(0x3F800000 | word & 0x7FFFFF for word in words))
    values = (pattern * (rows * 8 // 10007 + 1))[: rows * 8 * 4]
    tensors["model.embed_tokens.weight"] = ("F32", (rows, 8), values)
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
    else:
        weight_map = {}
        for number in range(shards):
            part: dict[str, Tensor] = {name: tensors[name] for name in names[number::shards]}
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            write_safetensors(folder / file, part)
            weight_map.update(dict.fromkeys(part, file))
        total = sum(len(data) for _, _, data in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", base_config(vocab_size=rows))
    write_json(folder / "tokenizer_config.json", {"model_max_length": 8})
    return folder


def test_inspect_reads_headers_only(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    repo = hub_server.repo_name("look")
    done(client.run("push", adapter, f"hf://{repo}", "--json"))
    before = len(hub_server.requests())
    remote = done(client.run("inspect", f"hf://{repo}", "--json"))
    asked = hub_server.requests()[before:]
    assert len(asked) <= MAX_REQUESTS
    assert [r for r in asked if "blobs" in r["path"]]
    assert all(r["range"] == "bytes=0-65535" for r in asked if "blobs" in r["path"])
    local = done(client.run("inspect", adapter, "--json"))
    assert remote.pop("path") == f"hf://{repo}"
    local.pop("path")
    assert remote == local


def test_inspect_of_a_sharded_base(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", rows=20_000, shards=3)
    repo = seed_folder(hub_server, base)
    remote = done(client.run("inspect", f"hf://{repo}@main", "--json"))
    local = done(client.run("inspect", base, "--json"))
    assert {**remote, "path": ""} == {**local, "path": ""}
    asked = [r for r in hub_server.requests() if r["range"]]
    assert asked
    assert all(int(r["range"].rpartition("-")[2]) < MAX_BYTES for r in asked)


def test_a_server_that_ignores_ranges_is_not_downloaded_from(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    repo = seed_folder(hub_server, write_adapter(tmp_path / "adapter"))
    hub_server.arm("range_ignored", origin="cdn", times=-1)
    ran = client.run("inspect", f"hf://{repo}", "--json")
    assert ran.code == 9
    assert ran.json["problems"][0]["kind"] == "range-ignored"


def test_validate_checks_all_of_a_remote_adapter(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    repo = hub_server.repo_name("check")
    done(client.run("push", adapter, f"hf://{repo}", "--json"))
    report = done(client.run("validate", f"hf://{repo}", "--json"))
    assert report["path"] == f"hf://{repo}"
    assert {"values", "file list", "adapter digest"} <= set(report["checked"])
    data = bytearray(weights(1))
    data[-4:] = b"\x00\x00\xc0\x7f"
    (adapter / "adapter_model.safetensors").write_bytes(data)
    (adapter / "adapter_manifest.json").unlink()
    bad = seed_folder(hub_server, adapter)
    ran = client.run("validate", f"hf://{bad}", "--json")
    assert ran.code == 1
    assert {problem["kind"] for problem in ran.json["problems"]} == {"non-finite"}


def test_a_refused_adapter_is_a_finding_and_the_others_are_checked_all_the_same(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    good = write_adapter(tmp_path / "good")
    done(client.run("init", good, "--json"))
    bad = write_adapter(tmp_path / "bad", seed=2)
    (bad / "adapter_manifest.json").write_bytes((good / "adapter_manifest.json").read_bytes())
    reference = f"hf://{seed_folder(hub_server, bad)}"
    ran = client.run("validate", reference, good, "--json")
    assert ran.code == 1, ran.err
    refused, sound = ran.json["adapters"]
    assert (refused["path"], refused["checked"]) == (reference, [])
    assert {problem["error"] for problem in refused["problems"]} == {"IntegrityError"}
    assert sound["ok"]
    sarif = client.run("validate", reference, good, "--format", "sarif")
    assert sarif.code == 1
    assert sarif.json["runs"][0]["results"]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_base_that_streams_gives_the_same_bytes(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path, shards: int
) -> None:
    base = random_base(tmp_path / "base", rows=300_000, shards=shards)  # 9.6 MB: three windows
    adapter = make_adapter(tmp_path / "adapter")
    base_repo, repo = seed_folder(hub_server, base), seed_folder(hub_server, adapter)
    report = done(client.run("merge", f"hf://{base_repo}", f"hf://{repo}", tmp_path / "remote", "--json"))
    done(client.run("merge", base, adapter, tmp_path / "local", "--json"))
    local = {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir()}
    remote = {p.name: p.read_bytes() for p in (tmp_path / "remote").iterdir()}
    assert set(local) == set(remote)
    assert {name for name in local if local[name] != remote[name]} <= {"merge_receipt.json"}
    assert any("streamed" in note for note in report["notes"])
    assert done(client.run("hash", f"hf://{base_repo}", "--json"))["digest"] == report["base_digest"]


def test_checking_the_targets_alone_reads_the_targets_alone(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    base = random_base(tmp_path / "base", rows=2_500_000, shards=1)  # 80 MB of embedding that nothing targets
    adapter = make_adapter(tmp_path / "adapter")
    done(client.run("init", adapter, "--base", base, "--json"))
    repo = seed_folder(hub_server, base)
    done(client.run("validate", adapter, "--base", f"hf://{repo}", "--check-base", "targets", "--json"))
    spans = [r["range"].removeprefix("bytes=").split("-") for r in hub_server.requests("cdn") if r["range"]]
    assert sum(int(end) - int(begin) + 1 for begin, end in spans) < 10_000_000
    other = random_base(tmp_path / "other", rows=2_500_000, shards=1)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-200] ^= 1  # in a target of the second layer, or in the norm behind it
    (other / "model.safetensors").write_bytes(data)
    repo = seed_folder(hub_server, other)
    ran = client.run("validate", adapter, "--base", f"hf://{repo}", "--json")
    assert ran.code == 1
    assert "base-digest" in {problem["kind"] for problem in ran.json["problems"]}


def test_a_streamed_base_survives_cuts_and_stalls(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    base = random_base(tmp_path / "base", rows=300_000, shards=1)
    adapter = make_adapter(tmp_path / "adapter")
    repo = seed_folder(hub_server, base)
    hub_server.arm("rst", origin="cdn", skip=1, times=2, fraction=0.4)
    hub_server.arm("fin", origin="cdn", times=1, fraction=0.7)
    done(client.run("merge", f"hf://{repo}", adapter, tmp_path / "remote", "--json"))
    assert len(hub_server.fired()) == 3
    done(client.run("merge", base, adapter, tmp_path / "local", "--json"))
    name = "model.safetensors"
    assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["header", "first", "second", "third"])
def test_a_streamed_base_with_other_bytes_leaves_no_output(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path, which: int
) -> None:
    base = random_base(tmp_path / "base", rows=300_000, shards=1)
    adapter = make_adapter(tmp_path / "adapter")
    repo = seed_folder(hub_server, base)
    hub_server.arm("flip", origin="cdn", skip=which, times=1, position=60_000, bit=0)
    ran = client.run("merge", f"hf://{repo}", adapter, tmp_path / "out", "--json")
    assert hub_server.fired()
    assert ran.code == 7, ran.out
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_other_commands_take_a_remote_adapter(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    repo = seed_folder(hub_server, adapter)
    for source, out in ((f"hf://{repo}", tmp_path / "remote"), (adapter, tmp_path / "local")):
        done(client.run("svd-shrink", source, out, "--rank", "1", "--json"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_base_of_the_wrong_kind_is_named(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    repo = seed_folder(hub_server, base)
    ran = client.run("merge", base, f"hf://{repo}", tmp_path / "out", "--json")
    assert ran.code == 3
    pickle = hub_server.repo_name("pickle")
    hub_server.seed(pickle, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert client.run("inspect", f"hf://{pickle}", "--json").code == 4


HOSTILE = [
    "hf://a/b/../../c",
    "hf://../x",
    "hf://a/b@..",
    "hf://a/b@x%2F..%2Fy",
    "hf://a/b@main/../x",
    "hf://a/b@main/.git/hooks",
    "hf://a/b\\c",
    "hf://a/b@v1\nX-Header: 1",
    "hf://a/b@v?x=1",
    "hf://a--b/c",
    "hf://-a/b",
    "hf://a/b.git",
    "hf://",
    "hf://a/b@",
    "file://host/x/a/b",
    "file:///srv/../etc/a/b",
    "s3://user:pass@bucket/a/b",
    "simplecache::s3://b/a/b",
]


@pytest.mark.parametrize("reference", HOSTILE)
def test_hostile_references_reach_no_server(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path, reference: str
) -> None:
    ran = client.run("pull", reference, tmp_path / "out", "--json")
    assert ran.code in (3, 4), (ran.code, ran.out)
    assert hub_server.requests() == []
    assert not (tmp_path / "out").exists()
