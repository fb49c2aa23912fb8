"""`python -m benchmarks.engine`: time the native engine beside torch's int8 and fp32 and ONNX Runtime's, in turns.

Streams: one frame at a time, on one core: the networks of `dvs-gesture` and `nmnist` on events, and `digits`.
Batches: 64 images of the networks of `cifar10-small`, trained, and `cifar10`, on all cores.
Density: the same `cifar10` network with its activations made sparser by lower currents.

Weights are random where the package has no trained ones; the running statistics of the norms are then those of the
frames. Every instruction set that the processor has is timed.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor, nn

import multifire as mf
from benchmarks.tables import read_csv, write_csv
from multifire.config import RunConfig, get_recipe
from multifire.datasets.cache import frame_options
from multifire.engine import native
from multifire.events import frames_of_windows, open_recording
from multifire.events.simulate import SaccadeOptions, simulate_frames
from multifire.export import fold
from multifire.export.int8 import load_int8, quantise_network, save_int8
from multifire.export.onnx import write_onnx
from multifire.nn import SpikingNetwork, TdBatchNorm2d, model_from_config
from multifire.utils.device import processor

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "part", "network", "contestant", "isa", "threads", "batch", "n", "median_ms", "p99_ms", "fastest_ms", "ratio",
    "density", "onednn", "processor", "torch", "onnxruntime",
)  # fmt: skip
ISAS = ("avx2", "avx512_vnni", "amx", "neon", "neon_dotprod")
OFFSETS = (-0.4, -0.2, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3)
"""How much lower the currents of `cifar10` are, so that fewer neurons fire."""
ONEDNN = "ONEDNN_MAX_CPU_ISA"
"""Variable that limits torch's instruction set: to compare AVX2 with AVX2, run the benchmark with it set to AVX2.

ONNX Runtime has no such variable; avx2_only.cpp hides the others from every library.
"""
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--recording", type=Path, help="recording of a DVS128 for dvs-gesture (default: simulated)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of each part (default: 7)")
    parser.add_argument("--parts", nargs="+", default=["streams", "batches", "density"])
    parser.add_argument("--tiny", action="store_true", help="small networks and few frames, to try the benchmark")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of engine.csv")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            rows += PARTS[part](args, Path(folder))
    written = {(each["part"], each["onednn"]) for each in rows}
    kept = [each for each in read_csv(args.out / "engine.csv") if (each["part"], each["onednn"]) not in written]
    write_csv(args.out / "engine.csv", COLUMNS, [*kept, *rows])


def streams(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time a frame of a stream on one core."""
    torch.set_num_threads(1)
    rows = []
    for name, frames_TCHW in stream_inputs(args).items():
        cfg = get_recipe(name)
        model = mf.from_pretrained(name) if name == "digits" else calibrated(cfg, frames_TCHW[:, None])
        _, _, height, width = frames_TCHW.shape
        size = (height, width)
        path = save(folder / f"{name}.safetensors", model, cfg)
        calls = dict(stream_contestants(model, path, size, folder / name, counts=name != "digits"))
        seconds = {key: [] for key in calls}
        for number in range(-1, args.rounds):
            for key, call in calls.items():
                found = call(frames_TCHW)
                seconds[key] += found if number >= 0 else []
        rows += [row("streams", name, key, 1, 1, times, seconds) for key, times in seconds.items()]
    return rows


def stream_inputs(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return frames [T, C, H, W] for each network."""
    count = 4 if args.tiny else 40
    digits = mf.datasets.load("digits").test
    images = np.asarray(digits.images)[:8, 0]
    nmnist = simulate_frames(images, frame_options(get_recipe("nmnist").data))
    gesture = get_recipe("dvs-gesture").data
    if args.recording:
        windows = frames_of_windows(lambda: open_recording(args.recording), [(None, None)], frame_options(gesture))
        frames = windows[0].counts
    else:
        frames = simulate_frames(images[:1], frame_options(gesture), SaccadeOptions((128, 128), 1_200_000))[0]
    return {
        "dvs-gesture": frames[:count].astype(np.float32),
        "nmnist": nmnist.reshape(-1, *nmnist.shape[2:])[:count].astype(np.float32),
        "digits": ((images[:, None] / 255 - 0.13) / 0.31).astype(np.float32)[:count],
    }


def stream_contestants(
    model: SpikingNetwork, path: Path, size: tuple[int, int], folder: Path, counts: bool
) -> Iterator[tuple[tuple[str, str], Callable[[np.ndarray], list[float]]]]:
    """Yield (contestant, instruction set) and a function that returns the seconds of each frame."""
    for isa in available():
        engine = load_engine(path, isa, size)
        yield ("multifire.engine", isa), lambda frames, engine=engine: play_engine(engine, frames, counts)
    for name, network in (("load_int8", load_int8(path)), ("torch fp32, folded", fold(model).eval())):
        yield (name, ""), lambda frames, network=network: play_torch(network, frames)
    yield from onnx_contestants(model, path, size, folder)


def play_engine(engine: native.Engine, frames_TCHW: np.ndarray, counts: bool) -> list[float]:
    """Return the seconds of each frame; frames of events go in as lists."""
    inputs = [events_of(frame) for frame in frames_TCHW] if counts else list(frames_TCHW)
    step = engine.step_events if counts else engine.step
    engine.reset()
    return [timed(lambda frame=frame: step(frame)) for frame in inputs]


def events_of(frame_CHW: np.ndarray) -> np.ndarray:
    """Return the events of a frame of counts."""
    p, y, x = np.nonzero(frame_CHW)
    events = np.zeros(len(p), native.EVENT)
    events["x"], events["y"], events["p"], events["count"] = x, y, p, frame_CHW[p, y, x]
    return events


@torch.inference_mode()
def play_torch(network: Any, frames_TCHW: np.ndarray) -> list[float]:
    """Return the seconds of each frame."""
    state, seconds = None, []
    for frame in frames_TCHW:
        start = time.perf_counter()
        _, state = network.step(torch.from_numpy(frame)[None], state)
        seconds.append(time.perf_counter() - start)
    return seconds


def onnx_contestants(
    model: SpikingNetwork, path: Path, size: tuple[int, int], folder: Path
) -> Iterator[tuple[tuple[str, str], Callable[[np.ndarray], list[float]]]]:
    """Yield ONNX Runtime with fp32 and int8 weights, one thread."""
    import onnxruntime

    from multifire.export.onnx_int8 import write_onnx_int8

    folder.mkdir()
    provenance = load_int8(path).provenance or {}
    write_onnx(folder / "fp32.onnx", model, size, provenance, step=True)
    write_onnx_int8(folder / "int8.onnx", model, load_int8(path), size, provenance, step=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for kind in ("fp32", "int8"):
        session = onnxruntime.InferenceSession(
            str(folder / f"{kind}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        yield (f"ONNX Runtime, {kind}", ""), lambda frames, session=session: play_onnx(session, frames)


def play_onnx(session: Any, frames_TCHW: np.ndarray) -> list[float]:
    """Return the seconds of each frame."""
    first, *before = session.get_inputs()
    states = [np.zeros([1 if side == "N" else side for side in state.shape], np.float32) for state in before]
    seconds = []
    for frame in frames_TCHW:
        named = {state.name: value for state, value in zip(before, states, strict=True)}
        start = time.perf_counter()
        _, *states = session.run(None, {first.name: frame[None], **named})
        seconds.append(time.perf_counter() - start)
    return seconds


def batches(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time a batch of images on all cores."""
    rows = []
    for name in ("cifar10-small", "cifar10"):
        cfg, images_TNCHW = get_recipe(name), batch_of_images(args)
        model = mf.from_pretrained(name) if name == "cifar10-small" else calibrated(cfg, images_TNCHW)
        rows += time_batch("batches", name, model, cfg, images_TNCHW, args, folder)
    return rows


def density(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time a batch while fewer and fewer neurons fire."""
    cfg, images_TNCHW = get_recipe("cifar10"), batch_of_images(args)
    rows = []
    for offset in OFFSETS[:2] if args.tiny else OFFSETS:
        model = calibrated(cfg, images_TNCHW)
        for norm in model.modules():
            if isinstance(norm, TdBatchNorm2d) and norm.bias is not None:
                nn.init.constant_(norm.bias, -offset)
        rows += time_batch("density", "cifar10", model, cfg, images_TNCHW, args, folder)
    return rows


def batch_of_images(args: argparse.Namespace) -> Tensor:
    """Return smooth random images as the network sees them, each shown T times: [T, N, C, H, W]."""
    torch.manual_seed(0)
    count, size = (2, 8) if args.tiny else (64, 32)
    coarse = torch.randn(count, 3, size // 4, size // 4)
    images = nn.functional.interpolate(coarse, (size, size), mode="bilinear") + 0.2 * torch.randn(count, 3, size, size)
    return images.expand(4, count, 3, size, size)


def time_batch(
    part: str, name: str, model: SpikingNetwork, cfg: RunConfig, x_TNCHW: Tensor, args: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Time the engine and torch on a batch, in turns."""
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    path = save(folder / f"{name}.safetensors", model, cfg)
    network, frames = load_int8(path), x_TNCHW.numpy()
    calls: dict[tuple[str, str], Call] = {}
    for isa in available():
        engine = load_engine(path, isa)
        calls["multifire.engine", isa] = lambda engine=engine: engine.run(frames, threads=threads)
    with torch.inference_mode():
        calls["load_int8", ""] = lambda: network(x_TNCHW)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for number in range(-1, args.rounds):
            for key, call in calls.items():
                taken = timed(call)
                seconds[key] += [taken] if number >= 0 else []
        shares = share_of_inputs(network, x_TNCHW)
    found = [row(part, name, key, threads, x_TNCHW.shape[1], times, seconds) for key, times in seconds.items()]
    return [each | {"density": shares} for each in found]


def share_of_inputs(network: nn.Module, x_TNCHW: Tensor) -> float:
    """Return the share of the inputs of convolutions, after the first, that are not 0, weighted by their products."""
    totals = np.zeros(2)

    def count(conv: Any, inputs: tuple[Tensor], out: Tensor) -> None:
        work = out.numel() * conv.weight[0].numel()
        totals[:] += work * (inputs[0] != 0).double().mean().item(), work

    convs = [module for name, module in network.named_modules() if name.endswith(".conv") and "stem" not in name]
    handles = [conv.register_forward_hook(count) for conv in convs]
    network(x_TNCHW[:, :8])
    for handle in handles:
        handle.remove()
    return totals[0] / totals[1]


def calibrated(cfg: RunConfig, x_TNCHW: np.ndarray | Tensor) -> SpikingNetwork:
    """Return a network with random weights, whose norms have the statistics of these inputs."""
    torch.manual_seed(0)
    model = model_from_config(cfg.model).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.as_tensor(x_TNCHW)[:, :8])
    return model.eval()


def save(path: Path, model: SpikingNetwork, cfg: RunConfig) -> Path:
    """Save the int8 network, and return the path."""
    save_int8(path, quantise_network(model, cfg.model, cfg.data.name not in ("digits", "cifar10")), provenance(cfg))
    return path


def provenance(cfg: RunConfig) -> dict[str, Any]:
    """Return a provenance that says that the network is not trained."""
    return {
        "provenance": 1,
        "recipe": cfg.recipe,
        "config": asdict(cfg),
        "data": {"name": cfg.data.name, "about": "random weights", "simulated": False, "classes": []},
        "accuracy": [],
        "checkpoint": {"file": "none", "epochs": 0, "sha256": ""},
        "versions": {"torch": torch.__version__},
    }


def available() -> list[str]:
    """Return the instruction sets of this processor that the engine has."""
    found = []
    for isa in ISAS:
        try:
            load_engine(Path("no such file"), isa)
        except FileNotFoundError:
            found.append(isa)
        except ValueError:
            continue
    return found


def load_engine(path: Path, isa: str, size: tuple[int, int] | None = None) -> native.Engine:
    """Load a network with this instruction set; "": the one that the engine chooses.

    Raises:
        ValueError: the processor or the engine does not have it.
    """
    os.environ.pop("MULTIFIRE_ENGINE_ISA", None)
    if isa:
        os.environ["MULTIFIRE_ENGINE_ISA"] = isa
    try:
        return native.load(path, size)
    finally:
        os.environ.pop("MULTIFIRE_ENGINE_ISA", None)


def timed(call: Call) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def row(
    part: str, network: str, key: tuple[str, str], threads: int, batch: int, times: list[float],
    seconds: dict[tuple[str, str], list[float]],
) -> dict[str, Any]:  # fmt: skip
    """Return a contestant's row. Its ratio is its median time divided by that of load_int8."""
    import onnxruntime

    base = statistics.median(seconds["load_int8", ""])
    median = statistics.median(times)
    return {
        "part": part, "network": network, "contestant": key[0], "isa": key[1], "threads": threads, "batch": batch,
        "n": len(times), "median_ms": 1e3 * median, "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
        "fastest_ms": 1e3 * min(times), "ratio": median / base, "onednn": os.environ.get(ONEDNN, ""),
        "processor": processor(), "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }  # fmt: skip


PARTS = {"streams": streams, "batches": batches, "density": density}

if __name__ == "__main__":
    main()
