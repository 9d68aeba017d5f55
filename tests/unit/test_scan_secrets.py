"""Keys are found wherever people leave them, and placeholders in documentation are not taken for keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adapterhub_tools as at
from tests.tiny_files import make_adapter

HUB_TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2" * 2
HEX_KEY = "0f1e2d3c4b5a69788796" * 2

SECRETS: list[tuple[str, bytes]] = [
    ("notes.txt", f"my_{HUB_TOKEN}".encode()),
    ("notes.txt", f"HF_TOKEN={HUB_TOKEN}".encode("utf-16")),
    ("notes.txt", b"\xfe\xff" + f"x\nHF_TOKEN={HUB_TOKEN}".encode("utf-16-be")),
    ("run.json", json.dumps({"log": f"the token:\n{HUB_TOKEN}\n"}).encode()),
    ("run.json", rb'{"url": "https:\/\/me:' + HEX_KEY.encode() + rb'@hub.example\/x"}'),
    ("train.log", f"WANDB_API_KEY={HEX_KEY}".encode()),
    ("run.yaml", f'wandb_key: "{HEX_KEY}"'.encode()),
    (".netrc", f"machine api.wandb.ai\n  login user\n  password {HEX_KEY}\n".encode()),
    ("notes.md", b"postgres://me:s3cretword@db.example/x"),
]

PLACEHOLDERS: list[bytes] = [
    b"git clone https://user:${HF_TOKEN}@huggingface.co/me/x",
    b"git clone https://user:$HF_TOKEN@huggingface.co/me/x",
    b"https://user:<token>@hub.example, https://user:password@hub.example, http://me:xxxx@proxy.example",
    b"WANDB_API_KEY=" + b"x" * 40,
    b"AWS_SECRET_ACCESS_KEY=" + b"x" * 40,
    b"machine learning on a machine: login first, then choose a password of eight characters",
    b"the branch_hf_lora_of_the_owner_of_this_long_name and half_hf_aB3d",
]


def kinds(folder: Path) -> set[tuple[str, str]]:
    return {(problem.kind, problem.file) for problem in at.scan(folder).problems}


@pytest.mark.parametrize(("name", "content"), SECRETS)
def test_a_key_is_found_and_not_shown(tmp_path: Path, name: str, content: bytes) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / name).write_bytes(content)
    report = at.scan(adapter)
    assert ("secret", name) in kinds(adapter)
    shown = json.dumps(report.to_json())
    assert not [key for key in (HUB_TOKEN, HEX_KEY, "s3cretword") if key in shown]


def test_the_line_in_a_file_of_two_byte_characters(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "notes.txt").write_bytes(f"one\ntwo\n{HUB_TOKEN}\n".encode("utf-16"))
    assert [p.loc for p in at.scan(adapter).problems if p.kind == "secret"] == ["line 3"]


@pytest.mark.parametrize("content", PLACEHOLDERS)
def test_a_placeholder_is_no_key(tmp_path: Path, content: bytes) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "README.md").write_bytes(b"# Card\n\n" + content + b"\n")
    assert kinds(adapter) == set()
