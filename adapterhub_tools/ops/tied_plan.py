"""What a merge does to tied embeddings: keep the tie where both sides stay equal, else write both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from adapterhub_tools.errors import FormatError, UnsupportedError
from adapterhub_tools.model.plan import ByteRange, Term
from adapterhub_tools.model.protocols import OpenSource
from adapterhub_tools.ops.merge_parts import Change, Part
from adapterhub_tools.ops.tied import Tie
from adapterhub_tools.store.checkpoint import Checkpoint

_PIECE = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """The outcome.

    Attributes:
        names: the tensors that must have the same number of rows; empty where nothing is tied.
        untied: True if the output has tensors that differ now.
        config_unties: True if its config must say so.
        note: what was done, for the report; empty if nothing.
    """

    names: tuple[str, ...] = ()
    untied: bool = False
    config_unties: bool = False
    note: str = ""


def settle_ties(
    parts: Sequence[Part],
    changes: dict[str, Change],
    base_range: Callable[[str], ByteRange],
    checkpoint: Checkpoint,
) -> Ties:
    """Decides about tied tensors and completes ``changes`` accordingly.

    * Nothing touches them: they stay as they are.
    * Only rows of the embedding are replaced (trainable tokens): PEFT shows them to both sides; the tie
    stays.
    * The adapter asks for tying (``ensure_weight_tying``) and changes one side: the change is the pair's.
    * The adapter makes the same change to both sides, value by value: the tie stays.
    * A resized embedding, saved for every side with the same values: the tie stays.
    * Otherwise the tensors are written apart, each unchanged one with the values of the shared tensor, and so
    are further tensors that the same config value ties. Where the config cannot say it (T5), what stays
    equal to the embedding is left out: the loader ties only that.

    Raises:
        UnsupportedError: the base lacks its head, so that it is not known what shares the embedding; tying is
            asked for where more than two share it; or a shared bias is changed in two ways.
        FormatError: the config says tied, but the base stores two tensors that differ.
    """
    tie = parts[0].fit.tie if parts else None
    if tie is None:
        return Ties()
    if not any(name in changes for name in tie.members):
        _join_companions(tie, changes, parts)
        return Ties()
    if tie.headless:
        raise _headless(tie)
    names = _equal_members(tie, base_range, checkpoint)
    changed = [name for name in names if name in changes]
    if not changed:
        return Ties()
    asks = all(part.opened.adapter.ties for part in parts if _touches(part, tie))
    if len(names) > 2:
        if asks:
            raise _asked(tie)
        kept = _resized(names, changes, parts)
    else:
        kept = _one_change(tie, changes, parts, asks=asks)
    if kept is not None:
        _join_companions(tie, changes, parts)
        return _keep(tie, names, changes, kept[0], base_range, kept[1])
    shared = _shared_start(tie, changes, parts) or base_range(tie.input_name)
    complete = tie.unties or tie.input_name in changes
    for name in names[1:]:
        if name in changes or complete:
            change = changes.setdefault(name, Change())
            _share_rows(tie, name, changes)
            change.start = change.start or shared
    for missing, source in tie.companions:
        if missing not in changes:
            change = changes.get(source, Change())
            changes[missing] = Change(
                start=change.start or base_range(source), terms=list(change.terms), patch=change.patch
            )
    written = [name for name in names if name in changes or name in checkpoint.tensors]
    note = f"untied: {', '.join(written[:-1])} and {written[-1]} differ now; all are written"
    if not tie.unties:
        note += "; the config cannot say so: transformers 5 loads them apart, version 4 ties them again"
    return Ties(names=names, untied=True, config_unties=tie.unties, note=note)


def _shared_start(tie: Tie, changes: dict[str, Change], parts: Sequence[Part]) -> ByteRange | None:
    """Returns the resized embedding that an adapter saved under its own factors: both sides start from it.

    PEFT saves it with the side that has factors, be that the embedding or only the head, and loads it into
    the tensor that both share.
    """
    saved = {
        item.base_tensor
        for part in parts
        for item in part.fit.full
        if item.full.role == "saved_embedding" and item.full.rows is None
    }
    if tie.input_name in changes:
        return changes[tie.input_name].start if tie.input_name in saved else None
    if not tie.unties or tie.output_name not in saved or tie.output_name not in changes:
        return None
    start = changes[tie.output_name].start
    changes[tie.input_name] = Change(start=start)
    return start


def _share_rows(tie: Tie, name: str, changes: dict[str, Change]) -> None:
    """Shows trained rows of the shared tensor to another side, as PEFT does.

    Raises:
        UnsupportedError: that side has changes of its own, which PEFT applies on top of the rows.
    """
    inner, outer = changes.get(tie.input_name, Change()), changes[name]
    if inner.patch is None or outer.patch is not None:
        return
    if outer.terms or outer.start is not None:
        raise UnsupportedError.of(
            "tied-unsupported",
            f"rows of the embedding are trained, and {name}, which shares them, is changed otherwise too.",
            loc=tie.input_name,
            remedy="Merge with PEFT (merge_and_unload), or untie the base before training.",
        )
    outer.patch = inner.patch


def _one_change(
    tie: Tie, changes: dict[str, Change], parts: Sequence[Part], *, asks: bool
) -> tuple[Change, str] | None:
    """Returns the change that both sides of a pair have, now the embedding's only; None if they differ."""
    inner, outer = changes.get(tie.input_name), changes.get(tie.output_name)
    if inner is None and outer is not None and asks and (outer.terms or outer.start is not None):
        inner, outer = outer, None
        changes[tie.input_name] = inner
        del changes[tie.output_name]
    if inner is not None and outer is None and (asks or (not inner.terms and inner.start is None)):
        return inner, "the change is made to both"
    if inner is not None and outer is not None and _alike(inner, outer, parts):
        del changes[tie.output_name]
        return inner, "the adapter changes both alike"
    return None


def _resized(
    names: Sequence[str], changes: dict[str, Change], parts: Sequence[Part]
) -> tuple[Change, str] | None:
    """Returns the change of an embedding that PEFT saved because it was resized, if every side has it."""
    saved = {
        item.base_tensor
        for part in parts
        for item in part.fit.full
        if item.full.role == "saved_embedding" and item.full.rows is None
    }
    inner = changes.get(names[0])
    rest = [name for name in names[1:] if name in changes]
    if inner is None or inner.terms or inner.patch is not None or not saved >= {names[0], *rest}:
        return None
    if not all(_alike(inner, changes[name], parts) for name in rest):
        return None
    for name in rest:
        del changes[name]
    return inner, "the adapter holds the resized embedding of all"


def _headless(tie: Tie) -> UnsupportedError:
    return UnsupportedError.of(
        "tied-unsupported",
        "the adapter changes an embedding that an encoder and a decoder may share, and the base was saved "
        "without the head, so that its sharers are not known.",
        loc=tie.input_name,
        remedy="Merge into the checkpoint of the whole model, saved as its …ForConditionalGeneration class.",
    )


def _asked(tie: Tie) -> UnsupportedError:
    return UnsupportedError.of(
        "tied-unsupported",
        f"the adapter asks for tying (ensure_weight_tying), but {', '.join(tie.members)} share one tensor, "
        "and which of them it ties is not recorded.",
        loc=tie.input_name,
        remedy="Train without ensure_weight_tying: each of these modules is then merged on its own.",
    )


def _equal_members(
    tie: Tie, base_range: Callable[[str], ByteRange], checkpoint: Checkpoint
) -> tuple[str, ...]:
    """Returns the tensors that are one when the base is loaded, the embedding first."""
    names = [tie.input_name]
    for name in tie.members[1:]:
        if name in checkpoint.tensors and not _equal_stored(tie.input_name, name, base_range, checkpoint):
            if tie.unties:
                raise _two_values(tie.input_name, name, checkpoint)
            continue
        names.append(name)
    return tuple(names)


def _equal_stored(
    first: str, second: str, base_range: Callable[[str], ByteRange], checkpoint: Checkpoint
) -> bool:
    opened = checkpoint.tensors
    with checkpoint.open(opened[first].file) as left, checkpoint.open(opened[second].file) as right:
        return _equal_ranges(left, base_range(first), right, base_range(second))


def _two_values(first: str, second: str, checkpoint: Checkpoint) -> FormatError:
    """Refuses tensors that are tied by the config and untied by their values; loaders disagree about them.

    transformers 4 takes the embedding for both, transformers 5 takes each tensor as it is stored
    (``PreTrainedModel.tie_weights``), so the adapter may have been trained on either model.
    """
    return FormatError.of(
        "tie",
        f"the config says that {second} is tied to {first}, but the two are stored with different values.",
        file=checkpoint.config_file or "",
        loc="tie_word_embeddings",
        remedy="Set it to false if both belong to the model (transformers 5 reads the base so), or remove "
        f"{second} if the model was trained with one (transformers 4).",
    )


def _join_companions(tie: Tie, changes: dict[str, Change], parts: Sequence[Part]) -> None:
    """Brings a change of a tensor that is not stored to the one that holds its values."""
    for missing, source in tie.companions:
        if missing not in changes:
            continue
        change = changes.pop(missing)
        if source in changes and not _alike(changes[source], change, parts):
            raise UnsupportedError.of(
                "tied-unsupported",
                f"the adapter changes it in another way than {missing}, but the base stores one for both.",
                loc=source,
                remedy="Untie the base: load it, clone the bias, save it with tie_word_embeddings=false.",
            )
        changes[source] = change


def _touches(part: Part, tie: Tie) -> bool:
    names = {place.base_tensor for place in part.fit.placements.values()}
    names |= {item.base_tensor for item in part.fit.full}
    return bool(names & set(tie.members))


def _keep(
    tie: Tie,
    names: tuple[str, ...],
    changes: dict[str, Change],
    inner: Change,
    base_range: Callable[[str], ByteRange],
    why: str,
) -> Ties:
    stored = [name for name in names[1:] if tie.source_of(name) == name]
    for name in stored:
        start = inner.start or base_range(tie.input_name)
        terms = [replace(term, placement=replace(term.placement, base_tensor=name)) for term in inner.terms]
        changes[name] = Change(start=start, terms=terms, patch=inner.patch)
    return Ties(
        names=(names[0], *stored),
        note=f"{tie.input_name} stays tied to {', '.join(names[1:])}: {why}",
    )


def _alike(inner: Change, outer: Change, parts: Sequence[Part]) -> bool:
    """Says whether two changes of a tied pair are the same, so that one tensor can hold the result."""
    sources = {part.uri: part for part in parts}
    if (inner.start is None) != (outer.start is None) or (inner.patch is None) != (outer.patch is None):
        return False
    if len(inner.terms) != len(outer.terms):
        return False
    pairs = []
    if inner.start is not None and outer.start is not None:
        pairs.append((inner.start, outer.start))
    if inner.patch is not None and outer.patch is not None:
        if inner.patch.rows != outer.patch.rows:
            return False
        pairs.append((inner.patch.source, outer.patch.source))
    return all(equal_bytes(first, second, sources) for first, second in pairs) and all(
        _equal_terms(first, second, sources) for first, second in zip(inner.terms, outer.terms, strict=True)
    )


def equal_bytes(first: ByteRange, second: ByteRange, sources: Mapping[str, Part]) -> bool:
    """Says whether two tensors of adapters have the same shape, dtype and bytes."""
    with sources[first.uri].open() as left, sources[second.uri].open() as right:
        return _equal_ranges(left, first, right, second)


def _equal_ranges(left: OpenSource, first: ByteRange, right: OpenSource, second: ByteRange) -> bool:
    if first.spec.shape != second.spec.shape or first.spec.dtype != second.spec.dtype:
        return False
    for at in range(0, first.spec.nbytes, _PIECE):
        size = min(_PIECE, first.spec.nbytes - at)
        if left.read(first.offset + at, size) != right.read(second.offset + at, size):
            return False
    return True


def _equal_terms(first: Term, second: Term, sources: Mapping[str, Part]) -> bool:
    """Says whether two terms add the same product: alike in method and scale, and in their factors.

    An embedding's factors are those of a linear layer transposed, A for Bᵀ and B for Aᵀ.
    """
    if first.method != second.method or {"A", "B"} != set(first.factors) or {"A", "B"} != set(second.factors):
        return False
    turned = (first.hparams["kind"] == "embedding") != (second.hparams["kind"] == "embedding")
    for name in {*first.hparams, *second.hparams} - {"kind", "fan_in_fan_out"}:
        if first.hparams.get(name) != second.hparams.get(name):
            return False
    partner = {"A": "B", "B": "A"} if turned else {"A": "A", "B": "B"}
    return all(
        _equal_factors(item, second.factors[partner[role]], turned, sources)
        for role, item in first.factors.items()
    )


def _equal_factors(first: ByteRange, second: ByteRange, turned: bool, sources: Mapping[str, Part]) -> bool:
    if not turned:
        return equal_bytes(first, second, sources)
    if first.spec.shape != second.spec.shape[::-1] or first.spec.dtype != second.spec.dtype:
        return False
    from adapterhub_tools.engine.buffers import load_whole

    with sources[first.uri].open() as left, sources[second.uri].open() as right:
        return bool((load_whole(left, first) == load_whole(right, second).t()).all())
