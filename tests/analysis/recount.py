"""Networks small enough to be counted neuron by neuron, and a naive count of them, one number at a time."""

import numpy as np
import torch

import multifire as mf
from multifire.nn import ConvFire, ConvNorm, DSBlock, SpikingResNet

T, N, SIZE = 3, 2, 5


def network(block: str, levels: int, backend: str = "reference", **options) -> SpikingResNet:
    """A stem and three blocks of width 2, with norms that are not those of a new network."""
    torch.manual_seed(levels)
    model = mf.build_model(
        f"{block}_resnet8", in_channels=2, num_classes=3, width=2, levels=levels, backend=backend, **options
    )
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if ".norm." in name:
                tensor.add_(0.5 * torch.rand_like(tensor))
    return model.double() if backend == "reference" else model


def counts(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Frames of events."""
    torch.manual_seed(5)
    return torch.randint(0, 4, (T, N, 2, SIZE, SIZE)).to(dtype)


def labels() -> torch.Tensor:
    return torch.tensor([2, 0])


def convolve(x, conv):
    """Loops over every output and every weight; also how many accumulates the input's integers cause."""
    weight, stride, pad = conv.weight.detach().double().numpy(), conv.stride[0], conv.padding[0]
    samples, _, height, width = x.shape
    after, before, kernel, _ = weight.shape
    out = np.zeros(
        (samples, after, (height + 2 * pad - kernel) // stride + 1, (width + 2 * pad - kernel) // stride + 1)
    )
    accumulates = 0
    for n, o, i, j in np.ndindex(out.shape):
        for c, a, b in np.ndindex(before, kernel, kernel):
            row, column = i * stride + a - pad, j * stride + b - pad
            if 0 <= row < height and 0 <= column < width:
                out[n, o, i, j] += weight[o, c, a, b] * x[n, c, row, column]
                accumulates += x[n, c, row, column]
    return out, accumulates


def normalise(x, norm):
    """tdBN of x [T, N, C, H, W], in the mode that the norm is in."""
    mean, var = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
    if norm.training:
        mean, var = x.mean((0, 1, 3, 4)), x.var((0, 1, 3, 4))
    weight, bias = (p.detach().double().numpy() for p in (norm.weight, norm.bias))
    factor = weight * norm.alpha * norm.v_threshold / (np.sqrt(var) + norm.eps)
    return (x - mean[:, None, None]) * factor[:, None, None] + bias[:, None, None]


class Recount:
    """Runs the network and notes, by layer and by connection, what the measures ought to find."""

    def __init__(self, model: SpikingResNet, x: torch.Tensor):
        self.dormant, self.rate, self.membranes, self.synops = {}, {}, {}, {}
        self.names = {module: name for name, module in model.named_modules()}
        out = self.fire(model.stem, x.double().numpy())
        for stage in model.stages:
            for block in stage:
                out = self.block(block, out)
        self.out = out

    def block(self, block, x):
        if isinstance(block, DSBlock):
            residual = x if block.shortcut is None else self.fire(block.shortcut, x)
            return self.fire(block.fire2, self.fire(block.fire1, x)) + residual
        if block.shortcut is None:
            residual = x
            self.synops[f"{self.names[block]}.shortcut"] = x.sum()
        else:
            residual = self.norm_conv(block.shortcut, x)
        return self.fire(block.fire2, self.fire(block.fire1, x), residual)

    def norm_conv(self, layer: ConvFire | ConvNorm, x):
        frames = [convolve(frame, layer.conv) for frame in x]
        self.synops[self.names[layer.conv]] = sum(accumulates for _, accumulates in frames)
        return normalise(np.stack([out for out, _ in frames]), layer.norm)

    def fire(self, layer: ConvFire, x, add_before=0.0):
        """Every neuron on its own, one level after the other."""
        y = self.norm_conv(layer, x) + add_before
        neuron, thresholds = layer.neuron, layer.neuron.thresholds
        spikes, dormant = np.zeros(y.shape), 0
        fired = np.zeros((len(thresholds), len(y)))
        membranes = [[] for _ in thresholds]
        for place in np.ndindex(y.shape[1:]):
            awake = False
            for k, threshold in enumerate(thresholds):
                u = s = 0.0
                for t in range(len(y)):
                    u = neuron.decay * u * (1 - s) + y[t][place]
                    s = 1.0 if u > threshold else 0.0
                    spikes[t][place] += s
                    fired[k, t] += s
                    membranes[k].append(u)
                    awake = awake or derivative(u - threshold, neuron) != 0
            dormant += not awake
        name, units = self.names[layer], y[0].size
        self.dormant[name], self.rate[name], self.membranes[name] = dormant / units, fired / units, membranes
        return spikes


def derivative(v: float, neuron) -> float:
    if neuron.surrogate == "rect":
        return 1 / neuron.width if abs(v) < neuron.width / 2 else 0.0
    if neuron.surrogate == "triangle":
        return max(0.0, 1 - abs(v) / neuron.width) / neuron.width
    return 1 / (neuron.width * (1 + (np.pi * v / neuron.width) ** 2))
