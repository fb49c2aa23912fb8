"""Generate docs/gpu.md from the CSV files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

from benchmarks.gpu_parts.setting import MACHINE
from benchmarks.tables import markdown, read_csv

WIDTH = 120
Rows = Sequence[dict[str, str]]

INTRODUCTION = """# On a GPU

`python benchmarks/gpu.py --minutes 10` measures; the figures are in `benchmarks/results/gpu-*.csv`, and
`python benchmarks/gpu.py --page docs/gpu.md` writes this page from them. The head of `benchmarks/gpu.py` says what is
measured, and how to carry other frameworks to a machine without a network.

A step is that of `multifire train`: forward, loss, backward, optimiser and the figures that the log shows, on a batch
that lies on the device. Captured: replayed as a CUDA graph. The convolutions alone are captured too; no
implementation of neurons and norms can make the network faster. Runs alternate; a run is several calls in a row,
timed by CUDA events. A ratio is the median of the ratios of neighbouring runs.
"""

BASELINE = """## Earlier figures

With earlier kernels, on one NVIDIA H100 (torch 2.11, Triton 3.6): forward and backward of 128 images of the
CIFAR-10 network in bf16, medians of 12 runs:

| | ms |
| :-- | --: |
| convolutions alone | 4.7 |
| network, CUDA graphs by torch.compile | 13.2 |
| network, eager, as `multifire train` ran it | 40.0 |
"""

NOTHING = """No figures have been measured with these kernels and with the captured step yet: no GPU was at hand.
What can be checked without one is: the values of the kernels in Triton's interpreter (`tests/ops`), their registers,
spills and memory accesses as compiled for GPUs (`tests/ops/gpu_code.py`), and the captured step as an ordinary function
(`tests/training/test_captured.py`).
"""


def page(folder: Path) -> str:
    """Return docs/gpu.md, made from the CSV files in the folder."""
    sections = []
    for part, (title, text, table) in SECTIONS.items():
        rows = read_csv(folder / f"gpu-{part}.csv")
        if whole := [row for row in rows if not row["error"]]:
            paragraphs = [fill(paragraph, WIDTH) for paragraph in (text, _where(whole))]
            sections.append("\n\n".join([f"## {title}", *paragraphs, table(whole)]))
        if errors := [f"- {row['error']}\n" for row in rows if row["error"]]:
            sections.append(f"Not measured ({part}):\n\n{''.join(dict.fromkeys(errors))}")
    return "\n".join([INTRODUCTION, *(sections or [NOTHING]), BASELINE])


def _where(rows: Rows) -> str:
    """Return card and versions of the rows, each once."""
    names = {"driver": "driver ", "torch": "torch ", "cuda": "CUDA ", "cudnn": "cuDNN ", "triton": "Triton ",
             "multifire": "multifire "}  # fmt: skip
    found = dict.fromkeys(
        ", ".join(names.get(column, "") + row[column] for column in MACHINE if row[column]) for row in rows
    )
    return "; ".join(found) + "."


def _network(row: dict[str, str]) -> str:
    shape = ", ".join(row[name] for name in ("timesteps", "batch", "channels", "size", "size"))
    return f"{row['recipe']} ({row['model']}, width {row['width']}), {row['precision']}, [{shape}]"


def _ms(row: dict[str, str]) -> tuple[str, str]:
    median, low, high = (1e3 * float(row[f"{name}_s"]) for name in ("median", "fastest", "slowest"))
    return f"{median:.2f}", f"{low:.2f}–{high:.2f}"


def _number(text: str, form: str, factor: float = 1.0) -> str:
    return form.format(factor * float(text)) if text else "–"


def check_table(rows: Rows) -> str:
    """Return a line for each comparison; the losses of single steps are in the file."""
    lines = [
        (row["kind"], row["name"], row["value"] or "–", row["limit"] or "–", row["outcome"] or "–")
        for row in rows
        if row["kind"] != "loss"
    ]
    return markdown(("", "", "difference", "limit", "outcome"), lines)


def steps_table(rows: Rows) -> str:
    """Return a line for each way to compute a network."""
    lines = [
        (_network(row), f"{row['what']}, {row['how']}", *_ms(row), _number(row["ratio"], "{:.2f}"),
         _number(row["images_per_s"], "{:,.0f}"), _number(row["bytes_per_s"], "{:.2f}", 1e-12), row["n"])
        for row in rows
    ]  # fmt: skip
    return markdown(("[T, N, C, H, W]", "", "ms", "range", "× convolutions", "samples/s", "TB/s", "n"), lines)


def kernels_table(rows: Rows) -> str:
    """Return a line for each kernel that takes at least a hundredth of a step, and for those of the neurons."""
    lines = [
        (_network(row), f"`{row['kernel'][:60]}`", f"{float(row['launches']):.0f}",
         _number(row["seconds"], "{:.3f}", 1e3), _number(row["share"], "{:.1f} %", 100),
         _number(row["bytes_per_s"], "{:.2f}", 1e-12), _number(row["share_of_copy"], "{:.0f} %", 100))
        for row in rows
        if row["bytes"] or float(row["share"]) >= 0.01
    ]  # fmt: skip
    return markdown(("[T, N, C, H, W]", "kernel", "launches", "ms", "of the step", "TB/s", "of a copy's"), lines)


def epoch_table(rows: Rows) -> str:
    """Return a line for each phase of an epoch, and for a step."""
    lines = [
        (_network(row), row["data"], row["epoch"] or "–", row["what"], _number(row["seconds"], "{:.4f}"),
         _number(row["samples_per_s"], "{:,.0f}"), _number(row["accuracy"], "{:.1f} %", 100))
        for row in rows
    ]  # fmt: skip
    return markdown(("[T, N, C, H, W]", "data", "epoch", "", "s", "samples/s", "test accuracy"), lines)


def memory_table(rows: Rows) -> str:
    """Return a line for each combination."""
    lines = [
        (_network(row), f"{row['how']}, spikes {row['spikes']}", _number(row["peak_bytes"], "{:,.0f}", 1e-6),
         _number(row["peak_bytes_per_image"], "{:.1f}", 1e-6), _number(row["kept_bytes"], "{:,.0f}", 1e-6),
         _number(row["reserved_bytes"], "{:,.0f}", 1e-6))
        for row in rows
    ]  # fmt: skip
    return markdown(("[T, N, C, H, W]", "", "peak MB", "MB/sample", "kept for backward MB", "reserved MB"), lines)


def peers_table(rows: Rows) -> str:
    """Return a line for each peer, and one for multifire measured in turns with that peer."""
    lines = [
        (f"{row['framework']} {row['framework_version']}".strip(), f"{row['settings']}, {row['surrogate']}",
         row["implementation"] or "–", *_ms(row), _number(row["ratio"], "{:.2f}"),
         _number(row["images_per_s"], "{:,.0f}"), _number(row["peak_bytes"], "{:,.0f}", 1e-6))
        for row in rows
    ]  # fmt: skip
    head = ("", "settings", "neurons", "ms", "range", "× multifire", "images/s", "peak MB")
    return f"{_network(rows[0])}.\n\n{markdown(head, lines)}"


def tune_table(rows: Rows) -> str:
    """Return a line for each kernel and choice: its time in a step, by recipe."""
    sums: dict[tuple[str, ...], float] = {}
    for row in rows:
        key = (row["recipe"], row["kernel"], row["tile"], row["warps"], row["registers"] or "–")
        sums[key] = sums.get(key, 0.0) + int(row["layers"]) * float(row["seconds"])
    lines = [
        (*key, f"{1e3 * seconds:.3f}") for key, seconds in sorted(sums.items(), key=lambda pair: (pair[0][:2], pair[1]))
    ]
    return markdown(("recipe", "kernel", "tile", "warps", "registers", "ms in a step"), lines)


SECTIONS: dict[str, tuple[str, str, Callable[[Rows], str]]] = {
    "check": (
        "Equality",
        "The op beside its reference on inputs whose sums are exact: outputs must be equal, gradients within the "
        "limit. Losses of captured and of eager steps from one seed; the limit is the difference of two eager runs.",
        check_table,
    ),
    "steps": (
        "Steps and evaluations",
        "The copy moves the bytes that the neurons must read and write in all: 9 times each value in a step, twice in "
        "an evaluation (design, section 8). In fp32, convolutions use TF32, as torch does by default.",
        steps_table,
    ),
    "kernels": (
        "Kernels",
        "Time of each kernel in a captured step. Bandwidth counts the bytes that a kernel must move once, beside "
        "that of a large copy in the same process.",
        kernels_table,
    ),
    "epoch": (
        "Epochs",
        "The loop of `multifire train`. The first epoch includes the compilation of the kernels and the capture. The "
        "host's time between two replays is that of the loop without its steps.",
        epoch_table,
    ),
    "memory": (
        "Memory",
        "Peak of a training step with weights and optimiser, without the batch; reserved is what torch took from the "
        "device, with what it keeps from the steps before the capture.",
        memory_table,
    ),
    "peers": (
        "Other frameworks",
        "The same network, batch, weights, loss and optimiser; each in turns with multifire's captured step. "
        "SpikingJelly has Triton neurons for the surrogate atan, and computes rect in torch operators; multifire "
        "computes the same surrogate in the line above. Captured: by SpikingJelly's `StaticCudaGraph`, "
        "others by multifire's.",
        peers_table,
    ),
    "tune": ("Choices of tile, warps and registers", "Time of all launches of a kernel in a step.", tune_table),
}  # fmt: skip
