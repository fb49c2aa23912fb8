"""Export a run's checkpoint to an exchange format, or to a folder to share."""

import importlib
from pathlib import Path
from types import ModuleType

from multifire.datasets import describe, input_size
from multifire.export.int8 import quantise_network
from multifire.export.pretrained import save_pretrained
from multifire.export.provenance import make_provenance
from multifire.nn import require_known
from multifire.training.load_run import load_run

ENDINGS = {"onnx": ".onnx", "onnx-int8": "-int8.onnx", "nir": ".nir", "pretrained": "-pretrained"}


def write_run(folder: Path, to: str, out: Path | None = None, which: str | None = None, step: bool = False) -> Path:
    """Export a run's "best" or "last" checkpoint to a format of ENDINGS; return the path of the file or folder.

    Args:
        folder: run folder.
        to: a key of ENDINGS.
        out: path to write; None is a name in the run folder.
        which: "best" or "last"; None selects the checkpoint that the summary reports.
        step: ONNX only: export one time step instead of a sequence.

    Raises:
        FileExistsError: a network to share would replace other files.
        FileNotFoundError: no such run or checkpoint.
        ValueError: the format's packages are not installed, or it cannot represent the network.
    """
    run = load_run(folder, which)
    model, cfg = run.model, run.cfg
    require_known(model, "multifire export")
    provenance = make_provenance(folder, run.which)
    info = describe(cfg.data)
    size = input_size(cfg.data, info)
    path = out or folder / f"{run.which}{'-step' if step else ''}{ENDINGS[to]}"
    if to == "pretrained":
        save_pretrained(model, path, provenance)
        return path
    module = import_format(to)
    if to == "onnx":
        module.write_onnx(path, model, size, provenance, step=step)
    elif to == "onnx-int8":
        network = quantise_network(model, cfg.model, info.events)
        module.write_onnx_int8(path, model, network, size, provenance, step=step)
    else:
        module.write_nir(path, model, size, provenance)
    return path


def import_format(to: str) -> ModuleType:
    """Import the module of a format that needs the packages of an extra.

    Raises:
        ValueError: the packages are not installed.
    """
    try:
        return importlib.import_module(f"multifire.export.{'onnx_int8' if to == 'onnx-int8' else to}")
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed; run `pip install 'multifire[{to.removesuffix('-int8')}]'`"
        ) from None
