"""A record run again and compared: exactly where processor and compilers are the recorded ones, else to 1e-9."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from biscale_gym.config import validate
from biscale_gym.control.rollout import RunJob
from biscale_gym.evaluation.matrix import Runner, record_of
from biscale_gym.evaluation.records import Record
from biscale_gym.fingerprint import arithmetic_differences, fingerprint, same_arithmetic

RELATIVE_TOLERANCE = 1e-9


@dataclass
class Validation:
    """The verdict on one record."""

    record_id: str
    exact: bool
    """Whether equality to the last bit was asked for."""
    differences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the run gave what the record says."""
        return not self.differences


def validate_record(record: Record, runner: Runner) -> Validation:
    """Runs the record's job again and compares the metrics, the actions, the configuration, the hardware and the trace.

    Raises:
        ValueError: the job cannot be run here, for instance because its trace is missing.
    """
    here = fingerprint()
    verdict = Validation(record.id, exact=same_arithmetic(here, record.fingerprint))
    if not verdict.exact:
        changes = "; ".join(arithmetic_differences(here, record.fingerprint))
        verdict.warnings.append(
            f"another processor or compiler ({changes}): compared to {RELATIVE_TOLERANCE:g} relative"
        )
    if here["git_revision"] != record.fingerprint.get("git_revision"):
        verdict.warnings.append(
            f"recorded at revision {record.fingerprint.get('git_revision')}, this is {here['git_revision']}"
        )

    job = validate(RunJob, record.job, f"record {record.id}")
    again, _ = record_of(record.id, job, runner(job))
    for name in sorted(record.row.keys() | again.row.keys()):
        recorded, now = record.row.get(name), again.row.get(name)
        if not _agree(recorded, now, verdict.exact):
            verdict.differences.append(f"{name}: recorded {recorded}, now {now}")
    for name in ("config_hash", "profile_hash", "trace_hash"):
        recorded, now = record.provenance.get(name), again.provenance.get(name)
        if recorded != now:
            verdict.differences.append(f"{name}: recorded {recorded}, now {now}")
    if record.action_digest != again.action_digest:
        verdict.differences.append("actions: the controller chose otherwise")
    if verdict.exact and record.arrays_digest != again.arrays_digest:
        verdict.differences.append("latencies or timeline: not the recorded ones")
    return verdict


def _agree(recorded: float | int | str | None, now: float | int | str | None, exact: bool) -> bool:
    if isinstance(recorded, float) and isinstance(now, (float, int)):
        if math.isnan(recorded) and math.isnan(now):
            return True
        if not exact:
            return math.isclose(recorded, now, rel_tol=RELATIVE_TOLERANCE, abs_tol=0.0)
    return recorded == now
