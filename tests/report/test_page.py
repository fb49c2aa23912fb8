"""The report page: one file that loads nothing, and safe for run folders with malicious contents."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from multifire import datasets
from multifire.cli import main
from multifire.datasets.loader import make_batches
from multifire.report import write_report
from multifire.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from tests.report.conftest import HOSTILE_TEXT

MB = 2**20


class Elements(HTMLParser):
    """Collects the elements and attributes of a page, and the text of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def payload(page: Elements) -> dict:
    return json.loads(page.scripts[0])


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report(runs, out) == []
    return out


def test_page_is_one_file_below_8_mb_that_loads_nothing(page):
    assert page.stat().st_size < 8 * MB
    elements = Elements(page.read_text(encoding="utf-8"))
    for tag, attrs in elements.found:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)


def test_policy_allows_only_the_scripts_of_the_page(page):
    elements = Elements(page.read_text(encoding="utf-8"))
    (policy,) = [
        attrs["content"] for tag, attrs in elements.found if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in elements.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert "connect-src" not in policy  # so that default-src forbids connections


def test_numbers_in_the_page_equal_metrics_jsonl(page, runs):
    report = payload(Elements(page.read_text(encoding="utf-8")))
    (chart,) = [chart for chart in report["charts"] if chart["key"] == "accuracy"]
    shown = {
        (trace["meta"]["run"], trace["name"].rpartition(" · ")[2]): trace["y"] for trace in chart["facets"][0]["data"]
    }
    for index, folder in enumerate(runs):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert shown[index, "test"] == pytest.approx([record["test_accuracy"] for record in records], rel=1e-6)
        assert shown[index, "training"] == pytest.approx([record["train_accuracy"] for record in records], rel=1e-6)


FIGURE = re.compile(
    r'<figure><img src="data:image/png;base64,([^"]+)" alt="a test sample of class ([^"]+)"[^>]*>'
    r"<figcaption>([^<]+) <s>taken for</s> <b>([^<]+)</b> <s>(\d+) %</s></figcaption></figure>"
)


def pixels_of(png: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(png))).tobytes()


def test_mistakes_of_which_each_network_is_surest_are_shown_as_png_images(page, runs):
    """The expected mistakes are found here from the checkpoint and the test images, in batches of the same size.

    With another size a convolution might round differently, and a spike flip.
    """
    text = page.read_text(encoding="utf-8")
    galleries = re.findall(r'<div class="card samples"(.*?)</div></div>', text, re.DOTALL)
    assert len(galleries) == len(runs)
    assert sum(tag == "img" for tag, _ in Elements(text).found) == 24 * len(runs)
    for gallery, folder in zip(galleries, runs, strict=True):
        assert "<h3>Mistakes it was surest of</h3><p>Of 512 test samples that were gone through.</p>" in gallery
        model, cfg = load_model(folder / "last.safetensors")
        data = datasets.load(cfg.data.name, cfg.data.root, cfg.data)
        test = data.test.pick(np.linspace(0, len(data.test) - 1, 512).round().astype(int))
        with torch.no_grad():
            batches = make_batches(test, data.info, cfg.data, batch_size=64, device=torch.device("cpu"), shuffle=False)
            probabilities = torch.cat([model(x).softmax(1) for x, _ in batches.epoch(0)])
        sure, predicted = probabilities.max(1)
        wrong = (predicted != torch.tensor(test.labels)).nonzero()[:, 0].tolist()
        surest = sorted((sure[i].item() for i in wrong), reverse=True)
        shown = FIGURE.findall(gallery)
        assert len(shown) == 24
        unseen = set(wrong)
        for rank, (encoded, alt, true, taken_for, percent) in enumerate(shown):
            png = base64.b64decode(encoded)
            assert png.startswith(b"\x89PNG")
            same = [i for i in unseen if test.images[i].tobytes() == pixels_of(png)]
            assert same, f"picture {rank} shows no mistake, or one shown before"
            index = same[0]  # of equal images any
            unseen.remove(index)
            assert sure[index].item() == pytest.approx(surest[rank], abs=1e-4)
            assert alt == true == data.info.classes[test.labels[index]]
            assert taken_for == data.info.classes[predicted[index]]
            assert int(percent) == pytest.approx(100 * surest[rank], abs=0.51)


def test_markup_of_a_hostile_run_is_shown_as_text(hostile_run, tmp_path, runs):
    for folders in ([hostile_run], [hostile_run, *runs]):
        out = tmp_path / "report.html"
        write_report(folders, out, tmp_path / "figures")
        text = out.read_text(encoding="utf-8")
        elements = Elements(text)
        assert len(elements.scripts) == 3
        assert not any(name.startswith("on") for _, attrs in elements.found for name in attrs)
        assert HOSTILE_TEXT not in text
        images = [attrs["src"] for tag, attrs in elements.found if tag == "img"]
        assert all(source.startswith("data:image/png") for source in images)
        for chart in payload(elements)["charts"]:
            shown = json.dumps(chart["facets"])
            assert "<img" not in shown  # plotly interprets some markup in labels
            assert "<b onmouseover" not in shown
    assert any((tmp_path / "figures").glob("accuracy.*"))


def test_run_without_an_analysis_is_analysed_and_the_analysis_is_stored(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for file in runs[0].iterdir():
        if not file.name.startswith("analysis"):
            (folder / file.name).write_bytes(file.read_bytes())
    assert any(
        "analysis.json is missing" in note for note in write_report([folder], tmp_path / "a.html", measure=False)
    )
    assert not (folder / "analysis.json").exists()
    notes = write_report([folder], tmp_path / "b.html")
    assert [note for note in notes if "analysis.json " in note] == []
    stored, original = (json.loads((f / "analysis.json").read_text()) for f in (folder, runs[0]))
    assert [layer["name"] for layer in stored["layers"]] == [layer["name"] for layer in original["layers"]]
    assert stored["energy"]["ann_macs"] == original["energy"]["ann_macs"]
    assert stored["checkpoint"] == original["checkpoint"] == "last"


def test_checkpoint_whose_network_is_larger_than_its_file_is_refused(runs, tmp_path):
    """A checkpoint from an unknown source may describe a network that is too large for any memory."""
    import safetensors.torch

    from tests.test_train import override

    checkpoint = load_checkpoint(runs[0] / "last.safetensors")
    large = override(checkpoint.config, model={"width": 10**6, "levels": 1})
    save_checkpoint(tmp_path / "large.safetensors", type(checkpoint)(large, checkpoint.position, checkpoint.model, {}))
    assert safetensors.torch.load_file(tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the network: found .* values, expected .* parameters"):
        load_model(tmp_path / "large.safetensors")


def test_report_command_writes_its_files_and_prints_errors_in_one_line(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs), "--figures", "figs", "--no-measure"]) == 0
    assert "written to report.html, figures to figs" in capsys.readouterr().out
    assert (tmp_path / "figs" / "accuracy.svg").is_file()
    for args, message in (
        (["report", "nowhere"], "nowhere: no such run folder"),
        (["report", str(tmp_path)], "no run in this folder"),
        (["report"], "required: RUN"),
    ):
        assert main(args) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
