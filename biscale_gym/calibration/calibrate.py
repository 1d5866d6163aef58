"""``biscale-gym calibrate``: fit a profile's CSV file, judge the fits on points that they did not see, write presets.

A folder comes out: ``hardware.yaml`` with its data (``tp2.npz``), ``model.yaml`` where the profiled model is no preset,
``transfer.yaml`` where hand-overs were measured, ``cluster.yaml`` that names them all for a scenario's ``cluster``, and
``calibration.json`` with errors and provenance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from biscale_gym.calibration import closed_form
from biscale_gym.calibration.emulation import (
    HostTime,
    emulate,
    host_time,
    service_factors,
    slept_ms,
    with_modelled_power,
)
from biscale_gym.calibration.handovers import Between, read_handovers
from biscale_gym.config import Settings, load_preset, nearest, validate
from biscale_gym.profiles.iterations import Iterations, Profiled, read_profiled
from biscale_gym.profiles.loading import load_profile
from biscale_gym.profiles.parametric import ParametricProfile
from biscale_gym.profiles.profile import Profile, ProfileError, check_precision
from biscale_gym.profiles.settings import HardwareSettings, MemorySettings, ModelSettings, Precision, TableSettings
from biscale_gym.profiles.tabulated import ProfileTable, tabulate

Floats = NDArray[np.float64]
Form = Literal["best", "parametric", "trees"]
FORMS: tuple[Form, ...] = ("best", "parametric", "trees")
KV_KNOTS = 33


@dataclass(frozen=True)
class FormErrors:
    """Cross-validated errors of one form, TP degree and phase, in percent.

    Attributes:
        form: ``parametric`` or ``trees``.
        tp, phase: whose.
        points: operating points, each predicted by a fit that did not see it.
        latency_percent, latency_p90_percent: mean and 90th percentile of the absolute error.
        power_percent, power_p90_percent: the same of power; None where power is not measured.
    """

    form: str
    tp: int
    phase: str
    points: int
    latency_percent: float
    latency_p90_percent: float
    power_percent: float | None
    power_p90_percent: float | None


@dataclass(frozen=True)
class Calibration:
    """What came of it.

    Attributes:
        form: the one that the preset holds.
        errors: of every form that was fitted.
        cluster: settings of ``ClusterSettings`` that use the preset, paths included.
        power: ``measured`` or ``modelled``.
    """

    form: str
    errors: tuple[FormErrors, ...]
    cluster: dict[str, Any]
    power: str

    @property
    def overrides(self) -> str:
        """The cluster's settings as ``--set`` options."""
        return " ".join(f"--set cluster.{name}={value}" for name, value in self.cluster.items())


@dataclass(frozen=True)
class _Subject:
    """What was profiled.

    Attributes:
        base: the closed form that the fit starts from, of the profiled model.
        model: preset's name, or None: ``base.model`` is written beside the preset.
        emulated: the card whose clocks and power a CPU worker takes; None: the device has its own.
        clocks_mhz: of the emulated device.
        kv_capacity_tokens: of a worker; None: the hardware's memory says.
    """

    base: ParametricProfile
    model: str | None
    emulated: Profile | None
    clocks_mhz: tuple[int, ...]
    kv_capacity_tokens: int | None


def medians(profiled: Profiled) -> Profiled:
    """One row per operating point, TP degree and clock: the medians of its repeats."""
    data = profiled.iterations
    keys = [
        f"{tp:g} {clock:g} {point}"
        for tp, clock, point in zip(data.tp.tolist(), data.clock_mhz.tolist(), profiled.points.tolist(), strict=True)
    ]
    _, first, group = np.unique(np.array(keys), return_index=True, return_inverse=True)

    def of(values: Floats) -> Floats:
        return np.array([np.median(values[group == number]) for number in range(first.size)])

    columns = {name: of(getattr(data, name)) for name in data.__dataclass_fields__}
    return Profiled(Iterations(**columns), of(profiled.host_ms), profiled.points[first], profiled.provenance)


def _subject(
    path: Path, profiled: Profiled, hardware: str | None, model: str | None, precision: str | None
) -> _Subject:
    """From provenance, or what the caller says in its place."""
    identity = profiled.provenance.get("identity", {})
    emulates = identity.get("emulates")
    own_hardware = hardware or (emulates or identity).get("hardware", "h100-sxm5")
    told = model or identity.get("model")
    if told is None:
        raise ProfileError(f"{path} does not say which model was profiled; give --model")
    base_hardware = load_preset(HardwareSettings, "hardware", own_hardware)
    if base_hardware.parametric is None:
        raise ProfileError(f"hardware {own_hardware!r} has no closed form to start from")
    preset = told if isinstance(told, str) else None
    if isinstance(told, str):
        settings = load_preset(ModelSettings, "models", told)
    else:
        settings = validate(ModelSettings, dict(told), f"{path}: provenance: model")
    name = preset or "model"
    known: Precision = check_precision(settings, name, precision or identity.get("precision", settings.precisions[0]))
    base = ParametricProfile(base_hardware, settings, name, known)
    if emulates is None:
        return _Subject(base, preset, None, (), None)
    emulated = load_profile(own_hardware, emulates["model"], emulates["precision"], emulates.get("decode_precision"))
    # No board limit and nothing to exchange: the worker is one process.
    form = closed_form.form_of(base)
    unlimited = form.model_copy(update={"power": form.power.model_copy(update={"limit_w": 1e9})})
    base = closed_form.without_allreduce(closed_form.with_form(base, unlimited))
    return _Subject(base, preset, emulated, tuple(emulates["clocks_mhz"]), identity.get("kv_capacity_tokens"))


def _prepared(path: Path, profiled: Profiled, subject: _Subject) -> Profiled:
    """Medians of the rows to fit, with power."""
    rows = medians(profiled)
    if subject.emulated is None:
        if not rows.has_power:
            raise ProfileError(f"{path}: column 'power_w_per_gpu' is missing, and no card is emulated")
        return replace(rows, iterations=_with_allreduce(rows, subject.base))
    top = _busy(rows, subject.clocks_mhz[-1])
    if not len(top):
        raise ProfileError(
            f"{path}: column 'clock_mhz': no row at the device's top clock, {subject.clocks_mhz[-1]} MHz"
        )
    filled = with_modelled_power(top.iterations, subject.emulated)
    idle = len(filled) - len(top)
    return Profiled(
        filled,
        np.concatenate([top.host_ms, np.zeros(idle)]),
        np.concatenate([top.points, np.full(idle, "idle")]),
        rows.provenance,
    )


def _busy(rows: Profiled, clock_mhz: int | None = None) -> Profiled:
    """Rows that compute something, at one clock or any."""
    data = rows.iterations
    here = (data.batch > 0) | (data.prefill_tokens > 0)
    return rows.rows(here if clock_mhz is None else here & (data.clock_mhz == clock_mhz))


def _host_time(profiled: Profiled, subject: _Subject) -> HostTime:
    """What of the iterations lies between the batches; where clocks are emulated, what they do not stretch."""
    rows = _busy(medians(profiled))
    if subject.emulated is None:
        return host_time(rows.iterations, rows.host_ms)
    at_top = rows.iterations.clock_mhz == subject.clocks_mhz[-1]
    top, lower = rows.rows(at_top), rows.rows(~at_top)
    decode, prefill = slept_ms(lower, top, subject.emulated, subject.clocks_mhz[-1])
    return replace(host_time(top.iterations, top.host_ms), decode_slept_ms=decode, prefill_slept_ms=prefill)


def _with_allreduce(rows: Profiled, base: ParametricProfile) -> Iterations:
    """The rows, with the modelled time of the all-reduce where one card alone was measured."""
    data = rows.iterations
    if not str(rows.provenance.get("allreduce", "")).startswith("absent"):
        return data
    added_ms = (closed_form.predicted(base, data) - closed_form.predicted(closed_form.without_allreduce(base), data))[
        :, 0
    ]
    busy = (data.batch > 0) | (data.prefill_tokens > 0)
    return replace(data, latency_ms=np.where(busy, data.latency_ms + added_ms, data.latency_ms))


def _knots(values: Floats, least: float | None = None) -> Floats:
    """Ascending knots: what was observed, and ``least``; two at least."""
    knots = np.unique(np.append(values, [] if least is None else [least]))
    return knots if knots.size > 1 else np.array([knots[0], 2.0 * knots[0]])


def _parametric(rows: Profiled, subject: _Subject, folds: int, seed: int) -> tuple[ParametricProfile, list[FormErrors]]:
    from biscale_gym.profiles.fitted import Predictor, cross_validate

    measured = subject.emulated is None
    profile = closed_form.fit(rows.iterations, subject.base, measured)

    def fit(seen: Iterations) -> Predictor:
        found = closed_form.fit(seen, subject.base, measured)
        return lambda asked: closed_form.predicted(found, asked)

    errors: list[FormErrors] = []
    for tp in sorted({int(value) for value in rows.iterations.tp}):
        own = rows.rows(rows.iterations.tp == tp)
        found = cross_validate(own.iterations, own.points, tp, folds, seed, fit)
        errors += [_errors("parametric", error, measured) for error in found]
    return profile, errors


def _errors(form: str, error: Any, measured: bool) -> FormErrors:
    power = (error.power_percent, error.power_p90_percent) if measured else (None, None)
    return FormErrors(form, error.tp, error.phase, error.rows, error.latency_percent, error.latency_p90_percent, *power)


def _trees(
    rows: Profiled, subject: _Subject, folds: int, seed: int
) -> tuple[dict[int, ProfileTable], list[FormErrors]]:
    from biscale_gym.profiles.fitted import FitSettings, fit_tables

    # A sweep has tens of points where traffic has thousands of rows.
    settings = FitSettings(trees=200, rows_per_leaf=3 if len(rows) < 600 else 10, folds=folds, seed=seed)
    tables, errors = fit_tables(rows.iterations, settings, rows.points)
    return tables, [_errors("trees", error, subject.emulated is None) for error in errors]


def _tables(profile: ParametricProfile, rows: Profiled) -> dict[int, ProfileTable]:
    """A closed form on a grid through what was observed, at the observed clocks."""
    tables = {}
    for tp in sorted({int(value) for value in rows.iterations.tp}):
        own = rows.iterations.rows(rows.iterations.tp == tp)
        decode, prefill = own.rows(own.batch > 0), own.rows(own.prefill_tokens > 0)
        tables[tp] = tabulate(
            profile,
            tp,
            [int(clock) for clock in np.unique(own.clock_mhz)],
            [int(batch) for batch in _knots(decode.batch, 1.0)],
            np.linspace(0.0, float(decode.kv_tokens.max()), KV_KNOTS).tolist(),
            _knots(prefill.prefill_tokens).tolist(),
            _knots(prefill.sum_len_sq / prefill.prefill_tokens).tolist(),
        )
    return tables


def _best(errors: Sequence[FormErrors]) -> str:
    """The form with the least mean latency error over phases and TP degrees."""
    forms = sorted({error.form for error in errors})
    return min(forms, key=lambda form: np.mean([error.latency_percent for error in errors if error.form == form]))


def calibrate(
    path: Path,
    out: Path,
    form: str = "best",
    hardware: str | None = None,
    model: str | None = None,
    precision: str | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Calibration:
    """Fit a profile and write the presets.

    Args:
        path: CSV file; hand-overs and iterations in service are read from the files beside it, where there are any.
        out: folder.
        form: ``parametric``, ``trees`` (needs scikit-learn), or ``best``: whichever errs less in latency.
        hardware: preset whose closed form the fit starts from, in place of what the file says.
        model: preset of the profiled model, in place of what the file says.
        precision: of its weights, in place of what the file says.
        folds: of the cross-validation; each holds out whole operating points.
        seed: of the folds.

    Raises:
        ConfigError, ProfileError, OSError: what is wrong with the input; file, row and column are named.
    """
    if form not in FORMS:
        raise ProfileError(f"no form {form!r}; {nearest(form, list(FORMS))}")
    if form == "trees" and find_spec("sklearn") is None:
        raise ProfileError("the form 'trees' needs scikit-learn (extra: train)")
    profiled = read_profiled(path)
    handovers, service = path.with_suffix(".handovers.csv"), path.with_suffix(".service.csv")
    between = read_handovers(handovers) if handovers.exists() else None
    served = read_profiled(service).iterations if service.exists() else None
    subject = _subject(path, profiled, hardware, model, precision)
    rows = _prepared(path, profiled, subject)
    errors: list[FormErrors] = []
    parametric: ParametricProfile | None = None
    tables: dict[int, ProfileTable] | None = None
    if form in ("best", "parametric"):
        parametric, found = _parametric(rows, subject, folds, seed)
        errors += found
    if form == "trees" or (form == "best" and find_spec("sklearn") is not None):
        tables, found = _trees(rows, subject, folds, seed)
        errors += found
    chosen = _best(errors)
    out.mkdir(parents=True, exist_ok=True)
    host = _host_time(profiled, subject)
    if chosen == "parametric":
        assert parametric is not None
        settings = None
        if subject.emulated is None:
            device = profiled.provenance.get("identity", {}).get("device")
            about = f"{device}: the closed form of {subject.base.hardware.description}, fitted to a profile"
            settings = parametric.hardware.model_copy(update={"description": about} if device else {})
        tables = None if settings is not None else _tables(parametric, rows)
    else:
        settings = None
    if settings is None:
        assert tables is not None
        if served is not None and subject.emulated is not None:
            host = _in_service(served, tables, subject, host)
        settings = _write_tables(out, tables, subject, host, profiled)
    cluster = _write(out, settings, subject, between, host, rows, path)
    result = Calibration(chosen, tuple(errors), cluster, "measured" if subject.emulated is None else "modelled")
    described = {
        "profile": str(path),
        "form": chosen,
        "latency": "measured",
        "power": result.power,
        "errors": [asdict(error) for error in errors],
        "between": None if between is None else asdict(between),
        "host_time": asdict(host),
        "cluster": cluster,
        "provenance": profiled.provenance,
    }
    (out / "calibration.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return result


def _in_service(served: Iterations, tables: dict[int, ProfileTable], subject: _Subject, host: HostTime) -> HostTime:
    """With the factors of a served trace, at the top clock; of the lowest TP degree, as all run on like cores."""
    tp = min(tables)
    own = served.rows((served.tp == tp) & (served.clock_mhz == subject.clocks_mhz[-1]))
    decode, prefill = service_factors(own, tables[tp], host, tp)
    return replace(host, decode_factor=decode, prefill_factor=prefill)


def _write_tables(
    out: Path, tables: dict[int, ProfileTable], subject: _Subject, host: HostTime, profiled: Profiled
) -> HardwareSettings:
    """Save the tables; the hardware settings that name them."""
    files: dict[int, Path] = {}
    for tp, table in tables.items():
        if subject.emulated is not None:
            table = emulate(table, host, subject.emulated, tp, subject.clocks_mhz)
        files[tp] = Path(f"tp{tp}.npz")
        table.save(out / files[tp])
    base = subject.base.hardware
    identity = profiled.provenance.get("identity", {})
    device = str(identity.get("device", base.description))
    table_settings = TableSettings(files={subject.model or "model": {subject.base.precision: files}})
    memory = base.memory
    if subject.kv_capacity_tokens is not None:
        # So much memory that the KV capacity is the worker's.
        weights = subject.base.model.weight_bytes(subject.base.precision)
        kv_bytes = (subject.kv_capacity_tokens + 0.5) * subject.base.model.kv_bytes_per_token
        memory = MemorySettings(gpu_gb=(weights + kv_bytes) / min(files) / 1e9, utilisation=1.0, reserve_gb=0.0)
    return HardwareSettings(
        description=device
        if subject.emulated is None
        else f"{device}, with the clocks and power of {base.description}",
        memory=memory,
        clocks=base.clocks,
        tensor_parallel_degrees=tuple(sorted(files)),
        table=table_settings,
    )


def _dump(path: Path, settings: Settings, comment: str) -> None:
    # Forms that a hardware has not are left out; an unlimited bandwidth is said.
    values = settings.model_dump(mode="json", exclude_none=isinstance(settings, HardwareSettings))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    path.write_text(f"# {comment}\n{text}", encoding="utf-8")


def _write(
    out: Path,
    settings: HardwareSettings,
    subject: _Subject,
    between: Between | None,
    host: HostTime,
    rows: Profiled,
    path: Path,
) -> dict[str, Any]:
    """Write the presets; the cluster settings that name them."""
    power = "measured" if subject.emulated is None else "modelled"
    _dump(out / "hardware.yaml", settings, f"biscale-gym calibrate {path}: latency measured, power {power}.")
    cluster: dict[str, Any] = {"hardware": str(out / "hardware.yaml"), "precision": subject.base.precision}
    if subject.model is not None:
        cluster["model"] = subject.model
    else:
        _dump(out / "model.yaml", subject.base.model, f"The model of {path}.")
        cluster["model"] = str(out / "model.yaml")
    if between is not None:
        pairs = int(rows.iterations.tp.min())
        transfer = between.transfer(subject.base.model.kv_bytes_per_token, pairs, sum(host.decode_ms))
        _dump(out / "transfer.yaml", transfer, f"{between.requests} requests one at a time, beside {path}; medians.")
        cluster["transfer"] = str(out / "transfer.yaml")
        cluster["serving_overhead_ms"] = round(max(0.0, between.overhead_ms - host.prefill_ms[0]), 3)
    (out / "cluster.yaml").write_text(
        "# For the section `cluster` of a scenario; paths as seen from where calibrate was run.\n"
        + yaml.safe_dump(cluster, sort_keys=False),
        encoding="utf-8",
    )
    return cluster
