"""Config and names that the PEFT dialect writes, read back by the dialect and by PEFT's own rules."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from adapterhub_tools.dialects import peft
from adapterhub_tools.dialects._peft.writing import patterns, shortest_names
from adapterhub_tools.errors import UnsupportedError
from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
from adapterhub_tools.model.tensor import TensorSpec


def peft_lookup(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """peft.utils.other.get_pattern_key and the lookup after it, as of PEFT 0.21."""
    for key in sorted(pattern):  # saving sorts the keys
        if re.match(rf"(.*\.)?({key})$", path):
            return pattern[key]
    return pattern.get(path, default)


@pytest.mark.parametrize("seed", range(30))
def test_patterns_give_every_path_its_value_by_pefts_rules(seed: int) -> None:
    source = random.Random(seed)
    names = ["q_proj", "k_proj", "q", "a.q", "fc+1", "x"]
    paths = {f"{source.choice(['', 'm.', 'm.l.'])}{source.randint(0, 11)}.{name}" for name in names * 4}
    paths |= {"q", "m.q"} if seed % 2 else set()
    values = {path: source.choice([4, 8, 8, 16]) for path in sorted(paths)}
    default, keys = patterns(values)
    assert {path: peft_lookup(keys, path, default) for path in values} == values


def test_patterns_are_short_where_modules_agree() -> None:
    values = {f"m.layers.{i}.{name}": 4 if name == "q" else 8 for i in range(12) for name in ("q", "k", "v")}
    assert patterns(values) == (8, {"q": 4})
    assert patterns(dict.fromkeys(values, 8)) == (8, {})
    values["m.layers.1.k"] = 2
    assert patterns(values) == (8, {"m.layers.1.k": 2, "q": 4})


def test_a_path_that_ends_another_is_anchored() -> None:
    default, keys = patterns({"a.q": 4, "b.a.q": 8, "c": 8})
    assert (default, keys) == (8, {r"^a\.q": 4})


def test_names_mean_no_other_module() -> None:
    assert shortest_names(["m.0.q", "m.1.q"], ["m.0.k"]) == ["q"]
    assert shortest_names(["m.0.q", "m.1.q"], ["m.2.q"]) == ["m.0.q", "m.1.q"]
    # modules_to_save matches any end of the text, so "norm" would mean "input_norm" too.
    assert shortest_names(["m.norm"], ["m.0.input_norm"], dotted=False) == ["m.norm"]
    assert shortest_names(["m.norm"], ["m.0.mlp"], dotted=False) == ["norm"]
    assert shortest_names(["m.norm", "m.0.input_norm"], ["m.0.mlp"], dotted=False) == ["norm"]


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="F32", shape=shape)


def module(
    path: str, kind: str = "linear", *, rank: int = 4, alpha: float = 8.0, **extra: Any
) -> TargetModule:
    a, b = (spec(f"{path}.A", rank, 6), spec(f"{path}.B", 5, rank))
    if kind == "conv2d":
        a, b = spec(f"{path}.A", rank, 6, 3, 3), spec(f"{path}.B", 5, rank, 1, 1)
    factors = {"A": a, "B": b, **extra}
    hparams = {"rank": rank, "alpha": alpha, "scaling": "alpha/rank"}
    return TargetModule(path=path, method="lora", kind=kind, hparams=hparams, factors=factors)


def read_back(adapter: Adapter, base_modules: list[str] | None = None) -> Adapter:
    written = peft.write(adapter, base_modules=base_modules)
    found, problems = peft.examine({s.name: s for s in written.tensors.values()}, written.config)
    assert [problem for problem in problems if problem.severity == "error"] == []
    return found


def test_what_is_written_is_read_back() -> None:
    modules = (
        module("m.conv", "conv2d", rank=2, bias=spec("m.conv.b", 5)),
        module("m.embed_tokens", "embedding"),
        module("m.q_proj", alpha=3.5, bias=spec("m.q_proj.b", 5)),
    )
    full = (
        FullTensor(target="m.head.weight", role="modules_to_save", tensor=spec("w", 7, 6)),
        FullTensor(target="m.q_proj.bias", role="bias", tensor=spec("x", 5)),
    )
    found = read_back(Adapter(dialect="peft", method="lora", hparams={}, modules=modules, full=full))
    assert [m.path for m in found.modules] == [m.path for m in modules]
    for mine, read in zip(modules, found.modules, strict=True):
        assert (read.kind, read.hparams["rank"], read.hparams["alpha"]) == (
            mine.kind,
            mine.hparams["rank"],
            mine.hparams["alpha"],
        )
        assert {r: s.shape for r, s in read.factors.items()} == {r: s.shape for r, s in mine.factors.items()}
    assert [(f.target, f.role, f.tensor.shape) for f in found.full] == [
        ("m.head.weight", "modules_to_save", (7, 6)),
        ("m.q_proj.bias", "bias", (5,)),
    ]


def test_a_rule_that_still_holds_is_kept_and_another_replaced() -> None:
    modules = (module("m.0.q"), module("m.1.q"))
    config = {"peft_type": "LORA", "target_modules": r".*\.q", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    adapter = Adapter(dialect="peft", method="lora", hparams={}, modules=modules, unparsed={"config": config})
    kept = peft.write(adapter).config
    assert {name: kept[name] for name in config} == config
    other = peft.write(adapter, base_modules=["m.0.q", "m.1.q", "m.2.q", "m.0.k"]).config
    assert other["target_modules"] == ["m.0.q", "m.1.q"]


def test_what_peft_cannot_say_is_refused() -> None:
    mixed = (
        module("a"),
        TargetModule(
            path="b",
            method="lora",
            kind="linear",
            factors={},
            hparams={"rank": 4, "alpha": 8.0, "scaling": "alpha/sqrt(rank)"},
        ),
    )
    with pytest.raises(UnsupportedError, match="one rule for all"):
        peft.write(Adapter(dialect="peft", method="lora", hparams={}, modules=mixed))
    with pytest.raises(UnsupportedError, match="Convert it to LoRA"):
        peft.write(Adapter(dialect="peft", method="ia3", hparams={}, modules=()))
