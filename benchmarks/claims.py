"""`python -m benchmarks.claims`: train plain and DS networks of many depths on the embedded digits, and measure the
paper's claims: accuracy, dormant units and gradients of the first layers.

Each run appends its row to claims.csv and its first steps to claims-steps.csv, so a stopped benchmark continues where
it was. `benchmarks/claims_page.py` makes the tables, the figures and the verdicts. `--recipe fashion-mnist --limit
10000` does the same on 10,000 of its images, in claims-fashion-mnist.csv.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import multifire as mf
from benchmarks.tables import append, read_csv
from multifire.analysis import measure_activity
from multifire.analysis.gradients import mean_cross_entropy
from multifire.analysis.probe import preserve_state
from multifire.config import RunConfig
from multifire.nn import ConvFire, SpikingNetwork, TdBatchNorm2d, model_from_config
from multifire.training.data import load_batches
from multifire.utils.device import autocast, processor

RESULTS = Path(__file__).parent / "results"
EPOCHS, MIDDLE = 8, 4
FIRST_LAYERS = 3
STEPS, EVERY = 200, 10
SAMPLES = 256

Batch = tuple[Tensor, Tensor]
"""x [T, N, C, H, W] and the labels y [N]."""


@dataclass(frozen=True)
class Setting:
    """One training run."""

    block: str
    depth: int
    levels: int
    seed: int
    norm: str = "tdbn"
    """tdbn, or batchnorm: the same without the factor V_th."""
    surrogate_width: float = 1.0

    @property
    def cells(self) -> tuple[str, ...]:
        """The setting as it stands in a CSV file."""
        return tuple(f"{value:.6g}" if isinstance(value, float) else str(value) for value in asdict(self).values())

    @property
    def name(self) -> str:
        return "_".join(self.cells)


SETTING = tuple(field.name for field in fields(Setting))
MEASURED = ("dormant", "dormant_first", "zero_gradient_first", "gradient_first", "gradient_last")
MOMENTS = ("start", "middle", "end")
ROW = (
    *SETTING, "accuracy", "best_accuracy", "train_loss",
    *(f"{name}_{moment}" for moment in MOMENTS for name in MEASURED),
    "seconds", "processor", "torch",
)  # fmt: skip
STEP_ROW = (*SETTING, "step", "gradient_first", "gradient_last")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--recipe", default="digits", help="recipe of the data and the training (default: digits)")
    parser.add_argument("--root", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs of a run (default: {EPOCHS})")
    parser.add_argument("--limit", type=int, help="train on this many images only, and test on as many")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 20, 44, 68])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    stem = "claims" if args.recipe == "digits" else f"claims-{args.recipe}"
    finished = {tuple(row[name] for name in SETTING) for row in read_csv(args.out / f"{stem}.csv")}
    waiting = [each for each in settings(args.depths, args.seeds) if each.cells not in finished]
    for number, setting in enumerate(waiting, 1):
        if time.monotonic() >= deadline:
            print(f"the time is over; {len(waiting) - number + 1} runs are left")
            return
        row, steps = run(setting, configuration(setting, args))
        append(args.out / f"{stem}-steps.csv", STEP_ROW, steps)
        append(args.out / f"{stem}.csv", ROW, [row])
        print(f"{number}/{len(waiting)} {setting.name}: {row['accuracy']:.4f} in {row['seconds']:.0f} s", flush=True)


def settings(depths: Sequence[int], seeds: Sequence[int]) -> list[Setting]:
    """Return all runs, by importance: seed by seed the paper's comparison, then the other norm and surrogate."""
    blocks = ("plain", "ds")
    main_runs = [Setting(b, d, k, s) for s, d, b, k in itertools.product(seeds, depths, blocks, (1, 2, 3))]
    deep = depths[-2:]
    variants = (("batchnorm", 1.0), ("tdbn", 0.5))
    others = [Setting(b, d, k, s, *v) for s, v, d, b, k in itertools.product(seeds, variants, deep, blocks, (1, 3))]
    return main_runs + others


def configuration(setting: Setting, args: argparse.Namespace) -> RunConfig:
    """Return the recipe with the values of the setting."""
    return mf.recipe(
        args.recipe,
        **{
            "model.name": f"{setting.block}_resnet{setting.depth}",
            "model.width": 8,
            "model.levels": setting.levels,
            "model.surrogate_width": setting.surrogate_width,
            "model.thresholds": tuple(0.6 + level for level in range(setting.levels)),
            "optim.epochs": args.epochs,
            "precision": "bf16",
            "seed": setting.seed,
            "data.limit": args.limit,
            "data.root": args.root,
            "eval_batch_size": SAMPLES,
        },
    )


def run(setting: Setting, cfg: RunConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train and measure one network; return its row and the rows of its first steps."""
    start = time.monotonic()
    torch.manual_seed(setting.seed)
    network = build(cfg, setting.norm)
    batch = test_batch(cfg)
    row: dict[str, Any] = {**asdict(setting), **measure(network, batch, "start")}
    gradients = GradientRecorder(network)

    def on_epoch(figures: dict[str, Any]) -> None:
        if figures["epoch"] + 1 == min(MIDDLE, cfg.optim.epochs):
            row.update(measure(network, batch, "middle"))

    with tempfile.TemporaryDirectory() as folder:
        trained = mf.train(
            cfg, Path(folder) / "run", network=network, on_epoch=on_epoch, optimizer=gradients.optimizer,
            analyze_every=0, track=(), keep=1,
        )  # fmt: skip
        figures = trained.metrics
    row |= measure(network, batch, "end")
    row |= {
        "accuracy": figures[-1]["test_accuracy"],
        "best_accuracy": max(each["test_accuracy"] for each in figures),
        "train_loss": figures[-1]["train_loss"],
        "seconds": time.monotonic() - start,
        "processor": processor(),
        "torch": torch.__version__,
    }
    return row, [{**asdict(setting), **each} for each in gradients.rows]


def build(cfg: RunConfig, norm: str) -> SpikingNetwork:
    """Return the network of the configuration, with tdBN or ordinary batch norm."""
    network = model_from_config(cfg.model)
    if norm == "batchnorm":
        for module in network.modules():
            if isinstance(module, TdBatchNorm2d):
                module.alpha = 1 / module.v_threshold
    return network


def test_batch(cfg: RunConfig) -> Batch:
    """Return the first SAMPLES test images as the network sees them."""
    x_TNCHW, y = next(iter(load_batches(cfg, torch.device("cpu")).test.epoch(0)))
    return x_TNCHW[:, :SAMPLES], y[:SAMPLES]


def measure(network: SpikingNetwork, batch: Batch, moment: str) -> dict[str, float]:
    """Measure dormant units and gradients in training mode, where norms use the statistics of the batch."""
    with preserve_state(network, training=True):
        layers = measure_activity(network, [batch], precision="bf16", every=1000)
    first = layers.layers[:FIRST_LAYERS]
    figures = {
        "dormant": layers.dormant,
        "dormant_first": sum(layer.dormant for layer in first) / len(first),
        **current_gradients(network, batch),
    }
    return {f"{name}_{moment}": value for name, value in figures.items()}


def current_gradients(network: SpikingNetwork, batch: Batch) -> dict[str, float]:
    """Measure ∂L/∂x, the gradient of the current x [T, N, C, H, W] of a layer's neurons, for the loss of the batch.

    Returns:
        zero_gradient_first: share of the neurons of the first layers whose ∂L/∂x is 0 at every time step.
        gradient_first, gradient_last: mean ‖∂L/∂x‖ of the first and of the last layers.
    """
    x_TNCHW, y = batch
    layers = layers_of(network)
    with preserve_state(network, training=True), contextlib.ExitStack() as stack:
        currents = [stack.enter_context(current_of(layer)) for layer in ends(layers)]
        with autocast(x_TNCHW.device, "bf16"):
            logits_TNL = network(x_TNCHW, per_step=True)
        grads = torch.autograd.grad(mean_cross_entropy(logits_TNL, y) / len(y), [each[0] for each in currents])
    first, last = grads[:FIRST_LAYERS], grads[-FIRST_LAYERS:]
    silent = [(grad == 0).all(0).float().mean().item() for grad in first]
    return {
        "zero_gradient_first": statistics.mean(silent),
        "gradient_first": statistics.mean(grad.norm().item() for grad in first),
        "gradient_last": statistics.mean(grad.norm().item() for grad in last),
    }


@contextlib.contextmanager
def current_of(layer: ConvFire) -> Iterator[list[Tensor]]:
    """Add zeros to the current of the layer's neurons: the gradient of the zeros is the gradient of the current.

    Yields a list that holds the zeros after the forward pass.
    """
    zeros: list[Tensor] = []

    def add_zeros(layer: ConvFire, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        shape = layer.conv(inputs[0][:, :1].flatten(0, 1)).shape
        x_TNCHW = inputs[0]
        zeros.append(x_TNCHW.new_zeros(*x_TNCHW.shape[:2], *shape[1:]).requires_grad_())
        before = kwargs.get("add_before")
        return inputs, {**kwargs, "add_before": zeros[0] if before is None else before + zeros[0]}

    handle = layer.register_forward_pre_hook(add_zeros, with_kwargs=True)
    try:
        yield zeros
    finally:
        handle.remove()


def layers_of(network: nn.Module) -> list[ConvFire]:
    """Return the layers of neurons of the main path in order; shortcuts are not part of it."""
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, ConvFire) and not name.endswith("shortcut")
    ]


def ends(layers: Sequence[ConvFire]) -> list[ConvFire]:
    """Return the first and the last FIRST_LAYERS layers."""
    return [*layers[:FIRST_LAYERS], *layers[-FIRST_LAYERS:]]


class GradientRecorder:
    """Records the norm of the weights' gradient in the first and in the last layers, in the first STEPS steps."""

    def __init__(self, network: SpikingNetwork):
        self._weights = [layer.conv.weight for layer in ends(layers_of(network))]
        self._step = 0
        self.rows: list[dict[str, Any]] = []

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of the recipe, which records before it steps."""
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
        optimizer.register_step_pre_hook(lambda *_: self._record())
        return optimizer

    def _record(self) -> None:
        if self._step % EVERY == 0 and self._step <= STEPS:
            norms = [weight.grad.norm().item() for weight in self._weights if weight.grad is not None]
            first, last = norms[:FIRST_LAYERS], norms[-FIRST_LAYERS:]
            means = {"gradient_first": statistics.mean(first), "gradient_last": statistics.mean(last)}
            self.rows.append({"step": self._step, **means})
        self._step += 1


if __name__ == "__main__":
    main()
