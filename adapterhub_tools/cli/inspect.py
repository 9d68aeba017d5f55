"""``adaptertool inspect``: says what an adapter or a base is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterhub_tools import api
from adapterhub_tools.cli.output import Output, distribution_text, share_text, size_text
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options
from adapterhub_tools.ops.inspect import AdapterReport

if TYPE_CHECKING:
    from adapterhub_tools.ops.base_report import BaseReport


@click.command(
    "inspect", cls=ToolCommand, example="adaptertool inspect my-adapter --base SmolLM2-135M-Instruct"
)
@click.argument("path", type=click.Path(readable=False))
@click.option("--base", type=click.Path(readable=False), help="The adapter's base, to tell its share.")
@standard_options
def command(path: str, base: str | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Say what lies at PATH, an adapter or a base: method, ranks, targets, parameters, base.

    Only headers and configs are read, so it is instant at any size.
    """
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.inspect(path, base=base)
    if as_json:
        output.json("inspect", report.to_json())
    elif isinstance(report, AdapterReport):
        _show_adapter(report, output)
    else:
        _show_base(report, output)


def _show_adapter(report: AdapterReport, output: Output) -> None:
    adapter = report.adapter
    share = "" if report.share is None else f" ({share_text(report.share)} of the base)"
    weights = f"{report.weights_file}, {size_text(report.weights_bytes)}"
    base = adapter.base
    output.facts(
        report.path,
        (
            ("kind", f"adapter, {adapter.dialect} names"),
            ("method", adapter.method),
            ("rank", _counts(report.ranks)),
            ("alpha", _counts(report.alphas)),
            ("scaling", _scaling(report)),
            ("trainable parameters", f"{report.parameters:,}{share}"),
            ("in full", f"{report.full_parameters:,}" if report.full_parameters else None),
            ("dtype", _dtypes(report.dtypes)),
            ("weights", weights if report.weights_file else "none that can be read"),
            ("base", None if base is None else base.id),
            ("base revision", None if base is None else base.revision),
            ("base digest", None if base is None else base.digest),
            ("trained on", None if base is None else _quantisation(base.quantisation)),
            ("manifest", report.manifest_version or "none"),
            ("adapter digest", report.digest),
            ("can be merged", "yes" if report.mergeable else "no"),
        ),
    )
    for kind, message, remedy in adapter.blockers:
        output.notes([f"not mergeable ({kind}): {message} {remedy}"])
    output.problems(report.problems)
    if report.groups:
        output.table(
            "target modules",
            ("name", "kind", "modules", "rank", "weight shape", "parameters"),
            [
                (
                    group.name,
                    group.kind,
                    group.modules,
                    ", ".join(map(str, group.ranks)),
                    ", ".join("×".join(map(str, shape)) for shape in group.shapes),
                    f"{group.parameters:,}",
                )
                for group in report.groups
            ],
        )
    if adapter.full:
        output.table(
            "tensors in full",
            ("target", "role", "dtype", "shape"),
            [
                (full.target, full.role, full.tensor.dtype, "×".join(map(str, full.tensor.shape)))
                for full in adapter.full
            ],
        )
    if output.verbose:
        output.table(
            "modules",
            ("path", "kind", "rank", "alpha", "factors"),
            [
                (
                    module.path,
                    module.kind,
                    module.hparams.get("rank", ""),
                    module.hparams.get("alpha", ""),
                    ", ".join(f"{role} {'×'.join(map(str, s.shape))}" for role, s in module.factors.items()),
                )
                for module in adapter.modules
            ],
        )
        output.notes(report.notes)
    merged = "can be merged" if report.mergeable else "cannot be merged"
    output.line(
        f"{adapter.method} adapter: {len(adapter.modules)} target modules, "
        f"{report.parameters:,} trainable parameters{share}, {merged}"
    )


def _show_base(report: BaseReport, output: Output) -> None:
    tied = {True: "yes", False: "no", None: None}[report.tied]
    files = report.files[0] if len(report.files) == 1 else f"{len(report.files)} shards"
    output.facts(
        report.path,
        (
            ("kind", "base"),
            ("architecture", report.architecture),
            ("class", ", ".join(report.classes) or None),
            ("parameters", f"{report.parameters:,}"),
            ("dtype", _dtypes(report.dtypes)),
            ("weights", f"{files}, {report.tensors} tensors, {size_text(report.bytes)}"),
            ("layers", report.layers),
            ("width", report.hidden),
            ("vocabulary", report.vocabulary),
            ("tied embeddings", tied),
            ("quantised", report.quantisation),
        ),
    )
    output.problems(report.problems)
    output.notes(report.notes)
    output.line(
        f"base: {report.architecture or 'unknown architecture'}, {report.parameters:,} parameters, "
        f"{size_text(report.bytes)}"
    )


def _quantisation(recorded: dict[str, Any] | None) -> str | None:
    """What a manifest says of how the base was quantised, in its own words."""
    if recorded is None:
        return None
    rest = ", ".join(
        f"{name} {value}" for name, value in recorded.items() if name not in ("scheme", "bits", "double")
    )
    double = ", double" if recorded.get("double") is True else ""
    return f"{recorded['scheme']}{double}" + (f" ({rest})" if rest else "")


def _counts(counts: dict[int, int] | dict[float, int]) -> str | None:
    return distribution_text({f"{key:g}": count for key, count in counts.items()}) if counts else None


def _scaling(report: AdapterReport) -> str | None:
    if not report.scales:
        return None
    rule = report.adapter.hparams.get("scaling", "")
    return f"{rule} = {_counts(report.scales)}"


def _dtypes(counts: dict[str, int]) -> str | None:
    if len(counts) < 2:
        return next(iter(counts), None)
    return ", ".join(f"{name} ({count:,} values)" for name, count in counts.items())
