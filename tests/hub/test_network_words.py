"""What people are told when the network is not as they think: proxies, certificates, tokens, long waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_tools.hub.endpoint import without_secrets
from tests.hub.forked_client import ForkedClient
from tests.hub.hub_process import HubServer, free_port
from tests.hub.small_adapter import write_adapter

PASSWORD = "s3cretOfTheProxy"


@pytest.fixture
def repo(hub_server: HubServer, tmp_path: Path) -> str:
    name = hub_server.repo_name("words")
    adapter = write_adapter(tmp_path / "adapter")
    hub_server.seed(name, {path.name: path.read_bytes() for path in adapter.iterdir()})
    return name


def told(server: HubServer, home: Path, *arguments: str | Path, **env: str) -> tuple[dict[str, Any], str]:
    """Runs a command in a process of its own, with a new client; returns the problem, and all text."""
    ran = subprocess.run(
        [sys.executable, "-m", "adapterhub_tools.cli.main", *map(str, arguments), "--json"],
        env=server.env(home, **env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 9, (ran.stdout, ran.stderr)
    assert "Traceback" not in ran.stderr
    (problem,) = json.loads(ran.stdout)["problems"]
    return problem, ran.stdout + ran.stderr


def through(proxy: str) -> dict[str, str]:
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    return {**dict.fromkeys(names, proxy), "NO_PROXY": "", "no_proxy": "", "ADAPTERTOOL_TRIES": "1"}


def test_a_proxy_that_cannot_be_reached_is_named_without_its_login(
    hub_server: HubServer, repo: str, tmp_path: Path
) -> None:
    place = f"127.0.0.1:{free_port()}"
    out = tmp_path / "out"
    env = through(f"http://me:{PASSWORD}@{place}")
    problem, everything = told(hub_server, tmp_path / "home", "pull", f"hf://{repo}", out, **env)
    assert problem["kind"] == "unreachable"
    assert f"through the proxy {place}" in problem["message"]
    assert "HTTPS_PROXY" in problem["remedy"]
    assert PASSWORD not in everything
    assert not out.exists()


@pytest.mark.parametrize("scheme", ["socks5", "gopher"])
def test_a_proxy_that_cannot_be_used_is_an_error_with_a_remedy(
    hub_server: HubServer, repo: str, tmp_path: Path, scheme: str
) -> None:
    env = through(f"{scheme}://me:{PASSWORD}@127.0.0.1:{free_port()}")
    problem, everything = told(hub_server, tmp_path / "home", "pull", f"hf://{repo}", tmp_path / "out", **env)
    assert problem["kind"] == "network-settings"
    assert "HTTPS_PROXY" in problem["remedy"]
    assert PASSWORD not in everything


def test_certificates_that_are_not_there(hub_server: HubServer, repo: str, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.pem")
    problem, _ = told(
        hub_server, tmp_path / "home", "pull", f"hf://{repo}", tmp_path / "out", SSL_CERT_FILE=absent
    )
    assert problem["kind"] == "network-settings"
    assert "SSL_CERT_FILE" in problem["remedy"]


def test_an_endpoint_that_is_no_url(client: ForkedClient, tmp_path: Path) -> None:
    ran = client.run("pull", "hf://me/x", tmp_path / "out", "--json", HF_ENDPOINT="hub.example")
    (problem,) = ran.json["problems"]
    assert (ran.code, problem["loc"]) == (9, "HF_ENDPOINT")
    assert "https://" in problem["remedy"]


@pytest.mark.parametrize(
    "given",
    [
        "me:{}@hub.example",
        "https://me:{}@hub.example",
        "https://me:a/{}@hub.example",
        "https://{}@hub.example",
    ],
)
def test_a_login_in_the_endpoint_is_not_shown(client: ForkedClient, tmp_path: Path, given: str) -> None:
    endpoint = given.format(PASSWORD)
    ran = client.run("pull", "hf://me/x", tmp_path / "out", "--json", HF_ENDPOINT=endpoint)
    assert ran.code == 9
    assert "hub.example" in ran.json["problems"][0]["message"]
    assert PASSWORD not in ran.out + ran.err


def test_what_is_shown_of_a_url_keeps_host_port_and_path() -> None:
    for url in ("https://h:80/a@b", "https://h/a:b@c", "http://h:80", "h"):
        assert without_secrets(f"{url}?signature=x") == url


def test_who_has_no_token_is_told_how_to_get_one_and_who_has_one_why_it_was_kept_back(
    hub_server: HubServer, client: ForkedClient, repo: str, tmp_path: Path
) -> None:
    push = ("push", tmp_path / "adapter", "hf://alice/new", "--json")
    without = client.run(*push, HF_TOKEN="")
    withheld = client.run(*push, ADAPTERTOOL_TOKEN_ENDPOINT="")
    expired = client.run(*push, HF_TOKEN=hub_server.tokens["expired"])
    assert (without.code, withheld.code, expired.code) == (9, 9, 9)
    assert "hf auth login" in without.json["problems"][0]["remedy"]
    assert "only sent where it was issued for" not in without.json["problems"][0]["remedy"]
    assert "only sent where it was issued for" in withheld.json["problems"][0]["remedy"]
    assert "log in again with `hf auth login`" in expired.json["problems"][0]["remedy"]


def test_a_long_wait_that_the_server_asks_for_is_said(
    hub_server: HubServer, client: ForkedClient, repo: str, tmp_path: Path
) -> None:
    for seconds, said in ((6, True), (1, False)):
        hub_server.arm("status", path=rf"{repo}/revision", status=429, retry_after=seconds)
        ran = client.run("pull", f"hf://{repo}", tmp_path / f"out{seconds}", "--json")
        assert ran.code == 0, ran.err
        assert (f"Trying again in {seconds} s" in ran.err) == said
