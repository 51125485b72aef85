"""Test samples from a shifted distribution: blur, noise and loss of contrast, each in five severities.

They are three of the common corruptions of Hendrycks and Dietterich (arXiv 1903.12261), for normalised images and
signals of any size. Noise is measured in deviations of the data and blur in sides of the image, so that a severity is
about as bad on all data sets. Nothing is clipped: signals have no limits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
NOISE_SEED = 0

# Deviation of the Gaussian kernel as a share of the shortest side: 0.3 to 0.8 pixels of a digit of 8 × 8.
BLUR = (0.04, 0.055, 0.07, 0.085, 0.1)
# Deviation of the noise, where that of the data is 1.
NOISE = (0.2, 0.4, 0.6, 0.8, 1.0)
# What is left of a sample's distance from its own mean, as in CIFAR-10-C.
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)


def blur(samples: Tensor, severity: int) -> Tensor:
    """Smooth every sample along its positions.

    Args:
        samples: (N, C, L) or (N, C, H, W), normalised.
        severity: from 1 to 5.

    Returns:
        New samples.
    """
    positions = tuple(range(2, samples.dim()))
    sigma = BLUR[severity - 1] * min(samples.shape[2:])
    return torch.from_numpy(gaussian_filter(samples.numpy(), sigma, axes=positions))


def noise(samples: Tensor, severity: int) -> Tensor:
    """Add Gaussian noise, the same on every call.

    Args:
        samples: (N, C, L) or (N, C, H, W), normalised.
        severity: from 1 to 5.

    Returns:
        New samples.
    """
    drawn = torch.randn(samples.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    return samples + NOISE[severity - 1] * drawn


def contrast(samples: Tensor, severity: int) -> Tensor:
    """Draw every sample towards its own mean.

    Args:
        samples: (N, C, L) or (N, C, H, W), normalised.
        severity: from 1 to 5.

    Returns:
        New samples.
    """
    mean = samples.flatten(1).mean(dim=1).view(-1, *[1] * (samples.dim() - 1))
    return mean + CONTRAST[severity - 1] * (samples - mean)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"blur": blur, "noise": noise, "contrast": contrast}
