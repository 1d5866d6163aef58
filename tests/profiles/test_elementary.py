"""Elementary functions in plain arithmetic, held against the C library's; draws, against what they are draws of."""

import math

import numpy as np
import pytest

from biscale_gym._jit import compiled
from biscale_gym.cluster.primitives import draw_lognormals
from biscale_gym.profiles.elementary import cosine_of_turns, exponential, natural_log


@compiled
def logs(values, out):
    for k in range(len(values)):
        out[k] = natural_log(values[k])


@compiled
def exponentials(values, out):
    for k in range(len(values)):
        out[k] = exponential(values[k])


@compiled
def cosines(values, out):
    for k in range(len(values)):
        out[k] = cosine_of_turns(values[k])


def of(function, values):
    out = np.empty(len(values))
    function(values, out)
    return out


def units_in_the_last_place(found, true):
    return np.abs((found - true) / np.spacing(true)).max()


def test_the_logarithm_is_the_library_s_to_the_last_place():
    rng = np.random.default_rng(0)
    for values in (
        rng.random(100_000) + 2.0**-53,
        1.0 + 1e-6 * rng.random(100_000),
        np.exp(rng.uniform(-700, 700, 100_000)),
    ):
        assert units_in_the_last_place(of(logs, values), np.log(values)) <= 2.0
    assert of(logs, np.ones(1))[0] == 0.0


def test_the_exponential_is_the_library_s_to_the_last_place():
    values = np.random.default_rng(0).uniform(-700, 700, 100_000)
    assert units_in_the_last_place(of(exponentials, values), np.exp(values)) <= 2.0
    assert of(exponentials, np.zeros(1))[0] == 1.0


def test_the_cosine_is_the_library_s():
    turns = np.linspace(0.0, 1.0, 100_001)
    assert of(cosines, turns) == pytest.approx(np.cos(2.0 * math.pi * turns), abs=1e-15)


def test_draws_are_of_the_distribution_whatever_their_number_at_a_time():
    many = np.empty(100_003)
    end = draw_lognormals(np.uint64(7), 0.0045, 0.456, many)
    state, one = np.uint64(7), np.empty(1)
    for value in many[:50]:
        state = np.uint64(draw_lognormals(state, 0.0045, 0.456, one))
        assert one[0] == value
    rest = np.empty(len(many) - 50)
    assert draw_lognormals(state, 0.0045, 0.456, rest) == end
    assert (rest == many[50:]).all()
    normal = np.log(many / 0.0045) / 0.456
    assert normal.mean() == pytest.approx(0.0, abs=4.0 / math.sqrt(len(many)))
    assert normal.std() == pytest.approx(1.0, abs=4.0 / math.sqrt(2 * len(many)))
    within = [np.mean(np.abs(normal) < width) for width in (1.0, 2.0, 3.0)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.006)
