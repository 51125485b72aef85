"""The settings of a step, checked once: a value that is out of its range never reaches a pass."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from apart_func.distributed import check_process_group
from apart_func.errors import SettingError
from apart_func.layer.rows import Rows, check_rows, number_of_groups
from apart_func.rules import Rule, check_epsilon, check_rule, sign_perturbation


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
        check_epsilon(self.epsilon, self.rule)
        number_of_groups(self.groups, 0)
        check_rows(self.rows)
        check_process_group(self.process_group)
        if not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise SettingError(
                f"ratio={self.ratio!r}; expected 0 < ratio ≤ 1, the share of samples in the adversarial pass."
            )
        check_radius("rho", self.rho)
        if self.remainder not in ("error", "drop"):
            raise SettingError(f"remainder={self.remainder!r}; expected 'error' or 'drop'.")
        if not _is_number(self.clean_fraction):
            raise SettingError(f"clean_fraction={self.clean_fraction!r}; expected a number between 0 and 1.")
        if not _is_count(self.microbatches):
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


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return repr(value.item())
    if value is None or isinstance(value, (str, int, float, torch.dtype)):
        return repr(value)
    return str(getattr(value, "name", getattr(value, "__name__", type(value).__name__)))


def check_radius(name: str, value: Any) -> None:
    """Make sure that a setting is a radius.

    Raises:
        SettingError: it is no number, negative, or not finite.
    """
    if not (_is_number(value) and 0 <= value < math.inf):
        raise SettingError(f"{name}={value!r}; expected a finite radius ≥ 0, such as 0.05.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def scalar(value: Any, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A setting as a 0-d tensor.

    Raises:
        SettingError: it is no number.
    """
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.to(device=device, dtype=dtype)
    if not _is_number(value):
        raise SettingError(f"{name}={value!r}; expected a number or 0-d tensor.")
    return torch.full((), value, dtype=dtype, device=device)
