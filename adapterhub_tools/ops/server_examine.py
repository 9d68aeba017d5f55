"""Holds the description of an adapter against what a server accepts, feature by feature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from adapterhub_tools.architectures import head_names
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.ops.low_rank import RULES
from adapterhub_tools.ops.server_layout import Layout
from adapterhub_tools.ops.server_report import ACCEPTED, REFUSED, REWRITTEN, UNKNOWN, ServerFinding
from adapterhub_tools.ops.server_scales import ScalePlan
from adapterhub_tools.ops.server_table import Server
from adapterhub_tools.ops.tied import says_tied
from adapterhub_tools.store.checkpoint import Checkpoint

_MERGE = "Merge the adapter into its base (`adaptertool merge`) and serve the merged model."
_FULL = {"base_bias": "bias"}
_SHOWN = 6


class Examination:
    """Collects findings.

    Args:
        adapter: what the adapter is.
        server: what the server accepts.
        base: the base, if it is given.
    """

    def __init__(self, adapter: Adapter, server: Server, base: Checkpoint | None) -> None:
        """Begins without findings."""
        self._adapter = adapter
        self._server = server
        self._base = base
        self.findings: list[ServerFinding] = []

    def _add(self, feature: str, found: str, verdict: str, said: str = "", remedy: str = _MERGE) -> None:
        item = self._server.features[feature]
        self.findings.append(
            ServerFinding(
                feature=feature,
                found=found,
                verdict=verdict,
                says=f"{item.says}{f'; {said}' if said else ''}",
                source=item.source,
                remedy=remedy if verdict == REFUSED else "",
            )
        )

    def _judge(self, feature: str, found: str, said: str = "", remedy: str = _MERGE) -> None:
        accepts = self._server.features[feature].accepts
        self._add(feature, found, verdict_of(accepts), said, remedy)

    def method(self) -> bool:
        """Examines the method; returns whether the rest can be examined."""
        adapter = self._adapter
        if adapter.method == "dora":
            self._judge(
                "dora",
                "DoRA",
                remedy=f"{_MERGE} Or approximate it: --to-lora with --base; DoRA has full rank in general.",
            )
        accepts = self._server.features["method"].accepts
        plain = adapter.method in ("lora", "dora")
        every = accepts is True and (plain or adapter.dialect == self._server.name)
        methods = accepts if isinstance(accepts, tuple) else ()
        if every:
            self._add("method", adapter.method, ACCEPTED)
        elif not plain:
            self._add(
                "method",
                f"an adapter of type {adapter.method}",
                REFUSED,
                remedy="Convert it with --to-lora and --base, or merge it and serve the merged model.",
            )
        elif adapter.method in methods:
            self._add("method", adapter.method, ACCEPTED)
        config = adapter.unparsed.get("config", {})
        if config.get("alora_invocation_tokens"):
            remedy = "Serve it with a server that knows aLoRA, such as llama.cpp."
            self._judge("alora", "aLoRA, whose delta acts behind its invocation tokens only", remedy=remedy)
        if config.get("arrow_config") and self._server.scale != "patterns":
            self._add("method", "Arrow, which routes tokens among adapters", REFUSED)
        return plain

    def full_tensors(self, equal: Collection[str]) -> None:
        """Examines the tensors that are carried in full.

        Args:
            equal: names of those that are the base's own.
        """
        roles: dict[str, list[str]] = {}
        for item in self._adapter.full:
            roles.setdefault(_FULL.get(item.role, item.role), []).append(item.tensor.name)
        for role, names in sorted(roles.items()):
            found = _listed(names)
            if verdict_of(self._server.features[role].accepts) == REFUSED and set(names) <= set(equal):
                self._add(role, found, REWRITTEN, "they are the base's own, so they are left out")
            else:
                rest = [name for name in names if name not in equal]
                compare = (
                    ""
                    if self._base is not None
                    else "Give --base, so that what is the base's own is left out. "
                )
                self._judge(role, _listed(rest) if rest else found, remedy=compare + _MERGE)
        biased = [module.path for module in self._adapter.modules if "bias" in module.factors]
        if biased:
            self._judge("lora_bias", f"a bias beside the factors of {len(biased)} modules")

    def modules(self) -> None:
        """Examines what sorts of module the adapter has."""
        modules = self._adapter.modules
        kinds = Counter(module.kind for module in modules)
        heads = [module.path for module in modules if module.path.rpartition(".")[2] in head_names()]
        if kinds["embedding"]:
            self._judge("embedding", f"factors of {kinds['embedding']} embeddings")
        if heads:
            tied = None if self._base is None else says_tied(self._base.config or {})
            if tied:
                self._judge("tied_head", f"factors of {heads[0]}, which the base ties to its embedding")
            else:
                self._judge("head", f"factors of {heads[0]}")
                apart = self._server.features["tied_head"].accepts is not True
                if tied is None and apart and self.findings[-1].verdict == ACCEPTED:
                    self._add("tied_head", "a base that was not given", UNKNOWN, "it may tie its head")
        convolutions = sum(kinds[kind] for kind in ("conv2d", "convnd"))
        if convolutions:
            self._judge("convolution", f"{convolutions} convolutions")
        stacked = [m for m in modules if m.kind == "expert" or m.hparams.get("nesting")]
        if stacked:
            self._judge("stacked_experts", f"factors of {len(stacked)} stacked experts")

    def layout(self, layout: Layout) -> None:
        """Examines whether the base has the modules."""
        names = sorted({module.path.rpartition(".")[2] for module in self._adapter.modules})
        if layout.absent:
            self._add(
                "targets",
                f"modules that the base does not have: {_listed(layout.absent)}",
                REFUSED,
                remedy="Give the base that the adapter was trained on.",
            )
            return
        for fused in {piece.fused.name: piece.fused for piece in layout.pieces if piece.fused}.values():
            pieces = [piece for piece in layout.pieces if piece.fused == fused]
            odd = any(
                set(origin.module.factors) != {"A", "B"} for piece in pieces for origin in piece.origins
            )
            self.findings.append(
                ServerFinding(
                    feature="layout",
                    found=f"{len(pieces)} modules, {pieces[0].how}",
                    verdict=REFUSED if odd else REWRITTEN,
                    remedy="Convert it to plain LoRA first (`adaptertool convert`)." if odd else "",
                    says=f"the base has {pieces[0].path.rpartition('.')[2]}; {fused.name} holds "
                    f"{', '.join(fused.parts)} one after another",
                    source=fused.source,
                )
            )
        alone = self._without_partners(layout)
        if alone:
            self._add(
                "targets",
                f"modules without those that have to be beside them: {_listed(alone)}",
                REFUSED,
                remedy=f"Train with them as targets. {_MERGE}",
            )
        elif self._server.listed_targets and is_pattern(self._adapter.unparsed.get("config", {})):
            self._add("targets", "a pattern of targets", REWRITTEN, "it becomes a list of names")
        else:
            self._judge("targets", _listed(names))

    def _without_partners(self, layout: Layout) -> list[str]:
        """Returns the modules beside which one is missing that the server expects there."""
        paths = {piece.path for piece in layout.pieces}
        found = []
        for path in paths:
            parent, dot, last = path.rpartition(".")
            partners = self._server.partners.get(last, ())
            if any(f"{parent}{dot}{partner}" not in paths for partner in partners):
                found.append(path)
        return found

    def scales(self, plan: ScalePlan | None, layout: Layout, max_rank: int | None) -> None:
        """Examines ranks and scales.

        Args:
            plan: how they are written; None where they stay as they are.
            layout: the modules.
            max_rank: the largest rank.
        """
        modules = self._adapter.modules
        ranks = Counter(int(module.hparams["rank"]) for module in modules)
        alphas = Counter(module.hparams["alpha"] for module in modules)
        rules = {module.hparams.get("scaling", RULES[0]) for module in modules}
        needed = max(ranks) if plan is None else max(item.rank for item in plan.modules.values())
        shown = ", ".join(str(rank) for rank in sorted(ranks))
        limits = [value for value in self._server.ranks if value >= needed]
        said = f"start it with --max-lora-rank {limits[0]} or more" if limits else ""
        if max_rank is not None and needed > max_rank:
            self._add(
                "rank",
                f"rank {needed}, above {max_rank}",
                REFUSED,
                remedy=f"Lower it first: `adaptertool svd-shrink ADAPTER OUT --rank {max_rank}`.",
            )
        elif len(ranks) > 1 and plan is not None and len({i.rank for i in plan.modules.values()}) == 1:
            self._add(
                "rank", f"ranks {shown}", REWRITTEN, f"{said}; zeros fill them up to {needed}".strip("; ")
            )
        else:
            self._judge("rank", f"rank {shown}", said)
        found = "alpha " + ", ".join(f"{alpha:g}" for alpha in sorted(alphas)[:_SHOWN])
        rslora = RULES[1] in rules
        if rslora:
            self._rslora(plan)
        if plan is None or self._as_it_is(plan, layout):
            self._judge("scale", found)
            return
        changed = [item for item in plan.modules.values() if float(item.factor) != 1.0]
        said = f"alpha becomes {plan.alpha:g}, B of {len(changed)} modules is multiplied"
        self._add("scale", found + " over √rank" * rslora, REWRITTEN, said)

    def stacked_scales(self) -> None:
        """Examines whether stacked experts and the other modules agree; they are not written anew."""
        scales = {
            (m.hparams["rank"], m.hparams["alpha"], m.hparams.get("scaling", RULES[0]))
            for m in self._adapter.modules
        }
        rules = {rule for _, _, rule in scales}
        if len(scales) > 1 or (RULES[1] in rules and self._server.features["rslora"].accepts is False):
            said = "stacked experts keep their factors, so ranks and scales have to agree as they are"
            self._add("stacked_experts", "modules of different rank or scale", REFUSED, said)

    def _rslora(self, plan: ScalePlan | None) -> None:
        if plan is not None and plan.rule == RULES[0]:
            self._add("rslora", "rsLoRA", REWRITTEN, "the scale goes into alpha and the factors")
        else:
            self._judge("rslora", "rsLoRA")

    def _as_it_is(self, plan: ScalePlan, layout: Layout) -> bool:
        """Tells whether every module keeps rank, alpha and rule."""
        for piece in layout.pieces:
            module, made = piece.origins[0].module, plan.modules[piece.path]
            same = (made.rank, plan.alpha) == (module.hparams["rank"], float(module.hparams["alpha"]))
            if piece.fused or not same or module.hparams.get("scaling", RULES[0]) != plan.rule:
                return False
        return True


def is_pattern(config: Mapping[str, Any]) -> bool:
    """Tells whether a config names its targets by one regular expression."""
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets not in ("all", "all-linear")


def verdict_of(accepts: bool | str | tuple[str, ...]) -> str:
    """Returns the verdict that a row of the table gives."""
    if accepts == "unknown":
        return UNKNOWN
    return ACCEPTED if accepts else REFUSED


def _listed(names: Collection[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def refusals(findings: Collection[ServerFinding]) -> Iterator[ServerFinding]:
    """Yields the findings that stand against a rewrite."""
    return (finding for finding in findings if finding.verdict == REFUSED)
