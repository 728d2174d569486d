"""Sound bounds of any JAX function over a threat set."""

from certjax.bounds.errors import UnsupportedPrimitive
from certjax.bounds.interval import ibp, ibp_with_layers
from certjax.bounds.linear import crown
from certjax.types import Interval


__all__ = ["Interval", "UnsupportedPrimitive", "crown", "ibp", "ibp_with_layers"]
