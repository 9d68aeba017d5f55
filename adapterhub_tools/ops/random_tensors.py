"""The random tensors that an adapter does not store: made again for a base, and compared by digest.

Such an adapter means something only where its seed gives the same numbers as in training. So the digest of
the numbers is recorded when the manifest is written, and a merge that makes other ones is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_tools.errors import IntegrityError, Problem
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.ops.module_kinds import method_of
from adapterhub_tools.store.digest import DEFAULT, split_digest

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.manifest import Manifest
    from adapterhub_tools.ops.fit import Fit


def random_digest(fit: Fit, *, algorithm: str = DEFAULT) -> str | None:
    """Returns the root digest of all random tensors of a fitted adapter, or None if it stores all it needs.

    A tensor's name says what it was made from, so modules that share one count once.

    Args:
        fit: without problems.
        algorithm: of the tensor tree.

    Raises:
        UnsupportedError: a seed cannot be used.
    """
    made: dict[str, Tensor] = {}
    for module in fit.modules:
        extent = {} if fit.extent is None else {"extent": list(fit.extent)}
        method = method_of(module, extent)
        if hasattr(method, "random_tensors") and module.base_shape is not None:
            shape = module.base_shape if module.kind != "conv1d" else module.base_shape[::-1]
            factors = {**fit.shared, **module.factors}
            missing = method.random_names(factors, shape)
            if not set(missing) <= set(made):
                made.update(method.random_tensors(factors, shape))
    return _digest(made, algorithm) if made else None


def random_problems(fit: Fit, manifest: Manifest | None) -> list[Problem]:
    """Returns a problem if the random tensors made now are not those that a manifest records."""
    recorded = None if manifest is None else manifest.base.random_digest
    if recorded is None:
        return []
    found = random_digest(fit, algorithm=split_digest(recorded)[0])
    if found == recorded:
        return []
    return [
        Problem(
            kind="random-tensors",
            loc="/base/random_digest",
            message=f"the random tensors made from the adapter's seed are {found or 'none'}, but its "
            f"manifest records {recorded}: the adapter was trained with other numbers.",
            remedy="Use the base and the release of torch that the manifest was written with, or save the "
            "adapter with its random tensors (PEFT: save_projection=True).",
        )
    ]


def checked_random_digest(fit: Fit, manifest: Manifest | None, label: str) -> str | None:
    """Returns the digest of the random tensors, which the manifest must agree with if it records one.

    Raises:
        IntegrityError: they differ.
    """
    problems = random_problems(fit, manifest)
    if problems:
        problem = problems[0]
        raise IntegrityError.of(
            problem.kind, problem.message, file=label, loc=problem.loc, remedy=problem.remedy
        )
    return random_digest(fit)


def _digest(tensors: dict[str, Tensor], algorithm: str) -> str:
    import torch

    from adapterhub_tools.store.digest import TensorHasher, root_digest

    names = {torch.float32: "F32", torch.int64: "I64"}
    digests = {}
    for name, tensor in tensors.items():
        spec = TensorSpec(name=name, dtype=names[tensor.dtype], shape=tuple(tensor.shape))
        hasher = TensorHasher(algorithm, spec)
        hasher.update(tensor.contiguous().numpy().data.cast("B"))
        digests[name] = hasher.digest()
    digest: str = root_digest(algorithm, digests)
    return digest
