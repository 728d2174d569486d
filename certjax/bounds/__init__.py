"""Sound bounds of any JAX function over a threat set."""

from certjax.bounds.combine import (
    best,
    fused_cross_entropy,
    fused_with_layers,
    margins_with_layers,
)
from certjax.bounds.errors import UnsupportedPrimitive
from certjax.bounds.forward import forward
from certjax.bounds.interval import ibp, ibp_with_layers
from certjax.bounds.linear import crown
from certjax.bounds.optimize import alpha_crown
from certjax.bounds.report import plot, report
from certjax.types import Interval


__all__ = [
    "Interval",
    "UnsupportedPrimitive",
    "alpha_crown",
    "best",
    "crown",
    "forward",
    "fused_cross_entropy",
    "fused_with_layers",
    "ibp",
    "ibp_with_layers",
    "margins_with_layers",
    "plot",
    "report",
]
