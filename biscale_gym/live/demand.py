"""What a live run replays, and what its controllers know."""

from __future__ import annotations

from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.control.workload import requests_for
from biscale_gym.traces import Trace


def prepared(scenario: ScenarioSettings, trace_file: str | None, seed: int) -> tuple[Trace, PlanContext]:
    """The trace to replay, and what controllers know.

    Raises:
        ConfigError, TraceError, ProfileError: a scenario or trace that cannot be used.
    """
    profile = scenario.cluster.profile()
    requests = requests_for(scenario, profile, "test" if trace_file is None else "all", seed, trace_file, None)
    clocks_mhz = {*scenario.clocks_mhz, scenario.top_clock_mhz}
    context = PlanContext(
        scenario, profile, requests.training, requests.mean_rate_rps, clocks_mhz=tuple(sorted(clocks_mhz))
    )
    return requests.evaluated, context
