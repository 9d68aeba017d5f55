"""Many adapters in one call, some of them out of reach: each is judged, and the worst gives the exit code."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.hub.forked_client import ForkedClient, Ran
from tests.hub.hub_process import HubServer
from tests.hub.small_adapter import weights, write_adapter

COMMANDS = ("validate", "scan")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "good")


def entries(ran: Ran) -> list[Any]:
    assert "Traceback" not in ran.err
    found: list[Any] = ran.json["adapters"]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_one_that_cannot_be_had_does_not_stop_the_others(
    hub_server: HubServer, client: ForkedClient, good: Path, tmp_path: Path, command: str
) -> None:
    there = hub_server.repo_name("there")
    hub_server.seed(there, {path.name: path.read_bytes() for path in good.iterdir()})
    given = ["hf://nobody/nothing", good, f"hf://{there}", "hf://not..an/id", tmp_path / "absent"]
    ran = client.run(command, *given, "--json")
    found = entries(ran)
    assert [item["path"] for item in found] == [str(item) for item in given]
    assert [item["ok"] for item in found] == [False, True, True, False, False]
    assert [item["exit_code"] for item in found] == [9, 0, 0, 3, 10]
    assert [item["unchecked"][0]["error"] for item in found if not item["ok"]] == [
        "HubError", "FormatError", "StoreError",
    ]  # fmt: skip
    assert all(item["unchecked"][0]["remedy"] for item in found if not item["ok"])
    assert (ran.json["passed"], ran.json["with_problems"], ran.json["not_checked"]) == (2, 0, 3)
    assert ran.code == ran.json["exit_code"] == 3


def broken(folder: Path) -> Path:
    """An adapter in which validate and scan both find something."""
    adapter = write_adapter(folder)
    (adapter / "adapter_model.safetensors").write_bytes(weights(1) + b"x")
    return adapter


@pytest.mark.parametrize("command", COMMANDS)
def test_problems_that_were_found_stand_before_what_could_not_be_looked_at(
    hub_server: HubServer, client: ForkedClient, good: Path, tmp_path: Path, command: str
) -> None:
    bad = broken(tmp_path / "bad")
    assert client.run(command, "hf://nobody/nothing", good, bad).code == 1
    assert client.run(command, tmp_path / "absent", good).code == 10
    assert client.run(command, tmp_path / "absent", "hf://nobody/nothing", good).code == 9


@pytest.mark.parametrize("command", COMMANDS)
def test_the_last_line_names_what_did_not_pass(
    hub_server: HubServer, client: ForkedClient, good: Path, tmp_path: Path, command: str
) -> None:
    bad = broken(tmp_path / "bad")
    arguments = (command, "hf://nobody/nothing", good, bad)
    lines = client.run(*arguments).out.splitlines()
    assert lines[-1] == (
        f"3 checked: 1 passed; 1 with problems: {bad}; 1 could not be checked: hf://nobody/nothing"
    )
    (told,) = [line for line in lines if line.startswith("could not check: hf://nobody/nothing; ")]
    assert "Check the repository's name" in told
    quiet = client.run(*arguments, "--quiet").out.splitlines()
    assert len(quiet) == 3  # the two that did not pass, and the last line
    assert quiet[-1] == lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_form_stays_that_asked_for(
    hub_server: HubServer, client: ForkedClient, good: Path, command: str
) -> None:
    for given in (["hf://nobody/nothing"], ["hf://nobody/nothing", good]):
        ran = client.run(command, *given, "--format", "junit")
        assert ran.code == 9
        suites = ElementTree.fromstring(ran.out)
        assert [suite.get("errors") for suite in suites] == ["1", "0"][: len(given)]
        log = client.run(command, *given, "--format", "sarif").json
        assert [result["ruleId"] for result in log["runs"][0]["results"]] == ["not-found"]


def test_a_server_that_does_not_answer_is_not_waited_for_again_and_again(
    hub_server: HubServer, client: ForkedClient, good: Path
) -> None:
    references = [f"hf://me/adapter-{number}" for number in range(20)]
    patience = {"ADAPTERTOOL_TRIES": "3", "ADAPTERTOOL_RETRY_WAIT": "0.4"}
    start = time.monotonic()
    ran = client.run("scan", *references, good, "--json", HF_ENDPOINT=hub_server.refused, **patience)
    assert time.monotonic() - start < 10  # with waits of 0.4 and 0.8 s for each it were 24
    found = entries(ran)
    assert [item["exit_code"] for item in found] == [9] * 20 + [0]


def test_a_server_that_answers_again_is_asked_with_patience_again(
    hub_server: HubServer, client: ForkedClient, good: Path
) -> None:
    repo = hub_server.repo_name("there")
    hub_server.seed(repo, {path.name: path.read_bytes() for path in good.iterdir()})
    hub_server.arm("header_stall", path="lost", times=-1, seconds=3)
    hub_server.arm("rst", path=rf"{repo}/resolve/", skip=1, times=1)
    patience = {"ADAPTERTOOL_TRIES": "2", "ADAPTERTOOL_RETRY_WAIT": "0.02", "ADAPTERTOOL_TIMEOUT": "0.8"}
    ran = client.run("scan", "hf://alice/lost", f"hf://{repo}", "--json", **patience)
    assert [item["exit_code"] for item in entries(ran)] == [9, 0]
    assert "stalled" in ran.out
    assert "rst" in str(hub_server.fired())


def test_what_a_scan_found_before_the_server_failed_counts(
    hub_server: HubServer, client: ForkedClient, good: Path
) -> None:
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    clean, pickled = hub_server.repo_name("clean"), hub_server.repo_name("pickled")
    hub_server.seed(clean, {**files, "notes.txt": b"lost", "zz.txt": b"after it"})
    hub_server.seed(pickled, {**files, "a.pt": b"\x80\x02N.", "notes.txt": b"lost", "zz.txt": b"after it"})
    hub_server.arm("status", path=r"notes\.txt", times=-1, status=500)
    patience = {"ADAPTERTOOL_TRIES": "1"}
    ran = client.run("scan", f"hf://{clean}", f"hf://{pickled}", "--json", **patience)
    nothing, something = entries(ran)
    assert (nothing["exit_code"], something["exit_code"], ran.code) == (9, 1, 1)
    assert [problem["kind"] for problem in something["problems"]] == ["pickle"]
    for report in (nothing, something):
        assert [(item["kind"], item["file"]) for item in report["unchecked"]] == [
            ("server-error", "notes.txt"),
            ("not-looked-at", ""),
        ]
        assert report["checked"] == []
