"""Test samples from a shifted distribution: common corruptions, each in five severities.

They are those of Hendrycks and Dietterich (arXiv 1903.12261). Colour images get those of CIFAR-10-C that need no files,
on pixels in [0, 1], with its severities. Other images and signals get blur, noise and loss of contrast, on samples as
the network sees them: noise is measured in deviations of the data and blur in sides of the image, so that a severity is
about as bad on all of these sets. Signals have no limits, and nothing is clipped there.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchvision.transforms.v2 import functional as images_to

from experiments.datasets import DataSet

Corruption = Callable[[Tensor, int], Tensor]

SEVERITIES = (1, 2, 3, 4, 5)
NOISE_SEED = 0

# Deviation of the Gaussian kernel as a share of the shortest side: 0.3 to 0.8 pixels of a digit of 8 × 8.
BLUR = (0.04, 0.055, 0.07, 0.085, 0.1)
# Deviation of the noise, where that of the data is 1.
NOISE = (0.2, 0.4, 0.6, 0.8, 1.0)
# What is left of a sample's distance from its own mean, as in CIFAR-10-C.
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)


def blur(samples: Tensor, severity: int) -> Tensor:
    """Smooth every sample along its positions."""
    positions = tuple(range(2, samples.dim()))
    sigma = BLUR[severity - 1] * min(samples.shape[2:])
    return torch.from_numpy(gaussian_filter(samples.numpy(), sigma, axes=positions))


def noise(samples: Tensor, severity: int) -> Tensor:
    """Add Gaussian noise, the same on every call."""
    drawn = torch.randn(samples.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    return samples + NOISE[severity - 1] * drawn


def contrast(samples: Tensor, severity: int) -> Tensor:
    """Draw every sample towards its own mean."""
    mean = samples.flatten(1).mean(dim=1).view(-1, *[1] * (samples.dim() - 1))
    return mean + CONTRAST[severity - 1] * (samples - mean)


CORRUPTIONS: dict[str, Corruption] = {"blur": blur, "noise": noise, "contrast": contrast}


# Of CIFAR-10-C: deviation of Gaussian noise, photons of shot noise, deviation of blur in pixels, what is left of the
# distance from the mean, what is added to the value, JPEG quality, and the share of the side that pixelation keeps.
COLOUR_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
SHOTS = (500, 250, 100, 75, 50)
COLOUR_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
QUALITY = (80, 65, 58, 50, 40)
PIXELS = (0.95, 0.9, 0.85, 0.75, 0.65)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(NOISE_SEED)


def _colour_noise(pixels: Tensor, severity: int) -> Tensor:
    return pixels + COLOUR_NOISE[severity - 1] * torch.randn(pixels.shape, generator=_generator())


def _shot(pixels: Tensor, severity: int) -> Tensor:
    photons = SHOTS[severity - 1]
    return torch.poisson(pixels * photons, generator=_generator()) / photons


def _colour_blur(pixels: Tensor, severity: int) -> Tensor:
    return torch.from_numpy(gaussian_filter(pixels.numpy(), COLOUR_BLUR[severity - 1], axes=(2, 3), mode="nearest"))


def _colour_contrast(pixels: Tensor, severity: int) -> Tensor:
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return mean + CONTRAST[severity - 1] * (pixels - mean)


def _brightness(pixels: Tensor, severity: int) -> Tensor:
    """Add to the value of hue, saturation and value."""
    value = pixels.amax(dim=1, keepdim=True)
    raised = (value + BRIGHTNESS[severity - 1]).clamp(0, 1)
    return torch.where(value > 0, pixels * raised / value.clamp(min=1e-12), raised.expand_as(pixels))


def _jpeg(pixels: Tensor, severity: int) -> Tensor:
    coded = []
    for image in (255 * pixels).round().to(torch.uint8):
        with io.BytesIO() as file:
            images_to.to_pil_image(image).save(file, "jpeg", quality=QUALITY[severity - 1])
            coded.append(images_to.pil_to_tensor(Image.open(file)))
    return torch.stack(coded).float() / 255


def _pixelate(pixels: Tensor, severity: int) -> Tensor:
    height, width = pixels.shape[2:]
    small = [max(1, int(side * PIXELS[severity - 1])) for side in (height, width)]
    few = torch.nn.functional.interpolate(pixels, small, mode="area")
    return torch.nn.functional.interpolate(few, [height, width], mode="nearest")


COLOUR_CORRUPTIONS: dict[str, Corruption] = {
    "noise": _colour_noise,
    "shot noise": _shot,
    "blur": _colour_blur,
    "contrast": _colour_contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
}


def corruptions_of(data: DataSet) -> dict[str, Corruption]:
    """The corruptions of a data set's samples.

    Returns:
        By name, functions of normalised samples and a severity from 1 to 5 to new ones; the same on every call.
    """
    if data.sample_shape[0] != 3 or len(data.sample_shape) != 3:
        return CORRUPTIONS
    mean, std = (part.view(-1, 1, 1) for part in (data.mean, data.std))

    def on_samples(corrupt: Corruption) -> Corruption:
        def corrupted(samples: Tensor, severity: int) -> Tensor:
            pixels = (samples * std + mean).clamp(0, 1)
            return (corrupt(pixels, severity).clamp(0, 1) - mean) / std

        return corrupted

    return {name: on_samples(corrupt) for name, corrupt in COLOUR_CORRUPTIONS.items()}
