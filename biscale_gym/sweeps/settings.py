"""A sweep's settings, in the format of W&B's sweep files; ``configs/sweeps`` holds presets.

https://docs.wandb.ai/models/sweeps/sweep-config-keys. Parameters are dotted settings of training, and the command is
``biscale-gym train PRESET ... --set ${args_no_hyphens}``, so that W&B's own agents can run the file as it is.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from biscale_gym.config import Settings, load_preset

ARGUMENTS = "${args_no_hyphens}"
"""What W&B replaces by KEY=VALUE for every parameter."""

Method = Literal["bayes", "random", "grid"]
Distribution = Literal["constant", "categorical", "int_uniform", "uniform", "q_uniform", "log_uniform_values"]


class SweepError(ValueError):
    """A sweep that cannot be run as asked; the message names the place and the nearest valid choice."""


class Metric(Settings):
    """What is optimised.

    Attributes:
        name: of a figure in the run's summary.
        goal: whether less of it is better.
    """

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"


class Parameter(Settings):
    """Where one setting is searched: a ``value``, a list of ``values``, or a range from ``min`` to ``max``.

    Attributes:
        distribution: of a range; without it ``int_uniform`` between integers, else ``uniform``.
        value, values, min, max: see above.
        q: step of ``q_uniform``.
    """

    distribution: Distribution | None = None
    value: Any = None
    values: tuple[Any, ...] | None = None
    min: int | float | None = None
    max: int | float | None = None
    q: int | float | None = None

    @property
    def kind(self) -> Distribution:
        """The distribution, stated or told by the keys."""
        if self.distribution is not None:
            return self.distribution
        if "value" in self.model_fields_set:
            return "constant"
        if self.values is not None:
            return "categorical"
        return "int_uniform" if isinstance(self.min, int) and isinstance(self.max, int) else "uniform"

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """Everything the setting can be; None of a range."""
        if self.kind == "constant":
            return (self.value,)
        return self.values if self.kind == "categorical" else None

    @model_validator(mode="after")
    def _one_form(self) -> Parameter:
        given = self.model_fields_set - {"distribution"}
        needed = {"constant": {"value"}, "categorical": {"values"}}.get(self.kind, {"min", "max"})
        if self.kind == "q_uniform":
            needed = needed | {"q"}
        if given != needed:
            keys = ", ".join(sorted(given)) or "nothing"
            raise ValueError(f"{self.kind} takes {', '.join(sorted(needed))}; found {keys}")
        if self.values is not None and not self.values:
            raise ValueError("values is empty")
        if self.min is not None and self.max is not None:
            if not self.min < self.max:
                raise ValueError(f"min {self.min} is not below max {self.max}")
            if self.kind == "log_uniform_values" and self.min <= 0:
                raise ValueError(f"min {self.min}: a logarithm needs more than 0")
        return self


class SweepSettings(Settings):
    """One sweep.

    Attributes:
        name: of the sweep, and of its folder.
        description: one line for lists.
        program: what W&B's agents start.
        command: its arguments: ``train``, a preset of training, ..., ``--set``, ``${args_no_hyphens}``.
        method: ``bayes`` (here: the tree-structured Parzen estimator), ``random`` or ``grid``.
        metric: what is optimised.
        parameters: by dotted setting of training.
        run_cap: how many runs there may be.
        project, entity: at W&B.
        early_terminate: W&B's rule for ending runs early; only W&B follows it.
    """

    name: str
    description: str = ""
    program: str = "biscale-gym"
    command: tuple[str, ...]
    method: Method = "bayes"
    metric: Metric
    parameters: dict[str, Parameter] = Field(min_length=1)
    run_cap: int | None = Field(default=None, ge=1)
    project: str | None = None
    entity: str | None = None
    early_terminate: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _command_trains(self) -> SweepSettings:
        words = self.command
        if "train" not in words[:-1] or words[-2:] != ("--set", ARGUMENTS):
            raise ValueError(f"command must hold: train, a training preset, ..., --set, {ARGUMENTS} (in this order)")
        if self.method == "grid":
            ranges = [name for name, parameter in self.parameters.items() if parameter.choices is None]
            if ranges:
                raise ValueError(f"parameters.{ranges[0]}: a grid needs values, not a range")
        return self

    @property
    def preset(self) -> str:
        """The training preset (or file) whose settings are varied."""
        return self.command[self.command.index("train") + 1]

    @property
    def grid_size(self) -> int | None:
        """How many combinations there are; None where a parameter is a range."""
        counts = [len(parameter.choices) if parameter.choices else 0 for parameter in self.parameters.values()]
        return math.prod(counts) or None


def load_sweep(name_or_path: str) -> SweepSettings:
    """The preset ``configs/sweeps/<name>.yaml``, or a file of your own.

    Raises:
        ConfigError: no such preset, or a fault in the file.
    """
    return load_preset(SweepSettings, "sweeps", name_or_path)
