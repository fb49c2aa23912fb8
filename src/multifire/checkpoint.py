"""Checkpoints: one safetensors file each, and the authors' published files in both directions."""

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multifire import config as configs
from multifire.config import RunConfig
from multifire.nn import SpikingResNet, build_model, model_from_config
from multifire.recipes import count_parameters
from multifire.runtime import log, older, write_atomic

CHECKPOINT_VERSION = 1


@dataclass
class Position:
    """Where a run stands: the next batch to train on, the sums over this epoch so far, and the best figure."""

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
    """Steps left out because their gradient was not finite."""


@dataclass(frozen=True)
class Checkpoint:
    config: RunConfig
    position: Position
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """Momentum by the name of its parameter; empty in `best`, which holds weights alone."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The weights' moving average, where the run keeps one; in `best` it stands in the model's place."""


def save_checkpoint(path: Path, checkpoint: Checkpoint, keep: int = 1) -> None:
    """Write `checkpoint` as one safetensors file, beside its target and then renamed, with a digest over all of it.

    The newest `keep` are kept, the older ones under the names that `runtime.older` gives them.
    """
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in checkpoint.optimizer.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in checkpoint.average.items()}
    header = {
        "multifire": str(CHECKPOINT_VERSION),
        "config": configs.to_json(checkpoint.config),
        "position": json.dumps(asdict(checkpoint.position)),
    }
    write_tensors(path, tensors, header, keep)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: cut short, altered, another program's file, or another version's.
    """
    header, tensors = read_tensors(path, {"checkpoint": CHECKPOINT_VERSION})
    try:
        config, position = header["config"], Position(**json.loads(header["position"]))
        if not all(isinstance(n, int) and n >= 0 for n in (position.epoch, position.step, position.seen)):
            raise ValueError(f"epoch {position.epoch}, step {position.step}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: a checkpoint whose header has no config or position ({error})") from None
    return Checkpoint(
        config=configs.from_json(config, source=str(path)),
        position=position,
        model=_with_prefix(tensors, "model."),
        optimizer=_with_prefix(tensors, "optimizer."),
        average=_with_prefix(tensors, "average."),
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], keep: int = 1) -> None:
    """Write a safetensors file, beside its target and then renamed, with a digest over its tensors and its header."""
    on_cpu = {name: _without_bf16(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    sealed = {**header, "digest": _digest(on_cpu, header)}
    # NumPy's writer, as safetensors.torch leaves every tensor in a cycle, for the garbage collector to find
    arrays = {name: tensor.numpy() for name, tensor in on_cpu.items()}
    write_atomic(path, safetensors.numpy.save(arrays, metadata=sealed), keep)


def _without_bf16(tensor: Tensor) -> Tensor:
    """The same numbers in a type that NumPy knows."""
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


def read_tensors(path: Path, versions: Mapping[str, int]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of what `write_tensors` wrote; `versions` says of which kinds it may be, and their version.

    Raises:
        FileNotFoundError: no such file.
        ValueError: cut short, altered, another program's file, of another kind or another version.
    """
    expected = " or ".join(versions)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {expected}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged or no {expected} ({error}); use another one") from None
    kind, version = kind_of(header), header.get("multifire")
    if version is None:
        raise ValueError(f"{path}: no multifire {expected}; use a file that multifire wrote")
    if kind not in versions or version != str(versions[kind]):
        wanted = " or ".join(f"{kind} of version {version}" for kind, version in versions.items())
        raise ValueError(f"{path}: a multifire {kind} of version {version}, expected a {wanted}")
    sealed = {name: text for name, text in header.items() if name != "digest"}
    if header.get("digest") != _digest(tensors, sealed):
        raise ValueError(f"{path}: damaged: its content does not match its digest; use another one")
    return header, tensors


def digest_of(path: Path) -> str:
    """The digest that a file which `read_tensors` accepted was sealed with."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()["digest"]


def kind_of(header: Mapping[str, str]) -> str:
    """What a file with this header holds: a checkpoint, where it does not say."""
    return header.get("kind", "checkpoint")


def load_newest(path: Path) -> tuple[Checkpoint, Path] | None:
    """The newest whole checkpoint among `path` and the older ones beside it, and its file; None where there is none.

    Raises:
        ValueError: there are some, and all of them are damaged.
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
    """`path` and the ones that were kept before it, newest first."""
    ages = (file.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix) for file in path.parent.glob("*"))
    files = [path, *(older(path, age) for age in sorted(int(age) for age in ages if age.isdecimal()))]
    return [file for file in files if file.is_file()]


def load_model(path: Path, backend: str = "auto") -> tuple[SpikingResNet, RunConfig]:
    """The network of a checkpoint file, in evaluation mode, and the configuration that it was trained with."""
    checkpoint = load_checkpoint(path)
    needed, found = count_parameters(checkpoint.config.model), sum(t.numel() for t in checkpoint.model.values())
    if needed > found:  # before memory is asked for, as much as the file's configuration likes
        raise ValueError(f"{path}: does not fit the network: {needed:,} parameters, found {found:,} values")
    model = model_from_config(checkpoint.config.model, backend)
    load_weights(model, checkpoint.average or checkpoint.model, source=str(path))
    return model.eval(), checkpoint.config


def load_weights(model: SpikingResNet, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into the model; every key must be there, known, and of the right shape.

    Raises:
        ValueError: naming the missing, extra and misshapen keys.
    """
    check_keys(state, {name: tensor.shape for name, tensor in model.state_dict().items()}, source)
    model.load_state_dict(state)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# The authors' names and ours; stage s counts from 0 here, and their layers from 1.
_NAMES = [
    ("conv1.{rest}", "stem.conv.{rest}"),
    ("bn1.bn.{rest}", "stem.norm.{rest}"),
    ("bn0.bn.{rest}", "input_norm.{rest}"),
    ("layer{s}.execute.{block}.conv{i}.{rest}", "stages.{s}.{block}.fire{i}.conv.{rest}"),
    ("layer{s}.execute.{block}.bn{i}.bn.{rest}", "stages.{s}.{block}.fire{i}.norm.{rest}"),
    ("layer{s}.execute.{block}.shortcut.0.{rest}", "stages.{s}.{block}.shortcut.conv.{rest}"),
    ("layer{s}.execute.{block}.shortcut.1.bn.{rest}", "stages.{s}.{block}.shortcut.norm.{rest}"),
    ("voting.{rest}", "voting.{rest}"),
]
_PLACES = {"s": r"\d+", "block": r"\d+", "i": r"\d", "rest": ".+"}
# A count of batches that torch's BatchNorm keeps; with a fixed momentum it changes nothing, so our norm has none.
_COUNTER = "num_batches_tracked"


def load_reference_checkpoint(
    path_or_state_dict: str | Path | Mapping[str, Any], residual: str = "ds", levels: int = 3, **options: Any
) -> SpikingResNet:
    """The network of a checkpoint in the authors' format, `{"model": state_dict, "epoch": int}` or the state_dict.

    Width, depth, channels, classes and the input norm follow from the shapes. No shape tells the kind of block, the
    number of levels, or the options of `build_model`: give them where they differ from the paper's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or a key that is missing, extra or misshapen; names it by the authors' name.
    """
    source = "state_dict" if isinstance(path_or_state_dict, Mapping) else str(path_or_state_dict)
    theirs = _read_theirs(path_or_state_dict, source)
    model = _build_for(theirs, residual, levels, options, source)
    expected = {name: tensor.shape for name, tensor in to_reference_state_dict(model).items()}
    counters = {name for name in expected if name.endswith(_COUNTER)} - theirs.keys()
    check_keys(theirs, {name: shape for name, shape in expected.items() if name not in counters}, source)
    ours = {_our_name(name): tensor for name, tensor in theirs.items() if not name.endswith(_COUNTER)}
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in ours.values()))
    model.to(dtype).load_state_dict(ours)
    return model


def to_reference_state_dict(model: SpikingResNet) -> dict[str, Tensor]:
    """The model's weights under the authors' names, as their scripts load them."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = _their_name(name)
        theirs[key] = tensor.detach().clone()
        if key.endswith("running_var"):
            theirs[key.replace("running_var", _COUNTER)] = torch.tensor(0)
    return theirs


def _read_theirs(path_or_state_dict: str | Path | Mapping[str, Any], source: str) -> dict[str, Tensor]:
    content: Any = path_or_state_dict
    if not isinstance(content, Mapping):
        if not Path(content).is_file():
            raise FileNotFoundError(f"{source}: no such checkpoint")
        content = _unpickle_tensors(Path(content), source)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f'{source}: expected {{"model": state_dict}} or a state_dict of tensors')
    for name, tensor in content.items():
        if not str(name).endswith(_COUNTER) and not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} is of {tensor.dtype}, expected floating point")
    return {str(name): tensor for name, tensor in content.items()}


def _unpickle_tensors(path: Path, source: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the file's bytes lead it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{source}: damaged, or not a checkpoint of tensors alone ({reason})") from None


def _build_for(
    theirs: Mapping[str, Tensor], residual: str, levels: int, options: dict[str, Any], source: str
) -> SpikingResNet:
    for name, rank in (("conv1.weight", 4), ("voting.weight", 2)):
        if name not in theirs or theirs[name].dim() != rank:
            raise ValueError(f"{source}: {name} is missing or not of rank {rank}; not a checkpoint of this network")
    blocks = {int(m[1]) + 1 for name in theirs if (m := re.match(r"layer1\.execute\.(\d+)\.", name))}
    missing = next(block for block in range(len(blocks) + 1) if block + 1 not in blocks)
    if missing < max(blocks, default=1):
        raise ValueError(f"{source}: layer1.execute.{missing}.conv1.weight is missing; not this network's checkpoint")
    width, in_channels = theirs["conv1.weight"].shape[:2]
    return build_model(
        f"{residual}_resnet{6 * max(blocks) + 2}",
        in_channels,
        len(theirs["voting.weight"]),
        width,
        levels,
        norm_input="bn0.bn.running_mean" in theirs,
        **options,
    )


def _our_name(theirs: str) -> str:
    return _rename(theirs, _NAMES, -1)


def _their_name(ours: str) -> str:
    return _rename(ours, [(ours, theirs) for theirs, ours in _NAMES], 1)


def _rename(name: str, table: list[tuple[str, str]], stage_shift: int) -> str:
    for before, after in table:
        pattern = re.escape(before).replace(r"\{", "{").replace(r"\}", "}")
        match = re.fullmatch(pattern.format(**{key: f"(?P<{key}>{value})" for key, value in _PLACES.items()}), name)
        if match:
            parts = match.groupdict()
            stage = str(int(parts.get("s", 0)) + stage_shift)
            return after.format(**(parts | {"s": stage}))
    raise ValueError(f"{name}: no such parameter in this network")


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: str) -> None:
    """Raise a ValueError that names the keys of `state` that are missing, extra or of another shape than expected."""
    faults = [f"missing {name}" for name in expected if name not in state]
    faults += [f"extra {name}" for name in state if name not in expected]
    faults += [
        f"{name} of shape {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{source}: does not fit the network: {'; '.join(faults[:5])}{more}")
