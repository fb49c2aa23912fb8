"""Measured figures as CSV files, and the page of tables generated from them."""

import csv
import io
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multifire.utils.files import write_atomic

TIMES = (
    "part", "framework", "settings", "what", "model", "width", "levels", "timesteps", "batch", "channels", "size",
    "n", "median_s", "fastest_s", "slowest_s", "ratio", "floor_ratio", "first_call_s", "peak_bytes", "loss",
    "processor", "threads", "kernel", "torch", "framework_version",
)  # fmt: skip
MEMORY = (
    "part", "framework", "settings", "model", "width", "levels", "timesteps", "batch", "channels", "size",
    "peak_bytes", "kept_bytes", "neuron_steps",
    "processor", "threads", "kernel", "torch", "framework_version",
)  # fmt: skip
CHECKS = (
    "part", "framework", "settings", "model", "width", "levels", "timesteps", "batch", "channels", "size",
    "logits", "evaluated", "gradients", "worst_gradient", "torch", "framework_version",
)  # fmt: skip

MOVED = ("neuron_steps", "fire", "kernel_moved", "layer_moved", "network_moved")
SPIKES = (
    "part", "framework", "settings", "model", "width", "levels", "timesteps", "batch", "channels", "size",
    "layer", *MOVED,
    "processor", "threads", "kernel", "torch", "framework_version",
)  # fmt: skip


def summary(seconds: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Return n, median and range of the seconds, and the median of their ratios to neighbouring runs of the base."""
    return {
        "n": len(seconds),
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "ratio": ratio(seconds, base),
    }


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring runs."""
    return statistics.median(own / other for own, other in zip(seconds, base, strict=True))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows atomically, floats with six digits.

    Raises:
        ValueError: a row has a field that is no column.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def append(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a CSV file."""
    write_csv(path, columns, [*read_csv(path), *rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file; none if it is missing."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with the first column left-aligned and the others right-aligned."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines) + "\n"


END = "<!-- end -->\n"


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Return a page in which each table stands between <!-- NAME --> and <!-- end -->, in place of what stood there."""
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n\n{table}\n{END}{rest.split(END, 1)[1]}"
    return text


def page(folder: Path) -> str:
    """Return docs/benchmarks.md, made from the CSV files in the folder."""
    sections = [INTRODUCTION]
    for part, (title, text, table) in SECTIONS.items():
        rows = read_csv(folder / f"{part}.csv")
        if rows:
            sections.append(f"## {title}\n\n{text}\n\n{_where(rows)}\n\n{table(rows)}")
    if rows := read_csv(folder / "curves.csv"):
        sections.append(f"{_CURVES}\n{_once(row['processor'] for row in rows)}.\n\n{curves_apart(rows)}")
    return "\n".join(sections)


def times_table(rows: list[dict[str, str]]) -> str:
    """Return a line for each framework and kind of call."""
    of_speed = ("ms/image", "range", "images/s", "× ours", "× floor")
    header = ("", "settings", *of_speed, "first call", "peak over interpreter", "n")
    return markdown(header, (_times_line(row) for row in rows))


def sweep_table(rows: list[dict[str, str]]) -> str:
    """Return a line for each setting, with the time per image and time step."""
    header = ("", "settings", "µs per image and time step", "range", "× the first", "n")
    return markdown(header, (_sweep_line(row, rows[0]) for row in rows))


def memory_table(rows: list[dict[str, str]]) -> str:
    """Return a line for each network: peak memory, memory kept by autograd, and both per layer of depth."""
    header = ("", "settings", "peak MB", "MB/image", "kept MB", "kept bytes per neuron and step")
    lines = [_memory_line(row) for row in rows]
    groups = itertools.groupby(rows, lambda row: row["settings"])
    return "\n".join([markdown(header, lines), *(linearity(settings, list(group)) for settings, group in groups)])


def linearity(settings: str, rows: list[dict[str, str]]) -> str:
    """Return a sentence on the fit of a straight line through the depths; empty for fewer than three networks."""
    depths = [int(row["model"].rpartition("resnet")[2]) for row in rows]
    if len(set(depths)) < 3:
        return ""
    sentences = []
    for what in ("peak", "kept"):
        values = [float(row[f"{what}_bytes"]) for row in rows]
        slope, start = statistics.linear_regression(depths, values)
        off = max(abs(slope * depth + start - value) / value for depth, value in zip(depths, values, strict=True))
        sentences.append(
            f"{what} {start / 1e6:,.0f} MB + {slope / 1e6:.1f} MB per layer, at most {100 * off:.1f} % off"
        )
    return f"Straight lines through the depths, {settings}: {'; '.join(sentences)}.\n"


def checks_table(rows: list[dict[str, str]]) -> str:
    """Return a line for each framework and network."""
    header = ("", "settings", "network", "logits, training", "logits, evaluation", "gradients")
    return markdown(
        header,
        (
            (row["framework"], row["settings"], f"{row['model']}, width {row['width']}, {_shape(row)}",
             *(f"{float(row[name]):.1e}" for name in ("logits", "evaluated", "gradients")))
            for row in rows
        ),
    )  # fmt: skip


def spikes_table(rows: list[dict[str, str]]) -> str:
    """Return a line for each network: percent of its neuron-steps, overall and in the worst layer."""
    header = ("", "neuron-steps", "fire", "kernel", "worst layer", "one layer", "worst layer", "network", "worst layer")
    lines = []
    for name, group in itertools.groupby(rows, lambda row: f"{row['model']}, width {row['width']}, {_shape(row)}"):
        layers = list(group)
        steps = [int(row["neuron_steps"]) for row in layers]
        shares = {of: [float(row[of]) for row in layers] for of in MOVED[1:]}
        mean = {of: statistics.fmean(values, steps) for of, values in shares.items()}
        moved = (f"{100 * value:.4f} %" for of in MOVED[2:] for value in (mean[of], max(shares[of])))
        lines.append((name, f"{sum(steps):,}", f"{100 * mean['fire']:.1f} %", *moved))
    return markdown(header, lines)


def curves_apart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return for each epoch the mean distance of the backends at the same seed, and of two seeds on the reference."""
    of = {(row["backend"], int(row["seed"]), int(row["epoch"])): row for row in rows}
    seeds, epochs = (sorted({key[i] for key in of}) for i in (1, 2))
    same_seed = [(("cpu", seed), ("reference", seed)) for seed in seeds]
    two_seeds = [(("reference", a), ("reference", b)) for a, b in itertools.combinations(seeds, 2)]

    def apart(pairs: list, epoch: int, what: str) -> float:
        return statistics.fmean(abs(float(of[*a, epoch][what]) - float(of[*b, epoch][what])) for a, b in pairs)

    lines = [
        (
            str(epoch),
            *(f"{apart(pairs, epoch, 'train_loss'):.4f}" for pairs in (same_seed, two_seeds)),
            *(f"{100 * apart(pairs, epoch, 'validation_accuracy'):.2f}" for pairs in (same_seed, two_seeds)),
        )
        for epoch in epochs
    ]
    header = ("epoch", "loss: backends", "loss: seeds", "accuracy: backends", "accuracy: seeds")
    return markdown(header, lines)


def _times_line(row: dict[str, str]) -> Sequence[str]:
    batch = int(row["batch"])
    median, low, high = (1e3 * float(row[f"{name}_s"]) / batch for name in ("median", "fastest", "slowest"))
    first = f"{float(row['first_call_s']):,.0f} s" if "compiled" in row["settings"] and row["first_call_s"] else "–"
    peak = f"{float(row['peak_bytes']) / 1e6:,.0f} MB" if row["peak_bytes"] else "–"
    name = f"{row['what']}, {row['framework']}"
    numbers = (f"{median:.1f}", f"{low:.1f}–{high:.1f}", f"{1e3 / median:.1f}", f"{float(row['ratio']):.2f}")
    floor = f"{float(row['floor_ratio']):.3f}" if row.get("floor_ratio") else "–"
    return name, row["settings"], *numbers, floor, first, peak, row["n"]


def _sweep_line(row: dict[str, str], first: dict[str, str]) -> Sequence[str]:
    median, low, high = (1e6 * float(row[f"{name}_s"]) / _image_steps(row) for name in ("median", "fastest", "slowest"))
    ratio = float(row["ratio"]) * _image_steps(first) / _image_steps(row)
    name = f"{row['what']}, {row['framework']}"
    return name, row["settings"], f"{median:,.0f}", f"{low:,.0f}–{high:,.0f}", f"{ratio:.3f}", row["n"]


def _image_steps(row: dict[str, str]) -> int:
    return int(row["batch"]) * int(row["timesteps"])


def _memory_line(row: dict[str, str]) -> Sequence[str]:
    peak, kept, steps = (float(row[name]) for name in ("peak_bytes", "kept_bytes", "neuron_steps"))
    batch = int(row["batch"])
    name = f"{row['framework']}, {row['model']}"
    return (
        name,
        row["settings"],
        f"{peak / 1e6:,.0f}",
        f"{peak / 1e6 / batch:.1f}",
        f"{kept / 1e6:,.0f}",
        f"{kept / steps:.2f}",
    )


def _where(rows: list[dict[str, str]]) -> str:
    """Return machine, versions and shapes of the rows, each once."""
    of_machine = [f"{row['processor']}, {row['threads']} threads" for row in rows if row.get("processor")]
    kernels = [f"multifire's kernel: {row['kernel']}" for row in rows if row.get("kernel")]
    versions = [f"torch {row['torch']}" for row in rows]
    # The floor and the reference are part of multifire.
    named = [("multifire" if row["framework"] in ("floor", "reference") else row["framework"], row) for row in rows]
    versions += sorted({f"{name} {row['framework_version']}" for name, row in named})
    shapes = [f"{row['model']}, width {row['width']}, K = {row['levels']}, {_shape(row)}" for row in rows]
    parts = [_once(of_machine), _once(kernels), _once(versions), _once(shapes)]
    return ". ".join(filter(None, parts)) + "."


def _once(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _shape(row: dict[str, str]) -> str:
    sizes = (row[name] for name in ("timesteps", "batch", "channels", "size", "size"))
    return f"[T, N, C, H, W] = [{', '.join(sizes)}]"


INTRODUCTION = """# Benchmarks

`make bench` measures; the figures are in `benchmarks/results/` as CSV, and this page is generated from them.

Every framework runs in a process of its own, which keeps its network and does one training step or one evaluation
on request, so that the runs of all frameworks alternate, with nothing else running. A ratio is the median of the
ratios of neighbouring runs. Two runs of each are warm-up. Peak memory is that of a training step after the first
one (VmHWM), the median of three further processes, without the memory of the interpreter and the libraries. For
compiled networks neither memory nor evaluation is measured, since each would take minutes of compiling. A training
step is forward, cross entropy, backward and SGD with momentum.

The floor is the network's convolutions alone, channels-last, forward and backward, at every time step.

The figures are from before some memory savings were removed from the CPU kernel (gradients written over others, one
packed copy for two convolutions, one call for two passes). A training step of 16 images now takes 5 % more memory
in bf16 and 3 % more in fp32, at the same speed (medians of nine processes, AMD EPYC with AVX-512, torch 2.13).
"""

_CHECK = """The largest difference from the reference backend, in float64 and with ε → 0 (the frameworks add ε
inside the root, tdBN outside), divided by the largest value of the same tensor: logits in training and in
evaluation, and the worst of all parameters' gradients. The kernels do not compute in float64; `tests/ops` compares
them with the reference bit for bit."""

_SPIKES = """The fraction of neuron-steps with another number of spikes in bf16, in training, with untrained weights
and random input. *Kernel*: the kernel beside the reference, both with the same bf16 input; more than 0.01 % in a
layer would be an error. *One layer*: the layer in bf16 beside fp32 with the same input, so only its own convolution
rounds. *Network*: the whole network in bf16 beside fp32; later layers amplify every difference."""

_TIMES = """All frameworks train the same network with the same weights and the same batch. "Ours" is multifire in
fp32. × ours is the time divided by multifire's time. × floor is the time divided by the time of the convolutions
alone, in the same precision. Every process keeps freed memory for reuse, which only multifire's command line sets up by
itself. Processors without bf16 convolutions have no bf16 lines."""

_PEERS = f"""{_TIMES}

SpikingJelly is also shown with default malloc. A first call includes the compiler's work, if there is any."""

_MALLOC = """A step's live tensors take much less memory than the process: glibc's malloc (2.36 here) leaves holes
between tensors. For aligned memory it searches a hole 96 bytes larger than needed, so a freed tensor leaves no hole
for one of the same size. tcmalloc leaves fewer holes, at no cost in time: `LD_PRELOAD=libtcmalloc_minimal.so.4
multifire train ...` (Debian and Ubuntu: `apt install libtcmalloc-minimal4`). × ours is relative to the first line
here."""

_CURVES = """## Training curves

`python -m benchmarks.curves --seeds 0 1 2 --epochs 5 --limit 4000`: cifar10-small in fp32 on the CPU kernel and on
the reference, 4,000 training images of CIFAR-10 (JPEG) and 10,000 others held out.

![train loss and validation accuracy by epoch, solid for the kernel and dotted for the reference](images/curves.png)

Mean distance between the backends at the same seed, and between two seeds on the reference: train loss, and
validation accuracy in points (of 10,000 images: each has a standard error of 0.5).
"""

SECTIONS = {
    "check": ("Equality of the frameworks", _CHECK, checks_table),
    "check-compiled": (
        "Equality of the compiled frameworks",
        "As above, on a network that compiles in minutes.",
        checks_table,
    ),
    "spikes": ("Spikes in bf16", _SPIKES, spikes_table),
    "spikingjelly": (
        "SpikingJelly's settings",
        "The tables below use the fastest of these settings. × ours is relative to the first line here. A first call "
        "includes the compiler's work, except for parts that it had compiled for a line above.",
        times_table,
    ),
    "cifar10": ("The CIFAR-10 network", _PEERS, times_table),
    "dvs-gesture": ("The DVS-Gesture network", _TIMES, times_table),
    "cifar10-dvs": ("The CIFAR10-DVS network", _TIMES, times_table),
    "timesteps": ("Time steps", "A training step for T from 4 to 64, per image and time step.", sweep_table),
    "levels": ("Levels", "A training step for K = 1, 2 and 3.", sweep_table),
    "depth": (
        "Depth",
        "Memory of a training step, and memory that autograd keeps from forward to backward, by depth.",
        memory_table,
    ),
    "malloc": ("glibc's malloc and tcmalloc", _MALLOC, times_table),
}
