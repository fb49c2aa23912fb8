"""Numbers of operations equal a naive count and torch's FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import multifire as mf
from multifire.analysis import measure_energy
from tests.analysis.recount import N, NaiveNetwork, T, event_frames, labels, network
from tests.analysis.test_activity import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("block", ["ds", "plain"])
def test_synops_equal_a_count_spike_by_spike(block, levels, backend):
    model = network(block, levels, backend).eval()
    x = event_frames(model.voting.weight.dtype)
    found = measure_energy(model, [(x, labels())])
    naive = NaiveNetwork(model, x).synops
    assert {connection.name: connection.synops for connection in found.connections if connection.kind != "linear"} == {
        name: synops / N for name, synops in naive.items()
    }
    voting = found.connections[-1]
    assert (voting.name, voting.kind, voting.synops) == ("voting", "linear", 0)
    assert voting.macs == T * 8 * 3
    assert found.macs == voting.macs
    kinds = {connection.name: connection.kind for connection in found.connections}
    assert (kinds.get("stages.0.0.shortcut") == "identity") == (block == "plain")


@pytest.mark.parametrize("name", ["ds_resnet8", "plain_resnet14"])
def test_macs_are_half_of_torchs_flops(name):
    model = mf.build_model(name, width=4, num_classes=7).eval()
    x = torch.rand(1, 2, 3, 18, 18)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(x)
    found = measure_energy(model, [(x, torch.zeros(2))])
    assert 2 * found.samples * found.ann_macs == flops.get_total_flops()


def test_first_layer_has_macs_for_images_and_synops_for_events():
    model = network("ds", 3).eval()
    macs_per_step = 2 * 2 * 9 * 25
    frames = torch.rand(T, N, 2, 5, 5, dtype=torch.float64)
    for x, macs in ((frames, T * macs_per_step), (frames[:1].expand(frames.shape), macs_per_step), (event_frames(), 0)):
        stem = measure_energy(model, [(x, labels())]).connections[0]
        assert stem.ann_macs == macs_per_step
        assert stem.macs == macs
        assert (stem.synops > 0) == (macs == 0)


def test_synops_for_events_are_the_same_with_an_input_norm():
    model = network("ds", 3, norm_input=True).eval()
    stem = measure_energy(model, [(event_frames(), labels())]).connections[0]
    assert stem.synops == measure_energy(network("ds", 3).eval(), [(event_frames(), labels())]).connections[0].synops
    assert stem.macs == 0


@pytest.mark.parametrize(("levels", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3)])
def test_energy_is_operations_times_energy_per_operation(levels, bits):
    model = network("plain", levels).eval()
    found = measure_energy(model, [(event_frames(), labels())], ac_pj=2.0, mac_pj=10.0)
    assert found.snn_pj == 2.0 * found.synops + 10.0 * found.macs
    assert found.ann_pj == 10.0 * found.ann_macs
    first_and_last = found.connections[0].ann_macs + found.connections[-1].ann_macs
    assert found.quantised_pj == pytest.approx(10.0 * first_and_last + 2.0 * bits * (found.ann_macs - first_and_last))
    with pytest.raises(ValueError, match="ac_pj is 0, expected picojoules above 0"):
        measure_energy(model, [(event_frames(), labels())], ac_pj=0)
