"""What can be asked of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from adapterhub_tools.model.combination import CombinationChoice
from adapterhub_tools.ops.option_checks import check_choice, check_dtype

CHECKS = ("full", "targets", "off")
LOSS_KINDS = ("sampled", "full", "off")
COMPUTE_DTYPES = ("bf16", "fp16", "fp32", "BF16", "F16", "F32")
TARGETS = ("dequantized", "original", "quantized")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """The options of a merge; each is a flag of the same name on the command line.

    Attributes:
        scales: a factor on each adapter's delta, one for each or one for all; empty means 1.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for every floating-point tensor
            of the output; None keeps the base's.
        replace: True to replace an existing output folder, atomically.
        allow_replace_gap: True to allow that on a file system that cannot exchange two folders at once.
        device: ``"auto"`` (the CPU), ``"cpu"`` or ``"cuda"``; the bytes are the same.
        threads: the number of workers; None takes the processors that this process may use, at most 8.
        dry_run: True to plan and check without writing.
        check_base: ``"full"`` compares the digest of the whole base with the manifest's record,
            ``"targets"`` only that of the tensors to change, ``"off"`` nothing.
        accept_embeddings: True to let an adapter replace embeddings that its config does not mention.
        adapter_tokenizer: True to write the adapter's tokenizer and chat template instead of the base's.
        undo: True to write beside the weights what brings the base back, bit for bit.
        replay: the receipt of the merge to repeat: it decides scales and dtype, and the result must be its.
        sign: a private key that signs the output; see store/signature.py.
        onto: what is merged onto: ``"dequantized"``, the weights that an adapter trained on a quantised base
            has seen; ``"original"``, the base in 16 or 32 bits; ``"quantized"``, the former, written in the
            base's own format; None takes the first where the base is stored quantised or a scheme is known,
            else the second.
        quant: how the base was quantised while it was loaded for training, such as ``"nf4,double"``; None
            takes the manifest's record.
        compute_dtype: the dtype that weights were dequantised to while training; None takes the record.
        skip_modules: what the loader was told to leave as it is (``llm_int8_skip_modules``); None takes the
            record, or else the loader's own choice.
        loss: how much of the change the output holds is measured first: ``"sampled"`` on some rows of each
            tensor, ``"full"`` on all, ``"off"`` not at all; None takes a sample in a dry run of a local base
            and for a quantised output. A quantised output is measured in any case unless ``allow_loss``,
            because what was measured decides whether it is written.
        allow_loss: True to write a quantised output that holds less than half of the change.
        approximates: for an approximate unmerge, the digest of the merged model, for the receipt.
        combination: how the adapters are combined, with the scales as their weights; None adds them up.
    """

    scales: tuple[float, ...] = ()
    dtype: str | None = None
    replace: bool = False
    allow_replace_gap: bool = False
    device: str = "auto"
    threads: int | None = None
    dry_run: bool = False
    check_base: str = "full"
    accept_embeddings: bool = False
    adapter_tokenizer: bool = False
    undo: bool = False
    replay: Path | None = None
    sign: Path | None = None
    onto: str | None = None
    quant: str | None = None
    compute_dtype: str | None = None
    skip_modules: tuple[str, ...] | None = None
    loss: str | None = None
    allow_loss: bool = False
    approximates: str | None = None
    combination: CombinationChoice | None = None

    def scale_of_each(self, adapters: int) -> tuple[float, ...]:
        """Returns one factor for each of so many adapters.

        Raises:
            ValueError: their number is neither 0, 1 nor the number of adapters, or one is not finite; the
                command line refuses both earlier.
        """
        if not all(isfinite(scale) for scale in self.scales):
            raise ValueError(f"each scale must be a finite number, not {self.scales}")
        if len(self.scales) in (0, 1):
            return (self.scales or (1.0,)) * adapters
        if len(self.scales) != adapters:
            raise ValueError(
                f"{len(self.scales)} scales were given for {adapters} adapters; "
                "give one for all, or one for each in their order"
            )
        return self.scales

    def check_values(self) -> None:
        """Refuses values that no option has.

        Raises:
            ValueError: a value outside the documented ones; the command line refuses it earlier.
        """
        check_dtype(self.dtype)
        check_choice("check_base", self.check_base, CHECKS)
        if self.onto is not None:
            check_choice("onto", self.onto, TARGETS)
        if self.compute_dtype is not None:
            check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if "" in (self.skip_modules or ()):
            raise ValueError(f"skip_modules must be names or patterns, none empty, not {self.skip_modules}")
        if self.loss is not None:
            check_choice("loss", self.loss, LOSS_KINDS)
        if self.threads is not None and self.threads < 1:
            raise ValueError("threads must be at least 1")
