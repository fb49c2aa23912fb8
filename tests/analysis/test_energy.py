"""Operations beside a naive count and beside torch's flop counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import multifire as mf
from multifire.analysis import measure_energy
from tests.analysis.recount import N, Recount, T, counts, labels, network
from tests.analysis.test_activity import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("block", ["ds", "plain"])
def test_synops_counted_spike_by_spike(block, levels, backend):
    model = network(block, levels, backend).eval()
    x = counts(model.voting.weight.dtype)
    found = measure_energy(model, [(x, labels())])
    naive = Recount(model, x).synops
    assert {each.name: each.synops for each in found.connections if each.kind != "linear"} == {
        name: synops / N for name, synops in naive.items()
    }
    voting = found.connections[-1]
    assert (voting.name, voting.kind, voting.synops) == ("voting", "linear", 0)
    assert voting.macs == T * 8 * 3
    assert found.macs == voting.macs
    kinds = {each.name: each.kind for each in found.connections}
    assert (kinds.get("stages.0.0.shortcut") == "identity") == (block == "plain")


@pytest.mark.parametrize("name", ["ds_resnet8", "plain_resnet14"])
def test_macs_are_half_of_torchs_flops(name):
    model = mf.build_model(name, width=4, num_classes=7).eval()
    x = torch.rand(1, 2, 3, 18, 18)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(x)
    found = measure_energy(model, [(x, torch.zeros(2))])
    assert 2 * found.samples * found.ann_macs == flops.get_total_flops()


def test_the_first_layer_is_counted_as_what_it_reads():
    model = network("ds", 3).eval()
    once = 2 * 2 * 9 * 25
    frames = torch.rand(T, N, 2, 5, 5, dtype=torch.float64)
    for x, macs in ((frames, T * once), (frames[:1].expand(frames.shape), once), (counts(), 0)):
        stem = measure_energy(model, [(x, labels())]).connections[0]
        assert stem.ann_macs == once
        assert stem.macs == macs
        assert (stem.synops > 0) == (macs == 0)


def test_events_stay_events_behind_the_input_norm():
    model = network("ds", 3, norm_input=True).eval()
    stem = measure_energy(model, [(counts(), labels())]).connections[0]
    assert stem.synops == measure_energy(network("ds", 3).eval(), [(counts(), labels())]).connections[0].synops
    assert stem.macs == 0


@pytest.mark.parametrize(("levels", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3)])
def test_energy_is_operations_times_prices(levels, bits):
    model = network("plain", levels).eval()
    found = measure_energy(model, [(counts(), labels())], ac_pj=2.0, mac_pj=10.0)
    assert found.snn_pj == 2.0 * found.synops + 10.0 * found.macs
    assert found.ann_pj == 10.0 * found.ann_macs
    ends = found.connections[0].ann_macs + found.connections[-1].ann_macs
    assert found.quantised_pj == pytest.approx(10.0 * ends + 2.0 * bits * (found.ann_macs - ends))
    with pytest.raises(ValueError, match="ac_pj is 0, expected picojoules above 0"):
        measure_energy(model, [(counts(), labels())], ac_pj=0)
