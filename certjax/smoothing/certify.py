"""CERTIFY and PREDICT of randomized smoothing, one example at a time.

Source: Cohen et al. 2019, "Certified adversarial robustness via randomized smoothing",
arXiv:1902.02918, section 3.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.smoothing.confidence import (
    binomial_test,
    check_alpha,
    check_trials,
    proportion_lower,
)
from certjax.smoothing.noise import more_than_half
from certjax.smoothing.votes import votes
from certjax.types import Array, Classifier, Key


ABSTAIN = -1


class SmoothedCertificate(NamedTuple):
    """What was proved about the smoothed classifier at one example, and from what.

    With probability at least 1 - alpha over the samples, the smoothed classifier
    predicts `prediction` everywhere within `radius` of x. -1 only ever means "abstain"
    and carries radius 0.

    prediction: class, or -1.
    radius: in `norm` and input units, full precision, rounded down; finite.
    p_lower: Clopper-Pearson lower bound of the probability of the top class.
    counts: [K] int64, votes of the n estimation samples.
    counts0: [K] int64, votes of the n0 selection samples.
    invalid: samples of the n with a NaN logit; they count against the prediction.
    n0, n, alpha, sigma: as asked; sigma is nan for a noise that has none.
    norm, noise, guarantee: the ball, the distribution, the arithmetic of the theorem.
    dtype: of the forward pass.
    """

    prediction: int
    radius: float
    p_lower: float
    counts: np.ndarray
    counts0: np.ndarray
    invalid: int
    n0: int
    n: int
    alpha: float
    sigma: float
    norm: str
    noise: str
    guarantee: str
    dtype: str


def certify(  # noqa: PLR0913, PLR0917 - the parameters of the paper
    f: Classifier,
    noise: Any,
    key: Key,
    x: Array,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch: int = 1000,
    **how: Any,
) -> SmoothedCertificate:
    """Certify the smoothed classifier at x.

    n0 samples guess the top class; n fresh ones bound its probability from below. The
    result depends on (key, x, n0, n, alpha), not on `batch` or the devices.

    Args:
      f: classifier of one example.
      noise: a distribution, e.g. `Gaussian(0.25)`.
      key: of this example, e.g. `fold_in(key, index)`: they then resume in any order.
      x: [...] one example, input units.
      n0, n: numbers of selection and estimation samples.
      alpha: failure probability of this certificate.
      batch: samples between two returns to the host.
      **how: `block`, `mesh`, `dtype`, see `Forward`.

    Returns:
      A `SmoothedCertificate` of host numbers.

    Raises:
      ValueError: n0, n or batch below 1, alpha outside (0, 1).
    """
    check_trials("n0", n0)
    check_trials("n", n)
    check_alpha(alpha)
    select, estimate = jax.random.split(key)
    counts0 = votes(f, noise, select, x, n0, batch, **how)
    counts = votes(f, noise, estimate, x, n, batch, **how)
    return judge(counts0, counts, noise, jnp.size(x), n0, n, alpha, **how)


def judge(
    counts0: np.ndarray,
    counts: np.ndarray,
    noise: Any,
    size: int,
    n0: int,
    n: int,
    alpha: float,
    **how: Any,
) -> SmoothedCertificate:
    """The certificate that these counts prove; host arithmetic only.

    Args:
      counts0, counts: [K] votes of n0 and of n samples, drawn independently.
      noise: what they were drawn from.
      size: number of coordinates of an example.
      n0, n: numbers of samples, those with a NaN logit included.
      alpha: failure probability.
      **how: `dtype` of the forward pass, for the record.
    """
    guess = int(np.argmax(counts0))
    p_lower = proportion_lower(int(counts[guess]), n, alpha)
    radius = proved_radius(noise, p_lower, size)
    return SmoothedCertificate(
        prediction=ABSTAIN if radius is None else guess,
        radius=radius or 0.0,
        p_lower=p_lower,
        counts=counts,
        counts0=counts0,
        invalid=int(n - counts.sum()),
        n0=n0,
        n=n,
        alpha=alpha,
        sigma=float(getattr(noise, "sigma", np.nan)),
        norm=noise.norm,
        noise=type(noise).__name__,
        guarantee=noise.guarantee,
        dtype=jnp.dtype(how.get("dtype", jnp.float32)).name,
    )


def proved_radius(noise: Any, p_lower: float, size: int) -> float | None:
    """The finite radius that a majority buys; None where none is proved."""
    radius = noise.radius(p_lower, size)
    counted = noise.norm == "l0" and more_than_half(p_lower)  # pixels, perhaps 0
    return radius if (counted or radius > 0) and radius < np.inf else None


def predict(
    f: Classifier,
    noise: Any,
    key: Key,
    x: Array,
    n: int = 100,
    alpha: float = 0.001,
    batch: int = 1000,
    **how: Any,
) -> int:
    """The class that the smoothed classifier predicts at x, or -1 (abstain).

    With probability at least 1 - alpha the answer is -1 or the top class: a two-sided
    binomial test of the most against the second most frequent vote. Samples with a NaN
    logit count as one more class, which is never answered.

    Args, Raises: as `certify`.
    """
    check_trials("n", n)
    check_alpha(alpha)
    return decide(votes(f, noise, key, x, n, batch, **how), n, alpha)


def decide(counts: np.ndarray, n: int, alpha: float) -> int:
    """The class that wins these [K] votes of n samples significantly, or -1."""
    top = int(np.argmax(counts))
    rivals = np.append(np.delete(counts, top), n - counts.sum())
    p_value = binomial_test(int(counts[top]), int(np.max(rivals)))
    won = counts[top] > np.max(rivals) and p_value <= alpha
    return top if won else ABSTAIN
