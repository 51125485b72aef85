"""Steps, functional models and models inside a context are values: copied, pickled, sent away, and used at once."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import STEPS, more_of
from loops import both_passes, gradients
from small import convolutional, images
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map

from apart_func import (
    APART,
    FunctionalModel,
    functionalize,
    make_apart_step,
    make_one_pass_step,
    random_sign_perturbation,
    split_state,
)

BATCH = images()


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# Steps.

KINDS: dict[str, Callable[[nn.Module], Any]] = STEPS | {
    "other settings": lambda model: make_apart_step(
        model, nn.CrossEntropyLoss(label_smoothing=0.1), epsilon=torch.tensor(0.2), autocast_dtype=torch.bfloat16
    ),
    "of a functional model": lambda model: make_apart_step(functionalize(model), F.cross_entropy, rows="interleaved"),
}
every_step = pytest.mark.parametrize("kind", KINDS)


def model_of(seed: int = 0) -> nn.Module:
    model = convolutional()
    model[4] = BatchNormAct2d(5, apply_act=False).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def taken(kind: str, step: Any, model: nn.Module, batch: Any = BATCH) -> dict[str, Any]:
    found: dict[str, Any] = step(*split_state(model), batch, *more_of(kind, model))._asdict()
    return found


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())


@every_step
@every_copy
def test_a_copy_of_a_step_takes_the_same_step_before_and_after_the_original_was_used(copied, kind):
    model = model_of()
    step = KINDS[kind](model)
    early = copied(step)
    expected = taken(kind, step, model)
    late = copied(step)
    del step
    for other in (early, late, copied(late)):
        assert_equal(taken(kind, other, model), expected)
        assert repr(other) == repr(late)


@every_copy
def test_a_copy_of_a_functional_model_computes_the_same(copied: Callable[[Any], Any]) -> None:
    model = model_of()
    fmodel = functionalize(model)
    again: FunctionalModel = copied(fmodel)
    assert again.layers == fmodel.layers == {"1": 4, "4": 5}
    for training in (False, True):
        one, other = (each(*split_state(model), BATCH[0], training=training) for each in (fmodel, again))
        assert_equal(other, one)


def on_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    steps, models = torch.load(folder / "sent.pt", weights_only=False)
    torch.save({kind: taken(kind, step, models[kind]) for kind, step in steps.items()}, folder / "returned.pt")


@pytest.mark.slow
def test_steps_can_be_sent_to_a_spawned_worker(tmp_path: Path) -> None:
    models = {kind: model_of() for kind in KINDS}
    steps = {kind: make(models[kind]) for kind, make in KINDS.items()}
    torch.save((steps, models), tmp_path / "sent.pt")
    spawn(on_worker, (tmp_path,), nprocs=1)
    for kind, found in torch.load(tmp_path / "returned.pt", weights_only=False).items():
        assert_equal(found, taken(kind, steps[kind], models[kind]))


def test_a_step_says_what_it_does() -> None:
    step = make_apart_step(convolutional(), F.cross_entropy, epsilon=0.2, groups=4, rule=random_sign_perturbation)
    one_pass = make_one_pass_step(convolutional(), F.cross_entropy, epsilon=0.1, groups=2)
    assert repr(step) == (
        "ApartStep(FunctionalModel(Sequential, 2 batch-norm layers), cross_entropy, "
        "epsilon=0.2, groups=4, rule=random_sign_perturbation)"
    )
    assert repr(one_pass) == (
        "OnePassStep(FunctionalModel(Sequential, 2 batch-norm layers), cross_entropy, "
        "epsilon=0.1, groups=2, rule=random_sign_perturbation)"
    )
    assert repr(APART(convolutional(), 0.2, 4)) == "APART(Sequential, 2 batch-norm layers, epsilon=0.2, groups=4)"
    assert repr(functionalize(convolutional()[:3])) == "FunctionalModel(Sequential, 1 batch-norm layer)"
    assert step.settings.groups == 4
    assert type(step).__call__.__doc__


# Threads.


def at_once(works: list[Callable[[], Any]], times: int = 8) -> list[list[Any]]:
    """Results of several functions that threads call over and over at the same time; an error is a result."""
    start = threading.Barrier(len(works))
    results: list[list[Any]] = [[] for _ in works]

    def run(work: Callable[[], Any], into: list[Any]) -> None:
        start.wait()
        for _ in range(times):
            try:
                into.append(work())
            except Exception as error:
                into.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(works, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("kind", STEPS)
def test_several_threads_take_steps_at_once_each_with_a_state_and_batch_of_its_own(kind: str) -> None:
    step = STEPS[kind](model_of())
    models = [model_of(seed) for seed in range(4)]
    batches = [images(samples, seed=samples) for samples in (8, 16, 8, 24)]
    pairs = list(zip(models, batches, strict=True))
    expected = [taken(kind, step, *pair) for pair in pairs]
    found = at_once([lambda pair=pair: taken(kind, step, *pair) for pair in pairs])
    for of_thread, one in zip(found, expected, strict=True):
        for out in of_thread:
            assert_equal(out, one)


def test_one_thread_that_evaluates_and_one_that_fails_disturb_no_other() -> None:
    model = model_of()
    step, state = make_apart_step(model, F.cross_entropy, groups=4), split_state(model)
    expected, evaluated = step(*state, BATCH), step.fmodel(*state, BATCH[0])
    steps, evaluations, failures, others = at_once(
        [
            lambda: step(*state, BATCH),
            lambda: step.fmodel(*state, BATCH[0]),
            lambda: step(*state, images(7)),  # 4 groups of 7
            lambda: step(*state, BATCH),
        ]
    )
    for out in steps + others:
        assert_equal(out._asdict(), expected._asdict())
    for output in evaluations:
        assert_equal(output, evaluated)
    assert {type(error).__name__ for error in failures} == {"BatchError"}


def test_a_model_may_be_changed_while_a_thread_steps() -> None:
    """The step takes tensors from its arguments, and looks at nothing of a model while it runs."""
    model = model_of()
    state = tree_map(torch.clone, split_state(model))
    step = make_apart_step(model, F.cross_entropy, groups=4)
    expected = step(*state, BATCH).grads

    def meddle() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()

    found, _ = at_once([lambda: step(*state, BATCH).grads, meddle])
    for grads in found:
        assert_equal(grads, expected)


# Modes, at each call.

CONTEXTS: dict[str, Callable[[APART], AbstractContextManager[None]]] = {
    "to_proxy": lambda apart: apart.to_proxy(),
    "to_adver": lambda apart: apart.to_adver(),
    "one_pass": lambda apart: apart.one_pass(),
}
every_context = pytest.mark.parametrize("context", CONTEXTS)


def opened(apart: APART, context: str) -> AbstractContextManager[None]:
    """A context of an object that has what it needs there."""
    if context == "to_adver":
        with apart.to_proxy():
            F.cross_entropy(apart.model(BATCH[0]), BATCH[1]).backward()
    return CONTEXTS[context](apart)


@every_context
def test_one_layer_that_is_frozen_inside_a_context_is_plain_and_the_others_are_not(context: str) -> None:
    model = model_of()
    apart = APART(model, epsilon=0.5, groups=4)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("1", "4"):
        model.get_submodule(name).register_forward_hook(
            lambda layer, inputs, output, name=name: seen.update({name: (inputs[0].detach(), output.detach().clone())})
        )
    with opened(apart, context):
        model[1].eval()
        F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        x, y = seen["1"]
        running = model[1].running_mean, model[1].running_var
        assert_equal(y, F.batch_norm(x, *running, model[1].weight, model[1].bias).detach())
        assert model[1].num_batches_tracked == (1 if context == "to_adver" else 0)
        x, y = seen["4"]
        assert not torch.allclose(y, F.batch_norm(x, model[4].running_mean, model[4].running_var))


class Freezing(nn.Module):
    """Puts one of its layers in evaluation mode in the middle of its forward, as fine-tuning recipes do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = model_of()

    def forward(self, x: Tensor) -> Tensor:
        self.body[1].eval()
        return self.body(x)


@pytest.mark.parametrize("kind", ["two passes", "one pass"])
def test_a_layer_that_the_forward_freezes_is_one_that_was_never_in_training_mode(kind: str) -> None:
    freezing, frozen = Freezing(), Freezing()
    frozen.body[1].eval()
    step = STEPS[kind](freezing)
    more = [{"body.4": given["body.4"]} for given in more_of(kind, freezing)]
    expected = STEPS[kind](frozen)(*split_state(frozen), BATCH, *more)._asdict()
    for _ in range(2):
        found = taken(kind, step, freezing)
        for field in ("loss", "adversarial_loss", "grads", "buffers", "stats"):
            assert_equal(found[field], expected[field])
        assert_equal(found["perturbation"]["body.4"], expected["perturbation"]["body.4"])
    assert freezing.body[1].training  # the user's own layer was never run


# Copies of a model that is inside a context.


def averaged(model: nn.Module) -> nn.Module:
    twin: nn.Module = AveragedModel(model).module
    return twin


@every_context
@pytest.mark.parametrize("copied", [*COPIES.values(), averaged], ids=[*COPIES, "AveragedModel"])
def test_a_copy_made_inside_a_context_is_a_model_of_its_own(copied, context):
    model, reference = model_of(), model_of()
    for each in (model, reference):
        torch.manual_seed(0)
        apart = APART(each, epsilon=0.5, groups=4)
        with opened(apart, context):
            F.cross_entropy(each(BATCH[0]), BATCH[1]).backward()
            state = {name: tensor.clone() for name, tensor in each.state_dict().items()}
            if each is model:
                twin = copied(model)
                plain = model_of()
                plain.load_state_dict(state)
                for _ in range(2):  # inside, of whatever the context does nothing is left in it
                    assert_equal(twin(BATCH[0]), plain(BATCH[0]))
                assert_equal(dict(twin.state_dict()), dict(plain.state_dict()))
                assert_equal(dict(model.state_dict()), state)
                with torch.no_grad():
                    for parameter in twin.parameters():
                        parameter.zero_()
                assert not twin(BATCH[0]).any()
        if each is model:
            found = gradients(model), apart.stats, apart.perturbation
    assert_equal(found, (gradients(reference), apart.stats, apart.perturbation))
    assert all("forward" not in vars(module) for module in model.modules())
    for module in twin.modules():
        assert module.forward.__func__ is type(module).forward
        assert module.forward.__self__ is module


@every_context
def test_a_copy_made_inside_a_context_can_be_trained_by_contexts_of_its_own(context: str) -> None:
    model = model_of()
    with opened(APART(model, groups=4), context):
        F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        twin = copy.deepcopy(model)
        reference = model_of()
        reference.load_state_dict(model.state_dict())
        for each in (twin, reference):
            each.zero_grad()
            both_passes(APART(each, groups=4), BATCH)
        assert_equal(gradients(twin), gradients(reference))
        step = make_apart_step(twin, F.cross_entropy, groups=4)
    assert step(*split_state(twin), BATCH).all_finite
