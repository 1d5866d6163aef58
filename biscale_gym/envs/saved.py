"""Lanes in the middle of their episodes as plain arrays and values, for another process to go on with.

``snapshots.py`` goes back within a process; here nothing refers to an object. An episode is drawn again from its own
``info``, its simulator built anew, and then every array of the engine is overwritten. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from biscale_gym.cluster.ledger import InstanceLedger
from biscale_gym.cluster.placement import InstanceSpec, Lane, Placement
from biscale_gym.cluster.simulator import Simulator, Snapshot
from biscale_gym.cluster.state import State
from biscale_gym.envs.errors import EnvironmentUsageError

_DRAWN = "arrivals"
"""Part of a state that the episode's draw brings back."""
_ALIKE = ("models", "predicted", "params_prefill", "params_decode")
"""Parts of a state that many lanes have alike; each is kept once."""


@dataclass(frozen=True)
class Saved:
    """What is kept of lanes.

    Attributes:
        arrays: by name; no objects in them.
        values: of what JSON holds exactly (Python writes floats with all their digits).
    """

    arrays: dict[str, NDArray[Any]]
    values: dict[str, Any]

    def under(self, name: str) -> Saved:
        """The part that ``joined`` put together under a name."""
        start = f"{name}/"
        own = {key.removeprefix(start): array for key, array in self.arrays.items() if key.startswith(start)}
        return Saved(own, self.values[name])


def joined(parts: dict[str, Saved]) -> Saved:
    """Several as one; ``under`` takes them apart."""
    arrays = {f"{name}/{key}": array for name, part in parts.items() for key, array in part.arrays.items()}
    return Saved(arrays, {name: part.values for name, part in parts.items()})


def saved_generator(generator: np.random.Generator) -> dict[str, Any]:
    """State of a random generator of Gymnasium's kind (PCG64)."""
    return dict(generator.bit_generator.state)


def restored_generator(state: dict[str, Any]) -> np.random.Generator:
    """The generator that goes on from ``state``."""
    bits = np.random.PCG64()
    bits.state = state  # type: ignore[assignment]
    return np.random.Generator(bits)


def saved_placement(placement: Placement | None) -> list[dict[str, Any]] | None:
    """A placement's instances."""
    return None if placement is None else [asdict(spec) for spec in placement.instances]


def restored_placement(values: list[dict[str, Any]] | None) -> Placement | None:
    """The placement of ``saved_placement``."""
    return None if values is None else Placement(tuple(InstanceSpec(**spec) for spec in values))


def saved_ledger(ledger: InstanceLedger) -> dict[str, Any]:
    """A reading of the instances' ledger."""
    own = {field.name: getattr(ledger, field.name) for field in fields(ledger)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in own.items()}


def restored_ledger(values: dict[str, Any]) -> InstanceLedger:
    """The reading of ``saved_ledger``."""
    kinds = {"is_prefill": np.bool_, "energy_j": np.float64, "time_s": np.float64}
    own = {
        name: np.array(value, dtype=kinds.get(name, np.int64)) if isinstance(value, list) else value
        for name, value in values.items()
    }
    for name in ("energy_j", "time_s"):
        own[name] = own[name].reshape(len(own["tp"]), -1)
    return InstanceLedger(**own)


def saved_simulators(simulators: Sequence[Simulator]) -> Saved:
    """Everything in simulators that running them changes; policies are not part of it."""
    arrays: dict[str, NDArray[Any]] = {}
    shapes: dict[str, list[list[int]]] = {}
    which: dict[str, list[int]] = {}
    for name in State._fields:
        if name == _DRAWN:
            continue
        kept: dict[Any, int] = {}
        distinct: list[NDArray[Any]] = []
        which[name] = []
        for number, simulator in enumerate(simulators):
            array = getattr(simulator.state, name)
            if name == "req":  # beyond them there is nothing yet
                array = array[: int(simulator.state.glob[0]["next_arrival"])]
            key = array.tobytes() if name in _ALIKE else number
            if key not in kept:
                kept[key] = len(distinct)
                distinct.append(array)
            which[name].append(kept[key])
        shapes[name] = [list(array.shape) for array in distinct]
        arrays[name] = np.concatenate([array.ravel() for array in distinct])
    parts = []
    for simulator in simulators:
        snapshot = simulator.snapshot()
        parts.append(
            {
                "lanes": [[number, asdict(lane)] for number, lane in snapshot.lanes.items()],
                "model_spans": [[*key, *span] for key, span in snapshot.model_spans.items()],
                "predicted_spans": [[*key, *span] for key, span in snapshot.predicted_spans.items()],
            }
        )
    return Saved(arrays, {"shapes": shapes, "which": which, "simulators": parts})


def restore_simulators(simulators: Sequence[Simulator], saved: Saved) -> None:
    """Set simulators of the same cluster, demand and policies to what ``saved_simulators`` kept, in its order."""
    pieces: dict[str, list[NDArray[Any]]] = {}
    for name, shapes in saved.values["shapes"].items():
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        whole = np.split(saved.arrays[name], ends[:-1])
        pieces[name] = [part.reshape(shape) for part, shape in zip(whole, shapes, strict=True)]
    for number, simulator in enumerate(simulators):
        told = saved.values["simulators"][number]
        parts = {name: pieces[name][which[number]] for name, which in saved.values["which"].items()}
        req = simulator.state.req.copy()
        req[: len(parts["req"])] = parts["req"]
        state = State(**{**parts, "req": req, _DRAWN: simulator.state.arrivals})
        lanes = {
            int(lane_number): Lane(**{**lane, "spec": InstanceSpec(**lane["spec"])})
            for lane_number, lane in told["lanes"]
        }
        policies = simulator.snapshot().policies
        spans, predicted_spans = _spans(told["model_spans"]), _spans(told["predicted_spans"])
        simulator.restore(Snapshot(state, lanes, spans, predicted_spans, policies))


def _spans(rows: list[list[Any]]) -> dict[tuple[str, int], tuple[int, int]]:
    return {(precision, tp): (start, stop) for precision, tp, start, stop in rows}


def saved_lanes(envs: VectorEnv[Any, Any, Any]) -> Saved:
    """All lanes of a vector environment of this project, wrapped or not.

    Raises:
        EnvironmentUsageError: a lane has never been reset, or another kind of environment.
    """
    if isinstance(envs, VectorWrapper):
        own = {name: getattr(envs, name) for name in getattr(envs, "keeps", ())}
        return joined({"own": Saved(own, {}), "below": saved_lanes(envs.env)})
    if isinstance(envs, SyncVectorEnv):
        return joined({str(number): _single(env).saved() for number, env in enumerate(envs.envs)})
    return _saving(envs).saved()  # type: ignore[no-any-return]


def restore_lanes(envs: VectorEnv[Any, Any, Any], saved: Saved) -> None:
    """Set all lanes to what ``saved_lanes`` kept of a vector environment that was made with the same arguments.

    Raises:
        EnvironmentUsageError: another number of lanes, or another kind of environment.
    """
    if isinstance(envs, VectorWrapper):
        for name in getattr(envs, "keeps", ()):
            setattr(envs, name, saved.under("own").arrays[name].copy())
        restore_lanes(envs.env, saved.under("below"))
    elif isinstance(envs, SyncVectorEnv):
        if len(envs.envs) != len(saved.values):
            raise EnvironmentUsageError(f"{len(saved.values)} lanes were saved, this vector has {len(envs.envs)}")
        for number, env in enumerate(envs.envs):
            _single(env).restore_saved(saved.under(str(number)))
    else:
        _saving(envs).restore_saved(saved)


def _single(env: Any) -> Any:
    if env.unwrapped is not env:
        raise EnvironmentUsageError(f"lanes that are wrapped one by one cannot be saved: {env}")
    return _saving(env)


def _saving(env: Any) -> Any:
    if not hasattr(env, "saved"):
        raise EnvironmentUsageError(f"lanes of {env} cannot be saved")
    return env
