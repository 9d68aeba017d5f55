"""What servers accept of an adapter: a data table with its sources and versions (``servers.json``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapterhub_tools.ops.option_checks import check_choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """What a server does with one feature.

    Attributes:
        accepts: True, False, ``"unknown"`` where the model decides, or for ``method`` the methods.
        says: what the source says, in words.
        source: where that stands.
    """

    accepts: bool | str | tuple[str, ...]
    says: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One server.

    Attributes:
        name: its name, as ``--for`` takes it.
        title: what is meant.
        checked: the versions that the table was checked against.
        scale: how it finds a module's scale: ``"patterns"`` as PEFT does; ``"alpha"`` by one alpha over the
            rank of each tensor; ``"alpha-and-rank"`` by one alpha and one rank.
        alpha_bits: the significant bits that alpha may have.
        max_rank: the largest rank; None for any.
        ranks: the values that its limit on ranks can be set to; empty if it has none.
        listed_targets: whether ``target_modules`` has to be a list of names, and not a pattern.
        partners: last part of a module's path -> those of the modules that have to be beside it.
        features: feature -> what it does with it.
    """

    name: str
    title: str
    checked: str
    scale: str
    alpha_bits: int
    max_rank: int | None
    ranks: tuple[int, ...]
    listed_targets: bool
    partners: dict[str, tuple[str, ...]]
    features: dict[str, Feature]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A layer that holds several others, the outputs of one after those of another.

    Attributes:
        name: the last part of its path.
        parts: the last parts of the paths of what it holds, in their order.
        equal: the parts that have the same number of outputs.
        source: where the order stands.
    """

    name: str
    parts: tuple[str, ...]
    equal: tuple[str, ...]
    source: str


def server_names() -> tuple[str, ...]:
    """Returns the names of the servers that the table knows."""
    return tuple(_table()["servers"])


def server(name: str) -> Server:
    """Returns what a server accepts.

    Raises:
        ValueError: the table does not know it.
    """
    servers = _table()["servers"]
    check_choice("server", name, servers)
    data = dict(servers[name])
    features = {
        key: Feature(
            accepts=tuple(value["accepts"]) if isinstance(value["accepts"], list) else value["accepts"],
            says=value["says"],
            source=value["source"],
        )
        for key, value in data.pop("features").items()
    }
    partners = {key: tuple(value) for key, value in data.pop("partners").items()}
    ranks = tuple(data.pop("ranks") or ())
    return Server(name=name, features=features, ranks=ranks, partners=partners, **data)


def fused_layers() -> tuple[Fused, ...]:
    """Returns the layers that hold several others."""
    return tuple(
        Fused(name=name, parts=tuple(item["parts"]), equal=tuple(item["equal"]), source=item["source"])
        for name, item in _table()["fused"].items()
    )


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((Path(__file__).parent / "servers.json").read_text(encoding="utf-8"))
    return data
