"""Networks small enough to count neuron by neuron, and a naive implementation that counts one number at a time."""

import numpy as np
import torch

import multifire as mf
from multifire.nn import ConvFire, ConvNorm, DSBlock, SpikingResNet

T, N, SIZE = 3, 2, 5


def network(block: str, levels: int, backend: str = "reference", **options) -> SpikingResNet:
    """Return a network of a stem and three blocks of width 2, whose norms have random parameters and statistics."""
    torch.manual_seed(levels)
    model = mf.build_model(
        f"{block}_resnet8", in_channels=2, num_classes=3, width=2, levels=levels, backend=backend, **options
    )
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if ".norm." in name:
                tensor.add_(0.5 * torch.rand_like(tensor))
    return model.double() if backend == "reference" else model


def event_frames(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return frames of random event counts."""
    torch.manual_seed(5)
    return torch.randint(0, 4, (T, N, 2, SIZE, SIZE)).to(dtype)


def labels() -> torch.Tensor:
    return torch.tensor([2, 0])


def convolve(x, conv):
    """Convolve with loops over outputs and weights; also return the number of accumulates for an integer input."""
    weight, stride, pad = conv.weight.detach().double().numpy(), conv.stride[0], conv.padding[0]
    samples, _, height, width = x.shape
    channels_out, channels_in, kernel, _ = weight.shape
    out = np.zeros(
        (samples, channels_out, (height + 2 * pad - kernel) // stride + 1, (width + 2 * pad - kernel) // stride + 1)
    )
    accumulates = 0
    for n, o, i, j in np.ndindex(out.shape):
        for c, a, b in np.ndindex(channels_in, kernel, kernel):
            row, column = i * stride + a - pad, j * stride + b - pad
            if 0 <= row < height and 0 <= column < width:
                out[n, o, i, j] += weight[o, c, a, b] * x[n, c, row, column]
                accumulates += x[n, c, row, column]
    return out, accumulates


def normalise(x, norm):
    """Return tdBN of x [T, N, C, H, W], in training or evaluation mode like the norm."""
    mean, var = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
    if norm.training:
        mean, var = x.mean((0, 1, 3, 4)), x.var((0, 1, 3, 4))
    weight, bias = (p.detach().double().numpy() for p in (norm.weight, norm.bias))
    factor = weight * norm.alpha * norm.v_threshold / (np.sqrt(var) + norm.eps)
    return (x - mean[:, None, None]) * factor[:, None, None] + bias[:, None, None]


class NaiveNetwork:
    """Runs the network naively and records, for each layer and connection, the values that the measures must find."""

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
        """Compute every neuron separately, one level after the other."""
        y = self.norm_conv(layer, x) + add_before
        neuron, thresholds = layer.neuron, layer.neuron.thresholds
        spikes, dormant = np.zeros(y.shape), 0
        fired = np.zeros((len(thresholds), len(y)))
        membranes = [[] for _ in thresholds]
        for index in np.ndindex(y.shape[1:]):
            active = False
            for k, threshold in enumerate(thresholds):
                u = s = 0.0
                for t in range(len(y)):
                    u = neuron.decay * u * (1 - s) + y[t][index]
                    s = 1.0 if u > threshold else 0.0
                    spikes[t][index] += s
                    fired[k, t] += s
                    membranes[k].append(u)
                    active = active or derivative(u - threshold, neuron) != 0
            dormant += not active
        name, units = self.names[layer], y[0].size
        self.dormant[name], self.rate[name], self.membranes[name] = dormant / units, fired / units, membranes
        return spikes


def derivative(v: float, neuron) -> float:
    if neuron.surrogate == "rect":
        return 1 / neuron.width if abs(v) < neuron.width / 2 else 0.0
    if neuron.surrogate == "triangle":
        return max(0.0, 1 - abs(v) / neuron.width) / neuron.width
    return 1 / (neuron.width * (1 + (np.pi * v / neuron.width) ** 2))
