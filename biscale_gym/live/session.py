"""``biscale-gym live``: controllers one after another on the same workers or servers and the same trace."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from biscale_gym.cluster.placement import Phase
from biscale_gym.config import load_preset
from biscale_gym.control.scenario import load_scenario
from biscale_gym.live.attached import OBSERVE_ONLY, AttachedReplay
from biscale_gym.live.demand import prepared
from biscale_gym.live.messages import Variant
from biscale_gym.live.pool import Pool
from biscale_gym.live.replay import Outcome, Replay
from biscale_gym.live.servers import connect, hang_up
from biscale_gym.live.settings import LiveSettings
from biscale_gym.live.vllm_adapter.options import FETCHED
from biscale_gym.metrics import tpot_s, ttft_s

FloatArray = npt.NDArray[np.float64]


def serve(
    scenario_name: str,
    controllers: Sequence[str],
    preset: str,
    trace_file: str | None,
    seed: int,
    folder: Path,
    urls: Mapping[Phase, Sequence[str]] | None = None,
    governors: Path | None = None,
) -> list[Outcome]:
    """Serve the scenario's trace live under each controller's clock policies in turn.

    Args:
        scenario_name: its placement says which workers there are; a phase without a policy holds its top clock.
        controllers: ``NAME`` or ``NAME[KEY=VALUE,...]``, installed or ``module:Class``.
        preset: of live settings, or a file.
        trace_file: in place of the scenario's workload.
        seed: of the trace and of the prompts' token ids.
        folder: for records.
        urls: of servers that are running already, by phase, in place of workers; the placement then only weighs them.
            Without governors in them there is one run, under no controller.
        governors: folder of their governors' sockets, if they have any.

    Raises:
        ConfigError, TraceError, ControllerError, LiveError: what is wrong.
    """
    scenario = load_scenario(scenario_name)
    settings = load_preset(LiveSettings, "live", preset)
    for name in controllers:
        Variant.parsed(name).make()
    with contextlib.ExitStack() as opened:
        if urls is not None:
            servers = connect(urls, scenario, governors)
            opened.callback(hang_up, servers)
        trace, context = prepared(scenario, trace_file, seed)
        folder.mkdir(parents=True, exist_ok=True)
        runs = {name: folder / name.replace(":", ".") for name in controllers}
        if urls is None:
            pool = opened.enter_context(Pool(scenario, settings, folder))
            return [Replay(pool, trace, name, context, into, seed).run() for name, into in runs.items()]
        if servers[0].governor is None:
            runs = {OBSERVE_ONLY: folder / OBSERVE_ONLY}
        return [
            AttachedReplay(servers, trace, name, context, settings, into, seed).run() for name, into in runs.items()
        ]


def _quantile_ms(values_s: FloatArray, percent: float) -> str:
    quantile = _quantile(values_s, percent, 1e3)
    return "–" if quantile is None else f"{quantile:.1f}"


def _quantiles_ms(values_s: FloatArray) -> str:
    return ", ".join(_quantile_ms(values_s, percent) for percent in (50, 90, 99))


def table(outcomes: Sequence[Outcome]) -> Table:
    """The runs side by side."""
    made = Table(title="live workers")
    latencies = [f"{name} p50, p90, p99 ms" for name in ("TTFT", "TPOT", "ITL")]
    for column in (
        "controller",
        "finished",
        "retried",
        *latencies,
        "energy J",
        "clocks",
        "KV fetched",
        "lag p99 ms",
        "control ms",
    ):
        made.add_column(column)
    for outcome in outcomes:
        ttft, tpot = ttft_s(outcome.requests), tpot_s(outcome.requests)
        made.add_row(
            outcome.controller,
            f"{outcome.states['finished']} of {sum(outcome.states.values())}",
            str(outcome.retried),
            *(_quantiles_ms(values_s) for values_s in (ttft, tpot, outcome.itl_s)),
            f"{outcome.energy_j:,.0f} {outcome.source}" if outcome.source else "unknown",
            outcome.mode,
            f"{outcome.prompt_tokens_by_source.get(FETCHED, 0)} of {outcome.prompt_tokens}",
            _quantile_ms(outcome.lag_s, 99),
            f"{_quantile(outcome.control_s, 50, 1e3) or 0.0:.3f}",
        )
    return made


def _quantile(values: FloatArray, percent: float, scale: float = 1.0) -> float | None:
    """Of the values that are there; None without any."""
    kept = values[np.isfinite(values)]
    return scale * float(np.percentile(kept, percent)) if kept.size else None


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line of JSON: latencies, transfer and overhead of the last run, energy of all."""
    last = outcomes[-1]
    energy_j = {outcome.controller: round(outcome.energy_j, 3) for outcome in outcomes if outcome.source}
    return json.dumps(
        {
            "requests": len(last.requests.arrival_s),
            "requests_finished": last.states["finished"],
            "requests_retried": last.retried,
            "ttft_p50_s": _quantile(ttft_s(last.requests), 50.0),
            "tpot_p50_s": _quantile(tpot_s(last.requests), 50.0),
            "prompt_tokens_transferred": last.prompt_tokens_by_source.get(FETCHED, 0),
            "prompt_tokens_total": last.prompt_tokens,
            "first_tokens_agree": last.first_tokens_agree,
            **({f"{last.source}_energy_j": energy_j} if energy_j else {}),
            "clock_mode": last.mode,
            "client_lag_p99_s": _quantile(last.lag_s, 99.0),
            "control_overhead_median_ms": _quantile(last.control_s, 50.0, 1e3),
        }
    )
