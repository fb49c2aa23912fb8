"""Write a trained network as C: the engine in one source file, the weights as an array, and a program."""

import re
import tempfile
from pathlib import Path
from typing import Any

from multifire.datasets import DatasetInfo, describe, input_size
from multifire.engine.networks import config_of_file
from multifire.export.int8 import export_run
from multifire.training.run_folder import RunFolder
from multifire.utils.files import write_atomic

SOURCES = Path(__file__).parent / "csrc"
TEMPLATES = Path(__file__).parent / "c_templates"
BYTES_OF_A_LINE = 24
OWN_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)


def write_c(folder: Path, out: Path | None = None, which: str | None = None) -> Path:
    """Write the network of a run as a folder of C sources; return the folder.

    It holds `multifire_engine.h` and `multifire_engine.cpp` (the engine), `network.c` (the weights), `main.c`,
    `CMakeLists.txt` and a README, which says how to build and use them.

    Args:
        folder: the run's folder.
        out: the folder to write (default: CHECKPOINT-c in the run's folder).
        which: "best" or "last" (default: the one whose accuracy the summary reports).

    Raises:
        FileNotFoundError: no such run or checkpoint.
        FileExistsError: `out` holds other files, which would be mixed with these or be lost.
        ValueError: the checkpoint is damaged, or int8 cannot represent its network.
    """
    which = which or RunFolder(folder).reported_checkpoint()
    with tempfile.TemporaryDirectory() as temporary:
        path = export_run(folder, Path(temporary) / "network.safetensors", which).path
        weights, cfg = path.read_bytes(), config_of_file(path)
    info = describe(cfg.data)
    height, width = input_size(cfg.data, info)
    values = {
        "channels": info.channels,
        "height": height,
        "width": width,
        "timesteps": cfg.data.timesteps,
        "classes": len(info.classes),
        "names": ", ".join(_quoted(name) for name in info.classes),
        "counts": int(info.events),
        "pixels": "" if info.events else _pixels(info),
        "network": f"{cfg.model.name}, {cfg.data.name}",
    }
    target = out or folder / f"{which}-c"
    _check_is_ours(target)
    target.mkdir(parents=True, exist_ok=True)
    files = {
        "multifire_engine.h": (SOURCES / "multifire_engine.h").read_text(),
        "multifire_engine.cpp": engine_source(),
        "network.c": _array(weights),
        "network.h": _filled("network.h", values),
        "main.c": _filled("main.c", values),
        "CMakeLists.txt": _filled("CMakeLists.txt", values),
        "README.md": _filled("README.md", values),
    }
    for name, text in files.items():
        write_atomic(target / name, text.encode())
    return target


def _check_is_ours(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "multifire_engine.h").is_file():
        raise FileExistsError(f"{folder} holds other files; choose a new folder")


def engine_source() -> str:
    """Return the sources of the engine as one file, which includes `multifire_engine.h` alone."""
    return '#include "multifire_engine.h"\n\n' + _with_includes("engine.cpp", {"multifire_engine.h"})


def _with_includes(name: str, seen: set[str]) -> str:
    """Return a file with our own files in the place of their includes, each once."""

    def included(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _with_includes(match[1], seen)

    return OWN_INCLUDE.sub(included, (SOURCES / name).read_text())


def _array(data: bytes) -> str:
    """Return C code that defines the bytes of the network's file."""
    lines = [", ".join(map(str, data[i : i + BYTES_OF_A_LINE])) for i in range(0, len(data), BYTES_OF_A_LINE)]
    body = ",\n".join(f"    {line}" for line in lines)
    return (
        '/* The network: the bytes of the file that `multifire export --to int8` writes. */\n#include "network.h"\n\n'
        f"const unsigned char network[] = {{\n{body}}};\nconst size_t network_size = sizeof network;\n"
    )


def _pixels(info: DatasetInfo) -> str:
    """Return a sentence on how pixels become the numbers that the network takes."""
    mean, std = (", ".join(f"{value:.9g}" for value in values) for values in (info.mean, info.std))
    return f"\nA pixel of 0 to 255 becomes (pixel / 255 - mean) / std; mean of the channels: {mean}, std: {std}.\n"


def _filled(template: str, values: dict[str, Any]) -> str:
    """Return a template with each @NAME@ replaced."""
    text = (TEMPLATES / template).read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def _quoted(text: str) -> str:
    """Return the text as a C string; other characters than printable ASCII as octal escapes of their UTF-8."""
    safe = {ord(c) for c in map(chr, range(32, 127)) if c not in '"\\?'}
    return '"' + "".join(chr(b) if b in safe else f"\\{b:03o}" for b in text.encode()) + '"'
