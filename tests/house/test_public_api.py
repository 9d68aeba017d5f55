"""The Python face and the command line are one thing: same verbs, same words for the same options."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli

REPOSITORY = Path(__file__).resolve().parents[2]

# Commands whose function has another name than the command.
OTHER_NAME = {
    "combine": "combine_adapters",  # combine is the folder of the methods
    "hash": "content_digest",  # hash is a builtin, and the function returns one digest
    "list": "list_adapters",  # list is a builtin
}
# Options of commands that no function has, with the reason.
ONLY_ON_THE_COMMAND_LINE = {
    "help": "the docstring is the help of a function",
    "format": "a function returns objects, each with to_json()",
    "json": "a function returns objects, each with to_json()",
    "quiet": "how much is printed; functions print nothing",
    "verbose": "how much is printed; functions print nothing",
}
# Parameters of functions that no command has, with the reason.
ONLY_IN_PYTHON = {
    "progress": "a command shows progress on a terminal by itself",
}
# Where the two have to differ for one command only: (command, name) -> reason.
_MODELS = "BASE ADAPTER MERGED stand in the order of `merge`, or MERGED alone; in Python each has its name"
DIFFERENCES: dict[tuple[str, str], str] = {
    ("fit", "for"): "for is a keyword of Python; the function calls it server",
    ("fit", "server"): "for is a keyword of Python; the function calls it server",
    ("verify", "models"): _MODELS,
    ("verify", "base"): _MODELS,
    ("verify", "adapter"): _MODELS,
    ("verify", "merged"): _MODELS,
}


def command_names() -> list[str]:
    return cli.list_commands(click.Context(cli))


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def function(name: str) -> Callable[..., object]:
    found = getattr(at, OTHER_NAME.get(name, name.replace("-", "_")))
    assert callable(found)
    return found


def command_words(name: str) -> set[str]:
    """The words a user of the command types: long flags and metavariables, as Python names."""
    words = set()
    for parameter in command(name).params:
        if isinstance(parameter, click.Argument):
            assert parameter.name is not None
            words.add(parameter.name)
            continue
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        assert flags, f"{name}: an option has no long flag: {parameter.opts}"
        words.add(flags[0].removeprefix("--").replace("-", "_"))
    return words - set(ONLY_ON_THE_COMMAND_LINE)


def function_words(name: str) -> set[str]:
    return set(inspect.signature(function(name)).parameters) - set(ONLY_IN_PYTHON)


def test_every_public_name_resolves() -> None:
    assert len(at.__all__) == len(set(at.__all__))
    for name in at.__all__:
        assert getattr(at, name) is not None, name


def test_dir_is_exactly_what_is_public() -> None:
    assert sorted(dir(at)) == sorted(at.__all__)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = at.no_such_name  # type: ignore[attr-defined]


def test_every_public_function_and_class_is_documented() -> None:
    for name in at.__all__:
        value = getattr(at, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


def calls_shown(function: Callable[..., object]) -> list[ast.Call]:
    """The calls of public functions in the examples of a docstring."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(function) or "")
    nodes = [node for example in examples for node in ast.walk(ast.parse(example.source))]
    return [
        node
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "at"
    ]


@pytest.mark.parametrize("name", [name for name in at.__all__ if inspect.isfunction(getattr(at, name))])
def test_every_function_shows_a_call_of_itself_that_its_signature_takes(name: str) -> None:
    calls = calls_shown(getattr(at, name))
    assert name in {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        keywords = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(getattr(at, call.func.attr)).bind(*call.args, **keywords)


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_a_function(name: str) -> None:
    assert OTHER_NAME.get(name, name.replace("-", "_")) in at.__all__


@pytest.mark.parametrize("name", command_names())
def test_flags_and_keywords_are_the_same_words(name: str) -> None:
    allowed = {word for (of, word) in DIFFERENCES if of == name}
    on_command, in_python = command_words(name) - allowed, function_words(name) - allowed
    assert on_command == in_python, (
        f"only flags of the command: {sorted(on_command - in_python)}; "
        f"only keywords of the function: {sorted(in_python - on_command)}"
    )


@pytest.mark.parametrize("name", command_names())
def test_options_are_keywords_and_inputs_are_positional(name: str) -> None:
    arguments = {p.name for p in command(name).params if isinstance(p, click.Argument)}
    for parameter in inspect.signature(function(name)).parameters.values():
        if parameter.name not in arguments:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.name


def test_every_exception_above_is_still_needed() -> None:
    assert set(OTHER_NAME) <= set(command_names())
    for of, word in DIFFERENCES:
        assert (word in command_words(of)) != (word in function_words(of)), (of, word)
    used = {word for name in command_names() for word in inspect.signature(function(name)).parameters}
    assert set(ONLY_IN_PYTHON) <= used


@pytest.mark.parametrize("name", command_names())
def test_help_of_every_command_has_an_example_and_json(name: str) -> None:
    context = click.Context(command(name), info_name=name, parent=click.Context(cli, info_name="adaptertool"))
    text = click.unstyle(command(name).get_help(context))
    assert f"adaptertool {name} " in text.split("Options:")[0].split("\n", 1)[1], "no example"
    assert "--json" in text


@pytest.mark.parametrize("name", command_names())
def test_every_option_is_explained(name: str) -> None:
    for parameter in command(name).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", command_names())
def test_a_wrong_flag_is_a_usage_error(name: str) -> None:
    program = Path(sys.executable).with_name("adaptertool")
    result = subprocess.run(
        [str(program), name, "--no-such-flag"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 2, result.stderr
    assert "--no-such-flag" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_page_is_up_to_date() -> None:
    # In a process of its own: click keeps the help option that a command was first asked for.
    result = subprocess.run(
        [sys.executable, "tools/generate_cli_docs.py", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
