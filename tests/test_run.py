"""`multifire run` on recordings and live events: the same frames and predictions as in one batch."""

import dataclasses
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multifire.cli import main
from multifire.config import DataConfig, get_recipe, json_format
from multifire.datasets import get_info, load
from multifire.engine import native as engine
from multifire.engine.networks import TorchNetwork
from multifire.engine.stream import classify, follow, frames_of
from multifire.events import EVENT_DTYPE, FrameOptions, read_events, to_frames
from multifire.events.live import LiveFrames, Records, UdpRecords, packed_records
from multifire.export import fold
from multifire.export.int8 import export_run
from multifire.nn import model_from_config
from multifire.training.checkpoint import Checkpoint, Position, load_model, save_checkpoint

SHARED = Path(__file__).parents[2] / "shared" / "data" / "dvs128-aedat2.zip"
SENSOR = (128, 128)
OPTIONS = FrameOptions(size=(16, 16), timesteps=4, duration_us=1000)


def events_at(times) -> np.ndarray:
    rng = np.random.default_rng(0)
    events = np.zeros(len(times), EVENT_DTYPE)
    events["t"] = times
    for name, end in (("x", 128), ("y", 128), ("p", 2)):
        events[name] = rng.integers(0, end, len(times))
    return events


def live_frames(events, chunk: int) -> list:
    parts = (events[i : i + chunk] for i in range(0, len(events), chunk))
    live = LiveFrames(SENSOR, OPTIONS, "test")
    return [frame.counts for frame in follow(live, (packed_records(p.tobytes(), SENSOR, "test") for p in parts))]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_live_frames_equal_those_of_the_whole_recording(chunk):
    events = events_at(np.sort(np.random.default_rng(1).integers(500, 7000, 300)))
    frames = to_frames(events, SENSOR, OPTIONS.size, OPTIONS.duration_us, 8)
    assert np.array_equal(live_frames(events, chunk), frames)


def test_long_pauses_and_clock_jumps_start_a_new_sample():
    events = events_at([0, 10, 1 << 61, 5, 1500])
    assert [frame.sum() for frame in live_frames(events, 1)] == [2, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0]


def test_late_events_are_skipped(caplog):
    assert sum(frame.sum() for frame in live_frames(events_at([0, 1500, 900, 1600]), 1)) == 3
    assert "skipped 1 events that came after" in caplog.text


@pytest.mark.parametrize(
    "data",
    [
        b"", b"x" * 14, events_at([-1]).tobytes(), events_at([1 << 62]).tobytes(),
        np.array([(0, 128, 0, 1)], EVENT_DTYPE).tobytes(), np.array([(0, 0, 0, 2)], EVENT_DTYPE).tobytes(),
    ],
)  # fmt: skip
def test_malformed_packets_are_skipped_and_counted(data, caplog):
    good = events_at([3]).tobytes()
    with UdpRecords(0, SENSOR) as records, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for packet in (data, data, good):
            sender.sendto(packet, ("127.0.0.1", records.port))
        assert list(next(iter(records)).t) == [3]
        assert records.malformed == 2
    assert caplog.text.count("expected") == 1
    assert "2 malformed packets" in caplog.text


def test_strays_of_a_stream_are_dropped_as_in_training(tmp_path, caplog):
    events = events_at([1, 2, 3])
    events["x"][1] = 128
    (tmp_path / "stream").write_bytes(events.tobytes())
    with (tmp_path / "stream").open("rb") as file, Records(file, SENSOR, "a file", "drop") as records:
        assert [list(chunk.t) for chunk in records] == [[1, 3]]
    assert "a file: 1 events beside the sensor were left out" in caplog.text
    with UdpRecords(0, SENSOR, "drop") as records, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(events.tobytes(), ("127.0.0.1", records.port))
        assert list(next(iter(records)).t) == [1, 3]
        assert (records.malformed, records.dropped) == (0, 1)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Create a run with random weights, on events sliced by duration; return its folder."""
    folder = tmp_path_factory.mktemp("run")
    recipe = get_recipe("dvs-gesture")
    cfg = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, timesteps=4, frame_size=16, duration_us=1000),
        model=dataclasses.replace(recipe.model, name="ds_resnet8", width=4),
    )
    torch.manual_seed(0)
    model = model_from_config(cfg.model)
    model(torch.randint(0, 3, (4, 8, 2, 16, 16)).float())
    save_checkpoint(folder / "last.safetensors", Checkpoint(cfg, Position(epoch=1), model.state_dict(), {}))
    (folder / "config.json").write_text(json_format.to_json(cfg))
    return folder


def test_running_prediction_equals_the_batch():
    torch.manual_seed(0)
    model = model_from_config(get_recipe("nmnist").model)
    x = torch.randint(0, 3, (6, 1, 2, 17, 17)).float()
    model(x)
    model.double().eval()
    predictions = list(classify(TorchNetwork(model.float()), x[:, 0].numpy(), 3))
    assert [(prediction.sample, prediction.step, prediction.final) for prediction in predictions] == [
        (1, 1, False), (1, 2, False), (1, 3, True), (2, 1, False), (2, 2, False), (2, 3, True),
    ]  # fmt: skip
    with torch.no_grad():
        assert [predictions[2].label, predictions[5].label] == [int(model(part).argmax()) for part in (x[:3], x[3:])]
    assert all(prediction.final for prediction in classify(TorchNetwork(model), x[:, 0].numpy(), 3, margin=0.0))


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """Create a run of a narrow Gesture network (T = 40, 2×32×32); return its folder and a recording of a DVS128.

    The running statistics of the norms are those of the recording.
    """
    if not SHARED.is_file():
        pytest.skip("the shared recordings of a DVS128 are missing")
    folder = tmp_path_factory.mktemp("camera")
    with zipfile.ZipFile(SHARED) as file:
        recording = Path(file.extract("clamp_right.aedat", folder))
    recipe = get_recipe("dvs-gesture")
    cfg = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name="ds_resnet8", width=4))
    torch.manual_seed(0)
    model = model_from_config(cfg.model)
    for _ in range(3):
        model(frames_of_camera(recording, cfg.data))
    model.voting.weight.data *= 300  # margins of an untrained network are small
    save_checkpoint(folder / "last.safetensors", Checkpoint(cfg, Position(epoch=1), model.state_dict(), {}))
    (folder / "config.json").write_text(json_format.to_json(cfg))
    return folder, recording


def frames_of_camera(recording: Path, data: DataConfig) -> torch.Tensor:
    """Return the first two samples [T, 2, C, H, W] of a recording, which is read at once."""
    size = (data.frame_size, data.frame_size)
    frames = to_frames(read_events(recording), SENSOR, size, data.duration_us, 2 * data.timesteps)
    return torch.from_numpy(frames).float().unflatten(0, (2, data.timesteps)).transpose(0, 1)


def batch_predictions(model, x_TNCHW) -> list[tuple[int, float]]:
    """Return label and probability after each frame, sample by sample, computed in one batch."""
    with torch.no_grad():
        logits_TNL = model(x_TNCHW, per_step=True)
    steps = torch.arange(1, len(logits_TNL) + 1)[:, None, None]
    probability, label = (logits_TNL.cumsum(0) / steps).softmax(-1).max(-1)
    return list(zip(label.T.flatten().tolist(), probability.T.flatten().tolist(), strict=True))


def test_running_predictions_of_a_camera_equal_the_batch_in_float64(camera):
    """No spike flips by rounding in float64; the probabilities are computed in fp32."""
    folder, recording = camera
    model, cfg = load_model(folder / "last.safetensors")
    model.double()
    expected = batch_predictions(model, frames_of_camera(recording, cfg.data).double())
    network = TorchNetwork(fold(model), dtype=torch.float64)
    stream = classify(network, frames_of(recording, cfg.data, get_info("dvs-gesture")), cfg.data.timesteps)
    predictions = [next(stream) for _ in expected]
    probabilities = [prediction.probability for prediction in predictions]
    assert [prediction.step for prediction in predictions] == [*range(1, 41)] * 2
    assert [prediction.label for prediction in predictions] == [label for label, _ in expected]
    assert probabilities == pytest.approx([p for _, p in expected], abs=1e-6)
    assert len({round(p, 2) for p in probabilities}) > 20, "the predictions hardly change, which tests nothing"


def test_predictions_of_the_command_are_close_to_the_batch_in_fp32(camera, capfd):
    """A frame alone is summed in another order than a batch: spikes flip by rounding, which changes probabilities."""
    folder, recording = camera
    model, cfg = load_model(folder / "last.safetensors")
    expected = batch_predictions(model, frames_of_camera(recording, cfg.data))
    # The recording may stand behind an option.
    assert main(["run", str(folder), "--device", "cpu", "--engine", "torch", str(recording)]) == 0
    found = re.findall(r"sample \d+, frame \d+/40: (.*) ([\d.]+) %, margin", capfd.readouterr().out)[: len(expected)]
    assert [float(percent) / 100 for _, percent in found] == pytest.approx([p for _, p in expected], abs=0.02)
    classes = get_info("dvs-gesture").classes
    same = [name == classes[label] for (name, _), (label, _) in zip(found, expected, strict=True)]
    assert sum(same) / len(same) > 0.95


def lines_of(capfd, *args) -> tuple[str, list[str]]:
    """Return how the network was computed, and the predictions without their latencies."""
    assert main(["run", *map(str, args)]) == 0
    out = capfd.readouterr().out
    return re.search("engine: (.*)", out)[1], re.findall(r"sample \d.*margin [\d.]+", out)


def test_the_native_engine_computes_runs_and_exported_files(camera, tmp_path, capfd, monkeypatch):
    folder, recording = camera
    path = export_run(folder, tmp_path / "network.safetensors").path
    native, predictions = lines_of(capfd, path, recording)
    assert native.startswith("native engine, int8 weights")
    assert lines_of(capfd, path, recording, "--engine", "torch") == ("torch, int8 weights", predictions)
    assert lines_of(capfd, folder, recording, "--device", "cpu") == (native, predictions)
    assert len(predictions) > 80
    assert lines_of(capfd, folder, recording, "--engine", "torch")[0] == "torch, fp32 weights"
    monkeypatch.setattr(engine, "_LIBRARY", None)  # as after an installation without a compiler
    assert lines_of(capfd, path, recording) == ("torch, int8 weights", predictions)
    assert main(["run", str(path), str(recording), "--engine", "native"]) == 2
    assert "the engine was not built when multifire was installed; install a C++ comp" in capfd.readouterr().err


def test_a_network_that_int8_cannot_hold_runs_in_torch(tmp_path, capfd):
    recipe = get_recipe("nmnist")
    cfg = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name="plain_resnet8", width=2))
    state = model_from_config(cfg.model).state_dict()
    save_checkpoint(tmp_path / "last.safetensors", Checkpoint(cfg, Position(epoch=1), state, {}))
    (tmp_path / "config.json").write_text(json_format.to_json(cfg))
    np.save(tmp_path / "frames.npy", np.ones((2, 2, 17, 17), np.uint8))
    assert lines_of(capfd, tmp_path, tmp_path / "frames.npy", "--device", "cpu")[0] == "torch, fp32 weights"
    assert main(["run", str(tmp_path), str(tmp_path / "frames.npy"), "--engine", "native"]) == 2
    assert "plain_resnet8 adds before firing" in capfd.readouterr().err


def test_recording_and_standard_input_give_the_same_lines(run_folder, tmp_path, capfd):
    events = events_at(np.sort(np.random.default_rng(2).integers(0, 6000, 400)))
    np.save(tmp_path / "frames.npy", to_frames(events, SENSOR, (16, 16), 1000, 8))
    assert main(["run", str(run_folder), str(tmp_path / "frames.npy")]) == 0
    output = capfd.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "multifire", "run", str(run_folder), "--follow"],
        input=events.tobytes(), capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    lines = [re.findall(r"sample \d.*margin", text) for text in (output, done.stdout.decode())]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 8
    assert "8 frames, 2 decisions" in output


def test_ctrl_c_ends_following_with_a_summary(run_folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "multifire", "run", str(run_folder), "--follow"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for commands run with &
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    process.stdin.write(events_at([0, 1500, 2500]).tobytes())
    process.stdin.flush()
    while b"frame 2" not in process.stdout.readline():
        pass
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    out, err = process.communicate()
    assert b"2 frames" in out
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "either a recording"),
        (("x.npy", "--follow"), "either a recording"),
        (("nowhere.aedat",), "no such file"),
        (("--follow", "--udp", "99999"), "UDP port is 99999"),
        (("x.npy", "--margin", "2"), "margin is 2"),
    ],
)
def test_wrong_options_are_reported(run_folder, capsys, args, message):
    assert main(["run", str(run_folder), *args]) == 2
    assert message in capsys.readouterr().err


def test_invalid_frames_are_refused(run_folder, tmp_path, capsys):
    for array, message in (
        (np.zeros((2, 3, 16, 16)), "expected numbers"),
        (np.full((1, 2, 16, 16), np.nan), "NaN"),
        (np.array([None]), "not an .npy array"),
    ):
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        assert main(["run", str(run_folder), str(tmp_path / "x.npy")]) == 2
        assert message in capsys.readouterr().err


def test_events_in_numpy_files_are_played_like_other_recordings(tmp_path):
    """Strays, fit, flips and hot pixels are those of the run."""
    events = events_at(np.sort(np.random.default_rng(1).integers(500, 7000, 300)))
    events["x"][5] = 200
    np.save(tmp_path / "events.npy", events)
    cfg = dataclasses.replace(
        get_recipe("dvs-gesture").data, timesteps=4, frame_size=16, duration_us=1000, stray="drop", flip_x=True
    )
    played = list(frames_of(tmp_path / "events.npy", cfg, get_info("dvs-gesture")))
    expected = to_frames(np.delete(events, 5), SENSOR, OPTIONS.size, OPTIONS.duration_us, 8)
    assert np.array_equal(played, expected[..., ::-1])
    hot = events_at(np.arange(500, 7000, 50))
    hot["x"], hot["y"] = 3, 4
    both = np.concatenate([np.delete(events, 5), hot])
    np.save(tmp_path / "hot.npy", both[np.argsort(both["t"], kind="stable")])
    cfg = dataclasses.replace(cfg, flip_x=False, hot_pixels="drop")
    assert np.array_equal(list(frames_of(tmp_path / "hot.npy", cfg, get_info("dvs-gesture"))), expected)
    with pytest.raises(ValueError, match="1 events of 300 lie beside it"):
        list(frames_of(tmp_path / "events.npy", dataclasses.replace(cfg, stray="refuse", hot_pixels="keep"),
                              get_info("dvs-gesture")))  # fmt: skip


def test_a_picture_is_classified_like_an_array_of_its_pixels(tmp_path, capsys):
    digits = load("digits").test
    pixels, label = digits.images[0], digits.labels[0]
    np.save(tmp_path / "picture.npy", pixels)
    Image.fromarray(pixels[0]).save(tmp_path / "picture.PNG")
    Image.fromarray(pixels[0]).convert("RGB").resize((56, 56), Image.Resampling.NEAREST).save(tmp_path / "large.webp")
    shown = {name: played("digits", tmp_path / name, capsys) for name in ("picture.npy", "picture.PNG", "large.webp")}
    assert shown["picture.PNG"] == shown["picture.npy"]
    assert len(shown["large.webp"]) == 4
    assert shown["large.webp"][-1].startswith(f"sample 1, frame 4/4: {label} ")


def played(network: str, source: Path, capsys) -> list[str]:
    """Return what `multifire run` says of each frame, without its latency."""
    assert main(["run", network, str(source)]) == 0
    return re.findall("^(sample .*), latency", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.bmp", b"BM", "expected a picture"), ("a.png", b"\x89PNG", "broken, or no PNG, JPEG or WebP picture")],
)
def test_files_that_are_no_pictures_are_refused(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert main(["run", "digits", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_an_array_without_frames_is_named(run_folder, tmp_path, caplog):
    np.save(tmp_path / "empty.npy", np.zeros((0, 2, 16, 16), np.float32))
    assert main(["run", str(run_folder), str(tmp_path / "empty.npy")]) == 0
    assert "empty.npy: holds no frame" in caplog.text
