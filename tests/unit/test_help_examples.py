"""The examples in the help are commands as people may paste them: their options and references are right."""

from __future__ import annotations

import shlex

import click
import pytest

from adapterhub_tools.cli.main import COMMANDS, cli
from adapterhub_tools.cli.tool_command import ToolCommand
from adapterhub_tools.hub.reference import HubReference, parse_reference, parse_registry

EXAMPLES: list[tuple[str, str]] = []
for _name in COMMANDS:
    _command = cli.get_command(click.Context(cli), _name)
    assert isinstance(_command, ToolCommand)
    EXAMPLES += [(_name, line) for line in _command.example.splitlines()]


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_an_example_parses(name: str, line: str) -> None:
    program, verb, *arguments = shlex.split(line)
    assert (program, verb) == ("adaptertool", name)
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    command.make_context(verb, arguments)  # a wrong option or value is raised
    for reference in (word for word in arguments if "://" in word):
        if verb == "list" and not reference.startswith("hf://"):
            assert parse_registry(reference).root == reference
        else:
            found = parse_reference(reference)
            id = found.id if isinstance(found, HubReference) else found.name
            assert id.count("/") == 1


def test_there_is_one_for_each_command() -> None:
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)
