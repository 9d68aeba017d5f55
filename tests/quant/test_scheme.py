"""What a scheme is called: by users, in manifests and in the configs of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adapterhub_tools import registry
from adapterhub_tools.errors import FormatError, UnsupportedError
from adapterhub_tools.model.manifest import Manifest
from adapterhub_tools.model.quant_scheme import FORMAT_BITS, QuantScheme
from tests.quant.conftest import CONFIGS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nf4", QuantScheme(format="nf4", block_size=64)),
        ("NF4,double", QuantScheme(format="nf4", block_size=64, double=True)),
        ("fp4, double, 128", QuantScheme(format="fp4", block_size=128, double=True)),
        ("bitsandbytes-nf4,32", QuantScheme(format="nf4", block_size=32)),
        ("int8", QuantScheme(format="int8")),
    ],
)
def test_what_a_user_types(text: str, expected: QuantScheme) -> None:
    assert QuantScheme.parse(text) == expected
    assert QuantScheme.from_json(expected.to_json()) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nf5",
        "gptq",
        "nf4,63",
        "nf4,triple",
        "int8,double",
        "int8,64",
        "nf4,",
        "nf4,64,128",
        "nf4,double,double",
    ],
)
def test_what_nobody_can_mean(text: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        QuantScheme.parse(text)
    (problem,) = raised.value.problems
    assert problem.kind == "unknown-scheme"
    assert problem.remedy


@pytest.mark.parametrize(("text", "dtype"), [("bf16", "BF16"), ("float16", "F16"), ("F32", "F32")])
def test_compute_dtypes(text: str, dtype: str) -> None:
    assert QuantScheme.parse("nf4", compute_dtype=text).compute_dtype == dtype


@pytest.mark.parametrize("text", ["float64", "int8", "b16"])
def test_compute_dtypes_that_there_are_not(text: str) -> None:
    with pytest.raises(UnsupportedError, match="compute dtype"):
        QuantScheme.parse("nf4", compute_dtype=text)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_of_transformers(name: str) -> None:
    scheme = QuantScheme.from_config(json.loads(CONFIGS[name].to_json_string(use_diff=False)))
    assert scheme.format == name.partition("-")[0]
    assert scheme.double == name.endswith("double")
    assert scheme.skip_modules is None


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "fp8"])
def test_other_libraries_are_named(method: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        QuantScheme.from_config({"quant_method": method, "bits": 4})
    (problem,) = raised.value.problems
    assert (problem.kind, problem.loc) == ("unknown-scheme", "quantization_config.quant_method")
    assert repr(method) in problem.message


@pytest.mark.parametrize(
    ("changes", "loc"),
    [
        ({"bits": 8}, "bits"),
        ({"block_size": 63}, "block_size"),
        ({"scheme": "bitsandbytes-int8", "bits": 8, "block_size": 64}, "block_size"),
        ({"scheme": "bitsandbytes-int8", "bits": 8, "double": True}, "double"),
    ],
)
def test_a_manifest_that_contradicts_its_scheme(changes: dict[str, Any], loc: str) -> None:
    recorded = {"scheme": "bitsandbytes-nf4", "bits": 4, **changes}
    with pytest.raises(FormatError) as raised:
        QuantScheme.from_json(recorded, file="adapter_manifest.json", loc="/base/quantisation")
    (problem,) = raised.value.problems
    assert problem.loc == f"/base/quantisation/{loc}"
    data = {
        "schema_version": "1.0",
        "method": {
            "name": "lora",
            "dialect": "peft",
            "hyperparameters": {"rank": 1, "alpha": 1, "scaling": "alpha/rank"},
        },
        "targets": {"modules": [], "full": []},
        "base": {"quantisation": recorded},
        "files": [],
    }
    with pytest.raises(FormatError) as whole:
        Manifest.from_json(data)
    assert f"/base/quantisation/{loc}" in {p.loc for p in whole.value.problems}


def test_a_manifest_may_name_a_scheme_that_is_not_known_here() -> None:
    data = {
        "schema_version": "1.0",
        "method": {
            "name": "lora",
            "dialect": "peft",
            "hyperparameters": {"rank": 1, "alpha": 1, "scaling": "alpha/rank"},
        },
        "targets": {"modules": [], "full": []},
        "base": {"quantisation": {"scheme": "gptq", "bits": 3, "block_size": 100}},
        "files": [],
    }
    recorded = Manifest.from_json(data).base.quantisation
    assert recorded is not None
    with pytest.raises(UnsupportedError, match="'gptq', which is not known here"):
        QuantScheme.from_json(recorded)


def test_every_listed_format_has_a_scheme_and_all_that_is_asked_of_it() -> None:
    assert set(registry.names("quant")) == set(FORMAT_BITS)
    for name in registry.names("quant"):
        implementation = registry.load("quant", name).IMPLEMENTATION
        for part in ("check", "scales", "data_range", "dequantize", "encoder", "loader"):
            assert callable(getattr(implementation, part)), (name, part)
