"""Class tables: the search for rates, the traces it uses, the cache."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.config import cache_root
from biscale_gym.planning import classes, table_cache
from biscale_gym.planning.classes import Column, Measurement, class_table, measure_column
from biscale_gym.planning.errors import PlanningError
from biscale_gym.planning.probe_trace import delayed, probe_trace, stretches
from biscale_gym.planning.probing import ProbeOutcome, greatest_rate
from biscale_gym.traces.trace import Trace

CLOCKS_MHZ = (705, 1005, 1410, 1980)


@pytest.fixture
def training():
    rng = np.random.default_rng(0)
    n = 4000
    return Trace(
        np.cumsum(rng.exponential(0.1, n)), rng.integers(10, 2000, n), rng.integers(2, 400, n), "poisson at 10/s"
    )


@pytest.fixture
def measurement(profile, training):
    return Measurement(
        profile=profile,
        cluster=ClusterSettings(),
        slo=SloSettings(ttft_s=0.6, tpot_s=0.1),
        training=training,
        headroom=0.95,
        quantile=0.99,
        requests_per_probe=500,
        warmup_s=5.0,
        rate_tolerance=0.02,
        seed=1,
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BISCALE_GYM_CACHE", str(tmp_path))
    return tmp_path / classes.CACHE_KIND


@pytest.fixture
def probes(monkeypatch):
    """A queue with a closed form in place of the simulation; the list collects what was asked."""
    asked = []

    def serve(profile, settings, spec, trace, *, quantile, warmup_s, tpot_definition):
        asked.append((spec, trace.rate_rps))
        capacity_rps = spec.tp * spec.clock_mhz / 200
        busy = trace.rate_rps / capacity_rps
        scale_s = 0.05 if spec.phase == "prefill" else 0.01
        latency_s = scale_s / (1 - busy) if busy < 1 else math.inf
        return ProbeOutcome(latency_s, joules=300.0 * len(trace), requests=len(trace))

    monkeypatch.setattr(classes, "serve_alone", serve)
    return asked


@pytest.mark.parametrize("guess_rps", [0.01, 3.0, 9.9, 400.0])
def test_greatest_rate_brackets_the_limit(guess_rps):
    asked = []

    def probe(rate_rps):
        asked.append(rate_rps)
        return ProbeOutcome(1.0 / max(10.0 - rate_rps, 1e-9), joules=rate_rps, requests=1)

    rate_rps, outcome = greatest_rate(probe, lambda seen: seen.latency_s <= 1.0, guess_rps, tolerance=0.02)
    assert 9.0 / 1.02 <= rate_rps <= 9.0
    assert outcome.joules == rate_rps
    assert len(asked) < 20


def test_a_class_that_never_passes_carries_nothing():
    rate_rps, outcome = greatest_rate(lambda rate_rps: ProbeOutcome(1.0, 1.0, 1), lambda seen: False, 5.0, 0.02)
    assert (rate_rps, outcome) == (0.0, None)


@pytest.mark.parametrize("rate_rps", [0.5, 4.0, 10.0, 35.0])
def test_probe_traces_have_the_rate_and_enough_requests(training, rate_rps):
    trace = probe_trace(training, rate_rps, requests=2000, seed=3)
    assert trace.rate_rps == pytest.approx(rate_rps, rel=0.08)
    assert len(trace) > 1800
    assert len(trace) < 3 * 2000 * 1.2
    assert trace.prompt_tokens.mean() == pytest.approx(training.prompt_tokens.mean(), rel=0.08)


def test_thinning_is_nested_between_rates(training):
    few, many = (probe_trace(training, rate_rps, requests=1000, seed=3) for rate_rps in (4.0, 6.0))
    assert np.isin(few.arrival_s, many.arrival_s).all()


def test_stretches_cover_the_whole_range(training):
    part = stretches(training, 0.25 * training.duration_s)
    assert part.duration_s == pytest.approx(0.25 * training.duration_s, rel=0.02)
    assert part.rate_rps == pytest.approx(training.rate_rps, rel=0.1)
    assert stretches(training, 2 * training.duration_s) is training


def test_delays_reorder():
    trace = Trace(np.array([0.0, 1.0, 2.0]), np.array([30, 10, 20]), np.array([3, 1, 2]))
    late = delayed(trace, np.array([5.0, 0.0, 0.5]))
    assert late.arrival_s.tolist() == [1.0, 2.5, 5.0]
    assert late.prompt_tokens.tolist() == [10, 20, 30]


def test_column_is_monotone_and_right(measurement, probes):
    rows = measure_column(measurement, Column("prefill", 2, 1, CLOCKS_MHZ))
    limit_s = 0.95 * 0.6
    assert [row.clock_mhz for row in rows] == list(CLOCKS_MHZ)
    for row in rows:
        # The trace's own mean rate scatters about the one asked for.
        assert row.rate_rps == pytest.approx(2 * row.clock_mhz / 200 * (1 - 0.05 / limit_s), rel=0.12)
        assert row.joules_per_request == 300.0
    assert (np.diff([row.rate_rps for row in rows]) >= 0).all()


def test_column_without_any_feasible_rate(measurement, monkeypatch):
    monkeypatch.setattr(classes, "serve_alone", lambda *_, **__: ProbeOutcome(math.inf, 1.0, 1))
    rows = measure_column(measurement, Column("decode", 2, 1, CLOCKS_MHZ))
    assert [row.rate_rps for row in rows] == [0.0] * 4


COLUMNS = (Column("prefill", 2, 1, CLOCKS_MHZ), Column("decode", 4, 1, CLOCKS_MHZ))


def test_tables_are_measured_once(measurement, probes, cache):
    first = class_table(measurement, COLUMNS, workers=1)
    count = len(probes)
    assert count > 0
    assert class_table(measurement, COLUMNS, workers=1) == first
    assert len(probes) == count
    class_table(measurement, COLUMNS[:1], workers=1)
    assert len(probes) == count, "columns are kept apart"


def test_another_slo_is_another_table(measurement, probes, cache):
    from dataclasses import replace

    first = class_table(measurement, COLUMNS[:1], workers=1)
    other = class_table(replace(measurement, slo=SloSettings(ttft_s=0.3, tpot_s=0.1)), COLUMNS[:1], workers=1)
    assert other[0].rate_rps < first[0].rate_rps


def _torn(text):
    return text[: len(text) // 2]


def _tampered(text):
    entry = json.loads(text)
    entry["rows"][0]["rate_rps"] *= 2
    return json.dumps(entry)


def _other_form(text):
    rows = [{"speed": 1.0}]
    return json.dumps({"about": {}, "rows": rows, "digest": table_cache._digest(rows)})


@pytest.mark.parametrize("damage", [_torn, _tampered, _other_form, lambda text: "", lambda text: "[]"])
def test_damaged_entries_are_measured_again(measurement, probes, cache, damage, caplog):
    first = class_table(measurement, COLUMNS, workers=1)
    count = len(probes)
    for path in cache.glob("*.json"):
        path.write_text(damage(path.read_text()))
    assert class_table(measurement, COLUMNS, workers=1) == first
    assert len(probes) == 2 * count
    assert "measured again" in caplog.text
    assert class_table(measurement, COLUMNS, workers=1) == first
    assert len(probes) == 2 * count


def test_concurrent_writers_leave_one_intact_entry(cache):
    rows = [{"value": float(i)} for i in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: table_cache.store(classes.CACHE_KIND, "key", rows, {}), range(40)))
    assert table_cache.load(classes.CACHE_KIND, "key") == rows
    assert [path.name for path in cache.iterdir()] == ["key.json"]


def test_a_cache_that_cannot_be_written_costs_a_warning(measurement, probes, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("BISCALE_GYM_CACHE", str(blocked))
    assert class_table(measurement, COLUMNS[:1], workers=1)
    assert "cannot be written" in caplog.text


def test_no_columns_is_an_error(measurement):
    with pytest.raises(PlanningError, match="memory"):
        class_table(measurement, ())


UNGUARDED = """
from biscale_gym.cluster.settings import ClusterSettings, SloSettings
from biscale_gym.planning.classes import Column, Measurement, class_table
from biscale_gym.profiles import load_profile
from biscale_gym.traces import generate, load_workload

measurement = Measurement(
    profile=load_profile("h100-sxm5", "llama-3.1-8b", "bf16"),
    cluster=ClusterSettings(),
    slo=SloSettings(ttft_s=0.6, tpot_s=0.1),
    training=generate(load_workload("lognormal-poisson"), 10.0, 30.0, 0),
    headroom=0.95,
    quantile=0.99,
    requests_per_probe=100,
    warmup_s=1.0,
    rate_tolerance=0.5,
    seed=1,
)
columns = [Column(phase, 1, 1, (1980,)) for phase in ("prefill", "decode")]
print(len(class_table(measurement, columns, workers=2)))
"""


def test_a_script_without_a_main_guard_is_served_in_its_own_process(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    # The compiled code is the one at hand: only the class tables start empty.
    environment = {
        **os.environ,
        "BISCALE_GYM_CACHE": str(tmp_path / "cache"),
        "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(cache_root() / "numba")),
    }
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
    assert "measured in this process" in done.stderr
