"""Push and pull through every fault of the network and of the server, each with five seeds.

Whatever happens: no wrong byte is taken, nothing half-written is left, no other host sees the token, the
error names a remedy, and the time is bounded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub.fault_cases import (
    CREATE_CASES,
    EITHER,
    FAILS,
    PULL_CASES,
    PUSH_CASES,
    RECOVERS,
    SEEDS,
    FaultCase,
)
from tests.hub.forked_client import ForkedClient, Ran
from tests.hub.hub_process import HubServer
from tests.hub.small_adapter import config, weights, write_adapter

LIMIT_SECONDS = 20.0
"""For one command: four tries of half a second and their waits, on a machine that is busy."""
PATIENCE = {"ADAPTERTOOL_TIMEOUT": "0.5", "ADAPTERTOOL_RETRY_WAIT": "0.02", "ADAPTERTOOL_TRIES": "4"}
# Where the command is to fail anyway, it need not be patient.
IMPATIENCE = {"ADAPTERTOOL_TIMEOUT": "0.25", "ADAPTERTOOL_RETRY_WAIT": "0.02", "ADAPTERTOOL_TRIES": "2"}
MANIFEST = "adapter_manifest.json"
OLD = {"adapter_config.json": config(), "adapter_model.safetensors": weights(2), "README.md": b"# old\n"}
NEW = weights(3)
# Parts, so that the upload takes several requests.
PART_SETTINGS = {"multipart_bytes": 200_000, "part_bytes": 200_000, "page_size": 2}


def files_in(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_error(ran: Ran, codes: tuple[int, ...]) -> None:
    """An error that this tool raised on purpose, with a remedy in each problem, and no token in any text."""
    assert ran.code in codes, (ran.code, ran.err[-3000:])
    assert "Traceback" not in ran.err
    report = json.loads(ran.out)
    assert report["exit_code"] == ran.code
    assert report["problems"]
    for problem in report["problems"]:
        assert problem["message"], report
        assert problem["remedy"], report


def assert_no_leak(server: HubServer, ran: Ran) -> None:
    """Only the Hub saw the token, and nobody printed it."""
    assert server.tokens_seen("cdn") == set()
    assert server.tokens_seen("other") == set()
    for token in server.tokens.values():
        assert token not in ran.out + ran.err


def case_id(value: object) -> str | None:
    """The name of a case in a test's id."""
    return value.name if isinstance(value, FaultCase) else None


# -- pull -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """An adapter on the server, and what a clean pull of it asked for and brought."""

    reference: str
    trace: list[dict[str, Any]]
    files: dict[str, bytes]


@pytest.fixture(scope="session")
def published(
    hub_process: HubServer, client: ForkedClient, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    folder = tmp_path_factory.mktemp("published")
    adapter = write_adapter(folder / "adapter")
    repo = hub_process.repo_name("published")
    hub_process.reset()
    hub_process.settings(page_size=PART_SETTINGS["page_size"])
    pushed = client.run("push", adapter, f"hf://{repo}", "--private", "--json")
    assert pushed.code == 0, pushed.err
    hub_process.reset()
    hub_process.settings(page_size=PART_SETTINGS["page_size"])
    out = folder / "out"
    pulled = client.run("pull", f"hf://{repo}", out, "--json")
    assert pulled.code == 0, pulled.err
    files = files_in(out)
    stored = hub_process.files(repo)
    assert MANIFEST in stored
    for name, content in files.items():
        assert content == stored.get(name, content), name
    assert files["adapter_model.safetensors"] == weights(1)
    return Published(reference=f"hf://{repo}", trace=hub_process.requests(), files=files)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", PULL_CASES, ids=case_id)
def test_pull(
    hub_server: HubServer,
    client: ForkedClient,
    published: Published,
    tmp_path: Path,
    case: FaultCase,
    seed: int,
) -> None:
    hub_server.settings(page_size=PART_SETTINGS["page_size"])
    victim = case.arm(hub_server, published.trace, seed)
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    patience = IMPATIENCE if case.expected == FAILS else PATIENCE
    ran = client.run("pull", published.reference, out, "--json", **patience)
    assert hub_server.fired(), f"not hit: {victim}"
    assert_no_leak(hub_server, ran)
    assert ran.seconds < LIMIT_SECONDS
    if ran.code == 0:
        assert case.expected in {RECOVERS, EITHER}, f"succeeded in spite of {case.name} at {victim}"
        found = files_in(out)
        assert set(found) <= set(published.files)
        assert all(found[name] == published.files[name] for name in found)
        # A card is in no manifest: a listing that hides it cannot be told from one of a repository without.
        assert set(published.files) - set(found) <= ({"README.md"} if case.expected == EITHER else set())
    else:
        assert case.expected in {FAILS, EITHER}, (victim, ran.err[-3000:])
        assert_error(ran, case.codes)
        assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("where", ["refused", "unknown_host", "tls"])
def test_pull_from_where_nobody_answers(
    hub_server: HubServer, client: ForkedClient, published: Published, tmp_path: Path, where: str
) -> None:
    place = getattr(hub_server, where)
    if where == "unknown_host":  # off this machine only https is spoken
        place = place.replace("http:", "https:")
    env = {"HF_ENDPOINT": place, "ADAPTERTOOL_TOKEN_ENDPOINT": place}
    ran = client.run("pull", published.reference, tmp_path / "out", "--json", **PATIENCE, **env)
    assert_error(ran, (9,))
    assert ran.seconds < LIMIT_SECONDS
    assert list(tmp_path.iterdir()) == []
    assert hub_server.requests() == []


@pytest.mark.parametrize("token", ["foreign", "expired", ""])
def test_pull_of_a_private_repository_is_denied(
    hub_server: HubServer, client: ForkedClient, published: Published, tmp_path: Path, token: str
) -> None:
    env = {"HF_TOKEN": hub_server.tokens.get(token, "")}
    ran = client.run("pull", published.reference, tmp_path / "out", "--json", **PATIENCE, **env)
    assert_error(ran, (9,))
    assert_no_leak(hub_server, ran)
    assert list(tmp_path.iterdir()) == []


def test_a_token_is_not_sent_to_an_endpoint_it_was_not_issued_for(
    hub_server: HubServer, client: ForkedClient, published: Published, tmp_path: Path
) -> None:
    env = {"ADAPTERTOOL_TOKEN_ENDPOINT": "https://huggingface.co"}
    ran = client.run("pull", published.reference, tmp_path / "out", "--json", **PATIENCE, **env)
    assert_error(ran, (9,))
    assert hub_server.requests()
    assert hub_server.tokens_seen("hub") == set()


# -- push -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Pushing:
    """An adapter to push, and what a clean push of it over an older version asked for and left."""

    adapter: Path
    repo: str
    trace: list[dict[str, Any]]
    files: dict[str, bytes]

    def left_in(self, repo: str) -> dict[str, bytes]:
        """What a push to another repository leaves: the card says its name."""
        card = self.files["README.md"].replace(
            *(name.rpartition("/")[2].encode() for name in (self.repo, repo))
        )
        return {**self.files, "README.md": card}


def seeded(server: HubServer) -> tuple[str, str]:
    """A repository with the older version. Its content of the new version is forgotten by the storage."""
    server.blob_of(NEW).unlink(missing_ok=True)
    repo = server.repo_name("pushed")
    return repo, server.seed(repo, OLD)


@pytest.fixture(scope="session")
def pushing(
    hub_process: HubServer, client: ForkedClient, tmp_path_factory: pytest.TempPathFactory
) -> Pushing:
    adapter = write_adapter(tmp_path_factory.mktemp("pushing") / "adapter", seed=3)
    hub_process.reset()
    hub_process.settings(**PART_SETTINGS)
    repo, _ = seeded(hub_process)
    pushed = client.run("push", adapter, f"hf://{repo}", "--json")
    assert pushed.code == 0, pushed.err
    files = hub_process.files(repo)
    assert files["adapter_model.safetensors"] == NEW
    return Pushing(adapter=adapter, repo=repo, trace=hub_process.requests(), files=files)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", PUSH_CASES, ids=case_id)
def test_push(
    hub_server: HubServer, client: ForkedClient, pushing: Pushing, case: FaultCase, seed: int
) -> None:
    hub_server.settings(**PART_SETTINGS)
    repo, old = seeded(hub_server)
    local = files_in(pushing.adapter)
    expected = pushing.left_in(repo)
    victim = case.arm(hub_server, pushing.trace, seed)
    patience = IMPATIENCE if case.expected == FAILS else PATIENCE
    ran = client.run("push", pushing.adapter, f"hf://{repo}", "--json", **patience)
    assert hub_server.fired(), f"not hit: {victim}"
    assert_no_leak(hub_server, ran)
    assert ran.seconds < LIMIT_SECONDS
    assert files_in(pushing.adapter) == local
    state = hub_server.state(repo)
    head = hub_server.head(repo)
    theirs = 1 if case.kind == "advance" else 0
    if ran.code == 0:
        assert case.expected in {RECOVERS, EITHER}, f"succeeded in spite of {case.name} at {victim}"
        assert hub_server.files(repo) == expected
        assert state["commits"][head]["parent"] == old
        assert ran.json["commit"] == head
    else:
        assert case.expected in {FAILS, EITHER}, (victim, ran.err[-3000:])
        assert_error(ran, case.codes)
        if case.expected == FAILS:
            assert head == old or theirs
    # Old or new, nothing between, and never twice: the repository's first commit, the older version, ours.
    assert len(state["commits"]) - theirs == 2 + (hub_server.files(repo) == expected)
    if ran.code != 0 and seed == 0:  # once the fault is gone, the same push works
        hub_server.disarm()
        again = client.run("push", pushing.adapter, f"hf://{repo}", "--json", **PATIENCE)
        assert again.code == 0, again.err
        merged = {**expected, **({"notes.txt": b"by someone else\n"} if theirs else {})}
        assert hub_server.files(repo) == merged
        assert len(hub_server.state(repo)["commits"]) == 3 + theirs


@pytest.fixture(scope="session")
def creation_trace(hub_process: HubServer, client: ForkedClient, pushing: Pushing) -> list[dict[str, Any]]:
    """What a clean push into a new repository asks for."""
    hub_process.reset()
    hub_process.blob_of(NEW).unlink(missing_ok=True)
    repo = hub_process.repo_name("pushed")
    pushed = client.run("push", pushing.adapter, f"hf://{repo}", "--private", "--tag", "v1", "--json")
    assert pushed.code == 0, pushed.err
    return hub_process.requests()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CREATE_CASES, ids=case_id)
def test_push_into_a_new_repository(
    hub_server: HubServer,
    client: ForkedClient,
    pushing: Pushing,
    creation_trace: list[dict[str, Any]],
    case: FaultCase,
    seed: int,
) -> None:
    hub_server.blob_of(NEW).unlink(missing_ok=True)
    repo = hub_server.repo_name("pushed")
    victim = case.arm(hub_server, creation_trace, seed)
    arguments = ("push", pushing.adapter, f"hf://{repo}", "--private", "--tag", "v1", "--json")
    ran = client.run(*arguments, **(IMPATIENCE if case.expected == FAILS else PATIENCE))
    assert hub_server.fired(), f"not hit: {victim}"
    assert_no_leak(hub_server, ran)
    state = hub_server.state(repo)
    if case.expected == FAILS:
        assert_error(ran, (9,))
        assert len(state.get("commits", ())) <= 1  # the one that the Hub makes itself
        hub_server.disarm()
        ran = client.run(*arguments, **PATIENCE)
        state = hub_server.state(repo)
    assert ran.code == 0, (victim, ran.err)
    assert state["private"]
    assert len(state["commits"]) == 2
    assert state["refs"] == dict.fromkeys(("refs/heads/main", "refs/tags/v1"), ran.json["commit"])
    written = hub_server.files(repo)
    assert written["adapter_model.safetensors"] == NEW
    assert set(written) == set(pushing.files)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_lost_answer_makes_no_second_pull_request(
    hub_server: HubServer, client: ForkedClient, pushing: Pushing, how: str, seed: int
) -> None:
    repo, old = seeded(hub_server)
    hub_server.arm("lost_answer", path="/commit/", how=how, seed=seed)
    ran = client.run("push", pushing.adapter, f"hf://{repo}", "--create-pr", "--json", **PATIENCE)
    assert hub_server.fired()
    assert ran.code == 0, ran.err
    state = hub_server.state(repo)
    assert state["refs"] == {"refs/heads/main": old, "refs/pr/1": ran.json["commit"]}
    assert hub_server.files(repo, "refs/pr/1") == pushing.left_in(repo)


@pytest.mark.parametrize("where", ["refused", "unknown_host", "tls"])
def test_push_to_where_nobody_answers(
    hub_server: HubServer, client: ForkedClient, pushing: Pushing, where: str
) -> None:
    place = getattr(hub_server, where)
    if where == "unknown_host":
        place = place.replace("http:", "https:")
    env = {"HF_ENDPOINT": place, "ADAPTERTOOL_TOKEN_ENDPOINT": place}
    ran = client.run("push", pushing.adapter, "hf://alice/x", "--json", **PATIENCE, **env)
    assert_error(ran, (9,))
    assert ran.seconds < LIMIT_SECONDS


@pytest.mark.parametrize("token", ["foreign", "read", "expired", ""])
def test_push_without_the_right_is_denied(
    hub_server: HubServer, client: ForkedClient, pushing: Pushing, token: str
) -> None:
    repo, old = seeded(hub_server)
    env = {"HF_TOKEN": hub_server.tokens.get(token, "")}
    ran = client.run("push", pushing.adapter, f"hf://{repo}", "--json", **PATIENCE, **env)
    assert_error(ran, (9,))
    assert_no_leak(hub_server, ran)
    assert hub_server.head(repo) == old
    assert not hub_server.blob_of(NEW).exists()
