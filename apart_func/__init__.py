"""APART, adversarially perturbed batch normalization, as pure functions on pytrees of tensors."""

from apart_func.autodiff import grad_and_value
from apart_func.dropin import APART
from apart_func.errors import ApartError, BatchError, ModelError, RanksError, SettingError, StateError, UsageError
from apart_func.functional import FunctionalModel, functionalize, init_perturbation
from apart_func.one_pass import OnePassStep, clean_stat_grads, make_one_pass_step
from apart_func.passes import Precision, adversarial_pass, mixed_pass, proxy_pass
from apart_func.perturbed import PerturbedStats, perturbed_stats
from apart_func.rules import (
    Rule,
    RuleKind,
    l2_perturbation,
    random_sign_perturbation,
    random_signs,
    rule_kind,
    sign_perturbation,
)
from apart_func.settings import Settings
from apart_func.state import assign_grads_, load_state_, split_state
from apart_func.step import ApartStep, make_apart_sam_step, make_apart_step, sam_ascent
from apart_func.trees import (
    AdversarialOutput,
    BatchStats,
    MixedOutput,
    Perturbation,
    PerturbationTree,
    ProxyOutput,
    StatGrads,
    StatGradTree,
    StatTree,
    StepOutput,
    Tensors,
    all_finite,
)

__version__ = "0.2.0"

__all__ = [
    "APART",
    "AdversarialOutput",
    "ApartError",
    "ApartStep",
    "BatchError",
    "BatchStats",
    "FunctionalModel",
    "MixedOutput",
    "ModelError",
    "OnePassStep",
    "Perturbation",
    "PerturbationTree",
    "PerturbedStats",
    "Precision",
    "ProxyOutput",
    "RanksError",
    "Rule",
    "RuleKind",
    "SettingError",
    "Settings",
    "StatGradTree",
    "StatGrads",
    "StatTree",
    "StateError",
    "StepOutput",
    "Tensors",
    "UsageError",
    "adversarial_pass",
    "all_finite",
    "assign_grads_",
    "clean_stat_grads",
    "functionalize",
    "grad_and_value",
    "init_perturbation",
    "l2_perturbation",
    "load_state_",
    "make_apart_sam_step",
    "make_apart_step",
    "make_one_pass_step",
    "mixed_pass",
    "perturbed_stats",
    "proxy_pass",
    "random_sign_perturbation",
    "random_signs",
    "rule_kind",
    "sam_ascent",
    "sign_perturbation",
    "split_state",
]
