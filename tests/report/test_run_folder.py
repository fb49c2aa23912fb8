"""Reading a run's folder: what is present is read, and what is missing or damaged is reported."""

import html
import json

import pytest

import multifire as mf
from multifire.report.run import Run
from multifire.report.run_files import MAX_FILE_BYTES
from multifire.report.values import clean, number, plain


def test_run_is_read(runs):
    run = mf.Run(runs[1])
    assert run.config.model.levels == 3
    assert run.summary["test_accuracy"] == json.loads((runs[1] / "summary.json").read_text())["test_accuracy"]
    assert [row["epoch"] for row in run.metrics] == [0, 1]
    assert run.notes == []
    assert run.accuracy == run.summary["test_accuracy"]
    assert f"{100 * run.accuracy:.2f} %" in run._repr_html_()
    assert "K = 3" in repr(run)
    assert run.metrics._repr_html_().count("<tr>") == 3


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json", "analysis.json", "analysis.jsonl"])
@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"{}", b"\xff\xfe", b"null", b"[" * 100_000, b'{"epoch": "x"}\n']
)
def test_missing_or_damaged_file_is_reported_and_raises_no_error(runs, tmp_path, name, content):
    """The reader is told in one note; nothing of the file is used, and all of the other files."""
    for file in runs[0].glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    run, intact = Run(tmp_path), Run(runs[0])

    if content is None:
        expected = f"{name} is missing: "
    elif name.endswith(".jsonl"):
        expected = f"1 damaged lines of {name} are ignored." if content else None  # a file may have no line yet
    elif name == "config.json":
        expected = "config.json: "  # the rest says what is wrong
    else:
        is_object = content.startswith(b"{")  # an object without the expected fields
        expected = None if is_object else f"{name} is damaged, and ignored."
    if expected is not None:
        (note,) = run.notes
        assert note.startswith(expected)
        assert f"<li>{html.escape(note)}</li>" in run._repr_html_()

    read, whole = contents(run), contents(intact)
    assert scalars(read.pop(name)) == []
    assert whole.pop(name)
    assert read == whole
    assert repr(run)


def contents(run: Run) -> dict[str, object]:
    """Return what was read from each file."""
    return {
        "config.json": run.config and run.fields,
        "metrics.jsonl": run.metrics,
        "summary.json": run.summary,
        "analysis.json": run.analysis,
        "analysis.jsonl": run.history,
    }


def scalars(tree: object) -> list[object]:
    """Return the values in nested dicts and lists; None, False and empty text count as no value."""
    if isinstance(tree, dict):
        return [value for item in tree.values() for value in scalars(item)]
    if isinstance(tree, list):
        return [value for item in tree for value in scalars(item)]
    return [tree] if tree else []


def test_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        Run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no run in this folder: expected config"):
        Run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("nonsense")
    with pytest.raises(ValueError, match=r"not a run: config\.json is missing"):
        Run(tmp_path)


def test_file_that_is_too_large_is_skipped_and_reported(tmp_path):
    (tmp_path / "config.json").write_text('{"recipe": "digits"}')
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    run = Run(tmp_path)
    assert run.metrics == []
    assert any(note.startswith("metrics.jsonl has more than 64 MB") for note in run.notes)


def test_invalid_values_of_a_hostile_run_are_dropped(hostile_run):
    run = Run(hostile_run)
    assert run.config is None
    assert len(run.metrics) == 3002
    assert "test_accuracy" not in run.metrics[-2]  # its value is NaN, which is dropped
    assert run.summary["machine"]
    assert run.analysis["neuron"]["windows"] == []
    assert any("damaged lines of metrics.jsonl" in note for note in run.notes)
    assert "<b" not in run._repr_html_().replace("<b style", "")


def test_clean_returns_values_of_the_requested_types():
    spec = {"a": float, "b": [[float]], "c": str, "d": bool}
    assert clean({"a": True, "b": [[1, "x"], 2], "c": 5}, spec) == {
        "a": None,
        "b": [[1, None], []],
        "c": "5",
        "d": False,
    }
    assert clean(None, spec) == {"a": None, "b": [], "c": "", "d": False}
    assert number(10**400) is None
    assert plain("a\x00b\n\u202ec" + "x" * 500) == "abc" + "x" * 156 + "…"
