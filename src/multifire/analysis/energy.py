"""Count the operations of an inference and estimate their energy, beside that of networks without time.

An event-driven chip adds a synapse's weight to a membrane for each arriving spike. An input integer n therefore counts
as n accumulates (AC) at each output that reads it, and a 0 costs nothing:

    SynOps = Σ |input| · fan-out      fan-out = outputs that read the input, exact at padded borders

Other inputs cost one multiply-accumulate (MAC) for each weight and output, including zeros and padding, as
`torch.utils.flop_counter` counts them (a MAC is 2 of its flops). In particular:

- the first convolution: MACs, once for a static image, whose currents are kept, and T times for frames of real numbers;
  SynOps for frames that count events. An input norm is folded into its weights;
- every other convolution, also in shortcuts, reads spikes and sums of spikes: SynOps; a convolution in a membrane
  shortcut reads currents: MACs, T times;
- a plain block's identity shortcut adds to the membranes: one accumulate a spike. A DS block's is summed after
  firing: its spikes travel on to the next layer, and are counted where they arrive;
- the voting layer reads averages over pixels: MACs, T times;
- norms are folded into the weights and cost nothing. Membrane updates, comparisons, averages and memory traffic are not
  counted. Memory traffic dominates on real hardware, so the figures compare networks; they do not predict a chip.

The same network without time (ANN) takes one pass in which every product is a MAC. The quantised ANN with K+1 levels
of activation (2K+1 if signed) takes one pass too, with activations of b = ⌈log2(levels)⌉ bits. A product with such a
number counts as b shifted conditional additions at the price of an AC each, also for a 0; its first and last layers are
MACs. The comparison with a quantised network follows Yan et al., "Reconsidering the energy efficiency of spiking neural
networks", arXiv 2409.08290.

Prices: 45 nm, fp32: addition 0.9 pJ, multiplication 3.7 pJ. Horowitz, "Computing's energy problem", ISSCC 2014.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from multifire.analysis.probe import LabelledBatches, preserve_state, run_batches
from multifire.nn import PlainBlock, SpikingNetwork
from multifire.nn.block import is_static_input

AC_PJ = 0.9
MAC_PJ = 4.6


@dataclass
class Connection:
    """A convolution, linear layer or identity shortcut, and its operations."""

    name: str
    kind: Literal["conv", "linear", "identity"]
    shape: tuple[int, ...]
    """Shape of the output for one sample and time step."""
    ann_macs: int
    """MACs of one pass of the same network as an ANN."""
    real: bool
    """True if the connection reads real numbers in a quantised network too."""
    macs: float = 0.0
    """Multiply-accumulates."""
    synops: float = 0.0
    """Synaptic operations: accumulates that spikes cause."""


@dataclass
class Energy:
    """Operations and energy of one inference, averaged over samples."""

    ac_pj: float
    """Energy of an accumulate in picojoules."""
    mac_pj: float
    """Energy of a multiply-accumulate in picojoules."""
    bits: int = 0
    """Number of bits of a quantised activation with K+1 levels."""
    samples: int = 0
    """Number of samples on which the operations are counted."""
    connections: list[Connection] = field(default_factory=list)
    """The connections in order of computation."""

    @property
    def macs(self) -> float:
        """Multiply-accumulates of an inference."""
        return sum(each.macs for each in self.connections)

    @property
    def synops(self) -> float:
        """Synaptic operations of an inference."""
        return sum(each.synops for each in self.connections)

    @property
    def snn_pj(self) -> float:
        """Energy of an inference of the spiking network in picojoules."""
        return self.macs * self.mac_pj + self.synops * self.ac_pj

    @property
    def ann_macs(self) -> int:
        """Multiply-accumulates of one pass of the same network as an ANN."""
        return sum(each.ann_macs for each in self.connections)

    @property
    def ann_pj(self) -> float:
        """Energy of one pass of the same network as an ANN in picojoules."""
        return self.ann_macs * self.mac_pj

    @property
    def quantised_pj(self) -> float:
        """Energy of one pass of the same network as a quantised ANN in picojoules."""
        return sum(each.ann_macs * (self.mac_pj if each.real else self.bits * self.ac_pj) for each in self.connections)


def measure_energy(
    model: SpikingNetwork,
    batches: LabelledBatches,
    *,
    ac_pj: float = AC_PJ,
    mac_pj: float = MAC_PJ,
    precision: str = "fp32",
) -> Energy:
    """Count MACs and SynOps of an inference and compute their energy, in the model's mode; see the module's text.

    Args:
        model: the network.
        batches: x [T, N, C, H, W] and labels y [N]; the labels are not used.
        ac_pj: energy of an accumulate in picojoules.
        mac_pj: energy of a multiply-accumulate in picojoules.
        precision: "bf16" runs convolutions under autocast.

    Raises:
        ValueError: there is no sample, or a price that is not above 0.
    """
    with preserve_state(model), count_operations(model, ac_pj, mac_pj) as counter:
        run_batches(model, batches, precision)
    return counter.result()


@contextlib.contextmanager
def count_operations(model: SpikingNetwork, ac_pj: float, mac_pj: float) -> Iterator["OperationCounter"]:
    """Count the operations of the model while it runs inside the context."""
    for name, price in (("ac_pj", ac_pj), ("mac_pj", mac_pj)):
        if not 0 < price < math.inf:
            raise ValueError(f"{name} is {price}, expected picojoules above 0")
    counter = OperationCounter(model, ac_pj, mac_pj)
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.register_forward_pre_hook(counter.before_network))
        for name, module in model.named_modules():
            hook = None
            if isinstance(module, nn.Conv2d):
                hook = counter.after_first_conv if module is model.stem.conv else counter.after_conv
            elif isinstance(module, nn.Linear):
                hook = counter.after_linear
            elif isinstance(module, PlainBlock) and module.shortcut is None:
                name, hook = f"{name}.shortcut", counter.after_identity
            if hook is not None:
                stack.enter_context(module.register_forward_hook(_named(name, hook)))
        yield counter


def _named(name: str, hook):
    return lambda module, inputs, out: hook(name, module, inputs[0].detach(), out)


class OperationCounter:
    """Forward hooks that count the operations of each connection over all samples."""

    def __init__(self, model: SpikingNetwork, ac_pj: float, mac_pj: float):
        neuron = model.stem.neuron
        largest = neuron.levels * (2 if neuron.signed else 1)  # of activations, counted from the smallest
        self._energy = Energy(ac_pj, mac_pj, bits=largest.bit_length())
        self._connections: dict[str, Connection] = {}
        self._input: Tensor | None = None

    def before_network(self, _model: nn.Module, inputs: tuple[Tensor]) -> None:
        self._input = inputs[0]
        self._energy.samples += inputs[0].shape[1]

    def after_first_conv(self, name: str, conv: nn.Conv2d, x: Tensor, out: Tensor) -> None:
        assert self._input is not None
        connection = self._convolution(name, conv, out, real=True)
        timesteps, samples = self._input.shape[:2]
        if is_static_input(self._input):
            connection.macs += samples * connection.ann_macs
        elif are_counts(self._input):
            connection.synops += accumulates(conv, self._input.flatten(0, 1), out)
        else:
            connection.macs += timesteps * samples * connection.ann_macs

    def after_conv(self, name: str, conv: nn.Conv2d, x: Tensor, out: Tensor) -> None:
        connection = self._convolution(name, conv, out, real=not (integers := are_integers(x)))
        if integers:
            connection.synops += accumulates(conv, x, out)
        else:  # a shortcut that carries currents
            connection.macs += len(x) * connection.ann_macs

    def after_linear(self, name: str, linear: nn.Linear, x: Tensor, out: Tensor) -> None:
        shape, macs = (linear.out_features,), linear.in_features * linear.out_features
        connection = self._get_or_add(Connection(name, "linear", shape, macs, real=True))
        connection.macs += macs * out.numel() // linear.out_features

    def after_identity(self, name: str, _block: nn.Module, x: Tensor, out: Tensor) -> None:
        connection = self._get_or_add(Connection(name, "identity", tuple(x.shape[2:]), 0, real=False))
        connection.synops += x.abs().sum(dtype=torch.float64).item()

    def result(self) -> Energy:
        energy = self._energy
        for connection in self._connections.values():
            connection.macs /= energy.samples
            connection.synops /= energy.samples
        energy.connections = list(self._connections.values())
        return energy

    def _convolution(self, name: str, conv: nn.Conv2d, out: Tensor, real: bool) -> Connection:
        macs = out[0].numel() * conv.weight[0].numel()
        return self._get_or_add(Connection(name, "conv", tuple(out.shape[1:]), macs, real))

    def _get_or_add(self, connection: Connection) -> Connection:
        return self._connections.setdefault(connection.name, connection)


def are_counts(x: Tensor) -> bool:
    """Return True if all values of x are integers >= 0."""
    return bool((x >= 0).all()) and are_integers(x)


def are_integers(x: Tensor) -> bool:
    """Return True if all values of x are integers."""
    return bool((x == x.floor()).all())


def accumulates(conv: nn.Conv2d, x_NCHW: Tensor, out_NCHW: Tensor) -> float:
    """Return Σ |input| · fan-out: the number of accumulates that integers x cost in a convolution."""
    fan_out_HW = fan_out(conv, x_NCHW.shape[2:], out_NCHW.shape[2:], x_NCHW.device)
    return (x_NCHW.abs().sum((0, 1), dtype=torch.float64) * fan_out_HW).sum().item()


def fan_out(conv: nn.Conv2d, size: Sequence[int], out_size: Sequence[int], device: torch.device) -> Tensor:
    """Return the number of outputs that read each pixel [H, W] of an input channel, which is smaller at borders."""
    height, width = (
        _readers(*numbers, device)
        for numbers in zip(size, out_size, conv.kernel_size, conv.stride, _padding(conv), strict=True)
    )
    return conv.out_channels * height[:, None] * width


def _readers(size: int, out_size: int, kernel: int, stride: int, padding: int, device: torch.device) -> Tensor:
    """Return for each pixel of a line the number of outputs whose kernel covers it."""
    pixel = torch.arange(size, device=device)[:, None]
    first = torch.arange(out_size, device=device) * stride - padding
    return ((first <= pixel) & (pixel < first + kernel)).sum(1)


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(conv.padding, str)
    return conv.padding
