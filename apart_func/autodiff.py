"""Gradients with respect to dicts of tensors, eagerly or under a transform.

`torch.func.grad` always records a graph for second derivatives, which costs an eager step memory and time. So if
neither a `torch.func` transform nor a compiler is active, gradients are those that `backward()` leaves in fresh leaves,
and otherwise they come from `torch.func.grad`.
"""

from __future__ import annotations  # Dynamo of old versions traces those of inner functions

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apart_func._torch import is_compiling, is_concrete, is_differentiated, is_traced, register_tree, unwrapped
from apart_func.errors import StateError, UsageError
from apart_func.trees import Tensors, check_named_tensors, detached, tensors_of, with_tensors

# A computation takes dicts of tensors and `backward`, which it calls with a 0-d loss and further results, and whose
# result it returns: gradients by each dict, and those further results. So all that its forward needed is in place while
# layers run again in the backward (checkpointing).
Computation = Callable[..., Any]
Gradients = tuple[tuple[dict[Any, Any], ...], Any]


def grad_and_value(
    function: Callable[[Tensors], tuple[Tensor, Any]], params: Mapping[str, Tensor]
) -> tuple[Tensors, Tensor, Any]:
    """Differentiate a function of parameters as the passes do: eagerly, under `torch.func`, or compiled.

    Args:
        function: `params -> (loss, aux)`, a 0-d loss and anything else.
        params: the tensors to differentiate by.

    Returns:
        The gradient, keyed as `params`; the loss, detached if the call is eager; and `aux`, as it is.

    Raises:
        UsageError: the loss has no graph, depends on parameters that are not among the arguments, or saves tensors in
            a way that transforms do not allow.
    """
    if not callable(function):
        raise UsageError(f"function is a {type(function).__name__}; expected params -> (loss, aux).")
    check_named_tensors("params", params)

    def compute(trained: Tensors, *others: Any) -> Any:
        (backward,) = others
        pair = function(trained)
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Tensor) and pair[0].dim() == 0):
            raise UsageError(f"function returned a {type(pair).__name__}; expected (loss, aux), with a 0-d loss.")
        return backward(pair[0], (detach_if_eager(pair[0]), pair[1]))

    (grads,), (loss, aux) = gradients(compute, (params,))
    return grads, loss, aux


class Proof:
    """Whether a computation has been seen to leave its arguments alone: until then, an eager one gets copies."""

    is_given = False


def _shape_of(parameter: Tensor) -> str:
    return f"one of shape {tuple(parameter.shape)}"


def gradients(
    compute: Computation,
    inputs: Sequence[Mapping[str, Any]],
    name_of: Callable[[nn.Parameter], str] = _shape_of,
    proof: Proof | None = None,
) -> Gradients:
    """Differentiate a computation by dicts of tensors, or of tuples of them; a gradient is zero if nothing reaches it.

    Args:
        compute: the computation.
        inputs: its dicts. An eager one gets fresh leaves on their memory, which it must not rewrite.
        name_of: what an error calls a parameter that the loss depends on, and that is no input.
        proof: of the computation.
    """
    if is_traced():
        return _under_transforms(compute, inputs, name_of)
    names, given = zip(*((name, leaf.detach()) for tree in inputs for name, leaf in _leaves(tree)), strict=True)
    tensors = given
    if proof is not None and not proof.is_given:  # copies: what rewrites them is refused all the same
        tensors = tuple(tensor.clone() for tensor in given)
    leaves = [LentLeaf(tensor) if type(tensor) is Tensor else tensor.requires_grad_() for tensor in tensors]
    versions = [leaf._version for leaf in leaves]
    trees = _filled(inputs, leaves)

    def backward(loss: Tensor, aux: Any) -> Gradients:
        for name, leaf, version, lent in zip(names, leaves, versions, given, strict=True):
            if _is_rewritten(leaf, version) or (given is not tensors and _differs(leaf.detach(), lent)):
                raise StateError(
                    f"the forward rewrites {name!r}, which is trained, in place (as max_norm of an embedding, a norm "
                    "that is forced on weights, or p.data = ... do). In a step that is a function, parameters are "
                    "moved by the optimizer alone. Do this after the optimizer's step, or compute the changed value in "
                    "the forward, as a parametrization does."
                )
        if not loss.requires_grad:
            raise UsageError(
                "the loss has no graph: it does not depend on any parameter in a way that can be differentiated. Do "
                "not detach the output, compute without no_grad, and return a tensor that the model's output went into."
            )
        _check_foreign(loss, leaves, name_of)
        # As in plain training: a gradient owns its memory, is dense or sparse, and a backward inside of this one, as
        # of a reversible block, adds to it.
        torch.autograd.backward(loss, inputs=leaves)
        return _filled(trees, [_unreached(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]), aux

    with torch.enable_grad():
        found: Gradients = compute(*trees, backward)
    if proof is not None:
        proof.is_given = True
    return found


def detach_if_eager(tree: Any) -> Any:
    """Return a tree, cut from its graph if no transform or compiler sees it."""
    return tree if is_traced() else detached(tree)


class LentLeaf(nn.Parameter):
    """A tensor of the caller's that a forward may read, and not rewrite.

    `.data` would let it write without a trace, so that is a copy here.
    """

    def __new__(cls, tensor: Tensor) -> LentLeaf:
        """Make a leaf on the memory of a tensor."""
        return super().__new__(cls, tensor, requires_grad=True)

    @property
    def data(self) -> Tensor:
        """A copy."""
        copy = self.detach().clone()
        vars(self).setdefault("copies", []).append(copy)
        return copy

    @data.setter
    def data(self, value: Tensor) -> None:
        vars(self)["replaced"] = True


def _is_rewritten(leaf: Tensor, version: int) -> bool:
    """Return whether somebody has written to a leaf since it had a version, or to a copy that its `.data` gave."""
    seen = vars(leaf)
    return leaf._version != version or "replaced" in seen or any(copy._version for copy in seen.get("copies", ()))


def _differs(copy: Tensor, original: Tensor) -> bool:
    """Return whether a copy has other values, as after writing to its memory by numpy or `view.data`; NaN is equal."""
    is_readable = is_concrete(copy) and copy.device.type == "cpu"  # without waiting for a device
    return is_readable and bool(((copy != original) & (original == original)).any())


def is_unreached(grad: Tensor) -> bool:
    """Return whether an eager step has seen that the loss does not reach the parameter of a gradient.

    Plain PyTorch leaves the `.grad` of such a parameter at None, which optimizers skip; here it is a zero with a mark.
    """
    return getattr(grad, "is_unreached", False)


def _unreached(leaf: Tensor) -> Tensor:
    zero = torch.zeros_like(leaf, requires_grad=False)
    zero.is_unreached = True  # type: ignore[attr-defined]  # a tensor takes attributes
    return zero


class _Carried:
    """Results of any kind, as a tree of the tensors in them: a transform takes nothing else out of a computation."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree


register_tree(
    _Carried,
    lambda carried: (tensors_of(carried.tree), carried.tree),
    lambda tensors, tree: _Carried(with_tensors(tree, list(tensors))),
)


def _under_transforms(
    compute: Computation, inputs: Sequence[Mapping[str, Any]], name_of: Callable[[nn.Parameter], str]
) -> Gradients:
    """Differentiate a computation by `torch.func`."""

    def value(*trees: Any) -> tuple[Tensor, _Carried]:
        pair: tuple[Tensor, _Carried] = compute(*trees, lambda loss, aux: (loss, _Carried((loss, aux))))
        return pair

    if not is_differentiated():  # nothing that comes out of an eager step or a vmap has a graph
        inputs = [_filled([tree], [leaf.detach() for _, leaf in _leaves(tree)])[0] for tree in inputs]
    differentiated = torch.func.grad(value, argnums=tuple(range(len(inputs))), has_aux=True)
    try:
        with torch.enable_grad():  # so that a loss which reaches past the arguments is seen
            grads, carried = differentiated(*inputs)
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            raise UsageError(
                "the model checkpoints activations, or hooks saved tensors in another way, and under a torch.func "
                "transform that cannot be. Call the step without one, or switch checkpointing off."
            ) from error
        raise
    loss, aux = carried.tree
    leaves = [leaf for tree in inputs for _, leaf in _leaves(tree)]
    if not is_compiling():
        _check_foreign(unwrapped(loss), [unwrapped(leaf) for leaf in leaves], name_of)
    elif loss.requires_grad and not any(leaf.requires_grad for leaf in leaves):
        raise _foreign_parameters("")  # no argument is differentiated by, so there should be no graph, and there is one
    return grads, aux


# torch's pytrees do the same for trees of any kind, and take longer: an eager step is Python where models are small.


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the leaves of a dict of tensors, or of tuples of them, by name."""
    for name, value in tree.items():
        for leaf in (value,) if isinstance(value, Tensor) else value:
            yield name, leaf


def _filled(trees: Sequence[Mapping[str, Any]], leaves: Iterable[Tensor]) -> tuple[dict[str, Any], ...]:
    """Return the same dicts with other leaves, in the order of `_leaves`."""
    left = iter(leaves)
    return tuple(
        {
            name: next(left) if isinstance(value, Tensor) else type(value)(*(next(left) for _ in value))
            for name, value in tree.items()
        }
        for tree in trees
    )


def _foreign_parameters(names: str) -> UsageError:
    return UsageError(
        f"the loss depends on parameters that are not in params{names}, which something reaches past the arguments (a "
        "loss or a hook that closes over model.parameters(), a replaced forward, a criterion with parameters of its "
        "own). They would get no gradient. If they need none here, as those of a discriminator, say "
        "requires_grad_(False); else compute such terms inside the model's forward, where its attributes are the "
        "arguments, or add their gradient to out.grads."
    )


def _check_foreign(loss: Tensor, leaves: Sequence[Tensor], name_of: Callable[[nn.Parameter], str]) -> None:
    """Raise a UsageError if a parameter that is no leaf of ours is in the graph of a loss."""
    own = set(map(id, leaves))
    foreign = [leaf for leaf in _graph_leaves(loss) if isinstance(leaf, nn.Parameter) and id(leaf) not in own]
    if foreign:
        raise _foreign_parameters(": " + ", ".join(repr(name_of(parameter)) for parameter in foreign))


def _graph_leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of the graph of a tensor that are differentiated by."""
    if loss.grad_fn is None:
        if loss.requires_grad:
            yield loss
        return
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = {loss.grad_fn, None}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node in seen:
                continue
            seen.add(node)
            if node.next_functions:
                waiting.append(node)
            elif hasattr(node, "variable"):
                yield node.variable
