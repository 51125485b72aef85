"""What the library promises to keep: its public names, each described."""

import doctest
import importlib
import inspect
import pkgutil
import re

import apart_func
from apart_func import *  # noqa: F403

CLASSES = """
APART AdversarialOutput ApartStep BatchStats FunctionalModel MixedOutput OnePassStep Perturbation
PerturbedStats Precision ProxyOutput Rule RuleKind Settings StatGrads StepOutput
"""
ERRORS = "ApartError BatchError ModelError RanksError SettingError StateError UsageError"
ALIASES = "PerturbationTree StatGradTree StatTree Tensors"  # of dicts
FUNCTIONS = """
adversarial_pass all_finite assign_grads_ clean_stat_grads functionalize grad_and_value init_perturbation
l2_perturbation load_state_ make_apart_sam_step make_apart_step make_one_pass_step mixed_pass perturbed_stats
proxy_pass random_sign_perturbation random_signs rule_kind sam_ascent sign_perturbation split_state
"""
NAMES = {name for names in (CLASSES, ERRORS, ALIASES, FUNCTIONS) for name in names.split()}


def test_the_public_names_are_these() -> None:
    assert sorted(apart_func.__all__) == sorted(NAMES)
    assert globals().keys() >= NAMES


def test_each_is_described_for_help() -> None:
    for name in NAMES - {*ALIASES.split()}:  # which have no docstring of their own
        described = getattr(apart_func, name)
        text = inspect.getdoc(described)
        assert text, f"{name} has no docstring"
        # A NamedTuple or dataclass without one is given its signature.
        assert not text.startswith(f"{name}("), f"{name} has no docstring of its own"
        if inspect.isfunction(described) and described.__code__.co_argcount > 1:
            assert re.search(r"^Args:$", text, re.MULTILINE) or len(text.splitlines()) == 1, (
                f"{name} hides its arguments"
            )


def test_help_shows_how_a_step_is_called() -> None:
    assert "out = apart_step(params, buffers, batch)" in inspect.getdoc(apart_func.ApartStep)
    assert "perturbation" in inspect.signature(apart_func.OnePassStep.__call__).parameters
    assert "with apart.to_proxy():" in inspect.getdoc(apart_func.APART)


def test_the_examples_in_docstrings_are_right() -> None:
    """Of every module that torch and einops suffice for."""
    names = [module.name for module in pkgutil.walk_packages(apart_func.__path__, "apart_func.")]
    own = [importlib.import_module(name) for name in names if "integrations" not in name]
    results = [doctest.testmod(module) for module in own]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 0
