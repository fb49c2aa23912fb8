"""Draw a chart with plotly, with matplotlib for paper, and write its numbers as CSV."""

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multifire.report.charts import Chart, Facet, Heat, Label, Series
from multifire.utils.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
"""Colours of Okabe and Ito, which are distinct for colour-blind readers; grey instead of yellow, invisible on white."""
SYMBOLS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"))
"""plotly's and matplotlib's; they change where the colours begin anew."""
DASHES = (("dot", ":"), ("solid", "-"))
ON_PAPER = 4
"""Facets that fit on paper."""
FEW = 20
"""Ticks that fit below a chart one by one."""
LEGEND = 48
"""Characters of a legend's line that fit a column."""
TICK = 24
"""Characters of a tick's name likewise."""
COLUMN_IN = 3.3
"""Width of a column in a paper."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "multifire",
    "savefig.dpi": 300,
}


def colour(group: int) -> str:
    return PALETTE[group % len(PALETTE)]


def _symbol(group: int, library: int) -> str:
    return SYMBOLS[group // len(PALETTE) % len(SYMBOLS)][library]


def plain_label(text: str) -> str:
    """Escape text for plotly, which interprets <b>, <a> and entities."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _digits(values: Sequence[Any]) -> list[Any]:
    """Seven digits are more than a screen can show."""
    return [float(f"{value:.7g}") if isinstance(value, float) else value for value in values]


def plotly_parts(chart: Chart, facet: Facet, labels: Sequence[Label] | None = None) -> dict[str, Any]:
    """Data and layout of a plotly figure, without colours of the page: `{"data": [...], "layout": {...}}`."""
    if facet.heat:
        data = [_plotly_heat(chart, facet.heat)]
    else:
        data = [_plotly_series(chart, series, labels) for series in facet.series]
    percent = {"tickformat": ".2~%", "hoverformat": ".2%"} if chart.percent and not facet.heat else {}
    x_axis: dict[str, Any] = {"title": {"text": plain_label(chart.x)}, "automargin": True}
    y_axis: dict[str, Any] = {"title": {"text": plain_label(chart.y)}, "automargin": True, **percent}
    if chart.log:
        y_axis |= {"type": "log", "exponentformat": "power"}
    if chart.whole:
        longest = max((len(series.x) for series in facet.series), default=0)
        x_axis |= {"tickformat": ",d"} | ({"dtick": 1} if longest <= FEW else {})
    if chart.kind == "bar":
        x_axis |= {"type": "category"}
    if facet.heat:
        x_axis |= {"type": "category"}
        y_axis |= {"type": "category", "autorange": "reversed"}
    layout: dict[str, Any] = {
        "xaxis": x_axis,
        "yaxis": y_axis,
        "showlegend": chart.kind == "outline",
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "hovermode": "closest" if facet.heat else "x unified",
        "margin": {"l": 56, "r": 12, "t": 32, "b": 68 if chart.kind == "outline" else 44},
        "shapes": [
            {"type": "rect", "xref": "x", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1,
             "line": {"width": 0}, "fillcolor": colour(level), "opacity": 0.13, "layer": "below"}
            for level, (low, high) in enumerate(facet.windows)
        ],
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _plotly_series(chart: Chart, series: Series, labels: Sequence[Label] | None) -> dict[str, Any]:
    group = series.part if series.run is None else labels[series.run].group if labels else 0
    called = [labels[series.run].name] if labels and series.run is not None else []
    name = plain_label(" · ".join([*called, series.name] if series.name else called))
    y_format = ":.2%" if chart.percent else ":.4~g"
    trace: dict[str, Any] = {
        "x": _digits(series.x),
        "y": _digits(series.y),
        "name": name,
        "meta": {"run": series.run},
        "hovertemplate": f"%{{y{y_format}}}" + ("  <i>%{text}</i>" if series.text else ""),
    }
    if series.text:
        trace["text"] = [plain_label(text) for text in series.text]
    if chart.kind == "bar":
        return {
            **trace,
            "type": "bar",
            "x": [plain_label(str(x)) for x in series.x],
            "marker": {"color": colour(group)},
        }
    line: dict[str, Any] = {"color": colour(group), "width": 2, "dash": DASHES[min(series.part, 1)][0]}
    if chart.kind == "outline":
        line |= {"shape": "hv", "dash": "solid"}
        return {**trace, "type": "scatter", "mode": "lines", "y": [*trace["y"], 0], "line": line,
                "fill": "tozeroy", "fillcolor": colour(group) + "33"}  # fmt: skip
    many = len(series.y) > 60 or series.part == 0
    marker = {"size": 6, "symbol": _symbol(group, 0)}
    return {**trace, "type": "scatter", "mode": "lines" if many else "lines+markers", "line": line, "marker": marker}


def _plotly_heat(chart: Chart, heat: Heat) -> dict[str, Any]:
    names_x, names_y = ([plain_label(name) for name in names] for names in (heat.x, heat.y))
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": list(range(len(names_x))) if len(set(names_x)) < len(names_x) else names_x,
        "y": list(range(len(names_y))) if len(set(names_y)) < len(names_y) else names_y,
        "z": [_digits(row) for row in heat.z],
        "colorscale": "Cividis",
        "xgap": 1 if len(names_x) <= 40 else 0,
        "ygap": 1 if len(names_y) <= 40 else 0,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickformat": ".2~%" if chart.percent else ""},
        "hovertemplate": f"{chart.y} %{{y}}<br>{chart.x} %{{x}}<br><b>%{{z:.2%}}</b><extra></extra>",
    }
    if heat.counts:
        trace |= {
            "zmin": 0,
            "zmax": 1,
            "customdata": [_digits(row) for row in heat.counts],
            "hovertemplate": "true %{y}<br>predicted %{x}<br><b>%{customdata:,}</b> samples, %{z:.1%}<extra></extra>",
        }
        if len(heat.x) <= 12:
            trace |= {"text": trace["customdata"], "texttemplate": "%{text:,}", "textfont": {"size": 10}}
    return trace


def plotly_figure(chart: Chart) -> Any:
    """The chart as a plotly Figure, for a notebook; several facets have a menu.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    with needing("plotly"):
        from plotly.graph_objects import Figure
    parts = [plotly_parts(chart, facet) for facet in chart.facets]
    layout = parts[0]["layout"] | {"title": {"text": plain_label(chart.title)}, "template": "plotly_white"}
    layout |= {"margin": {"t": 72}, "showlegend": any(len(facet.series) > 1 for facet in chart.facets)}
    data = [trace | {"visible": part is parts[0]} for part in parts for trace in part["data"]]
    if len(parts) > 1:
        shown = [[part is other for other in parts for _ in other["data"]] for part in parts]
        layout["updatemenus"] = [
            {"x": 1, "xanchor": "right", "y": 1.2, "buttons": [
                {"label": plain_label(facet.name), "method": "update", "args": [{"visible": visible}]}
                for facet, visible in zip(chart.facets, shown, strict=True)]}
        ]  # fmt: skip
    return Figure(data=data, layout=layout)


@contextlib.contextmanager
def needing(package: str) -> Iterator[None]:
    """Say how to get a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError:
        raise ValueError(f"this needs the package {package}: pip install 'multifire[report]'") from None


def paper(chart: Chart, labels: Sequence[Label]) -> "Figure":
    """The chart as a matplotlib figure, a column of a paper wide; at most ON_PAPER facets, evenly chosen."""
    with needing("matplotlib"):
        import matplotlib as mpl
        from matplotlib.figure import Figure

    facets = chosen(chart.facets)
    heats = [facet.heat for facet in facets if facet.heat]
    columns = len(facets) if heats else min(2, len(facets))
    rows = -(-len(facets) // columns)
    height = min(1.1 + 0.13 * len(heats[0].y), 8.0) if heats else 2.2 if rows == 1 else 1.6 * rows
    with mpl.rc_context(STYLE):
        figure = Figure((COLUMN_IN, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=bool(heats))
        for axes in grid.flat[len(facets) :]:
            axes.remove()
        for axes, facet in zip(grid.flat, facets, strict=False):
            _draw(axes, chart, facet, labels)
            axes.set_title(_no_formula(facet.name), loc="left")
        for axes in grid[:, 0]:
            axes.set_ylabel(chart.y)
        if heats:
            figure.supxlabel(chart.x, fontsize=8)
            _draw_scale(figure, grid, chart)
        else:
            for axes in grid[-1]:
                axes.set_xlabel(chart.x)
        handles, names = grid.flat[0].get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True))
        if len(unique) > 1:
            columns = 3 if max(map(len, unique)) < 16 else 1
            figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=columns)
            figure.set_figheight(height + 0.15 * -(-len(unique) // columns))
    return figure


def _no_formula(text: str) -> str:
    """Text that matplotlib shows as it is: what stands between two $ it takes for mathematics."""
    return text.replace("$", r"\$")


def chosen(facets: Sequence[Facet]) -> list[Facet]:
    """The first, the last, and what lies evenly between them."""
    if len(facets) <= ON_PAPER:
        return list(facets)
    return [facets[round(i * (len(facets) - 1) / (ON_PAPER - 1))] for i in range(ON_PAPER)]


def _draw(axes: "Axes", chart: Chart, facet: Facet, labels: Sequence[Label]) -> None:
    if facet.heat:
        _draw_heat(axes, chart, facet.heat)
        return
    for level, (low, high) in enumerate(facet.windows):
        axes.axvspan(low, high, color=colour(level), alpha=0.15, linewidth=0)
    for place, series in enumerate(facet.series):
        _draw_series(axes, chart, series, labels, place, len(facet.series))
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if chart.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if chart.log:
        axes.set_yscale("log")


def _draw_series(axes: "Axes", chart: Chart, series: Series, labels: Sequence[Label], place: int, of: int) -> None:
    group = series.part if series.run is None else labels[series.run].group
    several = len({label.group for label in labels}) > 1
    called = [labels[series.run].group_name] if series.run is not None and several else []
    name = _no_formula(", ".join([*called, series.name] if series.name else called)[:LEGEND])
    y = [float("nan") if value is None else value for value in series.y]
    if chart.kind == "bar":
        width = 0.8 / of
        at = [i - 0.4 + width * (place + 0.5) for i in range(len(y))]
        axes.bar(at, y, width, color=colour(group), label=name)
        names = [_no_formula(str(x)[:TICK]) for x in series.x]
        axes.set_xticks(range(len(y)), names, rotation=45 if len(y) > 4 and max(map(len, names)) > 2 else 0)
    elif chart.kind == "outline":
        axes.stairs(y, series.x, color=colour(group), label=name)
    else:
        marker = "" if len(y) > 40 or series.part == 0 else _symbol(group, 1)
        axes.plot(series.x, y, DASHES[min(series.part, 1)][1], color=colour(group), marker=marker, label=name)


def _draw_heat(axes: "Axes", chart: Chart, heat: Heat) -> None:
    import numpy as np

    z = np.full((len(heat.y), len(heat.x)), np.nan)
    for row, values in enumerate(heat.z):
        z[row, : len(values)] = [np.nan if value is None else value for value in values]
    known = [
        value for facet in chart.facets if facet.heat for row in facet.heat.z for value in row if value is not None
    ]
    low, high = (
        (0, 1) if heat.counts else (min(known, default=0), max(known, default=1) or 1)
    )  # one scale for all facets
    axes.imshow(z, aspect="auto", cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    for axis, names, most in ((axes.xaxis, heat.x, 12), (axes.yaxis, heat.y, 40)):
        step = -(-len(names) // most)
        axis.set_ticks(range(0, len(names), step), [_no_formula(name[:TICK]) for name in names][::step])
    if max(map(len, heat.x), default=0) > 3:
        axes.tick_params("x", rotation=45)
    axes.spines[:].set_visible(False)


def _draw_scale(figure: "Figure", grid: Any, chart: Chart) -> None:
    from matplotlib.ticker import PercentFormatter

    bar = figure.colorbar(grid.flat[0].images[0], ax=grid, fraction=0.06, pad=0.03)
    if chart.percent:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.outline.set_visible(False)


def rows(chart: Chart, labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Return the chart's numbers, one in each row, with their names."""
    found = []
    for facet in chart.facets:
        facet_of = {chart.facet_of: facet.name} if chart.facet_of else {}
        owner = {} if chart.run is None else {"run": labels[chart.run].name}
        if facet.heat:
            for y, values in zip(facet.heat.y, facet.heat.z, strict=True):
                found += [
                    owner | facet_of | {chart.y: y, chart.x: x, "value": z}
                    for x, z in zip(facet.heat.x, values, strict=False)
                ]
        for series in facet.series:
            run = owner if series.run is None else {"run": labels[series.run].name}
            part = {"of": series.name} if series.name else {}
            for i, (x, y) in enumerate(zip(series.x, series.y, strict=False)):
                text = {"name": series.text[i]} if series.text else {}
                found.append(run | facet_of | part | {chart.x: x} | text | {chart.y: y})
    return found


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Comma-separated values. Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def save(charts: Sequence[Chart], labels: Sequence[Label], folder: Path) -> list[Path]:
    """Write each chart as PNG, SVG and CSV into `folder`; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in charts:
        stem = chart.key if chart.run is None or len(labels) == 1 else f"{chart.key}-run{chart.run + 1}"
        write_atomic(folder / f"{stem}.csv", csv_text(rows(chart, labels)).encode())
        figure = paper(chart, labels)
        for kind in ("png", "svg"):
            picture = io.BytesIO()
            _save(figure, picture, kind)
            write_atomic(folder / f"{stem}.{kind}", picture.getvalue())
        files += [folder / f"{stem}.{kind}" for kind in ("csv", "png", "svg")]
    return files


def _save(figure: "Figure", target: io.BytesIO, kind: str) -> None:
    import matplotlib as mpl

    with mpl.rc_context(STYLE):  # fonts are chosen, and mathematics is parsed, when text is drawn
        figure.savefig(target, format=kind, metadata={"Date": None} if kind == "svg" else None)
