"""What people do wrong at first, and what they are told: names, tokens, tags, files that a push refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import adapterhub_tools as at
from tests.hub.forked_client import ForkedClient, Ran
from tests.hub.hub_process import HubServer
from tests.hub.small_adapter import write_adapter
from tests.tiny_files import make_adapter, make_base

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2" * 2


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def done(ran: Ran) -> Any:
    assert ran.code == 0, ran.err or ran.out
    return ran.json


def refused(ran: Ran, code: int, kind: str) -> str:
    assert ran.code == code, (ran.code, ran.out, ran.err)
    problem = ran.json["problems"][0]
    assert problem["kind"] == kind, problem
    return str(problem["remedy"])


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json"])
def test_a_refused_push_leaves_no_manifest_and_the_corrected_folder_goes(
    hub_server: HubServer, client: ForkedClient, adapter: Path, name: str
) -> None:
    repo = hub_server.repo_name("corrected")
    (adapter / name).write_text(f'{{"key": "{TOKEN}"}}')
    refused(client.run("push", adapter, f"hf://{repo}", "--json"), 3, "secret")
    assert not (adapter / "adapter_manifest.json").exists()
    (adapter / name).write_text("{}")
    done(client.run("push", adapter, f"hf://{repo}", "--json"))
    assert hub_server.files(repo)["adapter_manifest.json"] == (adapter / "adapter_manifest.json").read_bytes()


@pytest.mark.parametrize("name", [b"new\nline.txt", b"\xff.txt", b"back\\slash.txt"])
def test_a_name_that_no_manifest_can_list_is_refused_before_one_is_written(
    hub_server: HubServer, client: ForkedClient, adapter: Path, name: bytes
) -> None:
    place = adapter / os.fsdecode(name)
    place.write_text("x")
    repo = hub_server.repo_name("names")
    assert "Rename" in refused(client.run("push", adapter, f"hf://{repo}", "--json"), 3, "file-name")
    assert not (adapter / "adapter_manifest.json").exists()
    with pytest.raises(at.FormatError):
        at.init(adapter)
    place.unlink()
    done(client.run("push", adapter, f"hf://{repo}", "--json"))


def test_a_token_that_cannot_be_one_is_refused_and_not_shown(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    ran = client.run("push", adapter, "hf://me/x", "--json", HF_TOKEN="hf_äöüsecret")
    assert "HF_TOKEN" in refused(ran, 9, "token")
    assert "secret" not in ran.out + ran.err
    assert hub_server.requests() == []


def test_an_expired_token_is_named_as_such(
    hub_server: HubServer, client: ForkedClient, adapter: Path, tmp_path: Path
) -> None:
    repo = hub_server.repo_name("expired")
    done(client.run("push", adapter, f"hf://{repo}", "--json"))
    ran = client.run("pull", f"hf://{repo}", tmp_path / "o", "--json", HF_TOKEN=hub_server.tokens["expired"])
    assert "expired" in refused(ran, 9, "unauthorized")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("--revision", "a" * 40), "revision"),
        (("--tag", "main"), "tag"),
        (("--tag", "b" * 40), "tag"),
        (("--revision", "dev", "--tag", "dev"), "tag"),
        (("--tag", "a b"), "tag"),
        (("--tag", "v1..2"), "tag"),
        (("--revision", "a b"), "revision"),
    ],
)
def test_names_that_would_be_taken_for_something_else(
    hub_server: HubServer, client: ForkedClient, adapter: Path, options: tuple[str, ...], kind: str
) -> None:
    ran = client.run("push", adapter, "hf://alice/never", "--json", *options)
    remedy = refused(ran, 3, kind)
    assert ran.json["problems"][0]["loc"] == f"--{kind}"
    assert "hf://" not in remedy
    assert hub_server.requests() == []


def test_a_push_to_a_tag_is_refused_before_anything_is_sent(
    hub_server: HubServer, client: ForkedClient, adapter: Path
) -> None:
    repo = hub_server.repo_name("tagged")
    done(client.run("push", adapter, f"hf://{repo}", "--json", "--tag", "v1"))
    done(client.run("push", adapter, f"hf://{repo}", "--json", "--revision", "next"))
    before, seen = hub_server.state(repo), len(hub_server.requests())
    (adapter / "LICENSE").write_text("MIT", encoding="utf-8")
    (adapter / "adapter_manifest.json").unlink()
    for given in ((f"hf://{repo}", "--revision", "v1"), (f"hf://{repo}@v1",)):
        for more in ((), ("--create-pr",), ("--dry-run",)):
            ran = client.run("push", adapter, *given, *more, "--json")
            assert "Name a branch" in refused(ran, 3, "revision")
    assert {request["method"] for request in hub_server.requests()[seen:]} == {"GET"}
    assert hub_server.state(repo) == before
    done(client.run("push", adapter, f"hf://{repo}", "--json", "--revision", "next"))


@pytest.mark.parametrize("command", ["inspect", "validate", "scan"])
def test_an_id_where_a_path_is_wanted_is_answered_with_its_reference(
    client: ForkedClient, tmp_path: Path, command: str
) -> None:
    ran = client.run(command, "someone/adapter", "--json")
    assert ran.code in (8, 10), ran.out
    assert "hf://someone/adapter" in ran.out


@pytest.mark.parametrize("reference", ["hf://me/out", "s3://bucket/me/out"])
def test_a_reference_where_something_is_written_is_named(
    client: ForkedClient, adapter: Path, tmp_path: Path, reference: str
) -> None:
    base = make_base(tmp_path / "base")
    for arguments in (("merge", base, make_adapter(tmp_path / "a"), reference), ("init", reference)):
        refused(client.run(*arguments, "--json"), 4, "remote-reference")


def test_convert_takes_a_remote_base_and_a_model_is_called_by_its_name(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    base, local = hub_server.repo_name("base"), make_base(tmp_path / "base")
    hub_server.seed(base, {path.name: path.read_bytes() for path in local.iterdir()})
    adapter = make_adapter(tmp_path / "a", base_model_name_or_path=base)
    for given, out in ((f"hf://{base}", "remote"), (local, "local")):
        done(client.run("convert", adapter, tmp_path / out, "--to", "dora", "--base", given, "--json"))
    weights = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("remote", "local")]
    assert weights[0] == weights[1]
    # One of them is DoRA, so what it does depends on the base.
    inputs = ("combine", tmp_path / "remote", adapter, "--weights", "2,-1", "--rank", "2")
    done(client.run(*inputs, "--base", f"hf://{base}", "--out", tmp_path / "both", "--json"))
    assert at.validate(tmp_path / "both").ok
    repo = hub_server.repo_name("adapter")
    hub_server.seed(repo, {path.name: path.read_bytes() for path in adapter.iterdir()})
    ran = client.run("hash", f"hf://{repo}", "--json")
    assert ran.json["problems"][0]["file"] == repo.partition("/")[2]


@pytest.mark.parametrize("login", [f"me:{TOKEN}", TOKEN])
def test_the_address_of_a_page_and_a_login_in_it(client: ForkedClient, tmp_path: Path, login: str) -> None:
    address = f"https://{login}@huggingface.co/me/x"
    for arguments in (("pull", address, tmp_path / "o"), ("inspect", address), ("list", address)):
        ran = client.run(*arguments, "--json")
        assert "hf://owner/name" in refused(ran, 3, "reference")
        assert TOKEN not in ran.out + ran.err


@pytest.mark.parametrize(
    ("reference", "remedy"),
    [
        ("/srv/adapters/me/x", "file:///srv/adapters/me/x"),
        ("./me/x/y", "{cwd}/me/x/y"),
        ("file://adapters/me/x", "file:///folder/owner/name"),
        ("file:///me", "file:///folder/owner/name"),
        ("s3://bucket", "s3://bucket/prefix/owner/name"),
        ("https://huggingface.co/me/x/tree/main", "hf://me/x."),
        ("https://example.com/me/x", "hf://owner/name"),
    ],
)
def test_what_was_probably_meant_is_said(adapter: Path, reference: str, remedy: str) -> None:
    for verb in (lambda: at.push(adapter, reference), lambda: at.pull(reference, adapter.parent / "out")):
        with pytest.raises(at.FormatError) as caught:
            verb()
        assert remedy.format(cwd=Path.cwd().as_uri()) in caught.value.problems[0].remedy


def test_a_place_that_is_no_registry_is_named_as_it_was_given(adapter: Path, tmp_path: Path) -> None:
    at.push(adapter, f"{(tmp_path / 'registry').as_uri()}/team/a")
    for place in ("nowhere", "adapter", "registry/team"):
        with pytest.raises(at.StoreError, match="no registry") as caught:
            at.list_adapters((tmp_path / place).as_uri())
        assert caught.value.problems[0].file == (tmp_path / place).as_uri()
    with pytest.raises(at.HubError, match="team/b"):
        at.list_adapters((tmp_path / "registry/team/b").as_uri())


def test_what_a_file_manager_leaves_in_a_registry_is_passed_over(adapter: Path, tmp_path: Path) -> None:
    url = (tmp_path / "registry").as_uri()
    at.push(adapter, f"{url}/team/a", tag="v1")
    home = tmp_path / "registry" / "adapters"
    for folder in (home, home / "team", home / "team" / "a", home / "team/a/versions", home / "team/a/tags"):
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (home / "team/a/tags/v1.json~").write_text("an editor's copy")
    assert [(found.name, found.tags) for found in at.list_adapters(url).adapters] == [("team/a", ("v1",))]
    assert [found.tags for found in at.list_adapters(f"{url}/team/a").versions] == [("v1",)]


def test_a_base_that_no_digest_vouches_for_is_said_to_fit_only(
    hub_server: HubServer, client: ForkedClient, tmp_path: Path
) -> None:
    repo = hub_server.repo_name("fits")
    done(client.run("push", make_adapter(tmp_path / "a"), f"hf://{repo}", "--json"))
    base = make_base(tmp_path / "base")
    report = done(client.run("pull", f"hf://{repo}", tmp_path / "o", "--base", base, "--json"))
    assert report["base"].startswith("checked by names and shapes only")
    found = done(client.run("validate", tmp_path / "o", "--base", base, "--json"))
    assert "base digest" not in found["checked"]
    assert "base digest" in found["skipped"]
