"""`python -m benchmarks.results_page`: write the tables and the figures of docs/results.md from the CSV files."""

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
    claims, trained = read_csv(folder / "claims.csv"), read_csv(folder / "trainings.csv")
    tables = {training.name: training.table for training in TRAININGS}
    rows = {
        table: [row for row in trained if tables.get(row["name"], "trainings") == table]
        for table in ("trainings", "search", "events")
    }
    return fill(page, {
        "trainings": trainings_table(rows["trainings"]),
        "search": search_table(rows["search"]),
        "events": events_table(rows["events"]),
        "claims": claims_page.accuracy_table(claims),
        "levels": claims_page.levels_table(claims),
        "blocks": claims_page.blocks_table(claims),
        "gradients": claims_page.gradients_table(claims),
        "fashion-mnist": claims_page.accuracy_table(read_csv(folder / "claims-fashion-mnist.csv")),
    })  # fmt: skip


def trainings_table(rows: list[Row]) -> str:
    """Return a line for each training that ran: the last epoch's accuracy, the best, and the paper's."""
    header = ("`benchmarks/results.py`", "recipe and options", "epochs", "last epoch, %", "best, %", "paper, %", "on")
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        epochs = [row for row in rows if row["name"] == name]  # not neighbours, if others trained in between
        last, best = epochs[-1], max(float(row["test_accuracy"]) for row in epochs)
        published = RECIPES[last["recipe"]].published
        lines.append((
            name, f"`{last['recipe']} {last['options']}`", last["epoch"],
            f"{100 * float(last['test_accuracy']):.2f}", f"{100 * best:.2f}",
            "-" if published is None else f"{published:.2f}", last["device"],
        ))  # fmt: skip
    trained = {row["name"] for row in rows}
    waiting = [each for each in TRAININGS if each.name not in trained and each.table == "trainings"]
    return markdown(header, [*lines, *((each.name, each.about, *["-"] * 5) for each in waiting)])


def search_table(rows: list[Row]) -> str:
    """Return a line for each short run: its accuracy on the validation split after the last epoch."""
    last = {row["name"]: row for row in rows}
    header = ("`benchmarks/results.py`", "recipe and options", "epochs", "validation, %", "on")
    if not last:
        return "None of the short runs has run yet; `benchmarks/trainings.py` lists them.\n"
    return markdown(header, [
        (name, f"`{row['recipe']} {row['options']}`", row["epoch"],
         f"{100 * float(row['validation_accuracy']):.2f}", row["device"])
        for name, row in last.items()
    ])  # fmt: skip


def events_table(rows: list[Row]) -> str:
    """Return a line for each recipe and style: the last epoch's accuracy over the seeds."""
    last = {row["name"]: row for row in rows}
    header = ("`benchmarks/results.py`", "epochs", "last epoch, %: mean and range of the seeds", "on")
    styles = dict.fromkeys(name.rpartition("-")[0] for name in last)
    lines = []
    for style in styles:
        runs = [row for name, row in last.items() if name.rpartition("-")[0] == style]
        seeds = ", ".join(row["name"].removeprefix(style) for row in runs)
        accuracies = [100 * float(row["test_accuracy"]) for row in runs]
        lines.append((style + seeds, runs[0]["epoch"], claims_page.over_seeds(accuracies), runs[0]["device"]))
    return markdown(header, lines)


if __name__ == "__main__":
    main()
