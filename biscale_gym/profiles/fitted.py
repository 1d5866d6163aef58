"""The fitted form: gradient-boosted trees learned from profiled iterations, put onto a grid for the engine.

Latency is a linear form per clock times what trees learn of its residuals; power is trees alone. Latency never rises
and power never falls with the clock. Prefill is learned from the batch's tokens and their mean length as a token sees
it (sum of squares / sum: mean and spread of the prompt lengths in one number), decode from sequences, KV tokens and KV
tokens per sequence. Needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from biscale_gym.profiles import kernels
from biscale_gym.profiles.iterations import Iterations, work_of
from biscale_gym.profiles.profile import ProfileError
from biscale_gym.profiles.tabulated import ProfileTable, compile_table

if TYPE_CHECKING:
    from sklearn.ensemble import HistGradientBoostingRegressor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FitSettings:
    """Trees and grid.

    Attributes:
        learning_rate, trees, leaves, rows_per_leaf: of the boosting.
        kv_knots: regular KV knots of the decode grid, 0 and the largest observed included.
        batch_knots, token_knots, length_knots: at most so many, at quantiles of what was observed.
        folds: of the cross-validation; 0: none, and no errors.
        seed: of the folds.
    """

    learning_rate: float = 0.08
    trees: int = 400
    leaves: int = 31
    rows_per_leaf: int = 10
    kv_knots: int = 33
    batch_knots: int = 24
    token_knots: int = 32
    length_knots: int = 12
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class FitErrors:
    """Absolute percentage errors on operating points that the fit did not see: mean and 90th percentile.

    Those of ``fit_tables`` are read from the grid as the engine reads it. Power's are NaN where there is none.
    """

    tp: int
    phase: str
    rows: int
    latency_percent: float
    power_percent: float
    latency_p90_percent: float
    power_p90_percent: float


Predictor = Callable[[Iterations], Floats]
"""Latency [ms] and power [W] of iterations, shape (n, 2)."""


def fit_tables(
    iterations: Iterations, settings: FitSettings | None = None, points: NDArray[np.str_] | None = None
) -> tuple[dict[int, ProfileTable], list[FitErrors]]:
    """One table per TP degree of ``iterations``, and the cross-validated errors of each phase.

    Args:
        iterations: of n rows.
        settings: of trees, grid and folds.
        points: str[n], operating points, which folds hold out whole; None: iterations of the same work are one.

    Raises:
        ProfileError: a TP degree lacks prefill, decode or idle rows, or has too few points for the folds.
    """
    # Imported first: the limit reaches only the thread pools that are loaded when it is set.
    import sklearn.ensemble  # noqa: F401
    from threadpoolctl import threadpool_limits

    settings = settings or FitSettings()
    points = work_of(iterations) if points is None else points
    tables: dict[int, ProfileTable] = {}
    errors: list[FitErrors] = []
    # Small trees: threads that wait for each other at every node cost more than they bring.
    with threadpool_limits(1, user_api="openmp"):
        for tp in sorted({int(value) for value in iterations.tp}):
            here = iterations.tp == tp
            own = iterations.rows(here)
            tables[tp] = _fit(own, tp, settings)
            if settings.folds:

                def fit(rows: Iterations, tp: int = tp) -> Predictor:
                    table = _fit(rows, tp, settings)
                    return lambda asked: predict(table, tp, asked)

                errors += cross_validate(own, points[here], tp, settings.folds, settings.seed, fit)
    return tables, errors


def _split(iterations: Iterations, tp: int) -> tuple[Iterations, Iterations, Iterations]:
    """Decode, prefill and idle rows; none may be missing."""
    decode, prefill = iterations.batch > 0, iterations.prefill_tokens > 0
    parts = {"decode": decode, "prefill": prefill, "idle": ~decode & ~prefill}
    for name, mask in parts.items():
        if not mask.any():
            raise ProfileError(f"profiled iterations: TP {tp} has no {name} row")
    return iterations.rows(decode), iterations.rows(prefill), iterations.rows(parts["idle"])


def _decode_features(clock: Floats, batch: Floats, kv: Floats) -> Floats:
    """Shape (n, 4), the clock first."""
    return np.column_stack([clock, batch, kv, kv / batch])


def _prefill_features(clock: Floats, tokens: Floats, length: Floats) -> Floats:
    """Shape (n, 3), the clock first."""
    return np.column_stack([clock, tokens, length])


def _tokens_and_squares(features: Floats) -> Floats:
    """Tokens and sum of squared lengths of prefill features, shape (n, 2)."""
    tokens, length = features[:, 1], features[:, 2]
    return np.column_stack([tokens, tokens * length])


def _straight(clock: Floats, work: Floats, latency_s: Floats) -> Callable[[Floats, Floats], Floats]:
    """Latency as a non-negative linear function of two kinds of work, one per clock, by relative least squares.

    Trees are flat beyond what they have seen and coarse near its edge; this form goes on, and they learn the rest. At a
    clock that was not profiled in this phase the nearest one's holds; no answer is below half the least latency seen.
    """
    from scipy.optimize import nnls

    terms = {}
    for mhz in np.unique(clock):
        here = clock == mhz
        design = np.column_stack([np.ones(here.sum()), work[here]])
        scale = design.max(axis=0)
        terms[mhz] = nnls(design / scale / latency_s[here, None], np.ones(here.sum()))[0] / scale

    profiled = np.array(list(terms))
    least_s = 0.5 * latency_s.min()

    def predicted(clocks: Floats, asked: Floats) -> Floats:
        nearest = profiled[np.abs(np.subtract.outer(clocks, profiled)).argmin(axis=1)]
        own = np.array([terms[mhz] for mhz in nearest])
        return np.asarray(np.maximum(own[:, 0] + (own[:, 1:] * asked).sum(axis=1), least_s))

    return predicted


def _trees(features: Floats, target: Floats, direction: int, settings: FitSettings) -> HistGradientBoostingRegressor:
    """Trees on the logarithm of ``target``, monotone in the first feature."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    constraints = [direction] + [0] * (features.shape[1] - 1)
    model = HistGradientBoostingRegressor(
        learning_rate=settings.learning_rate,
        max_iter=settings.trees,
        max_leaf_nodes=settings.leaves,
        min_samples_leaf=settings.rows_per_leaf,
        monotonic_cst=constraints,
        early_stopping=False,
    )
    return model.fit(features, np.log(target))


def _knots(observed: Floats, count: int) -> Floats:
    """Ascending knots at quantiles of what was observed, extremes included, whole where the data are."""
    knots: Floats = np.unique(np.quantile(observed, np.linspace(0, 1, count), method="nearest"))
    if knots.size < 2:
        raise ProfileError(f"profiled iterations: every row has the same value {observed[0]:g}, nothing to interpolate")
    return knots


def _fit(iterations: Iterations, tp: int, settings: FitSettings) -> ProfileTable:
    """Trees for both phases, evaluated on the grid."""
    decode, prefill, idle = _split(iterations, tp)
    clocks = np.unique(np.concatenate([decode.clock_mhz, prefill.clock_mhz]))
    order = np.argsort(idle.clock_mhz)
    batches = np.unique(np.concatenate([[1.0], _knots(decode.batch, settings.batch_knots)]))
    kv = np.linspace(0, decode.kv_tokens.max(), settings.kv_knots)
    length = prefill.sum_len_sq / prefill.prefill_tokens
    tokens, lengths = _knots(prefill.prefill_tokens, settings.token_knots), _knots(length, settings.length_knots)

    decode_seen = _decode_features(decode.clock_mhz, decode.batch, decode.kv_tokens)
    prefill_seen = _prefill_features(prefill.clock_mhz, prefill.prefill_tokens, length)
    decode_grid = np.meshgrid(clocks, batches, kv, indexing="ij")
    prefill_grid = np.meshgrid(clocks, tokens, lengths, indexing="ij")
    decode_asked = _decode_features(*(axis.ravel() for axis in decode_grid))
    prefill_asked = _prefill_features(*(axis.ravel() for axis in prefill_grid))

    def power_w(seen: Floats, target: Floats, asked: Floats, shape: tuple[int, ...]) -> Floats:
        values: Floats = np.exp(_trees(seen, target, 1, settings).predict(asked)).reshape(shape)
        return values

    def latency_s(
        seen: Floats, target: Floats, work: Floats, asked: Floats, at: Floats, shape: tuple[int, ...]
    ) -> Floats:
        straight = _straight(seen[:, 0], work, target)
        ratio = _trees(seen, target / straight(seen[:, 0], work), 0, settings)
        values = (straight(asked[:, 0], at) * np.exp(ratio.predict(asked))).reshape(shape)
        # Ascending clocks are the first axis: latency never rises with the clock.
        return np.minimum.accumulate(values, axis=0)

    decode_shape, prefill_shape = decode_grid[0].shape, prefill_grid[0].shape
    return ProfileTable(
        clocks_mhz=clocks,
        idle_power_w=np.interp(clocks, idle.clock_mhz[order], idle.power_w_per_gpu[order]),
        decode_batches=batches,
        decode_kv_tokens=kv,
        decode_latency_s=latency_s(
            decode_seen, 1e-3 * decode.latency_ms, decode_seen[:, 1:3], decode_asked, decode_asked[:, 1:3], decode_shape
        ),
        decode_power_w=power_w(decode_seen, decode.power_w_per_gpu, decode_asked, decode_shape),
        prefill_tokens=tokens,
        prefill_mean_length=lengths,
        prefill_latency_s=latency_s(
            prefill_seen,
            1e-3 * prefill.latency_ms,
            _tokens_and_squares(prefill_seen),
            prefill_asked,
            _tokens_and_squares(prefill_asked),
            prefill_shape,
        ),
        prefill_power_w=power_w(prefill_seen, prefill.power_w_per_gpu, prefill_asked, prefill_shape),
    )


def predict(table: ProfileTable, tp: int, iterations: Iterations) -> Floats:
    """Latency [ms] and power [W] of ``iterations`` as the engine would read them from ``table``, shape (n, 2)."""
    vector = compile_table(table, tp, [int(clock) for clock in table.clocks_mhz], int(iterations.batch.max(initial=1)))
    clock = np.searchsorted(table.clocks_mhz, iterations.clock_mhz)
    work = (iterations.batch, iterations.kv_tokens, iterations.prefill_tokens, iterations.sum_len_sq)
    costs = [kernels.iteration_cost(vector, *row) for row in zip(clock.tolist(), *work, strict=True)]
    return np.array(costs) * [1e3, 1.0]


def cross_validate(
    iterations: Iterations,
    points: NDArray[np.str_],
    tp: int,
    folds: int,
    seed: int,
    fit: Callable[[Iterations], Predictor],
) -> list[FitErrors]:
    """Errors of both phases, every operating point predicted by a fit that saw none of its rows.

    Args:
        iterations: of n rows and one TP degree; idle rows are seen by every fit.
        points: str[n], the rows' operating points.
        tp: for the answer.
        folds: parts that each phase's points are dealt into.
        seed: of the dealing.
        fit: from rows to predictions.

    Raises:
        ProfileError: a phase has fewer points than folds.
    """
    rng = np.random.default_rng(seed)
    fold = np.full(len(iterations), -1)
    phases = {"prefill": iterations.prefill_tokens > 0, "decode": iterations.batch > 0}
    for name, mask in phases.items():
        labels, point = np.unique(points[mask], return_inverse=True)
        if labels.size < folds:
            raise ProfileError(
                f"profiled iterations: TP {tp} has {labels.size} {name} points, {folds} folds need as many"
            )
        fold[mask] = (rng.permutation(labels.size) % folds)[point]
    predicted = np.empty((len(iterations), 2))
    for number in range(folds):
        out = fold == number
        predicted[out] = fit(iterations.rows(~out))(iterations.rows(out))
    measured = np.column_stack([iterations.latency_ms, iterations.power_w_per_gpu])
    errors = []
    for name, mask in phases.items():
        percent = 100 * np.abs(predicted[mask] / measured[mask] - 1)
        mean, p90 = percent.mean(axis=0), np.percentile(percent, 90, axis=0)
        errors.append(
            FitErrors(tp, name, int(mask.sum()), float(mean[0]), float(mean[1]), float(p90[0]), float(p90[1]))
        )
    return errors
