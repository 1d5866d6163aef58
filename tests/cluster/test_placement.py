"""Placements: what is refused, where instances lie, and what a change of placement keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from cluster.small_clusters import CLOCKS_MHZ, SLO, cluster, decode, prefill, requests, simulator

from biscale_gym.cluster.placement import InstanceSpec, Lane, Placement, PlacementError, layout, transition
from biscale_gym.cluster.simulator import ClusterError, Simulator
from biscale_gym.config import ConfigError, read_yaml, validate
from biscale_gym.control.simulate import SimulationSettings
from biscale_gym.profiles import ProfileError, load_profile


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([prefill()], r"^the placement 1×P TP2@1410 has no decode instance; add at least one$"),
        ([decode()], r"^the placement 1×D TP2@1410 has no prefill instance; add at least one$"),
        ([], r"^the placement \(empty\) has no prefill instance; add at least one$"),
        (
            [prefill(), decode(3)],
            r"^instance 1 \(decode TP3\): TP 3 is not supported; the nearest is 2 \(valid: \[1, 2, 4, 8\]\)$",
        ),
        ([prefill(0), decode()], r"TP 0 is not supported; the nearest is 1"),
        ([prefill(8), decode()], r"^instance 0 \(prefill TP8\): a TP group must fit on one node of 4 GPUs$"),
        (
            [*[prefill(4)] * 3, *[decode()] * 3],
            r"^the placement 3×P TP4@1410 \+ 3×D TP2@1410 takes 18 GPUs, the cluster has 4 nodes of 4 = 16$",
        ),
        ([prefill(weight=0.0), decode()], r"the routing weight must be positive and finite, got 0\.0$"),
        ([prefill(), decode(weight=-1.0)], r"^instance 1 .* got -1\.0$"),
        ([prefill(), decode(weight=math.nan)], r"^instance 1 .* got nan$"),
        ([prefill(), decode(weight=math.inf)], r"^instance 1 .* got inf$"),
        ([prefill(pp=0), decode()], r"pp must be at least 1, got 0"),
        ([InstanceSpec("prefil", 2, 1410), decode()], r"instance 0: unknown phase 'prefil'; did you mean 'prefill'\?"),
    ],
)
def test_an_impossible_placement_is_refused(specs: Sequence[InstanceSpec], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        simulator(specs, requests([0.0]), cluster(nodes=4, gpus_per_node=4))


def test_groups_that_leave_no_node_for_a_group_are_refused() -> None:
    specs = [*[prefill(2)] * 3, *[decode(2)] * 2]
    with pytest.raises(PlacementError, match=r"the TP groups of 3×P TP2@1410 .* do not fit on 4 nodes of 3 GPUs"):
        simulator(specs, requests([0.0]), cluster(nodes=4, gpus_per_node=3))


@pytest.mark.parametrize(("clock_mhz", "nearest"), [(1400, 1410), (100, 705), (9999, 1980), (856, 1005)])
def test_an_unknown_clock_is_refused_with_the_nearest(clock_mhz: int, nearest: int) -> None:
    with pytest.raises(ClusterError, match=f"^the run has no clock {clock_mhz} MHz; the nearest is {nearest} .valid: "):
        simulator([prefill(), decode(clock_mhz=clock_mhz)], requests([0.0]), cluster())


def test_a_clock_that_the_card_has_not_is_refused_with_the_nearest() -> None:
    profile = load_profile("h100-sxm5", "llama-3.1-8b", "bf16")
    with pytest.raises(ProfileError, match="has no clock 1000 MHz; the nearest is 1005 MHz"):
        Simulator(cluster(), profile, Placement((prefill(), decode())), requests([0.0]), (1000, 1410), SLO)


def test_a_model_that_does_not_fit_is_refused_with_what_does() -> None:
    profile = load_profile("h100-sxm5", "llama-3.3-70b", "bf16")
    message = r"^llama-3.3-70b in bf16 does not fit a decode instance of TP2; TP degrees that do: \[4, 8\]$"
    with pytest.raises(ClusterError, match=message):
        Simulator(cluster(), profile, Placement((prefill(4), decode(2))), requests([0.0]), CLOCKS_MHZ, SLO)


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ("{phase: prefill, tp: 2, clok_mhz: 705}", r"instances\.0\.clok_mhz: unknown key; did you mean 'clock_mhz'\?"),
        ("{fase: prefill, tp: 2}", r"instances\.0\.fase: unknown key; did you mean 'phase'\?"),
        ("{phase: prefil, tp: 2}", r"instances\.0\.phase: Input should be 'prefill' or 'decode'"),
        ("{phase: prefill, tp: two}", r"instances\.0\.tp: Input should be a valid integer"),
        ("{phase: prefill, tp: 2, weight: .nan}", r"instances\.0\.weight: "),
    ],
)
def test_a_wrong_line_of_a_placement_file_is_named(tmp_path: Path, instance: str, message: str) -> None:
    path = tmp_path / "placement.yaml"
    path.write_text(f"instances:\n- {instance}\n")
    with pytest.raises(ConfigError, match=rf"placement\.yaml: {message}"):
        validate(SimulationSettings, read_yaml(path), str(path))


def test_groups_lie_on_one_node_each_and_the_largest_choose_first() -> None:
    lanes = layout(Placement((prefill(1), prefill(2), decode(4), decode(8), decode(1))), 2, 8)
    assert [(lane.spec.tp, lane.node) for lane in lanes] == [(1, 1), (2, 1), (4, 1), (8, 0), (1, 1)]


def test_a_group_lies_where_it_leaves_the_least_room() -> None:
    lanes = layout(Placement((prefill(2), decode(4), decode(4), decode(4))), 3, 8)
    assert [lane.node for lane in lanes] == [1, 0, 0, 1]


def test_a_pipeline_is_as_many_lanes_as_stages() -> None:
    run = simulator([prefill(2, weight=3.0, pp=2), decode(2)], requests([0.0]), cluster())
    assert [(lane.spec.phase, lane.spec.tp) for lane in run.lanes] == [("prefill", 2), ("prefill", 2), ("decode", 2)]
    inst = run.state.inst
    assert inst["weight"].tolist() == [1.5, 1.5, 1.0]
    whole = run.profile.kv_capacity_for("prefill", 2, 2)
    assert inst["kv_capacity"][:2].tolist() == [whole // 2] * 2
    assert run.state.glob[0]["gpus_allocated"] == 6


def running(*lanes: tuple[InstanceSpec, int]) -> list[tuple[int, Lane]]:
    return [(number, Lane(spec, node)) for number, (spec, node) in enumerate(lanes)]


def test_equal_instances_go_on_whatever_their_clock_and_weight() -> None:
    before = running((prefill(2, 705), 0), (prefill(2, 1980), 0), (decode(4), 1))
    after = Placement((decode(4, 1005, weight=2.0), prefill(2, 1980), prefill(2, 1005)))
    change = transition(before, after, 2, 8)
    assert change.leave == change.start == ()
    assert [(number, spec.clock_mhz) for number, spec in change.keep] == [(0, 1005), (1, 1980), (2, 1005)]


def test_what_is_not_wanted_leaves_and_what_is_new_starts_where_there_is_room() -> None:
    before = running((prefill(2), 0), (prefill(2), 0), (decode(4), 0))
    change = transition(before, Placement((prefill(2), decode(4), decode(8))), 2, 8)
    assert [number for number, _ in change.keep] == [0, 2]
    assert change.leave == (1,)
    assert [(lane.spec.tp, lane.node) for lane in change.start] == [(8, 1)]


def test_an_instance_moves_where_that_alone_makes_room() -> None:
    before = running((prefill(2), 0), (decode(2), 1))
    change = transition(before, Placement((prefill(2), decode(2), decode(8))), 2, 8)
    assert len(change.keep) == len(change.leave) == 1
    places = {lane.node: lane.spec.tp for lane in change.start}
    assert sorted(places.values()) == [2, 8]
    assert len(places) == 2


def test_a_placement_is_described_by_its_classes() -> None:
    placement = Placement((prefill(2), prefill(2), decode(4, 1005), decode(2, 1980, pp=2)))
    assert placement.describe() == "2×P TP2@1410 + 1×D TP4@1005 + 1×D TP2·PP2@1980"
    assert placement.gpus == 12
