"""Export a DS-ResNet with int8 weights, and run it with integer activations and exact integer sums.

A convolution of uint8 activations with int8 weights gives exact integers. One kernel scales them, adds the folded
norm's bias, fires, adds the shortcut and writes uint8. Only the quantisation of the weights is an approximation.

What stays in floats, the convolution of images and the voting layer, is summed in float64 and rounded once: the result
does not depend on the order of the sums, so every implementation can compute the same bits.

Shapes: T time steps, N samples, O output channels, I input channels, H rows, W columns.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire import datasets, ops
from multifire.config import ModelConfig
from multifire.config.architecture import parse_model_name
from multifire.config.json_format import model_config
from multifire.export.fold import FoldedFire, Shift, fold
from multifire.export.int8_conv import COMPARISONS as COMPARISONS
from multifire.export.int8_conv import LARGEST_ACTIVATION, LARGEST_WEIGHT, CountConv2d, Int8Conv2d
from multifire.export.int8_conv import LARGEST_SUM as LARGEST_SUM
from multifire.export.int8_conv import vendor_has_int8 as vendor_has_int8
from multifire.export.provenance import KEY, KINDS, accuracy_record, make_provenance, read_provenance, stored
from multifire.nn import MLF, SpikingNetwork, Stream, Streaming, StreamState, model_from_config, require_known
from multifire.nn.block import convolve, is_static_input
from multifire.training.load_run import load_run
from multifire.utils.tensor_files import check_keys, read_tensors, write_tensors

INT8_VERSION = KINDS["int8"]
CANDIDATES = 80
"""Number of scales that are tried for each channel."""
SAMPLES_AT_ONCE = 8
"""Number of samples that are computed together, so that their sums stay in the processor's cache."""


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight per output channel; return int8 integers [O, ...] and scales [O]: weight ≈ scale·integers.

    The scale has the least squared error among CANDIDATES values from 0.8 to 1 times largest weight / 127: a smaller
    scale clips the largest weights and makes all others more precise.
    """
    weight_OX = weight.detach().double().flatten(1)
    largest_O1 = weight_OX.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best_O1, error_O1 = largest_O1, torch.full_like(largest_O1, math.inf)
    for fraction in torch.linspace(0.8, 1, CANDIDATES).tolist():
        scale_O1 = (fraction * largest_O1 / LARGEST_WEIGHT).float().double()
        error = (_round(weight_OX, scale_O1) * scale_O1 - weight_OX).square().sum(1, keepdim=True)
        best_O1, error_O1 = torch.where(error < error_O1, scale_O1, best_O1), torch.minimum(error, error_O1)
    return _round(weight_OX, best_O1).to(torch.int8).view(weight.shape), best_O1.squeeze(1).float()


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)


class Int8MLF(Streaming):
    """A FoldedFire with integer activations: o = MLF(scale·conv(x - mean) + bias) + add_after, in uint8.

    Only the stem of a network with an input norm has a mean. The mean's part of the sums is added to the bias, which
    then depends on the pixel: at the borders the window covers padding.
    """

    def __init__(self, conv: nn.Conv2d | Int8Conv2d, neuron: MLF, mean: Tensor | None = None):
        super().__init__()
        self.conv, self.neuron = conv, neuron
        self.scale: Tensor
        self.bias: Tensor
        self.mean: Tensor | None
        self.register_buffer("scale", torch.ones(len(conv.weight)))
        self.register_buffer("bias", torch.zeros(len(conv.weight)))
        self.register_buffer("mean", mean)
        self._biases: dict[tuple[int, int], Tensor] = {}

    def bias_at(self, rows: int, columns: int) -> Tensor:
        """Return the bias that is added to scale·sums: [O], or [O, H, W] with a mean."""
        if self.mean is None:
            return self.bias
        if (rows, columns) not in self._biases:
            mean_IHW = self.mean.double().view(-1, 1, 1).expand(-1, rows, columns)
            sums_OHW = F.conv2d(mean_IHW[None], self.conv.weight.double(), padding=1)[0]
            bias_OHW = self.bias.view(-1, 1, 1).double() - self.scale.view(-1, 1, 1).double() * sums_OHW
            self._biases[rows, columns] = bias_OHW.float()
        return self._biases[rows, columns]

    def forward(self, x_TNIHW: Tensor, stream: Stream | None = None, *, add_after: Tensor | None = None) -> Tensor:
        timesteps = x_TNIHW.shape[0]
        if is_static_input(x_TNIHW):
            x_TNIHW = x_TNIHW[:1]
        sums = convolve(self.conv, x_TNIHW)  # pyright: ignore[reportArgumentType] - Int8Conv2d has the same interface
        spikes, state = ops.mlf_uint8(
            sums,
            self.scale,
            self.bias_at(*sums.shape[3:]),
            self.neuron.thresholds,
            self.neuron.decay,
            add_after=add_after,
            state=stream and stream.take(self),
            return_state=stream is not None,
            timesteps=timesteps,
            reset=self.neuron.reset,
            membranes=self.neuron.membranes,
            backend=self.neuron.backend,
        )
        if stream is not None and state is not None:
            stream.put(self, state)
        return spikes


class Int8Network(nn.Module):
    """An int8 network for CPUs with the interface of SpikingNetwork; `quantise_network` and `load_int8` return it.

    If `counts` is True, inputs are event counts, which the stem convolves as integers; it convolves images as floats.
    """

    def __init__(
        self, network: SpikingNetwork, model: ModelConfig, counts: bool, provenance: dict[str, Any] | None = None
    ):
        super().__init__()
        self.network, self.model, self.counts, self.provenance = network, model, counts, provenance
        self.num_classes = network.num_classes

    @torch.no_grad()
    def forward(self, x_TNCHW: Tensor, *, per_step: bool = False) -> Tensor:
        """Return logits [N, classes], averaged over time; with `per_step`, of each time step [T, N, classes].

        Raises:
            ValueError: x is not [T, N, in_channels, H, W], or the network expects event counts and x has other values.
        """
        parts = x_TNCHW.split(SAMPLES_AT_ONCE, 1) if x_TNCHW.dim() == 5 else [x_TNCHW]
        logits_TNL = torch.cat([self.network(part.float(), per_step=True) for part in parts], 1)
        return logits_TNL if per_step else sum(logits_TNL[1:], logits_TNL[0]) / len(logits_TNL)  # as `step` does

    def step(self, frame_NCHW: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Compute one time step of a stream; see `SpikingNetwork.step`."""
        return self.network.step(frame_NCHW.float(), state)


class RoundedConv2d(nn.Conv2d):
    """A convolution of floats whose sums are computed in float64 and rounded to float32."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input.double(), self.weight.double(), None).float()


class RoundedLinear(nn.Linear):
    """A linear layer whose sums are computed in float64 and rounded to float32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.double(), self.weight.double(), self.bias.double()).float()


class Widen(nn.Module):
    """Convert uint8 to float32 after the last stage, because the mean over pixels is computed in float32."""

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return x.float()


def quantise_network(trained: SpikingNetwork, model: ModelConfig, counts: bool) -> Int8Network:
    """Return the int8 network of a trained one: norms folded, weights quantised.

    Args:
        trained: the network; it is not changed.
        model: its configuration.
        counts: True if its inputs are event counts.

    Raises:
        ValueError: a network of the user's own, or activations that would not be integers or could be too large for
            exact sums.
    """
    require_known(trained, "int8")
    folded = fold(trained)
    network = _skeleton(folded, model, counts)
    for name, layer in network.named_modules():
        if not isinstance(layer, Int8MLF):
            continue
        conv = folded.get_submodule(f"{name}.conv")
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        layer.bias.copy_(conv.bias)
        if isinstance(layer.conv, Int8Conv2d):
            integers, scale = quantise(conv.weight)
            layer.conv.weight.copy_(integers)
            layer.scale.copy_(scale)
        else:
            layer.conv.weight.copy_(conv.weight)
    _check_sums(network, model, "the network")
    return Int8Network(network, model, counts)


@dataclass(frozen=True)
class Exported:
    """Result of `export_run`."""

    path: Path
    size: int
    """Size of the file in bytes."""
    size_ratio: float
    """Size of the file divided by that of the float32 weights."""
    accuracy: float | None
    """Accuracy on the test set; None if it was not measured."""


def export_run(
    folder: Path, out: Path | None = None, which: str | None = None, score: Callable[[Path], float] | None = None
) -> Exported:
    """Export a run's "best" or "last" checkpoint as an int8 network.

    Args:
        folder: the run's folder.
        out: the file to write (default: CHECKPOINT-int8.safetensors in the folder).
        which: "best" or "last" (default: the one whose accuracy the summary reports).
        score: returns the accuracy of a file, which is then stored in it.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: the checkpoint is damaged, or int8 cannot represent its network.
    """
    run = load_run(folder, which)
    model, cfg = run.model, run.cfg
    provenance = make_provenance(folder, run.which)
    info = datasets.describe(cfg.data)
    network = quantise_network(model, cfg.model, info.events)
    path = out or folder / f"{run.which}-int8.safetensors"
    save_int8(path, network, provenance)
    accuracy = None if score is None else score(path)
    if accuracy is not None:
        provenance["accuracy"].append(accuracy_record(accuracy, "this int8 network", cfg, "multifire export --measure"))
        save_int8(path, network, provenance)
    size, parameters = path.stat().st_size, sum(p.numel() for p in model.parameters())
    return Exported(path, size, size / (4 * parameters), accuracy)


def save_int8(path: Path, network: Int8Network, provenance: dict[str, Any]) -> None:
    """Save the network and its provenance as one safetensors file."""
    description = {"model": dataclasses.asdict(network.model), "counts": network.counts}
    header = {
        "multifire": str(INT8_VERSION),
        "kind": "int8",
        "network": json.dumps(description),
        KEY: json.dumps(provenance),
    }
    write_tensors(path, network.network.state_dict(), header)


def load_int8(path: str | Path, backend: str = "auto") -> Int8Network:
    """Load an int8 network that `multifire export RUN --to int8` wrote.

    Args:
        path: the file.
        backend: "auto" or a name in `multifire.ops.BACKENDS`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, written by another program, or its tensors do not fit its header.
    """
    path, source = Path(path), str(path)
    header, tensors = read_tensors(path, {"int8": INT8_VERSION})
    provenance = read_provenance(stored(header, "null"), source)
    try:
        description = json.loads(header["network"])
        model, counts = model_config(description["model"], source), description["counts"]
        if type(counts) is not bool:
            raise TypeError(f"counts is {counts!r}")
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: its header does not describe its network ({error})") from None
    _check_size(model, tensors, source)
    network = _skeleton(fold(model_from_config(model, backend)), model, counts)
    expected = network.state_dict()
    check_keys(tensors, {name: tensor.shape for name, tensor in expected.items()}, source)
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype:
            raise ValueError(f"{source}: {name} is of {tensor.dtype}, expected {expected[name].dtype}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} contains values that are not finite")
    network.load_state_dict(tensors)
    _check_sums(network, model, source)
    return Int8Network(network, model, counts, provenance)


def _skeleton(folded: SpikingNetwork, model: ModelConfig, counts: bool) -> SpikingNetwork:
    """Return an int8 network with the layers and shapes of a folded one, whose weights are still to be filled in."""
    if folded.stem.neuron.signed:
        raise ValueError("int8 has activations 0, 1, 2, ..., found signed=True, whose levels also fire -1")
    try:
        residual, blocks = parse_model_name(model.name)
    except ValueError:
        raise ValueError(f"int8 is for ds_resnetD networks with depth D = 6n+2, found {model.name}") from None
    if residual != "ds":
        raise ValueError(f"{model.name} adds before firing, so sums are not integers; int8 is for ds_resnet networks")
    if largest_activation(model) > LARGEST_ACTIVATION:
        raise ValueError(
            f"{model.name} with {model.levels} levels has activations of up to {largest_activation(model)} "
            f"= levels · (1 + {blocks} blocks of a stage), expected at most {LARGEST_ACTIVATION}; use fewer levels"
        )
    network = copy.deepcopy(folded)
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, FoldedFire):
                setattr(parent, name, Int8MLF(_int8_conv(Int8Conv2d, layer.conv), layer.neuron))
    stem, shift = folded.stem, folded.input_norm
    if not counts:
        conv = RoundedConv2d(stem.conv.in_channels, stem.conv.out_channels, 3, padding=1, bias=False)
        network.add_module("stem", Int8MLF(conv, stem.neuron))
    else:
        mean = shift.mean.clone() if isinstance(shift, Shift) else None
        network.add_module("stem", Int8MLF(_int8_conv(CountConv2d, stem.conv), stem.neuron, mean))
        network.input_norm = None
    network.voting = RoundedLinear(folded.voting.in_features, folded.voting.out_features)
    network.voting.load_state_dict(folded.voting.state_dict())
    last_stage = network.stages[-1]
    assert isinstance(last_stage, nn.ModuleList)
    last_stage.append(Widen())
    return network.float().eval().requires_grad_(False)


def _int8_conv(kind: type[Int8Conv2d], conv: nn.Conv2d) -> Int8Conv2d:
    return kind(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])


def largest_activation(model: ModelConfig) -> int:
    """Return the largest possible activation, K·(1 + n): each of a stage's n blocks adds at most K."""
    return model.levels * (1 + parse_model_name(model.name)[1])


def _check_sums(network: SpikingNetwork, model: ModelConfig, source: str) -> None:
    """Raise a ValueError if a weight is -128, or if a layer's sums may exceed 2^24."""
    for name, layer in network.named_modules():
        if isinstance(layer, Int8Conv2d):
            if layer.weight.min() < -LARGEST_WEIGHT:
                raise ValueError(f"{source}: {name}.weight contains -128, expected -127 to 127")
            if not isinstance(layer, CountConv2d):  # a CountConv2d checks its sums for each input
                layer.check_sums(largest_activation(model), f"{source}: {name}")


def _check_size(model: ModelConfig, tensors: dict[str, Tensor], source: str) -> None:
    """Raise a ValueError if header and tensors describe different networks, before memory is allocated."""
    shape = tensors["stem.conv.weight"].shape if "stem.conv.weight" in tensors else None
    blocks = len({name.split(".")[2] for name in tensors if name.startswith("stages.0.")})
    classes = len(tensors.get("voting.bias", ()))
    found = (shape, blocks, classes)
    expected = ((model.width, model.in_channels, 3, 3), parse_model_name(model.name)[1], model.num_classes)
    if found != expected:
        raise ValueError(f"{source}: contains stem, blocks of a stage and classes {found}, its header says {expected}")
