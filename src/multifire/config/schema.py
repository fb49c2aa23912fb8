"""The configuration of a run: frozen dataclasses of plain values. Imports neither torch nor NumPy."""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from multifire.config import neurons
from multifire.config.architecture import check_model_name

MAX_LEVELS = 64
"""Maximum K: a configuration from a stranger must not ask for memory without limit."""


@dataclass(frozen=True)
class DataConfig:
    """The data set, how a sample becomes time steps, and augmentation."""

    name: str = "digits"
    """Data set; see `multifire data list`."""
    root: str = "data"
    """Folder of the data sets, each in a subfolder with its name."""
    timesteps: int = 4
    """T: time steps. An image is shown T times; a recording is cut into T frames."""
    validation: float = 0.0
    """Fraction of the training set held out to choose the best checkpoint, 0 <= fraction < 1."""
    crop_padding: int = 0
    """Images: pad every side with this many black pixels, then crop at random; 0: off."""
    flip: bool = False
    """Flip horizontally at random; the label changes if the mirror image shows another class (left or right hand)."""
    limit: int | None = None
    """Train on only this many samples, drawn with the seed; for quick trials."""
    frame_size: int = 32
    """Events: height and width of a frame; several sensor pixels are binned into one cell."""
    bin_factor: float | None = None
    """Events: sensor pixels per cell along x and along y, may be fractional; None: sensor size / frame size."""
    slicing: Literal["duration", "time", "count"] = "duration"
    """Events: frames of duration_us from the first event on (duration), of equal time, or of equal event count."""
    duration_us: int = 30_000
    """Events: length of a frame in µs, for slicing by duration."""
    binary: bool = False
    """Events: store 0 or 1 in a cell instead of the number of events."""
    split_seed: int | None = None
    """CIFAR10-DVS: draw 900 training recordings of each class with this seed; None: take the first 900.
    Other data without an official split: draw the test samples with this seed; None: 0."""
    test_share: float = 0.2
    """Data without an official split: fraction of each class that is held out for the test."""
    size: str | None = None
    """folder: stretch every picture to this height and width, such as 32x32; None: all must be of one size."""
    channels: int | None = None
    """folder: convert every picture to grey (1) or RGB (3); None: all must be of one kind."""
    sensor: str | None = None
    """recordings: width and height of the sensor in pixels, such as 346x260; None: as the files say."""
    stray: Literal["refuse", "drop"] = "refuse"
    """Events: a recording with events beside the sensor is an error, or they are left out and counted (drop)."""
    fit: Literal["pad", "crop", "stretch"] = "pad"
    """Events: how a sensor that is not square fills a frame: with empty cells around it, its middle, or stretched."""
    flip_x: bool = False
    """Events: turn every recording left to right, for a camera that mirrors."""
    flip_y: bool = False
    """Events: turn every recording upside down, for a camera that stands on its head."""
    hot_pixels: Literal["keep", "drop"] = "keep"
    """Events: leave out pixels that fire by themselves (drop); `multifire data info FILE` names them."""
    classes: tuple[str, ...] | None = None
    """Own data: names of the classes, in the order of the labels; None: from the data."""
    shape: tuple[int, ...] | None = None
    """Own data: channels, height and width of an image or a sensor, or T, 2, height and width of event frames; None:
    from the data."""
    mean: tuple[float, ...] | None = None
    """Images: mean of each channel, for bytes as 0..1; None: that of the data set, or of the training images."""
    std: tuple[float, ...] | None = None
    """Images: standard deviation of each channel; None: as for the mean."""
    roll: int = 0
    """Events: random cyclic shift by up to this many pixels along x and along y."""
    rotation: float = 0.0
    """Events: random rotation by up to this many degrees in either direction."""
    cutout: int = 0
    """Images: set a square of this many pixels around a random pixel to the mean colour. Events: set a random square,
    up to this many pixels wide, to zero in every frame of a sample."""
    swap_polarity: float = 0.0
    """Events: probability that the ON and OFF events of a sample are swapped."""
    time_jitter: int = 0
    """Events: random shift in time by up to this many frames, earlier or later; empty frames fill the gap."""
    random_erasing: float = 0.0
    """Images: probability that a random rectangle, 2 to 33 % of the image, is set to the mean colour."""
    trivial_augment: bool = False
    """Images: change each by one random operation of random strength (TrivialAugment-wide)."""
    mixup: float = 0.0
    """Images: mix each image and label with another one's; the share is drawn from Beta(mixup, mixup). 0: off."""


@dataclass(frozen=True)
class ModelConfig:
    """The network: its architecture and its neurons."""

    name: str = "ds_resnet20"
    """Such as ds_resnet20: ds, plain, sew or ms, and a depth; or vgg9 or vgg11; or a registered network."""
    in_channels: int = 3
    """Channels of one frame."""
    num_classes: int = 10
    """Size of the voting layer."""
    width: int = 64
    """Channels of the first stage; each later stage of a ResNet has twice as many as the one before."""
    levels: int = 3
    """K: firing levels of a neuron. K = 1 is the ordinary LIF neuron."""
    thresholds: tuple[float, ...] | None = None
    """Firing threshold of each level; None: 0.6, 1.6, 2.6 and so on."""
    decay: float = 0.25
    """Factor by which the membrane potential is multiplied in each time step."""
    learn_thresholds: bool = False
    """Learn the thresholds of each layer, starting from these."""
    learn_decay: bool = False
    """Learn the decay of each layer, starting from this one."""
    membranes: Literal["own", "shared"] = "own"
    """own: each level of a neuron has its own membrane; shared: all levels have one."""
    reset: Literal["zero", "subtract", "any"] = "zero"
    """What a spike does to its own membrane: zero, subtract; to a shared one: subtract, or any (zero at any spike)."""
    signed: bool = False
    """Levels also fire -1, where the membrane is below minus their threshold."""
    surrogate: str = "rect"
    """Shape of the surrogate derivative: rect, triangle, atan, sigmoid, gaussian, or a registered name."""
    surrogate_width: float = 1.0
    """Width a of the surrogate derivative."""
    detach_reset: bool = False
    """Stop the gradient at the reset gate (the paper does not)."""
    norm_input: bool = False
    """Normalise the input by a tdBN without γ and β, as in the paper's Gesture network."""
    checkpoint_stages: bool = False
    """Recompute the stages in the backward pass instead of keeping them: less memory, a third more time."""


@dataclass(frozen=True)
class OptimConfig:
    """Training: optimiser, learning-rate schedule and loss."""

    epochs: int = 110
    """Passes over the training set."""
    batch_size: int = 64
    """Images in one training step."""
    lr: float = 0.1
    """Highest learning rate."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd, with momentum as in the paper, or adamw."""
    momentum: float = 0.9
    """Momentum of SGD; the first of the two decay rates of AdamW."""
    weight_decay: float = 1e-4
    """Weight decay of every parameter: L2 as in the paper (sgd), or decoupled from the gradient (adamw)."""
    schedule: Literal["step", "cosine", "one-cycle"] = "step"
    """step: lr × gamma every step_epochs; cosine: lr falls to 0; one-cycle: lr rises for warmup_share, then falls."""
    step_epochs: int = 40
    """Epochs between two drops of the step schedule."""
    gamma: float = 0.1
    """Factor of one drop of the step schedule."""
    warmup_share: float = 0.25
    """Fraction of the one-cycle schedule in which the learning rate rises, 0 < fraction < 1."""
    loss: Literal["mean", "tet"] = "mean"
    """mean: cross entropy of the time-averaged logits; tet: cross entropy of each time step's logits, averaged."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy, 0 <= s < 1."""
    spike_penalty: float = 0.0
    """Add this times a sample's million synaptic operations to its loss: fewer spikes for some accuracy. 0: off."""
    clip_norm: float | None = None
    """Clip the gradient to this total norm; None: no clipping."""
    warmup_epochs: float = 0.0
    """step, cosine: number of epochs at the start in which the learning rate rises from 0."""
    accumulate: int = 1
    """Split a batch into this many parts and add up their gradients; norms use the statistics of one part."""
    decay_norms: bool = True
    """Apply weight decay to the weights and biases of norms too, as in the paper."""
    ema_decay: float | None = None
    """Keep and score a moving average of the weights: w' ← d·w' + (1 - d)·w after each step; None: none."""
    patience: int | None = None
    """Stop after this many epochs without a better validation accuracy; needs data.validation."""
    skip_nonfinite: int = 0
    """Skip up to this many steps whose gradient is NaN or infinite; the next such step stops the run."""
    scaling: Literal["none", "linear"] = "none"
    """Several processes: share one batch (none), or multiply batch size and lr by their number (linear)."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes.

    Options that only decide how it is run are in `TrainOptions`.
    """

    recipe: str = "digits"
    """Recipe that the run started from."""
    code: str = ""
    """File with the recipe and what it registers, if the recipe is not one of multifire's."""
    code_sha256: str = ""
    """Digest of this file."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    """Seed of the initial weights, the order of the data and the augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: convolutions under autocast; membranes and norms stay in fp32."""
    backend: str = "auto"
    """Implementation of the neuron: auto, cpu, triton or reference."""
    sync_norm: bool = False
    """Compute batch statistics over all processes, so that several processes compute the same as one."""
    eval_batch_size: int = 128
    """Images in one evaluation step."""

    def __post_init__(self):
        """Check every field.

        Raises:
            ValueError: a field is out of range; the message names it, its value and the range.
        """
        data, model, optim = self.data, self.model, self.optim
        for part, values in {"data": data, "model": model, "optim": optim}.items():
            for name, value in vars(values).items():
                if isinstance(value, float):
                    _require(math.isfinite(value), f"{part}.{name}", value, "a finite number")
        _require(data.timesteps >= 1, "data.timesteps", data.timesteps, "at least 1")
        _require(0 <= data.validation < 1, "data.validation", data.validation, "0 <= fraction < 1")
        _require(data.crop_padding >= 0, "data.crop_padding", data.crop_padding, "at least 0")
        _require(data.limit is None or data.limit >= 1, "data.limit", data.limit, "at least 1")
        _require(data.frame_size >= 1, "data.frame_size", data.frame_size, "at least 1")
        _require(data.bin_factor is None or data.bin_factor > 0, "data.bin_factor", data.bin_factor, "above 0")
        _require(data.duration_us >= 1, "data.duration_us", data.duration_us, "at least 1")
        _require(data.split_seed is None or data.split_seed >= 0, "data.split_seed", data.split_seed, "at least 0")
        for name in ("roll", "rotation", "cutout", "time_jitter"):
            _require(getattr(data, name) >= 0, f"data.{name}", getattr(data, name), "at least 0")
        _require(0 <= data.random_erasing <= 1, "data.random_erasing", data.random_erasing, "0 <= probability <= 1")
        _require(0 <= data.mixup <= 1, "data.mixup", data.mixup, "0 <= mixup <= 1")
        _require(data.rotation <= 180, "data.rotation", data.rotation, "at most 180 degrees")
        _require(0 <= data.swap_polarity <= 1, "data.swap_polarity", data.swap_polarity, "0 <= probability <= 1")
        _check_own_data(data)
        check_model_name(model.name)
        _require(1 <= model.levels <= MAX_LEVELS, "model.levels", model.levels, f"1 to {MAX_LEVELS}")
        _require(model.in_channels >= 1, "model.in_channels", model.in_channels, "at least 1")
        _require(model.num_classes >= 1, "model.num_classes", model.num_classes, "at least 1")
        _require(model.width >= 1, "model.width", model.width, "at least 1")
        _require(model.surrogate_width > 0, "model.surrogate_width", model.surrogate_width, "above 0")
        one_each = model.thresholds is None or len(model.thresholds) == model.levels
        _require(one_each, "model.thresholds", model.thresholds, f"one for each of the {model.levels} levels")
        _check_neuron(model)
        _require(optim.epochs >= 1, "optim.epochs", optim.epochs, "at least 1")
        _require(optim.batch_size >= 1, "optim.batch_size", optim.batch_size, "at least 1")
        _require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
        _require(optim.momentum >= 0, "optim.momentum", optim.momentum, "at least 0")
        _require(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, "at least 0")
        _require(optim.step_epochs >= 1, "optim.step_epochs", optim.step_epochs, "at least 1")
        _require(0 < optim.warmup_share < 1, "optim.warmup_share", optim.warmup_share, "0 < fraction < 1")
        _require(0 <= optim.label_smoothing < 1, "optim.label_smoothing", optim.label_smoothing, "0 <= s < 1")
        _require(optim.spike_penalty >= 0, "optim.spike_penalty", optim.spike_penalty, "at least 0")
        _require(optim.clip_norm is None or optim.clip_norm > 0, "optim.clip_norm", optim.clip_norm, "above 0")
        _require(optim.warmup_epochs >= 0, "optim.warmup_epochs", optim.warmup_epochs, "at least 0")
        _require(optim.accumulate >= 1, "optim.accumulate", optim.accumulate, "at least 1")
        ema = optim.ema_decay
        _require(ema is None or 0 <= ema < 1, "optim.ema_decay", ema, "0 <= decay < 1")
        _require(optim.patience is None or optim.patience >= 1, "optim.patience", optim.patience, "at least 1")
        may_stop_early = optim.patience is None or data.validation > 0
        needed = "data.validation above 0: the test set must not decide when to stop"
        _require(may_stop_early, "optim.patience", optim.patience, needed)
        _require(optim.skip_nonfinite >= 0, "optim.skip_nonfinite", optim.skip_nonfinite, "at least 0")
        _require(self.eval_batch_size >= 1, "eval_batch_size", self.eval_batch_size, "at least 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 <= seed < 2**63")
        for prefix, part in {"": self, "data.": data, "model.": model, "optim.": optim}.items():
            _check_choices(part, prefix)


@dataclass(frozen=True)
class TrainOptions:
    """How a run is carried out.

    These options do not change what it computes, and may differ when it is resumed.
    """

    resume: Literal["no", "yes", "auto"] = "no"
    """Continue the run in the folder (--resume); auto: continue if there is one, else start."""
    checkpoint_every: str = "10m"
    """Interval of checkpoints within an epoch: steps (500), seconds (90s), minutes (10m) or hours (1h)."""
    keep: int = 3
    """Number of checkpoints to keep: the newest ones."""
    max_time: str | None = None
    """Write a checkpoint and stop after this time, such as 90s, 30m or 4h; --resume continues the run."""
    track: tuple[str, ...] | None = None
    """Trackers: tensorboard, mlflow, wandb; None: TensorBoard, if it is installed."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """On a GPU, replay training steps and evaluations as CUDA graphs where that is possible (auto)."""
    analyze_every: int = 1
    """Analyse the network every this many epochs and at the end (analysis.jsonl, analysis.json); 0: never."""

    def __post_init__(self):
        """Check every option.

        Raises:
            ValueError: an option is out of range; the message names it, its value and the range.
        """
        _require(self.keep >= 1, "keep", self.keep, "at least 1")
        _require(self.analyze_every >= 0, "analyze_every", self.analyze_every, "at least 0")
        if self.checkpoint_every.isdecimal():
            _require(int(self.checkpoint_every) >= 1, "checkpoint_every", self.checkpoint_every, "at least 1 step")
        else:
            parse_duration(self.checkpoint_every, "checkpoint_every")
        if self.max_time is not None:
            parse_duration(self.max_time, "max_time")
        _check_choices(self, "")


def _check_neuron(model: ModelConfig) -> None:
    neurons.check_surrogate(model.surrogate)
    thresholds = model.thresholds or tuple(0.6 + k * model.surrogate_width for k in range(model.levels))
    neurons.check_dynamics(thresholds, model.reset, model.membranes, model.signed)
    neurons.check_learnable(thresholds, model.decay, model.learn_thresholds, model.learn_decay)


def _check_own_data(data: DataConfig) -> None:
    _require(0 < data.test_share < 1, "data.test_share", data.test_share, "0 < fraction < 1")
    for name in ("size", "sensor"):
        if (text := getattr(data, name)) is not None:
            parse_size(text, f"data.{name}")
    _require(data.channels in (None, 1, 3), "data.channels", data.channels, "1 (grey) or 3 (RGB)")
    classes, shape = data.classes, data.shape
    _require(classes is None or len(set(classes)) == len(classes) > 1, "data.classes", classes, "two or more names")
    well_shaped = shape is None or (len(shape) in (3, 4) and min(shape) >= 1)
    _require(well_shaped, "data.shape", shape, "three or four numbers of at least 1")
    for name in ("mean", "std"):
        values = getattr(data, name)
        _require(values is None or all(map(math.isfinite, values)), f"data.{name}", values, "finite numbers")
    _require(data.std is None or min(data.std, default=0) > 0, "data.std", data.std, "numbers above 0")


def parse_size(text: str, name: str) -> tuple[int, int]:
    """Return the two numbers of a text such as 346x260; `name` names the option in errors.

    Raises:
        ValueError: `text` is no such pair.
    """
    first, _, second = text.partition("x")
    if not all(number.isascii() and number.isdecimal() and 0 < int(number) < 1 << 15 for number in (first, second)):
        raise ValueError(f"{name} is {text!r}, expected two numbers such as 346x260")
    return int(first), int(second)


def parse_duration(text: str, name: str) -> float:
    """Return a time such as 90s, 30m or 4h in seconds; `name` names the option in errors.

    Raises:
        ValueError: `text` is not such a time.
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        number = float(text[:-1])
    except ValueError:
        number = 0.0
    if unit is None or not 0 < number < math.inf:
        raise ValueError(f"{name} is {text!r}, expected a time such as 90s, 30m or 4h")
    return unit * number


def _check_choices(part: Any, prefix: str) -> None:
    """Check the fields that are one of a few words."""
    for name, words in _choices(type(part)).items():
        value = getattr(part, name)
        _require(value in words, prefix + name, repr(value), f"one of {', '.join(words)}")


@functools.cache
def _choices(part: type) -> dict[str, tuple[str, ...]]:
    """Return the words that each field of type Literal may be."""
    return {name: get_args(hint) for name, hint in get_type_hints(part).items() if get_origin(hint) is Literal}


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, expected {expected}")
