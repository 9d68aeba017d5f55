"""What an undo file says of the deltas of a tensor, held against the adapters that it names."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub_tools import registry
from adapterhub_tools.errors import FormatError, MismatchError
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.plan import ByteRange, Placement, Step, Term
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.model.undo import NEGATED_SUM, SCALED, UNDO_FILE, UndoTensor, UndoTerm
from adapterhub_tools.ops.adapter_reader import OpenedAdapter


def contradiction(what: str) -> FormatError:
    """Returns the error for an undo file that contradicts itself or what lies beside it."""
    return FormatError.of(
        "undo-file", f"{what}.", file=UNDO_FILE, remedy="The file is damaged: get it again."
    )


def terms_of(
    tensor: UndoTensor, base: TensorSpec, merged: ByteRange | None, adapters: Sequence[OpenedAdapter]
) -> tuple[Term, ...]:
    """Returns the terms of a tensor, with the places of their factors.

    Args:
        tensor: how it comes back.
        base: as it will be.
        merged: where the merged one is.
        adapters: in the receipt's order.

    Raises:
        FormatError: the undo file says what cannot be.
        MismatchError: an adapter has the same content in another form than the merge found.
    """
    terms = tuple(_term(term, base, adapters) for term in tensor.terms)
    if merged is None or tensor.predictor not in (NEGATED_SUM, SCALED):
        return terms
    from adapterhub_tools.engine.undo_keep import predictor_of

    step = Step(action="merge", start=merged, output=base, file=UNDO_FILE, offset=0, terms=terms)
    if predictor_of(step) != tensor.predictor or not terms:
        raise contradiction(f"{base.name} is not predicted by {tensor.predictor} from these terms")
    return terms


def _term(term: UndoTerm, base: TensorSpec, adapters: Sequence[OpenedAdapter]) -> Term:
    if term.adapter >= len(adapters):
        raise contradiction("it names an adapter that the receipt does not")
    opened = adapters[term.adapter]
    if not any(_agrees(term, module) for module in opened.adapter.modules):
        raise contradiction(f"what it says of the module {term.module} is not what the adapter says")
    _check(term, base)
    files = opened.files
    factors = {}
    for role, spec in term.factors.items():
        if files.header is None or files.header.tensors.get(spec.name) != spec:
            raise MismatchError.of(
                "renamed-factors",
                f"the adapter has no tensor {spec.name} of {spec.dtype} {list(spec.shape)}; it has the same "
                "content in another form.",
                file=str(files.path),
                remedy="Give the adapter in the form in which it was merged.",
            )
        factors[role] = ByteRange(uri=str(files.path), offset=files.header.offsets[spec.name], spec=spec)
    return Term(
        module=term.module,
        method=term.method,
        hparams=term.hparams,
        factors=factors,
        placement=term.placement,
    )


def _agrees(term: UndoTerm, module: TargetModule) -> bool:
    """Says whether a term is that of a module; a later version may know more hyperparameters."""
    same = (term.module, term.method) == (module.path, module.method)
    return same and all(module.hparams.get(name, said) == said for name, said in term.hparams.items())


def _check(term: UndoTerm, base: TensorSpec) -> None:
    place, multiplier = term.placement, term.hparams.get("multiplier", 1.0)
    whole = Placement(base_tensor=place.base_tensor, transposed=place.transposed) == place
    number = isinstance(multiplier, int | float) and not isinstance(multiplier, bool)
    try:
        method = registry.load("methods", term.method).IMPLEMENTATION.from_hparams(term.hparams)
        problems = method.check(term.factors, term.hparams["kind"], base, term.module)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise contradiction(f"what it says of the module {term.module} is incomplete") from error
    if problems or not whole or not number:
        raise contradiction(f"what it says of the module {term.module} does not fit {base.name}")
