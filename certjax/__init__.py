"""certjax: attacks, bounds, randomized smoothing and certified training in JAX."""

__version__ = "0.1.0"
