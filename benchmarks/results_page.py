"""`python -m benchmarks.results_page`: write the tables and the figures of docs/results.md from the CSV files."""

import itertools
from pathlib import Path

from benchmarks import claims_page
from benchmarks.tables import fill, markdown, read_csv
from benchmarks.trainings import TRAININGS
from multifire.config.recipes import RECIPES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
Row = dict[str, str]


def main() -> None:
    path = ROOT / "docs" / "results.md"
    path.write_text(with_tables(path.read_text(), RESULTS))
    claims_page.draw(read_csv(RESULTS / "claims.csv"), read_csv(RESULTS / "claims-steps.csv"), IMAGES)


def with_tables(page: str, folder: Path) -> str:
    """Return the page with each table between its markers as the CSV files have it now."""
    claims = read_csv(folder / "claims.csv")
    return fill(page, {
        "trainings": trainings_table(read_csv(folder / "trainings.csv")),
        "claims": claims_page.accuracy_table(claims),
        "levels": claims_page.levels_table(claims),
        "blocks": claims_page.blocks_table(claims),
        "gradients": claims_page.gradients_table(claims),
    })  # fmt: skip


def trainings_table(rows: list[Row]) -> str:
    """Return a line for each training that ran: the last epoch's accuracy, the best, and the paper's."""
    header = ("`benchmarks/results.py`", "recipe and options", "epochs", "last epoch, %", "best, %", "paper, %", "on")
    lines = []
    for name, group in itertools.groupby(rows, lambda row: row["name"]):
        epochs = list(group)
        last, best = epochs[-1], max(float(row["test_accuracy"]) for row in epochs)
        published = RECIPES[last["recipe"]].published
        lines.append((
            name, f"`{last['recipe']} {last['options']}`", last["epoch"],
            f"{100 * float(last['test_accuracy']):.2f}", f"{100 * best:.2f}",
            "-" if published is None else f"{published:.2f}", last["device"],
        ))  # fmt: skip
    trained = {row["name"] for row in rows}
    missing = [(training.name, training.about, *["-"] * 5) for training in TRAININGS if training.name not in trained]
    return markdown(header, lines + missing)


if __name__ == "__main__":
    main()
