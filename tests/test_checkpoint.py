"""Our checkpoints and the authors': writing, reading, and refusing damaged or foreign files."""

import gc
import json
import random

import pytest
import torch
from safetensors import safe_open

import multifire as mf
from multifire.config import ModelConfig, RunConfig
from multifire.export.reference_checkpoint import to_reference_state_dict
from multifire.nn import model_from_config
from multifire.training.checkpoint import (
    Checkpoint,
    Position,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
)
from multifire.utils.tensor_files import write_tensors

CONFIG = RunConfig(model=ModelConfig(name="ds_resnet8", width=2, in_channels=1))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.safetensors"
    model = model_from_config(CONFIG.model)
    momentum = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    checkpoint = Checkpoint(CONFIG, Position(epoch=3, step=7, loss_sum=0.1, best=0.5), model.state_dict(), momentum)
    save_checkpoint(path, checkpoint)
    return path, checkpoint


def test_a_checkpoint_is_equal_after_writing_and_reading(saved):
    path, before = saved
    after = load_checkpoint(path)
    assert (after.config, after.position) == (before.config, before.position)
    for kind in ("model", "optimizer"):
        tensors = getattr(after, kind)
        assert tensors.keys() == getattr(before, kind).keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in getattr(before, kind).items())
    model, config = load_model(path)
    assert config == CONFIG
    assert not model.training


def test_writing_leaves_no_temporary_file(saved):
    assert [file.name for file in saved[0].parent.iterdir()] == ["last.safetensors"]


def test_a_truncated_checkpoint_is_refused(saved):
    path, _ = saved
    intact = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(intact) // 2, len(intact) - 1]:
        path.write_bytes(intact[:length])
        with pytest.raises(ValueError, match=r"last\.safetensors: damaged"):
            load_checkpoint(path)


def test_a_checkpoint_with_a_flipped_bit_is_refused(saved):
    path, _ = saved
    intact = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        altered, position = bytearray(intact), rng.randrange(len(intact))
        altered[position] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"last\.safetensors: "):
            load_checkpoint(path)


def test_weights_of_another_architecture_are_refused(saved):
    path, checkpoint = saved
    deeper = mf.build_model("ds_resnet14", in_channels=1, width=2)
    with pytest.raises(ValueError, match=r"does not fit the network: missing stages\.0\.1\.fire1\.conv\.weight"):
        load_weights(deeper, checkpoint.model, source=str(path))
    wider = mf.build_model("ds_resnet8", in_channels=1, width=3)
    with pytest.raises(ValueError, match=r"stem\.conv\.weight of shape \[2, 1, 3, 3\], expected \[3, 1, 3, 3\]"):
        load_weights(wider, checkpoint.model, source=str(path))


@pytest.mark.parametrize("position", ["{", "[]", '{"epoc": 1}', "3", '{"epoch": -1}', '{"step": "x"}'])
def test_a_header_without_a_valid_position_is_refused(saved, monkeypatch, position):
    """The digest of such a file can be correct, since anyone can compute it."""
    import multifire.training.checkpoint as module

    path, checkpoint = saved
    monkeypatch.setattr(module.json, "dumps", lambda *args, dumps=json.dumps, **options: (
        position if args and isinstance(args[0], dict) and "loss_sum" in args[0] else dumps(*args, **options)
    ))  # fmt: skip
    save_checkpoint(path, checkpoint)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"last\.safetensors: its header has no valid config or position"):
        load_checkpoint(path)


def test_a_file_of_another_program_is_refused(tmp_path):
    import safetensors.torch

    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors: not a multifire checkpoint"):
        load_checkpoint(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        mf.load_reference_checkpoint(tmp_path / "none.pth")


def test_the_authors_checkpoint_is_equal_after_reading_and_writing(gesture_checkpoint):
    theirs = torch.load(gesture_checkpoint, weights_only=True)["model"]
    back = to_reference_state_dict(mf.load_reference_checkpoint(gesture_checkpoint))
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert "num_batches_tracked" in name or torch.equal(back[name], tensor), name


@pytest.mark.parametrize("residual", ["ds", "plain"])
def test_the_shapes_in_the_authors_checkpoint_determine_the_network(residual):
    net = mf.build_model(f"{residual}_resnet14", in_channels=5, num_classes=7, width=3)
    theirs = to_reference_state_dict(net)
    again = mf.load_reference_checkpoint({"model": theirs, "epoch": 1}, residual=residual)
    assert (again.in_channels, again.num_classes, len(again.stages[0])) == (5, 7, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    without_counters = {name: tensor for name, tensor in theirs.items() if "num_batches" not in name}
    mf.load_reference_checkpoint(without_counters, residual=residual)


def altered(change):
    """Return a state dict in the authors' format, after `change` has altered it."""
    state = to_reference_state_dict(mf.build_model("ds_resnet8", width=2))
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (altered(lambda s: s.pop("layer2.execute.0.bn1.bn.bias")), r"missing layer2\.execute\.0\.bn1\.bn\.bias"),
        (altered(lambda s: s.update({"fc.weight": torch.zeros(1)})), r"extra fc\.weight"),
        (
            altered(lambda s: s.update({"layer3.execute.0.conv1.weight": torch.zeros(8, 3, 3, 3)})),
            r"layer3\.execute\.0\.conv1\.weight of shape \[8, 3, 3, 3\], expected \[8, 4, 3, 3\]",
        ),
        (altered(lambda s: s.pop("conv1.weight")), r"conv1\.weight is missing"),
        (altered(lambda s: s.pop("voting.weight")), r"voting\.weight is missing"),
        ({"model": {"conv1.weight": 3}}, "expected .* state_dict"),
        (
            altered(lambda s: s.update({"layer1.execute.99999.conv1.weight": torch.zeros(1)})),
            r"layer1\.execute\.1\.conv1\.weight is missing",
        ),
        (altered(lambda s: s.update({"bn1.bn.bias": torch.zeros(2).long()})), r"bn1\.bn\.bias is of torch\.int64"),
        ({}, r"conv1\.weight is missing"),
    ],
)
def test_the_keys_of_the_authors_checkpoint_are_checked(state, message):
    with pytest.raises(ValueError, match=message):
        mf.load_reference_checkpoint(state)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Touch:
        def __reduce__(self):
            return (print, ("code ran",))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": Touch()}))
    with pytest.raises(ValueError, match=r"evil\.pth: damaged, or contains more than tensors"):
        mf.load_reference_checkpoint(path)


def test_a_truncated_file_of_the_authors_is_refused(gesture_checkpoint, tmp_path):
    path = tmp_path / "cut.pth"
    intact = gesture_checkpoint.read_bytes()
    for length in (0, 10, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(ValueError, match=r"cut\.pth: damaged"):
            mf.load_reference_checkpoint(path)


def test_writing_makes_no_reference_cycles(tmp_path):
    tensors = {f"layer{i}": torch.ones(3) for i in range(50)}
    write_tensors(tmp_path / "first.safetensors", tensors, {"kind": "test"})
    gc.collect()
    gc.disable()
    try:
        write_tensors(tmp_path / "second.safetensors", tensors, {"kind": "test"})
        assert gc.collect() < len(tensors)
    finally:
        gc.enable()


def test_bf16_is_written_as_fp32(tmp_path):
    weight = torch.randn(5).bfloat16()
    write_tensors(tmp_path / "bf16.safetensors", {"weight": weight}, {"format": "test", "version": "1"})
    read = safe_open(tmp_path / "bf16.safetensors", framework="pt").get_tensor("weight")
    assert read.dtype == torch.float32
    assert torch.equal(read, weight.float())
