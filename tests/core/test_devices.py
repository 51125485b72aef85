"""Every form of a step on a device that is no CPU, without having one: where its outputs are, and of what dtype."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import FORMS, grads_of, make
from pretend_device import DEVICE, is_available, move_, moved, on_device
from small import convolutional, images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from apart_func import functionalize, split_state

pytestmark = pytest.mark.skipif(not is_available(), reason="PyTorch before 2.10: Python cannot make a device")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def described(tree: Any) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    leaves, _ = tree_flatten_with_path(tree)
    return [(str(path), tuple(leaf.shape), leaf.dtype) for path, leaf in leaves if isinstance(leaf, Tensor)]


def devices_of(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def outputs(form: str, dtype: torch.dtype, pretended: bool) -> Any:
    model, (x, y) = convolutional(dtype=dtype), images(dtype=dtype)
    with FakeTensorMode() if pretended else nullcontext():
        if pretended:
            model, x, y = move_(model), moved(x), moved(y)
        return make(form, model)((x, y)), model.state_dict()


def on_a_device(form: str, dtype: torch.dtype) -> tuple[set[str], Any]:
    out = outputs(form, dtype, pretended=True)
    return devices_of(out), described(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_output_is_on_the_models_device_with_the_shape_and_dtype_that_it_has_on_a_cpu(form, dtype):
    devices, found = on_device(on_a_device, form, dtype)
    assert devices == {DEVICE}
    assert found == described(outputs(form, dtype, pretended=False))


def layouts_of_gradients(form: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Strides of the gradients of a channels_last model: of the step, and of plain training."""
    model, (x, y) = (
        convolutional(dtype=torch.float32).to(memory_format=torch.channels_last),
        images(dtype=torch.float32),
    )
    x = x.to(memory_format=torch.channels_last)
    with FakeTensorMode():
        model, x, y = move_(model), moved(x), moved(y)
        grads = grads_of(make(form, model)((x, y)))
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        params = dict(model.named_parameters())
    return [grads[name].stride() for name in params], [parameter.grad.stride() for parameter in params.values()]


@pytest.mark.parametrize("form", ["two passes", "one pass"])
def test_gradients_have_the_layout_that_plain_training_gives_them(form):
    mine, plain = on_device(layouts_of_gradients, form)
    assert mine == plain


def make_the_host_wait() -> bool:
    with FakeTensorMode():
        return bool(torch.ones((), device=DEVICE) > 0)


def mix_devices() -> Tensor:
    with FakeTensorMode():
        return torch.ones(2, device=DEVICE) + torch.ones(2)


@pytest.mark.parametrize(
    ("mistake", "error"),
    [(make_the_host_wait, "DataDependentOutputException"), (mix_devices, "FakeTensorDeviceMismatchError")],
)
def test_a_step_with_such_a_mistake_would_fail_here(mistake, error):
    with pytest.raises(RuntimeError, match=error):
        on_device(mistake)


def test_the_forward_of_the_functional_model_stays_on_cuda():
    model, (x, _) = convolutional(dtype=torch.bfloat16), images(dtype=torch.bfloat16)
    fmodel, state = functionalize(model), split_state(model)
    with FakeTensorMode(), torch.no_grad():
        params, buffers, x = tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), (*state, x))
        out = fmodel(params, buffers, x)
    assert devices_of(out) == {"cuda"}
    assert {leaf.dtype for leaf in tree_leaves(out)} == {torch.bfloat16}
