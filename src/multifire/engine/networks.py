"""The ways to compute a trained network: the native engine for int8 weights, torch for everything else.

Shapes: T time steps, N samples, C channels, H rows, W columns, L classes.
"""

import json
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from multifire.config import RunConfig, json_format
from multifire.engine import native
from multifire.export import fold
from multifire.export.int8 import INT8_VERSION, export_run, load_int8
from multifire.export.provenance import read_provenance, stored
from multifire.nn import SpikingNetwork, require_known
from multifire.training.load_run import load_run
from multifire.utils.device import autocast, pick_device
from multifire.utils.tensor_files import read_tensors

EngineChoice = Literal["auto", "native", "torch"]


class StreamNetwork(Protocol):
    """A network that is computed frame by frame."""

    def reset(self) -> None:
        """Begin a new sample: set all membranes to zero."""

    def step(self, frame_CHW: np.ndarray) -> np.ndarray:
        """Compute a frame [C, H, W]; return the mean logits [L] of the frames since the reset."""
        ...


class TorchNetwork:
    """A `StreamNetwork` in torch.

    Args:
        model: the network, in evaluation mode.
        device: its device.
        precision: "fp32" or "bf16".
        dtype: type of the model's parameters.
    """

    def __init__(
        self,
        model: SpikingNetwork,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        dtype: torch.dtype = torch.float32,
    ):
        self._model, self._device, self._precision, self._dtype = model, torch.device(device), precision, dtype
        self._state = None

    def reset(self) -> None:
        self._state = None

    @torch.inference_mode()
    def step(self, frame_CHW: np.ndarray) -> np.ndarray:
        frame_NCHW = torch.from_numpy(frame_CHW)[None]
        x_NCHW = frame_NCHW.to(self._device, self._dtype, memory_format=torch.channels_last)
        with autocast(self._device, self._precision):
            logits_NL, self._state = self._model.step(x_NCHW, self._state)
        return logits_NL[0].float().cpu().numpy()


class NativeNetwork(nn.Module):
    """An engine with the interface of a network in torch, for `multifire.analysis.evaluate`."""

    def __init__(self, engine: native.Engine):
        super().__init__()
        self.engine, self.num_classes = engine, engine.info.classes

    def forward(self, x_TNCHW: Tensor, *, per_step: bool = False) -> Tensor:
        """Return logits [N, L], averaged over time; with `per_step`, of each time step [T, N, L]."""
        logits = self.engine.run(x_TNCHW.numpy(), per_step=per_step, threads=torch.get_num_threads())
        return torch.from_numpy(logits)


class Opened(NamedTuple):
    """A network that is ready for a stream."""

    network: StreamNetwork
    cfg: RunConfig
    about: str
    """How it is computed, in words."""


def open_network(source: Path, which: str | None, device: str, choice: EngineChoice) -> Opened:
    """Open a run or an exported int8 file as a network for streams.

    "auto" takes the native engine for int8 files, and on a CPU for runs that int8 can hold. Where that engine is not
    built, it takes torch.

    Raises:
        FileNotFoundError: no such run, checkpoint or file.
        ValueError: the source is damaged, the chosen engine does not compute its network, or "native" is not built.
    """
    if choice == "native" and not native.is_built():
        raise ValueError(f"{native.NOT_BUILT}; or leave out --engine native")
    if source.is_file():
        cfg = config_of_file(source)
        use_torch = choice == "torch" or not native.is_built()
        return _torch_int8(source, cfg) if use_torch else _native(source, cfg)
    if choice == "native":
        return _native_run(source, which)
    if choice == "auto" and native.is_built() and pick_device(device).type == "cpu":
        try:
            return _native_run(source, which)
        except ValueError:  # int8 cannot hold the network; if the run is damaged, the next line says so
            pass
    return _torch_run(source, which, device)


def config_of_file(path: Path) -> RunConfig:
    """Return the configuration of the run that an exported int8 file is from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or saved without provenance.
    """
    header, _ = read_tensors(path, {"int8": INT8_VERSION})
    provenance = read_provenance(stored(header, "null"), str(path))
    values = {"version": json_format.CONFIG_VERSION, **provenance["config"]}
    return json_format.from_json(json.dumps(values), str(path))


def _native(path: Path, cfg: RunConfig) -> Opened:
    engine = native.load(path)
    return Opened(engine, cfg, f"native engine, int8 weights, {engine.info.isa}")


def _native_run(folder: Path, which: str | None) -> Opened:
    """Export the run to int8 and load it; its file is not kept."""
    with tempfile.TemporaryDirectory() as temporary:
        path = export_run(folder, Path(temporary) / "network.safetensors", which).path
        return _native(path, config_of_file(path))


def _torch_int8(path: Path, cfg: RunConfig) -> Opened:
    return Opened(TorchNetwork(load_int8(path)), cfg, "torch, int8 weights")  # pyright: ignore[reportArgumentType] - same interface


def _torch_run(folder: Path, which: str | None, device: str) -> Opened:
    target, run = pick_device(device), load_run(folder, which)
    require_known(run.model, "multifire run")
    model = fold(run.model).to(target)  # computes the same in less time
    return Opened(TorchNetwork(model, target, run.cfg.precision), run.cfg, f"torch, {run.cfg.precision} weights")
