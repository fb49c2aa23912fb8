"""Batches of images: shapes, order, normalisation, crops and flips."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from multifire.datasets import Split, get_info, normalise
from multifire.datasets.loader import Batches, cut
from multifire.datasets.samples import one_ahead

CPU = torch.device("cpu")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def make_split(samples: int = 50, size: int = 8) -> Split:
    """Return random images whose labels are their positions, so that a test can identify the samples."""
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (samples, 3, size, size), dtype=np.uint8), np.arange(samples))


def make_batches(split: Split | None = None, **options) -> Batches:
    given = {"batch_size": 16, "timesteps": 4, "mean": MEAN, "std": STD, "device": CPU, "shuffle": True, **options}
    return Batches(make_split() if split is None else split, **given)


def labels_of(batches: Batches, epoch: int, start: int = 0) -> list[int]:
    return [label for _, y in batches.epoch(epoch, start) for label in y.tolist()]


def normalised(images: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(images).double() / 255 - mean) / std


def test_batches_have_the_expected_shapes_types_and_strides():
    batches = make_batches()
    assert len(batches) == 4
    given = list(batches.epoch(0))
    assert [x.shape for x, _ in given] == [(4, 16, 3, 8, 8)] * 3 + [(4, 2, 3, 8, 8)]
    for x, y in given:
        assert x.dtype == torch.float32
        assert x.stride(0) == 0
        assert y.dtype == torch.int64
        assert y.shape == x.shape[1:2]


def test_images_are_not_copied_on_a_cpu():
    split = make_split()
    batches = make_batches(split, shuffle=False)
    split.images[:] = 255
    white = normalised(np.full((1, 3, 1, 1), 255, dtype=np.uint8))
    for x, _ in batches.epoch(0):
        torch.testing.assert_close(x.double(), white.expand(x.shape), atol=1e-5, rtol=0)


def test_one_item_is_computed_ahead_by_a_thread():
    started: list[tuple[int, int]] = []

    def numbers():
        for number in range(4):
            started.append((number, threading.get_ident()))
            yield number

    items = one_ahead(numbers())
    assert next(items) == 0
    assert next(items) == 1
    assert len(started) <= 3  # the next one may have been started, none after it
    assert list(items) == [2, 3]
    assert threading.get_ident() not in {thread for _, thread in started}


def test_an_error_in_the_thread_reaches_the_caller():
    def numbers():
        yield 0
        raise ValueError("unreadable")

    items = one_ahead(numbers())
    assert next(items) == 0
    with pytest.raises(ValueError, match="unreadable"):
        next(items)


@pytest.mark.parametrize("samples", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_occurs_once_in_an_epoch(samples, shuffle):
    batches = make_batches(make_split(samples), shuffle=shuffle)
    labels = labels_of(batches, epoch=3)
    assert sorted(labels) == list(range(samples))
    assert len(list(batches.epoch(3))) == len(batches)
    if not shuffle:
        assert labels == sorted(labels)


def test_images_stay_with_their_labels_and_are_normalised():
    split = make_split()
    for x, y in make_batches(split).epoch(0):
        assert torch.allclose(x.double(), normalised(split.images[y.numpy()]).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalise_makes_what_training_sees(dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 4, 6)).astype(dtype)
    info = replace(get_info("cifar10"), size=4, width=6)
    batches = make_batches(Split(images, np.arange(5)), shuffle=False)
    (x_TNCHW, _), *_ = batches.epoch(0)
    assert np.array_equal(normalise(images, info), x_TNCHW[0].numpy())
    with pytest.raises(ValueError, match=r"found the shape \[5, 4, 6\], expected \[..., C, H, W\] with C = 3"):
        normalise(images[:, 0], info)


def test_order_depends_only_on_seed_and_epoch():
    batches = make_batches(seed=1)
    first = labels_of(batches, 5)
    torch.manual_seed(99)  # the global generators must have no influence
    np.random.seed(99)
    labels_of(batches, 6)
    assert labels_of(batches, 5) == first
    assert labels_of(make_batches(seed=1, crop_padding=2, flip=True), 5) == first
    others = [labels_of(make_batches(seed=2), 5), labels_of(batches, 6), labels_of(make_batches(seed=5), 1)]
    assert all(other != first for other in others)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_start_within_an_epoch_gives_the_same_batches(start):
    batches = make_batches(crop_padding=2, flip=True)
    whole = list(batches.epoch(7))[start:]
    rest = list(make_batches(crop_padding=2, flip=True).epoch(7, start))
    assert len(rest) == len(whole) == 4 - start
    for (x, y), (x_again, y_again) in zip(whole, rest, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


def test_start_outside_an_epoch_is_refused():
    for start in (-1, 5):
        with pytest.raises(ValueError, match=f"start is {start}, expected 0 to 4, the batches of an epoch"):
            make_batches().epoch(0, start)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1, expected at least 0"):
        make_batches(seed=-1)


@pytest.mark.parametrize(("padding", "height", "width"), [(0, 5, 5), (1, 4, 7), (4, 8, 8), (9, 3, 2)])
def test_cut_equals_a_loop_over_images(padding, height, width):
    rng = np.random.default_rng(padding)
    images = rng.integers(0, 256, (40, 3, height, width), dtype=np.uint8)
    y, x = rng.integers(0, 2 * padding + 1, (2, 40))
    mirrored = rng.integers(0, 2, 40)
    expected = np.zeros_like(images)
    for n in range(40):
        for row in range(height):
            for column in range(width):
                from_row = row + y[n] - padding
                from_column = (width - 1 - column if mirrored[n] else column) + x[n] - padding
                if 0 <= from_row < height and 0 <= from_column < width:
                    expected[n, :, row, column] = images[n, :, from_row, from_column]
    found = cut(torch.from_numpy(images), padding, *(torch.from_numpy(a) for a in (y, x, mirrored)))
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), expected)


def test_all_crops_and_flips_occur_about_equally_often():
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 1, 3, 3)
    split = Split(np.repeat(image, 3600, axis=0), np.zeros(3600, dtype=np.int64))
    batches = make_batches(split, mean=(0.0,), std=(1 / 255,), crop_padding=1, flip=True, batch_size=100)
    seen = torch.cat([x[0] for x, _ in batches.epoch(0)]).flatten(1).round().to(torch.uint8)
    kinds, counts = torch.unique(seen, dim=0, return_counts=True)
    assert len(kinds) == 9 * 2
    assert counts.min() > 140  # 200 expected, standard deviation 14
    assert counts.max() < 260


def test_flip_mirrors_about_half_of_the_images():
    split = make_split(1000, size=4)
    mirrored = 0
    for x, y in make_batches(split, flip=True).epoch(0):
        plain = normalised(split.images[y.numpy()])
        same = (x[0] - plain).abs().amax((1, 2, 3)) < 1e-4
        flipped = (x[0] - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-4
        assert (same ^ flipped).all()
        mirrored += int(flipped.sum())
    assert 430 < mirrored < 570


def test_batches_without_shuffling_are_not_augmented():
    plain, augmented = make_batches(shuffle=False), make_batches(shuffle=False, crop_padding=3, flip=True, seed=9)
    for (x, _), (other, _) in zip(plain.epoch(0), augmented.epoch(4), strict=True):
        assert torch.equal(x, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_equal_those_on_a_cpu():
    options = {"crop_padding": 2, "flip": True}
    on_gpu = make_batches(device=torch.device("cuda"), **options)
    for (x, y), (other, y_other) in zip(make_batches(**options).epoch(1), on_gpu.epoch(1), strict=True):
        assert other.is_cuda
        assert torch.allclose(x, other.cpu(), atol=1e-6)
        assert torch.equal(y, y_other.cpu())
