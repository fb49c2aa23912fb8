"""Charts show the run's numbers, whether plotly, matplotlib or the CSV writer outputs them."""

import csv
import json

import pytest

from multifire.report import draw
from multifire.report.charts import CHARTS, POINTS, charts_of, label_runs
from multifire.report.run import Run


@pytest.fixture(scope="module")
def loaded(runs):
    return [Run(folder) for folder in runs]


@pytest.fixture(scope="module")
def charts(loaded):
    return [chart for name in CHARTS for chart in charts_of(name, loaded)]


def records(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_chart_is_made(charts):
    assert {chart.key for chart in charts} == set(CHARTS)


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_curves_equal_metrics_jsonl(loaded, runs, name):
    (chart,) = charts_of(name, loaded)
    for index, folder in enumerate(runs):
        lines = {series.name: series for series in chart.facets[0].series if series.run == index}
        for label, column in {"training": f"train_{name}", "test": f"test_{name}"}.items():
            assert list(lines[label].y) == [record[column] for record in records(folder, "metrics.jsonl")]
            assert list(lines[label].x) == [1, 2]


def test_charts_of_layers_and_epochs_equal_the_analysis(loaded, runs):
    analysis, history = json.loads((runs[1] / "analysis.json").read_text()), records(runs[1], "analysis.jsonl")
    (dormant,), (units,) = charts_of("dormant_layers", loaded), charts_of("dormant_units", loaded)
    assert list(dormant.facets[0].series[1].y) == [layer["dormant"] for layer in analysis["layers"]]
    assert list(units.facets[0].series[1].y) == [record["dormant"] for record in history]
    heat = charts_of("dormant_map", loaded)[1].facets[0].heat
    assert [row[0] for row in heat.z] == [layer["dormant"] for layer in history[0]["layers"]]
    firing = charts_of("firing_map", loaded)[1]
    assert [facet.heat.z for facet in firing.facets] == [
        [layer["rate"][level] for layer in analysis["layers"]] for level in range(3)
    ]
    assert charts_of("confusion", loaded)[1].facets[0].heat.counts == analysis["confusion"]


def test_membranes_are_a_density_with_the_surrogate_windows(loaded, runs):
    analysis = json.loads((runs[1] / "analysis.json").read_text())
    facet = charts_of("membranes", loaded)[1].facets[0]
    membrane = analysis["layers"][0]["membrane"]
    assert [list(window) for window in facet.windows] == analysis["neuron"]["windows"]
    for level, series in enumerate(facet.series):
        width = series.x[1] - series.x[0]
        outside = membrane["below"][level] + membrane["above"][level]
        inside = sum(membrane["counts"][level])
        assert sum(series.y) * width == pytest.approx(inside / (inside + outside))
        assert (series.x[0], series.x[-1]) == pytest.approx((membrane["low"], membrane["high"]))


def test_spikes_of_a_layer_are_summed_over_its_levels(loaded, runs):
    analysis = json.loads((runs[1] / "analysis.json").read_text())
    steps = len(analysis["layers"][0]["rate"][0])
    expected = [sum(map(sum, layer["rate"])) / steps for layer in analysis["layers"]]
    (chart,) = charts_of("firing_layers", loaded)
    assert list(chart.facets[0].series[1].y) == pytest.approx(expected)


def test_plotly_matplotlib_and_csv_draw_the_same_numbers(charts, loaded):
    labels = label_runs(loaded)
    (chart,) = [chart for chart in charts if chart.key == "loss"]
    series = chart.facets[0].series
    traces = draw.plotly_parts(chart, chart.facets[0], labels)["data"]
    lines = draw.paper(chart, labels).axes[0].get_lines()
    rows = draw.rows(chart, labels)
    for one, trace, line in zip(series, traces, lines, strict=True):
        assert trace["y"] == pytest.approx(one.y, rel=1e-6)
        assert list(line.get_ydata()) == list(one.y)
        found = [row["loss"] for row in rows if (row["run"], row["of"]) == (labels[one.run].name, one.name)]
        assert found == list(one.y)
        assert trace["line"]["color"].lower() == line.get_color().lower() == draw.colour(labels[one.run].group).lower()


def test_charts_are_saved_as_files(charts, loaded, tmp_path):
    chosen = [chart for chart in charts if chart.key in ("accuracy", "membranes", "confusion", "energy")]
    files = draw.save(chosen, label_runs(loaded), tmp_path)
    assert len(files) == 3 * (2 + 2 * 2)
    assert (tmp_path / "confusion-run2.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "energy.svg").read_text().startswith("<?xml")
    with (tmp_path / "accuracy.csv").open() as file:
        assert {row["of"] for row in csv.DictReader(file)} == {"training", "test"}


def test_labels_of_runs_name_their_differences(loaded, runs):
    assert [label.name for label in label_runs(loaded)] == ["K = 1 · seed 0", "K = 3 · seed 0"]
    assert [label.group for label in label_runs([*loaded, Run(runs[0])])] == [0, 1, 0]
    assert label_runs(loaded[:1])[0].name == "K1"


def test_long_line_is_thinned_and_keeps_both_ends(hostile_run):
    (chart,) = charts_of("accuracy", [Run(hostile_run)])
    (line,) = chart.facets[0].series
    assert len(line.x) <= POINTS + 1
    assert line.x[0] == 1
    assert line.x[-1] == 3002


def test_run_provides_its_charts_as_figures(loaded, runs):
    run = loaded[1]
    figure = run.figures.dormant_units()
    assert list(figure.data[0].y) == pytest.approx(
        [record["dormant"] for record in records(runs[1], "analysis.jsonl")], rel=1e-6
    )
    menu = run.figures.membranes().layout.updatemenus[0]
    assert [button.label for button in menu.buttons] == [layer["name"] for layer in run.analysis["layers"]]
    assert "dormant_units" in dir(run.figures)
    with pytest.raises(AttributeError, match="no chart 'nonsense'; there are accuracy"):
        _ = run.figures.nonsense


def test_csv_cell_is_not_a_spreadsheet_formula():
    assert draw.csv_text([{"a": "=1+1", "b": -1}]) == "a,b\n'=1+1,-1\n"
