"""The record of all measures is plain JSON with the layout that the docstring of multifire.analysis describes."""

import json

import numpy as np
import pytest
import torch

import multifire as mf
from multifire.analysis import analyze
from multifire.analysis.evaluate import evaluate
from tests.analysis.recount import N, T, event_frames, labels, network


def test_record_is_json_with_the_documented_layout():
    model = network("plain", 2).eval()
    record = analyze(model, [(event_frames(), labels())]).record()
    assert record == json.loads(json.dumps(record, allow_nan=False))
    assert record["samples"] == N
    assert record["timesteps"] == T
    assert record["neuron"]["windows"] == [pytest.approx([0.1, 1.1]), pytest.approx([1.1, 2.1])]
    assert [layer["name"] for layer in record["layers"]][:3] == ["stem", "stages.0.0.fire1", "stages.0.0.fire2"]
    for layer in record["layers"]:
        assert np.shape(layer["rate"]) == (2, T)
        membrane = layer["membrane"]
        bins = np.shape(membrane["counts"])[1]
        assert membrane["high"] - membrane["low"] == pytest.approx(0.1 * bins)
        counted = np.sum(membrane["counts"], 1) + membrane["below"] + membrane["above"]
        assert counted.tolist() == [T * len(range(0, N * np.prod(layer["shape"]), 7))] * 2
        assert layer["weight_grad_norm"] >= 0
        assert layer["activation_grad_norm"] >= 0
    for name in ("epoch", "split", "checkpoint"):
        assert name not in record
    text = mf.analysis.__doc__ or ""
    assert all(f'"{name}"' in text for name in (*record, *record["energy"], *record["gradient"], *record["layers"][0]))


def test_scores_after_each_time_step_are_those_of_the_mean_logits():
    """The scores at step t are those of the mean logits of the first t steps."""
    model, x, y = network("ds", 3).eval(), event_frames(), labels()
    with torch.no_grad():
        logits_TNL = model(x, per_step=True)
    record = analyze(model, [(x, y)]).record()
    for t in range(1, T + 1):
        mean = logits_TNL[:t].mean(0)
        assert record["per_step"]["accuracy"][t - 1] == (mean.argmax(1) == y).float().mean()
        loss = torch.nn.functional.cross_entropy(mean, y).item()
        assert record["per_step"]["loss"][t - 1] == pytest.approx(loss, rel=1e-6)
    confusion = np.zeros((3, 3), dtype=int)
    for true, predicted in zip(y, logits_TNL.mean(0).argmax(1), strict=True):
        confusion[true, predicted] += 1
    assert record["confusion"] == confusion.tolist()


def test_given_scores_are_used():
    model, batch = network("ds", 1).eval(), (event_frames(), labels())
    known = evaluate(model, [batch] * 5)
    record = analyze(model, [batch], scored=known).record()
    assert record["per_step"]["samples"] == 5 * N
    assert record["samples"] == N


@pytest.mark.parametrize(("surrogate", "reach"), [("triangle", 0.5), ("atan", None)])
def test_windows_are_those_of_the_networks_surrogate(surrogate, reach):
    model = network("ds", 1, surrogate=surrogate, surrogate_width=0.5)
    found = analyze(model, [(event_frames(), labels())]).record()["neuron"]["windows"]
    assert found == (None if reach is None else [pytest.approx([0.6 - reach, 0.6 + reach])])
