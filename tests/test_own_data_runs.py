"""Train on own data from the command line, and use the runs: pictures, arrays and registered data sets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multifire as mf
from tests.test_cli import run

SMALL = ("--model.width", "2", "--optim.epochs", "1", "--optim.batch-size", "16")


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 80 images of the digits 3 and 7, and their classes 0 and 1."""
    train = mf.datasets.load("digits").train
    picked = np.concatenate([np.flatnonzero(train.labels == digit)[:40] for digit in (3, 7)])
    return train.images[picked], (train.labels[picked] == 7).astype(np.int64)


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number, (image, label) in enumerate(zip(*digits, strict=True)):
        folder = root / ("test" if number % 4 == 0 else "train") / ("three", "seven")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{number}.png")
    return root


def test_a_folder_of_pictures_is_trained_on_and_its_run_is_used(pictures, tmp_path):
    out = tmp_path / "run"
    data = ("--data.name", "folder", "--data.root", str(pictures))
    done = run("train", "digits", *data, *SMALL, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "60 training and 20 test images" in " ".join(done.stdout.split())
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["classes"] == ["seven", "three"]
    assert (config["model"]["in_channels"], config["model"]["num_classes"]) == (1, 2)
    for command in (
        ("eval", str(out)),
        ("summary", str(out)),
        ("export", str(out), "--to", "int8"),
        ("report", str(out)),
        ("train", "digits", *data, *SMALL, "--out", str(out), "--resume"),
        ("train", "digits", *data, *SMALL, "--dry-run"),
    ):
        done = run(*command)
        assert done.returncode == 0, (command, done.stderr)
    assert "three" in run("eval", str(out)).stdout
    assert "three" in (out / "report.html").read_text()


def test_arrays_with_mixed_labels_are_trained_on(digits, tmp_path):
    images, labels = digits
    file = tmp_path / "arrays.npz"
    np.savez(file, x_train=images[::2], y_train=labels[::2], x_test=images[1::2], y_test=labels[1::2])
    options = ("--data.mixup", "0.5", "--data.cutout", "4", "--optim.loss", "tet")
    done = run(
        "train",
        "digits",
        "--data.name",
        "npz",
        "--data.root",
        str(file),
        *SMALL,
        *options,
        "--out",
        str(tmp_path / "r"),
    )
    assert done.returncode == 0, done.stderr
    assert run("eval", str(tmp_path / "r")).returncode == 0


def test_a_registered_data_set_is_trained_on_and_needs_its_code(tmp_path):
    code = tmp_path / "noise.py"
    code.write_text(
        "import numpy as np\n"
        "import multifire as mf\n"
        "\n"
        "@mf.register_dataset('noise')\n"
        "def noise(cfg):\n"
        "    rng = np.random.default_rng(0)\n"
        "    part = lambda n: (rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), np.arange(n) % 3)\n"
        "    return mf.datasets.make_dataset('noise', part(48), part(12))\n"
        "\n"
        "recipe = mf.recipe('digits', **{'data.name': 'noise', 'data.crop_padding': 0})\n"
    )
    done = run("train", str(code), *SMALL, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert run("eval", str(tmp_path / "run"), "--code", str(code)).returncode == 0
    without = run("eval", str(tmp_path / "run"))
    assert without.returncode == 2
    assert "unknown data set 'noise'" in without.stderr


def test_a_network_that_does_not_fit_own_data_from_python_is_named(digits, tmp_path):
    data = mf.datasets.make_dataset("mine", digits, digits)
    cfg = mf.recipe("digits", **{"optim.epochs": 1, "model.width": 2})
    network = mf.build_model("ds_resnet8", in_channels=1, num_classes=5, width=2)
    with pytest.raises(ValueError, match="the network has num_classes = 5, expected 2"):
        mf.train(cfg, tmp_path / "run", data=data, network=network)
