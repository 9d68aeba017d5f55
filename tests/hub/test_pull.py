"""What a pull brings, checks and records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.forked_client import ForkedClient, Ran
from tests.hub.hub_process import HubServer
from tests.hub.small_adapter import config, weights, write_adapter
from tests.tiny_files import make_adapter, make_base

PLAIN = {"adapter_config.json": config(), "adapter_model.safetensors": weights(1)}


def done(ran: Ran) -> Any:
    assert ran.code == 0, ran.err or ran.out
    return ran.json


def kinds(ran: Ran) -> set[str]:
    return {problem["kind"] for problem in ran.json["problems"]}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_pushed_comes_back(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    repo = hub_server.repo_name("round")
    pushed = done(client.run("push", adapter, f"hf://{repo}", "--json"))
    report = done(client.run("pull", f"hf://{repo}", tmp_path / "out", "--json"))
    got = contents(tmp_path / "out")
    origin = json.loads(got.pop(".adapter_origin.json"))
    assert {name: data for name, data in got.items() if name != "README.md"} == contents(adapter)
    assert report["verified_by_manifest"] is True
    assert report["commit"] == origin["version"] == pushed["commit"]
    assert origin["endpoint"] == hub_server.endpoint
    assert origin["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in got.items()}
    assert client.run("validate", tmp_path / "out").code == 0


def test_without_a_manifest_it_says_so(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    repo = hub_server.repo_name("plain")
    hub_server.seed(repo, PLAIN)
    report = done(client.run("pull", repo, tmp_path / "out", "--json"))
    assert report["verified_by_manifest"] is False
    assert (
        json.loads((tmp_path / "out" / ".adapter_origin.json").read_bytes())["verified_by_manifest"] is False
    )
    assert "unverified by manifest" in report["summary"]


@pytest.mark.parametrize("form", ["tag", "branch", "commit", "default"])
def test_a_revision_is_pinned_before_anything_is_read(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path, form: str
) -> None:
    repo = hub_server.repo_name("pinned")
    old = hub_server.seed(repo, PLAIN, tag="v1")
    new = {**PLAIN, "adapter_model.safetensors": weights(2)}
    head = hub_server.seed(repo, new)
    other = hub_server.seed(repo, new, revision="feature/x")
    revision, expected = {
        "tag": ("@v1", old), "branch": ("@feature%2Fx", other),
        "commit": (f"@{old}", old), "default": ("", head),
    }[form]  # fmt: skip
    report = done(client.run("pull", f"hf://{repo}{revision}", tmp_path / "out", "--json"))
    assert report["commit"] == expected
    asked = [
        r["path"] for r in hub_server.requests("hub") if "/resolve" in r["path"] or "/tree/" in r["path"]
    ]
    assert asked
    assert all(expected in path for path in asked)


def test_a_folder_of_a_repository(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    repo = hub_server.repo_name("folder")
    hub_server.seed(repo, {f"a/b/{name}": data for name, data in PLAIN.items()} | {"a/other.txt": b"x"})
    done(client.run("pull", f"hf://{repo}@main/a/b", tmp_path / "out", "--json"))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in PLAIN} == PLAIN
    ran = client.run("pull", f"hf://{repo}/none", tmp_path / "no", "--json")
    assert ran.code in (3, 9)
    assert not (tmp_path / "no").exists()


def test_only_what_is_on_the_list_comes(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    repo = hub_server.repo_name("list")
    more = {
        "adapter_model.bin": b"\x80\x02.",
        "run.py": b"1",
        ".env": b"x",
        "a/b.txt": b"y",
        "LICENSE": b"MIT",
    }
    hub_server.seed(repo, {**PLAIN, **more})
    report = done(client.run("pull", f"hf://{repo}", tmp_path / "out", "--json"))
    assert set(contents(tmp_path / "out")) == {*PLAIN, "LICENSE", ".adapter_origin.json"}
    assert {name for name, _ in report["left"]} >= {"adapter_model.bin", "run.py", ".env", "a/b.txt"}
    done(client.run("pull", f"hf://{repo}", tmp_path / "out2", "--include", "adapter_model.bin", "--json"))
    assert (tmp_path / "out2" / "adapter_model.bin").read_bytes() == b"\x80\x02."


def test_what_the_manifest_does_not_list_stays(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    repo = hub_server.repo_name("extra")
    done(client.run("push", adapter, f"hf://{repo}", "--json"))
    hub_server.seed(repo, {**hub_server.files(repo), "tokenizer.json": b"{}"})
    report = done(client.run("pull", f"hf://{repo}", tmp_path / "out", "--json"))
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert dict(report["left"])["tokenizer.json"] == "the manifest does not list it"


@pytest.mark.parametrize("how", ["other", "missing", "size"])
def test_files_that_differ_from_the_manifest_are_refused(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path, how: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    repo = hub_server.repo_name("tampered")
    done(client.run("push", adapter, f"hf://{repo}", "--json"))
    files = hub_server.files(repo)
    if how == "missing":
        del files["adapter_model.safetensors"]
        files["other.safetensors"] = weights(1)
        hub_server.seed(f"{repo}-new", files)
        repo = f"{repo}-new"
    else:
        files["adapter_model.safetensors"] = weights(2) if how == "other" else weights(1) + b"x"
        hub_server.seed(repo, files)
    ran = client.run("pull", f"hf://{repo}", tmp_path / "out", "--json")
    assert ran.code == 7, ran.out
    assert kinds(ran) == {{"other": "file-digest", "missing": "missing-file", "size": "file-size"}[how]}
    assert not (tmp_path / "out").exists()


def test_a_broken_adapter_is_refused(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    repo = hub_server.repo_name("broken")
    hub_server.seed(repo, {**PLAIN, "adapter_model.safetensors": weights(1)[:-8]})
    ran = client.run("pull", f"hf://{repo}", tmp_path / "out", "--json")
    assert ran.code == 3, ran.out
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_is_refused(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    for stem, files, code in (
        ("base", {"model.safetensors": weights(1), "config.json": b"{}"}, 3),
        ("pickle", {"adapter_config.json": config(), "adapter_model.bin": b"x"}, 4),
    ):
        repo = hub_server.repo_name(stem)
        hub_server.seed(repo, files)
        assert client.run("pull", f"hf://{repo}", tmp_path / stem, "--json").code == code
        assert not (tmp_path / stem).exists()


def test_an_existing_folder_is_kept_unless_replaced(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    repo = hub_server.repo_name("replace")
    hub_server.seed(repo, PLAIN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    ran = client.run("pull", f"hf://{repo}", tmp_path / "out", "--json")
    assert ran.code == 8
    assert not any("/resolve" in record["path"] for record in hub_server.requests())
    assert contents(tmp_path / "out") == {"mine.txt": b"mine"}
    done(client.run("pull", f"hf://{repo}", tmp_path / "out", "--replace", "--json"))
    assert set(contents(tmp_path / "out")) == {*PLAIN, ".adapter_origin.json"}


def test_a_dry_run_writes_nothing(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    repo = hub_server.repo_name("dry")
    hub_server.seed(repo, PLAIN)
    report = done(client.run("pull", f"hf://{repo}", tmp_path / "out", "--dry-run", "--json"))
    assert {file["path"] for file in report["files"]} == set(PLAIN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", ["", "foreign", "expired"])
def test_a_private_repository_is_for_its_owner(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path, token: str
) -> None:
    repo = hub_server.repo_name("private")
    hub_server.seed(repo, PLAIN, private=True)
    ran = client.run(
        "pull", f"hf://{repo}", tmp_path / "out", "--json", HF_TOKEN=hub_server.tokens.get(token, "")
    )
    assert ran.code == 9, ran.out
    assert kinds(ran) <= {"unauthorized", "not-found", "forbidden"}
    assert not (tmp_path / "out").exists()
    done(client.run("pull", f"hf://{repo}", tmp_path / "out", "--json"))
    done(client.run("pull", f"hf://{repo}", tmp_path / "read", "--json", HF_TOKEN=hub_server.tokens["read"]))


def test_what_is_not_there_is_an_error_with_a_remedy(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    repo = hub_server.repo_name("there")
    hub_server.seed(repo, PLAIN)
    for reference, kind in ((f"hf://{repo}@none", "no-revision"), (f"hf://{repo}-none", "not-found")):
        ran = client.run("pull", reference, tmp_path / "out", "--json")
        assert ran.code == 9
        assert kinds(ran) == {kind}


def test_no_stale_copy_stands_in_for_an_error(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    repo = hub_server.repo_name("stale")
    hub_server.seed(repo, PLAIN)
    done(client.run("pull", f"hf://{repo}", tmp_path / "one", "--json"))
    hub_server.arm("status", path="/revision/", times=-1, status=500)
    ran = client.run("pull", f"hf://{repo}", tmp_path / "two", "--json", ADAPTERTOOL_TRIES="2")
    assert ran.code == 9
    assert not (tmp_path / "two").exists()


def test_a_chain_of_adapters_is_followed_and_shown(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    base, middle, top = (hub_server.repo_name(stem) for stem in ("base", "middle", "top"))
    make_base(tmp_path / "base")
    base_commit = hub_server.seed(base, contents(tmp_path / "base"))
    make_adapter(tmp_path / "middle", base_model_name_or_path=base)
    make_adapter(tmp_path / "top", base_model_name_or_path=middle)
    done(client.run("push", tmp_path / "middle", f"hf://{middle}", "--json"))
    done(client.run("push", tmp_path / "top", f"hf://{top}", "--json"))
    chain = done(client.run("pull", f"hf://{top}", tmp_path / "out", "--json"))["chain"]
    assert [(link["id"], link["kind"]) for link in chain] == [(middle, "adapter"), (base, "base")]
    assert chain[1]["commit"] == base_commit
    make_adapter(tmp_path / "ring", base_model_name_or_path=top)
    done(client.run("push", tmp_path / "ring", f"hf://{middle}", "--json"))
    ran = client.run("pull", f"hf://{top}", tmp_path / "no", "--json")
    assert ran.code == 3
    assert kinds(ran) == {"circular-chain"}


def test_the_base_is_pulled_or_checked(hub_server: HubServer, client: ForkedClient, tmp_path: Path) -> None:
    base, repo = hub_server.repo_name("base"), hub_server.repo_name("with-base")
    local = make_base(tmp_path / "local")
    hub_server.seed(base, {**contents(local), "pytorch_model.bin": b"x", "README.md": b"# base"})
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=base)
    done(client.run("init", adapter, "--base", local, "--json"))
    done(client.run("push", adapter, f"hf://{repo}", "--json"))
    report = done(client.run("pull", f"hf://{repo}", tmp_path / "a", "--base", tmp_path / "b", "--json"))
    assert report["base"].startswith("pulled and checked")
    got = contents(tmp_path / "b")
    assert got.pop(".adapter_origin.json")
    assert got == contents(local)
    report = done(client.run("pull", f"hf://{repo}", tmp_path / "c", "--base", tmp_path / "b", "--json"))
    assert report["base"].startswith("checked")
    other = make_base(tmp_path / "other", dtype="BF16")
    ran = client.run("pull", f"hf://{repo}", tmp_path / "d", "--base", other, "--json")
    assert ran.code in (5, 7), ran.out
