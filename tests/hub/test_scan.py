"""Scanning a reference; what a push does not send and a pull does not take; other verbs with references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.forked_client import ForkedClient, Ran
from tests.hub.hub_process import HubServer
from tests.hub.small_adapter import write_adapter
from tests.tiny_files import base_tensors, counted, make_adapter, make_base, write_safetensors

HARM = b"cos\nsystem\n(S'true'\ntR."
EVIL_TEMPLATE = b'{"chat_template": "{{ x.__class__ }}"}'
HUB_TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2" * 2


def done(ran: Ran) -> Any:
    assert ran.code == 0, ran.err or ran.out
    return ran.json


def seed(server: HubServer, folder: Path, **more: bytes) -> str:
    repo = server.repo_name("scan")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    server.seed(repo, {**files, **more})
    return repo


def kinds(data: Any) -> set[tuple[str, str]]:
    return {(problem["kind"], problem["file"]) for problem in data["problems"]}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_a_reference_is_scanned_where_it_is(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(weights[:8], "little")
    start = 8 + size
    padding = (20 << 20) // 4 * 4  # above the size up to which files are fetched whole
    header = json.loads(weights[8:start])
    end = len(weights) - start
    header["base_model.model.big"] = {
        "dtype": "U8",
        "shape": [padding],
        "data_offsets": [end, end + padding],
    }
    text = json.dumps(header).encode()
    large = len(text).to_bytes(8, "little") + text + weights[start:] + bytes(padding)
    repo = seed(
        hub_server,
        adapter,
        **{
            "adapter_model.safetensors": large,
            "optimizer.pt": HARM,
            "tokenizer_config.json": EVIL_TEMPLATE,
            "run.py": f"token = '{HUB_TOKEN}'".encode(),
        },
    )
    before = len(hub_server.requests())
    ran = client.run("scan", f"hf://{repo}", "--json")
    assert ran.code == 1
    assert kinds(ran.json) == {
        ("pickle", "optimizer.pt"),
        ("pickle-code", "optimizer.pt"),
        ("template-code", "tokenizer_config.json"),
        ("secret", "run.py"),
        ("python-code", "run.py"),
    }
    assert HUB_TOKEN not in ran.out + ran.err
    ranges = [r["range"] for r in hub_server.requests()[before:] if r["range"]]
    assert ranges
    assert all(_length(item) < 1 << 20 for item in ranges)  # the large file was never read whole


def _length(text: str) -> int:
    first, _, last = text.removeprefix("bytes=").partition("-")
    return int(last) - int(first) + 1


def test_a_clean_reference_and_one_that_is_not_there(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = seed(hub_server, adapter)
    assert done(client.run("scan", f"hf://{repo}", "--json"))["ok"] is True
    assert client.run("scan", "hf://nobody/nothing", "--json").code == 9


def test_a_version_in_a_registry(client: ForkedClient, adapter: Path, tmp_path: Path) -> None:
    url = (tmp_path / "registry").as_uri() + "/team/x"
    done(client.run("push", adapter, url, "--json"))
    assert done(client.run("scan", url, "--json"))["ok"] is True


@pytest.mark.parametrize(
    ("name", "content", "options", "code", "kind"),
    [
        ("tokenizer_config.json", EVIL_TEMPLATE, (), 3, "template-code"),
        ("tokenizer.model", HARM, (), 3, "disguised"),
        ("training_args.bin", HARM, ("--include", "training_args.bin"), 0, "pickle"),
        ("notes.txt", HUB_TOKEN.encode(), ("--include", "notes.txt"), 3, "secret"),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', (), 0, "remote-code"),
    ],
    ids=["template", "disguised", "included", "included-secret", "auto-map"],
)
def test_what_a_push_refuses_or_notes(
    hub_server: HubServer,
    client: ForkedClient,
    adapter: Path,
    name: str,
    content: bytes,
    options: tuple[str, ...],
    code: int,
    kind: str,
) -> None:
    (adapter / name).write_bytes(content)
    repo = hub_server.repo_name("push")
    ran = client.run("push", adapter, f"hf://{repo}", "--json", *options)
    assert ran.code == code, ran.out
    assert HUB_TOKEN not in ran.out + ran.err
    if code:
        assert (kind, name) in kinds(ran.json)
        assert hub_server.state(repo) == {}
    else:
        assert any(note.startswith(f"scan: {kind}: {name}") for note in ran.json["notes"])
        assert name in hub_server.files(repo)


@pytest.mark.parametrize(
    ("name", "content", "code", "kind"),
    [
        ("tokenizer_config.json", EVIL_TEMPLATE, 3, "template-code"),
        ("tokenizer.model", HARM, 3, "disguised"),
        ("LICENSE", f"by {HUB_TOKEN}".encode(), 0, "secret"),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', 0, "remote-code"),
    ],
    ids=["template", "disguised", "secret", "auto-map"],
)
def test_what_a_pull_refuses_or_notes(
    hub_server: HubServer,
    client: ForkedClient,
    adapter: Path,
    tmp_path: Path,
    name: str,
    content: bytes,
    code: int,
    kind: str,
) -> None:
    repo = seed(hub_server, adapter, **{name: content})
    out = tmp_path / "out"
    ran = client.run("pull", f"hf://{repo}", out, "--json")
    assert ran.code == code, ran.out
    assert out.exists() == (code == 0)
    assert HUB_TOKEN not in ran.out + ran.err
    if code:
        assert (kind, name) in kinds(ran.json)
    else:
        assert any(note.startswith(f"scan: {kind}: {name}") for note in ran.json["notes"])


def test_extract_and_verify_take_references(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    tuned = make_base(tmp_path / "tuned")
    tensors = base_tensors()
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = counted("F32", *tensors[name][1], start=5)
    write_safetensors(tuned / "model.safetensors", tensors, metadata={"format": "pt"})
    repos = seed(hub_server, base), seed(hub_server, tuned)
    remote = [f"hf://{repo}" for repo in repos]
    done(client.run("extract", *remote, tmp_path / "remote", "--rank", "8", "--json"))
    done(client.run("extract", base, tuned, tmp_path / "local", "--rank", "8", "--json"))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "remote" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()

    adapter = make_adapter(tmp_path / "adapter")
    merged = tmp_path / "merged"
    done(client.run("merge", base, adapter, merged, "--json"))
    pushed = hub_server.repo_name("adapter")
    done(client.run("push", adapter, f"hf://{pushed}", "--json"))
    assert done(client.run("verify", remote[0], f"hf://{pushed}", merged, "--json"))["ok"] is True
    assert client.run("verify", remote[1], f"hf://{pushed}", merged, "--json").code == 1
