"""Compare twelve training steps and an evaluation of five configurations with a stored record.

A refactoring must not change a number. On the processor and torch version that the record names, every figure must be
equal to the last bit. Other processors add in another order: there, float64 must agree to 1e-9 (1e-6 for the
evaluation, which rounds the logits to float32). `python -m tests.training.test_golden_record` writes the record.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from multifire import datasets
from multifire.analysis.evaluate import evaluate
from multifire.config import RunConfig, get_recipe
from multifire.datasets.loader import make_batches
from multifire.events import frames_of_windows
from multifire.events.simulate import SaccadeOptions, simulate_events
from multifire.nn import model_from_config
from multifire.training.average import MovingAverage
from multifire.training.optim import learning_rate, make_optimizer
from multifire.training.step import train_step

RECORD = Path(__file__).parents[1] / "golden" / "training_record.json"
STEPS, BATCH, SCORED = 12, 16, 100
DIGITS = get_recipe("digits")
CASES: dict[str, RunConfig] = {
    "digits": DIGITS,
    "digits-dvs": get_recipe("digits-dvs"),
    "plain_resnet8": replace(DIGITS, model=replace(DIGITS.model, name="plain_resnet8", width=8)),
    "tet with ema": replace(
        DIGITS,
        model=replace(DIGITS.model, width=8, norm_input=True),
        optim=replace(DIGITS.optim, loss="tet", ema_decay=0.8, decay_norms=False),
    ),
    "accumulation": replace(
        DIGITS,
        model=replace(DIGITS.model, width=8, levels=2),
        optim=replace(DIGITS.optim, accumulate=3, clip_norm=1.0, schedule="cosine"),
    ),
}
DTYPES = {"cpu": torch.float32, "reference": torch.float64}


def record(name: str, backend: str) -> dict[str, list[float]]:
    """Return loss and accuracy of each step, and last those of the evaluation of the trained network."""
    cfg, dtype = CASES[name], DTYPES[backend]
    torch.manual_seed(0)
    model = model_from_config(cfg.model, backend).to(dtype)
    optimizer = make_optimizer(model, cfg.optim)
    average = None
    if cfg.optim.ema_decay is not None:
        average = MovingAverage(model, cfg.optim.ema_decay)
    train, test = batches_of(cfg)
    figures: dict[str, list[float]] = {"loss": [], "accuracy": []}
    for step, (x_TNCHW, y) in enumerate(train):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, step, STEPS)
        loss_sum, correct, count = train_step(model, optimizer, to_dtype(x_TNCHW, dtype), y, cfg).totals.tolist()
        if average:
            average.update()
        figures["loss"].append(loss_sum / count)
        figures["accuracy"].append(correct / count)
    scored = evaluate(average.module if average else model, [(to_dtype(x, dtype), y) for x, y in test])
    figures["loss"].append(scored.loss)
    figures["accuracy"].append(scored.accuracy)
    return figures


def batches_of(cfg: RunConfig) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Return training and test batches of the embedded digits or, for events, of their simulated recordings."""
    digits = datasets.load("digits")
    train, test = datasets.take(digits.train, STEPS * BATCH, 0), datasets.take(digits.test, SCORED, 0)
    info, device = datasets.get_info(cfg.data.name), torch.device("cpu")
    if info.events:
        train, test = as_events(train, cfg), as_events(test, cfg)
    loader = make_batches(train, info, cfg.data, batch_size=BATCH, device=device, shuffle=True, seed=0)
    scoring = make_batches(test, info, cfg.data, batch_size=SCORED, device=device, shuffle=False)
    return list(loader.epoch(0)), list(scoring.epoch(0))


def as_events(split: datasets.Split, cfg: RunConfig) -> datasets.EventSplit:
    """Return the frames of simulated recordings of the images."""
    from multifire.datasets.cache import frame_options
    from multifire.events import Recording
    from multifire.events.recording import pack

    size, frames = SaccadeOptions().sensor_size, []
    for number, events in enumerate(simulate_events(split.images[:, 0], None, 0, 0)):
        t, x, y, p = (events[field].astype(np.int64) for field in ("t", "x", "y", "p"))

        def open_recording(number=number, t=t, x=x, y=y, p=p) -> Recording:
            return Recording(str(number), "simulated", size, iter((pack(str(number), size, 0, t, x, y, p),)))

        frames.append(frames_of_windows(open_recording, [(None, None)], frame_options(cfg.data))[0].counts)
    rows = np.arange(len(split), dtype=np.int64)
    return datasets.EventSplit(np.stack(frames), split.labels, rows.astype(str), rows)


def to_dtype(x_TNCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in another type; a static image stays one expanded time step."""
    if x_TNCHW.stride(0) == 0:
        return x_TNCHW[:1].to(dtype).expand(x_TNCHW.shape)
    return x_TNCHW.to(dtype)


def machine() -> dict[str, str]:
    """Return what determines the order in which sums are added."""
    from multifire.ops import cpu
    from multifire.utils.device import processor

    return {
        "processor": processor(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": cpu.isa(),
    }


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_training_reproduces_the_record(name, backend, one_thread):
    stored = json.loads(RECORD.read_text())
    same_machine = stored["machine"] == machine()
    if backend == "cpu" and not same_machine:
        pytest.skip(
            f"fp32 is recorded on {stored['machine']}; another processor rounds differently, so that spikes flip"
        )
    figures = record(name, backend)
    for figure, expected in stored[backend][name].items():
        if same_machine:
            assert figures[figure] == expected
        else:
            assert figures[figure][:STEPS] == pytest.approx(expected[:STEPS], rel=1e-9)
            assert figures[figure][STEPS:] == pytest.approx(expected[STEPS:], rel=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    written = {"machine": machine()} | {b: {name: record(name, b) for name in CASES} for b in DTYPES}
    RECORD.write_text(json.dumps(written, indent=1) + "\n")
