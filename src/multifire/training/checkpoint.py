"""Write and read checkpoints, each of which is one safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from multifire.config import RunConfig, json_format
from multifire.config.parameters import count_parameters
from multifire.nn import SpikingNetwork, model_from_config
from multifire.utils.files import older
from multifire.utils.log import log
from multifire.utils.tensor_files import check_keys, read_tensors, write_tensors

CHECKPOINT_VERSION = 1


@dataclass
class Position:
    """Progress of a run: the next batch, sums over the current epoch and over the run, and the best accuracy."""

    epoch: int = 0
    """Number of finished epochs, which is the number of the current one."""
    step: int = 0
    """Number of finished steps of the current epoch."""
    loss_sum: float = 0.0
    """Sum of the losses of the current epoch's samples."""
    correct: int = 0
    """Number of correct predictions in the current epoch."""
    seen: int = 0
    """Number of samples of the current epoch that are counted."""
    epoch_seconds: float = 0.0
    """Training time of the current epoch."""
    train_seconds: float = 0.0
    """Training time of the finished epochs."""
    images: int = 0
    """Number of samples of the finished epochs."""
    best: float | None = None
    """Best accuracy on the split that chooses the best epoch."""
    best_epoch: int | None = None
    skipped: int = 0
    """Number of steps skipped because their loss or gradient is NaN or infinite."""

    def finish_epoch(self) -> None:
        """Move to the start of the next epoch."""
        self.train_seconds += self.epoch_seconds
        self.images += self.seen
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.correct, self.seen, self.epoch_seconds = 0.0, 0, 0, 0.0


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run, from which it can be continued, or the weights of its best epoch."""

    config: RunConfig
    position: Position
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """Tensors of the optimiser, such as momenta, by parameter; empty in the `best` checkpoint."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of the weights, if the run keeps one; the `best` checkpoint stores it as `model`."""


def save_checkpoint(path: Path, checkpoint: Checkpoint, keep: int = 1) -> None:
    """Write `checkpoint` atomically as one safetensors file with a digest.

    The newest `keep` versions of the file are kept; `multifire.utils.files.older` names the earlier ones.
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
        ValueError: the file is truncated, altered, of another version, or not a checkpoint.
    """
    header, tensors = read_tensors(path, {"checkpoint": CHECKPOINT_VERSION})
    try:
        config, position = header["config"], Position(**json.loads(header["position"]))
        if not all(isinstance(n, int) and n >= 0 for n in (position.epoch, position.step, position.seen)):
            raise ValueError(f"epoch {position.epoch}, step {position.step}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header has no valid config or position ({error}); use another one") from None
    return Checkpoint(
        config=json_format.from_json(config, source=str(path)),
        position=position,
        model=_with_prefix(tensors, "model."),
        optimizer=_with_prefix(tensors, "optimizer."),
        average=_with_prefix(tensors, "average."),
    )


def load_newest(path: Path) -> tuple[Checkpoint, Path] | None:
    """Return the newest intact checkpoint among `path` and its earlier versions, with its file; None without any.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged = None
    for file in _versions(path):
        try:
            return load_checkpoint(file), file
        except ValueError as error:
            log.warning("%s; trying the previous checkpoint", error)
            damaged = error
    if damaged:
        raise ValueError(f"no intact checkpoint is left: {damaged}")
    return None


def _versions(path: Path) -> list[Path]:
    """Return the files that exist among `path` and its earlier versions, newest first."""
    ages = (file.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix) for file in path.parent.glob("*"))
    files = [path, *(older(path, age) for age in sorted(int(age) for age in ages if age.isdecimal()))]
    return [file for file in files if file.is_file()]


def load_model(path: Path, backend: str = "auto") -> tuple[SpikingNetwork, RunConfig]:
    """Return the network of a checkpoint file, in evaluation mode, and its configuration.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or its weights do not fit its configuration.
    """
    checkpoint = load_checkpoint(path)
    expected, found = count_parameters(checkpoint.config.model), sum(t.numel() for t in checkpoint.model.values())
    if expected > found:  # checked first: a damaged configuration could ask for a huge network
        raise ValueError(f"{path}: does not fit the network: found {found:,} values, expected {expected:,} parameters")
    model = model_from_config(checkpoint.config.model, backend)
    load_weights(model, checkpoint.average or checkpoint.model, source=str(path))
    return model.eval(), checkpoint.config


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors of `state` into the model; `source` names them in errors.

    Raises:
        ValueError: keys are missing or extra, or shapes differ; the message names them.
    """
    check_keys(state, {name: tensor.shape for name, tensor in model.state_dict().items()}, source)
    model.load_state_dict(state)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
