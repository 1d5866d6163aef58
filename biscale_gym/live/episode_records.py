"""What is kept of a live episode: a run record as ``biscale-gym compare`` makes one, beside the workers' iterations.

A live run never comes again, so its id is not an address of what it would compute, as in a comparison, but of when and
where it ran.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from biscale_gym.config import config_hash
from biscale_gym.control.controllers import parsed_variant
from biscale_gym.control.rollout import RunJob
from biscale_gym.envs.cluster import ClusterSetting
from biscale_gym.envs.episodes import Episode
from biscale_gym.evaluation.records import Record, RecordStore, arrays_digest
from biscale_gym.fingerprint import fingerprint
from biscale_gym.live.replay import Outcome
from biscale_gym.metrics import tpot_s, ttft_s

AGENT = "agent"
"""In place of a controller's name: clocks came through ``step``."""


class EpisodeRecord:
    """The record of one episode in the making.

    Args:
        out: folder of the records.

    Attributes:
        folder: where the workers' iterations go.
    """

    def __init__(self, out: Path) -> None:
        began = f"{time.time_ns()} {os.getpid()} {os.uname().nodename}"
        self._id = hashlib.sha256(began.encode()).hexdigest()[:16]
        self._store = RecordStore(out)
        self._began_s = time.time()
        self.folder = out / "iterations" / self._id

    def write(
        self,
        setting: ClusterSetting,
        episode: Episode,
        figures: Mapping[str, float],
        outcome: Outcome,
        engine: Mapping[str, str],
        action_digest: str,
        timeline: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        """Append the record.

        Args:
            setting: of the environment.
            episode: that was played.
            figures: its metrics.
            outcome: of the replay.
            engine: versions of what served it.
            action_digest: of the actions.
            timeline: as ``control.rollout.Timeline`` has it.

        Raises:
            RecordsError: the disk is full or the folder cannot be written.
        """
        settings, scenario = setting.settings, setting.scenario
        controller, own = (AGENT, {}) if settings.governor is None else parsed_variant(settings.governor)
        job = RunJob(
            scenario=setting.scenario_name,
            controller=controller,
            controller_settings=own,
            seed=episode.trace_seed,
            split=episode.split,
            trace=settings.trace,
            rate_rps=settings.rate_rps,
        )
        arrays = {
            "ttft_s": _known(ttft_s(outcome.requests)),
            "tpot_s": _known(tpot_s(outcome.requests)),
            "itl_s": outcome.itl_s,
            "lag_s": _known(outcome.lag_s),
            **{f"timeline_{name}": values for name, values in timeline.items()},
        }
        row: dict[str, float | int | str] = {
            "scenario": job.scenario_name,
            "controller": job.controller_name,
            "seed": job.seed,
            "split": job.played_split,
            **figures,
            "slo_ttft_s": scenario.slo.ttft_s,
            "slo_tpot_s": scenario.slo.tpot_s,
        }
        provenance = {
            "env_id": setting.env_id,
            "settings": settings.model_dump(mode="json"),
            "scenario": scenario.model_dump(mode="json"),
            "config_hash": config_hash(scenario),
            "profile_hash": setting.profile.hash,
            "episode": episode.info,
            "trace_name": episode.requests.name,
            "trace_hash": episode.requests.hash,
            "placements": [[0.0, setting.placement.describe()]],
            "energy_source": outcome.source,
            "clock_mode": outcome.mode,
            "engine": dict(engine),
            "began_unix_s": self._began_s,
            "iterations": str(self.folder),
            "workers_replaced": list(outcome.replaced),
        }
        record = Record(
            id=self._id,
            job=job.model_dump(mode="json"),
            row=row,
            action_digest=action_digest,
            arrays_digest=arrays_digest(arrays),
            provenance=provenance,
            fingerprint=fingerprint(),
        )
        self._store.append(record, arrays)


def _known(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return values[np.isfinite(values)]
