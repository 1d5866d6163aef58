"""What a vLLM server is started with, so that its clocks are governed inside it.

    BISCALE_GYM_GOVERNOR=governor.json vllm serve ... --scheduler-cls biscale_gym.live.plugin.GovernedScheduler

``GovernedScheduler`` is vLLM's scheduler with a governor (``governed``) around every batch. ``CpuWorker`` is vLLM's
worker for CPUs, made fit for this package beside it: ``--worker-cls biscale_gym.live.plugin.CpuWorker``.

Both are made when they are asked for: importing this module imports no vLLM.
"""

from __future__ import annotations

from typing import Any

from biscale_gym.live.governed import ServerGovernor, read_setting
from biscale_gym.live.vllm_adapter.cpu import cpu_worker
from biscale_gym.live.vllm_adapter.scheduler import governed_scheduler


def _scheduler() -> type:
    class GovernedScheduler(governed_scheduler()):  # type: ignore[misc]
        """vLLM's scheduler with a governor."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.governor = ServerGovernor(read_setting(), self)
            self.before, self.after, self.booked = self.governor.before, self.governor.after, self.governor.booked

        def shutdown(self) -> None:
            self.governor.close()
            super().shutdown()

    return GovernedScheduler


_MADE = {"GovernedScheduler": _scheduler, "CpuWorker": cpu_worker}


def __getattr__(name: str) -> type:
    if name not in _MADE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _MADE[name]()
    return made
