"""A picture of the singular values of every module, and of the ranks that were chosen."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.errors import MismatchError, StoreError, UnsupportedError
from adapterhub_tools.store.files import store_error

if TYPE_CHECKING:
    from adapterhub_tools.ops.shrink_report import LowRankReport

ENDINGS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Checks, before any work, that a picture can be made.

    Raises:
        MismatchError: another ending, or the place of a folder.
        StoreError: the folder that is to hold it does not exist.
        UnsupportedError: matplotlib is not installed.
    """
    if path.suffix not in ENDINGS:
        raise MismatchError.of(
            "plot", f"expected a name that ends in {' or '.join(ENDINGS)}.", file=str(path), loc="--plot"
        )
    if path.is_dir():
        raise MismatchError.of("plot", "it is a folder; expected a file.", file=str(path), loc="--plot")
    if not path.parent.is_dir():
        raise StoreError.of(
            "not-found",
            "the folder that is to hold the picture does not exist.",
            file=str(path),
            loc="--plot",
            remedy="Make the folder first, or give another path; nothing was written.",
        )
    if find_spec("matplotlib") is None:
        raise UnsupportedError.of(
            "no-matplotlib",
            "a picture needs matplotlib, which is not installed.",
            loc="--plot",
            remedy="Install it with: pip install 'adaptertool[plot]'.",
        )


def plot_spectra(report: LowRankReport, path: Path) -> None:
    """Draws, for each kind of module, its singular values over their index; kept ones are solid.

    Args:
        report: what was computed.
        path: the file to write, replaced if it exists.

    Raises:
        StoreError: it cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
    for module in report.modules:
        groups.setdefault(module.path.rpartition(".")[2], []).append((module.rank, module.singular_values))
    columns = min(3, max(1, len(groups)))
    rows = -(-max(1, len(groups)) // columns)
    # A fixed salt and no date: the same report gives the same picture.
    with mpl.rc_context({"svg.hashsalt": "adaptertool"}):
        figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(groups) :]:
            axes.set_axis_off()
        for axes, (name, spectra) in zip(grid.flat, sorted(groups.items()), strict=False):
            for index, (rank, values) in enumerate(spectra):
                shade = f"C{index % 10}"
                x = range(1, len(values) + 1)
                axes.plot(x[:rank], values[:rank], color=shade, linewidth=1.2)
                axes.plot(x[max(0, rank - 1) :], values[max(0, rank - 1) :], ":", color=shade, linewidth=0.8)
            if any(value > 0 for _, values in spectra for value in values):
                axes.set_yscale("log")
            axes.set_title(f"{name} ({len(spectra)})")
            axes.set_xlabel("index")
            axes.set_ylabel("singular value")
        figure.suptitle(f"{report.operation}: solid lines are kept")
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
        except OSError as error:
            raise store_error(error, "write the picture", path) from error
