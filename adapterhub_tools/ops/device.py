"""Where an operation computes."""

from __future__ import annotations

from adapterhub_tools.errors import UnsupportedError


def device_of(asked: str) -> str:
    """Returns where to compute: ``"cpu"`` or ``"cuda"``; ``"auto"`` is the CPU.

    Raises:
        UnsupportedError: CUDA is asked for and there is none.
    """
    if asked != "cuda":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError.of(
            "device",
            "there is no CUDA device here.",
            loc="--device",
            remedy="Use --device cpu; the bytes are the same.",
        )
    return "cuda"
