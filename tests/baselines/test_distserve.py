"""DistServe's search and replication, on tables written down."""

from __future__ import annotations

import math

import pytest

from baselines.distserve import best_per_gpu, replicate, replicate_units
from baselines.errors import BaselineError
from biscale_gym.cluster.settings import ClusterSettings
from biscale_gym.planning.classes import InstanceClass


def row(phase, tp, rate_rps, pp=1):
    return InstanceClass(phase, tp, pp, 1980, rate_rps, 100.0)


TABLE = (
    row("prefill", 2, 20.0),
    row("prefill", 4, 44.0),
    row("prefill", 8, 80.0),
    row("decode", 2, 0.0),
    row("decode", 4, 30.0),
    row("decode", 4, 68.0, pp=2),
)
CLUSTER = ClusterSettings(nodes=2, gpus_per_node=8)


def test_best_is_per_gpu_and_the_smaller_of_equals():
    assert best_per_gpu(TABLE[:3]) == TABLE[1]
    assert best_per_gpu([row("prefill", 4, 40.0), row("prefill", 2, 20.0)]).tp == 2


@pytest.mark.parametrize(("rate_rps", "prefill", "decode"), [(10.0, 1, 1), (44.0, 1, 1), (60.0, 2, 1), (68.0, 2, 1)])
def test_replication_is_the_ceiling(rate_rps, prefill, decode):
    placement, share = replicate(TABLE, CLUSTER, rate_rps)
    assert share == 1.0
    assert len(placement.of("prefill")) == prefill == math.ceil(rate_rps / 44.0)
    assert len(placement.of("decode")) == decode
    assert {(spec.tp, spec.pp) for spec in placement.of("decode")} == {(4, 2)}
    assert {spec.clock_mhz for spec in placement.instances} == {1980}
    assert {spec.weight for spec in placement.instances} == {1.0}


def test_beyond_the_cluster_the_nearest_is_taken():
    """Enumerated by hand: 8 GPUs each way carry 68 in decode and 88 in prefill; nothing carries more in both."""
    placement, share = replicate(TABLE, CLUSTER, 100.0)
    assert share == pytest.approx(0.68)
    assert placement.gpus <= 16
    capacity = sum(68.0 if spec.pp == 2 else 30.0 for spec in placement.of("decode"))
    assert capacity == pytest.approx(68.0)


def test_a_phase_without_goodput_is_an_error():
    with pytest.raises(BaselineError, match="no decode configuration"):
        replicate([TABLE[0], TABLE[3]], CLUSTER, 1.0)


def test_a_cluster_too_small_is_an_error():
    with pytest.raises(BaselineError, match="do not hold"):
        replicate([TABLE[1], TABLE[4]], ClusterSettings(nodes=1, gpus_per_node=4), 1.0)


def test_low_affinity_units_share_a_node():
    placement, share = replicate_units(TABLE, CLUSTER, 55.0)
    assert share == 1.0
    # One prefill TP2 or TP4 beside one decode TP4 per node: min(20, 30) on 6 GPUs, min(44, 30) on 8, min(40, 30) on 8.
    assert len(placement.of("decode")) == 2
    assert placement.gpus == 16
    _, share = replicate_units(TABLE, CLUSTER, 120.0)
    assert share == pytest.approx(0.5)


def test_low_affinity_needs_room_on_a_node():
    with pytest.raises(BaselineError, match="share a node"):
        replicate_units([row("prefill", 8, 9.0), row("decode", 8, 9.0)], CLUSTER, 1.0)
