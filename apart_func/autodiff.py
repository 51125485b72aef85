"""Gradients with respect to dicts of tensors, eagerly or under a transform.

`torch.func.grad` always records a graph for second derivatives, which costs an eager step memory and time.
So where neither a `torch.func` transform nor a compiler is active, gradients come from `torch.autograd.grad` on
fresh leaves, and from `torch.func.grad_and_value` otherwise. `differentiate` is the one place that decides.
"""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apart_func._torch import is_compiling, is_traced, unwrapped
from apart_func.errors import UsageError
from apart_func.trees import Tensors, check_by_name, tensors_of, with_tensors


class Opened(NamedTuple):
    """A computation between its forward and its backward.

    Attributes:
        loss: what is differentiated, 0-d.
        aux: further results.
        taps: tensors that were made during the forward and are differentiated by as well. Only an eager one can have
            them, since a transform differentiates by arguments.
        trusted: tensors whose graph is known to have no parameters but the arguments; see `_check_graph`.
    """

    loss: Tensor
    aux: Any = None
    taps: Sequence[Tensor] = ()
    trusted: Sequence[Tensor] = ()


class Gradient(NamedTuple):
    """What differentiating returns. Gradients of an eager computation are detached; its further results are not.

    Attributes:
        grads: a dict for each argument, zero where the loss does not depend on the tensor.
        loss: the value.
        aux: the further results.
        tap_grads: a gradient for every tap.
    """

    grads: tuple[dict[Any, Any], ...]
    loss: Tensor
    aux: Any
    tap_grads: list[Tensor]


# A computation takes dicts of tensors and `finish`, to which it hands what it has opened, and returns what comes back.
# So all that its forward needed is still in place while layers run again during the backward (checkpointing).
Computation = Callable[..., Any]


def differentiate(compute: Computation, *inputs: Mapping[str, Any]) -> Gradient:
    """Differentiate a computation with respect to every tensor in some dicts of tensors, or of tuples of them.

    Raises:
        UsageError: the loss has no graph, depends on parameters that are not among the arguments, or saves tensors in
            a way that transforms do not allow.
    """
    return _under_transforms(compute, inputs) if is_traced() else _eagerly(compute, inputs)


def grad_and_value(
    function: Callable[[Tensors], tuple[Tensor, Any]], params: Mapping[str, Tensor]
) -> tuple[Tensors, Tensor, Any]:
    """The gradient of a function of parameters, as the passes take it: eagerly, under `torch.func`, or compiled.

    Args:
        function: `params -> (loss, aux)`, a 0-d loss and anything else.
        params: the tensors to differentiate by.

    Returns:
        The gradient, keyed as `params`; the loss, detached where the call is eager; and `aux`, as it is.

    Raises:
        UsageError: as `differentiate`.
    """
    if not callable(function):
        raise UsageError(f"function is a {type(function).__name__}; expected params -> (loss, aux).")
    check_by_name("params", params)

    def compute(trained: Tensors, finish: Callable[[Opened], Any]) -> Any:
        pair = function(trained)
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Tensor) and pair[0].dim() == 0):
            raise UsageError(f"function returned a {type(pair).__name__}; expected (loss, aux), with a 0-d loss.")
        return finish(Opened(*pair))

    (grads,), loss, aux, _ = differentiate(compute, params)
    return grads, loss, aux


def _eagerly(compute: Computation, inputs: Sequence[Mapping[str, Any]]) -> Gradient:
    leaves = [tensor.detach().requires_grad_() for tree in inputs for tensor in _leaves(tree)]

    def finish(opened: Opened) -> Gradient:
        loss, aux, taps, trusted = opened
        wanted = [*leaves, *taps]
        _check_graph(loss, leaves, trusted)
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        grads = [torch.zeros_like(tensor) if g is None else g for tensor, g in zip(wanted, found, strict=True)]
        return Gradient(_filled(inputs, grads), loss.detach(), aux, grads[len(leaves) :])

    with torch.enable_grad():
        gradient: Gradient = compute(*_filled(inputs, leaves), finish)
    return gradient


def _under_transforms(compute: Computation, inputs: Sequence[Mapping[str, Any]]) -> Gradient:
    structure: list[Any] = []

    def value(*trees: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        opened: Opened = compute(*trees, lambda opened: opened)
        structure.append(opened.aux)
        return opened.loss, tuple(tensors_of(opened.aux))

    differentiated = torch.func.grad_and_value(value, argnums=tuple(range(len(inputs))), has_aux=True)
    try:
        grads, (loss, leaves) = differentiated(*inputs)
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            raise UsageError(
                "the model checkpoints activations, or hooks saved tensors in another way, and under a torch.func "
                "transform that cannot be. Call the step without one, or switch checkpointing off."
            ) from error
        raise
    _check_closure(loss, inputs)
    return Gradient(grads, loss, with_tensors(structure.pop(), list(leaves)), [])


# torch's pytrees do the same for trees of any kind, and take longer: an eager step is Python where models are small.


def _leaves(tree: Mapping[str, Any]) -> Iterator[Tensor]:
    """The leaves of a dict of tensors, or of tuples of them."""
    for value in tree.values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from value


def _filled(trees: Sequence[Mapping[str, Any]], leaves: Iterable[Tensor]) -> tuple[dict[str, Any], ...]:
    """The same dicts with other leaves, in the order of `_leaves`."""
    left = iter(leaves)
    return tuple(
        {
            name: next(left) if isinstance(value, Tensor) else type(value)(*(next(left) for _ in value))
            for name, value in tree.items()
        }
        for tree in trees
    )


class ForeignParametersError(UsageError):
    """A loss depends on parameters that are none of its arguments.

    Attributes:
        parameters: these.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        super().__init__(self.message([f"of shape {tuple(p.shape)}" for p in parameters]))

    def message(self, names: Sequence[str]) -> str:
        """What to say, once the parameters have names."""
        return (
            f"the loss depends on parameters that are not in params: {', '.join(map(repr, names))}, which something "
            "reaches past the arguments (a loss or a hook that closes over model.parameters(), a replaced forward, a "
            "criterion with parameters of its own). They would get no gradient. Compute such terms inside the model's "
            "forward, where its attributes are the arguments, or add their gradient to out.grads."
        )


def _check_graph(loss: Tensor, leaves: Sequence[Tensor], trusted: Sequence[Tensor]) -> None:
    """Make sure that a loss has a gradient, and that it is one by the leaves alone."""
    if not loss.requires_grad:
        raise UsageError(
            "the loss has no graph: it does not depend on any parameter in a way that can be differentiated. Do not "
            "detach the output, compute without no_grad, and return a tensor that the model's output went into."
        )
    own = {id(leaf) for leaf in leaves}
    graph = _graph_leaves(loss, {tensor.grad_fn for tensor in trusted})
    foreign = [leaf for leaf in graph if isinstance(leaf, nn.Parameter) and id(leaf) not in own]
    if foreign:
        raise ForeignParametersError(foreign)


def _check_closure(loss: Tensor, inputs: Sequence[Mapping[str, Any]]) -> None:
    """`_check_graph` for the graph around a transform: of leaves that no transform differentiates by."""
    if is_compiling() or not torch.is_grad_enabled():
        return
    own = {id(unwrapped(leaf)) for tree in inputs for leaf in _leaves(tree)}
    plain = unwrapped(loss)
    foreign = [leaf for leaf in _graph_leaves(plain) if isinstance(leaf, nn.Parameter) and id(leaf) not in own]
    if foreign:
        raise ForeignParametersError(foreign)


def _graph_leaves(loss: Tensor, left_out: Iterable[Any] = ()) -> Iterator[Tensor]:
    """The leaves of the graph of a tensor that are differentiated by, without those that some nodes lead to."""
    if loss.grad_fn is None:
        if loss.requires_grad:
            yield loss
        return
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = {loss.grad_fn, None, *left_out}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node in seen:
                continue
            seen.add(node)
            if node.next_functions:
                waiting.append(node)
            elif hasattr(node, "variable"):
                yield node.variable
