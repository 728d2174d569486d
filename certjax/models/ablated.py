"""Networks of ablated images, for smoothing that hides pixels.

They see an image [H, W, C] as x beside 1 - x, both 0 where it is hidden, so that
"hidden" is no colour: the [H, W, 2 C] of `certjax.smoothing.visible`.
"""

import flax.linen as nn
import jax.numpy as jnp

from certjax.models.networks import ConvNet, Convolution
from certjax.types import Array


class Ablated(nn.Module):
    """A network of ablated images [H, W, 2 C]; an image [H, W, C] is shown whole.

    network: what sees the 2 C channels; it normalises nothing, or all channels alike.
    channels: C.
    """

    network: nn.Module
    channels: int = 1

    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [K] of one example."""
        if x.shape[-1] == self.channels:
            x = jnp.concatenate([x, 1.0 - x], axis=-1)
        if x.shape[-1] != 2 * self.channels:
            raise ValueError(
                f"need an image of {self.channels} channels, or of twice as many as "
                f"`smoothing.visible` makes them, got {x.shape}; set channels="
            )
        return self.network(x, train)


def ablated_cnn(*, classes: int = 10, channels: int = 1) -> Ablated:
    """C64k4s2p1 C128k4s2p1 F500 F100 of ablated images.

    Source: Levine & Feizi 2020, arXiv:1911.09272 and arXiv:2002.10733, the MNIST
    network of the authors' code.
    """
    convolutions = (Convolution(64, 4, 2, 1), Convolution(128, 4, 2, 1))
    return Ablated(ConvNet(convolutions, (500, 100), classes), channels)
