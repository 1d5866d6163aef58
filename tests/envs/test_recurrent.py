"""Clock policies that begin with an LSTM: compiled they answer sequences as torch does, from each instance's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import biscale_gym  # noqa: F401 - registers the environments
from biscale_gym.cluster.placement import InstanceSpec, Placement
from biscale_gym.cluster.policy import MEMORY_SIZE
from biscale_gym.control.controllers import PlanContext
from biscale_gym.control.simulate import StatedPlacement
from biscale_gym.envs import layout
from biscale_gym.envs.encoding import grid_of
from biscale_gym.envs.errors import EnvironmentUsageError
from biscale_gym.envs.mlp import ClockMLP, load_model, position_of
from biscale_gym.envs.network import Lstm, ModelError
from biscale_gym.envs.policies import ControllerPolicy

CLOCKS_MHZ = (930, 1410, 1830)
UNITS = 12


class Torch(torch.nn.Module):
    """LSTM, hidden layer, output."""

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = torch.nn.LSTM(size, UNITS)
        self.hidden = torch.nn.Linear(UNITS, 8)
        self.last = torch.nn.Linear(8, len(CLOCKS_MHZ))
        with torch.no_grad():
            for weights in self.parameters():
                weights *= 3.0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[steps, sequences, size] to [steps, sequences, clocks]."""
        found: torch.Tensor = self.last(torch.tanh(self.hidden(self.lstm(rows)[0])))
        return found


def array(parameter: Any) -> Any:
    return np.ascontiguousarray(parameter.detach().numpy().T)


def model_of(net: Torch, phase: Any = "prefill", **more: Any) -> ClockMLP:
    lstm = net.lstm
    return ClockMLP(
        phase=phase,
        clocks_mhz=CLOCKS_MHZ,
        slo_s=(0.01, 1.0),
        weights=(array(net.hidden.weight), array(net.last.weight)),
        biases=(array(net.hidden.bias), array(net.last.bias)),
        activation="tanh",
        lstm=Lstm(array(lstm.weight_ih_l0), array(lstm.weight_hh_l0), array(lstm.bias_ih_l0 + lstm.bias_hh_l0)),
        **more,
    )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_it_answers_random_sequences_as_torch_does(phase: Any) -> None:
    low, high = layout.bounds(phase, len(CLOCKS_MHZ))
    steps, sequences = 100, 50
    rows = np.random.default_rng(0).uniform(low, high, (steps, sequences, len(low))).astype(np.float32)
    net = Torch(len(low))
    with torch.no_grad():
        wanted = net(torch.as_tensor(rows)).argmax(dim=2).numpy()
    assert min(np.bincount(wanted.ravel(), minlength=3)) > 100
    policy = model_of(net, phase).policy(CLOCKS_MHZ, 0.1)
    assert policy.memory == MEMORY_SIZE + 2 * UNITS
    grid, clocks = grid_of.py_func(policy.params) if hasattr(grid_of, "py_func") else grid_of(policy.params)
    found = np.empty_like(wanted)
    for sequence in range(sequences):
        memory = np.zeros(policy.memory)
        for step in range(steps):
            found[step, sequence] = position_of(
                policy.params, grid + clocks, memory, np.empty(64), rows[step, sequence]
            )
        assert not memory[:MEMORY_SIZE].any()
    np.testing.assert_array_equal(found, wanted)


def test_it_is_saved_whole(tmp_path: Path) -> None:
    model = model_of(Torch(layout.size("prefill", 3)))
    model.save(tmp_path / "clocks")
    again = load_model(tmp_path / "clocks")
    assert again.lstm is not None
    params = [one.policy(CLOCKS_MHZ, 0.1).params for one in (model, again)]
    np.testing.assert_array_equal(*params)
    assert again.parameters == model.parameters == 4 * UNITS * (layout.size("prefill", 3) + UNITS + 1) + 104 + 27
    with pytest.raises(ModelError, match="sequences"):
        again.actions(np.zeros((1, layout.size("prefill", 3)), np.float32))


def test_an_lstm_that_does_not_fit_is_refused() -> None:
    model = model_of(Torch(layout.size("prefill", 3)))
    assert model.lstm is not None
    with pytest.raises(ModelError, match="an LSTM of 12 units over"):
        replace(model, lstm=replace(model.lstm, bias=model.lstm.bias[1:]))
    with pytest.raises(ModelError, match="not finite"):
        replace(model, lstm=replace(model.lstm, bias=np.full(4 * UNITS, np.nan, np.float32)))
    with pytest.raises(ModelError, match="takes 12 numbers"):
        replace(model, lstm=replace(model.lstm), weights=model.weights[1:], biases=model.biases[1:])


def test_an_environment_has_no_room_for_its_state_and_says_so() -> None:
    env = gymnasium.make("BiScale/Prefill-v0", scenario="smoke", episode_s=3.0)
    model = model_of(Torch(layout.size("prefill", 3)))

    def policies(context: PlanContext) -> Any:
        return model.policy(context.clocks_mhz, context.scenario.slo.ttft_s), None

    placement = Placement((InstanceSpec("prefill", 2, 1830), InstanceSpec("decode", 4, 1830)))
    agent = ControllerPolicy(StatedPlacement(placement, "recurrent", policies), env)
    observation, _ = env.reset(seed=0)
    with pytest.raises(EnvironmentUsageError, match="'recurrent' remembers 56 numbers of an instance"):
        agent.predict(observation)
