"""What a merge starts from: the base as it is stored, or the quantised weights that an adapter has seen.

An adapter trained with QLoRA has seen the dequantised weights, not those of the 16-bit base. What it saw is
known from a base that is stored quantised, from the manifest, or from the caller; it is never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import IntegrityError, MismatchError, UnsupportedError, escape, raise_for
from adapterhub_tools.model.manifest import MANIFEST_NAME
from adapterhub_tools.model.quant_scheme import REMOTE_QUANTISED, QuantizedTensor, QuantScheme
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.ops.dequantised_view import loaded_view, stored_view
from adapterhub_tools.ops.loaded_modules import loaded_modules
from adapterhub_tools.ops.merge_inputs import fit_all
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.quantised_base import (
    quantised_weights,
    recorded_scheme_problems,
    refuse_conv1d,
    stored_scheme,
)
from adapterhub_tools.ops.quantised_hints import hint
from adapterhub_tools.store.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeBase:
    """What a merge starts from.

    Attributes:
        onto: ``"original"``, ``"dequantized"`` or ``"quantized"``.
        scheme: how the weights that the adapter saw were quantised; None if they were not, or unknown.
        checkpoint: what is merged onto: the base, or a view of its dequantised weights.
        weights: the base's quantised weights, where it is stored quantised.
        parts: the adapters, fitted.
        notes: what was decided by rule.
    """

    onto: str
    scheme: QuantScheme | None
    checkpoint: Checkpoint
    weights: Mapping[str, QuantizedTensor]
    parts: list[Part]
    notes: tuple[str, ...]

    @property
    def receipt_options(self) -> dict[str, Any]:
        """What a receipt's ``options`` say of it; nothing for a base that is merged onto as it is stored."""
        if self.onto == "original" or self.scheme is None:
            return {}
        return {"onto": self.onto, "quantisation": self.scheme.to_json()}


def settle_base(
    checkpoint: Checkpoint,
    opened: Sequence[OpenedAdapter],
    paths: Sequence[Path],
    scales: Sequence[float],
    options: MergeOptions,
) -> MergeBase:
    """Decides what is merged onto, and fits the adapters to it.

    Args:
        checkpoint: the base as it is stored.
        opened: the adapters.
        paths: where they were found.
        scales: the caller's factor for each.
        options: ``onto``, ``quant``, ``compute_dtype`` and ``skip_modules``.

    Raises:
        UnsupportedError: the base cannot give what was asked for; an unknown scheme; of kind
            REMOTE_QUANTISED where its quantised weights come over a network and would be read.
        MismatchError: the scheme is not known, or not the base's; an adapter does not fit.
        IntegrityError: a manifest records that the base was quantised otherwise.
        FormatError: a quantised weight lacks a part, or is damaged.
    """
    weights = quantised_weights(checkpoint)
    asked = None
    if options.quant is not None:
        asked = QuantScheme.parse(options.quant, compute_dtype=options.compute_dtype)
    if weights:
        base = _stored(checkpoint, weights, asked, opened, paths, scales, options)
    else:
        base = _loaded(checkpoint, asked, opened, paths, scales, options)
    if options.undo and base.onto != "original":
        raise UnsupportedError.of(
            "undo-quantised",
            f"the merge is onto {base.onto} weights, which are no file's: undoing it could not be checked "
            "against the base, and would not bring it back.",
            loc="--undo",
            remedy="Leave --undo out and keep the base, or merge --onto original.",
        )
    reads = not options.dry_run or base.onto == "quantized" or options.loss in ("sampled", "full")
    if base.checkpoint.is_remote and base.checkpoint.view is not None and reads:
        raise UnsupportedError.of(
            REMOTE_QUANTISED,
            "the base comes over a network, and its weights are dequantised as they are read, which needs "
            "more than one pass.",
            file=str(checkpoint.root),
            remedy="Get the base first, then merge onto the local folder.",
        )
    return base


def _stored(
    checkpoint: Checkpoint,
    weights: Mapping[str, QuantizedTensor],
    asked: QuantScheme | None,
    opened: Sequence[OpenedAdapter],
    paths: Sequence[Path],
    scales: Sequence[float],
    options: MergeOptions,
) -> MergeBase:
    scheme = stored_scheme(weights)
    if scheme is None:
        raise ValueError("quantised weights have a scheme")
    if options.onto == "original":
        raise UnsupportedError.of(
            "onto-original",
            f"the base is stored quantised ({scheme.words}); its 16-bit weights are not there.",
            file=str(checkpoint.root),
            loc="--onto",
            remedy="Give the 16-bit base that it was made from, or merge --onto dequantized or quantized.",
        )
    if asked is not None and not asked.same_values(scheme):
        raise _other_scheme(f"the base is stored as {scheme.words}", asked, checkpoint)
    if options.skip_modules is not None:
        raise MismatchError.of(
            "quant-unused",
            "the base is stored quantised, so it shows itself which modules are not.",
            file=str(checkpoint.root),
            loc="--skip-modules",
            remedy="Leave --skip-modules out.",
        )
    if options.check_base != "off":
        manifests = [item.manifest for item in opened if item.manifest is not None]
        found = [problem for item in manifests for problem in recorded_scheme_problems(item, weights)]
        raise_for(found, IntegrityError)
    onto = options.onto or "dequantized"
    if onto == "quantized":
        refuse_conv1d(checkpoint, weights)
    notes = []
    compute = _compute_dtype(options, asked)
    declared = _declared(opened, needed=False)
    if compute is None and declared is not None:
        compute = declared.compute_dtype
    if compute not in (None, scheme.compute_dtype) and scheme.compute_dtype is not None:
        notes.append(f"the compute dtype is {compute}; the base's config says {scheme.compute_dtype}")
    if compute is None and scheme.compute_dtype is None and scheme.bits == 4:
        notes.append("nothing says the compute dtype: taken is the dtype that each weight had before")
    scheme = replace(scheme, compute_dtype=compute or scheme.compute_dtype, skip_modules=None)
    view = stored_view(checkpoint, weights, scheme.compute_dtype)
    where = "as the base has it" if onto == "quantized" else "dequantised"
    notes.append(f"merged onto the base's {scheme.words} weights, written {where}")
    return MergeBase(
        onto=onto,
        scheme=scheme,
        checkpoint=view,
        weights=weights,
        parts=fit_all(opened, paths, scales, view),
        notes=tuple(notes),
    )


def _loaded(
    checkpoint: Checkpoint,
    asked: QuantScheme | None,
    opened: Sequence[OpenedAdapter],
    paths: Sequence[Path],
    scales: Sequence[float],
    options: MergeOptions,
) -> MergeBase:
    if options.onto == "quantized":
        raise UnsupportedError.of(
            "onto-quantized",
            "the base is not stored quantised, so it has no format of its own to quantise to.",
            file=str(checkpoint.root),
            loc="--onto",
            remedy="Merge --onto dequantized and load the result with a quantisation config, which quantises "
            "it in the same way; or give a base that is stored quantised.",
        )
    said = any(item is not None for item in (asked, options.compute_dtype, options.skip_modules))
    if options.onto == "original" and said:
        raise MismatchError.of(
            "quant-unused",
            "--onto original takes the base as it is stored, so --quant, --compute-dtype and --skip-modules "
            "change nothing.",
            loc="--onto",
            remedy="Leave one of the two out.",
        )
    parts = fit_all(opened, paths, scales, checkpoint)
    declared = _declared(opened, needed=options.onto != "original" and asked is None)
    scheme = asked or declared
    if asked is not None and declared is not None:
        if not asked.same_values(declared) and options.check_base != "off":
            raise _other_scheme(f"the manifest records {declared.words}", asked, checkpoint)
        scheme = replace(asked, compute_dtype=asked.compute_dtype or declared.compute_dtype)
    if scheme is not None and options.onto != "original":
        scheme = replace(scheme, skip_modules=_skip_modules(opened, options))
    onto = options.onto or ("original" if scheme is None and not said else "dequantized")
    if onto == "original":
        notes = []
        if scheme is None and options.onto is None:
            notes += [text for item in opened if (text := hint(item)) is not None]
        if scheme is not None:
            notes.append(f"merged onto the 16-bit base, though the adapter was trained on {scheme.words}")
        return MergeBase(
            onto=onto,
            scheme=scheme,
            checkpoint=checkpoint,
            weights={},
            parts=parts,
            notes=tuple(dict.fromkeys(notes)),
        )
    if scheme is None:
        raise MismatchError.of(
            "quant-undeclared",
            "the base is stored in full, and nothing says how it was quantised while training.",
            file=str(checkpoint.root),
            loc="--onto",
            remedy="Say it with --quant and --compute-dtype, or record it with "
            "`adaptertool init --quantisation`.",
        )
    compute = _compute_dtype(options, asked) or scheme.compute_dtype
    if compute is None:
        raise MismatchError.of(
            "compute-dtype",
            f"nothing says to which dtype the {scheme.words} weights were dequantised while training.",
            loc="--compute-dtype",
            remedy="Give it with --compute-dtype: bnb_4bit_compute_dtype of the run, float32 if it was not "
            "set; for int8, the dtype that the model was loaded in.",
        )
    scheme = replace(scheme, compute_dtype=compute)
    found = loaded_modules(checkpoint, scheme, parts)
    return MergeBase(
        onto=onto,
        scheme=scheme,
        checkpoint=loaded_view(checkpoint, scheme, found.weights, compute),
        weights={},
        parts=parts,
        notes=(*found.notes, *(() if asked is not None else _undeclared(opened, scheme))),
    )


def _skip_modules(opened: Sequence[OpenedAdapter], options: MergeOptions) -> tuple[str, ...] | None:
    """Returns what the loader was told to leave as it is; None for its own choice.

    Raises:
        MismatchError: the manifests record different lists, or another one than was asked for.
    """
    said = [item.manifest.base.quantisation for item in opened if item.manifest is not None]
    recorded = [item.get("skip_modules") for item in said if item is not None]
    asked = options.skip_modules
    if asked is None:
        first = next(iter(recorded), None)
        for names in recorded:
            if _words(names) != _words(first):
                message = (
                    "the adapters were trained on bases of which different modules were quantised: all but "
                    f"{_words(first)}; all but {_words(names)}."
                )
                raise _other_list(message, "Merge them one after the other, or --onto original.")
        return None if first is None else tuple(first)
    for names in recorded if options.check_base != "off" else ():
        if names is not None and _words(names) != _words(asked):
            message = (
                f"the manifest records that {_words(names)} were not quantised; asked for {_words(asked)}."
            )
            raise _other_list(message, "Leave --skip-modules out, or correct it.")
    return asked


def _words(names: Sequence[str] | None) -> str:
    if names is None:
        return "what the loader leaves by itself"
    return ", ".join(sorted({escape(name) for name in names})) or "none"


def _other_list(message: str, remedy: str) -> MismatchError:
    loc = "/base/quantisation/skip_modules"
    return MismatchError.of("quant-skips", message, file=MANIFEST_NAME, loc=loc, remedy=remedy)


def _undeclared(opened: Sequence[OpenedAdapter], scheme: QuantScheme) -> list[str]:
    """Returns a remark on each adapter that is merged onto a scheme which only others declare."""
    return [
        f"{item.files.root.name} declares no quantisation of its base; it is merged with the others, onto "
        f"{scheme.words} weights"
        for item in opened
        if item.manifest is None or item.manifest.base.quantisation is None
    ]


def _compute_dtype(options: MergeOptions, asked: QuantScheme | None) -> str | None:
    """Returns the compute dtype that was asked for, as a safetensors dtype."""
    if asked is not None or options.compute_dtype is None:
        return None if asked is None else asked.compute_dtype
    return QuantScheme.parse("nf4", compute_dtype=options.compute_dtype).compute_dtype


def _declared(opened: Sequence[OpenedAdapter], *, needed: bool) -> QuantScheme | None:
    """Returns the scheme that the manifests record.

    Args:
        opened: the adapters.
        needed: False where schemes that are not known here, or differ, are passed over.

    Raises:
        UnsupportedError: a scheme that is not known here.
        MismatchError: they differ.
    """
    found: list[QuantScheme] = []
    for item in opened:
        said = None if item.manifest is None else item.manifest.base.quantisation
        if said is None:
            continue
        try:
            found.append(QuantScheme.from_json(said, file=MANIFEST_NAME, loc="/base/quantisation"))
        except UnsupportedError as error:
            if needed:
                raise UnsupportedError.of(
                    "unknown-scheme",
                    error.problems[0].message,
                    file=MANIFEST_NAME,
                    loc="/base/quantisation",
                    remedy="Merge --onto original, which takes the base as it is stored.",
                ) from error
    others = [item for item in found[1:] if not item.same_values(found[0])]
    if others and needed:
        raise MismatchError.of(
            "quant-schemes",
            f"the adapters were trained on bases that were quantised differently: {found[0].words}, and "
            f"{others[0].words}.",
            file=MANIFEST_NAME,
            loc="/base/quantisation",
            remedy="Merge them one after the other, or --onto original.",
        )
    return found[0] if found and not others else None


def _other_scheme(known: str, asked: QuantScheme, checkpoint: Checkpoint) -> MismatchError:
    return MismatchError.of(
        "quant-scheme",
        f"{known}; asked for {asked.words}.",
        file=str(checkpoint.root),
        loc="--quant",
        remedy="Leave --quant out, or correct it.",
    )
