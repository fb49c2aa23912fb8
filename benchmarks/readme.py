"""`python -m benchmarks.readme`: write the table of figures in README.md from the CSV files in benchmarks/results."""

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.tables import fill, markdown, read_csv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]


def main() -> int:
    path = ROOT / "README.md"
    path.write_text(with_figures(path.read_text()))
    return 0


def with_figures(readme: str) -> str:
    """Return the README with its table as the CSV files have it now."""
    return fill(readme, {"figures: python -m benchmarks.readme": table()})


def table() -> str:
    """Return a line for each figure: what, elsewhere, here, and where it was measured."""
    header = ("", "elsewhere", "multifire", "measured on")
    return markdown(header, [line() for line in (accuracy, small_accuracy, gpu_step, gpu_memory, cpu_step)])


def accuracy() -> tuple[str, str, str, str]:
    """Accuracy of the paper's network."""
    row = last("trainings.csv", lambda row: row["name"] == "cifar10-t4-k3")
    ours = f"{percent(row['test_accuracy'])} ({row['epoch']} epochs, images compressed as JPEG)"
    return "CIFAR-10, `cifar10`: 4.3 M parameters", "94.25 % (the paper, 110 epochs)", ours, row["device"]


def small_accuracy() -> tuple[str, str, str, str]:
    """Accuracy of the network with a quarter of the width."""
    row = last("trainings.csv", lambda row: row["name"] == "cifar10-small")
    ours = f"{percent(row['test_accuracy'])} ({row['epoch']} epochs, the same images)"
    return "CIFAR-10, `cifar10-small`: 0.27 M", "-", ours, row["device"]


def gpu_step() -> tuple[str, str, str, str]:
    """Training step on a GPU beside other implementations of the same network."""
    rows = gpu_rows()
    ours = min(float(row["median_s"]) for row in rows if row["framework"] == "multifire")
    others = [
        f"{milliseconds(fastest(rows, name))} ({label})"
        for name, label in (("reference", "plain PyTorch"), ("snntorch", "snnTorch"), ("spikingjelly", "SpikingJelly"))
    ]
    return "training step of 128 images, bf16", ", ".join(others), milliseconds(ours), rows[0]["card"]


def gpu_memory() -> tuple[str, str, str, str]:
    """Peak memory of that step."""
    rows = gpu_rows()
    peaks = {
        name: min(float(r["peak_bytes"]) for r in rows if r["framework"] == name)
        for name in ("multifire", "spikingjelly", "reference")
    }
    others = f"{gigabytes(peaks['reference'])} (plain PyTorch), {gigabytes(peaks['spikingjelly'])} (SpikingJelly)"
    return "its memory", others, gigabytes(peaks["multifire"]), rows[0]["card"]


def cpu_step() -> tuple[str, str, str, str]:
    """Training step on a CPU."""
    rows = [row for row in read_csv(RESULTS / "cifar10.csv") if row["what"] == "training step"]
    ours = next(row for row in rows if (row["framework"], row["settings"]) == ("multifire", "bf16"))
    peer = min(float(row["median_s"]) for row in rows if row["framework"] == "spikingjelly")
    plain = next(row for row in rows if row["settings"] == "bf16, compiled" and row["framework"] == "reference")
    others = f"{seconds(float(plain['median_s']))} (plain PyTorch), {seconds(peer)} (SpikingJelly)"
    where = f"{ours['processor']} (Zen 4), {ours['threads']} cores"
    return "training step of 16 images, bf16, others compiled", others, seconds(float(ours["median_s"])), where


def gpu_rows() -> list[Row]:
    """Return the figures on a GPU in bf16 with the paper's surrogate."""
    rows = read_csv(RESULTS / "gpu-peers.csv")
    return [row for row in rows if row["precision"] == "bf16" and row["surrogate"] == "rect"]


def last(name: str, chosen: Callable[[Row], bool]) -> Row:
    """Return the last row of a CSV file that is chosen."""
    return [row for row in read_csv(RESULTS / name) if chosen(row)][-1]


def fastest(rows: list[Row], framework: str) -> float:
    """Return the lowest median of a framework, in seconds."""
    return min(float(row["median_s"]) for row in rows if row["framework"] == framework and row["median_s"])


def percent(share: str) -> str:
    return f"{100 * float(share):.2f} %"


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.1f} ms"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
