"""Settings of a training run; ``configs/training`` holds presets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from biscale_gym.config import Settings, nearest
from biscale_gym.envs.settings import EnvSplit
from biscale_gym.envs.shield import NO_SHIELD, ShieldSettings

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
OF_A_SCENARIO = (
    "load",
    "rate_rps",
    "episode_s",
    "warmup_s",
    "discount_per_s",
    "violation_penalty",
    "reference_w_per_gpu",
    "baseline_w_per_gpu",
)
"""Settings of an environment that may differ between the scenarios of a run: none that changes spaces or questions."""


class WrapperSettings(Settings):
    """A wrapper of ``biscale_gym.envs.wrappers.vector`` and its arguments; files may write ``Name`` or ``Name: {...}``.

    Attributes:
        name: of the class.
        arguments: keyword arguments.
    """

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            name, arguments = next(iter(value.items()))
            return {"name": name, "arguments": arguments or {}}
        return value


class EvaluationSettings(Settings):
    """How policies are judged: the same episodes every time, and the same for the references.

    Attributes:
        every_steps: environment steps between evaluations; the first is after so many, one more is at the end.
        split: of the workload; never ``train``, and ``test`` only for a report.
        episodes: of each scenario, side by side.
        episode_s: length of an episode; None: the environment's.
        seed: episode n is drawn from ``seed + n``, and plays the split's trace n.
        references: what energy is held against: ``max-clock``, and controllers by name (``biscale``). The last one is
            what a policy's energy is over.
        attainment: share of requests, pooled over the episodes of a scenario, within the SLO that a policy must reach
            to keep the SLO; 0.99 is a P99 within it.
        not_below_reference: whether it must also reach the last reference's share.
        tolerance: by how much it may miss that.
        env: environment settings that differ from training's, e.g. ``{load: [1.0, 1.0]}``.
    """

    every_steps: Count = 500_000
    split: EnvSplit = "validation"
    episodes: Count = 8
    episode_s: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 10_000
    references: tuple[str, ...] = ("max-clock", "biscale")
    attainment: Share = 0.99
    not_below_reference: bool = True
    tolerance: NonNegative = 0.0
    env: dict[str, Any] = Field(default_factory=dict)

    @field_validator("split")
    @classmethod
    def _not_what_is_trained_on(cls, value: str) -> str:
        if value == "train":
            raise ValueError("policies are chosen on what they are not trained on; valid: validation, test")
        return value


class ConstraintSettings(Settings):
    """How SLO violations are priced.

    Attributes:
        kind: ``penalty``: each costs ``penalty``; ``lagrangian``: each costs a multiplier, which rises while more than
            ``limit`` of the requests are late and falls while fewer are.
        unit: what a penalty of 1, or a multiplier, is worth: ``second``: an instance at the environment's reference
            power for a second. ``request``: for the mean time between two of its requests at the scenario's whole
            rate; rewards count in it, too. So one penalty serves scenarios whose requests differ in cost.
        penalty: of a violation; under ``lagrangian``, where the multiplier begins.
        limit: share of requests that may be late.
        learning_rate: of the multiplier, per iteration and unit of (late / limit - 1), which counts as at most
            ``most_excess``.
        most_excess: see ``learning_rate``.
        highest: the multiplier's upper bound.
    """

    kind: Literal["penalty", "lagrangian"] = "lagrangian"
    unit: Literal["second", "request"] = "second"
    penalty: NonNegative = 1.0
    limit: Share = 0.01
    learning_rate: Positive = 0.05
    most_excess: Positive = 5.0
    highest: Positive = 100.0


class WarmStartSettings(Settings):
    """Behaviour cloning before training: the policy learns what a controller does.

    Attributes:
        controller: whose clocks are imitated: its prefill policy (for ``biscale``, MPC) or decode policy (slack).
        steps: environment steps of its rollouts, on training episodes.
        epochs: passes over them.
        batch_size, learning_rate: of the cloning's own Adam.
        value_weight: of the squared error of the value function, against the rollouts' discounted returns.
    """

    controller: str = "biscale"
    steps: Count = 100_000
    epochs: Count = 10
    batch_size: Count = 2048
    learning_rate: Positive = 1e-3
    value_weight: NonNegative = 0.5


class CurriculumSettings(Settings):
    """From light load to the environment's own: the range of ``load`` moves there linearly.

    Attributes:
        load: where the range begins; it ends at the environment's setting ``load``.
        over: share of the training that the way takes.
    """

    load: tuple[Share, Share] = (0.3, 0.5)
    over: Share = 0.5


class EarlyStopSettings(Settings):
    """When to give up.

    Attributes:
        patience: evaluations in a row without a better model.
        min_steps: before which none counts.
    """

    patience: Count = 10
    min_steps: Annotated[int, Field(ge=0)] = 0


class TrainingSettings(Settings):
    """One training run.

    Attributes:
        description: one line for lists.
        env_id: environment.
        scenarios: presets or paths; lanes are dealt out to them in turn.
        env: settings of the environment.
        scenario_env: those that differ in some scenarios, by scenario.
        wrappers: around the lanes, innermost first.
        algorithm: one of ``algorithms.ALGORITHMS``.
        hyperparameters: keyword settings of the algorithm's class. ``learning_rate`` and ``clip_range`` may be
            ``lin_X``: from X linearly to 0.
        net_arch: hidden layers of policy and value network each.
        activation: between them.
        lstm_size: cells of ``recurrent-ppo`` before them, of policy and value network each.
        quantiles: of the return that ``qr-dqn`` and ``tqc`` estimate for every action; an update's work grows with
            their square.
        discount: ``step``: the algorithm's gamma, per step. ``time``: ``info["discount"]``, the environment's
            ``discount_per_s`` to the power of the step's seconds.
        lanes: environments side by side.
        total_steps: environment steps, all lanes together.
        seed: of everything random.
        threads: of torch and of the lanes' compiled step. Another number may change torch's sums, and with them the
            weights; on small networks and a machine with other work more than one is slower.
        evaluation, constraint, warm_start, curriculum, early_stop: as their classes say; None: without.
        shield: of the exported clock policy, in evaluation and service.
        train_shielded: whether the lanes have it too.
        checkpoint_every_s: seconds of wall time between checkpoints; 0: at every iteration.
    """

    description: str = ""
    env_id: str
    scenarios: Annotated[tuple[str, ...], Field(min_length=1)]
    env: dict[str, Any] = Field(default_factory=dict)
    scenario_env: dict[str, dict[str, Any]] = Field(default_factory=dict)
    wrappers: tuple[WrapperSettings, ...] = ()
    algorithm: str = "ppo"
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    net_arch: tuple[Count, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"
    lstm_size: Count = 256
    quantiles: Count = 25
    discount: Literal["step", "time"] = "step"
    lanes: Count = 256
    total_steps: Count
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Count = 1
    evaluation: EvaluationSettings = EvaluationSettings()
    constraint: ConstraintSettings | None = None
    warm_start: WarmStartSettings | None = None
    curriculum: CurriculumSettings | None = None
    early_stop: EarlyStopSettings | None = None
    shield: ShieldSettings = NO_SHIELD
    train_shielded: bool = True
    checkpoint_every_s: NonNegative = 300.0

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSettings:
        for name in ("scenario", "split", "render_mode"):
            if name in self.env:
                raise ValueError(f"env.{name}: a run trains on split train of its scenarios; remove it")
        if "shield" in self.env:
            raise ValueError("env.shield: the lanes' shield is the run's; set shield and train_shielded instead")
        for scenario, own in self.scenario_env.items():
            if scenario not in self.scenarios:
                raise ValueError(f"scenario_env: {nearest(scenario, list(self.scenarios))}")
            for name in own:
                if name not in OF_A_SCENARIO:
                    raise ValueError(f"scenario_env.{scenario}.{name}: {nearest(name, list(OF_A_SCENARIO))}")
        if self.lanes < len(self.scenarios):
            raise ValueError(
                f"lanes is {self.lanes}, expected at least one for each of {len(self.scenarios)} scenarios"
            )
        if self.curriculum is not None and any("load" in own for own in self.scenario_env.values()):
            raise ValueError("curriculum and scenario_env both set loads; keep one of them")
        for scenario in self.scenarios:
            env = {**self.env, **self.scenario_env.get(scenario, {})}
            if self.constraint is not None and "violation_penalty" in env:
                raise ValueError("env.violation_penalty and constraint both price violations; keep one of them")
            if self.discount == "time" and not 0.0 < float(env.get("discount_per_s", 1.0)) < 1.0:
                raise ValueError("discount: time needs env.discount_per_s, more than 0 and below 1")
        return self
