"""The native engine computes the bits of `mf.load_int8`, and refuses what it cannot compute."""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import multifire as mf
from multifire.engine import native
from tests.engine.networks import (
    COUNTS,
    IMAGES,
    ISAS,
    NETWORKS,
    random_frames,
    random_network,
    save,
    sparser_networks,
    streamed,
)

pytestmark = pytest.mark.skipif(not native.is_built(), reason="the engine is not built")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch, tmp_path):
    """Each instruction set that this machine runs."""
    monkeypatch.setenv("MULTIFIRE_ENGINE_ISA", request.param)
    try:
        native.load(tmp_path / "none.safetensors")
    except FileNotFoundError:
        return request.param
    except ValueError as error:
        pytest.skip(str(error))


def same_states(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("model", "counts", "size"), NETWORKS)
def test_engine_computes_the_bits_of_load_int8(tmp_path, isa, model, counts, size):
    path = save(tmp_path / "a.safetensors", random_network(model, counts))
    network, engine = mf.load_int8(path), native.load(path)
    assert engine.info.isa == isa
    frames = random_frames(model, counts, 5, 3, size)
    frames[:, 1] *= 0 if counts else 3
    expected = network(frames, per_step=True).numpy()
    assert expected.std() > 0
    assert np.array_equal(engine.run(frames.numpy(), per_step=True), expected)
    assert np.array_equal(engine.run(frames.numpy()), network(frames).numpy())
    still = frames[:1].expand(4, -1, -1, -1, -1)
    assert np.array_equal(engine.run(still.numpy(), per_step=True), network(still, per_step=True).numpy())
    for sample in (0, 2):
        logits, states = streamed(network, frames[:, sample : sample + 1])
        for frame, of_step in zip(frames[:, sample].numpy(), logits, strict=True):
            assert np.array_equal(engine.step(frame), of_step)
        assert same_states(engine.states(), states)
        engine.reset()


@pytest.mark.parametrize(
    "model", [dataclasses.replace(COUNTS, width=32), dataclasses.replace(COUNTS, width=64, levels=4)]
)
def test_lists_and_dense_sums_are_the_same(tmp_path, isa, model):
    """Networks that fire more and less, so that lists are taken and dense sums too."""
    frames = random_frames(model, True, 3, 2, (16, 12))
    channels, computed = {model.width, 2 * model.width, 4 * model.width}, set()
    for quantised in sparser_networks(random_network(model, True)):
        path = save(tmp_path / "a.safetensors", quantised)
        network, engine = mf.load_int8(path), native.load(path)
        assert np.array_equal(engine.run(frames.numpy(), per_step=True), network(frames, per_step=True).numpy())
        for frame, expected in zip(frames[:, 0].numpy(), streamed(network, frames[:, :1])[0], strict=True):
            assert np.array_equal(engine.step(frame), expected)
        computed |= {layer.shape[1] for layer in engine.layers() if layer.sparse_frames}
    has_none = {"amx": channels, "avx512_vnni": {32}}.get(isa, set())
    assert computed == channels - has_none


def test_largest_activations_and_weights_do_not_overflow(tmp_path, isa):
    model = dataclasses.replace(COUNTS, name="ds_resnet92", width=2, levels=8, norm_input=False)
    network = random_network(model, True)
    for name, tensor in network.network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.fill_(127 if "stages.1" not in name else -127)
        if name.endswith(".bias") and "voting" not in name:
            tensor.fill_(1e6)
    path = save(tmp_path / "a.safetensors", network)
    frames = random_frames(model, True, 2, 1, (5, 5))
    engine, network = native.load(path), mf.load_int8(path)
    assert np.array_equal(engine.run(frames.numpy(), per_step=True), network(frames, per_step=True).numpy())


def test_events_equal_frames(tmp_path, isa):
    path = save(tmp_path / "a.safetensors", random_network(COUNTS, True), frame_size=17)
    engine, by_events = native.load(path), native.load(path)
    for frame in random_frames(COUNTS, True, 4, 1, (17, 17))[:, 0].numpy():
        expected = engine.step(frame)
        p, y, x = np.nonzero(frame)
        cells = np.zeros(len(x), native.EVENT)
        cells["x"], cells["y"], cells["p"], cells["count"] = x, y, p, frame[p, y, x]
        single = np.repeat(cells, cells["count"])[["x", "y", "p"]]  # one entry for each event
        assert np.array_equal(by_events.step_events(cells if by_events.info.size else single), expected)
        assert same_states(by_events.states(), engine.states())
    again = native.load(path)
    frame = random_frames(COUNTS, True, 1, 1, (17, 17))[0, 0].numpy()
    p, y, x = np.nonzero(frame)
    single = np.zeros(len(x), [("x", np.int16), ("t", np.int64), ("y", np.int16), ("p", np.int8)])
    single["x"], single["y"], single["p"] = x, y, p
    single = np.random.default_rng(0).permutation(np.repeat(single, frame[p, y, x].astype(int)))
    assert np.array_equal(again.step_events(single), native.load(path).step(frame))
    assert np.array_equal(native.load(path).step_events(single[:0]), native.load(path).step(0 * frame))


def test_threads_compute_the_same(tmp_path):
    path = save(tmp_path / "a.safetensors", random_network(COUNTS, True))
    engine = native.load(path)
    frames = random_frames(COUNTS, True, 20, 7, (8, 8)).numpy()  # more than are computed at once
    expected = mf.load_int8(path)(torch.from_numpy(frames), per_step=True).numpy()
    for threads in (1, 2, 3, 8):
        assert np.array_equal(engine.run(frames, per_step=True, threads=threads), expected)
    assert engine.run(frames[:, :0]).shape == (0, 11)
    for ask in (engine.layers, engine.states):
        with pytest.raises(ValueError, match=r"has computed no frame; call step\(\) first"):
            ask()


def test_run_leaves_the_stream_alone(tmp_path):
    path = save(tmp_path / "a.safetensors", random_network(COUNTS, True))
    engine, other = native.load(path), native.load(path)
    frames = random_frames(COUNTS, True, 3, 1, (8, 8)).numpy()
    for frame in frames[:, 0]:
        engine.run(frames[:, :, :, :6])
        assert np.array_equal(engine.step(frame), other.step(frame))


def test_wrong_frames_are_refused_and_change_nothing(tmp_path):
    path = save(tmp_path / "a.safetensors", random_network(COUNTS, True))
    engine, other = native.load(path), native.load(path)
    frame = random_frames(COUNTS, True, 1, 1, (8, 8))[0, 0].numpy()
    for _ in range(2):
        assert np.array_equal(engine.step(frame), other.step(frame))
        for wrong, message in (
            (frame + 0.5, "not integers"),
            (frame - 9, "not integers"),
            (frame * np.nan, "not finite"),
            (frame + 1e6, "so large that sums"),
            (frame[:1], "expected"),
            (frame[0], "expected"),
            (frame[:, 1:], "of size 7 x 8, expected 8 x 8"),
            (frame.astype(str), "expected numbers"),
            (frame.astype(complex), "expected numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.step(wrong)
        for event, message in (
            ((8, 0, 0, 1), "outside"),
            ((0, -1, 0, 1), "outside"),
            ((0, 0, 2, 1), "outside"),
            ((0, 0, 0, -1), "below 0"),
            ((0, 0, 0, 2**30), "so large"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.step_events(np.array([(1, 1, 1, 1), event], native.EVENT))
    assert np.array_equal(native.load(path, size=[8, 8]).step(frame), native.load(path).step(frame))  # as JSON has it
    with pytest.raises(ValueError, match="pass size"):
        native.load(path).step_events(np.zeros(1, native.EVENT))
    for wrong, message in (
        (np.zeros(3), "fields"),
        (np.zeros((2, 3), native.EVENT), "2 dimensions, expected"),
        (np.array([(1.9, 0, 0)], [("x", "f4"), ("y", "i4"), ("p", "i4")]), "x of the events, float32, is not integers"),
        (np.array([(0, 2**32, 0)], [("x", "i8"), ("y", "i8"), ("p", "i8")]), "y of the events, int64, is not integers"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.step_events(wrong)
    for wrong in (frame, frame[None, None, :1]):
        with pytest.raises(ValueError, match="frames have shape"):
            engine.run(wrong)


def test_event_of_an_image_network_is_refused(tmp_path):
    engine = native.load(save(tmp_path / "a.safetensors", random_network(IMAGES, False)), size=(8, 8))
    with pytest.raises(ValueError, match="for images"):
        engine.step_events(np.zeros(1, native.EVENT))


def test_pixels_that_are_not_normalised_are_refused(tmp_path):
    engine = native.load(save(tmp_path / "a.safetensors", random_network(IMAGES, False)), size=(8, 8))
    for compute in (engine.step, lambda frame: engine.run(frame[None, None])):
        with pytest.raises(ValueError, match=r"uint8, expected the floats on which .* \(pixel / 255 - mean\) / std"):
            compute(np.zeros((3, 8, 8), np.uint8))


def test_a_size_that_is_known_holds_for_samples_too(tmp_path):
    engine = native.load(save(tmp_path / "a.safetensors", random_network(IMAGES, False)), size=(8, 8))
    with pytest.raises(ValueError, match="frames are of size 8 x 9, expected 8 x 8"):
        engine.run(np.zeros((1, 1, 3, 8, 9), np.float32))


def test_one_engine_is_for_one_thread_at_a_time(tmp_path):
    """A second thread gets an error, never a wrong result."""
    path = save(tmp_path / "a.safetensors", random_network(COUNTS, True))
    engine = native.load(path)
    frame = np.zeros((2, 64, 64), np.float32)
    engine.step(frame)
    refused: list[str] = []

    def use():
        for _ in range(50):
            try:
                engine.step(frame)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(refused) <= {"another thread is using this engine; take a clone for each thread"}
    assert refused


def test_engine_imports_without_torch(tmp_path):
    path = save(tmp_path / "a.safetensors", random_network(COUNTS, True), frame_size=8)
    program = (
        "import sys, numpy as np, multifire.engine as e; engine = e.load(sys.argv[1]); "
        "engine.step(np.zeros((2, 8, 8))); engine.reset(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == 0


def test_unknown_instruction_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "MULTIFIRE_ENGINE_ISA", "mmx")
    with pytest.raises(ValueError, match="MULTIFIRE_ENGINE_ISA is mmx"):
        native.load(save(tmp_path / "a.safetensors", random_network(COUNTS, True)))


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("c++") is None, reason="needs Linux and c++")
def test_only_loading_allocates_memory(tmp_path):
    program, headers = tmp_path / "count", native.LIBRARY.parent / "csrc"
    source = Path(__file__).with_name("count_allocations.cpp")
    subprocess.run(["c++", "-std=c++17", f"-I{headers}", "-o", program, source, native.LIBRARY], check=True)
    for model, counts in ((COUNTS, True), (dataclasses.replace(IMAGES, width=32), False)):
        path = save(tmp_path / "a.safetensors", random_network(model, counts))
        done = subprocess.run([program, path], capture_output=True, text=True, check=True)
        loading, later = map(int, done.stdout.split())
        assert loading > 10
        assert later == 0
