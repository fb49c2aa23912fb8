"""Tables and figures of the paper's claims in docs/results.md, from claims.csv and claims-steps.csv."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import markdown

Row = dict[str, str]
Pair = tuple[Row, Row]
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Quantiles of Student's t for a 95 % interval with 1, 2, ..., 30 degrees of freedom."""
BLOCK_NAMES = {"plain": "plain", "ds": "DS"}
COLOURS = {"1": "tab:orange", "2": "tab:green", "3": "tab:blue"}
PAPER = ("tdbn", "1")
"""The paper's norm and width of the surrogate, as they stand in the CSV file."""


@dataclass(frozen=True)
class Measure:
    """A figure of a run, and the side on which the paper expects the second run of a pair."""

    text: str
    of: Callable[[Row], float]
    expected: int
    """1: higher, -1: lower."""
    split: bool = False
    """Compare each kind of block, or each number of levels, by itself: the difference is not of one size in all."""


def percent(column: str) -> Callable[[Row], float]:
    return lambda row: 100 * float(row[column])


def reach(moment: str) -> Callable[[Row], float]:
    """Return how many times larger the gradient is in the first layers than in the last ones, as log10.

    -inf: no gradient reaches the first layers.
    """

    def decades(row: Row) -> float:
        ratio = float(row[f"gradient_first_{moment}"]) / float(row[f"gradient_last_{moment}"])
        return math.log10(ratio) if ratio else -math.inf

    return decades


LEVELS = (
    Measure("accuracy, %", percent("accuracy"), 1, split=True),
    Measure("dormant in the first layers before training, %", percent("dormant_first_start"), -1),
    Measure("dormant in the first layers after training, %", percent("dormant_first_end"), -1),
    Measure("dormant in all layers after training, %", percent("dormant_end"), -1),
)
BLOCKS = (
    Measure("accuracy, %", percent("accuracy"), 1, split=True),
    Measure("dormant in the first layers after training, %", percent("dormant_first_end"), -1),
)
GRADIENTS = (
    Measure("zero gradients in the first layers before training, %", percent("zero_gradient_first_start"), -1),
    Measure("zero gradients in the first layers after training, %", percent("zero_gradient_first_end"), -1),
    Measure("gradient, first over last layers, before training, decades", reach("start"), 1),
    Measure("gradient, first over last layers, after training, decades", reach("end"), 1),
)


def levels_table(rows: Sequence[Row]) -> str:
    """Claim (a): K = 3 beside K = 1 in the same network with the same seed."""
    return comparison(rows, LEVELS, "levels", ("1", "3"), ("K = 1", "K = 3"))


def blocks_table(rows: Sequence[Row]) -> str:
    """Claim (b): DS blocks beside plain ones of the same depth, levels and seed."""
    return comparison(rows, BLOCKS, "block", ("plain", "ds"), ("plain", "DS"))


def gradients_table(rows: Sequence[Row]) -> str:
    """Claim (c): the gradient in the first layers, DS blocks beside plain ones."""
    return comparison(rows, GRADIENTS, "block", ("plain", "ds"), ("plain", "DS"))


def comparison(
    rows: Sequence[Row], measures: Iterable[Measure], by: str, values: tuple[str, str], names: tuple[str, str]
) -> str:
    """Return a line for each condition, measure and depth: both means, the difference, its interval and the verdict."""
    other = "block" if by == "levels" else "levels"
    lines = []
    for norm, width in conditions(rows):
        of_condition = [row for row in rows if (row["norm"], row["surrogate_width"]) == (norm, width)]
        for measure in measures:
            for depth in values_of(of_condition, "depth"):
                of_depth = [row for row in of_condition if row["depth"] == depth]
                for kind, chosen in kinds(of_depth, other) if measure.split else [("all", of_depth)]:
                    if found := pairs(chosen, by, values):
                        lines.append((measure.text, depth, kind, condition(norm, width), *compare(found, measure)))
    header = ("", "depth", "of", "norm, surrogate", *names, "difference, 95 % interval", "as claimed in", "the claim")
    return markdown(header, lines)


def values_of(rows: Iterable[Row], column: str) -> list[str]:
    """Return the values of a column in order, numbers by their size."""
    return sorted({row[column] for row in rows}, key=lambda value: (int(value) if value.isdecimal() else 0, value))


def kinds(rows: Sequence[Row], column: str) -> list[tuple[str, list[Row]]]:
    """Return the name of each value of the column, and its rows."""
    return [
        (f"K = {value}" if column == "levels" else BLOCK_NAMES[value], [row for row in rows if row[column] == value])
        for value in values_of(rows, column)
    ]


def conditions(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return the norms and widths of the surrogate, the paper's first."""
    return sorted({(row["norm"], row["surrogate_width"]) for row in rows}, key=lambda each: (each != PAPER, each))


def condition(norm: str, width: str) -> str:
    return f"{ {'tdbn': 'tdBN', 'batchnorm': 'batch norm'}[norm] }, width {width}"


def pairs(rows: Sequence[Row], by: str, values: tuple[str, str]) -> list[Pair]:
    """Return the pairs of runs that differ in the column `by` alone."""
    keys = [key for key in ("block", "depth", "levels", "seed", "norm", "surrogate_width") if key != by]
    first, second = ({tuple(row[k] for k in keys): row for row in rows if row[by] == value} for value in values)
    return [(first[key], second[key]) for key in first if key in second]


def compare(found: Sequence[Pair], measure: Measure) -> tuple[str, ...]:
    """Return the cells of a line: means, difference with its interval, pairs in which the claim holds, verdict."""
    values = [(measure.of(a), measure.of(b)) for a, b in found]
    means = [statistics.fmean(each) for each in zip(*values, strict=True)]
    differences = [b - a for a, b in values]
    mean = statistics.fmean(differences)
    holding = sum(measure.expected * difference > 0 for difference in differences)
    count = f"{holding} of {len(values)}"
    cells = (f"{means[0]:.2f}", f"{means[1]:.2f}")
    if not math.isfinite(mean):
        return (*cells, f"{mean:+.2f}", count, "no gradient")
    if len(values) < 2:
        return (*cells, f"{mean:+.2f}", count, "one pair")
    half = half_interval(differences)
    return (*cells, f"{mean:+.2f} ± {half:.2f}", count, verdict(measure.expected * mean, half))


def half_interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean, by Student's t."""
    n = len(values)
    quantile = T_975[n - 2] if n - 2 < len(T_975) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(n)


def verdict(towards: float, half: float) -> str:
    """Say what the interval towards ± half says, where a positive difference is the claim."""
    if towards - half > 0:
        return "shows"
    return "the opposite" if towards + half < 0 else "does not show"


def of_paper(rows: Iterable[Row]) -> list[Row]:
    """Return the rows under the paper's conditions."""
    return [row for row in rows if (row["norm"], row["surrogate_width"]) == PAPER]


def accuracy_table(rows: Sequence[Row]) -> str:
    """Return the mean accuracy by block, levels and depth, with its range over seeds, under the paper's conditions."""
    chosen = of_paper(rows)
    depths = sorted({row["depth"] for row in chosen}, key=int)
    lines = []
    for block in ("plain", "ds"):
        for levels in ("1", "2", "3"):
            of = [row for row in chosen if (row["block"], row["levels"]) == (block, levels)]
            cells = [over_seeds([percent("accuracy")(row) for row in of if row["depth"] == depth]) for depth in depths]
            lines.append((name(block, levels), *cells))
    return markdown(("accuracy after the last epoch, %", *(f"depth {depth}" for depth in depths)), lines)


def over_seeds(values: Sequence[float]) -> str:
    """Return the mean, and the range if there are several."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def draw(rows: Sequence[Row], steps: Sequence[Row], folder: Path) -> None:
    """Draw a figure for each claim."""
    import matplotlib as mpl

    mpl.use("Agg")
    chosen = of_paper(rows)
    errors = {"": lambda row: 100 - percent("accuracy")(row)}
    draw_depths(chosen, errors, folder / "claims-errors.png", "test images that are misclassified, %", "log")
    dormant = {"before training": percent("dormant_first_start"), "after training": percent("dormant_first_end")}
    draw_depths(chosen, dormant, folder / "claims-dormant.png", "dormant in the first layers, %", "linear")
    draw_gradients(of_paper(steps), folder / "claims-gradients.png")


def draw_depths(
    rows: Sequence[Row], figures: dict[str, Callable[[Row], float]], path: Path, label: str, scale: str
) -> None:
    """Draw means over seeds against depth, one panel for each figure; a point for each run."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(figures), figsize=(1.8 + 4.4 * len(figures), 4), squeeze=False, sharey=True,
                                  constrained_layout=True)  # fmt: skip
    for panel, (title, of) in zip(panels[0], figures.items(), strict=True):
        for block, style in (("plain", "--"), ("ds", "-")):
            for levels, colour in COLOURS.items():
                points = [(int(r["depth"]), of(r)) for r in rows if (r["block"], r["levels"]) == (block, levels)]
                if points:
                    panel.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.5)
                    panel.plot(*zip(*means(points), strict=True), style, color=colour, label=name(block, levels))
        panel.set(xlabel="depth", title=title, yscale=scale, xticks=sorted({int(row["depth"]) for row in rows}))
    panels[0][0].set_ylabel(label)
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    if scale == "log":
        panels[0][0].yaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_gradients(steps: Sequence[Row], path: Path) -> None:
    """Draw the norm of the weights' gradient in the first layers over the first steps, one panel for each depth."""
    from matplotlib import pyplot as plt

    depths = sorted({row["depth"] for row in steps}, key=int)
    figure, panels = plt.subplots(1, len(depths), figsize=(3.2 * len(depths), 3.6), squeeze=False, sharey=True,
                                  constrained_layout=True)  # fmt: skip
    for panel, depth in zip(panels[0], depths, strict=True):
        for block, style in (("plain", "--"), ("ds", "-")):
            for levels in ("1", "3"):
                key = block, depth, levels
                of = [row for row in steps if (row["block"], row["depth"], row["levels"]) == key]
                points = means([(int(row["step"]), float(row["gradient_first"])) for row in of])
                if points:
                    panel.plot(*zip(*points, strict=True), style, color=COLOURS[levels], label=name(block, levels))
        panel.set(xlabel="step", title=f"depth {depth}", yscale="log")
    panels[0][0].set_ylabel("‖∂L/∂W‖ of the first layers")
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def means(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the mean of the second numbers for each first number, in order."""
    found: dict[int, list[float]] = {}
    for x, y in points:
        found.setdefault(x, []).append(y)
    return [(x, statistics.fmean(found[x])) for x in sorted(found)]


def name(block: str, levels: str) -> str:
    return f"{BLOCK_NAMES[block]}, K = {levels}"
