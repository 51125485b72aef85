"""Arguments of the wrong type: each of every public function is refused as an `ApartError` that says what was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from small import convolutional, images
from torch import nn

import apart_func
from apart_func import (
    APART,
    ApartError,
    Settings,
    adversarial_pass,
    assign_grads_,
    clean_stat_grads,
    functionalize,
    grad_and_value,
    gradients_at,
    init_perturbation,
    load_state_,
    make_apart_sam_step,
    make_apart_step,
    make_one_pass_step,
    mixed_pass,
    multi_step,
    perturbed_stats,
    proxy_pass,
    random_signs,
    sam_ascent,
    sign_flips,
    sign_perturbation,
    split_state,
)

JUNK: dict[str, Any] = {
    "None": None,
    "text": "text",
    "a number": 3.5,
    "True": True,
    "a list": [1],
    "a module": nn.Linear(2, 2),
    "a class": nn.BatchNorm2d,
    "a function": lambda *_: None,
    "a tensor": torch.ones(2),
    "a dict": {"a": 1},
    "an object": object(),
}
MODEL = convolutional()
PARAMS, BUFFERS = split_state(MODEL)
FMODEL = functionalize(MODEL)
ZERO = init_perturbation(MODEL)
PROXY = proxy_pass(FMODEL, F.cross_entropy, PARAMS, BUFFERS, images())
MIXED = mixed_pass(FMODEL, F.cross_entropy, PARAMS, BUFFERS, images(), ZERO, groups=2, clean=1)


class Call(NamedTuple):
    """A public function with arguments that are right.

    Attributes:
        function: takes all of them by keyword.
        arguments: by name.
        takes: for some arguments, which kinds of `JUNK` are no junk there.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    takes: dict[str, set[str]]


STATE: dict[str, Any] = {"params": PARAMS, "buffers": BUFFERS}
PASS: dict[str, Any] = {"fmodel": FMODEL, "loss_fn": F.cross_entropy, **STATE, "batch": images()}
CALLABLE = {"a module", "a class", "a function"}
NOTHING = {"None"}
SETTINGS: dict[str, Any] = {
    "epsilon": 0.1,
    "groups": 2,
    "microbatches": 1,
    "rule": sign_perturbation,
    "rows": None,
    "autocast_dtype": None,
}
# A radius of 3.5 is one for rules that are not of signs; here it is out of range, which is an error as well.
SETTINGS_TAKE = {"rule": CALLABLE, "rows": NOTHING | CALLABLE, "autocast_dtype": NOTHING}


def apart(**arguments: Any) -> Any:
    return APART(arguments.pop("model"), **arguments)


def step(**arguments: Any) -> Any:
    return make_apart_step(MODEL, F.cross_entropy)(**arguments)


def one_pass_step(**arguments: Any) -> Any:
    return make_one_pass_step(MODEL, F.cross_entropy, epsilon=0.1, groups=2)(**arguments)


def one_pass_context(**arguments: Any) -> None:
    with APART(MODEL, groups=2).one_pass(**arguments):
        pass


CALLS = {
    "APART": Call(
        apart,
        {"model": MODEL, "epsilon": 0.1, "groups": 2, "rule": sign_perturbation, "rows": None},
        {**SETTINGS_TAKE, "model": {"a module"}, "rule": CALLABLE | NOTHING},
    ),
    "APART.set_epsilon": Call(lambda epsilon: APART(MODEL).set_epsilon(epsilon), {"epsilon": 0.1}, {}),
    "APART.one_pass": Call(one_pass_context, {"clean_fraction": 0.5}, {}),
    "functionalize": Call(functionalize, {"model": MODEL}, {}),
    "FunctionalModel": Call(lambda params, buffers: FMODEL(params, buffers, images()[0]), STATE, {}),
    "split_state": Call(split_state, {"model": MODEL}, {"model": {"a module"}}),
    "load_state_": Call(load_state_, {"model": MODEL, **STATE}, {}),
    "assign_grads_": Call(assign_grads_, {"model": convolutional(), "grads": PROXY.grads}, {}),
    "make_apart_step": Call(
        make_apart_step,
        {"model": MODEL, "loss_fn": F.cross_entropy, "ratio": 1.0, "rho": 0.0, "remainder": "error", **SETTINGS},
        {**SETTINGS_TAKE, "loss_fn": CALLABLE, "rho": {"a number"}},
    ),
    "make_apart_sam_step": Call(
        make_apart_sam_step, {"model": MODEL, "loss_fn": F.cross_entropy}, {"loss_fn": CALLABLE}
    ),
    "make_one_pass_step": Call(
        make_one_pass_step,
        {"model": MODEL, "loss_fn": F.cross_entropy, "clean_fraction": 0.5, **SETTINGS},
        {**SETTINGS_TAKE, "loss_fn": CALLABLE},
    ),
    "Settings": Call(
        Settings,
        {"ratio": 1.0, "remainder": "error", "clean_fraction": 0.5, **SETTINGS},
        {**SETTINGS_TAKE, "clean_fraction": {"a number"}},
    ),
    "ApartStep": Call(
        step,
        {**STATE, "batch": images(), "epsilon": 0.1, "loss_scale": 2.0, "perturbation": ZERO},
        {"epsilon": NOTHING, "loss_scale": NOTHING | {"a number"}, "perturbation": NOTHING},
    ),
    "OnePassStep": Call(
        one_pass_step,
        {**STATE, "batch": images(), "perturbation": ZERO, "epsilon": 0.1, "loss_scale": 2.0},
        {"epsilon": NOTHING, "loss_scale": NOTHING | {"a number"}},
    ),
    "init_perturbation": Call(init_perturbation, {"model": MODEL}, {}),
    "proxy_pass": Call(proxy_pass, PASS, {"loss_fn": CALLABLE}),
    "adversarial_pass": Call(
        adversarial_pass,
        {**PASS, "perturbation": ZERO, "groups": 2, "rows": None},
        {"rows": NOTHING | CALLABLE, "loss_fn": CALLABLE},
    ),
    "mixed_pass": Call(
        mixed_pass,
        {**PASS, "perturbation": ZERO, "groups": 2, "clean": 1, "rows": None},
        {"rows": NOTHING | CALLABLE, "loss_fn": CALLABLE},
    ),
    "gradients_at": Call(gradients_at, {**PASS, "perturbation": ZERO}, {"loss_fn": CALLABLE}),
    "random_signs": Call(
        random_signs, {"layers": ZERO, "epsilon": 0.1, "generator": torch.Generator()}, {"generator": NOTHING}
    ),
    "clean_stat_grads": Call(clean_stat_grads, {"stat_grads": MIXED.stat_grads, "clean": 1}, {}),
    "sam_ascent": Call(sam_ascent, {"params": PARAMS, "grads": PROXY.grads, "rho": 0.1}, {"rho": {"a number"}}),
    "grad_and_value": Call(
        grad_and_value,
        {"function": lambda p: (p["a"].sum(), None), "params": {"a": torch.ones(2)}},
        {"function": {"a module", "a class"}},  # what these raise, called with params, is their own
    ),
    "multi_step": Call(multi_step, {"steps": 2, "step_size": 0.5}, {"step_size": NOTHING | {"a number"}}),
    "sign_flips": Call(sign_flips, {"previous": ZERO, "current": ZERO}, {}),
    "perturbed_stats": Call(
        perturbed_stats, {"stats": PROXY.stats, "perturbation": ZERO, "eps": 1e-5}, {"eps": {"a number"}}
    ),
}


def wrong_arguments() -> Iterator[Any]:
    for name, call in CALLS.items():
        for argument in call.arguments:
            for kind in JUNK:
                if kind not in call.takes.get(argument, set()):
                    yield pytest.param(name, argument, kind, id=f"{name}-{argument}-{kind}")


@pytest.mark.parametrize("name", CALLS)
def test_the_arguments_that_are_right_are_taken(name: str) -> None:
    """So that the test below is about the one argument that it changes."""
    CALLS[name].function(**CALLS[name].arguments)


@pytest.mark.parametrize(("name", "argument", "kind"), list(wrong_arguments()))
def test_an_argument_of_the_wrong_type_is_refused(name: str, argument: str, kind: str) -> None:
    call = CALLS[name]
    before = {key: tensor.clone() for key, tensor in MODEL.state_dict().items()}
    with pytest.raises(ApartError) as raised:
        call.function(**{**call.arguments, argument: JUNK[kind]})
    assert len(str(raised.value)) > 20
    torch.testing.assert_close(dict(MODEL.state_dict()), before, rtol=0, atol=0)


# What is public and has no place above, with the reason.
ELSEWHERE = {
    "IterativeRule": "a record of a function, which is checked where it is used",
    "Precision": "a record",
    "Rule": "a protocol",
    "all_finite": "takes whatever can be iterated over",
    "l2_perturbation": "a rule: called by a step, with what it has made",
    "random_sign_perturbation": "a rule",
    "rule_kind": "a decorator that takes flags",
    "sign_perturbation": "a rule",
    "OnePassStep": "made by make_one_pass_step",
}


def test_every_public_function_is_here() -> None:
    public = {name for name in apart_func.__all__ if callable(getattr(apart_func, name))}
    records = {name for name in public if hasattr(getattr(apart_func, name), "_fields")}
    trees = {name for name in public if name.endswith("Tree") or name == "Tensors"}
    errors = {name for name in public if name.endswith("Error")}
    here = {name.partition(".")[0] for name in CALLS}
    assert public - records - trees - errors - here <= ELSEWHERE.keys()


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_of_a_function_is_here(name: str) -> None:
    original = getattr(apart_func, name.partition(".")[0])
    if "." in name:
        original = getattr(original, name.partition(".")[2])
    elif name in ("ApartStep", "OnePassStep", "FunctionalModel"):
        original = original.__call__
    taken = {
        parameter.name
        for parameter in inspect.signature(original).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    # of another library's type, a record, or a flag
    flags = {"accumulate", "stat_grads", "training"}
    known = {"self", "process_group", "precision", "rho", "ratio", "remainder", "clean_fraction", *flags}
    assert taken - known <= CALLS[name].arguments.keys()
