"""Clock assignment for a queue of batches with deadlines: the search behind the prefill controller.

The problem: batches 0..h-1 run one after another; batch j at clock c lasts ``latency[j, c]`` and draws ``energy[j,
c]``; the completion of batch j must not exceed ``deadline[j]``. Clocks are columns in ascending order, so the last
column is the top clock.

Three objectives (``kind``):

- ``WINDOW_ENERGY``: sum of energy - idle_w * sum of latency, that is busy energy plus idle energy over a window of
  fixed length;
- ``BUSY_ENERGY``: sum of energy;
- ``MEAN_POWER``: sum of energy / sum of latency.

The first two are sums over batches. The third is a ratio of sums, and is minimised by Dinkelbach's method (1967):
repeatedly minimise the sum of energy - rate * latency, where rate is the best ratio so far, until that cannot get
below zero.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

WINDOW_ENERGY = 0
BUSY_ENERGY = 1
MEAN_POWER = 2
OBJECTIVES = {"window-energy": WINDOW_ENERGY, "busy-energy": BUSY_ENERGY, "mean-power": MEAN_POWER}

GREEDY = 0
EXACT = 1
DYNAMIC = 2

DEADLINE_TOLERANCE_S = 1e-12
_TIE = 1e-9
_ROUNDING = 1e-3
_RATIO_TOLERANCE = 1e-8
_MAX_RATIO_ROUNDS = 64
_BISECTIONS = 24

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
Choice = NDArray[np.int64]


@njit(cache=True)
def _put(choice: Choice, values: Choice) -> None:
    """Overwrite a choice; assigning the array would compile numba's check of its shape, for seconds."""
    for j in range(choice.size):
        choice[j] = values[j]


@njit(cache=True)
def meets_deadlines(latency: Matrix, deadline: Vector, choice: Choice) -> bool:
    """Whether every batch is complete by its deadline."""
    end = 0.0
    for j in range(deadline.size):
        end += latency[j, choice[j]]
        if end > deadline[j] + DEADLINE_TOLERANCE_S:
            return False
    return True


@njit(cache=True)
def objective(latency: Matrix, energy: Matrix, idle_w: float, kind: int, choice: Choice) -> float:
    """Value of an assignment: J (less the constant idle_w * window) or, for ``MEAN_POWER``, W."""
    busy_j = 0.0
    busy_s = 0.0
    for j in range(choice.size):
        busy_j += energy[j, choice[j]]
        busy_s += latency[j, choice[j]]
    if kind == WINDOW_ENERGY:
        return busy_j - idle_w * busy_s
    if kind == BUSY_ENERGY:
        return busy_j
    return busy_j / busy_s


@njit(cache=True)
def _multipliers(latency: Matrix, cost: Matrix, deadline: Vector, low: Choice, high: Choice) -> Vector:
    """Prices per second of the deadlines that make the relaxed problem meet them, a good (never invalid) dual solution.

    Returns:
        float64[h]: price of each batch's deadline, >= 0.
    """
    h = deadline.size
    price = np.zeros(h)
    scale = 0.0
    for j in range(h):
        for c in range(low[j], high[j]):
            gain = latency[j, c] - latency[j, c + 1]
            if gain > 0.0:
                scale = max(scale, (cost[j, c + 1] - cost[j, c]) / gain)
    if scale <= 0.0:
        return price
    for k in range(h - 1, -1, -1):
        floor = 0.0
        ceiling = scale
        for step in range(_BISECTIONS + 1):
            # The first look is at a price of nothing: most deadlines do not bind.
            price[k] = 0.0 if step == 0 else 0.5 * (floor + ceiling)
            end = 0.0
            for j in range(k + 1):
                slope = 0.0
                for i in range(j, h):
                    slope += price[i]
                best = np.inf
                best_s = 0.0
                for c in range(low[j], high[j] + 1):
                    value = cost[j, c] + slope * latency[j, c]
                    if value < best:
                        best = value
                        best_s = latency[j, c]
                end += best_s
            met = end <= deadline[k]
            if step == 0:
                if met:
                    break
            elif met:
                ceiling = price[k]
            else:
                floor = price[k]
        if price[k] > 0.0:
            price[k] = ceiling
    return price


@njit(cache=True)
def least_sum(
    latency: Matrix, cost: Matrix, deadline: Vector, low: Choice, high: Choice, tie: float, choice: Choice
) -> float:
    """Branch and bound for the least sum of ``cost`` with batch j's clock in ``low[j]..high[j]``.

    Depth first in batch order. A node is cut when its batches end too late for the rest at the fastest clocks, or when
    its cost plus the relaxed rest (deadlines dropped, or priced by a Lagrangian) cannot beat the best assignment so
    far.

    Args:
        latency: float64[h, n], s.
        cost: float64[h, n], additive cost.
        deadline: float64[h], s from now.
        low: int64[h], lowest column allowed.
        high: int64[h], highest column allowed.
        tie: costs that differ by no more than this count as equal.
        choice: int64[h], a feasible assignment on entry, the best one (the lower clocks of equals) on return.

    Returns:
        The least sum of cost.
    """
    h = deadline.size
    n = latency.shape[1]
    price = _multipliers(latency, cost, deadline, low, high)
    latest = np.empty(h)
    free_rest = np.zeros(h + 1)
    priced_rest = np.zeros(h + 1)
    slope = np.zeros(h + 1)
    due = np.zeros(h + 1)
    order = np.empty((h, n), np.int64)
    for j in range(h - 1, -1, -1):
        slope[j] = slope[j + 1] + price[j]
        due[j] = due[j + 1] + price[j] * deadline[j]
        latest[j] = deadline[j] + DEADLINE_TOLERANCE_S
        if j + 1 < h:
            fastest = np.inf
            for c in range(low[j + 1], high[j + 1] + 1):
                fastest = min(fastest, latency[j + 1, c])
            latest[j] = min(latest[j], latest[j + 1] - fastest)
        count = high[j] - low[j] + 1
        free = np.inf
        for rank in range(count):
            c = low[j] + rank
            value = cost[j, c] + slope[j] * latency[j, c]
            free = min(free, cost[j, c])
            at = rank
            while at > 0:
                before = order[j, at - 1]
                if cost[j, before] + slope[j] * latency[j, before] <= value:
                    break
                order[j, at] = before
                at -= 1
            order[j, at] = c
        first = order[j, 0]
        free_rest[j] = free_rest[j + 1] + free
        priced_rest[j] = priced_rest[j + 1] + cost[j, first] + slope[j] * latency[j, first]

    best = 0.0
    for j in range(h):
        best += cost[j, choice[j]]
    # Ties go to the lower clocks, tried first among equals: where the board's power limit makes several clocks one and
    # the same, a stepwise search would otherwise never leave the highest of them.
    best += tie
    rank_at = np.zeros(h, np.int64)
    end_s = np.zeros(h + 1)
    spent = np.zeros(h + 1)
    j = 0
    while j >= 0:
        if rank_at[j] > high[j] - low[j]:
            rank_at[j] = 0
            j -= 1
            continue
        c = order[j, rank_at[j]]
        rank_at[j] += 1
        end = end_s[j] + latency[j, c]
        if end > latest[j]:
            continue
        total = spent[j] + cost[j, c]
        bound = total + max(free_rest[j + 1], priced_rest[j + 1] + slope[j + 1] * end - due[j + 1])
        if bound >= best - _ROUNDING * tie:
            continue
        if j + 1 == h:
            best = total
            for i in range(h):
                choice[i] = order[i, rank_at[i] - 1]
            continue
        j += 1
        end_s[j] = end
        spent[j] = total
    return best


@njit(cache=True)
def _least_sum_on_grid(latency: Matrix, cost: Matrix, deadline: Vector, step_s: float, choice: Choice) -> bool:
    """Dynamic programme over completion times on a grid.

    Latencies are rounded up and deadlines down, so it is never optimistic.

    Returns:
        Whether an assignment was found; ``choice`` is untouched otherwise.
    """
    h, n = latency.shape
    steps = np.empty((h, n), np.int64)
    longest = 0
    for j in range(h):
        worst = 0
        for c in range(n):
            steps[j, c] = int(np.ceil(latency[j, c] / step_s - 1e-9))
            worst = max(worst, steps[j, c])
        longest += worst
    latest = np.empty(h, np.int64)
    for j in range(h - 1, -1, -1):
        # A deadline beyond the slowest schedule binds nothing, and the table needs no more columns than that.
        reach = min(deadline[j] / step_s + 1e-9, float(longest))
        latest[j] = int(np.floor(reach))
        if j + 1 < h:
            fastest = steps[j + 1].min()
            latest[j] = min(latest[j], latest[j + 1] - fastest)
    if latest[0] < steps[0].min():
        return False
    columns = latest.max() + 1
    value = np.full((h + 1, columns), np.inf)
    chosen = np.zeros((h, columns), np.int64)
    value[0, 0] = 0.0
    for j in range(h):
        start = latest[j - 1] if j > 0 else 0
        for at in range(start + 1):
            if value[j, at] == np.inf:
                continue
            for c in range(n):
                to = at + steps[j, c]
                if to > latest[j]:
                    continue
                total = value[j, at] + cost[j, c]
                if total < value[j + 1, to]:
                    value[j + 1, to] = total
                    chosen[j, to] = c
    end = int(np.argmin(value[h]))
    if value[h, end] == np.inf:
        return False
    for j in range(h - 1, -1, -1):
        choice[j] = chosen[j, end]
        end -= steps[j, choice[j]]
    return True


@njit(cache=True)
def _improve(
    latency: Matrix,
    energy: Matrix,
    deadline: Vector,
    low: Choice,
    high: Choice,
    idle_w: float,
    kind: int,
    choice: Choice,
) -> None:
    """Best assignment within ``low..high``, starting from the feasible one in ``choice``, by branch and bound."""
    tie = _TIE * objective(latency, energy, 0.0, BUSY_ENERGY, choice)
    if kind != MEAN_POWER:
        rate = idle_w if kind == WINDOW_ENERGY else 0.0
        least_sum(latency, energy - rate * latency, deadline, low, high, tie, choice)
        return
    for _ in range(_MAX_RATIO_ROUNDS):
        rate = objective(latency, energy, 0.0, MEAN_POWER, choice)
        before = choice.copy()
        least_sum(latency, energy - rate * latency, deadline, low, high, tie, choice)
        reached = objective(latency, energy, 0.0, MEAN_POWER, choice)
        if reached >= rate * (1.0 - _RATIO_TOLERANCE):
            if reached > rate * (1.0 + _RATIO_TOLERANCE):
                _put(choice, before)
            return


@njit(cache=True)
def greedy(latency: Matrix, energy: Matrix, deadline: Vector, idle_w: float, kind: int, choice: Choice) -> bool:
    """The stepwise descent of the paper's Algorithm 1, from the top clock downward.

    In step s only the batches that still sit at the s-th clock from the top may move, by at most two notches; the best
    feasible combination of these moves is kept.

    Args:
        latency: float64[h, n], s; columns ascend in clock.
        energy: float64[h, n], J.
        deadline: float64[h], s from now.
        idle_w: idle power that a busy second replaces.
        kind: one of ``OBJECTIVES``' values.
        choice: int64[h], filled with the columns chosen.

    Returns:
        Whether the top clock meets the deadlines; ``choice`` is all top clock if not.
    """
    h, n = latency.shape
    choice[:] = n - 1
    if not meets_deadlines(latency, deadline, choice):
        return False
    low = np.empty(h, np.int64)
    high = np.empty(h, np.int64)
    for step in range(1, n):
        at = n - step
        movable = 0
        for j in range(h):
            low[j] = choice[j]
            high[j] = choice[j]
            if choice[j] == at:
                low[j] = max(at - 2, 0)
                movable += 1
        if movable > 0:
            _improve(latency, energy, deadline, low, high, idle_w, kind, choice)
    return True


@njit(cache=True)
def exact(latency: Matrix, energy: Matrix, deadline: Vector, idle_w: float, kind: int, choice: Choice) -> bool:
    """The best of all n^h assignments, by branch and bound from the greedy one. Arguments as :func:`greedy`."""
    if not greedy(latency, energy, deadline, idle_w, kind, choice):
        return False
    h, n = latency.shape
    _improve(latency, energy, deadline, np.zeros(h, np.int64), np.full(h, n - 1), idle_w, kind, choice)
    return True


@njit(cache=True)
def dynamic(
    latency: Matrix, energy: Matrix, deadline: Vector, idle_w: float, kind: int, step_s: float, choice: Choice
) -> bool:
    """The best assignment on a time grid of ``step_s``. Arguments as :func:`greedy`.

    Returns:
        Whether a schedule rounded onto the grid meets the deadlines. If only the unrounded top clock does, that is the
        choice.
    """
    n = latency.shape[1]
    choice[:] = n - 1
    if not meets_deadlines(latency, deadline, choice):
        return False
    if kind != MEAN_POWER:
        rate = idle_w if kind == WINDOW_ENERGY else 0.0
        return bool(_least_sum_on_grid(latency, energy - rate * latency, deadline, step_s, choice))
    for _ in range(_MAX_RATIO_ROUNDS):
        rate = objective(latency, energy, 0.0, MEAN_POWER, choice)
        before = choice.copy()
        if not _least_sum_on_grid(latency, energy - rate * latency, deadline, step_s, choice):
            return False
        reached = objective(latency, energy, 0.0, MEAN_POWER, choice)
        if reached >= rate * (1.0 - _RATIO_TOLERANCE):
            if reached > rate * (1.0 + _RATIO_TOLERANCE):
                _put(choice, before)
            return True
    return True
