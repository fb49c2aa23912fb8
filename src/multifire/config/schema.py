"""The configuration of a run: frozen dataclasses of plain values. Imports neither torch nor NumPy."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from multifire.config.architecture import parse_model_name


@dataclass(frozen=True)
class DataConfig:
    name: str = "digits"
    """Data set; `multifire data list` shows which there are."""
    root: str = "data"
    """Folder that holds the data sets, each in a folder of its own name."""
    timesteps: int = 4
    """T: how many times an image is shown to the network, or into how many frames a recording is cut."""
    validation: float = 0.0
    """Share of the training set held out to choose the best checkpoint, 0 <= share < 1."""
    crop_padding: int = 0
    """Random crop after padding with this many black pixels on every side; 0 turns it off."""
    flip: bool = False
    """Random horizontal flip; a label follows where the mirror image is of another class (a left hand's wave)."""
    limit: int | None = None
    """Use only the first so many training images of the (seeded) order; for trying things out."""
    frame_size: int = 32
    """Events: height and width of a frame, to which the sensor's pixels are binned."""
    bin_factor: float | None = None
    """Events: pixels to a cell of a frame, which need not be whole; by default the sensor's size over the frame's."""
    slicing: Literal["duration", "time", "count"] = "duration"
    """Events: frames of duration_us from the first event on, of equal time, or of equally many events."""
    duration_us: int = 30_000
    """Events: length of a frame in µs, where slicing is by duration."""
    binary: bool = False
    """Events: whether a cell of a frame saw an event, 0 or 1, in place of how many."""
    split_seed: int | None = None
    """CIFAR10-DVS: draw each class's training recordings by this seed; by default they are its first 900."""
    roll: int = 0
    """Events: shift by up to so many pixels in both directions; what leaves on one side comes in on the other."""
    rotation: float = 0.0
    """Events: turn by up to so many degrees, either way."""
    cutout: int = 0
    """Events: blank a square with sides of up to so many pixels, in every frame of a sample."""
    swap_polarity: float = 0.0
    """Events: share of the samples whose ON and OFF events are exchanged."""
    time_jitter: int = 0
    """Events: move a sample by up to so many frames in time, either way; empty frames follow."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "ds_resnet20"
    """ds_resnet{6n+2} or plain_resnet{6n+2}."""
    in_channels: int = 3
    """Channels of one frame."""
    num_classes: int = 10
    """Size of the voting layer."""
    width: int = 64
    """Channels of the first stage; the next two have twice and four times as many."""
    levels: int = 3
    """K: firing levels of a neuron. K = 1 is the ordinary LIF neuron."""
    thresholds: tuple[float, ...] | None = None
    """Firing threshold of each level; by default 0.6, 1.6, 2.6, ... for the given levels."""
    decay: float = 0.25
    """Membrane decay per time step."""
    surrogate: Literal["rect", "triangle", "atan"] = "rect"
    """Shape of the surrogate derivative."""
    surrogate_width: float = 1.0
    """Width a of the surrogate derivative."""
    detach_reset: bool = False
    """Stop the gradient at the reset gate (the paper lets it through)."""
    norm_input: bool = False
    """Normalise the input by an affine-less tdBN, as the paper's Gesture network does."""
    checkpoint_stages: bool = False
    """Keep only the inputs of the stages in training and compute the rest once more: a third more time, less memory."""


@dataclass(frozen=True)
class OptimConfig:
    epochs: int = 110
    """Passes over the training set."""
    batch_size: int = 64
    """Images in one training step."""
    lr: float = 0.1
    """Learning rate at its highest."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """L2 decay, on every parameter as in the paper."""
    schedule: Literal["step", "cosine", "one-cycle"] = "step"
    """step: lr × gamma every step_epochs; cosine: down to 0; one-cycle: up for warmup_share, then down by a cosine."""
    step_epochs: int = 40
    """Epochs between two drops of the step schedule."""
    gamma: float = 0.1
    """Factor of one drop of the step schedule."""
    warmup_share: float = 0.25
    """Share of the one-cycle schedule spent rising, 0 < share < 1."""
    loss: Literal["mean", "tet"] = "mean"
    """mean: cross entropy of the time-averaged logits; tet: mean cross entropy of each time step's logits."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy, 0 <= s < 1."""
    clip_norm: float | None = None
    """Clip the gradient to this total norm."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate of the step and cosine schedules first rises from 0."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other; their gradients add up. Norms see a part at a time."""
    decay_norms: bool = True
    """Decay the norms' weights and all biases too, as the paper does."""
    ema_decay: float | None = None
    """Keep a moving average of the weights, w' = d·w' + (1 - d)·w after each step, and score that; None for none."""
    patience: int | None = None
    """Stop after so many epochs without a better validation accuracy; needs data.validation."""
    skip_nonfinite: int = 0
    """Leave out up to so many steps of a run whose gradient is NaN or infinite; the next one stops it."""
    scaling: Literal["none", "linear"] = "none"
    """Many processes share a batch (none), or each takes batch_size and lr grows with their number (linear)."""


@dataclass(frozen=True)
class RunConfig:
    recipe: str = "digits"
    """Name of the recipe that the run started from."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    """Decides the initial weights, the order of the data and its augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs convolutions under autocast; membranes and norms stay in fp32."""
    backend: str = "auto"
    """Which implementation of the neuron runs; see multifire.ops.BACKENDS."""
    sync_norm: bool = False
    """Norms take the statistics of all processes' samples, so that many processes compute what one does."""
    eval_batch_size: int = 128
    """Images in one evaluation step."""

    def __post_init__(self):
        """Refuse what no run could mean.

        Raises:
            ValueError: naming the field, its value and the range it must lie in.
        """
        data, model, optim = self.data, self.model, self.optim
        for part, values in {"data": data, "model": model, "optim": optim}.items():
            for name, value in vars(values).items():
                if isinstance(value, float):
                    _require(math.isfinite(value), f"{part}.{name}", value, "a finite number")
        _require(data.timesteps >= 1, "data.timesteps", data.timesteps, "at least 1")
        _require(0 <= data.validation < 1, "data.validation", data.validation, "0 <= share < 1")
        _require(data.crop_padding >= 0, "data.crop_padding", data.crop_padding, "at least 0")
        _require(data.limit is None or data.limit >= 1, "data.limit", data.limit, "at least 1")
        _require(data.frame_size >= 1, "data.frame_size", data.frame_size, "at least 1")
        _require(data.bin_factor is None or data.bin_factor > 0, "data.bin_factor", data.bin_factor, "above 0")
        _require(data.duration_us >= 1, "data.duration_us", data.duration_us, "at least 1")
        _require(data.split_seed is None or data.split_seed >= 0, "data.split_seed", data.split_seed, "at least 0")
        for name in ("roll", "rotation", "cutout", "time_jitter"):
            _require(getattr(data, name) >= 0, f"data.{name}", getattr(data, name), "at least 0")
        _require(data.rotation <= 180, "data.rotation", data.rotation, "at most 180 degrees")
        _require(0 <= data.swap_polarity <= 1, "data.swap_polarity", data.swap_polarity, "0 <= share <= 1")
        parse_model_name(model.name)
        _require(model.levels >= 1, "model.levels", model.levels, "at least 1")
        _require(model.width >= 1, "model.width", model.width, "at least 1")
        _require(model.surrogate_width > 0, "model.surrogate_width", model.surrogate_width, "above 0")
        fits = model.thresholds is None or len(model.thresholds) == model.levels
        _require(fits, "model.thresholds", model.thresholds, f"one for each of the {model.levels} levels")
        _require(optim.epochs >= 1, "optim.epochs", optim.epochs, "at least 1")
        _require(optim.batch_size >= 1, "optim.batch_size", optim.batch_size, "at least 1")
        _require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
        _require(optim.momentum >= 0, "optim.momentum", optim.momentum, "at least 0")
        _require(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, "at least 0")
        _require(optim.step_epochs >= 1, "optim.step_epochs", optim.step_epochs, "at least 1")
        _require(0 < optim.warmup_share < 1, "optim.warmup_share", optim.warmup_share, "0 < share < 1")
        _require(0 <= optim.label_smoothing < 1, "optim.label_smoothing", optim.label_smoothing, "0 <= s < 1")
        _require(optim.clip_norm is None or optim.clip_norm > 0, "optim.clip_norm", optim.clip_norm, "above 0")
        _require(optim.warmup_epochs >= 0, "optim.warmup_epochs", optim.warmup_epochs, "at least 0")
        _require(optim.accumulate >= 1, "optim.accumulate", optim.accumulate, "at least 1")
        ema = optim.ema_decay
        _require(ema is None or 0 <= ema < 1, "optim.ema_decay", ema, "0 <= decay < 1")
        _require(optim.patience is None or optim.patience >= 1, "optim.patience", optim.patience, "at least 1")
        held_out = optim.patience is None or data.validation > 0
        _require(held_out, "optim.patience", optim.patience, "data.validation above 0: the test set must not decide")
        _require(optim.skip_nonfinite >= 0, "optim.skip_nonfinite", optim.skip_nonfinite, "at least 0")
        _require(self.eval_batch_size >= 1, "eval_batch_size", self.eval_batch_size, "at least 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 <= seed < 2**63")


@dataclass(frozen=True)
class TrainOptions:
    """How a run is carried out: nothing here changes what it computes, so all of it may change when it is resumed."""

    resume: Literal["no", "yes", "auto"] = "no"
    """Go on with the run in the folder; auto: if there is one."""
    checkpoint_every: str = "10m"
    """Besides each epoch's, write a checkpoint every so many steps (500), seconds (90s), minutes (10m), hours (1h)."""
    keep: int = 3
    """How many of the newest checkpoints to keep."""
    max_time: str | None = None
    """Write a checkpoint and stop after that time, such as 90s, 30m or 4h; --resume goes on."""
    track: tuple[str, ...] | None = None
    """Trackers of the figures: tensorboard, mlflow, wandb; by default TensorBoard, where it is installed."""
    analyze_every: int = 1
    """Look into the network every so many epochs, and at the end (analysis.jsonl, analysis.json); 0: never."""

    def __post_init__(self):
        """Refuse what no run could mean.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        _require(self.keep >= 1, "keep", self.keep, "at least 1")
        _require(self.analyze_every >= 0, "analyze_every", self.analyze_every, "at least 0")
        if self.checkpoint_every.isdecimal():
            _require(int(self.checkpoint_every) >= 1, "checkpoint_every", self.checkpoint_every, "at least 1 step")
        else:
            parse_duration(self.checkpoint_every, "checkpoint_every")
        if self.max_time is not None:
            parse_duration(self.max_time, "max_time")


def parse_duration(text: str, name: str) -> float:
    """Return a time such as 90s, 30m or 4h in seconds.

    Raises:
        ValueError: not such a time.
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        number = float(text[:-1])
    except ValueError:
        number = 0.0
    if unit is None or not 0 < number < math.inf:
        raise ValueError(f"{name} is {text!r}, expected a time such as 90s, 30m or 4h")
    return unit * number


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, expected {expected}")
