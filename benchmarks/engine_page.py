"""`python -m benchmarks.engine_page`: write the tables and the chart of docs/engine.md from engine.csv, penalty.csv."""

import statistics
from operator import itemgetter
from pathlib import Path

from benchmarks.tables import fill, markdown, read_csv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHART = ROOT / "docs" / "images" / "engine-density.png"
Row = dict[str, str]


def main() -> None:
    path = ROOT / "docs" / "engine.md"
    path.write_text(with_tables(path.read_text()))
    draw()


def with_tables(page: str) -> str:
    """Return the page with each table between its markers as the CSV files have it now."""
    rows = read_csv(RESULTS / "engine.csv")
    return fill(page, {
        "streams": streams(rows),
        "batches": batches(rows),
        "penalty": penalties(read_csv(RESULTS / "penalty.csv")),
    })  # fmt: skip


def streams(rows: list[Row]) -> str:
    """Return a line for each network and way to compute it, one frame at a time."""
    header = ("network, one core", "processor with", "computed by", "median ms", "99 % under ms", "× load_int8")
    shown = {"": "all", "AVX2": "AVX2 alone"}
    found = [row for row in rows if row["part"] == "streams" and row["onednn"] in shown]
    return markdown(header, [
        (r["network"], shown[r["onednn"]], name(r), ms(r["median_ms"]), ms(r["p99_ms"]), f"{float(r['ratio']):.2f}")
        for r in sorted(found, key=lambda row: (row["network"], row["onednn"]))
    ])  # fmt: skip


def batches(rows: list[Row]) -> str:
    """Return a line for each network and instruction set. Torch was limited to the same set."""
    limits = {"avx2": "AVX2", "avx512_vnni": "AVX512_CORE_VNNI", "amx": ""}
    header = (
        "network, 64 images, two cores",
        "instruction set",
        "engine ms",
        "`load_int8` ms, the same set",
        "× faster",
    )
    lines = []
    for row in (row for row in rows if row["part"] == "batches" and row["contestant"] == "multifire.engine"):
        if limits.get(row["isa"]) == row["onednn"]:
            other = next(
                r for r in rows
                if r["contestant"] == "load_int8"
                and all(r[key] == row[key] for key in ("part", "network", "onednn"))
            )  # fmt: skip
            times = float(row["median_ms"]), float(other["median_ms"])
            lines.append(
                (row["network"], row["isa"], ms(row["median_ms"]), ms(other["median_ms"]), f"{times[1] / times[0]:.2f}")
            )
    return markdown(header, sorted(lines))


def penalties(rows: list[Row]) -> str:
    """Return a line for each recipe and penalty: the means over the seeds of accuracy, operations and time."""
    header = (
        "recipe", "epochs", "`optim.spike_penalty`", "runs", "accuracy, %", "million operations",
        "AVX2 ms", "VNNI ms", "AMX ms",
    )  # fmt: skip
    times = ("engine_ms_avx2", "engine_ms_avx512_vnni", "engine_ms")
    lines = []
    setting = itemgetter("recipe", "epochs", "penalty", "precision", "limit")
    for values in dict.fromkeys(map(setting, rows)):
        runs = [row for row in rows if setting(row) == values]
        mean = {
            key: statistics.fmean(float(row[key]) for row in runs)
            for key in ("accuracy", "synops", *times)
            if all(row[key] for row in runs)
        }
        lines.append((
            *values[:3], str(len(runs)), f"{100 * mean['accuracy']:.1f}", f"{mean['synops'] / 1e6:.2f}",
            *(f"{mean[key]:.3f}" if key in mean else "-" for key in times),
        ))  # fmt: skip
    return markdown(header, lines)


def name(row: Row) -> str:
    return f"{row['contestant']}, {row['isa']}" if row["isa"] else row["contestant"]


def ms(text: str) -> str:
    return f"{float(text):.3g}"


def draw() -> None:
    """Draw time against density."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in read_csv(RESULTS / "engine.csv") if row["part"] == "density" and row["onednn"] == "AVX2"]
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for isa in ("avx2", "avx512_vnni", "amx"):
        points = sorted((float(r["density"]), float(r["median_ms"])) for r in rows if r["isa"] == isa)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"engine, {isa}")
    points = sorted((float(r["density"]), float(r["median_ms"])) for r in rows if r["contestant"] == "load_int8")
    axes.plot(*zip(*points, strict=True), marker="s", color="grey", label="load_int8, AVX2")
    axes.set(xlabel="share of inputs of convolutions that are not 0", ylabel="ms for 64 images", ylim=(0, None))
    axes.legend()
    CHART.parent.mkdir(exist_ok=True)
    figure.savefig(CHART, dpi=120)


if __name__ == "__main__":
    main()
