"""Settings for all tests: what a GPU test does on a machine without a GPU.

The markers themselves (`slow`, `gpu`) are declared in pyproject.toml.
"""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `gpu` test where there is no GPU; refuse it where nothing but these was asked for.

    `make test-gpu` on the wrong machine would else pass without having proved anything.
    """
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    missing = f"no CUDA device here (torch {torch.__version__})"
    if item.config.getoption("markexpr") == "gpu":
        pytest.fail(f"{missing}: run it where there is one", pytrace=False)
    pytest.skip(missing)
