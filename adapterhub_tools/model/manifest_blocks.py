"""The blocks of a manifest that enter the maths: method, targets and the base.

A newer minor version may add optional fields anywhere else; there they are kept through a rewrite. Here a
field that this version does not know could change what is computed, so it is an error.
"""

from __future__ import annotations

import re
from typing import Any

from adapterhub_tools.model.adapter import FULL_ROLES, KINDS, Adapter, FullTensor, TargetModule
from adapterhub_tools.model.base import BaseRef
from adapterhub_tools.model.json_fields import Fields
from adapterhub_tools.model.quant_scheme import scheme_problems
from adapterhub_tools.model.tensor import DTYPE_BITS, TensorSpec

SCALINGS = ("alpha/rank", "alpha/sqrt(rank)", "alpha")
"""The rules by which rank and alpha give the effective scale."""

TENSOR_DIGEST = re.compile(r"tensor-tree-(blake3|sha256)-v1:[0-9a-f]{64}")
CONFIG_DIGEST = re.compile(r"config-sha256-v1:[0-9a-f]{64}")
ADAPTER_DIGEST = re.compile(r"adapter-tree-(blake3|sha256)-v1:[0-9a-f]{64}")
ANY_DIGEST = re.compile(
    r"((tensor|adapter)-tree-(blake3|sha256)-v1|config-sha256-v1|sha256):[0-9a-f]{64}",
)
LOW_RANK_METHODS = ("lora", "dora")

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
"""Names of methods and dialects."""


def method_to_json(adapter: Adapter) -> dict[str, Any]:
    """Returns the ``method`` block."""
    return {"name": adapter.method, "dialect": adapter.dialect, "hyperparameters": adapter.hparams}


def targets_to_json(adapter: Adapter) -> dict[str, Any]:
    """Returns the ``targets`` block."""
    data: dict[str, Any] = {
        "modules": [module.to_json() for module in adapter.modules],
        "full": [full.to_json() for full in adapter.full],
    }
    if adapter.ties:
        data["ties_embeddings"] = True
    return data


def read_adapter(method: Fields, targets: Fields, base: BaseRef | None) -> Adapter:
    """Reads the ``method`` and ``targets`` blocks.

    Returns:
        the adapter that they describe; where a problem was added, with a stand-in for what is missing.
    """
    name = method.text("name", required=True, pattern=NAME) or "unknown"
    dialect = method.text("dialect", required=True, pattern=NAME) or "unknown"
    hparams = _hyperparameters(method, name)
    method.refuse_rest()
    modules = tuple(_module(item) for item in targets.objects("modules", required=True))
    full = tuple(_full(item) for item in targets.objects("full", required=True))
    ties = targets.boolean("ties_embeddings")
    targets.refuse_rest()
    _refuse_repeats(targets, "modules", [_place(m) for m in modules], "the module")
    _refuse_repeats(targets, "full", [f"{f.target}: {f.role}" for f in full], "the tensor")
    return Adapter(
        dialect=dialect, method=name, hparams=hparams, modules=modules, full=full, base=base, ties=bool(ties)
    )


def read_base(fields: Fields) -> tuple[BaseRef, dict[str, Any]]:
    """Reads the ``base`` block.

    Returns:
        the base, and the fields of a newer minor version, which a rewrite keeps.
    """
    base = BaseRef(
        id=fields.text("id"),
        revision=fields.text("revision"),
        architecture=fields.text("architecture"),
        dtype=_dtype(fields, "dtype", required=False),
        parameters=fields.integer("parameters"),
        digest=fields.text("digest", pattern=TENSOR_DIGEST),
        targets_digest=fields.text("targets_digest", pattern=TENSOR_DIGEST),
        config_digest=fields.text("config_digest", pattern=CONFIG_DIGEST),
        random_digest=fields.text("random_digest", pattern=TENSOR_DIGEST),
        quantisation=fields.mapping("quantisation"),
    )
    if base.quantisation is not None:
        check_quantisation(fields.nested(base.quantisation, "quantisation"))
    return base, fields.rest()


def check_quantisation(fields: Fields) -> None:
    """Checks how the base was quantised while training: ``scheme`` is required, the rest optional.

    Of schemes that are known here, the rest must not contradict the scheme; others may say what they like.
    """
    fields.text("scheme", required=True)
    fields.integer("bits", at_least=1)
    fields.integer("block_size", at_least=1)
    fields.boolean("double")
    _dtype(fields, "compute_dtype", required=False)
    _dtype(fields, "storage_dtype", required=False)
    fields.texts("skip_modules")
    fields.text("version")
    fields.refuse_rest()
    fields.problems.extend(scheme_problems(fields.data, file=fields.file, loc=fields.loc))


def _module(fields: Fields) -> TargetModule:
    factors = fields.nested(fields.mapping("factors", required=True) or {}, "factors")
    method = fields.text("method", required=True, pattern=NAME) or "unknown"
    kind = fields.text("kind", required=True) or "unknown"
    if kind not in KINDS:
        fields.complain("value", f"is {kind!r}, expected one of {', '.join(KINDS)}.", at="kind")
    module = TargetModule(
        path=fields.text("path", required=True) or "",
        method=method,
        kind=kind,
        hparams=_hyperparameters(fields, method),
        factors={role: _tensor(factors.nested(factors.data[role], role)) for role in factors.data},
        base_shape=fields.integers("base_shape"),
    )
    fields.refuse_rest()
    return module


def _hyperparameters(fields: Fields, method: str) -> dict[str, Any]:
    """Takes ``hyperparameters``: those of low-rank methods are all known here, others are their method's."""
    data = fields.mapping("hyperparameters", required=True) or {}
    inner = fields.nested(data, "hyperparameters")
    low_rank = method in LOW_RANK_METHODS
    inner.integer("rank", required=low_rank, at_least=1)
    inner.number("alpha", required=low_rank)
    scaling = inner.text("scaling", required=low_rank)
    if low_rank:
        inner.boolean("fan_in_fan_out")
        inner.integer("groups", at_least=1)
        inner.integer("nesting")
        inner.refuse_rest()
    if scaling is not None and scaling not in SCALINGS:
        inner.complain("value", f"is {scaling!r}, expected one of {', '.join(SCALINGS)}.", at="scaling")
    return data


def _full(fields: Fields) -> FullTensor:
    role = fields.text("role", required=True) or FULL_ROLES[0]
    if role not in FULL_ROLES:
        fields.complain("value", f"is {role!r}, expected one of {', '.join(FULL_ROLES)}.", at="role")
    full = FullTensor(
        target=fields.text("target", required=True) or "",
        role=role,
        tensor=_tensor(fields.nested(fields.raw("tensor", required=True) or {}, "tensor")),
        rows=fields.integers("rows", required=role == "token_rows"),
    )
    fields.refuse_rest()
    return full


def _tensor(fields: Fields) -> TensorSpec:
    spec = TensorSpec(
        name=fields.text("name", required=True) or "",
        dtype=_dtype(fields, "dtype", required=True) or "U8",
        shape=fields.integers("shape", required=True) or (),
    )
    fields.refuse_rest()
    return spec


def _dtype(fields: Fields, name: str, *, required: bool) -> str | None:
    found = fields.text(name, required=required)
    if found is None or found in DTYPE_BITS:
        return found
    fields.complain("dtype", f"is {found!r}, expected a safetensors dtype such as 'BF16'.", at=name)
    return None


def _place(module: TargetModule) -> str:
    """What tells a module from others; several may be nested on one path."""
    return f"{module.path}@{module.hparams.get('nesting', 0)}"


def _refuse_repeats(fields: Fields, array: str, keys: list[str], what: str) -> None:
    seen: set[str] = set()
    for index, key in enumerate(keys):
        if key in seen:
            fields.nested({}, array, index).complain("duplicate", f"{what} {key!r} is listed twice.")
        seen.add(key)
