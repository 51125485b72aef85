"""The settings of a step, checked once: a value that is out of its range never reaches a pass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from apart_func.checks import check_epsilon, check_radius, check_rule, is_count, is_number
from apart_func.errors import SettingError
from apart_func.groups import Rows, check_rows, number_of_groups
from apart_func.ranks import check_process_group
from apart_func.rules import Rule, kind_of, sign_perturbation


@dataclass(frozen=True)
class Settings:
    """What a step does; `make_apart_step` and `make_one_pass_step` say what each setting means.

    Raises:
        SettingError: a setting has the wrong type, or is out of its range.
    """

    epsilon: float | Tensor = 0.1
    groups: int = 0
    ratio: float = 1.0
    rho: float = 0.0
    remainder: Literal["error", "drop"] = "error"
    clean_fraction: float = 0.5
    microbatches: int = 1
    rule: Rule = sign_perturbation
    rows: Rows | None = None
    autocast_dtype: torch.dtype | None = None
    process_group: Any = None

    def __post_init__(self) -> None:
        check_rule(self.rule)
        check_epsilon(self.epsilon, kind_of(self.rule).is_bounded)
        if is_count(self.groups):
            object.__setattr__(self, "groups", int(self.groups))  # a number of numpy is no constant to a compiler
        number_of_groups(self.groups, 0)
        check_rows(self.rows)
        check_process_group(self.process_group)
        if not (is_number(self.ratio) and 0 < self.ratio <= 1):
            raise SettingError(
                f"ratio={self.ratio!r}; expected 0 < ratio ≤ 1, the share of samples in the adversarial pass."
            )
        check_radius("rho", self.rho)
        if self.remainder not in ("error", "drop"):
            raise SettingError(f"remainder={self.remainder!r}; expected 'error' or 'drop'.")
        if not is_number(self.clean_fraction):
            raise SettingError(f"clean_fraction={self.clean_fraction!r}; expected a number between 0 and 1.")
        if not (is_count(self.microbatches) and self.microbatches >= 1):
            raise SettingError(f"microbatches={self.microbatches!r}; expected a positive number of parts.")
        if not (self.autocast_dtype is None or isinstance(self.autocast_dtype, torch.dtype)):
            raise SettingError(f"autocast_dtype={self.autocast_dtype!r}; expected a dtype, such as torch.bfloat16.")

    def __str__(self) -> str:
        """The radius, and the settings that are not as they are by default."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        said = {name: value for name, (value, default) in values.items() if name == "epsilon" or value != default}
        return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in said.items())

    def described(self) -> str:
        """The settings as text that is the same in every process."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "process_group"}
        return ", ".join(f"{name}={_described(value)}" for name, value in values.items())


def settings_of(arguments: dict[str, Any]) -> Settings:
    """Make settings of all arguments of a maker but its model and loss."""
    return Settings(**{name: value for name, value in arguments.items() if name not in ("model", "loss_fn")})


def _described(value: Any) -> str:
    if isinstance(value, partial):
        return f"{_described(value.func)} with {sorted(value.keywords)}"
    if isinstance(value, Tensor):
        return repr(value.item())
    if value is None or isinstance(value, (str, int, float, torch.dtype)):
        return repr(value)
    return str(getattr(value, "name", getattr(value, "__name__", type(value).__name__)))
