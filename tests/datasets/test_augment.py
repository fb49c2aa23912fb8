"""Augmentations equal plain loops, and batches depend only on the seed, the epoch and their number."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from multifire.config import DataConfig
from multifire.datasets import DATASETS, EventSplit
from multifire.datasets.augment import Draws, augment, inside, move, places, shift
from multifire.datasets.loader import EventBatches

CPU = torch.device("cpu")
ALL = DataConfig(flip=True, roll=2, rotation=20.0, cutout=4, swap_polarity=0.5, time_jitter=2)
RNG = np.random.default_rng(0)


def frames(samples: int = 40, T: int = 5, H: int = 9, W: int = 7) -> torch.Tensor:
    return torch.from_numpy(RNG.integers(0, 256, (samples, T, 2, H, W), dtype=np.uint8))


def draws(samples: int) -> Draws:
    return Draws(torch.Generator().manual_seed(0), samples)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_default_configuration_changes_nothing():
    given, labels = frames(), torch.arange(40)
    found, same = augment(given, labels, DataConfig(), (), draws(len(labels)))
    assert torch.equal(found, given)
    assert torch.equal(same, labels)


def test_flip_and_roll_equal_a_loop():
    given = frames(6)
    mirrored, down, right = integers(0, 1, 0, 1, 0, 1), integers(0, 0, 3, -2, 8, 5), integers(0, 0, -3, 4, 0, -6)
    found = move(given, places(9, 7, mirrored, down, right, torch.zeros(6, dtype=torch.float64)))
    for n in range(6):
        expected = given[n].flip(-1) if mirrored[n] else given[n]
        expected = expected.roll((int(down[n]), int(right[n])), (-2, -1))
        assert torch.equal(found[n], expected)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation_by_quarter_turns_is_exact(turns):
    given = frames(1, H=8, W=8)
    angle = torch.tensor([turns * torch.pi / 2], dtype=torch.float64)
    found = move(given, places(8, 8, integers(0), integers(0), integers(0), angle))
    assert torch.equal(found, given.rot90(-turns, (-2, -1)))


def test_rotation_reads_the_nearest_cell_and_fills_with_zeros():
    given = frames(1, H=11, W=13)
    angle = 0.4
    found = move(
        given, places(11, 13, integers(0), integers(0), integers(0), torch.tensor([angle], dtype=torch.float64))
    )
    for row in range(11):
        for column in range(13):
            y, x = row - 5, column - 6
            source = (
                round(np.cos(angle) * y - np.sin(angle) * x + 5),
                round(np.sin(angle) * y + np.cos(angle) * x + 6),
            )
            within = 0 <= source[0] < 11 and 0 <= source[1] < 13
            expected = given[0, :, :, source[0], source[1]] if within else torch.zeros(5, 2)
            assert torch.equal(found[0, :, :, row, column].long(), expected.long())


def test_inside_marks_the_cells_of_a_square():
    mask = inside(9, 7, integers(2, -1), integers(3, 5), integers(3, 4))
    expected = torch.zeros(2, 9, 7, dtype=torch.bool)
    expected[0, 2:5, 3:6] = True
    expected[1, 0:3, 5:7] = True
    assert torch.equal(mask, expected)


def test_cutout_sets_squares_of_up_to_its_size_to_zero():
    given = torch.ones(500, 2, 2, 20, 20, dtype=torch.uint8)
    found, _ = augment(given, torch.arange(500), DataConfig(cutout=5), (), draws(500))
    blank = (found == 0).all(1).all(1)
    assert torch.equal(blank, (found == 0).any(1).any(1))
    sizes = blank.sum((1, 2))
    assert sizes.max() == 25
    assert set(sizes.tolist()) >= {0, 1, 4, 9, 16, 25}


def test_time_jitter_and_polarity_swap_equal_a_loop():
    given = frames(6)
    later, swapped = integers(0, 1, -1, 4, -5, 2), integers(0, 1, 0, 1, 0, 1)
    found = shift(given, later, swapped)
    for n in range(6):
        for t in range(5):
            source = t - int(later[n])
            expected = given[n, source] if 0 <= source < 5 else torch.zeros_like(given[n, 0])
            assert torch.equal(found[n, t], expected.flip(0) if swapped[n] else expected)


def test_flip_exchanges_the_labels_of_left_and_right_gestures():
    info = DATASETS["dvs-gesture"]
    swaps = {
        "right hand wave": "left hand wave",
        "right arm clockwise": "left arm counter-clockwise",
        "right arm counter-clockwise": "left arm clockwise",
    }
    expected = {**{name: name for name in info.classes}, **swaps, **{b: a for a, b in swaps.items()}}
    assert {name: info.classes[info.mirror[label]] for label, name in enumerate(info.classes)} == expected
    given, labels = frames(300), torch.arange(300) % 11
    found, changed = augment(given, labels, DataConfig(flip=True), info.mirror, draws(len(labels)))
    mirrored = 0
    for n in range(300):
        if torch.equal(found[n], given[n].flip(-1)):
            assert changed[n] == info.mirror[labels[n]]
            mirrored += 1
        else:
            assert torch.equal(found[n], given[n])
            assert changed[n] == labels[n]
    assert 110 < mirrored < 190


@pytest.mark.parametrize("cfg", [DataConfig(flip=True), DataConfig(roll=3), DataConfig(swap_polarity=0.3)])
def test_augmentations_that_move_counts_keep_their_sum(cfg):
    given = frames()
    found, _ = augment(given, torch.arange(40), cfg, (), draws(40))
    assert torch.equal(found.long().sum((1, 2, 3, 4)), given.long().sum((1, 2, 3, 4)))
    assert not torch.equal(found, given)


def test_augmentation_adds_no_new_count_values():
    given = frames()
    found, _ = augment(given, torch.arange(40), ALL, (), draws(40))
    assert found.dtype == torch.uint8
    for before, after in zip(given, found, strict=True):
        assert set(after.unique().tolist()) <= {0, *before.unique().tolist()}


def test_an_option_does_not_change_the_random_numbers_of_another():
    given, labels = frames(), torch.arange(40)
    rolled, _ = augment(given, labels, DataConfig(roll=2), (), draws(len(labels)))
    both, _ = augment(given, labels, DataConfig(roll=2, time_jitter=0, swap_polarity=1.0), (), draws(len(labels)))
    assert torch.equal(both, rolled.flip(2))


# Batches


def make_split(samples: int = 50, tmp_path=None) -> EventSplit:
    """Return random frames whose labels are their positions, so that a test can identify the samples."""
    data = RNG.integers(0, 256, (samples, 3, 2, 6, 5), dtype=np.uint8)
    if tmp_path:
        np.save(tmp_path / "frames.npy", data)
        data = np.load(tmp_path / "frames.npy", mmap_mode="r")
    return EventSplit(data, np.arange(samples), np.arange(samples).astype(str), np.arange(samples))


def make_batches(split: EventSplit, **options) -> EventBatches:
    return EventBatches(split, **{"batch_size": 16, "device": CPU, "shuffle": True, **options})


def test_batches_are_raw_counts_time_first_and_channels_last(tmp_path):
    split = make_split(tmp_path=tmp_path)
    seen = []
    for x, y in make_batches(split).epoch(0):
        assert x.dtype == torch.float32
        assert x.shape[:1] + x.shape[2:] == (3, 2, 6, 5)
        assert x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(x.numpy().transpose(1, 0, 2, 3, 4), split.frames[y.numpy()])
        seen += y.tolist()
    assert sorted(seen) == list(range(50))
    assert seen != sorted(seen)


def test_picked_samples_keep_their_names_labels_and_frames():
    split = make_split().pick(np.array([40, 3, 7]))
    assert split.names.tolist() == ["40", "3", "7"]
    x, y = next(make_batches(split, shuffle=False).epoch(0))
    assert y.tolist() == [40, 3, 7]
    assert np.array_equal(x[:, 1].numpy(), split.frames[3])


def test_batches_depend_only_on_seed_epoch_and_batch_number():
    split = make_split()

    def drawn(seed, epoch, start=0):
        torch.manual_seed(1234 + start)  # the global generator must have no influence
        return list(make_batches(split, seed=seed, cfg=ALL).epoch(epoch, start))

    first, again, rest = drawn(1, 5), drawn(1, 5), drawn(1, 5, start=2)
    for (x, y), (x_again, y_again) in zip(first, again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert len(rest) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[2:], rest, strict=True))
    for other in (drawn(2, 5), drawn(1, 6)):
        assert not torch.equal(other[0][0], first[0][0])


def test_batches_without_shuffling_are_in_order_and_not_augmented():
    split = make_split()
    x, y = next(make_batches(split, shuffle=False, cfg=ALL).epoch(3))
    assert y.tolist() == list(range(16))
    assert np.array_equal(x.numpy().transpose(1, 0, 2, 3, 4), split.frames[:16])


def test_start_outside_an_epoch_is_refused():
    with pytest.raises(ValueError, match="start is 5, expected 0 to 4"):
        make_batches(make_split()).epoch(0, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_equal_those_on_a_cpu():
    split = make_split()
    cfg = replace(ALL, rotation=25.0)
    on_gpu = make_batches(split, cfg=cfg, device=torch.device("cuda")).epoch(1)
    for (x, y), (other, y_other) in zip(make_batches(split, cfg=cfg).epoch(1), on_gpu, strict=True):
        assert other.is_cuda
        assert torch.equal(x, other.cpu())
        assert torch.equal(y, y_other.cpu())
