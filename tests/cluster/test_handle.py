"""Handles: a simulator as a row of addresses behaves as the simulator that they are of."""

import copy
import pickle

import numba
import numpy as np
import pytest
from random_clusters import new_engine, random_case

from biscale_gym.cluster.handle import handle_of, policy_addresses, state_at
from biscale_gym.cluster.policy import hold, policy
from biscale_gym.cluster.simulator import PhasePolicy, PolicyError


@policy
def lowest(obs, memory, params, model):
    return 0


def end_state(simulator):
    simulator.run()
    return [array.tobytes() for array in simulator.state]


@numba.njit(_nrt=False)
def some_of(handle):
    """Of every kind of array of the state that a handle describes: where it begins, and how it goes on."""
    st = state_at(handle)
    return (
        st.glob[0].now_s,
        st.inst[1].kv_capacity,
        len(st.node),
        st.arrivals[-1].arrival_s,
        st.req[2].prompt,
        st.tree_s[-2],
        st.tree_entity[1],
        st.memory[1, 7],
        st.slack_s[1, 2],
        st.finishing[-1, 5],
        st.log.shape[0],
    )


def test_a_handle_gives_the_arrays_themselves():
    simulator = new_engine(random_case(3))
    simulator.run(2.0)
    st = simulator.state
    st.memory[1, 7], st.slack_s[1, 2], st.finishing[-1, 5] = 1.5, 2.5, 3
    assert some_of(simulator.handle()) == (
        st.glob["now_s"][0],
        st.inst["kv_capacity"][1],
        len(st.node),
        st.arrivals["arrival_s"][-1],
        st.req["prompt"][2],
        st.tree_s[-2],
        st.tree_entity[1],
        1.5,
        2.5,
        3,
        len(st.log),
    )


def test_the_handle_follows_new_arrays_and_policies():
    simulator = new_engine(random_case(1))
    before = simulator.handle()
    assert simulator.handle() is before
    simulator.set_policies(PhasePolicy(function=lowest), None)
    assert simulator.handle() is not before
    assert tuple(simulator.handle()[-4:-2]) == policy_addresses(lowest)
    snapshot = simulator.snapshot()
    simulator.state = simulator.state._replace(log=np.zeros(3, simulator.state.log.dtype))
    simulator.restore(snapshot)
    assert (simulator.handle() == handle_of(simulator.state, lowest, hold)).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda simulator: pickle.loads(pickle.dumps(simulator))])
def test_copies_do_not_write_into_the_original(duplicate):
    simulator = new_engine(random_case(2))
    simulator.run(1.0)
    before = [array.tobytes() for array in simulator.state]
    twin = duplicate(simulator)
    result = end_state(twin)
    assert [array.tobytes() for array in simulator.state] == before
    assert end_state(simulator) == result


def test_what_is_not_compiled_for_the_signature_is_refused():
    with pytest.raises(TypeError, match="signature of clock policies"):
        policy_addresses(lambda obs, memory, params, model: 0)

    @numba.njit("int64(int64)")
    def other(x):
        return x

    with pytest.raises(TypeError, match="signature of clock policies"):
        policy_addresses(other)
    simulator = new_engine(random_case(0))
    simulator.set_policies(PhasePolicy(function=other), None)
    with pytest.raises(PolicyError):
        simulator.run()


def test_joules_do_not_depend_on_where_a_run_was_stopped_to_be_read():
    whole, halting = new_engine(random_case(3)), new_engine(random_case(3))
    whole.run()
    for until_s in np.linspace(0.0, whole.now_s, 37):
        halting.run(until_s)
        halting.instances()
    halting.run()
    assert (whole.instances().energy_j == halting.instances().energy_j).all()
    assert whole.instances().unallocated_j == halting.instances().unallocated_j
