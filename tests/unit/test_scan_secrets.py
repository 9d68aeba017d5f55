"""Keys are found wherever people leave them, and placeholders in documentation are not taken for keys."""

from __future__ import annotations

import base64
import json
import time
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


def in_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def escaped(text: str, form: str) -> str:
    return "".join(form.format(ord(char)) for char in text)


WRAPPED = base64.encodebytes(f"{'some words ' * 5}{HUB_TOKEN}{' and more' * 6}".encode()).decode()
CLOUD_KEY = "aB3dE5gH7jK9mN1pQ2sT" * 2

ENCODED: list[tuple[str, str]] = [
    ("run.json", '{"token": "' + escaped(HUB_TOKEN, "\\u{:04x}") + '"}'),
    ("run.json", '{"token": "' + escaped(HUB_TOKEN[:3], "\\u{:04X}") + HUB_TOKEN[3:] + '"}'),
    ("run.py", "TOKEN = '" + escaped(HUB_TOKEN, "\\x{:02x}") + "'"),
    ("run.json", json.dumps({"env": json.dumps({"aws_secret_access_key": CLOUD_KEY})})),
    ("secret.yaml", f"data:\n  HF_TOKEN: {in_base64(HUB_TOKEN)}\n"),
    ("run.json", json.dumps({"log": f"the token:\n{in_base64(HUB_TOKEN)}\n"})),
    ("notes.txt", f"Authorization: Basic {in_base64(f'user:{HUB_TOKEN}')}"),
    ("notes.txt", base64.urlsafe_b64encode(f"é?>~~ {HUB_TOKEN}".encode()).decode().rstrip("=")),
    ("notes.txt", base64.b64encode(HUB_TOKEN.encode("utf-16-le")).decode()),
    ("notes.txt", WRAPPED),
    ("run.json", json.dumps({"mail": WRAPPED})),
    ("run.json", json.dumps({"url": in_base64(f"postgres://me:{HEX_KEY}@db.example/x")})),
]

PLACEHOLDERS: list[bytes] = [
    b"git clone https://user:${HF_TOKEN}@huggingface.co/me/x",
    b"git clone https://user:$HF_TOKEN@huggingface.co/me/x",
    b"https://user:<token>@hub.example, https://user:password@hub.example, http://me:xxxx@proxy.example",
    b"WANDB_API_KEY=" + b"x" * 40,
    b"AWS_SECRET_ACCESS_KEY=" + b"x" * 40,
    b"machine learning on a machine: login first, then choose a password of eight characters",
    b"in base64: " + base64.b64encode(b"the token is hf_" + b"x" * 36),
    b"a digest: "
    + b"0123456789abcdef" * 4
    + b" and a path of/many/parts/that/looks/like/base64/to/a/pattern",
    b"the branch_hf_lora_of_the_owner_of_this_long_name and half_hf_aB3d",
]


def test_a_run_that_is_too_long_hides_none_behind_it(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "notes.txt").write_text("A" * 5_000_000 + f"\n\n {in_base64(HUB_TOKEN)}\n")
    assert ("secret", "notes.txt") in kinds(adapter)


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


@pytest.mark.parametrize(("name", "content"), ENCODED)
def test_a_key_that_is_written_otherwise_is_found_and_not_shown(
    tmp_path: Path, name: str, content: str
) -> None:
    assert not [key for key in (HUB_TOKEN, HEX_KEY) if key in content]
    adapter = make_adapter(tmp_path / "a")
    (adapter / name).write_text(f"\n{content}", encoding="utf-8")
    (found,) = [problem for problem in at.scan(adapter).problems if problem.kind == "secret"]
    assert found.file == name
    first = next(number for number, line in enumerate(f"\n{content}".split("\n"), 1) if len(line) > 40)
    assert found.loc == f"line {first}"


def test_a_message_that_quotes_a_key_in_base64_does_not_show_it(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", auto_mapping={"parent_library": in_base64(HUB_TOKEN)})
    told = json.dumps(at.scan(adapter).to_json())
    assert "foreign-import" in told
    assert in_base64(HUB_TOKEN) not in told


def test_the_search_takes_no_longer_than_reading_a_tokenizer_should(tmp_path: Path) -> None:
    """Words that begin like keys, and base64 of no text, everywhere: some megabytes in about a second."""
    adapter = make_adapter(tmp_path / "a")
    words = b"sk-learn hf_model ghp_ xoxb- machine secret http://a.b/c wandb_ \\u0041 " * 20_000
    (adapter / "notes.txt").write_bytes(words + base64.b64encode(bytes(range(256)) * 12_000))
    start = time.monotonic()
    assert kinds(adapter) == set()
    assert time.monotonic() - start < 10
