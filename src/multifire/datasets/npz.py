"""Read own arrays from an .npz file. Nothing in it is unpickled.

    x_train, y_train, x_test, y_test            or train_images, train_labels, test_images, test_labels
    images, labels                              divided by seed into training and test samples
    classes                                     names of the classes, optional

Images are [N, C, H, W], [N, H, W, C] or [N, H, W]; event frames [N, T, 2, H, W].
"""

import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from multifire.config import DataConfig
from multifire.datasets.arrays import from_arrays
from multifire.datasets.classes import divide
from multifire.datasets.splits import EventSplit, Split

AnyArraySplit = Split | EventSplit
KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
WHOLE = (("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"), ("frames", "labels"))
"""Keys of samples that are divided by seed."""


def read(root: Path, cfg: DataConfig) -> tuple[AnyArraySplit, AnyArraySplit, tuple[str, ...] | None, str]:
    """Read train and test split, names of the classes if the file has them, and the file's name.

    Args:
        root: the file, or a folder that holds one .npz file, or whose subfolder `npz` does.
        cfg: test_share and split_seed, for a file without a part for the test.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, arrays of objects, other keys, or samples or labels of another kind.
    """
    path = find(root)
    try:
        arrays, classes = _load(path)
    except OSError as error:
        if error.errno is not None:  # missing, unreadable: the system's own words
            raise
        raise _damaged(path, error) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, SyntaxError, tokenize.TokenError, MemoryError) as error:
        raise _damaged(path, error) from None
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    keys = list(arrays)
    if len(keys) == 4:
        parts = [
            from_arrays(arrays[x], arrays[y], where=f"{path}: {x}", labels_where=f"{path}: {y}")
            for x, y in (keys[:2], keys[2:])
        ]
        return parts[0], parts[1], classes, str(path)
    split = from_arrays(arrays[keys[0]], arrays[keys[1]], where=f"{path}: {keys[0]}", labels_where=f"{path}: {keys[1]}")
    names = tuple(map(str, np.unique(split.labels)))
    numbers = np.searchsorted(np.unique(split.labels), split.labels)
    held = divide(numbers, names, cfg, str(path))
    return split.pick(~held), split.pick(held), classes, str(path)


def _load(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """Return the arrays in the order of KEYS or WHOLE, and the names of the classes."""
    with path.open("rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise ValueError(
                "is no archive of named arrays, expected one that numpy.savez wrote; nothing was unpickled"
            )
    with np.load(path, allow_pickle=False) as file:
        names = set(file.files)
        keys = next((keys for keys in (*KEYS, *WHOLE) if names >= set(keys)), ())
        if not keys:
            found = ", ".join(file.files)[:200] or "nothing"
            raise ValueError(f"holds {found}, expected {', '.join(KEYS[0])}, or images, labels")
        return {key: _array(file, key) for key in keys}, _names(_array(file, "classes")) if "classes" in names else None


def find(root: Path) -> Path:
    """Return the .npz file at `root`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if root.is_file():
        return root
    for folder in (root / "npz", root):
        paths = sorted(folder.glob("*.npz"))
        if len(paths) > 1:
            raise ValueError(f"{folder}: holds {len(paths)} .npz files, expected one; give it with --data.root FILE")
        if paths:
            return paths[0]
    raise FileNotFoundError(f"no .npz file in {root / 'npz'} or {root}; give it with --data.root FILE")


def _array(file: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        return file[key]
    except ValueError as error:
        if "pickle" in str(error) or "Object" in str(error):
            raise ValueError(
                f"{key} holds Python objects, which may run code, expected an array of numbers; nothing was unpickled"
            ) from None
        raise ValueError(f"{key} is damaged ({error})") from None


def _names(classes: np.ndarray) -> tuple[str, ...]:
    if classes.ndim != 1 or classes.dtype.kind != "U" or len(set(classes.tolist())) != len(classes):
        raise ValueError(f"classes is {classes.dtype} {list(classes.shape)}, expected different texts [classes]")
    return tuple(classes.tolist())


def _damaged(path: Path, error: BaseException) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{path}: damaged, or no .npz file ({reason}); write it again with numpy.savez")
