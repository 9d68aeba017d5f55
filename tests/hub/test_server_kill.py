"""The server is killed (SIGKILL) at twenty points of a push: it then holds the old version or the new one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub.fault_cases import pattern
from tests.hub.forked_client import ForkedClient
from tests.hub.hub_process import HubServer
from tests.hub.small_adapter import config, weights, write_adapter

POINTS = 20
PHASES = ("before", "during", "handled", "answer")
PATIENCE = {"ADAPTERTOOL_TIMEOUT": "5", "ADAPTERTOOL_RETRY_WAIT": "0.02", "ADAPTERTOOL_TRIES": "3"}
LIMIT_SECONDS = 20.0
PARTS = {"multipart_bytes": 200_000, "part_bytes": 200_000}
OLD = {"adapter_config.json": config(), "adapter_model.safetensors": weights(2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """An adapter, and the requests of a clean push of it that change something or ask for the state."""

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


@pytest.fixture(scope="module")
def push(hub_process: HubServer, client: ForkedClient, tmp_path_factory: pytest.TempPathFactory) -> Push:
    adapter = write_adapter(tmp_path_factory.mktemp("killed") / "adapter", seed=4)
    hub_process.reset()
    hub_process.settings(**PARTS)
    repo = hub_process.repo_name("killed")
    hub_process.seed(repo, OLD)
    pushed = client.run("push", adapter, f"hf://{repo}", "--json")
    assert pushed.code == 0, pushed.err
    files = hub_process.files(repo)
    return Push(adapter=adapter, repo=repo, trace=hub_process.requests(), files=files)


def victims_of(trace: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int, str]]:
    """Twenty of (request, how many like it come before, phase); the commit in every phase."""
    points = []
    for number, request in enumerate(trace):
        same = [r for r in trace[:number] if (r["method"], r["path"]) == (request["method"], request["path"])]
        points += [
            (request, len(same), phase) for phase in PHASES if phase != "during" or request["method"] != "GET"
        ]
    commits = [point for point in points if "/commit/" in point[0]["path"]]
    others = [point for point in points if point not in commits]
    wanted = POINTS - len(commits)
    assert len(others) >= wanted > 0
    return commits + [others[i * len(others) // wanted] for i in range(wanted)]


@pytest.mark.parametrize("point", range(POINTS))
def test_a_killed_server_holds_the_old_or_the_new(
    hub_server: HubServer, client: ForkedClient, push: Push, point: int
) -> None:
    hub_server.settings(**PARTS)
    for content in push.files.values():  # nothing of it is stored yet
        if content not in OLD.values():
            hub_server.blob_of(content).unlink(missing_ok=True)
    repo = hub_server.repo_name("killed")
    old, expected = hub_server.seed(repo, OLD), push.left_in(repo)
    victim, skip, phase = victims_of(push.trace)[point]
    place = {"origin": victim["origin"], "method": victim["method"], "path": pattern(victim["path"])}
    hub_server.arm("kill", phase=phase, skip=skip, seed=point, **place)
    ran = client.run("push", push.adapter, f"hf://{repo}", "--json", **PATIENCE)
    assert hub_server.wait_dead() == -9
    assert ran.seconds < LIMIT_SECONDS
    assert "Traceback" not in ran.err
    assert ran.code in {0, 9}, ran.err

    hub_server.start()
    hub_server.settings(**PARTS)
    state, head = hub_server.state(repo), hub_server.head(repo)
    files = hub_server.files(repo)  # reads every blob: none is missing
    if head == old:
        assert files == {**OLD, ".gitattributes": files[".gitattributes"]}
        assert ran.code == 9
    else:
        assert files == expected
        assert state["commits"][head]["parent"] == old
    assert len(state["commits"]) == 2 + (head != old)

    again = client.run("push", push.adapter, f"hf://{repo}", "--json", **PATIENCE)
    assert again.code == 0, again.err
    assert hub_server.files(repo) == expected
    assert len(hub_server.state(repo)["commits"]) == 3
