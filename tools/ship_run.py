"""Make a network of the package from a finished run: `python tools/ship_run.py RUN NAME "a note for the card"`.

The checkpoint keeps the weights alone, the configuration forgets folder and device, and a model card is written.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from multifire.config import json_format
from multifire.export.pretrained import card
from multifire.export.provenance import make_provenance
from multifire.export.shipped import FOLDER
from multifire.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from multifire.training.run_folder import RunFolder
from multifire.utils.files import write_atomic, write_json

KEPT = ("metrics.jsonl", "analysis.json")


def main(run: Path, name: str, note: str) -> None:
    out = FOLDER / name
    out.mkdir(parents=True, exist_ok=True)
    which = RunFolder(run).reported_checkpoint()
    checkpoint = load_checkpoint(RunFolder(run).checkpoint(which))
    data = dataclasses.replace(checkpoint.config.data, root="data")
    cfg = dataclasses.replace(checkpoint.config, data=data, device="auto")
    weights = checkpoint.average or checkpoint.model
    path = out / f"{which}.safetensors"
    save_checkpoint(path, dataclasses.replace(checkpoint, config=cfg, model=weights, optimizer={}, average={}))
    write_atomic(out / "config.json", json_format.to_json(cfg).encode())
    for file in KEPT:
        if (run / file).is_file():
            shutil.copyfile(run / file, out / file)
    summary = json.loads((run / "summary.json").read_text())
    summary["config"] = json.loads(json_format.to_json(cfg))
    summary["machine"].pop("system", None)
    write_json(out / "summary.json", summary)
    model, _ = load_model(path)
    text = card(model, make_provenance(out, which), name)
    write_atomic(out / "README.md", f"{text}\n{note}\n".encode())
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
