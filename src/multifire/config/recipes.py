"""Named configurations: the experiments of Feng et al. (IJCAI 2022), the same with more augmentation, and smaller ones.

`DataConfig.name` is a data set of `datasets/registry.py`, `ModelConfig.name` a block of `nn/block.py` with a depth.
`DataConfig`, `ModelConfig` and `OptimConfig` in schema.py say what each option means, with its unit.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from multifire.config.json_format import convert, flatten_config
from multifire.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig
from multifire.utils.errors import nearest, unknown


@dataclass(frozen=True)
class Recipe:
    """A configuration, what it is for, and the accuracy in percent that the paper reports."""

    config: RunConfig
    about: str
    published: float | None = None


CIFAR10 = RunConfig(
    recipe="cifar10",
    data=DataConfig(name="cifar10", timesteps=4, crop_padding=4, flip=True),
    model=ModelConfig(name="ds_resnet20", width=64),
    optim=OptimConfig(epochs=110, batch_size=64, lr=0.1, schedule="step"),
)

DIGITS = RunConfig(
    recipe="digits",
    data=DataConfig(name="digits", timesteps=4, crop_padding=2),
    model=ModelConfig(name="ds_resnet8", in_channels=1, width=16),
    optim=OptimConfig(epochs=10, batch_size=32, lr=0.1, schedule="one-cycle", label_smoothing=0.1),
)

DVS_GESTURE = RunConfig(
    recipe="dvs-gesture",
    data=DataConfig(name="dvs-gesture", timesteps=40, frame_size=32, slicing="duration", duration_us=30_000),
    model=ModelConfig(name="ds_resnet20", in_channels=2, num_classes=11, width=16, norm_input=True),
    optim=OptimConfig(epochs=120, batch_size=28, lr=0.1, schedule="step"),
)

CIFAR10_DVS = RunConfig(
    recipe="cifar10-dvs",
    data=DataConfig(
        name="cifar10-dvs", timesteps=10, frame_size=42, bin_factor=3.04, slicing="duration", duration_us=10_000
    ),
    model=ModelConfig(name="ds_resnet14", in_channels=2, width=32),
    optim=OptimConfig(epochs=100, batch_size=32, lr=0.1, schedule="step", weight_decay=1e-3),
)

NMNIST = RunConfig(
    recipe="nmnist",
    data=DataConfig(
        name="nmnist", timesteps=6, frame_size=17, slicing="time", roll=1, rotation=10.0, cutout=4, time_jitter=1
    ),
    model=ModelConfig(name="ds_resnet8", in_channels=2, width=16, norm_input=True),
    optim=OptimConfig(epochs=40, batch_size=32, lr=0.1, schedule="one-cycle", label_smoothing=0.1),
)

DIGITS_DVS = replace(
    NMNIST,
    recipe="digits-dvs",
    data=replace(NMNIST.data, name="digits-dvs", timesteps=4, cutout=0, time_jitter=0),
    optim=replace(NMNIST.optim, epochs=6),
)

NCALTECH101 = replace(
    NMNIST,
    recipe="ncaltech101",
    data=replace(NMNIST.data, name="ncaltech101", timesteps=10, frame_size=48, flip=True, roll=4, cutout=12),
    model=ModelConfig(name="ds_resnet20", in_channels=2, num_classes=101, width=32, norm_input=True),
    optim=replace(NMNIST.optim, epochs=60),
)

DVS_LIP = RunConfig(
    recipe="dvs-lip",
    data=DataConfig(name="dvs-lip", timesteps=30, frame_size=42, slicing="time", flip=True, roll=3, time_jitter=2),
    model=ModelConfig(name="ds_resnet20", in_channels=2, num_classes=100, width=32, norm_input=True),
    optim=OptimConfig(epochs=60, batch_size=32, lr=0.1, schedule="one-cycle", label_smoothing=0.1),
)

ASL_DVS = RunConfig(
    recipe="asl-dvs",
    data=DataConfig(name="asl-dvs", timesteps=5, frame_size=40, slicing="time", flip_y=True, roll=3, rotation=10.0),
    model=ModelConfig(name="ds_resnet14", in_channels=2, num_classes=24, width=16, norm_input=True),
    optim=OptimConfig(epochs=10, batch_size=64, lr=0.1, schedule="one-cycle", label_smoothing=0.1),
)

TET_ONE_CYCLE = OptimConfig(lr=0.1, schedule="one-cycle", label_smoothing=0.1, loss="tet")

RECIPES: dict[str, Recipe] = {
    "digits": Recipe(DIGITS, "the demo: 4,000 MNIST digits that the package contains"),
    "cifar10": Recipe(CIFAR10, "CIFAR-10 as in the paper", published=94.25),
    "cifar10-small": Recipe(
        replace(
            CIFAR10,
            recipe="cifar10-small",
            model=replace(CIFAR10.model, width=16),
            optim=replace(CIFAR10.optim, epochs=30, schedule="one-cycle"),
        ),
        "CIFAR-10 for a laptop",
    ),
    "fashion-mnist": Recipe(
        replace(
            DIGITS,
            recipe="fashion-mnist",
            data=DataConfig(name="fashion-mnist", timesteps=4, crop_padding=2, flip=True),
            optim=replace(DIGITS.optim, epochs=15),
        ),
        "Fashion-MNIST",
    ),
    "dvs-gesture": Recipe(DVS_GESTURE, "DVS128 Gesture as in the paper", published=97.29),
    "dvs-gesture-modern": Recipe(
        replace(
            DVS_GESTURE,
            recipe="dvs-gesture-modern",
            data=replace(DVS_GESTURE.data, flip=True, roll=3, rotation=10.0, cutout=8, time_jitter=3),
            optim=replace(TET_ONE_CYCLE, epochs=120, batch_size=28),
        ),
        "DVS128 Gesture: augmentation, TET loss, one-cycle schedule",
    ),
    "cifar10-dvs": Recipe(CIFAR10_DVS, "CIFAR10-DVS as in the paper", published=67.07),
    "cifar10-dvs-modern": Recipe(
        replace(
            CIFAR10_DVS,
            recipe="cifar10-dvs-modern",
            data=replace(CIFAR10_DVS.data, flip=True, roll=5, rotation=15.0, cutout=8, swap_polarity=0.1),
            model=replace(CIFAR10_DVS.model, norm_input=True),
            optim=replace(TET_ONE_CYCLE, epochs=100, batch_size=32, weight_decay=1e-3),
        ),
        "CIFAR10-DVS: augmentation, TET loss, one-cycle schedule",
    ),
    "nmnist": Recipe(NMNIST, "N-MNIST for a laptop"),
    "ncaltech101": Recipe(NCALTECH101, "N-Caltech101: a hundred kinds of thing, and background"),
    "dvs-lip": Recipe(DVS_LIP, "DVS-Lip: a hundred spoken words"),
    "asl-dvs": Recipe(ASL_DVS, "ASL-DVS: the letters of a sign language"),
    "digits-dvs": Recipe(DIGITS_DVS, "the demo with events, simulated from those digits"),
}
"""The recipes by name."""


def recipe(name: str, **overrides: Any) -> RunConfig:
    """Return the configuration of a recipe, with some values replaced.

        mf.recipe("cifar10", **{"optim.epochs": 5, "model.width": 16})

    Args:
        name: the recipe, see `multifire recipes`.
        overrides: values by the names of the command line.

    Raises:
        ValueError: an unknown recipe or name (the message suggests the nearest), or a value that is not valid.
    """
    return override(get_recipe(name), overrides)


def override(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with values replaced by their full names, such as "optim.epochs".

    Raises:
        ValueError: an unknown name (the message suggests the nearest), or a value that is not valid.
    """
    known = flatten_config(asdict(cfg))
    for name in values:
        if name not in known:
            raise ValueError(f"unknown override {name!r}{nearest(name, list(known))}")
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = convert(cfg, name, value)
    nested = {part: replace(getattr(cfg, part), **fields) for part, fields in parts.items() if part}
    return replace(cfg, **nested, **parts.get("", {}))


def get_recipe(name: str) -> RunConfig:
    """Return the configuration of the recipe `name`.

    Raises:
        ValueError: unknown recipe; the message suggests the nearest one.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name].config
