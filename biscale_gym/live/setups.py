"""What each instance of a scenario's placement is started as, a worker's process or a server's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biscale_gym.cluster.placement import Phase
from biscale_gym.control.scenario import ScenarioSettings
from biscale_gym.live.errors import LiveError
from biscale_gym.live.settings import EmulatedDeviceSettings, LiveSettings, NvmlDeviceSettings
from biscale_gym.live.vllm_adapter.install import require_vllm
from biscale_gym.live.vllm_adapter.model import write_model
from biscale_gym.profiles.settings import Precision


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker or server is, from its start to its end.

    Attributes:
        name: for messages and files: ``prefill-0``, ``decode-0``, …
        phase, tp: of the instance it stands for.
        device: whose clocks and joules, with this instance's cards alone.
        model: folder of the model that it runs.
        precision: of the weights, on GPUs.
        settings: of workers.
        token_budget, max_sequences: of a batch.
        weight: share of requests relative to the phase's other instances.
        port: of its side channel; must be free.
        block: shared memory for a worker's status.
    """

    name: str
    phase: Phase
    tp: int
    device: EmulatedDeviceSettings | NvmlDeviceSettings
    model: Path
    precision: Precision
    settings: LiveSettings
    token_budget: int
    max_sequences: int
    weight: float = 1.0
    port: int = 0
    block: Any = None


def setups_of(scenario: ScenarioSettings, settings: LiveSettings, folder: Path) -> list[Setup]:
    """One per instance, in the placement's order.

    Args:
        scenario: its placement and batching rules count.
        settings: of workers.
        folder: for the model, if its weights are made up.

    Raises:
        ConfigError: the placement takes more GPUs than there are.
        LiveError: vLLM is not installed, or a phase has no instance.
    """
    require_vllm(settings.engine)
    cluster, batching = scenario.cluster, scenario.cluster.batching
    devices = iter(settings.deal(scenario.placement))
    model = settings.weights or write_model(folder / "model", settings.dimensions(cluster), settings.max_model_len)
    made: list[Setup] = []
    counts: dict[Phase, int] = {"prefill": 0, "decode": 0}
    for group in scenario.placement:
        precision = (cluster.decode_precision if group.phase == "decode" else None) or cluster.precision
        for _ in range(group.count):
            made.append(
                Setup(
                    f"{group.phase}-{counts[group.phase]}",
                    group.phase,
                    group.tp,
                    next(devices),
                    model,
                    precision,
                    settings,
                    batching.prefill_token_budget,
                    batching.max_decode_sequences,
                    group.weight,
                )
            )
            counts[group.phase] += 1
    if not all(counts.values()):
        raise LiveError("the scenario's placement needs a prefill and a decode instance to be served live")
    return made
