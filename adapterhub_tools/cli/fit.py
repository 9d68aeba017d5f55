"""``adaptertool fit``: writes an adapter so that a server takes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub_tools import api
from adapterhub_tools.cli.low_rank_options import output_options
from adapterhub_tools.cli.options import DTYPES
from adapterhub_tools.cli.output import Output
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, standard_options

if TYPE_CHECKING:
    from adapterhub_tools.ops.server_report import ServerReport


@click.command(
    "fit",
    cls=ToolCommand,
    example="adaptertool fit my-adapter servable --for vllm --base SmolLM2-135M-Instruct",
)
@click.argument("adapter", type=click.Path(readable=False))
@click.argument("out", type=click.Path(path_type=Path, readable=False), required=False)
@click.option(
    "--for",
    "server",
    type=click.Choice(["llama.cpp", "peft", "sglang", "vllm"]),
    required=True,
    help="What is to apply the adapter.",
)
@click.option(
    "--base",
    type=click.Path(readable=False),
    help="The base: the output gets its module names, and leaves out what is the base's own.",
)
@click.option("--check", is_flag=True, help="Only say what the server takes; exit code 1 if not as it is.")
@click.option("--to-lora", is_flag=True, help="Approximate another method by LoRA first; needs --base.")
@click.option("--max-rank", type=int, metavar="N", help="The largest rank that the server was started with.")
@click.option(
    "--max-error",
    type=float,
    default=0.01,
    show_default=True,
    help="The relative error that each module may have, in the Frobenius norm.",
)
@click.option("--allow-lossy", is_flag=True, help="Allow a larger error; the report tells it.")
@click.option("--dtype", type=DTYPES, help="The dtype of computed factors; the adapter's if not given.")
@output_options
@standard_options
def command(
    adapter: str,
    out: Path | None,
    server: str,
    base: str | None,
    check: bool,
    to_lora: bool,
    max_rank: int | None,
    max_error: float,
    allow_lossy: bool,
    dtype: str | None,
    replace: bool,
    allow_replace_gap: bool,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write ADAPTER to the folder OUT in a form that a server applies as PEFT does.

    Scales, rsLoRA and patterns go into one alpha and the factors, ranks are filled up with zeros, parts of
    fused layers are joined or split, and what a server cannot take is refused with the reason and its source
    (docs/servers.md). OUT is an ordinary PEFT adapter.
    """
    if out is None and not (check or dry_run):
        raise click.UsageError("OUT is missing; leave it out only with --check or --dry-run.")
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.fit(
        adapter,
        out,
        server=server,
        base=base,
        check=check,
        to_lora=to_lora,
        max_rank=max_rank,
        max_error=max_error,
        allow_lossy=allow_lossy,
        dtype=dtype,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        threads=threads,
        dry_run=dry_run,
        progress=progress_for(output),
    )
    _show(report, output)
    if check:
        click.get_current_context().exit(report.exit_code)


def _show(report: ServerReport, output: Output) -> None:
    if output.as_json:
        output.json("fit", report.to_json())
        return
    output.notes([*report.notes, f"the table was checked against {report.checked}"])
    rows = [(item.feature, item.found, item.verdict, item.says) for item in report.findings]
    output.table(f"for {report.server}", ("feature", "the adapter has", "verdict", "because"), rows)
    if output.verbose:
        output.table("sources", ("feature", "source"), [(i.feature, i.source) for i in report.findings])
    remedies = {item.remedy: None for item in report.findings if item.remedy}
    output.notes(f"what to do: {remedy}" for remedy in remedies)
    columns = ("module", "rank", "exact", "error", "how")
    made = [
        (
            item.path,
            f"{item.rank_before or ''} → {item.rank}",
            "yes" if item.exact else "no",
            f"{item.error:.3g}",
            item.how,
        )
        for item in report.modules
    ]
    if made:
        output.table("modules", columns, made)
    if report.left_out:
        output.table("left out", ("name", "why"), report.left_out)
    output.line(report.summary)
