"""Denoised smoothing: a network that never saw noise, behind one that removes it."""

import jax

from certjax.types import Array, Classifier


def denoised(f: Classifier, denoiser: Classifier) -> Classifier:
    """`z -> f(denoiser(z))`, the base classifier of denoised smoothing.

    Certify it like any other: the guarantee is about the composition, and asks nothing
    of the denoiser. A diffusion model plugs in as a function of one noisy example.
    A pytree, so that with `jax.tree_util.Partial`s one compilation serves all weights.

    Args:
      f: classifier of one example.
      denoiser: [...] -> [...], e.g. trained with `certjax.training.denoising`.

    Source: Salman et al. 2020, "Denoised smoothing: a provable defense for pretrained
    classifiers", arXiv:2003.01908; Carlini et al. 2023, arXiv:2206.10550.
    """
    return jax.tree_util.Partial(_composed, f, denoiser)


def _composed(f: Classifier, denoiser: Classifier, z: Array) -> Array:
    return f(denoiser(z))
