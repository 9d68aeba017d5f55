"""Settings for all tests: a GPU test on a machine without one fails at once, with the remedy.

The markers themselves (`slow`, `gpu`) are declared in pyproject.toml.
"""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a `gpu` test where it could not prove anything, instead of passing over it."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.fail('no CUDA device here: deselect with -m "not gpu"', pytrace=False)
