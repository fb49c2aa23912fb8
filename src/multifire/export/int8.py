"""A DS-ResNet in integers: weights of 8 bits, activations that are small integers anyway, 32-bit sums.

A convolution of bytes with 8-bit weights gives exact integers; one pass scales them, adds the folded norm's bias,
fires, adds the shortcut and writes bytes. Quantising the weights is thus the only thing that is approximated.

Shapes: T time steps, N samples, O output channels, I input channels, H rows, W columns.
"""

import copy
import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multifire import datasets, ops
from multifire.analysis.evaluate import evaluate
from multifire.config import ModelConfig
from multifire.config.architecture import parse_model_name
from multifire.config.json_format import model_config
from multifire.datasets.loader import make_batches
from multifire.export.fold import FoldedFire, Shift, fold
from multifire.export.provenance import KINDS, accuracy_record, make_provenance, read_provenance
from multifire.nn import MLF, SpikingResNet, Stream, Streaming, StreamState, model_from_config
from multifire.nn.block import convolve, is_static_input
from multifire.nn.conv import pick_pixels
from multifire.training.load_run import load_run
from multifire.utils.log import log
from multifire.utils.progress import Bar
from multifire.utils.tensor_files import check_keys, read_tensors, write_tensors

INT8_VERSION = KINDS["int8"]
LARGEST_WEIGHT = 127
LARGEST_ACTIVATION = 129
"""Without VNNI, a processor adds products in pairs, in 16 bits: 2·129·127 = 32,766 still fits, 2·130·127 does not."""
LARGEST_SUM = 2**24
"""Up to here every integer is a float32 too, the type in which the vendor's convolution hands out its 32-bit sums."""
COMPARISONS = 5
"""How often a layer's vendor convolution is compared with exact sums before it is used on a shape."""
CANDIDATES = 80
SAMPLES_AT_ONCE = 8
"""A batch is computed in parts of so many samples, whose sums then stay in the processor's cache."""


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [O, ...] in -127..127 and a scale [O] with weight ≈ scale·integers, of least squared error per channel.

    Clipping the largest weights makes all others finer, so scales down to 0.8 of what the largest asks for are tried.
    """
    weight_OX = weight.detach().double().flatten(1)
    largest_O1 = weight_OX.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best_O1, error_O1 = largest_O1, torch.full_like(largest_O1, math.inf)
    for share in torch.linspace(0.8, 1, CANDIDATES).tolist():
        scale_O1 = (share * largest_O1 / LARGEST_WEIGHT).float().double()
        error = (_round(weight_OX, scale_O1) * scale_O1 - weight_OX).square().sum(1, keepdim=True)
        best_O1, error_O1 = torch.where(error < error_O1, scale_O1, best_O1), torch.minimum(error, error_O1)
    return _round(weight_OX, best_O1).to(torch.int8).view(weight.shape), best_O1.squeeze(1).float()


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)


class Int8Conv2d(nn.Module):
    """Convolution of bytes with 8-bit weights: the exact integer sums, as float32.

    oneDNN computes them, once it has been compared with exact sums for this layer and this shape. Where it is missing
    or wrong a float convolution does, in which sums below 2^24 are exact too.
    """

    def __init__(self, before: int, after: int, kernel: int, stride: int):
        super().__init__()
        self.stride, self.padding = [stride, stride], [kernel // 2, kernel // 2]
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(after, before, kernel, kernel, dtype=torch.int8))
        self._picks = kernel == 1 and stride > 1
        self._packed: Tensor | None = None
        self._exact: dict[tuple[int, ...], bool] = {}

    def forward(self, x_NIHW: Tensor) -> Tensor:
        if self._picks:  # see multifire.nn.conv.reads_single_pixels
            x_NIHW = pick_pixels(x_NIHW, self.stride).contiguous(memory_format=torch.channels_last)
        key = (*x_NIHW.shape, torch.get_num_threads())
        if key not in self._exact:
            self._exact[key] = vendor_has_int8() and self._vendor_is_exact(x_NIHW.shape)
        return self._vendor_sums(x_NIHW) if self._exact[key] else self._float_sums(x_NIHW.float())

    def _vendor_sums(self, x_NIHW: Tensor) -> Tensor:
        stride = [1, 1] if self._picks else self.stride
        if self._packed is None:
            self._packed = _pack(self.weight, stride, self.padding)
        return _integer_conv(x_NIHW, self._packed, len(self.weight), stride, self.padding)

    def _float_sums(self, x_NIHW: Tensor) -> Tensor:
        stride = [1, 1] if self._picks else self.stride
        return F.conv2d(x_NIHW, self.weight.to(x_NIHW.dtype), None, stride, self.padding)

    def _vendor_is_exact(self, shape: torch.Size) -> bool:
        """Compare the vendor's sums with exact ones, several times: a race is not wrong in every call.

        The first sample is all of the largest activation, which saturates where anything does; the others are random.
        """
        noise = torch.Generator().manual_seed(0)
        x = torch.randint(0, LARGEST_ACTIVATION + 1, shape, generator=noise, dtype=torch.uint8)
        x[:1] = LARGEST_ACTIVATION
        x = x.contiguous(memory_format=torch.channels_last)
        expected = self._float_sums(x.double()).float()
        wrong = sum(not torch.equal(self._vendor_sums(x), expected) for _ in range(COMPARISONS))
        if wrong:
            log.warning(
                "this machine's int8 convolution of %s by %s gave wrong sums in %d of %d calls; a float convolution "
                "computes them instead, slowly", list(shape), list(self.weight.shape), wrong, COMPARISONS,
            )  # fmt: skip
        return not wrong

    def check_sums(self, largest: int, source: str) -> None:
        """Refuse weights whose sums over inputs 0..largest would not be exact.

        Raises:
            ValueError: a sum may exceed 2^24.
        """
        most = largest * int(self.weight.int().abs().flatten(1).sum(1).max())
        if most > LARGEST_SUM:
            raise ValueError(f"{source}: sums of up to {most:,} may occur, expected at most {LARGEST_SUM:,}")


class CountConv2d(Int8Conv2d):
    """The same of event counts of any size, in floating point: their digits to the base 128 are convolved by turns."""

    BASE = 128

    def forward(self, x_NIHW: Tensor) -> Tensor:
        digits = x_NIHW.round()
        largest = int(digits.max()) if digits.numel() else 0
        if not torch.equal(digits, x_NIHW) or (digits.numel() and digits.min() < 0):
            raise ValueError("the network takes event counts, found values that are not integers from 0 up")
        self.check_sums(largest, f"event counts of up to {largest:,}")
        sums, worth = super().forward(_bytes(digits % self.BASE)), 1
        while largest >= self.BASE:
            digits, largest, worth = (
                digits.div(self.BASE, rounding_mode="floor"),
                largest // self.BASE,
                worth * self.BASE,
            )
            sums = sums + worth * super().forward(_bytes(digits % self.BASE))
        return sums


def _bytes(x_NIHW: Tensor) -> Tensor:
    return x_NIHW.to(torch.uint8, memory_format=torch.channels_last)


class Int8MLF(Streaming):
    """o = MLF(scale·conv(x - mean) + bias) + add_after in bytes; a FoldedFire whose activations are integers.

    Only the stem of a network with an input norm has a mean. Its share of the sums differs along the borders, where the
    window hangs over the edge, and is part of the bias.
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
        """What is added to scale·sums: [O], or [O, H, W]."""
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
        sums = convolve(self.conv, x_TNIHW)  # pyright: ignore[reportArgumentType] - a convolution of bytes is one too
        spikes, state = ops.mlf_uint8(
            sums,
            self.scale,
            self.bias_at(*sums.shape[3:]),
            self.neuron.thresholds,
            self.neuron.decay,
            add_after=add_after,
            state=stream and stream.take(),
            return_state=stream is not None,
            timesteps=timesteps,
            backend=self.neuron.backend,
        )
        if stream is not None and state is not None:
            stream.put(state)
        return spikes


class Int8Network(nn.Module):
    """What `quantise_network` makes and `load_int8` reads: called as the network that it came from, on a CPU.

    `counts` says that the input is event counts, which the stem takes as integers; images it takes as floats.
    """

    def __init__(
        self, network: SpikingResNet, model: ModelConfig, counts: bool, passport: dict[str, Any] | None = None
    ):
        super().__init__()
        self.network, self.model, self.counts, self.passport = network, model, counts, passport
        self.num_classes = network.num_classes

    @torch.no_grad()
    def forward(self, x_TNCHW: Tensor, *, per_step: bool = False) -> Tensor:
        """Logits [N, classes], averaged over time; with `per_step`, [T, N, classes].

        Raises:
            ValueError: x is not [T, N, in_channels, H, W], or holds other than counts where they are expected.
        """
        parts = x_TNCHW.split(SAMPLES_AT_ONCE, 1) if x_TNCHW.dim() == 5 else [x_TNCHW]
        logits_TNK = torch.cat([self.network(part.float(), per_step=True) for part in parts], 1)
        return logits_TNK if per_step else logits_TNK.mean(0)

    def step(self, frame_NCHW: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """One time step of a stream; see `SpikingResNet.step`."""
        return self.network.step(frame_NCHW.float(), state)


class Widen(nn.Module):
    """Bytes to floats, at the end of the last stage: pooling and voting are computed in floating point."""

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return x.float()


def quantise_network(trained: SpikingResNet, model: ModelConfig, counts: bool) -> Int8Network:
    """The trained network with its norms folded and its weights in 8 bits.

    Raises:
        ValueError: a network whose activations are not integers, or may be too large for exact sums.
    """
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
    """What `export_run` wrote."""

    path: Path
    size: int
    """Bytes."""
    share: float
    """Of the bytes that the network's weights take in float32."""
    accuracy: float | None
    """On the test set, where it was measured."""


def export_run(
    folder: Path, out: Path | None = None, which: str | None = None, measure: bool = False, root: str | None = None
) -> Exported:
    """Write a run's checkpoint, "best" or "last", as an int8 network; `measure` scores that on the test set first.

    Raises:
        FileNotFoundError: no such run, checkpoint or data.
        ValueError: a damaged checkpoint, or a network that int8 cannot hold.
    """
    run = load_run(folder, which)
    model, cfg = run.model, run.cfg
    passport = make_provenance(folder, run.which)
    info = datasets.get_info(cfg.data.name)
    network, accuracy = quantise_network(model, cfg.model, info.events), None
    if measure:
        data = datasets.load(cfg.data.name, cfg.data.root if root is None else root, cfg.data)
        device = torch.device("cpu")
        batches = make_batches(data.test, info, cfg.data, batch_size=cfg.eval_batch_size, device=device, shuffle=False)
        with Bar("evaluating", len(batches)) as bar:
            accuracy = evaluate(network, batches, on_batch=bar.advance).accuracy  # pyright: ignore[reportArgumentType] - it is called as one
        passport["accuracy"].append(accuracy_record(accuracy, "this int8 network", cfg, "multifire export --measure"))
    path = out or folder / f"{run.which}-int8.safetensors"
    save_int8(path, network, passport)
    size, floats = path.stat().st_size, sum(p.numel() for p in model.parameters())
    return Exported(path, size, size / (4 * floats), accuracy)


def save_int8(path: Path, network: Int8Network, passport: dict[str, Any]) -> None:
    """Write the network as one safetensors file, with its passport in the header."""
    about = {"model": dataclasses.asdict(network.model), "counts": network.counts}
    header = {
        "multifire": str(INT8_VERSION),
        "kind": "int8",
        "network": json.dumps(about),
        "passport": json.dumps(passport),
    }
    write_tensors(path, network.network.state_dict(), header)


def load_int8(path: str | Path, backend: str = "auto") -> Int8Network:
    """The network that `multifire export RUN --to int8` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another program's, or with tensors that are no such network's.
    """
    path, source = Path(path), str(path)
    header, tensors = read_tensors(path, {"int8": INT8_VERSION})
    passport = read_provenance(header.get("passport", "null"), source)
    try:
        about = json.loads(header["network"])
        model, counts = model_config(about["model"], source), about["counts"]
        if type(counts) is not bool:
            raise TypeError(f"counts is {counts!r}")
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: its header does not say which network it is ({error})") from None
    _check_size(model, tensors, source)
    network = _skeleton(fold(model_from_config(model, backend)), model, counts)
    expected = network.state_dict()
    check_keys(tensors, {name: tensor.shape for name, tensor in expected.items()}, source)
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype:
            raise ValueError(f"{source}: {name} is of {tensor.dtype}, expected {expected[name].dtype}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} holds values that are not finite")
    network.load_state_dict(tensors)
    _check_sums(network, model, source)
    return Int8Network(network, model, counts, passport)


def _skeleton(folded: SpikingResNet, model: ModelConfig, counts: bool) -> SpikingResNet:
    """A network of the same shapes with layers for bytes, which are still to be filled."""
    residual, blocks = parse_model_name(model.name)
    if residual != "ds":
        raise ValueError(f"{model.name} adds before firing, where sums are no integers; int8 is for ds_resnet networks")
    if largest_activation(model) > LARGEST_ACTIVATION:
        raise ValueError(
            f"{model.name} with {model.levels} levels has activations of up to {largest_activation(model)} "
            f"= levels · (1 + {blocks} blocks of a stage), expected at most {LARGEST_ACTIVATION}; use fewer levels"
        )
    network = copy.deepcopy(folded)
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, FoldedFire):
                setattr(parent, name, Int8MLF(_byte_conv(Int8Conv2d, layer.conv), layer.neuron))
    stem, shift = folded.stem, folded.input_norm
    if not counts:
        floating = copy.deepcopy(stem.conv)
        floating.bias = None
        network.add_module("stem", Int8MLF(floating, stem.neuron))
    else:
        mean = shift.mean.clone() if isinstance(shift, Shift) else None
        network.add_module("stem", Int8MLF(_byte_conv(CountConv2d, stem.conv), stem.neuron, mean))
        network.input_norm = None
    last_stage = network.stages[-1]
    assert isinstance(last_stage, nn.ModuleList)
    last_stage.append(Widen())
    return network.float().eval().requires_grad_(False)


def _byte_conv(kind: type[Int8Conv2d], conv: nn.Conv2d) -> Int8Conv2d:
    return kind(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])


def largest_activation(model: ModelConfig) -> int:
    """The largest value that an activation can take: each block of a stage adds at most K to what enters the stage."""
    return model.levels * (1 + parse_model_name(model.name)[1])


def _check_sums(network: SpikingResNet, model: ModelConfig, source: str) -> None:
    for name, layer in network.named_modules():
        if isinstance(layer, Int8Conv2d):
            if layer.weight.min() < -LARGEST_WEIGHT:
                raise ValueError(f"{source}: {name}.weight holds -128, expected -127 to 127")
            if not isinstance(layer, CountConv2d):  # which knows its largest input only when it sees it
                layer.check_sums(largest_activation(model), f"{source}: {name}")


def _check_size(model: ModelConfig, tensors: dict[str, Tensor], source: str) -> None:
    """Refuse a header that asks for another network than the tensors are of, before memory is taken for it."""
    shape = tensors["stem.conv.weight"].shape if "stem.conv.weight" in tensors else None
    blocks = len({name.split(".")[2] for name in tensors if name.startswith("stages.0.")})
    classes = len(tensors.get("voting.bias", ()))
    found = (shape, blocks, classes)
    expected = ((model.width, model.in_channels, 3, 3), parse_model_name(model.name)[1], model.num_classes)
    if found != expected:
        raise ValueError(f"{source}: holds stem, blocks of a stage and classes {found}, its header says {expected}")


@functools.cache
def vendor_has_int8() -> bool:
    """Whether this build of torch has oneDNN's int8 convolution."""
    found = hasattr(torch.ops.onednn, "qconv_pointwise")
    if not found:
        log.info("torch has no int8 convolution here; float convolutions compute the integer sums")
    return found


def _pack(weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    ones = torch.ones(len(weight))
    return torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, stride, padding, [1, 1], 1, None)


def _integer_conv(x: Tensor, packed: Tensor, channels: int, stride: list[int], padding: list[int]) -> Tensor:
    """Sums in float32: every scale is 1, every zero point 0, and nothing is applied to them."""
    scales, zeros = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    return torch.ops.onednn.qconv_pointwise(
        x, 1.0, 0, packed, scales, zeros, None, stride, padding, [1, 1], 1, 1.0, 0, torch.float32, "none", [], ""
    )
