"""Where an operation computes."""

from __future__ import annotations

from adapterhub_tools.errors import DeviceError
from adapterhub_tools.ops.option_checks import check_choice

DEVICES = ("auto", "cpu", "cuda")


def device_of(asked: str) -> str:
    """Returns where to compute: ``"cpu"`` or ``"cuda"``; ``"auto"`` is the CPU.

    Args:
        asked: one of DEVICES.

    Raises:
        DeviceError: CUDA is asked for and there is none: never does the CPU step in for it.
        ValueError: it is something else; the command line refuses it earlier.
    """
    check_choice("device", asked, DEVICES)
    if asked != "cuda":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        # What a build is for is the first thing to look at, a driver that is missing or too old the second.
        made_for = torch.version.cuda or torch.version.hip
        found = f"is made for {made_for}, but finds no device" if made_for else "is a build without CUDA"
        raise DeviceError.of(
            "device",
            f"there is no CUDA device here: torch {torch.__version__} {found}.",
            loc="--device",
            remedy="Run it where there is one, with a build of torch for CUDA, or use --device cpu.",
        )
    return "cuda"


def device_name(device: str) -> str:
    """Returns what a report calls the device: ``"cpu"``, or the name of the GPU."""
    if device == "cpu":
        return device
    import torch

    name: str = torch.cuda.get_device_name()
    return name
