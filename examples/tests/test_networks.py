"""The networks that can be asked for by name: their published sizes, what they fit, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from experiments.datasets import DataSet, InMemory
from experiments.networks import ANY_WIDTH, NetworkError, drop_features, make_network
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

IMAGES = ("small_resnet", "mnist_resnet", "preact_resnet18", "wideresnet40_2", "resnet18", "resnet50")


def data_of(*sample_shape: int, classes: int = 10) -> DataSet:
    """A data set of one sample."""
    split = InMemory(torch.zeros(1, *sample_shape), torch.zeros(1, dtype=torch.int64))
    return DataSet("data", classes, sample_shape, split, None, split, torch.zeros(1), torch.ones(1))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("name", "classes", "count", "batch_norms"),
    [
        ("wideresnet40_2", 10, 2_243_546, 37),  # 2.2 M in arXiv 1605.07146
        ("wideresnet40_2", 100, 2_255_156, 37),
        ("wideresnet16_2", 10, 691_674, 13),  # 0.7 M
        ("wideresnet40_1", 10, 563_930, 37),  # 0.6 M
        ("wideresnet28_10", 10, 36_479_194, 25),  # 36.5 M
        ("preact_resnet18", 10, 11_171_274, 17),  # 11.2 M
        ("preact_resnet18", 100, 11_217_444, 17),
        ("resnet18", 10, 11_173_962, 20),
        ("resnet18", 100, 11_220_132, 20),
        ("resnet50", 10, 23_520_842, 53),
        ("small_resnet", 10, 5_266, 6),
        ("cifar_resnet", 10, 78_042, 9),
    ],
)
def test_networks_for_cifar_have_the_published_size(name, classes, count, batch_norms):
    model = make_network(name, data_of(3, 32, 32, classes=classes))
    assert parameters(model) == count
    assert sum(isinstance(module, _BatchNorm) for module in model.modules()) == batch_norms


def test_the_depth_is_that_of_the_name():
    """Wide networks count all convolutions; the others those of 3 × 3, without shortcuts, and the classifier."""
    wide, preact = (
        convolutions(make_network(name, data_of(3, 32, 32))) for name in ("wideresnet40_2", "preact_resnet18")
    )
    assert len(wide) == 40
    assert sum(module.kernel_size == (3, 3) for module in preact) + 1 == 18


def test_the_stem_of_mnist_resnet_halves_the_images_and_each_later_stage_again():
    model = make_network("mnist_resnet", data_of(1, 28, 28))
    sizes = []
    for stage in (model.stem, *model.stages):
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.zeros(2, 1, 28, 28))
    assert sizes == [(16, 14, 14), (16, 14, 14), (32, 7, 7), (64, 4, 4)]


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_networks_give_a_score_for_every_class_and_every_parameter_takes_part(name, shape):
    model = make_network(name, data_of(*shape, classes=7))
    assert model.training
    scores = model(torch.randn(2, *shape))
    assert scores.shape == (2, 7)
    scores.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "last"), [("preact_resnet18", 4), ("wideresnet40_2", 8), ("resnet18", 4), ("resnet50", 4)]
)
def test_cifar_forms_keep_the_resolution_in_their_stem(name, last):
    """The first convolution sees and gives 32 × 32 positions; the last one gives the stated few."""
    model = make_network(name, data_of(3, 32, 32))
    sizes: list[int] = []
    for module in convolutions(model):
        module.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    model(torch.randn(2, 3, 32, 32))
    assert sizes[0] == 32
    assert sizes[-1] == last


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("side", "kernel"), [(64, 3), (65, 7), (224, 7)])
def test_torchvision_networks_have_the_stem_for_small_images_up_to_64_pixels(name, side, kernel):
    model = make_network(name, data_of(3, side, side))
    assert model.conv1.kernel_size == (kernel, kernel)
    assert isinstance(model.maxpool, nn.Identity) == (kernel == 3)


def test_preactivation_normalises_after_the_stem_and_before_every_other_convolution():
    """Scaling what a block receives scales what its shortcut passes on, and leaves its residual alone."""
    model = make_network("preact_resnet18", data_of(3, 32, 32), width=4)
    assert [type(module) for module in model.stem] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.head)
    block = model.blocks[1]
    assert block.adapt is None
    x = torch.randn(8, 4, 8, 8)
    torch.testing.assert_close(block(3 * x) - 3 * x, block(x) - x, rtol=1e-3, atol=1e-4)  # ε of batch norm
    wide = model.blocks[2]
    torch.testing.assert_close(wide(3 * x), wide(x), rtol=1e-3, atol=1e-4)  # its shortcut is adapted after batch norm


HE, PYTORCH = 2.0, 1 / 3  # variance of a weight, times the inputs of an output, where these are the outputs of an input


@pytest.mark.parametrize(("name", "scale"), [("preact_resnet18", PYTORCH), ("wideresnet40_2", HE), ("resnet18", HE)])
def test_convolutions_start_from_the_published_weights(name, scale):
    torch.manual_seed(0)
    *_, last = (c for c in convolutions(make_network(name, data_of(3, 32, 32))) if c.kernel_size == (3, 3))
    assert last.in_channels == last.out_channels
    # 147,456 weights or more: four deviations of their variance are 1.5 %.
    assert last.weight.var().item() * last.weight[0].numel() == pytest.approx(scale, rel=0.015)


@pytest.mark.parametrize("name", ["preact_resnet18", "resnet18"])
def test_the_stem_for_small_images_starts_from_pytorch_s_weights(name):
    torch.manual_seed(0)
    stem, *_ = convolutions(make_network(name, data_of(3, 32, 32)))
    # 1728 weights: four deviations of their variance are 14 %. He's would be 0.28 times as large.
    assert stem.weight.var().item() * 27 == pytest.approx(PYTORCH, rel=0.14)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("small_resnet", (3, 8, 8)), ("mnist_resnet", (1, 28, 28)), ("preact_resnet18", (3, 8, 8))],
)
def test_the_width_is_that_of_the_first_stage(name, shape):
    model = make_network(name, data_of(*shape), width=6)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert first.out_channels == 6
    with pytest.raises(NetworkError, match="width is 0"):
        make_network(name, data_of(*shape), width=0)


@pytest.mark.parametrize("name", ["wideresnet40_2", "resnet18", "resnet26"])
def test_a_width_is_refused_where_the_name_settles_it(name):
    with pytest.raises(NetworkError, match=rf"{name} has a width of its own.*small_resnet, preact_resnet18"):
        make_network(name, data_of(3, 32, 32), width=8)


def test_a_network_that_no_machine_can_hold_is_refused_before_it_is_made():
    with pytest.raises(
        NetworkError, match=r"at width 1000000 the network has .* parameters, more than fit into memory"
    ):
        make_network("small_resnet", data_of(1, 8, 8), width=1_000_000)


@pytest.mark.parametrize("name", [*ANY_WIDTH, "wideresnet16_2", "resnet18"])
def test_the_default_generator_decides_the_weights(name):
    data = data_of(3, 32, 32)

    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(make_network(name, data).parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


# timm


def test_other_names_are_those_of_timm():
    model = make_network("mobilenetv3_small_050", data_of(1, 32, 32, classes=5)).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)


def test_a_pretrained_network_starts_from_its_weights_with_a_new_classifier():
    first, second = (make_network("efficientnet_lite0_imagenet", data_of(3, 64, 64, classes=5)) for _ in range(2))
    assert first(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    same = [name for name, value in first.state_dict().items() if torch.equal(value, second.state_dict()[name])]
    differing = set(first.state_dict()) - set(same)
    assert all("classifier" in name or "running" in name or "tracked" in name for name in differing)
    norms = [layer for layer in first.modules() if isinstance(layer, _BatchNorm)]
    assert {type(layer) for layer in norms} == {nn.BatchNorm2d}, "all methods know it"
    assert norms[0].running_mean.abs().max() > 0.1, "statistics are those of ImageNet, not those of a new layer"
    with pytest.raises(NetworkError, match="images of 3 channels, not 1"):
        make_network("efficientnet_lite0_imagenet", data_of(1, 64, 64))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("preact_resnet_18", "preact_resnet18"),
        ("wideresnet40_3", "wideresnet40_2"),
        ("efficientnetb0", "efficientnet_b0"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_near_ones(name, near):
    with pytest.raises(NetworkError, match=f"no network '{name}': did you mean .*{near}"):
        make_network(name, data_of(3, 32, 32))


def test_a_name_like_no_other_is_refused_with_those_that_are_here():
    with pytest.raises(NetworkError, match="choose one of small_resnet, preact_resnet18, mnist_resnet, cifar_resnet"):
        make_network("???", data_of(3, 32, 32))


def test_without_timm_its_names_are_refused_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert parameters(make_network("small_resnet", data_of(1, 8, 8))) == 5122
    with pytest.raises(NetworkError, match=r"'mobilenetv3_small_050' is none of .*need timm.*pip install timm"):
        make_network("mobilenetv3_small_050", data_of(3, 32, 32))


def test_dropout_drops_a_share_of_the_features_before_the_classifier_in_training_alone():
    """Of 2¹² features with dropout 0.25, a share of 0.25 ± 0.007 is dropped; six deviations either way pass."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4096, 1, bias=False))
    names = list(model.state_dict())
    drop_features(model, 0.25)
    classifier = model[1]
    nn.init.ones_(classifier.weight)
    assert list(model.state_dict()) == names
    assert torch.equal(model[0](torch.ones(1, 4)), nn.functional.linear(torch.ones(1, 4), *model[0].parameters()))
    kept = 0.75 * classifier(torch.ones(1, 4096)).item() / 4096  # what is kept is scaled by 1/0.75
    assert abs(kept - 0.75) < 0.042
    assert kept != 1
    assert classifier.eval()(torch.ones(1, 4096)).item() == 4096


def test_dropout_in_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(NetworkError, match="has none: leave it out"):
        drop_features(nn.Conv2d(3, 3, 1), 0.5)
