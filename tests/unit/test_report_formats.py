"""Reports for continuous integration: JUnit XML and SARIF say what the text says."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from tests.tiny_files import adapter_tensors, make_adapter


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    tensors = adapter_tensors()
    evil = 'base_model.model.x<"&>]]>.lora_A.weight'
    tensors[evil] = tensors[next(iter(tensors))]
    return make_adapter(tmp_path / "good"), make_adapter(tmp_path / "bad", tensors=tensors, r=3)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["validate", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_junit_is_xml_and_counts_what_it_holds(adapters: tuple[Path, Path]) -> None:
    good, bad = adapters
    code, text = run(good, bad, "--format", "junit")
    assert code == 1
    suites = ElementTree.fromstring(text)
    assert [suite.get("name") for suite in suites] == [str(good), str(bad)]
    for suite, path in zip(suites, adapters, strict=True):
        report = at.validate(path)
        assert int(suite.get("tests", "")) == len(suite.findall("testcase"))
        assert int(suite.get("failures", "")) == len(suite.findall(".//failure")) == len(report.errors)
        assert int(suite.get("skipped", "")) == len(suite.findall(".//skipped")) == len(report.skipped)
    said = " ".join(failure.text or "" for failure in suites[1].iter("failure"))
    assert "rank" in said


def test_sarif_has_a_result_for_each_problem(adapters: tuple[Path, Path]) -> None:
    good, bad = adapters
    code, text = run(good, bad, "--format", "sarif")
    assert code == 1
    log = json.loads(text)
    assert log["version"] == "2.1.0"
    (made,) = log["runs"]
    problems = [problem for path in adapters for problem in at.validate(path).problems]
    assert len(made["results"]) == len(problems) > 0
    rules = [rule["id"] for rule in made["tool"]["driver"]["rules"]]
    for result, problem in zip(made["results"], problems, strict=True):
        assert rules[result["ruleIndex"]] == result["ruleId"] == problem.kind
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert uri.startswith(str(bad))


def test_passed_is_exit_code_zero_in_every_form(adapters: tuple[Path, Path]) -> None:
    for form in ("text", "json", "junit", "sarif"):
        assert run(adapters[0], "--format", form)[0] == 0


def test_a_file_stands_for_its_folder_once(adapters: tuple[Path, Path]) -> None:
    good = adapters[0]
    code, text = run(
        good / "adapter_config.json", good / "adapter_model.safetensors", good, "--format", "json"
    )
    assert code == 0
    assert json.loads(text)["path"] == str(good)


def test_several_adapters_as_json(adapters: tuple[Path, Path]) -> None:
    code, text = run(*adapters, "--json")
    assert code == 1
    assert [item["ok"] for item in json.loads(text)["adapters"]] == [True, False]


def test_what_cannot_be_read_is_neither_passed_nor_failed(tmp_path: Path) -> None:
    code, text = run(tmp_path / "absent", "--format", "junit")
    suites = ElementTree.fromstring(text)
    assert code in (1, 10)
    assert suites[0].findall(".//error") or suites[0].findall(".//failure")


def test_a_slash_behind_a_folder_changes_nothing(adapters: tuple[Path, Path]) -> None:
    good, bad = adapters
    for form in ("json", "sarif", "junit"):
        assert run(f"{good}/", f"{bad}/", good, "--format", form) == run(good, bad, "--format", form)
