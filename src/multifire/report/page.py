"""The report page: one HTML file without external resources. Texts are escaped, data of scripts are JSON."""

import base64
import hashlib
import html
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multifire import __version__
from multifire.config import RECIPES
from multifire.config.json_format import flatten_config
from multifire.datasets import DATASETS
from multifire.report.charts import CHARTS, NETWORKS, SECTIONS, Chart, Label
from multifire.report.draw import colour, needing, plotly_parts
from multifire.report.run_files import RunFiles
from multifire.report.values import mean_and_deviation, show
from multifire.utils.progress import format_seconds

if TYPE_CHECKING:
    from multifire.report.samples import Sample, Samples

HERE = Path(__file__).parent
LOGO = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M2 20h20" stroke="currentColor" stroke-width="1.6"/>'
    '<path d="M3 13h4.6v7h-4.6z" fill="#0072B2"/><path d="M9.7 8h4.6v12h-4.6z" fill="#E69F00"/>'
    '<path d="M16.4 3h4.6v17h-4.6z" fill="#009E73"/></svg>'
)
HALF_MOON = (
    '<svg viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="6.5" fill="none" stroke="currentColor" '
    'stroke-width="1.5"/><path d="M8 1.5a6.5 6.5 0 0 1 0 13z" fill="currentColor"/></svg>'
)


@dataclass
class Report:
    """Content of a page."""

    runs: Sequence[RunFiles]
    labels: Sequence[Label]
    charts: Sequence[Chart]
    samples: "dict[int, Samples]" = field(default_factory=dict)
    """Samples by number of the run, for runs whose network and data are available."""


def page(report: Report) -> str:
    """Return the page as HTML."""
    body = "".join(
        (
            _bar(report),
            "<main>",
            _hero(report),
            *_sections(report),
            _samples(report),
            _about(report),
            _footer(),
            "</main>",
        )
    )
    scripts = [_script_text((_plotly_js(), (HERE / "page.js").read_text(encoding="utf-8"))[i]) for i in (0, 1)]
    # Only these two scripts may run, and nothing may be fetched, whatever else should have found its way into the page.
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
    policy += "img-src data: blob:; base-uri 'none'; form-action 'none'"
    plotly, own = scripts
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{_text(_title(report))}, multifire</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="report">{_json(_payload(report))}</script>\n'
        f"<script>{plotly}</script>\n<script>{own}</script>\n</body>\n</html>\n"
    )


def _plotly_js() -> str:
    with needing("plotly"):
        from plotly.offline import get_plotlyjs
    return get_plotlyjs()


def _script_text(script: str) -> str:
    """Return a script as an HTML parser passes it on, so that its hash is right and no text ends it early."""
    assert "</script" not in script
    assert "<!--" not in script
    return script.replace("\r\n", "\n")


def _json(value: Any) -> str:
    """Return JSON that cannot end its HTML element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _payload(report: Report) -> dict[str, Any]:
    charts = [
        {"key": chart.key, "facets": [plotly_parts(chart, facet, report.labels) for facet in chart.facets]}
        for chart in report.charts
    ]
    recordings = [
        {
            "running": sample.running,
            "label": sample.label,
            "names": [report.runs[index].class_name(k) for k in range(len(sample.running[0]))],
        }
        for index, sample in _recordings(report)
    ]
    return {"charts": charts, "runs": [{"group": label.group} for label in report.labels], "recordings": recordings}


def _recordings(report: Report) -> "list[tuple[int, Sample]]":
    return [(index, sample) for index, samples in report.samples.items() for sample in samples.recordings]


def _title(report: Report) -> str:
    return report.runs[0].name if len(report.runs) == 1 else f"{len(report.runs)} runs"


def _groups(report: Report) -> list[tuple[str, list[RunFiles]]]:
    found: dict[int, tuple[str, list[RunFiles]]] = {}
    for label, run in zip(report.labels, report.runs, strict=True):
        found.setdefault(label.group, (label.group_name, []))[1].append(run)
    return list(found.values())


def _bar(report: Report) -> str:
    chips = "".join(
        f'<button class="chip" type="button" aria-pressed="true" data-group="{group}" style="--c: {colour(group)}">'
        f"<i></i>{_text(name)}</button>"
        for group, (name, _) in enumerate(_groups(report))
    )
    runs = f'<nav class="runs" aria-label="runs to show">{chips}</nav>' if len(report.runs) > 1 else ""
    return (
        f'<header class="bar"><div><span class="brand">{LOGO} multifire</span>{runs}'
        f'<button class="theme" type="button" aria-label="light or dark" title="light or dark">{HALF_MOON}</button>'
        "</div></header>"
    )


def _hero(report: Report) -> str:
    badge = ' <span class="badge">simulated data</span>' if any(run.simulated for run in report.runs) else ""
    if len(report.runs) == 1:
        run = report.runs[0]
        inner = (
            f'<h1>{_text(run.name)}{badge}</h1><p class="lead">{_lead(run)}</p><div class="tiles">{_tiles(run)}</div>'
        )
    else:
        title = _text(_title(report))
        inner = f'<h1>{title}{badge}</h1><p class="lead">{_lead_of_many(report)}</p>{_table_of_runs(report)}'
    return f'<div class="hero">{inner}</div>'


def _lead(run: RunFiles) -> str:
    """Return a sentence on the network and its data."""
    field = run.fields.get
    known = DATASETS.get(str(field("data.name")))
    about = f" ({_text(known.about)})" if known else ""
    limit = field("data.limit")
    samples = limit if isinstance(limit, int) else known.published_sizes[0] if known else None
    epochs = len(run.metrics) or run.summary.get("epochs")
    levels, name = field("model.levels", "?"), field("model.name", "a network")
    parts = [f"<b>{_text(name)}</b> of width {_text(field('model.width', '?'))}"]
    parts.append(f" with <b>{_text(levels)}</b> firing level{'s' * (levels != 1)}")
    if epochs:
        parts.append(f", trained for <b>{_text(show(epochs))}</b> epochs")
    counted = f"{samples:,} samples of " if samples else ""
    parts.append(f" on {counted}<b>{_text(field('data.name', 'unknown data'))}</b>{about}")
    parts.append(f", {_text(field('data.timesteps', '?'))} time steps each.")
    return "".join(parts)


def _lead_of_many(report: Report) -> str:
    groups = _groups(report)
    data = sorted({str(run.fields.get("data.name", "unknown data")) for run in report.runs})
    seeds = f", {len(report.runs)} runs in all" if len(groups) < len(report.runs) else ""
    return (
        f"<b>{len(groups)}</b> configuration{'s' * (len(groups) > 1)}{seeds}, on {_text(', '.join(data))}. "
        "The buttons above switch runs off and on; a run has one colour everywhere."
    )


def _tiles(run: RunFiles) -> str:
    accuracy, summary, found = run.accuracy, run.summary, run.headline
    tiles = []
    if accuracy is not None:
        note = f"{summary['test_accuracy_of']} checkpoint" if summary else "after the last epoch so far"
        best = summary.get("best", {})
        if best.get("accuracy") is not None and best["chosen_by"] == "test":
            note += f"; best of all epochs on the test set itself: {100 * best['accuracy']:.2f} %"
        tiles.append(("Test accuracy" if summary else "Accuracy", f"{100 * accuracy:.2f} %", note))
    if found.get("dormant") is not None:
        tiles.append(("Dormant units", f"{100 * found['dormant']:.1f} %", "share of neurons that no gradient passes"))
    energy = found.get("energy", {})
    if energy.get("snn_pj") is not None:
        known = energy["ann_pj"] is not None and energy["snn_pj"] > 0
        beside = f"the same network as an ANN: {energy['ann_pj'] / energy['snn_pj']:.1f} ×" if known else ""
        tiles.append(("Energy of an inference", f"{energy['snn_pj'] / 1e6:,.3g} µJ", beside))
    if summary.get("parameters"):
        tiles.append(("Parameters", f"{summary['parameters']:,.0f}", ""))
    if summary.get("train_seconds"):
        speed = f"{summary['images_per_second']:,.0f} samples/s" if summary["images_per_second"] else ""
        tiles.append(("Training", format_seconds(min(summary["train_seconds"], 1e9)), speed))
    return "".join(
        f'<div class="tile{" first" * (i == 0)}"><span>{_text(name)}</span><strong>{_text(value)}</strong>'
        f"<small>{_text(note)}</small></div>"
        for i, (name, value, note) in enumerate(tiles)
    )


def _table_of_runs(report: Report) -> str:
    """Return a table with a row for each configuration: mean and deviation over its seeds."""
    columns: dict[str, tuple[Callable[[RunFiles], float | None], int]] = {
        "test accuracy %": (lambda run: _times(run.accuracy, 100), 2),
        "dormant %": (lambda run: _times(run.headline.get("dormant"), 100), 1),
        "energy µJ": (lambda run: _times(run.headline.get("energy", {}).get("snn_pj"), 1e-6), 3),
        "parameters": (lambda run: run.summary.get("parameters"), 0),
        "epochs": (lambda run: len(run.metrics), 0),
        "samples/s": (lambda run: run.summary.get("images_per_second"), 0),
    }
    rows = []
    for group, (name, runs) in enumerate(_groups(report)):
        cells = [spread([value(run) for run in runs], decimals) for value, decimals in columns.values()]
        dot = f'<i class="dot" style="--c: {colour(group)}"></i>'
        rows.append([f"{dot} {_text(name)}", str(len(runs)), *map(_text, cells)])
    return f'<div class="card scroll" style="margin-top: 28px">{_table(["", "runs", *columns], rows)}</div>'


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def spread(values: Iterable[float | None], decimals: int) -> str:
    """Return mean ± standard deviation of the known values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, deviation = mean_and_deviation(known)
    return f"{mean:,.{decimals}f}" + (f" ± {deviation:,.{decimals}f}" if deviation else "")


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells in HTML."""
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + f"<th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _whose(report: Report) -> str:
    """Return a selector of the run whose details are shown, if there are several."""
    if len(report.runs) == 1:
        return ""
    options = "".join(f'<option value="{i}">{_text(label.name)}</option>' for i, label in enumerate(report.labels))
    return f'<select class="whose" aria-label="details of run">{options}</select>'


def _sections(report: Report) -> Iterable[str]:
    by_key: dict[str, list[int]] = {}
    for number, chart in enumerate(report.charts):
        by_key.setdefault(chart.key, []).append(number)
    for title, (about, functions) in SECTIONS.items():
        names = [name for name, function in CHARTS.items() if function in functions]
        cards = [_card(report, number) for name in names for number in by_key.get(name, [])]
        own = any(report.charts[number].run is not None for name in names for number in by_key.get(name, []))
        tables = _energy_tables(report) if title == "Energy" else ""
        if cards or tables:
            yield _section(
                title,
                about,
                f'{tables}<div class="cards">{"".join(cards)}</div>',
                _whose(report) if own or tables else "",
            )


def _section(title: str, about: str, inner: str, picker: str = "") -> str:
    return f'<section><div class="head"><h2>{title}</h2><p>{about}</p>{picker}</div>{inner}</section>'


def _card(report: Report, number: int) -> str:
    chart = report.charts[number]
    facets = ""
    if len(chart.facets) > 1:
        options = "".join(f'<option value="{i}">{_text(facet.name)}</option>' for i, facet in enumerate(chart.facets))
        facets = f'<select class="facet" aria-label="{_text(chart.facet_of)}">{options}</select>'
    owner, dot = "", ""
    if chart.run is not None and len(report.runs) > 1:
        owner = _owner(report, chart.run)
        dot = f'<i class="dot" style="--c: {colour(report.labels[chart.run].group)}"></i>'
    tall = any(facet.heat and len(facet.heat.y) > 9 for facet in chart.facets)
    return (
        f'<figure class="card" data-chart="{number}"{owner}><h3>{dot}{_text(chart.title)}{facets}</h3>'
        f'<p>{_text(chart.about)}</p><div class="plot{" tall" * tall}"></div></figure>'
    )


def _energy_tables(report: Report) -> str:
    """Return a table of operations and energy of an inference for each run."""
    tables = []
    for index, run in enumerate(report.runs):
        energy = run.headline.get("energy", {})
        if energy.get("snn_pj") is None:
            continue
        ann = show(energy["ann_macs"])
        operations = {
            "snn_pj": f"{show(energy['synops'])} accumulates, {show(energy['macs'])} MACs",
            "quantised_pj": f"{ann} MACs of {show(energy['quantised_bits'])} bits",
            "ann_pj": f"{ann} MACs",
        }
        rows = []
        for key, network in NETWORKS.items():
            ratio = f"{energy[key] / energy['snn_pj']:.2f}" if energy[key] is not None and energy["snn_pj"] else "-"
            price = "-" if energy[key] is None else f"{energy[key] / 1e6:,.4g}"
            rows.append([network, _text(operations[key]), price, ratio])
        table = _table(["network", "operations of an inference", "µJ", "over the spiking one"], rows)
        prices = f"At {show(energy['ac_pj'])} pJ an accumulate and {show(energy['mac_pj'])} pJ a multiply-accumulate."
        owner = _owner(report, index)
        tables.append(f'<div class="card scroll priced"{owner}>{table}<p>{_text(prices)}</p></div>')
    return "".join(tables)


def _owner(report: Report, index: int) -> str:
    """Return the attributes of an element of one run; only the first run's elements are visible."""
    return "" if len(report.runs) == 1 else f' data-run="{index}"{" hidden" * (index != 0)}'


def _samples(report: Report) -> str:
    parts, number = [], 0
    several = len(report.runs) > 1
    for index, samples in report.samples.items():
        run = report.runs[index]
        players = []
        for sample in samples.recordings:
            players.append(_player(run, sample, number))
            number += 1
        pixels = ' class="events"' if samples.recordings else ""
        gallery = "".join(_mistake(run, sample, pixels) for sample in samples.mistakes)
        moving = (
            "<h3>Recordings, and the running prediction</h3><p>Green is the true class. The bars are the softmax of "
            f'the mean logits so far.</p><div class="players">{"".join(players)}</div>'
        )
        wrong = (
            f"<h3>Mistakes it was surest of</h3><p>Of {samples.looked_at:,} test samples that were gone through.</p>"
            f'<div class="gallery">{gallery}</div>'
        )
        none = f"<p>No mistake among the {samples.looked_at:,} test samples that were gone through.</p>"
        inner = f"{moving if players else ''}{wrong if gallery else none}"
        parts.append(f'<div class="card samples"{_owner(report, index)}>{inner}</div>')
    if not parts:
        return ""
    about = "What the network makes of single test samples."
    nothing = '<p class="nothing" hidden>No checkpoint or no data of this run are here.</p>' if several else ""
    section = _section("Samples", about, "".join(parts) + nothing, _whose(report))
    return f'<div class="whose-section">{section}</div>' if several else section


def _mistake(run: RunFiles, sample: "Sample", pixels: str) -> str:
    true, predicted = _text(run.class_name(sample.label)), _text(run.class_name(sample.predicted))
    sure = f"{100 * sample.running[-1][sample.predicted]:.0f} %"
    return (
        f'<figure><img{pixels} src="{_text(sample.picture)}" alt="a test sample of class {true}" loading="lazy">'
        f"<figcaption>{true} <s>taken for</s> <b>{predicted}</b> <s>{sure}</s></figcaption></figure>"
    )


def _player(run: RunFiles, sample: "Sample", number: int) -> str:
    last = len(sample.running) - 1
    return (
        f'<div class="card player" data-recording="{number}">'
        f'<div class="screen" style="background-image: url({_text(sample.picture)})" role="img" '
        f'aria-label="events of class {_text(run.class_name(sample.label))}"></div>'
        '<div class="votes"></div><div class="steps"><button type="button" aria-label="play">▶</button>'
        f'<input type="range" min="0" max="{last}" value="0" aria-label="time step"><output></output></div></div>'
    )


def _about(report: Report) -> str:
    several = len(report.runs) > 1
    parts = []
    for index, (run, label) in enumerate(zip(report.runs, report.labels, strict=True)):
        name = f"<h3>{_text(label.name)}</h3>" if several else ""
        parts.append(f'<div{_owner(report, index)}>{_notes(run)}<div class="card">{name}{_facts(run)}</div></div>')
    return _section("Made of", "Recipe, machine and versions behind the figures.", "".join(parts), _whose(report))


def _facts(run: RunFiles) -> str:
    recipe = RECIPES.get(str(run.fields.get("recipe")))
    usual = flatten_config(asdict(recipe.config)) if recipe else {}
    changed = {key: value for key, value in run.fields.items() if key in usual and _differs(usual[key], value)}
    machine = run.summary.get("machine", {}) if run.summary else {}
    rows = [
        ("recipe", show(run.fields.get("recipe"))),
        *((f"{key}, changed", show(value)) for key, value in changed.items()),
    ]
    rows += [(key, show(value)) for key, value in machine.items()]
    if run.summary:
        rows += [
            ("neurons ran on", ", ".join(run.summary["backends"]) or "-"),
            ("processes", show(run.summary["processes"])),
        ]
    rows += [
        (f"evaluated, {e['checkpoint']} checkpoint", f"{100 * e['accuracy']:.2f} % of {show(e['count'])}")
        for e in run.evaluations
        if e["accuracy"] is not None
    ]
    table = "".join(f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in rows)
    every = "".join(f"<tr><th>{_text(key)}</th><td>{_text(show(value))}</td></tr>" for key, value in run.fields.items())
    return (
        f'<table class="facts"><tbody>{table}</tbody></table>'
        '<details><summary>The whole configuration</summary><table class="facts"><tbody>'
        f"{every}</tbody></table></details>"
    )


def _differs(usual: Any, value: Any) -> bool:
    return str(list(usual) if isinstance(usual, tuple) else usual) != str(value)


def _notes(run: RunFiles) -> str:
    if not run.notes:
        return ""
    items = "".join(f"<li>{_code(_text(note))}</li>" for note in run.notes)
    return f'<div class="card notes" style="margin-bottom: 16px"><b>What this page lacks</b><ul>{items}</ul></div>'


def _code(text: str) -> str:
    """Return text with `commands` set in a code font."""
    parts = text.split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _footer() -> str:
    made = time.strftime("%Y-%m-%d %H:%M")
    return f"<footer>Made by multifire {_text(__version__)} on {made}. This file loads nothing from anywhere.</footer>"
