"""How far the prefill controller's searches are from the best assignment of clocks, and how long they take.

    python scripts/mpc_gap.py
    python scripts/mpc_gap.py --json -

Draws random queues of prompts before one prefill instance, packs them into batches as the scheduler does, and solves
each with every search. The gap is the relative excess of an assignment's energy over that of ``exact``, both
counted over the same window: from now to the end of the projected batches at the lowest clock, idle energy included.
``--json FILE`` also writes means over all queues; ``-`` prints them, and the tables to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numba import njit
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from agents import mpc_search as search
from agents.settings import BiScaleSettings
from biscale_gym.cluster.features import HORIZON
from biscale_gym.control.scenario import load_scenario
from biscale_gym.profiles import load_profile
from biscale_gym.profiles.kernels import idle_power_w, iteration_cost
from biscale_gym.traces import generate, load_workload

Matrix = NDArray[np.float64]
FORMS = {"greedy": search.GREEDY, "dp": search.DYNAMIC, "exact": search.EXACT}
COLUMNS = ("search", "mean gap %", "P99 gap %", "worst gap %", "best found %", "missed", "P50 µs", "P99 µs", "worst µs")
REPEATS = 20

Results = dict[str, tuple[Matrix, Matrix, int]]
"""Per search: relative gaps, microseconds, queues missed."""


@dataclass(frozen=True)
class Queue:
    """Projected batches: seconds and joules by batch and clock, deadlines from now."""

    latency_s: Matrix
    energy_j: Matrix
    deadline_s: Matrix


def _solve(
    form: int,
    latency: Matrix,
    energy: Matrix,
    deadline: Matrix,
    idle_w: float,
    kind: int,
    step_s: float,
    choice: NDArray[np.int64],
    times: int,
) -> bool:
    """One search, several times over."""
    found = False
    for _ in range(times):
        if form == search.GREEDY:
            found = search.greedy(latency, energy, deadline, idle_w, kind, choice)
        elif form == search.EXACT:
            found = search.exact(latency, energy, deadline, idle_w, kind, choice)
        else:
            found = search.dynamic(latency, energy, deadline, idle_w, kind, step_s, choice)
    return found


solve: Any = njit(_solve)


@dataclass(frozen=True)
class Costs:
    """What batches cost on one instance.

    Attributes:
        model: compiled profile.
        clocks: their number.
        budget_tokens: of a batch.
    """

    model: Matrix
    clocks: int
    budget_tokens: int

    def of(self, prompts: Sequence[int]) -> Matrix:
        """Seconds and watts per GPU of a batch at every clock: float64[2, clocks]."""
        tokens, squares = float(sum(prompts)), float(sum(n * n for n in prompts))
        return np.array([iteration_cost(self.model, f, 0.0, 0.0, tokens, squares) for f in range(self.clocks)]).T


def random_queue(rng: np.random.Generator, lengths: NDArray[np.int64], costs: Costs, limit_s: float) -> Queue:
    """A queue that the top clock can serve in time, more or less just.

    Its oldest prompt has waited up to 60 % of the limit, the others arrived since, in order; prompts are added until
    the top clock would need a random share, 0.1 to 1.05, of the time that the oldest has left.
    """
    oldest_s = rng.uniform(0.0, 0.6 * limit_s)
    share = rng.uniform(0.1, 1.05)
    batches: list[list[int]] = []
    rows: list[Matrix] = []
    while True:
        tokens = int(rng.choice(lengths))
        if batches and sum(batches[-1]) + tokens <= costs.budget_tokens:
            batches[-1].append(tokens)
            rows[-1] = costs.of(batches[-1])
        elif len(batches) < HORIZON:
            batches.append([tokens])
            rows.append(costs.of(batches[-1]))
        else:
            break
        if sum(row[0, -1] for row in rows) > share * (limit_s - oldest_s):
            break
    prompts = sum(map(len, batches))
    waited_s = np.append(oldest_s, np.sort(rng.uniform(0.0, oldest_s, prompts - 1))[::-1])
    first = np.cumsum([0, *map(len, batches[:-1])])
    latency_s = np.array([row[0] for row in rows])
    return Queue(latency_s, latency_s * np.array([row[1] for row in rows]), limit_s - waited_s[first])


def decide_us(form: int, queue: Queue, idle_w: float, step_s: float, choice: NDArray[np.int64]) -> float:
    """Microseconds of one search, the best of three times ``REPEATS``."""
    least_s = np.inf
    for _ in range(3):
        start_s = time.perf_counter()
        solve(
            form,
            queue.latency_s,
            queue.energy_j,
            queue.deadline_s,
            idle_w,
            search.WINDOW_ENERGY,
            step_s,
            choice,
            REPEATS,
        )
        least_s = min(least_s, time.perf_counter() - start_s)
    return float(1e6 * least_s / REPEATS)


def window_j(queue: Queue, idle_w: float, choice: NDArray[np.int64]) -> float:
    """Joules per GPU from now to the end of the batches at the lowest clock."""
    rows = np.arange(choice.size)
    busy_s, busy_j = queue.latency_s[rows, choice].sum(), queue.energy_j[rows, choice].sum()
    return float(busy_j + idle_w * (queue.latency_s[:, 0].sum() - busy_s))


def gaps_and_times(queues: Sequence[Queue], idle_w: float) -> Results:
    """Per search: relative gaps where ``exact`` finds an assignment, microseconds of all, and how many it missed."""
    step_s = BiScaleSettings().prefill.grid_step_s
    gaps: dict[str, list[float]] = {name: [] for name in FORMS}
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    missed = dict.fromkeys(FORMS, 0)
    for queue in queues:
        best = np.zeros(queue.deadline_s.size, np.int64)
        idle = search.WINDOW_ENERGY
        feasible = solve(search.EXACT, queue.latency_s, queue.energy_j, queue.deadline_s, idle_w, idle, step_s, best, 1)
        for name, form in FORMS.items():
            choice = np.zeros_like(best)
            found = solve(form, queue.latency_s, queue.energy_j, queue.deadline_s, idle_w, idle, step_s, choice, 1)
            times[name].append(decide_us(form, queue, idle_w, step_s, choice))
            if feasible and found:
                gaps[name].append(window_j(queue, idle_w, choice) / window_j(queue, idle_w, best) - 1.0)
            missed[name] += feasible and not found
    return {name: (np.array(gaps[name]), np.array(times[name]), missed[name]) for name in FORMS}


def figures(results: Sequence[Results]) -> dict[str, dict[str, float]]:
    """Over the queues of all results: mean relative gap of the searches that may miss the best, median milliseconds."""
    return {
        "mpc_gap": {name: float(np.concatenate([one[name][0] for one in results]).mean()) for name in ("greedy", "dp")},
        "mpc_median_ms": {
            name: float(1e-3 * np.median(np.concatenate([one[name][1] for one in results])))
            for name in ("greedy", "exact", "dp")
        },
    }


def table_of(results: Results, title: str) -> Table:
    """One line per search."""
    table = Table(*COLUMNS, title=title, title_justify="left")
    for name, (gap, us, missed) in results.items():
        percent = 100.0 * gap
        shown = (percent.mean(), np.quantile(percent, 0.99), percent.max())
        times = (*np.quantile(us, [0.5, 0.99]), us.max())
        table.add_row(
            name,
            *(f"{value:.3f}" for value in shown),
            f"{100.0 * np.mean(gap < 1e-9):.1f}",
            str(missed),
            *(f"{value:.1f}" for value in times),
        )
    return table


def main(
    scenario: str = "paper-67",
    queues: int = 10_000,
    budget_tokens: int = 1024,
    seed: int = 0,
    tp: tuple[int, ...] = (2, 4),
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Print a table per TP degree.

    Args:
        scenario: whose workload, SLO and clocks.
        queues: how many are drawn for each TP degree.
        budget_tokens: of a batch; small, so that queues have many.
        seed: of the draw.
        tp: TP degrees.
        json_file: file for the means over all queues; - prints them.
    """
    settings = load_scenario(scenario)
    cluster, prefill = settings.cluster, BiScaleSettings().prefill
    profile = load_profile(cluster.hardware, cluster.model, cluster.precision)
    clocks = settings.clocks_mhz
    idle = clocks.index(min(clocks, key=lambda clock: abs(clock - prefill.idle_clock_mhz)))
    lengths = generate(load_workload(settings.workload), 60.0, 1800.0, seed).prompt_tokens
    console = Console(width=120, stderr=json_file == "-")
    all_results = []
    for degree in tp:
        model = profile.compile(degree, clocks, 1)
        costs = Costs(model, len(clocks), budget_tokens)
        rng = np.random.default_rng(seed)
        drawn = [random_queue(rng, lengths, costs, prefill.headroom * settings.slo.ttft_s) for _ in range(queues)]
        results = gaps_and_times(drawn, float(idle_power_w(model, idle)))
        all_results.append(results)
        mean = np.mean([queue.deadline_s.size for queue in drawn])
        served = len(results["exact"][0])
        console.print(
            table_of(results, f"TP{degree}: {queues:,} queues of {mean:.1f} batches, {served:,} can be served in time")
        )
    if json_file is not None:
        text = json.dumps(figures(all_results), indent=2) + "\n"
        if json_file == "-":
            sys.stdout.write(text)
        else:
            Path(json_file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
