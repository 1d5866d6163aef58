"""Ask compiled clock policies what they would do in an environment, changing nothing but their own memory."""

from __future__ import annotations

from typing import Any

from numba import types

from biscale_gym._jit import compiled_as, inlined
from biscale_gym.cluster import features as f
from biscale_gym.cluster.handle import HANDLE_TYPE, decode_policy_at, prefill_policy_at, state_at
from biscale_gym.cluster.observe import observe
from biscale_gym.cluster.state import ACTIVE, DECODE, PREFILL, State

NOBODY = -1


@inlined
def _ask(st: State, i: int, prefill_policy: Any, decode_policy: Any) -> int:
    """The answer of instance i's policy to the observation that its phase's row holds."""
    inst = st.inst[i]
    model = st.predicted[inst.predicted_start : inst.predicted_stop]
    if inst.phase == PREFILL:
        return int(prefill_policy(st.obs[PREFILL], st.memory[i], st.params_prefill, model))
    return int(decode_policy(st.obs[DECODE], st.memory[i], st.params_decode, model))


@compiled_as(types.int64(HANDLE_TYPE))
def consult_pending(handle: Any) -> int:
    """The clock (index into the run's list) for the decision that waits; NOBODY if none does."""
    st = state_at(handle)
    i = st.glob[0].pending_instance
    if i < 0:
        return NOBODY
    return int(_ask(st, i, prefill_policy_at(handle), decode_policy_at(handle)))


@compiled_as(types.void(HANDLE_TYPE, types.int64[::1], types.int64[::1]))
def consult_slots(handle: Any, slots: Any, clocks: Any) -> None:
    """The clock for the instance in each slot, in the order of the instances; NOBODY where no instance serves.

    Args:
        handle: int64[handle.SIZE].
        slots: int64[S], the instance in each, -1: none.
        clocks: int64[S], written.
    """
    st = state_at(handle)
    prefill_policy, decode_policy = prefill_policy_at(handle), decode_policy_at(handle)
    for slot in range(len(slots)):
        clocks[slot] = NOBODY
    for i in range(st.glob[0].instances):
        if st.inst[i].status != ACTIVE:
            continue
        for slot in range(len(slots)):
            if slots[slot] == i:
                observe(st, i, f.INTERVAL if st.inst[i].running else f.IDLE)
                clocks[slot] = _ask(st, i, prefill_policy, decode_policy)
