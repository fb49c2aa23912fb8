"""Checkpoints: one safetensors file each."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from multifire.config import RunConfig, json_format
from multifire.config.parameters import count_parameters
from multifire.nn import SpikingResNet, model_from_config
from multifire.utils.files import older
from multifire.utils.log import log
from multifire.utils.tensor_files import check_keys, read_tensors, write_tensors

CHECKPOINT_VERSION = 1


@dataclass
class Position:
    """Progress of a run: the next batch, the sums over the current epoch, and the best accuracy so far."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    images: int = 0
    best: float | None = None
    best_epoch: int | None = None
    skipped: int = 0
    """Steps skipped because their gradient was not finite."""

    def finish_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.train_seconds += self.epoch_seconds
        self.images += self.seen
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.correct, self.seen, self.epoch_seconds = 0.0, 0, 0, 0.0


@dataclass(frozen=True)
class Checkpoint:
    config: RunConfig
    position: Position
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """Momentum by parameter name; empty in `best`, which holds weights only."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of the weights, if the run keeps one; `best` stores it as `model`."""


def save_checkpoint(path: Path, checkpoint: Checkpoint, keep: int = 1) -> None:
    """Write `checkpoint` atomically as one safetensors file with a digest.

    The newest `keep` versions are kept, earlier ones under the names of `multifire.utils.files.older`.
    """
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in checkpoint.optimizer.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in checkpoint.average.items()}
    header = {
        "multifire": str(CHECKPOINT_VERSION),
        "config": json_format.to_json(checkpoint.config),
        "position": json.dumps(asdict(checkpoint.position)),
    }
    write_tensors(path, tensors, header, keep)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, altered, another program's file, or another version.
    """
    header, tensors = read_tensors(path, {"checkpoint": CHECKPOINT_VERSION})
    try:
        config, position = header["config"], Position(**json.loads(header["position"]))
        if not all(isinstance(n, int) and n >= 0 for n in (position.epoch, position.step, position.seen)):
            raise ValueError(f"epoch {position.epoch}, step {position.step}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: a checkpoint whose header has no config or position ({error})") from None
    return Checkpoint(
        config=json_format.from_json(config, source=str(path)),
        position=position,
        model=_with_prefix(tensors, "model."),
        optimizer=_with_prefix(tensors, "optimizer."),
        average=_with_prefix(tensors, "average."),
    )


def load_newest(path: Path) -> tuple[Checkpoint, Path] | None:
    """Return the newest intact checkpoint among `path` and earlier ones, and its file; None if there is no checkpoint.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged = None
    for file in _versions(path):
        try:
            return load_checkpoint(file), file
        except ValueError as error:
            log.warning("%s; trying the one before it", error)
            damaged = error
    if damaged:
        raise ValueError(f"no whole checkpoint is left: {damaged}")
    return None


def _versions(path: Path) -> list[Path]:
    """Return `path` and the kept earlier versions, newest first."""
    ages = (file.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix) for file in path.parent.glob("*"))
    files = [path, *(older(path, age) for age in sorted(int(age) for age in ages if age.isdecimal()))]
    return [file for file in files if file.is_file()]


def load_model(path: Path, backend: str = "auto") -> tuple[SpikingResNet, RunConfig]:
    """Return the network of a checkpoint file, in evaluation mode, and its configuration.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or weights that do not fit the configuration.
    """
    checkpoint = load_checkpoint(path)
    needed, found = count_parameters(checkpoint.config.model), sum(t.numel() for t in checkpoint.model.values())
    if needed > found:  # checked before memory is allocated for the file's configuration
        raise ValueError(f"{path}: does not fit the network: {needed:,} parameters, found {found:,} values")
    model = model_from_config(checkpoint.config.model, backend)
    load_weights(model, checkpoint.average or checkpoint.model, source=str(path))
    return model.eval(), checkpoint.config


def load_weights(model: SpikingResNet, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into the model.

    Raises:
        ValueError: missing or extra keys, or wrong shapes; names them.
    """
    check_keys(state, {name: tensor.shape for name, tensor in model.state_dict().items()}, source)
    model.load_state_dict(state)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
