"""Checkpoints of the authors' published code, in both directions."""

import functools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multifire.nn import SpikingResNet, build_model
from multifire.utils.tensor_files import check_keys

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
