"""What combine refuses: the exact class, what it says, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from tests.property.low_rank_folders import PREFIX, gaussian, write_base, write_lora

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[Path], dict[str, Any]]


def factors(rank: int, seed: int, path: str = "m.q", rows: int = 5) -> dict[str, Any]:
    return {path: (gaussian(rows, rank, seed), gaussian(rank, 6, seed + 1))}


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Two adapters, and a base that they fit."""
    write_lora(tmp_path / "a", factors(2, 1))
    write_lora(tmp_path / "b", factors(3, 11))
    write_base(tmp_path / "base", {"m.q.weight": gaussian(5, 6, 21), "m.v.weight": gaussian(5, 6, 22)})
    return tmp_path


def given(**options: Any) -> Change:
    return lambda _: options


def second(*args: Any, **config: Any) -> Change:
    """Replaces the second adapter."""

    def change(root: Path) -> dict[str, Any]:
        shutil.rmtree(root / "b")
        write_lora(root / "b", factors(*args), **config)
        return {}

    return change


def edited(edit: Callable[[dict[str, Tensor]], None], *names: str, **options: Any) -> Change:
    """Edits the tensors of adapters."""

    def change(root: Path) -> dict[str, Any]:
        for name in names:
            file = root / name / "adapter_model.safetensors"
            tensors = load_file(file)
            edit(tensors)
            save_file(tensors, file)
        return options

    return change


def poison(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}m.q.lora_A.weight"][0, 0] = float("nan")


def blank(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}m.q.lora_B.weight"].zero_()


def other_bases(root: Path) -> dict[str, Any]:
    write_base(root / "other", {"m.q.weight": gaussian(5, 6, 31), "m.v.weight": gaussian(5, 6, 32)})
    at.init(root / "a", base=root / "base")
    at.init(root / "b", base=root / "other")
    return {}


def wrong_base(root: Path) -> dict[str, Any]:
    write_base(root / "other", {"m.q.weight": gaussian(5, 6, 31), "m.v.weight": gaussian(5, 6, 32)})
    at.init(root / "a", base=root / "base")
    return {"base": root / "other"}


def stale(root: Path) -> dict[str, Any]:
    at.init(root / "a")
    return edited(lambda t: t[f"{PREFIX}m.q.lora_B.weight"].mul_(2), "a")(root)


def copied(root: Path) -> dict[str, Any]:
    shutil.rmtree(root / "b")
    shutil.copytree(root / "a", root / "b")
    return {}


def opposite(root: Path) -> dict[str, Any]:
    """The same deltas in files that differ: −1 is in the factors."""
    copied(root)
    edited(lambda t: t[f"{PREFIX}m.q.lora_B.weight"].neg_(), "b")(root)
    return {"weights": [1, 1]}


def dora(root: Path) -> dict[str, Any]:
    edited(lambda t: t.update({f"{PREFIX}m.q.lora_magnitude_vector": gaussian(5, 1, 3)[:, 0]}), "b")(root)
    file = root / "b" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    return {}


def dora_on_factors(root: Path) -> dict[str, Any]:
    return {**dora(root), "base": root / "base", "space": "factors"}


def pickled(root: Path) -> dict[str, Any]:
    (root / "b" / "adapter_model.safetensors").rename(root / "b" / "adapter_model.bin")
    return {}


def pissa(root: Path) -> dict[str, Any]:
    return second(2, 5, init_lora_weights="pissa")(root)


def whole_beside_factors(root: Path) -> dict[str, Any]:
    """The first adapter saves m.v whole, the second has factors for it."""
    edited(lambda t: t.update({f"{PREFIX}m.v.weight": gaussian(5, 6, 4)}), "a")(root)
    file = root / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": ["v"]}))
    shutil.rmtree(root / "b")
    write_lora(root / "b", {**factors(2, 5), **factors(2, 7, "m.v")})
    return {"base": root / "base"}


CASES: dict[str, tuple[type[at.AdapterError], str, Change]] = {
    "a weight too few": (at.MismatchError, "weights", given(weights=[1.0])),
    "a weight too many": (at.MismatchError, "weights", given(weights="1,2,3")),
    "a weight that is none": (at.MismatchError, "weights", given(weights="1,much")),
    "an infinite weight": (at.MismatchError, "weights", given(weights=[1.0, float("inf")])),
    "a weight that is NaN": (at.MismatchError, "weights", given(weights="nan,1")),
    "only patterns": (at.MismatchError, "weights", given(weights=["q=1,1"])),
    "a pattern twice": (at.MismatchError, "weights", given(weights=["1,1", "q=1,1", "q=0,1"])),
    "an empty pattern": (at.MismatchError, "weights", given(weights=["1,1", "=0,1"])),
    "a pattern for nothing": (at.MismatchError, "weight-pattern", given(weights=["1,1", "z=0,1"])),
    "a broken pattern": (at.FormatError, "regex", given(weights=["1,1", "q(=0,1"])),
    "all weights 0": (at.MismatchError, "weights", given(weights=[0, 0])),
    "all weights 0 by a pattern": (at.MismatchError, "zero-delta", given(weights=["1,1", "q=0,0"])),
    "deltas that are zero": (at.MismatchError, "zero-delta", edited(blank, "a", "b")),
    "deltas that cancel": (at.MismatchError, "zero-delta", opposite),
    "NaN": (at.FormatError, "non-finite", edited(poison, "b")),
    "the same content twice": (at.MismatchError, "duplicate", copied),
    "other bases": (at.MismatchError, "bases", other_bases),
    "another base than recorded": (at.IntegrityError, "base-digest", wrong_base),
    "a manifest of other tensors": (at.IntegrityError, "file-digest", stale),
    "no common targets": (at.MismatchError, "no-common-targets", second(2, 5, "m.v")),
    "other shapes": (at.MismatchError, "shape", second(2, 5, "m.q", 7)),
    "other layouts": (at.MismatchError, "shape", second(2, 5, fan_in_fan_out=True)),
    "a rank beyond the matrix": (at.MismatchError, "rank", given(rank=6)),
    "a rank beyond the ranks": (at.MismatchError, "rank", second(1, 5)),
    "two policies": (at.MismatchError, "policy", given(rank=2, energy=0.5)),
    "a budget too small": (at.MismatchError, "budget", given(budget="3")),
    "an unknown method": (at.UnsupportedError, "unknown-name", given(method="magic")),
    "a method outside the folder": (at.UnsupportedError, "unknown-name", given(method="../ops/scan")),
    "an option of another method": (at.MismatchError, "option", given(density=0.5)),
    "a density out of range": (at.MismatchError, "option", given(method="ties", density=1.5)),
    "slerp of a negative weight": (at.MismatchError, "weights", given(method="slerp", weights=[1, -1])),
    "DoRA without its base": (at.MismatchError, "base", dora),
    "DoRA on factors": (at.UnsupportedError, "method", dora_on_factors),
    "a module whole and by factors": (at.MismatchError, "whole-and-factors", whole_beside_factors),
    "an altered base": (at.UnsupportedError, "altered-base", pissa),
    "a pickle": (at.UnsupportedError, "not-safetensors", pickled),
    "different ranks on factors": (at.MismatchError, "rank", given(space="factors")),
    "no density on factors": (at.MismatchError, "option", given(space="factors", method="ties_svd")),
    "gamma on factors": (at.MismatchError, "option", given(space="factors", method="svd", gamma=0.1)),
    "an own method on factors": (at.UnsupportedError, "method", given(space="factors", method="slerp")),
    "energy on factors": (at.MismatchError, "policy", given(space="factors", method="svd", energy=0.9)),
    "a type of PEFT on deltas": (at.UnsupportedError, "unknown-name", given(method="ties_svd")),
    "a rank into a base": (at.MismatchError, "option", given(into="base", rank=2)),
    "undo of an adapter": (at.MismatchError, "option", given(undo=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_nothing_is_written(name: str, scene: Path) -> None:
    error, kind, change = CASES[name]
    options = {"weights": [0.5, 0.5], **change(scene)}
    if name == "a rank beyond the ranks":
        options["rank"] = 4
    if "into" in options:
        options["into"] = scene / options["into"]
    before = sorted(scene.rglob("*"))
    with pytest.raises(at.AdapterError) as caught:
        at.combine_adapters([scene / "a", scene / "b"], out=scene / "out", **options)
    assert type(caught.value) is error, caught.value
    assert kind in {problem.kind for problem in caught.value.problems}, caught.value
    assert all(problem.remedy for problem in caught.value.problems[:1])
    assert sorted(scene.rglob("*")) == before


WORDS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "a percentage": ({"method": "ties", "density": 50}, "--density", ("(0, 1]", "50", "takes 0.2", "0.5")),
    "della's width": ({"method": "della", "epsilon": 2}, "--epsilon", ("[0, 1)", "takes 0.2")),
    "a seed": ({"method": "dare_ties", "seed": -1}, "--seed", ("2^64", "-1", "takes 0.")),
    "a word": ({"weights": "1,much"}, "--weights", ("'much'", "finite", "0.7,0.3")),
    "too few": ({"weights": "1"}, "--weights", ("1 weight;", "expected 2")),
    "an energy": ({"energy": 99}, "--energy", ("99", "above 0 and up to 1", "0.99")),
    "an error": ({"max_error": -1}, "--max-error", ("-1", "from 0 to 1")),
    "a ratio": ({"sv_ratio": 0.5}, "--sv-ratio", ("0.5", "at least 1")),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_message_names_the_option_what_was_found_and_what_is_expected(name: str, scene: Path) -> None:
    options, loc, words = WORDS[name]
    with pytest.raises(at.MismatchError) as caught:
        at.combine_adapters([scene / "a", scene / "b"], out=scene / "o", **{"weights": [1, 1], **options})
    (problem,) = caught.value.problems
    assert problem.loc == loc
    assert all(word in str(problem) for word in words), problem


def test_the_adapter_that_does_not_fit_the_base_is_named(scene: Path) -> None:
    second(2, 5, "m.q", 7)(scene)
    with pytest.raises(at.MismatchError) as caught:
        at.combine_adapters([scene / "a", scene / "b"], out=scene / "o", weights=[1, 1], base=scene / "base")
    assert [(p.file, p.loc, p.kind) for p in caught.value.problems] == [("b", "m.q", "shape")]


def test_one_adapter_and_the_same_twice(scene: Path) -> None:
    for folders in ([scene / "a"], [scene / "a", scene / "b" / ".." / "a"]):
        with pytest.raises(at.MismatchError):
            at.combine_adapters(folders, out=scene / "out", weights=[1.0] * len(folders))
    assert not (scene / "out").exists()


@pytest.mark.parametrize("out", ["a", "a/inside", "."])
def test_the_output_may_not_touch_an_input(out: str, scene: Path) -> None:
    with pytest.raises(at.StoreError):
        at.combine_adapters([scene / "a", scene / "b"], out=scene / out, weights=[1, 1], replace=True)
    assert sorted(p.name for p in (scene / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_disjoint_adapters_if_allowed(scene: Path) -> None:
    second(2, 5, "m.v")(scene)
    report = at.combine_adapters(
        [scene / "a", scene / "b"], out=scene / "o", weights=[1, 2], allow_disjoint=True
    )
    assert {module.path: module.rank for module in report.modules} == {"m.q": 2, "m.v": 2}


def test_usage_errors_exit_2_and_mismatches_5(scene: Path) -> None:
    adapters = [str(scene / "a"), str(scene / "b")]
    out = ["--out", str(scene / "out")]
    assert CliRunner().invoke(cli, ["combine", *adapters, *out]).exit_code == 2
    assert CliRunner().invoke(cli, ["combine", *adapters, "--weights", "1,1"]).exit_code == 2
    done = CliRunner().invoke(cli, ["combine", *adapters, "--weights", "1", *out, "--json"])
    assert done.exit_code == 5
    (problem,) = json.loads(done.output)["problems"]
    assert problem["kind"] == "weights"
    assert problem["loc"] == "--weights"
