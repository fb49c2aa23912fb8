"""Content of the charts as plain numbers, from which plotly, matplotlib and the CSV files are made.

A chart function takes runs and returns charts; runs without the figures are skipped. Missing values are None.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from multifire.report.run_files import RunFiles
from multifire.report.values import number, show

POINTS = 1000
"""Maximum number of points of a line, about; a longer line is thinned evenly."""
NOT_A_DIFFERENCE = {"seed", "recipe", "data.root", "device", "backend", "eval_batch_size"}
MAX_DIFFERENCES = 3
"""Differences that fit in a run's label."""
LABEL_FIELDS_FIRST = ("model.name", "model.levels", "data.name", "optim.lr")
Value = float | None


@dataclass(frozen=True)
class Series:
    """A line, a row of bars, or the outline of a histogram."""

    y: Sequence[Value]
    x: Sequence[Any]
    """As long as y; for an outline one more, the edges of its bins."""
    run: int | None = None
    """Number of the run, which decides the colour; None if `part` decides it."""
    name: str = ""
    """Name of the series, if the chart shows several of a run."""
    part: int = 0
    """Number of that series, which decides the dashes or, without a run, the colour."""
    text: Sequence[str] = ()
    """Label of each point."""


@dataclass(frozen=True)
class Heat:
    """A map of values, a row for each y."""

    x: Sequence[str]
    y: Sequence[str]
    z: Sequence[Sequence[Value]]
    counts: Sequence[Sequence[Value]] = ()
    """Counts from which the values were computed, shown beside them."""


@dataclass(frozen=True)
class Facet:
    """One picture of a chart. A page shows one facet at a time, paper shows them side by side."""

    name: str = ""
    series: Sequence[Series] = ()
    heat: Heat | None = None
    windows: Sequence[tuple[float, float]] = ()
    """Ranges of x to shade, one for each part."""


@dataclass(frozen=True)
class Chart:
    key: str
    title: str
    about: str
    """Explanation for the reader."""
    x: str
    y: str
    facets: Sequence[Facet] = field(default_factory=list)
    kind: str = "line"
    """line, bar, outline or heat."""
    run: int | None = None
    """Number of the run; None for a chart of all runs."""
    percent: bool = False
    log: bool = False
    whole: bool = False
    """True if x is a count."""
    facet_of: str = ""
    """Word for a facet: layer or level."""


@dataclass(frozen=True)
class Label:
    """How a run is called beside others, and the group of runs that differ from it in their seed only."""

    name: str
    group: int
    group_name: str


def label_runs(runs: Sequence[RunFiles]) -> list[Label]:
    """Label the runs by the fields in which they differ; runs that differ only in the seed form a group."""
    keys = list(dict.fromkeys([*LABEL_FIELDS_FIRST, *(key for run in runs for key in run.fields)]))
    compared = [key for key in keys if key not in NOT_A_DIFFERENCE]
    differing = [key for key in compared if len({repr(run.fields.get(key)) for run in runs}) > 1]
    if "data.name" in differing:
        follows = {"model.in_channels", "model.num_classes", "model.norm_input"}
        differing = [k for k in differing if k == "data.name" or not (k.startswith("data.") or k in follows)]
    groups: dict[Any, int] = {}
    names: list[str] = []
    labels = []
    for index, run in enumerate(runs):
        identity = tuple(repr(run.fields.get(key)) for key in compared) if run.fields else index
        if identity not in groups:
            groups[identity] = len(groups)
            differences = [_difference(key, run.fields[key]) for key in differing if key in run.fields][
                :MAX_DIFFERENCES
            ]
            names.append(_unlike(" · ".join(differences) or run.name, names))
        group = groups[identity]
        seed = f" · seed {show(run.fields['seed'])}" if "seed" in run.fields and len(runs) > 1 else ""
        labels.append(Label(_unlike(f"{names[group]}{seed}", [label.name for label in labels]), group, names[group]))
    return labels


def _unlike(name: str, others: Sequence[str]) -> str:
    """Return the name, numbered if it is taken."""
    if name not in others:
        return name
    return next(numbered for i in itertools.count(2) if (numbered := f"{name} ({i})") not in others)


def _difference(key: str, value: Any) -> str:
    if key in ("model.name", "data.name"):
        return str(value)
    return f"K = {show(value)}" if key == "model.levels" else f"{key.rpartition('.')[2]} {show(value)}"


def _thin(items: Sequence[Any]) -> Sequence[Any]:
    step = -(-len(items) // POINTS)
    return items if step <= 1 else [*items[:-1:step], items[-1]]


def _over_epochs(
    runs: Sequence[RunFiles], value: Callable[[dict[str, Any]], Any], source: str, **more: Any
) -> list[Series]:
    """Return a line of `value` over epochs, counted from 1, for each run that has values."""
    series = []
    for index, run in enumerate(runs):
        records = [(record["epoch"] + 1, number(value(record))) for record in _thin(getattr(run, source))]
        if any(y is not None for _, y in records):
            series.append(Series([y for _, y in records], [x for x, _ in records], index, **more))
    return series


def _one(key: str, title: str, about: str, x: str, y: str, series: list[Series], **more: Any) -> list[Chart]:
    """Return a chart of all runs, or none without values."""
    return [Chart(key, title, about, x, y, [Facet(series=series)], **more)] if series else []


def _curve(runs: Sequence[RunFiles], key: str, title: str, about: str, y: str, **more: Any) -> list[Chart]:
    name = key
    parts = {f"train_{name}": "training", f"test_{name}": "test", f"validation_{name}": "validation"}
    series = [
        line
        for part, (column, called) in enumerate(parts.items())
        for line in _over_epochs(
            runs, lambda r, column=column: r.get(column), "metrics", name=called, part=min(part, 1)
        )
    ]
    return _one(key, title, about, "epoch", y, series, whole=True, **more)


def accuracy(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Share of samples classified rightly, after each epoch: dashed on training samples, solid on held-out ones."
    return _curve(runs, "accuracy", "Accuracy", about, "accuracy", percent=True)


def loss(runs: Sequence[RunFiles]) -> list[Chart]:
    about = (
        "After each epoch: dashed, the loss that was trained, with label smoothing, TET or your own loss; solid, the "
        "cross entropy of the time-averaged logits on held-out samples."
    )
    return _curve(runs, "loss", "Loss", about, "loss")


def learning_rate(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Learning rate of the last step of each epoch."
    series = _over_epochs(runs, lambda r: r.get("lr"), "metrics", part=1)
    return _one("learning_rate", "Learning rate", about, "epoch", "rate", series, whole=True)


def dormant_units(runs: Sequence[RunFiles]) -> list[Chart]:
    about = (
        "Share of (sample, neuron) whose surrogate derivative is 0 at every level and time step: no gradient passes."
    )
    series = _over_epochs(runs, lambda r: r["dormant"], "history", part=1)
    return _one("dormant_units", "Dormant units", about, "epoch", "dormant", series, percent=True, whole=True)


def _by_layer(
    runs: Sequence[RunFiles],
    key: str,
    title: str,
    about: str,
    y: str,
    value: Callable[[dict[str, Any]], Value],
    **more: Any,
) -> list[Chart]:
    series = []
    for index, run in enumerate(runs):
        layers = run.headline.get("layers", [])
        values = [value(layer) for layer in layers]
        if any(v is not None for v in values):
            names = [layer["name"] for layer in layers]
            series.append(Series(values, list(range(1, len(layers) + 1)), index, part=1, text=names))
    return _one(key, title, about, "layer", y, series, whole=True, **more)


def dormant_layers(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Dormant share of each layer of neurons at the end, from the input on."
    return _by_layer(
        runs, "dormant_layers", "Dormant units by layer", about, "dormant", lambda layer: layer["dormant"], percent=True
    )


def dormant_map(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Dormant share of each layer, from the input (top) to the output, over the epochs."
    charts = []
    for index, run in enumerate(runs):
        history = _thin(run.history)
        names = [layer["name"] for layer in run.headline.get("layers", [])]
        if len(history) < 2 or not names:
            continue
        columns = [[layer["dormant"] for layer in record["layers"]] for record in history]
        z = [[_at(column, row) for column in columns] for row in range(len(names))]
        heat = Heat([f"{record['epoch'] + 1:g}" for record in history], names, z)
        charts.append(
            Chart("dormant_map", "Dormant units, layer by layer", about, "epoch", "layer", [Facet(heat=heat)], "heat",
                  index, percent=True)
        )  # fmt: skip
    return charts


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _mean(values: Sequence[Value]) -> Value:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _spikes(layer: dict[str, Any]) -> Value:
    """Σ over levels of the mean rate over time."""
    rates = [_mean(rates_T) for rates_T in layer["rate"]]
    return sum(rate for rate in rates if rate is not None) if any(rate is not None for rate in rates) else None


def firing_layers(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Spikes of a neuron in a time step, over all levels, by layer: near 0 a layer says nothing."
    return _by_layer(runs, "firing_layers", "Firing rate by layer", about, "spikes per neuron and step", _spikes)


def firing_map(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Share of neurons that fire, for each layer and time step: one map for each firing level."
    charts = []
    for index, run in enumerate(runs):
        layers, thresholds = run.headline.get("layers", []), run.headline.get("neuron", {}).get("thresholds", [])
        facets = []
        for level in range(max((len(layer["rate"]) for layer in layers), default=0)):
            z = [_at(layer["rate"], level) or [] for layer in layers]
            steps = [str(t + 1) for t in range(max(map(len, z)))]
            threshold = _at(thresholds, level)
            name = f"level {level + 1}" if threshold is None else f"θ = {threshold:g}"
            if steps:
                facets.append(Facet(name, heat=Heat(steps, [layer["name"] for layer in layers], z)))
        if facets:
            charts.append(
                Chart("firing_map", "Who fires, and when", about, "time step", "layer", facets, "heat", index,
                      percent=True, facet_of="level")
            )  # fmt: skip
    return charts


def membranes(runs: Sequence[RunFiles]) -> list[Chart]:
    about = (
        "Where membranes are before they fire, at every time step, for each level. Shaded: the level's surrogate "
        "window. What lies outside all windows gets no gradient."
    )
    charts = []
    for index, run in enumerate(runs):
        neuron = run.headline.get("neuron", {})
        windows = [(w[0], w[1]) for w in neuron.get("windows", []) if len(w) == 2 and None not in w]
        facets = [
            Facet(layer["name"], outlines, windows=windows)
            for layer in run.headline.get("layers", [])
            if (outlines := _outlines(layer["membrane"]))
        ]
        if facets:
            charts.append(
                Chart("membranes", "Membrane potentials", about, "membrane potential u", "density", facets, "outline",
                      index, facet_of="layer")
            )  # fmt: skip
    return charts


def _outlines(membrane: dict[str, Any]) -> list[Series]:
    """The density of each level's membranes; what lies outside the bins counts towards the whole."""
    low, high, outlines = membrane["low"], membrane["high"], []
    if low is None or high is None or high <= low:
        return []
    for level, counts in enumerate(membrane["counts"]):
        outside = [_at(membrane[side], level) or 0 for side in ("below", "above")]
        known = [count or 0 for count in counts]
        total = sum(known) + sum(outside)
        if total > 0:
            step = (high - low) / len(known)
            edges = [low + i * step for i in range(len(known) + 1)]
            density = [count / total / step for count in known]
            outlines.append(Series(density, edges, None, f"level {level + 1}", level))
    return outlines


def gradient_layers(runs: Sequence[RunFiles]) -> list[Chart]:
    about = (
        "Norm of the loss's gradient with respect to each layer's output. A line that falls to the left shows a "
        "gradient that dies on its way to the input."
    )
    return _by_layer(
        runs,
        "gradient_layers",
        "Gradient of activations",
        about,
        "gradient norm",
        lambda layer: layer["activation_grad_norm"],
        log=True,
    )


def weight_gradients(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Norm of the loss's gradient with respect to each convolution's weights."
    return _by_layer(
        runs,
        "weight_gradients",
        "Gradient of weights",
        about,
        "gradient norm",
        lambda layer: layer["weight_grad_norm"],
        log=True,
    )


def gradient_ratio(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "The last layer's gradient norm over the first's, with respect to activations: far above 1, it vanishes."
    series = _over_epochs(runs, lambda r: r["gradient"]["activation_ratio"], "history", part=1)
    return _one("gradient_ratio", "Last layer over first", about, "epoch", "ratio", series, log=True, whole=True)


def _by_step(runs: Sequence[RunFiles], key: str, title: str, about: str, name: str, **more: Any) -> list[Chart]:
    series = []
    for index, run in enumerate(runs):
        values = run.headline.get("per_step", {}).get(name, []) or (name == "accuracy" and run.summary.get("per_step"))
        if values and any(value is not None for value in values):
            series.append(Series(values, list(range(1, len(values) + 1)), index, part=1))
    return _one(key, title, about, "time step", name, series, whole=True, **more)


def accuracy_steps(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Accuracy of the mean logits of the first t steps: how early one could stop."
    return _by_step(runs, "accuracy_steps", "Accuracy after each time step", about, "accuracy", percent=True)


def loss_steps(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Cross entropy of the mean logits of the first t steps."
    return _by_step(runs, "loss_steps", "Loss after each time step", about, "loss")


def confusion(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Share of each true class (row) that is predicted as each class (column); the diagonal is right."
    charts = []
    for index, run in enumerate(runs):
        counts = run.headline.get("confusion", [])
        if not counts:
            continue
        names = [run.class_name(label) for label in range(max(len(counts), *map(len, counts)))]
        shares = [[(n or 0) / max(sum(m or 0 for m in row), 1) for n in row] for row in counts]
        heat = Heat(names, names[: len(counts)], shares, counts)
        charts.append(
            Chart("confusion", "Confusion matrix", about, "predicted", "true", [Facet(heat=heat)], "heat", index,
                  percent=True)
        )  # fmt: skip
    return charts


def class_accuracy(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Share of each class's test samples that are classified rightly."
    series = []
    for index, run in enumerate(runs):
        values = run.summary.get("per_class", [])
        if any(value is not None for value in values):
            series.append(Series(values, [run.class_name(label) for label in range(len(values))], index, part=1))
    return _one("class_accuracy", "Accuracy by class", about, "class", "accuracy", series, kind="bar", percent=True)


NETWORKS = {"snn_pj": "spiking", "quantised_pj": "quantised ANN", "ann_pj": "ANN"}


def energy(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "The spiking network, and the same network without time as a quantised ANN and as an ANN."
    series = []
    for index, run in enumerate(runs):
        found = run.headline.get("energy", {})
        values = [found.get(key) for key in NETWORKS]
        if any(value is not None for value in values):
            values = [None if value is None else value / 1e6 for value in values]
            series.append(Series(values, list(NETWORKS.values()), index, part=1))
    return _one("energy", "Energy of an inference", about, "network", "energy [µJ]", series, kind="bar")


def operations(runs: Sequence[RunFiles]) -> list[Chart]:
    about = "Accumulates that spikes cause in each connection (solid), and the MACs of an ANN there (dashed)."
    series = []
    for index, run in enumerate(runs):
        connections = run.headline.get("energy", {}).get("connections", [])
        names = [connection["name"] for connection in connections]
        for part, (key, called) in enumerate((("ann_macs", "MACs of the ANN"), ("synops", "SynOps"))):
            values = [connection[key] or None for connection in connections]  # a logarithm has no place for 0
            if any(value is not None for value in values):
                series.append(Series(values, list(range(1, len(values) + 1)), index, called, part, names))
    return _one(
        "operations", "Operations by connection", about, "connection", "operations", series, log=True, whole=True
    )


SECTIONS: dict[str, tuple[str, tuple[Callable[[Sequence[RunFiles]], list[Chart]], ...]]] = {
    "Learning": ("How accuracy and loss went.", (accuracy, loss, learning_rate, class_accuracy)),
    "Sleep": (
        "A dormant neuron gets no gradient from a sample, so it cannot learn from it.",
        (dormant_units, dormant_layers, dormant_map),
    ),
    "Firing": ("Which levels fire, in which layer and at which time step.", (firing_layers, firing_map, membranes)),
    "Gradient": (
        "How much of the gradient reaches the first layers.",
        (gradient_layers, weight_gradients, gradient_ratio),
    ),
    "Decisions": ("What the network decides, and how early.", (accuracy_steps, loss_steps, confusion)),
    "Energy": ("Counted operations of an inference, and their energy.", (energy, operations)),
}
"""Title of a section -> explanation, and its charts."""
CHARTS = {function.__name__: function for _, functions in SECTIONS.values() for function in functions}


def charts_of(name: str, runs: Sequence[RunFiles]) -> list[Chart]:
    """The charts of that name: one of all runs, or one for each run that has the figures."""
    return CHARTS[name](runs)
