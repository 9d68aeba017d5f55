"""Runs base and adapter by PEFT, and the merged model, and compares what they give (extra ``[verify]``).

This is the only operation that builds models: whole, in float32, one after the other. It says less than the
comparison of weights, but says it of the loaders, configs and names too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import AdapterError, FormatError, Problem, UnsupportedError
from adapterhub_tools.model.receipt import RECEIPT_FILE
from adapterhub_tools.ops.receipt_file import load_receipt
from adapterhub_tools.ops.verify_report import LogitsReport, VerifyReport
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.files import is_folder

if TYPE_CHECKING:
    import torch

TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 2.0**-8, "BF16": 2.0**-5}
"""dtype of the merged weights -> the root mean square of the differences, in units of that of the outputs.

The outputs are computed in float32, which alone gives about 1e-5. A rounded weight is off by up to 2^-12 of
itself in float16 and 2^-9 in bfloat16; SmolLM2-135M with 30 layers gives 1 to 2 times that, and 16 times are
allowed. The largest single difference says less: where a model amplifies, one token may be far off.
"""
_ORDER = ("BF16", "F16", "F32", "F64")
_SEQUENCES, _TOKENS = 4, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsOptions:
    """What is compared.

    Attributes:
        input_ids: token ids, one tuple for each sequence; empty draws four sequences of 32.
        seed: of the random token ids.
        device: ``"cpu"`` or ``"cuda"``.
    """

    input_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    device: str = "cpu"


def require_extra() -> None:
    """Checks, before any work, that models can be run.

    Raises:
        UnsupportedError: transformers or PEFT is not installed.
    """
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        raise UnsupportedError.of(
            "no-transformers",
            f"comparing outputs needs transformers and PEFT; not installed: {', '.join(missing)}.",
            loc="--logits",
            remedy="Install them with: pip install 'adaptertool[verify]'.",
        )


def with_logits(
    report: VerifyReport,
    base: Path,
    adapters: Sequence[Path],
    merged: Path,
    options: LogitsOptions,
) -> VerifyReport:
    """Returns a report with the comparison of outputs, where there are two models to compare.

    Args:
        report: of the weights, with the scales.
        base: the base's folder.
        adapters: the adapters, in the order of the scales.
        merged: the merged model's folder.
        options: see LogitsOptions.

    Raises:
        UnsupportedError: the extra is not installed, or PEFT cannot do what the merge did.
        FormatError: a token id is not in the vocabulary.
    """
    if report.unchecked or not report.tensors:
        return report
    if (merged / RECEIPT_FILE).is_file() and load_receipt(merged).combination is not None:
        raise _not_run("PEFT adds adapters up, but this merge combined them otherwise", RECEIPT_FILE)
    found = _compare(open_checkpoint(base), adapters, open_checkpoint(merged), report.scales, options)
    problems, notes = report.problems, report.notes
    if not found.ok:
        problem = Problem(
            kind="logits",
            message=f"the outputs differ by {found.rms_relative:.3g} of their size, more than the "
            f"{found.tolerance:.3g} that rounding to {found.dtype} explains.",
            remedy="See which tensors are wrong; if none is, config or tokenizer of MERGED may be another's.",
        )
        problems += (problem,)
    if found.base_relative <= found.tolerance:
        notes += (
            f"the base alone gives the same outputs to {found.base_relative:.3g}, so the comparison of "
            "outputs could not tell whether the adapter is applied",
        )
    return replace(report, logits=found, problems=problems, notes=notes)


def _compare(
    base: Checkpoint,
    adapters: Sequence[Path],
    merged: Checkpoint,
    scales: Sequence[float],
    options: LogitsOptions,
) -> LogitsReport:
    import torch

    for checkpoint in (base, merged):
        _check_runnable(checkpoint)
    dtypes = {stored.spec.dtype for stored in merged.tensors.values()} & set(_ORDER)
    dtype = min(dtypes, key=_ORDER.index, default="F32")
    vocabulary = _vocabulary(merged)
    ids = _token_ids(options, vocabulary)
    with torch.no_grad(), _quiet():
        tuned = _with_adapters(base, adapters, scales, vocabulary, options.device)
        expected = [_outputs(tuned, row, options.device) for row in ids]
        with tuned.disable_adapter():
            alone = [_outputs(tuned, row, options.device) for row in ids]
        del tuned
        model = _load(merged, options.device)
        found = [_outputs(model, row, options.device) for row in ids]
    # The tokens of all sequences, one after the other: shape (tokens, vocabulary).
    right, own, bare = (
        torch.cat([part.flatten(0, -2) for part in parts]) for parts in (expected, found, alone)
    )
    largest = _finite(float((own - right).abs().max()))
    return LogitsReport(
        sequences=len(ids),
        tokens=sum(len(row) for row in ids),
        dtype=dtype,
        largest_absolute=largest,
        largest_relative=largest / (float(right.abs().max()) or 1.0),
        rms_relative=_relative(own, right),
        top1_agreement=float((own.argmax(dim=-1) == right.argmax(dim=-1)).double().mean()),
        base_relative=_relative(bare, right),
        tolerance=TOLERANCE[dtype],
    )


def _check_runnable(checkpoint: Checkpoint) -> None:
    """Refuses what transformers does not run from these files alone, before it builds anything."""
    config = checkpoint.config
    why = ""
    if not is_folder(checkpoint.root) or config is None:
        why = "it has no config, so nothing says what model it is"
    elif "quantization_config" in config:
        why = "it is quantised, and outputs are compared in float32"
    elif config.get("auto_map"):
        why = "its model needs code of its own, which is never run"
    if why:
        raise UnsupportedError.of(
            "logits",
            f"{why}.",
            file=str(checkpoint.root),
            loc="--logits",
            remedy="Leave --logits out; the weights are compared without it.",
        )


def _vocabulary(checkpoint: Checkpoint) -> int:
    config = checkpoint.config or {}
    text = config.get("text_config") or config
    size = text.get("vocab_size", config.get("vocab_size"))
    if not isinstance(size, int) or size < 1:
        raise UnsupportedError.of(
            "logits",
            "its config has no vocab_size, so that no token ids can be given to it.",
            file=str(checkpoint.root),
            loc="--logits",
            remedy="Leave --logits out; the weights are compared without it.",
        )
    return size


def _token_ids(options: LogitsOptions, vocabulary: int) -> list[tuple[int, ...]]:
    import random

    if not options.input_ids:
        chooser = random.Random(options.seed)
        return [tuple(chooser.randrange(vocabulary) for _ in range(_TOKENS)) for _ in range(_SEQUENCES)]
    for row in options.input_ids:
        wrong = [number for number in row if not 0 <= number < vocabulary]
        if wrong or not row:
            found = "an empty sequence" if not row else f"the token id {wrong[0]}"
            raise FormatError.of(
                "input-ids",
                f"found {found}; expected numbers from 0 to {vocabulary - 1}, the merged model's vocabulary.",
                loc="--input-ids",
                remedy="Give ids of its tokenizer, such as --input-ids 1,15,7.",
            )
    return list(options.input_ids)


def _load(checkpoint: Checkpoint, device: str) -> Any:
    """Builds a model from its files, in float32: a class of transformers, never code beside the files."""
    import torch
    import transformers

    names = (checkpoint.config or {}).get("architectures") or ["AutoModel"]
    kind = getattr(transformers, str(names[0]), transformers.AutoModel)
    try:
        model = kind.from_pretrained(
            checkpoint.root,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _not_run(f"transformers cannot load it: {_first_line(error)}", str(checkpoint.root)) from error
    return model.to(device).eval()


def _with_adapters(
    base: Checkpoint, adapters: Sequence[Path], scales: Sequence[float], vocabulary: int, device: str
) -> Any:
    """Builds the base with all adapters active, each with its scale."""
    from peft import PeftModel

    model = _load(base, device)
    if vocabulary != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary)
    names = [f"adapter{number}" for number in range(len(adapters))]
    try:
        tuned = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
        for name, path in zip(names[1:], adapters[1:], strict=True):
            tuned.load_adapter(path, adapter_name=name)
        if len(names) > 1 or any(scale != 1 for scale in scales):
            _activate(tuned, dict(zip(names, scales, strict=True)))
    except AdapterError:
        raise
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _not_run(f"PEFT cannot load it: {_first_line(error)}", str(adapters[0])) from error
    return tuned.to(device).eval()


def _activate(tuned: Any, scales: dict[str, float]) -> None:
    """Activates several adapters, each with its scale, where their deltas add up."""
    configs = [tuned.peft_config[name] for name in scales]
    if any(config.peft_type != "LORA" or config.use_dora or config.modules_to_save for config in configs):
        raise _not_run("several adapters, or a scale, can be run for plain LoRA only", RECEIPT_FILE)
    tuned.base_model.set_adapter(list(scales))
    for module in tuned.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            for name, scale in scales.items():
                if name in scaling:
                    scaling[name] *= scale


def _outputs(model: Any, row: Sequence[int], device: str) -> torch.Tensor:
    """Returns the logits for one sequence, or the last hidden states of a model without them."""
    import torch

    ids = torch.tensor([row], device=device)
    given = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    try:
        found = model(**given)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _not_run(f"it cannot be run on token ids alone: {_first_line(error)}", "") from error
    logits = getattr(found, "logits", None)
    result: torch.Tensor = (logits if logits is not None else found[0]).float().cpu()
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress displays of transformers off: a command shows its own, and none in a pipe."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _relative(outputs: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square of the difference in units of that of what is expected."""
    size = float(expected.double().square().mean().sqrt()) or 1.0
    return _finite(float((outputs - expected).double().square().mean().sqrt()) / size)


def _finite(value: float) -> float:
    """Returns a number that compares: not NaN, as the difference of outputs that are not finite is."""
    return value if value == value else float("inf")


def _first_line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(
            " .:"
        )
    )


def _not_run(why: str, file: str) -> UnsupportedError:
    return UnsupportedError.of(
        "logits",
        f"{why}.",
        file=file,
        loc="--logits",
        remedy="Leave --logits out; the weights are compared without it.",
    )
