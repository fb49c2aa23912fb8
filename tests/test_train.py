"""The training loop on a few embedded digits: the files of a run, stopping and resuming, bad files, options."""

import itertools
import json
import random
import shutil
import time
from dataclasses import replace

import pytest
import torch

import multifire.training.captured as captured
from multifire import ops
from multifire.analysis.evaluate import evaluate
from multifire.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainOptions
from multifire.nn import model_from_config
from multifire.training import guards, step
from multifire.training.checkpoint import load_checkpoint, load_model, load_newest, save_checkpoint
from multifire.training.data import load_batches
from multifire.training.guards import Watchdog
from multifire.training.loop import train
from multifire.training.optim import parameter_groups
from multifire.training.run_folder import RunFolder
from multifire.training.signals import Interrupted
from multifire.training.step import sum_of_losses
from multifire.utils.files import lock_folder, older

TINY = RunConfig(
    data=DataConfig(name="digits", timesteps=2, crop_padding=2, flip=True, limit=128),
    model=ModelConfig(name="ds_resnet8", in_channels=1, width=2),
    optim=OptimConfig(epochs=3, batch_size=32, lr=0.05, schedule="one-cycle"),
    eval_batch_size=500,
)

RESUME = TrainOptions(resume="yes")


def override(cfg: RunConfig, **parts: dict) -> RunConfig:
    return replace(cfg, **{part: replace(getattr(cfg, part), **values) for part, values in parts.items()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, train(TINY, out)


def test_a_run_writes_its_files(finished):
    out, summary = finished
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "last.safetensors", "best.safetensors", "summary.json"} <= names
    assert any(
        name.startswith("events.out.tfevents") for name in names
    )  # the development requirements include TensorBoard
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for key in ("test_accuracy", "train_seconds", "images_per_second", "machine"):
        assert summary[key]
    assert summary["machine"]["torch"] == torch.__version__
    assert summary["best"]["chosen_by"] == "test"
    assert summary["test_accuracy_of"] == "last"
    assert set(summary["backends"]) <= set(ops.BACKENDS)
    assert summary["backends"]


def test_metrics_have_a_line_for_each_epoch(finished):
    records = RunFolder(finished[0]).metrics()
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert records[-1]["test_accuracy"] == finished[1]["last_test_accuracy"]
    assert max(record["test_accuracy"] for record in records) == finished[1]["best"]["accuracy"]
    assert len(records[0]["test_accuracy_per_step"]) == TINY.data.timesteps


def test_the_best_checkpoint_has_the_recorded_accuracy(finished):
    out, summary = finished
    model, cfg = load_model(out / "best.safetensors")
    batches = load_batches(cfg, torch.device("cpu"))
    assert evaluate(model, batches.test).accuracy == summary["best"]["accuracy"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(finished, tmp_path):
    out, _ = finished
    again = trained_weights(TINY, tmp_path / "again")
    other = trained_weights(replace(TINY, seed=1), tmp_path / "other")
    first = load_checkpoint(out / "last.safetensors").model
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    assert not all(torch.equal(first[name], tensor) for name, tensor in other.items())


def trained_weights(cfg, out):
    train(cfg, out)
    return load_checkpoint(out / "last.safetensors").model


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(finished, tmp_path, monkeypatch, stop_at):
    """Wherever the stop is, also after the last step of an epoch, the weights are equal to the last bit."""
    out = tmp_path / "stopped"
    stop_after(stop_at, monkeypatch)
    with pytest.raises(Interrupted, match=r"stopped at epoch \d/3, step \d; .* give --resume"):
        train(TINY, out)
    monkeypatch.undo()
    summary = train(TINY, out, RESUME)
    whole, resumed = (load_checkpoint(folder / "last.safetensors") for folder in (finished[0], out))
    for kind in ("model", "optimizer"):
        tensors = getattr(resumed, kind)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in getattr(whole, kind).items())
    assert without_time(RunFolder(out).metrics()) == without_time(RunFolder(finished[0]).metrics())
    assert summary["test_accuracy"] == finished[1]["test_accuracy"]


def stop_after(steps: int, monkeypatch) -> None:
    """Send SIGINT, as Ctrl-C does, during training step number `steps`."""
    import signal

    calls, step = iter(range(1, 1000)), captured.train_step

    def step_with_signal(*args):
        if next(calls) == steps:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(captured, "train_step", step_with_signal)


def without_time(records):
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    import signal

    def step_with_two_signals(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(captured, "train_step", step_with_two_signals)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(finished):
    before = (finished[0] / "last.safetensors").read_bytes()
    summary = train(TINY, finished[0], RESUME)
    assert (finished[0] / "last.safetensors").read_bytes() == before
    assert summary["test_accuracy"] == finished[1]["test_accuracy"]


def test_the_validation_split_chooses_the_best_checkpoint(tmp_path):
    cfg = override(TINY, data={"validation": 0.1})
    summary = train(cfg, tmp_path / "run")
    records = RunFolder(tmp_path / "run").metrics()
    assert "test_accuracy" not in records[0]
    assert summary["best"]["chosen_by"] == "validation"
    assert summary["best"]["accuracy"] == max(record["validation_accuracy"] for record in records)
    assert summary["test_accuracy_of"] == "best by validation"
    model, _ = load_model(tmp_path / "run" / "best.safetensors")
    batches = load_batches(cfg, torch.device("cpu"))
    assert evaluate(model, batches.test).accuracy == summary["test_accuracy"]


def test_a_folder_that_does_not_fit_the_options_is_refused(finished, tmp_path):
    with pytest.raises(FileExistsError, match="exists; give --resume to continue it, or --out for another folder"):
        train(TINY, finished[0])
    with pytest.raises(FileNotFoundError, match="no run to resume here"):
        train(TINY, tmp_path / "nowhere", RESUME)
    with pytest.raises(ValueError, match=r"another configuration \(optim\.lr 0\.05 -> 0\.1\)"):
        train(override(TINY, optim={"lr": 0.1}), finished[0], RESUME)


def test_a_truncated_line_of_metrics_is_ignored_and_a_damaged_one_refused(tmp_path):
    out = tmp_path / "run"
    cfg = override(TINY, optim={"epochs": 1})
    train(cfg, out)
    metrics = out / "metrics.jsonl"
    intact = metrics.read_text()
    metrics.write_text(intact + '{"epoch": 1, "train_lo')
    train(cfg, out, RESUME)
    assert metrics.read_text() == intact
    for content in (b"{\n" + intact.encode(), b"[1]\n", b'{"epoch": "x"}\n', b"\xff\n"):
        metrics.write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: not a"):
            train(cfg, out, RESUME)


def test_a_truncated_checkpoint_is_refused_and_kept(tmp_path):
    out = tmp_path / "run"
    train(override(TINY, optim={"epochs": 1}), out, TrainOptions(keep=1))
    last = out / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"last\.safetensors: damaged"):
        train(override(TINY, optim={"epochs": 1}), out, RESUME)
    assert last.exists()


def test_a_config_of_another_version_is_refused(tmp_path):
    out = tmp_path / "run"
    train(override(TINY, optim={"epochs": 1}), out)
    config = out / "config.json"
    config.write_text(config.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match=r"config\.json: config version is 7, this multifire reads version 1"):
        train(override(TINY, optim={"epochs": 1}), out, RESUME)


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    """A weight becomes NaN in the third epoch; no checkpoint may contain it."""
    step, calls = captured.train_step, iter(range(1000))

    def step_with_nan(model, *args):
        if next(calls) == 9:
            with torch.no_grad():
                model.voting.weight.fill_(float("nan"))
        return step(model, *args)

    monkeypatch.setattr(captured, "train_step", step_with_nan)
    out = tmp_path / "run"
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at epoch 3, step 2, .*: stem\.conv\.weight; the last good"
    ):
        train(TINY, out)
    checkpoint = load_checkpoint(out / "last.safetensors")
    assert checkpoint.position.epoch == 2
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.model.values())


@pytest.mark.parametrize(
    "optim",
    [
        {"loss": "tet"},
        {"clip_norm": 0.1},
        {"label_smoothing": 0.1},
        {"schedule": "cosine"},
        {"schedule": "step", "step_epochs": 1},
    ],
)
def test_training_works_with_each_option(tmp_path, optim):
    summary = train(override(TINY, optim={"epochs": 1, **optim}), tmp_path / "run")
    assert 0 <= summary["test_accuracy"] <= 1


def test_training_in_bf16_keeps_weights_in_fp32(tmp_path):
    cfg = replace(override(TINY, optim={"epochs": 1}), precision="bf16")
    train(cfg, tmp_path / "run")
    assert all(t.dtype == torch.float32 for t in load_checkpoint(tmp_path / "run" / "last.safetensors").model.values())


def test_tet_is_the_mean_over_time_steps_of_the_cross_entropy():
    logits, y = torch.randn(3, 5, 10), torch.randint(0, 10, (5,))
    by_hand = torch.stack([torch.nn.functional.cross_entropy(step, y) for step in logits]).mean()
    torch.testing.assert_close(sum_of_losses(logits, y, OptimConfig(loss="tet")) / 5, by_hand)
    of_mean = torch.nn.functional.cross_entropy(logits.mean(0), y)
    torch.testing.assert_close(sum_of_losses(logits, y, OptimConfig()) / 5, of_mean)


def test_clipping_limits_the_size_of_a_step():
    torch.manual_seed(0)
    cfg = override(TINY, optim={"clip_norm": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0})
    model = model_from_config(cfg.model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    captured.train_step(model, optimizer, torch.randn(2, 4, 1, 28, 28), torch.arange(4), cfg)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    assert 0 < moved.item() <= 1.01e-3


def test_weights_that_turn_nan_without_a_nan_loss_are_not_saved(tmp_path, monkeypatch):
    """A NaN membrane never fires, so that the loss stays finite and only the weights show the NaN."""
    step, calls = captured.train_step, iter(range(1000))

    def step_with_nan(model, *args):
        result = step(model, *args)
        if next(calls) == 7:  # the last step of the second epoch
            with torch.no_grad():
                model.stem.conv.weight.fill_(float("nan"))
        return result

    monkeypatch.setattr(captured, "train_step", step_with_nan)
    out = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"stem\.conv\.weight holds NaN or infinity at epoch 2"):
        train(TINY, out)
    assert load_checkpoint(out / "last.safetensors").position.epoch == 1
    assert len(RunFolder(out).metrics()) == 1


def test_a_missing_checkpoint_does_not_restart_the_run(tmp_path):
    out, cfg = tmp_path / "run", override(TINY, optim={"epochs": 1})
    train(cfg, out, TrainOptions(keep=1))
    (out / "last.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"last\.safetensors is missing"):
        train(cfg, out, RESUME)


def test_momentum_of_another_shape_is_refused(tmp_path):
    out, cfg = tmp_path / "run", override(TINY, optim={"epochs": 1})
    train(cfg, out)
    before = load_checkpoint(out / "last.safetensors")
    momentum = {name: torch.zeros(1) for name in before.optimizer}
    save_checkpoint(out / "last.safetensors", replace(before, optimizer=momentum))
    with pytest.raises(ValueError, match=r"momentum: does not fit the network: .*of shape \[1\]"):
        train(cfg, out, RESUME)


def test_crop_padding_larger_than_the_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.crop_padding is 1000, expected at most the image's 28"):
        train(override(TINY, data={"crop_padding": 1000}), tmp_path / "run")


def test_damage_to_any_byte_of_a_checkpoint_is_noticed(finished, tmp_path):
    """Wherever the file is truncated or a bit is flipped, the previous checkpoint is loaded instead, with a warning."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    last = out / "last.safetensors"
    intact = last.read_bytes()
    previous = load_checkpoint(older(last, 1))
    rng = random.Random(0)
    for number in range(200):
        at = rng.randrange(len(intact))
        flipped = intact[:at] + bytes([intact[at] ^ 1 << rng.randrange(8)]) + intact[at + 1 :]
        last.write_bytes(intact[:at] if number % 2 else flipped)
        found, file = load_newest(last)
        assert file == older(last, 1), at
        assert found.position == previous.position
        assert all(torch.equal(found.model[name], tensor) for name, tensor in previous.model.items())


def test_a_run_without_an_intact_checkpoint_is_refused(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for file in out.glob("last*"):
        file.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"no intact checkpoint is left: .*last\.2\.safetensors: damaged"):
        train(TINY, out, RESUME)


def test_the_newest_checkpoints_are_kept(tmp_path):
    train(TINY, tmp_path / "run", TrainOptions(keep=2, checkpoint_every="2"))
    files = {file.name for file in (tmp_path / "run").glob("*.safetensors")}
    assert files == {"last.safetensors", "last.1.safetensors", "best.safetensors"}
    previous = load_checkpoint(tmp_path / "run" / "last.1.safetensors").position
    assert (previous.epoch, previous.step) == (2, 4)  # after the last step; the end of the epoch then wrote `last`


def test_sigusr1_writes_a_checkpoint_without_stopping(tmp_path, monkeypatch):
    import signal

    calls, step, saved_steps = iter(range(1000)), captured.train_step, []

    def step_with_signal(*args):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGUSR1)
        elif (tmp_path / "run" / "last.safetensors").exists() and not saved_steps:
            saved_steps.append(load_checkpoint(tmp_path / "run" / "last.safetensors").position.step)
        return step(*args)

    monkeypatch.setattr(captured, "train_step", step_with_signal)
    train(override(TINY, optim={"epochs": 1}), tmp_path / "run")
    assert saved_steps == [2]


def test_sigterm_saves_and_sets_the_exit_code(tmp_path, monkeypatch):
    import signal

    step = captured.train_step
    monkeypatch.setattr(captured, "train_step", lambda *args: [signal.raise_signal(signal.SIGTERM), step(*args)][1])
    with pytest.raises(Interrupted) as stopped:
        train(TINY, tmp_path / "run")
    assert stopped.value.exit_code == 143
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").position.step == 1


def test_resume_auto_starts_a_run_and_continues_it(finished, tmp_path):
    auto, out = TrainOptions(resume="auto"), tmp_path / "run"
    train(TINY, out, auto)
    summary = train(TINY, out, auto)
    assert summary["test_accuracy"] == finished[1]["test_accuracy"]


def test_a_run_stops_after_max_time_and_can_be_resumed(finished, tmp_path):
    with pytest.raises(Interrupted, match=r"stopped at epoch 1/3, step 1") as stopped:
        train(TINY, tmp_path / "run", TrainOptions(max_time="0.001s"))
    assert stopped.value.exit_code == 0
    assert train(TINY, tmp_path / "run", RESUME)["test_accuracy"] == finished[1]["test_accuracy"]


def test_a_second_process_in_one_folder_is_refused(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    with (
        lock_folder(tmp_path / "run"),
        pytest.raises(FileExistsError, match="another process is training in this folder"),
    ):
        train(TINY, tmp_path / "run", RESUME)


def test_files_of_an_interrupted_write_are_deleted(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    temporary = tmp_path / "run" / ".last.safetensors.123.tmp"
    temporary.write_bytes(b"half")
    train(TINY, tmp_path / "run", RESUME)
    assert not temporary.exists()


def test_gradients_of_the_parts_add_up_to_those_of_the_batch(tmp_path):
    """In training each part has its own batch statistics, so that this compares in evaluation mode, without them."""
    torch.manual_seed(0)
    model = model_from_config(TINY.model, "reference").double()
    x, y = torch.rand(2, 7, 1, 28, 28, dtype=torch.float64), torch.arange(7)
    whole, parts = {}, {}
    for grads, cuts in ((whole, [0, 7]), (parts, [0, 2, 4, 7])):
        model.zero_grad()
        for begin, end in itertools.pairwise(cuts):
            model.eval()
            loss = sum_of_losses(model(x[:, begin:end], per_step=True), y[begin:end], TINY.optim)
            (loss / 7).backward()
        grads |= {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad)
    train(override(TINY, optim={"epochs": 1, "accumulate": 3}), tmp_path / "run")
    assert RunFolder(tmp_path / "run").metrics()[0]["train_loss"] > 0


def test_nonfinite_steps_are_skipped_as_often_as_allowed(tmp_path, monkeypatch):
    add, calls = step.forward_backward, iter(range(1000))

    def add_with_infinity(network, x, y, cfg, grad_scale, loss=None):
        totals = add(network, x, y, cfg, grad_scale)
        if next(calls) in (2, 5, 6):
            network.voting.bias.grad.fill_(float("inf"))
        return totals

    monkeypatch.setattr(step, "forward_backward", add_with_infinity)
    cfg = override(TINY, optim={"epochs": 2, "skip_nonfinite": 2})
    with pytest.raises(FloatingPointError, match=r"at epoch 2, step 3, .* NaN or infinite: voting\.bias"):
        train(cfg, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert checkpoint.position.skipped == 1
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.model.values())


def test_the_moving_average_is_scored_and_loaded(tmp_path, monkeypatch):
    cfg, out = override(TINY, optim={"ema_decay": 0.5, "epochs": 1}), tmp_path / "run"
    step, weights = captured.train_step, []

    def step_and_record(model, *args):
        result = step(model, *args)
        weights.append(model.voting.weight.detach().clone())
        return result

    monkeypatch.setattr(captured, "train_step", step_and_record)
    summary = train(cfg, out)
    expected = weights[0]
    for weight in weights[1:]:
        expected = expected.lerp(weight, 0.5)
    model, _ = load_model(out / "last.safetensors")
    torch.testing.assert_close(model.voting.weight, expected)
    batches = load_batches(cfg, torch.device("cpu"))
    assert evaluate(model, batches.test).accuracy == summary["test_accuracy"]


def test_the_moving_average_is_restored_when_a_run_is_resumed(tmp_path, monkeypatch):
    cfg = override(TINY, optim={"ema_decay": 0.9})
    train(cfg, tmp_path / "whole")
    stop_after(6, monkeypatch)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path / "stopped")
    monkeypatch.undo()
    train(cfg, tmp_path / "stopped", RESUME)
    whole, resumed = (load_checkpoint(tmp_path / name / "last.safetensors").average for name in ("whole", "stopped"))
    assert whole
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_patience_ends_a_run_early(tmp_path):
    cfg = override(TINY, data={"validation": 0.2}, optim={"epochs": 50, "patience": 1, "lr": 1e-9})
    summary = train(cfg, tmp_path / "run")
    records = [record["validation_accuracy"] for record in RunFolder(tmp_path / "run").metrics()]
    assert summary["epochs"] == len(records) < 50
    assert records[-1] <= max(records[:-1])


def test_patience_needs_validation():
    with pytest.raises(ValueError, match=r"optim\.patience .* data\.validation above 0"):
        override(TINY, optim={"patience": 3})


def test_norms_and_biases_can_be_excluded_from_weight_decay():
    model = model_from_config(TINY.model)
    decaying, excluded = parameter_groups(model, OptimConfig(decay_norms=False))
    assert {p.dim() for p in excluded["params"]} == {1}
    assert excluded["weight_decay"] == 0
    assert len(decaying["params"]) + len(excluded["params"]) == len(list(model.parameters()))


def test_lack_of_memory_names_a_batch_size_that_fits(tmp_path, monkeypatch):
    """A tensor that is larger than any memory makes torch's allocator raise its real error."""
    add = step.forward_backward

    def add_with_huge_tensor(network, x, y, cfg, grad_scale, loss=None):
        if len(y) > 8:
            torch.empty(1 << 60)
        return add(network, x, y, cfg, grad_scale)

    monkeypatch.setattr(step, "forward_backward", add_with_huge_tensor)
    monkeypatch.setattr(guards, "forward_backward", add_with_huge_tensor)
    with pytest.raises(MemoryError, match=r"batch-size 32; 8 fit: give --optim.batch-size 8, or --optim.accumulate 4"):
        train(TINY, tmp_path / "run")


def test_the_watchdog_warns_once_per_time_limit(caplog):
    with caplog.at_level("WARNING", "multifire"), Watchdog(0.2) as watchdog:
        watchdog.progress("step 7")
        time.sleep(0.5)
    assert 1 <= len(caplog.messages) <= 2
    assert "since step 7" in caplog.messages[0]
