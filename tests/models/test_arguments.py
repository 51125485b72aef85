"""Arguments of the wrong type: each of every public function is refused as an `ApartError` that says what was given."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import convolutional, images
from torch import nn

import apart_func
from apart_func import (
    APART,
    ApartError,
    functionalize,
    init_perturbation,
    make_apart_step,
    make_one_pass_step,
    mixed_pass,
    proxy_pass,
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


# What is right, by the name of the argument.
VALUES: dict[str, Any] = {
    "model": MODEL,
    "fmodel": FMODEL,
    "loss_fn": F.cross_entropy,
    "params": PARAMS,
    "buffers": BUFFERS,
    "batch": images(),
    "perturbation": ZERO,
    "epsilon": 0.1,
    "groups": 2,
    "clean": 1,
    "clean_fraction": 0.5,
    "ratio": 1.0,
    "rho": 0.1,
    "remainder": "error",
    "microbatches": 1,
    "rule": sign_perturbation,
    "rows": None,
    "autocast_dtype": None,
    "loss_scale": 2.0,
    "stats": PROXY.stats,
    "grads": PROXY.grads,
    "eps": 1e-5,
    "layers": ZERO,
    "generator": torch.Generator(),
    "previous": ZERO,
    "current": ZERO,
    "steps": 2,
    "step_size": 0.5,
    "function": lambda p: (p["8.bias"].sum(), None),
}
CALLABLE, NOTHING, NUMBER = {"a module", "a class", "a function"}, {"None"}, {"a number"}
# Which kinds of `JUNK` are none, by argument, and for some functions alone.
TAKEN: dict[str, set[str]] = {
    "loss_fn": CALLABLE,
    "rule": CALLABLE,
    "rows": NOTHING | CALLABLE,
    "autocast_dtype": NOTHING,
    "generator": NOTHING,
    "loss_scale": NOTHING | NUMBER,
    "rho": NUMBER,
    "eps": NUMBER,
    "step_size": NOTHING | NUMBER,
    "function": {"a module", "a class"},  # what these raise, called with params, is their own
    "APART.model": {"a module"},
    "APART.rule": NOTHING,
    "split_state.model": {"a module"},
    "Settings.clean_fraction": NUMBER,
    "ApartStep.epsilon": NOTHING,
    "ApartStep.perturbation": NOTHING,
    "OnePassStep.epsilon": NOTHING,
}
STEPS = {
    "ApartStep": make_apart_step(MODEL, F.cross_entropy),
    "OnePassStep": make_one_pass_step(MODEL, F.cross_entropy, epsilon=0.1, groups=2),
}


def one_pass_context(**arguments: Any) -> None:
    with APART(MODEL, groups=2).one_pass(**arguments):
        pass


# Where a function is no function of that name.
OTHERS: dict[str, Callable[..., Any]] = {
    "APART.set_epsilon": lambda epsilon: APART(MODEL).set_epsilon(epsilon),
    "APART.one_pass": one_pass_context,
    "FunctionalModel": lambda params, buffers: FMODEL(params, buffers, images()[0]),
    **STEPS,
}
NAMES = """
APART APART.set_epsilon APART.one_pass functionalize FunctionalModel split_state load_state_ assign_grads_
make_apart_step make_apart_sam_step make_one_pass_step Settings ApartStep OnePassStep init_perturbation proxy_pass
adversarial_pass mixed_pass random_signs clean_stat_grads sam_ascent grad_and_value
perturbed_stats
"""


def arguments_of(name: str) -> dict[str, Any]:
    """Arguments of a function that are right."""
    original = getattr(apart_func, name.partition(".")[0])
    if "." in name:
        original = getattr(original, name.partition(".")[2])
    elif name in OTHERS:
        original = original.__call__
    taken = inspect.signature(original).parameters.values()
    known = {p.name for p in taken if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    # of another library's type, records, flags, and inputs of a model
    unchecked = {"self", "process_group", "precision", "accumulate", "stat_grads", "training"}
    if name == "clean_stat_grads":
        return {"stat_grads": MIXED.stat_grads, "clean": 1}
    assert known <= VALUES.keys() | unchecked, f"{name} takes {sorted(known - VALUES.keys())}"
    return {argument: VALUES[argument] for argument in VALUES if argument in known}


CALLS = {name: (OTHERS.get(name, getattr(apart_func, name, None)), arguments_of(name)) for name in NAMES.split()}


@pytest.mark.parametrize("name", CALLS)
def test_the_arguments_that_are_right_are_taken(name: str) -> None:
    """So that the test below is about the one argument that it changes."""
    function, arguments = CALLS[name]
    function(**arguments)


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ApartError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, (_, arguments) in CALLS.items() for a in arguments])
def test_an_argument_of_the_wrong_type_is_refused(name: str, argument: str) -> None:
    function, arguments = CALLS[name]
    wrong = JUNK.keys() - TAKEN.get(argument, set()) - TAKEN.get(f"{name}.{argument}", set())
    before = {key: tensor.clone() for key, tensor in MODEL.state_dict().items()}
    said = {kind: refusal(partial(function, **{**arguments, argument: JUNK[kind]})) for kind in wrong}
    assert {kind: text for kind, text in said.items() if len(text) <= 20} == {}
    torch.testing.assert_close(dict(MODEL.state_dict()), before, rtol=0, atol=0)


# What is public and has no place above, with the reason.
ELSEWHERE = {
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
