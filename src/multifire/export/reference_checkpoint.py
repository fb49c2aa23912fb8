"""Read checkpoints of the authors' published code, and return a network's weights under their names."""

import functools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multifire.nn import SpikingNetwork, build_model
from multifire.utils.tensor_files import check_keys

# The authors' names and ours. We number stages from 0, the authors number layers from 1.
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
_PATTERNS = {"s": r"\d+", "block": r"\d+", "i": r"\d", "rest": ".+"}
# torch's BatchNorm counts batches; with a fixed momentum the count has no effect, so our norm does not have it.
_COUNTER = "num_batches_tracked"


def load_reference_checkpoint(
    path_or_state_dict: str | Path | Mapping[str, Any], residual: str = "ds", levels: int = 3, **options: Any
) -> SpikingNetwork:
    """Load a checkpoint of the authors' code, `{"model": state_dict, "epoch": int}` or a state_dict, as a network.

    Width, depth, channels, classes and the input norm follow from the shapes of the tensors.

    Args:
        path_or_state_dict: file, or its content.
        residual: kind of block, "ds" or "plain".
        levels: number of levels K of the neurons.
        **options: options of `build_model`, if they differ from the paper's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or a missing, extra or misshapen tensor; the message has the authors' name of it.
    """
    source = "state_dict" if isinstance(path_or_state_dict, Mapping) else str(path_or_state_dict)
    theirs = _read_state_dict(path_or_state_dict, source)
    model = _build_for(theirs, residual, levels, options, source)
    expected = {name: tensor.shape for name, tensor in to_reference_state_dict(model).items()}
    counters = {name for name in expected if name.endswith(_COUNTER)} - theirs.keys()
    check_keys(theirs, {name: shape for name, shape in expected.items() if name not in counters}, source)
    ours = {_our_name(name): tensor for name, tensor in theirs.items() if not name.endswith(_COUNTER)}
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in ours.values()))
    model.to(dtype).load_state_dict(ours)
    return model


def to_reference_state_dict(model: SpikingNetwork) -> dict[str, Tensor]:
    """Return a network's weights under the authors' names, as the authors' scripts load them.

    Raises:
        ValueError: its neurons are not those of the authors' code, which has constant thresholds.
    """
    neuron = model.stem.neuron
    neuron.refuse_other_members("the authors' code")
    if neuron.is_learned:
        raise ValueError("the authors' code has no learned thresholds or decay, so it cannot load this network")
    theirs: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = _their_name(name)
        theirs[key] = tensor.detach().clone()
        if key.endswith("running_var"):
            theirs[key.replace("running_var", _COUNTER)] = torch.tensor(0)
    return theirs


def _read_state_dict(path_or_state_dict: str | Path | Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by the authors' names."""
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
    """Load a file of tensors; no other object is unpickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged files torch.load raises errors of many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{source}: damaged, or contains more than tensors ({reason})") from None


def _build_for(
    theirs: Mapping[str, Tensor], residual: str, levels: int, options: dict[str, Any], source: str
) -> SpikingNetwork:
    """Return a network, not yet loaded, whose sizes follow from the tensors' names and shapes."""
    for name, rank in (("conv1.weight", 4), ("voting.weight", 2)):
        if name not in theirs or theirs[name].dim() != rank:
            raise ValueError(f"{source}: {name} is missing or not of rank {rank}, expected the authors' network")
    blocks = {int(m[1]) + 1 for name in theirs if (m := re.match(r"layer1\.execute\.(\d+)\.", name))}
    missing = next(block for block in range(len(blocks) + 1) if block + 1 not in blocks)
    if missing < max(blocks, default=1):
        raise ValueError(f"{source}: layer1.execute.{missing}.conv1.weight is missing, expected consecutive blocks")
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
    """Return the name that a table of patterns gives, with `stage_shift` added to the number of the stage."""
    for before, after in table:
        pattern = re.escape(before).replace(r"\{", "{").replace(r"\}", "}")
        match = re.fullmatch(pattern.format(**{key: f"(?P<{key}>{value})" for key, value in _PATTERNS.items()}), name)
        if match:
            parts = match.groupdict()
            stage = str(int(parts.get("s", 0)) + stage_shift)
            return after.format(**(parts | {"s": stage}))
    raise ValueError(f"{name}: not a parameter of this network")
