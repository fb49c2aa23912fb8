"""The embedded digits, and what all data sets share: names, splits, and an import without torch or numpy."""

import hashlib
import logging
import subprocess
import sys

import numpy as np
import pytest

from multifire import datasets
from multifire.datasets import Split

SHA256 = {  # as tools/make_digits.py prints them
    "train": "e6689bedd253b843a026dcb13196ab14606dced9504d4e20061ee9604c6303fa",
    "test": "c61befb9e3b2eaea46a372682f0f2ed83655ffafd04bca85781c3ba30e26e72f",
}


@pytest.fixture(scope="module")
def digits() -> datasets.Dataset:
    return datasets.load("digits")


def test_digits_equal_the_output_of_the_tool(digits):
    for name, split, per_class in (("train", digits.train, 400), ("test", digits.test, 100)):
        assert split.images.shape == (10 * per_class, 1, 28, 28)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert np.bincount(split.labels).tolist() == [per_class] * 10
        assert hashlib.sha256(split.images.tobytes()).hexdigest() == SHA256[name]
        # The samples are shuffled, so the first and the last fifth hold about as many of every class.
        for part in (split.labels[: 2 * per_class], split.labels[-2 * per_class :]):
            assert np.abs(np.bincount(part, minlength=10) - per_class / 5).max() < 0.12 * per_class
    assert digits.name == "digits"
    assert digits.info is datasets.DATASETS["digits"]


def test_digits_load_without_a_folder_and_without_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="multifire"):
        datasets.load("digits", tmp_path / "nowhere")
    assert not caplog.records


def test_no_test_digit_is_among_the_training_digits(digits):
    train = {image.tobytes() for image in digits.train.images}
    assert len(train) == 4000
    assert not train & {image.tobytes() for image in digits.test.images}


def test_mean_and_std_are_near_those_of_mnist(digits):
    pixels = digits.train.images / 255
    assert pixels.mean() == pytest.approx(digits.info.mean[0], abs=0.002)
    assert pixels.std() == pytest.approx(digits.info.std[0], abs=0.002)


def test_registry_entries_are_consistent():
    for info in datasets.DATASETS.values():
        assert len(info.mean) == len(info.std) == (0 if info.events else info.channels)
        assert len(set(info.classes)) == len(info.classes) >= 10
        assert sorted(info.mirror) in ([], list(range(len(info.classes))))
        assert not (info.fetch and info.downloads)
        for item in info.downloads:
            algorithm, _, digest = item.checksum.partition(":")
            assert len(digest) == {"sha256": 64, "md5": 32}[algorithm]
            assert item.url.endswith("/" + item.filename) or "figshare.com/files/" in item.url
            assert item.url.startswith(("https://", "http://"))


def test_error_for_an_unknown_name_suggests_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown data set 'cifar-10'; did you mean cifar10\?"):
        datasets.load("cifar-10")


def test_import_loads_neither_torch_nor_numpy():
    program = (
        "import sys, multifire.datasets, multifire.datasets.download; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_hold_out_takes_the_same_share_of_every_class(digits):
    train, validation = datasets.hold_out(digits.train, 0.1, seed=3)
    assert np.bincount(train.labels).tolist() == [360] * 10
    assert np.bincount(validation.labels).tolist() == [40] * 10
    together = sorted(image.tobytes() for part in (train, validation) for image in part.images)
    assert together == sorted(image.tobytes() for image in digits.train.images)


def test_hold_out_is_determined_by_the_seed(digits):
    first, again, other = (datasets.hold_out(digits.train, 0.2, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)


@pytest.mark.parametrize(("share", "side", "change"), [(0.001, "validation", "larger"), (0.999, "training", "smaller")])
def test_hold_out_refuses_an_empty_side(digits, share, side, change):
    small = digits.test.pick(np.arange(100))
    with pytest.raises(ValueError, match=f"of 100 samples leaves none for {side}; choose a {change} share"):
        datasets.hold_out(small, share, seed=0)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_hold_out_refuses_an_invalid_share(digits, share):
    with pytest.raises(ValueError, match=rf"validation is {share}, expected 0 < share < 1"):
        datasets.hold_out(digits.train, share, seed=0)


def test_take_returns_the_first_samples_of_one_random_order(digits):
    ten, twenty = (datasets.take(digits.train, limit, seed=0) for limit in (10, 20))
    assert len(ten) == 10
    assert np.array_equal(ten.images, twenty.images[:10])
    assert not np.array_equal(ten.images, datasets.take(digits.train, 10, seed=1).images)
    assert datasets.take(digits.train, 4000, seed=0) is digits.train


def test_take_and_hold_out_refuse_invalid_limits_and_seeds(digits):
    with pytest.raises(ValueError, match="limit is 0, expected at least 1"):
        datasets.take(digits.train, 0, seed=0)
    for call in (datasets.take, datasets.hold_out):
        with pytest.raises(ValueError, match="seed is -1, expected at least 0"):
            call(digits.train, 0.5 if call is datasets.hold_out else 5, seed=-1)


def test_split_asserts_the_dtype_and_the_number_of_labels():
    with pytest.raises(AssertionError):
        Split(np.zeros((2, 1, 3, 3), dtype=np.float64), np.zeros(2, dtype=np.int64))
    with pytest.raises(AssertionError):
        Split(np.zeros((2, 1, 3, 3), dtype=np.uint8), np.zeros(3, dtype=np.int64))
