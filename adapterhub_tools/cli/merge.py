"""``adaptertool merge``: merges adapters into a base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub_tools import api
from adapterhub_tools.cli.options import DTYPES, device_option, replace_options, threads_option
from adapterhub_tools.cli.output import Output, size_text
from adapterhub_tools.cli.progress import progress_for
from adapterhub_tools.cli.tool_command import ToolCommand, check_scales, finite, standard_options

if TYPE_CHECKING:
    from adapterhub_tools.ops.merge_report import MergeReport

_SHOWN = 5


def _not_empty(_: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if not all(values):
        raise click.BadParameter("give the name of a module, or a pattern.", param=param)
    return values


@click.command(
    "merge",
    cls=ToolCommand,
    example="adaptertool merge SmolLM2-135M-Instruct my-adapter merged\n"
    "adaptertool merge SmolLM2-135M-Instruct my-qlora merged --quant nf4,double --compute-dtype bf16",
)
@click.argument("base", type=click.Path(readable=False))
@click.argument("adapter", type=click.Path(readable=False), nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--scale",
    type=float,
    multiple=True,
    callback=finite,
    help="A factor on the delta: one for all adapters, or one for each.",
)
@click.option("--dtype", type=DTYPES, help="The dtype of the output's weights; the base's own if not given.")
@replace_options
@device_option("Where to compute; the bytes are the same.")
@threads_option
@click.option("--dry-run", is_flag=True, help="Plan and check; write nothing.")
@click.option(
    "--check-base",
    type=click.Choice(["full", "targets", "off"]),
    default="full",
    show_default=True,
    help="Compare the digest of the whole base, of the target tensors, or nothing.",
)
@click.option(
    "--accept-embeddings", is_flag=True, help="Accept saved embeddings that the config does not mention."
)
@click.option(
    "--adapter-tokenizer", is_flag=True, help="Take tokenizer and chat template from the adapter's folder."
)
@click.option("--undo", is_flag=True, help="Also write what brings the base back, bit for bit.")
@click.option(
    "--replay",
    metavar="RECEIPT",
    type=click.Path(path_type=Path, readable=False),
    help="Repeat the merge of this receipt: its scales and dtype; another result is an error.",
)
@click.option(
    "--sign",
    metavar="KEY",
    type=click.Path(path_type=Path, readable=False),
    help="Sign OUT with this private key, a PEM file (extra [sign]).",
)
@click.option(
    "--onto",
    type=click.Choice(["dequantized", "original", "quantized"]),
    help="What to merge onto: the quantised weights that the adapter was trained on, as 16-bit ones; the "
    "base as it is stored; or the former, written in the base's own format.",
)
@click.option(
    "--quant",
    metavar="SCHEME",
    help="How the base was quantised while training: nf4, nf4,double, fp4, int8; else the manifest says it.",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="The dtype that the quantised weights were computed with; else the manifest or the base says it.",
)
@click.option(
    "--skip-modules",
    metavar="NAME",
    multiple=True,
    callback=_not_empty,
    help="What llm_int8_skip_modules was, if it was set: a module that was not quantised; once for each.",
)
@click.option(
    "--loss",
    type=click.Choice(["sampled", "full", "off"]),
    help="Measure first how much of the change the output holds; a dry run takes a sample, and so does a "
    "quantised output, for which 'off' needs --allow-loss.",
)
@click.option("--allow-loss", is_flag=True, help="Write a quantised output that holds less than half of it.")
@standard_options
def command(
    base: str,
    adapter: tuple[str, ...],
    out: Path,
    scale: tuple[float, ...],
    dtype: str | None,
    replace: bool,
    allow_replace_gap: bool,
    device: str,
    threads: int | None,
    dry_run: bool,
    check_base: str,
    accept_embeddings: bool,
    adapter_tokenizer: bool,
    undo: bool,
    replay: Path | None,
    sign: Path | None,
    onto: str | None,
    quant: str | None,
    compute_dtype: str | None,
    skip_modules: tuple[str, ...],
    loss: str | None,
    allow_loss: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge one ADAPTER or several into BASE, and write the result to the folder OUT.

    Each weight of the result is the correctly rounded value of the exact formula, so the same merge gives the
    same bytes on any machine. OUT holds all of it or does not exist. Several adapters are summed exactly and
    rounded once.
    """
    check_scales(scale, len(adapter))
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    report = api.merge(
        base,
        adapter,
        out,
        scale=scale,
        dtype=dtype,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        device=device,
        threads=threads,
        dry_run=dry_run,
        check_base=check_base,
        accept_embeddings=accept_embeddings,
        adapter_tokenizer=adapter_tokenizer,
        undo=undo,
        replay=replay,
        sign=sign,
        onto=onto,
        quant=quant,
        compute_dtype=compute_dtype,
        skip_modules=skip_modules or None,
        loss=loss,
        allow_loss=allow_loss,
        progress=progress_for(output),
    )
    if as_json:
        output.json("merge", report.to_json())
        return
    output.notes(report.notes)
    if dry_run or verbose:
        output.facts(
            "plan" if dry_run else "merge",
            (
                ("target tensors", f"{report.changed} of {report.expected}"),
                ("target modules", report.modules),
                ("tensors written", report.tensors),
                ("bytes", f"{report.nbytes:,} ({size_text(report.nbytes)})"),
                ("buffers", f"{report.peak_bytes:,} ({size_text(report.peak_bytes)})"),
                ("undo file", None if report.undo_bytes is None else f"{report.undo_bytes:,} bytes"),
                ("base digest", report.base_digest),
                ("decided exactly", None if dry_run else f"{report.resolved:,} values"),
            ),
        )
    _show_loss(output, report)
    output.line(report.summary)


def _show_loss(output: Output, report: MergeReport) -> None:
    """Prints how much of the change the output holds: the tensors that lose most, or all when verbose."""
    if report.loss is None:
        return
    known = [(name, loss) for name, loss in report.loss.tensors.items() if loss.survival is not None]
    rows = known if output.verbose else sorted(known, key=lambda item: item[1].survival or 0.0)[:_SHOWN]
    title = f"change that survives rounding: {len(rows)} of {len(known)} tensors"
    output.table(
        title if len(rows) == len(known) else f"{title}, the lowest",
        ("tensor", "survives", "error of the change", "SQNR"),
        [
            (name, f"{loss.survival:.2%}", f"{loss.relative_error:.2g}", f"{loss.sqnr:.1f} dB")
            for name, loss in rows
        ],
    )
    output.notes([report.loss.words])
