"""What a push sends, what it refuses to send, and what it leaves on the Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub_tools.hub.card import BEGIN, END
from tests.hub.client_process import real_client
from tests.hub.forked_client import ForkedClient, Ran
from tests.hub.hub_process import HubServer
from tests.hub.small_adapter import weights, write_adapter

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_manifest.json", "adapter_model.safetensors"}


def push(client: ForkedClient, adapter: Path, repo: str, *options: str, **env: str) -> Ran:
    return client.run("push", adapter, f"hf://{repo}", "--json", *options, **env)


def done(ran: Ran) -> Any:
    assert ran.code == 0, ran.err or ran.out
    return ran.json


def refused(ran: Ran, code: int, kind: str) -> Any:
    assert ran.code == code, (ran.code, ran.out, ran.err)
    problems = ran.json["problems"]
    assert kind in {problem["kind"] for problem in problems}, problems
    assert all(problem["remedy"] for problem in problems)
    return problems


def changes(report: Any) -> dict[str, str]:
    return {file["path"]: file["change"] for file in report["files"]}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def commits(server: HubServer, repo: str) -> int:
    return len(server.state(repo)["commits"])


def test_a_new_adapter_is_one_commit_with_manifest_and_card(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = hub_server.repo_name("new")
    report = done(push(client, adapter, repo))
    files = hub_server.files(repo)
    assert set(files) - {".gitattributes"} == ADAPTER_FILES
    assert files["adapter_model.safetensors"] == weights(1)
    assert files["adapter_manifest.json"] == (adapter / "adapter_manifest.json").read_bytes()
    assert report["created_commit"] is True
    assert report["commit"] == hub_server.head(repo)
    state = hub_server.state(repo)
    assert state["commits"][report["commit"]]["parent"] == report["parent"]
    assert state["private"] is False
    assert changes(report) == dict.fromkeys(ADAPTER_FILES, "add")
    assert all(file["sha256"] == hashlib.sha256(files[file["path"]]).hexdigest() for file in report["files"])


def test_the_card_says_what_the_hub_and_people_need(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = hub_server.repo_name("card")
    done(client.run("init", adapter, "--licence", "apache-2.0", "--tag", "example", "--json"))
    done(push(client, adapter, repo))
    env = hub_server.env(adapter.parent / "home", HF_HUB_OFFLINE="0")
    card = real_client(
        "card = hub.ModelCard.load(args['repo']); result = [card.data.to_dict(), card.text]", env, repo=repo
    )
    metadata, text = card
    assert metadata["base_model"] == "example/base"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft"
    assert metadata["license"] == "apache-2.0"
    assert {"example", "lora"} <= set(metadata["tags"])
    digest = json.loads((adapter / "adapter_manifest.json").read_bytes())["digest"]
    weights_sha = hashlib.sha256(weights(1)).hexdigest()
    for said in (
        "| Rank | 32 |",
        "| Method | lora |",
        digest,
        weights_sha,
        "adaptertool pull hf://",
        "merge",
    ):
        assert said in text, said


def test_an_unchanged_adapter_makes_no_commit(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = hub_server.repo_name("same")
    first = done(push(client, adapter, repo))
    before = commits(hub_server, repo)
    for _ in range(2):
        again = done(push(client, adapter, repo))
        assert again["created_commit"] is False
        assert again["commit"] == first["commit"]
        assert set(changes(again).values()) == {"same"}
    assert commits(hub_server, repo) == before


def test_people_keep_their_card_and_the_table_is_renewed(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = hub_server.repo_name("words")
    done(push(client, adapter, repo))
    text = hub_server.files(repo)["README.md"].decode()
    edited = text.replace(BEGIN, "My own words.\n\n" + BEGIN).replace(
        "library_name: peft", "library_name: peft\nlanguage: fi"
    )
    hub_server.seed(repo, {**hub_server.files(repo), "README.md": edited.encode()})
    (adapter / "adapter_manifest.json").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(weights(2))
    report = done(push(client, adapter, repo))
    assert changes(report)["README.md"] == "change"
    renewed = hub_server.files(repo)["README.md"].decode()
    assert "My own words." in renewed
    assert "language: fi" in renewed
    assert renewed.count(BEGIN) == renewed.count(END) == 1
    assert hashlib.sha256(weights(2)).hexdigest() in renewed
    assert hashlib.sha256(weights(1)).hexdigest() not in renewed


def test_a_card_in_the_folder_is_sent_and_an_unfilled_template_is_not(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    repo = hub_server.repo_name("mine")
    done(push(client, adapter, repo))
    mine = hub_server.files(repo)["README.md"].decode()
    assert "# Mine" in mine
    assert "license: mit" in mine
    template = "---\nbase_model: /data/base\n---\n# Model Card for Model ID\n" + (
        "[More Information Needed]\n" * 20
    )
    (adapter / "README.md").write_text(template, encoding="utf-8")
    done(push(client, adapter, repo))
    kept = hub_server.files(repo)["README.md"].decode()
    assert "# Mine" in kept
    assert "More Information Needed" not in kept
    assert "/data" not in kept


def test_a_dry_run_sends_nothing_and_says_what_would_change(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = hub_server.repo_name("dry")
    report = done(push(client, adapter, repo, "--dry-run"))
    assert report["commit"] is None
    assert changes(report) == dict.fromkeys(ADAPTER_FILES, "add")
    assert hub_server.state(repo) == {}
    assert not (adapter / "adapter_manifest.json").exists()
    assert {record["method"] for record in hub_server.requests()} == {"GET"}


def test_private_repositories_are_private_from_the_start(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = hub_server.repo_name("secret")
    done(push(client, adapter, repo, "--private"))
    assert hub_server.state(repo)["private"] is True
    public = hub_server.repo_name("public")
    hub_server.seed(public, {"README.md": b"# hi\n"})
    refused(push(client, adapter, public, "--private"), 9, "public-repository")
    assert set(hub_server.files(public)) - {".gitattributes"} == {"README.md"}


def test_branch_tag_and_pull_request(hub_server: HubServer, client: ForkedClient, adapter: Path) -> None:
    repo = hub_server.repo_name("refs")
    first = done(push(client, adapter, repo, "--tag", "v1"))
    assert hub_server.state(repo)["refs"]["refs/tags/v1"] == first["commit"]
    (adapter / "adapter_manifest.json").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(weights(2))
    branch = done(push(client, adapter, repo, "--revision", "next/try"))
    refs = hub_server.state(repo)["refs"]
    assert refs["refs/heads/next/try"] == branch["commit"]
    assert refs["refs/heads/main"] == first["commit"]
    (adapter / "adapter_manifest.json").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(weights(3))
    asked = done(push(client, adapter, repo, "--create-pr"))
    assert asked["pull_request"]
    refs = hub_server.state(repo)["refs"]
    assert refs["refs/heads/main"] == first["commit"]
    assert refs["refs/pr/1"] == asked["commit"]
    # A tag that is taken is refused before anything is sent.
    refused(push(client, adapter, repo, "--tag", "v1"), 9, "tag-exists")
    assert hub_server.state(repo)["refs"]["refs/heads/main"] == first["commit"]


def test_a_tag_for_what_is_there_already_needs_no_commit(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = hub_server.repo_name("later")
    first = done(push(client, adapter, repo))
    again = done(push(client, adapter, repo, "--tag", "v1"))
    assert again["created_commit"] is False
    assert hub_server.state(repo)["refs"]["refs/tags/v1"] == first["commit"]


def test_a_folder_of_a_repository(hub_server: HubServer, client: ForkedClient, adapter: Path) -> None:
    repo = hub_server.repo_name("many")
    hub_server.seed(repo, {"README.md": b"# all\n", "other/adapter_config.json": b"{}"})
    done(client.run("push", adapter, f"hf://{repo}/mine", "--json"))
    files = hub_server.files(repo)
    assert files["README.md"] == b"# all\n"
    assert files["other/adapter_config.json"] == b"{}"
    assert {f"mine/{name}" for name in ADAPTER_FILES} <= set(files)


def test_what_is_not_on_the_list_stays(hub_server: HubServer, client: ForkedClient, adapter: Path) -> None:
    for name in ("optimizer.pt", "trainer_state.json", ".env", "notes.py", "runs/events.bin"):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_bytes(b"x")
    (adapter / "LICENSE").write_text("MIT", encoding="utf-8")
    repo = hub_server.repo_name("listed")
    report = done(push(client, adapter, repo))
    assert set(hub_server.files(repo)) - {".gitattributes"} == {*ADAPTER_FILES, "LICENSE"}
    assert {name for name, _ in report["left"]} == {
        "optimizer.pt", "trainer_state.json", ".env", "notes.py", "runs/events.bin",
    }  # fmt: skip
    # What the Hub holds is complete by its own manifest, although the folder's lists more.
    out = adapter.parent / "out"
    assert done(client.run("pull", f"hf://{repo}", out, "--json"))["verified_by_manifest"] is True
    assert client.run("validate", out).code == 0


def test_a_flag_names_the_exception(hub_server: HubServer, client: ForkedClient, adapter: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02.")
    repo = hub_server.repo_name("pickle")
    report = done(push(client, adapter, repo))
    assert "adapter_model.bin" not in hub_server.files(repo)
    assert "--include" in dict(report["left"])["adapter_model.bin"]
    (adapter / "adapter_manifest.json").unlink()
    done(push(client, adapter, repo, "--include", "adapter_model.bin"))
    assert hub_server.files(repo)["adapter_model.bin"] == b"\x80\x02."
    refused(push(client, adapter, repo, "--include", "absent.txt"), 3, "no-file")


def test_an_adapter_that_is_only_a_pickle_is_refused(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    repo = hub_server.repo_name("only")
    ran = push(client, adapter, repo)
    assert ran.code == 4, ran.out
    assert hub_server.state(repo) == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", b"# x\nuse hf_" + b"aB3dE5gH7jK9mN1pQ2" * 2 + b" to log in\n"),
        ("README.md", b"key AKIA" + b"B2C3D4E5" * 2 + b"\n"),
        ("LICENSE", b"-----BEGIN RSA PRIVATE KEY-----\nabc\n"),
        ("tokenizer_config.json", b'{"url": "https://me:hunter2pass@example.com/x"}'),
    ],
    ids=["hf", "aws", "pem", "url"],
)
def test_secrets_are_never_sent(
    hub_server: HubServer, client: ForkedClient, adapter: Path, name: str, content: bytes
) -> None:
    (adapter / name).write_bytes(content)
    repo = hub_server.repo_name("leak")
    problems = refused(push(client, adapter, repo), 3, "secret")
    assert problems[0]["file"] == name
    shown = json.dumps(problems)
    assert not any(word in shown for word in ("hf_aB3", "AKIAB", "hunter2"))
    assert hub_server.state(repo) == {}


def test_a_secret_in_the_header_of_the_weights_is_found(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    data = weights(1)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["token"] = "hf_" + "aB3dE5gH7jK9mN1pQ2" * 2
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (adapter / "adapter_model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data[8 + size :]
    )
    refused(push(client, adapter, hub_server.repo_name("header")), 3, "secret")


def test_symbolic_links_are_never_sent(hub_server: HubServer, client: ForkedClient, adapter: Path) -> None:
    (adapter.parent / "elsewhere").write_text("secret text", encoding="utf-8")
    (adapter / "LICENSE").symlink_to("../elsewhere")
    repo = hub_server.repo_name("link")
    ran = push(client, adapter, repo)
    assert ran.code in (3, 4), ran.out
    assert hub_server.state(repo) == {}
    assert not any("secret text" in str(record) for record in hub_server.requests())


def test_an_adapter_that_is_not_valid_is_not_sent(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    data = bytearray(weights(1))
    data[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    (adapter / "adapter_model.safetensors").write_bytes(bytes(data))
    refused(push(client, adapter, hub_server.repo_name("nan")), 3, "non-finite")
    assert hub_server.requests() == []


def test_files_that_differ_from_the_manifest_are_not_sent(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    done(client.run("init", adapter, "--json"))
    (adapter / "adapter_model.safetensors").write_bytes(weights(2))
    refused(push(client, adapter, hub_server.repo_name("differs")), 7, "file-digest")
    assert hub_server.requests() == []


def test_a_file_that_the_manifest_no_longer_lists_is_deleted(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    (adapter / "LICENSE").write_text("MIT", encoding="utf-8")
    repo = hub_server.repo_name("fewer")
    done(push(client, adapter, repo))
    hub_server.seed(repo, {**hub_server.files(repo), "theirs.txt": b"kept"})
    (adapter / "LICENSE").unlink()
    (adapter / "adapter_manifest.json").unlink()
    report = done(push(client, adapter, repo))
    assert changes(report)["LICENSE"] == "delete"
    assert "LICENSE" not in hub_server.files(repo)
    assert hub_server.files(repo)["theirs.txt"] == b"kept"


@pytest.mark.parametrize(("token", "kind"), [("read", "forbidden"), ("foreign", "forbidden"), ("", "")])
def test_who_may_not_write_changes_nothing(
    hub_server: HubServer, client: ForkedClient, adapter: Path, token: str, kind: str
) -> None:
    repo = hub_server.repo_name("theirs")
    hub_server.seed(repo, {"README.md": b"# hi\n"})
    ran = push(client, adapter, repo, HF_TOKEN=hub_server.tokens.get(token, ""))
    assert ran.code == 9, ran.out
    assert not kind or kind in {problem["kind"] for problem in ran.json["problems"]}
    assert set(hub_server.files(repo)) - {".gitattributes"} == {"README.md"}


def test_the_token_goes_only_where_it_was_issued_for(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    ran = push(client, adapter, hub_server.repo_name("token"), ADAPTERTOOL_TOKEN_ENDPOINT="")
    assert ran.code == 9
    assert hub_server.tokens_seen("hub") == set()
    assert "ADAPTERTOOL_TOKEN_ENDPOINT" in ran.out


def test_an_unencrypted_endpoint_elsewhere_is_refused(client: ForkedClient, adapter: Path) -> None:
    ran = push(client, adapter, "me/x", HF_ENDPOINT="http://hub.example", HF_TOKEN="hf_x")
    refused(ran, 9, "insecure")


def test_offline_means_offline(hub_server: HubServer, client: ForkedClient, adapter: Path) -> None:
    home = adapter.parent / "home"
    offline = ForkedClient(hub_server.env(home, HF_HUB_OFFLINE="1"), home)
    try:
        refused(offline.run("push", adapter, "hf://me/x", "--json"), 9, "offline")
    finally:
        offline.close()
    assert hub_server.requests() == []
