"""The models of the zoo: how to find and make them, each with a batch.

    for entry in entries("timm"):          # the smallest network of every module that has batch norm
        case = entry.make()                # a model in training mode, a batch, and a loss

None has weights that were trained. What is the same in all channels at first (γ, β, zeroed branches) is drawn at
random, so that no gradient vanishes for that reason.
"""

import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES = 5
SAMPLES = 8
PACKAGES = ("timm", "torchvision", "transformers")


class Case(NamedTuple):
    """A model to train."""

    model: nn.Module  # in training mode
    batch: tuple[Any, Any]  # (input, target); a dict as input holds keywords
    loss_fn: Callable[[Any, Any], Tensor]
    samples: int = SAMPLES


class Entry(NamedTuple):
    """A model that can be made."""

    package: str
    family: str  # the module that it is in
    name: str
    make: Callable[[], Case] | None  # None where no model of the family has batch norm


def entries(package: str) -> Iterator[Entry]:
    """The models of one of `PACKAGES`."""
    yield from {"timm": of_timm, "torchvision": of_torchvision, "transformers": of_transformers}[package]()


def entry(package: str, name: str) -> Entry:
    """A model by its name, without a look through its package."""
    if package == "timm":
        return Entry(package, "", name, partial(timm_case, name))
    if package == "transformers":
        return Entry(package, "", name, partial(transformers_case, name))
    from torchvision import models

    module = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    return Entry(package, module, name, partial(torchvision_case, name, module))


def drawn(model: nn.Module) -> nn.Module:
    """Draw what an initialisation makes the same everywhere: the affine of batch norm, and zeros."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, _BatchNorm) and layer.affine:
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(std=0.3)
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.1)
    return model.train()


def images(size: int, samples: int = SAMPLES, channels: int = 3) -> Tensor:
    """Images of which every channel has a mean of its own."""
    return torch.randn(samples, channels, size, size) + torch.randn(channels, 1, 1)


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """The loss of a classifier."""
    return F.cross_entropy(logits_of(output), target)


def logits_of(output: Any) -> Tensor:
    """The class scores, wherever a package puts them."""
    found: Any = output.get("logits", output) if isinstance(output, Mapping) else output
    found = next(iter(found.values())) if isinstance(found, Mapping) else found
    return found if isinstance(found, Tensor) else found[0]


def smooth(output: Any, target: Any) -> Tensor:
    """A loss of any output: smooth, and of no symmetry of normalised values."""
    return torch.stack([(leaf - 0.5).square().log1p().mean() for leaf in floating(output)]).sum()


def sum_of_losses(output: Mapping[str, Tensor], target: Any) -> Tensor:
    """The loss of a detector, which computes its losses itself."""
    return torch.stack(list(output.values())).sum()


def floating(tree: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, Mapping):
        return [leaf for child in tree.values() for leaf in floating(child)]
    return [leaf for child in tree for leaf in floating(child)] if isinstance(tree, tuple | list) else []


def labels(samples: int = SAMPLES) -> Tensor:
    """A class for every sample."""
    return torch.randint(CLASSES, (samples,))


# timm.


# The smallest network with batch norm of every module of timm 1.0.31 that has one, as found by
# `smallest(timm.list_models(module=module), timm.create_model)`, which takes minutes for all of them.
SMALLEST = """
halonet_h1 test_byobnet convmixer_768_32 cpubone_nano cs3darknet_focus_s cspnext_tiny densenet121 dla46x_c dpn48b
efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0
fasternet_t0 fastvit_t8 ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_coatnet
mobilenetv3_small_050 mobilevit_xxs nasnetalarge nextvit_small pnasnet5large regnetx_002 repghostnet_050 repvit_m1
res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18
starnet_s050 swiftformer_xs tiny_vit_5m_224 tresnet_m vgg11_bn visformer_tiny vit_small_resnet50d_s16_224
volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
"""
# Networks that are built otherwise than the smallest of their module.
OTHERS = """
fbnetc_100 gernet_s lambda_resnet26t lcnet_035 mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_035
mobilenetv4_conv_small mobileone_s0 regnety_002 repvgg_a0 resnet10t seresnext26d_32x4d semnasnet_075
tf_mobilenetv3_small_minimal_100 tinynet_e
"""
TIMM = [*SMALLEST.split(), *OTHERS.split()]
# Where it is not the smallest that a network takes, or more than is needed.
SIZES = {"convmixer_768_32": 28}
# Where layers see one position of an image: a group of two images would leave them next to no variance.
OF_ONE_POSITION = ("efficientvim_m1", "inception_v3", "levit_128s", "shvit_s1")


def of_timm() -> Iterator[Entry]:
    """The networks of `TIMM`; and of every module that has none of them, its first one."""
    import timm

    modules = {name: timm.models.model_entrypoint(name).__module__.split(".")[-1] for name in TIMM}
    for name, module in modules.items():
        yield Entry("timm", module, name, partial(timm_case, name))
    for module in timm.list_modules():
        first = timm.list_models(module=module)[:1]
        if first and module not in modules.values():
            found = smallest(first, partial(_quiet, timm.create_model))
            yield Entry("timm", module, first[0], partial(timm_case, first[0]) if found else None)


def smallest(names: Iterable[str], make: Callable[[str], nn.Module]) -> str | None:
    """The network with batch norm that has the fewest parameters; None where no network has it."""
    sizes: dict[str, int] = {}
    for name in names:
        with torch.device("meta"):
            try:
                model = make(name)
            except Exception:  # a few compute with values while they are made, which meta tensors have not
                continue
        if any(isinstance(layer, _BatchNorm) for layer in model.modules()):
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return min(sizes, key=lambda name: sizes[name]) if sizes else None


def timm_case(name: str) -> Case:
    """A classifier of timm, on images as small as it takes."""
    import timm

    small, sized = ((False, 64), (False, 96), (True, 64)), ((True, 128), (False, 128), (False, None))
    for is_said, size in [(False, SIZES[name])] if name in SIZES else [*small, *sized]:
        try:
            said = {"img_size": size} if is_said else {}
            model = _quiet(timm.create_model, name, num_classes=CLASSES, **said)
            size = size or model.default_cfg["input_size"][-1]
            if accepts(model, images(size, samples=2)):
                samples = SAMPLES if name in OF_ONE_POSITION else samples_for(model, size)
                return Case(drawn(model), (images(size, samples), labels(samples)), cross_entropy, samples)
        except TypeError:  # it has no such argument
            continue
    raise ValueError(f"{name} takes no images of its own size")


def samples_for(model: nn.Module, size: int) -> int:
    """How many images to train a model on: fewer where each takes long."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return SAMPLES if size <= 128 and parameters < 5e6 else SAMPLES // 2


def accepts(model: nn.Module, x: Tensor) -> bool:
    """Whether a model evaluates an input."""
    try:
        with torch.no_grad():
            model.eval()(x)
    except Exception:
        return False
    return True


def _quiet(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function without warnings, as of models that are called something else by now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


# torchvision.


def of_torchvision() -> Iterator[Entry]:
    """The smallest model with batch norm of every module, and classifiers prepared for quantisation-aware training."""
    from torchvision import models

    modules: dict[str, list[str]] = {}
    for name in models.list_models():
        modules.setdefault(models.get_model_builder(name).__module__.removeprefix("torchvision.models."), []).append(
            name
        )
    for module, names in sorted(modules.items()):
        name = smallest(names, partial(torchvision_model, size=64))
        make = partial(torchvision_case, name, module) if name else None
        yield Entry("torchvision", module, name or f"all {len(names)}", make)
    for name in ("quantized_mobilenet_v2", "quantized_shufflenet_v2_x0_5"):
        yield Entry("torchvision", "prepare_qat", name, partial(quantisation_aware_case, name))


def torchvision_model(name: str, size: int) -> nn.Module:
    """A model of torchvision. Detectors resize images, to a size that is said when they are made."""
    from torchvision import models

    module = models.get_model_builder(name).__module__
    kwargs: dict[str, Any] = {"weights": None}
    if "optical_flow" not in module:
        kwargs["num_classes"] = CLASSES
    if any(part in module for part in ("detection", "segmentation")):
        kwargs["weights_backbone"] = None
    if "detection" in module and "ssd" not in module:
        kwargs |= {"min_size": size, "max_size": size}
    if "rcnn" in name:
        kwargs |= {"box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 16}
    if name.startswith("maxvit"):
        kwargs["input_size"] = (224, 224)
    model: nn.Module = _quiet(models.get_model, name, **kwargs)
    return model


def torchvision_case(name: str, module: str) -> Case:
    """A model of torchvision with a batch of its kind."""
    kind, _, _ = module.partition(".")
    if kind == "detection":
        model = drawn(Detector(torchvision_model(name, 64)))
        return Case(model, (detection_inputs(64, 4), torch.zeros(4)), sum_of_losses, 4)
    model = drawn(torchvision_model(name, 64))
    if kind == "optical_flow":
        inputs = {"image1": images(128, 2), "image2": images(128, 2), "num_flow_updates": 2}
        return Case(model, (inputs, torch.zeros(2)), smooth, 2)
    if kind == "video":
        x = torch.randn(4, 3, 16 if "s3d" in name else 4, *[224 if "s3d" in name else 32] * 2)
        return Case(model, (x, labels(4)), cross_entropy, 4)
    if kind == "segmentation":
        samples = samples_for(model, 64)
        return Case(model, (images(64, samples), torch.zeros(samples)), smooth, samples)
    size = {"inception_v3": 299, "quantized_inception_v3": 299, "maxvit_t": 224}.get(name, 64)
    size = size if accepts(model, images(size, samples=2)) else 128
    loss = smooth if any(part in name for part in ("inception", "googlenet")) else cross_entropy  # auxiliary heads
    samples = samples_for(model, size)
    return Case(model.train(), (images(size, samples), labels(samples)), loss, samples)


class Detector(nn.Module):
    """A detector of torchvision on tensors with an entry a sample: a step must see which samples there are."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, **targets: Tensor) -> Any:
        """The losses."""
        of_samples = [dict(zip(targets, values, strict=True)) for values in zip(*targets.values(), strict=True)]
        return self.detector(list(images), of_samples)


def detection_inputs(size: int, samples: int) -> dict[str, Tensor]:
    """Images with two objects each, which have boxes, labels, masks and key points."""
    corners = torch.rand(samples, 2, 2) * size / 2
    masks = torch.zeros(samples, 2, size, size, dtype=torch.uint8)
    masks[..., size // 4 : size // 2, size // 4 : size // 2] = 1
    points = torch.cat([torch.rand(samples, 2, 17, 2) * size, torch.ones(samples, 2, 17, 1)], -1)
    return {
        "images": torch.rand(samples, 3, size, size),
        "boxes": torch.cat([corners, corners + size / 4 + torch.rand(samples, 2, 2) * size / 4], -1),
        "labels": torch.randint(1, 2, (samples, 2)),
        "masks": masks,
        "keypoints": points,
    }


def quantisation_aware_case(name: str) -> Case:
    """A classifier with fused layers that simulate quantisation while it trains."""
    from torch.ao import quantization
    from torchvision.models import get_model

    def prepared() -> nn.Module:
        model = get_model(name, weights=None, quantize=False, num_classes=CLASSES).train()
        model.fuse_model(is_qat=True)
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm", version=0)
        made: nn.Module = quantization.prepare_qat(model)
        return made

    model, x = drawn(_quiet(prepared)), images(64)
    _quiet(model, x)  # observers know their shapes after a first forward
    return Case(model, (x, labels()), cross_entropy)


# transformers: by class its configuration, the settings of that, and the length of an image's sides.
TRANSFORMERS = json.loads(Path(__file__).with_name("transformers.json").read_text(encoding="utf-8"))


def of_transformers() -> Iterator[Entry]:
    """Vision models of random weights, from small configurations."""
    for name, how in TRANSFORMERS.items():
        yield Entry("transformers", how["config"].lower(), name, partial(transformers_case, name))


def transformers_case(name: str) -> Case:
    """A model of transformers, with a dict as input."""
    transformers, how = importlib.import_module("transformers"), TRANSFORMERS[name]
    made = getattr(transformers, f"{how['config']}Config")(**{"num_labels": CLASSES, **resolved(how["settings"])})
    model = drawn(getattr(transformers, name)(made))
    channels = 4 if name.startswith("VitMatte") else 3
    classifies = name.endswith("ForImageClassification")
    inputs = {"pixel_values": images(how["size"], channels=channels)}
    if name == "GroupViTModel":
        inputs["input_ids"] = torch.randint(3, 50, (SAMPLES, 8))
    return Case(model, (inputs, labels()), cross_entropy if classifies else smooth)


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, in which a dict that names a configuration becomes one."""
    transformers = importlib.import_module("transformers")
    found: dict[str, Any] = {}
    for key, value in settings.items():
        is_config = isinstance(value, Mapping) and "config" in value
        found[key] = value
        if is_config:
            parts = resolved({name: part for name, part in value.items() if name != "config"})
            found[key] = getattr(transformers, f"{value['config']}Config")(**parts)
    return found
