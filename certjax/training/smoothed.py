"""Training objectives for smoothed classifiers, each for one example.

Every objective draws its own noise from the key, `draws` independent copies where the
paper has several, and returns a scalar; a batch takes the mean. Papers that use m
noise vectors take one optimiser step per chunk of batch / m images: that is the
trainer's batch size. Weights, radii and sigma may be traced (schedules). For the log
each knows `noisy_accuracy`, the share of correct predictions under its noises.

`noise` is a distribution of `certjax.smoothing`, in practice `Gaussian(sigma)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from certjax.loops import fori, loopable
from certjax.threat import Threat
from certjax.training.losses import cross_entropy
from certjax.training.objectives import detached, Itemized, Terms
from certjax.types import Array, Attack, Classifier, Key, Objective, Scalar


NoisyAttack: TypeAlias = Callable[[Key, Classifier, Array, Array, Array], Array]
"""`attack(key, f, x, label, noises) -> z`: adversarial to the mean over the noises."""


def _draw(noise: Any, key: Key, x: Array, draws: int) -> Array:
    """[S, ...] noise vectors (noisy copies minus x)."""
    return jax.vmap(lambda k: noise.sample(k, x) - x)(jax.random.split(key, draws))


def _around(f: Classifier, x: Array, noises: Array) -> Array:
    """[S, K] logits at x under each noise."""
    # XLA:CPU would add up the noises' gradients inside the slow sum over kernel taps:
    # the barrier makes a step of an attack a quarter faster
    return jax.vmap(lambda noise: f(jax.lax.optimization_barrier(x + noise)))(noises)


def _terms(loss: Array, logits: Array, label: Array) -> Terms:
    """The loss, and how often [..., K] noisy logits are right."""
    return Terms(loss, {"noisy_accuracy": jnp.mean(jnp.argmax(logits, -1) == label)})


def _frozen(f: Classifier, x: Array) -> Classifier:
    """`f` for an attack: cheap in a loop of gradients, weights held constant."""
    return loopable(detached(f, x), x)


def _smoothed_loss(f: Classifier, z: Array, label: Array, noises: Array) -> Array:
    """-log of the mean softmax probability of the label over the noises."""
    mean = jnp.mean(jax.nn.softmax(_around(f, z, noises)), axis=0)
    return -jnp.log(jnp.maximum(mean[label], 1e-20))


def _kl(target: Array, logits: Array) -> Array:
    """KL(target || softmax(logits)), differentiable in both."""
    safe = jnp.where(target > 0, target, 1.0)
    return jnp.sum(target * (jnp.log(safe) - jax.nn.log_softmax(logits)))


def _length(v: Array) -> Array:
    return jnp.sqrt(jnp.sum(v * v))


def _shorten(v: Array, longest: Scalar) -> Array:
    """Scale v down to the given l2 norm where it is longer."""
    return v * jnp.minimum(1.0, longest / jnp.maximum(_length(v), 1e-12))


def _unit(key: Key, g: Array) -> Array:
    """g / ||g||; a random direction where the gradient vanished."""
    length = _length(g)
    random = jax.random.normal(key, g.shape, g.dtype)
    return jnp.where(length > 0, g / jnp.where(length > 0, length, 1.0), random)


def gaussian_augmentation(noise: Any) -> Objective:
    """Cross-entropy at one noisy copy. Source: Cohen et al. 2019, arXiv:1902.02918."""

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        logits = f(noise.sample(key, x))
        return _terms(cross_entropy(logits, label), logits, label)

    return objective


def noise_augmentation(noise: Any) -> Objective:
    """Cross-entropy at one copy as another noise than the Gaussian shows it.

    Args:
      noise: `Ablation`, `Band` or `Block`, which hide pixels (the network is then one
        of `certjax.models.Ablated`), or `Discrete`, `Laplace`, `Uniform`.

    Source: Levine & Feizi 2020, arXiv:1911.09272 and arXiv:2002.10733, whose masks are
    shared by a batch; here each example has its own.
    """
    return gaussian_augmentation(noise)


def noisy_copy(threat: Threat, *, noise: Any) -> Attack:  # noqa: ARG001 - a builder
    """No attack but the noise: `statistics_at` of the training step.

    A network with batch normalisation that will be smoothed must be normalised with the
    statistics of noisy batches. With the key of the step, these are the very copies
    that `gaussian_augmentation` trains on.
    """
    return lambda key, f, x, label: noise.sample(key, x)  # noqa: ARG005


def stability(noise: Any, *, weight: Scalar = 2.0) -> Objective:
    """Clean cross-entropy plus the cross-entropy of noisy against clean prediction.

    The gradient flows through both sides. Source: Li et al. 2019, arXiv:1809.03113.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        clean, noisy = f(x), f(noise.sample(key, x))
        agreement = -jnp.sum(jax.nn.softmax(clean) * jax.nn.log_softmax(noisy))
        return _terms(cross_entropy(clean, label) + weight * agreement, noisy, label)

    return objective


def denoising(
    noise: Any, *, classifier: Classifier | None = None, weight: Scalar = 1.0
) -> Objective:
    """Mean squared error of a denoiser f at one noisy copy.

    With a classifier also `weight` times its cross-entropy on the denoised copy towards
    its own prediction of x.

    Its `f` maps an example to one of the same shape.

    Source: Salman et al. 2020, "Denoised smoothing", arXiv:2003.01908, section 3.
    """

    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Array:  # noqa: ARG001
        found = f(noise.sample(key, x))
        error = jnp.mean((found - x) ** 2)
        if classifier is None:
            return error
        wanted = jax.lax.stop_gradient(jnp.argmax(classifier(x)))
        return error + weight * cross_entropy(classifier(found), wanted)

    return objective


def noisy_pgd(*, eps: Scalar, steps: int) -> NoisyAttack:
    """l2 PGD on the smoothed classifier: unit gradients, step 2 eps / steps, from x.

    In the order of the authors: step, clip x + delta to [0, 1], shorten delta to eps.

    Source: Salman et al. 2019, arXiv:1906.04584, algorithm 1.
    """

    def attack(key: Key, f: Classifier, x: Array, label: Array, noises: Array) -> Array:
        f = _frozen(f, x)
        gradient = jax.grad(lambda d: _smoothed_loss(f, x + d, label, noises))

        def step(i: Array, delta: Array) -> Array:
            towards = _unit(jax.random.fold_in(key, i), gradient(delta))
            delta = jnp.clip(x + delta + (2.0 * eps / steps) * towards, 0.0, 1.0) - x
            return _shorten(delta, eps)

        return x + fori(steps, step, jnp.zeros_like(x))

    return attack


class _Ddn(NamedTuple):
    """Loop state: perturbation, its norm budget, the shortest success so far."""

    delta: Array
    norm: Array
    best: Array
    best_norm: Array


def noisy_ddn(
    *,
    eps: Scalar,
    steps: int,
    gamma: float = 0.05,
    init_norm: Scalar = 1.0,
    levels: int = 256,
) -> NoisyAttack:
    """DDN on the smoothed classifier: the shortest way to flip the majority.

    It is quantised to `levels`, then shortened to eps. x itself where nothing flips.

    Source: Rony et al. 2019, arXiv:1811.09600; Salman et al. 2019, arXiv:1906.04584.
    """

    def quantise(v: Array) -> Array:
        return jnp.round(v * (levels - 1)) / (levels - 1)

    def attack(key: Key, f: Classifier, x: Array, label: Array, noises: Array) -> Array:
        f = _frozen(f, x)
        worst = _length(jnp.maximum(x, 1.0 - x))

        def loss(delta: Array) -> tuple[Array, Array]:
            logits = _around(f, x + delta, noises)
            votes = jnp.sum(jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1]), 0)
            mean = jnp.mean(jax.nn.softmax(logits), axis=0)
            return -jnp.log(jnp.maximum(mean[label], 1e-20)), jnp.argmax(votes)

        def step(i: Array, s: _Ddn) -> _Ddn:
            gradient, predicted = jax.grad(loss, has_aux=True)(s.delta)
            wrong = predicted != label
            shorter = wrong & (_length(s.delta) < s.best_norm)
            best = jnp.where(shorter, s.delta, s.best)
            best_norm = jnp.where(shorter, _length(s.delta), s.best_norm)
            rate = 0.01 + 0.99 * (1.0 + jnp.cos(jnp.pi * i / steps)) / 2.0
            delta = s.delta + rate * _unit(jax.random.fold_in(key, i), gradient)
            norm = s.norm * jnp.where(wrong, 1.0 - gamma, 1.0 + gamma)
            norm = jnp.minimum(norm, worst)
            delta = delta * norm / jnp.maximum(_length(delta), 1e-12)
            return _Ddn(
                jnp.clip(quantise(x + delta), 0.0, 1.0) - x, norm, best, best_norm
            )

        zero = jnp.zeros_like(x)
        start = _Ddn(zero, jnp.asarray(init_norm, x.dtype), zero, worst)
        return x + quantise(_shorten(fori(steps, step, start).best, eps))

    return attack


def smooth_adversarial(noise: Any, *, attack: NoisyAttack, draws: int = 4) -> Objective:
    """Mean cross-entropy over the noises at a point attacked under the same noises.

    Source: SmoothAdv, Salman et al. 2019, arXiv:1906.04584, section 3.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        draw, start = jax.random.split(key)
        noises = _draw(noise, draw, x, draws)
        z = jax.lax.stop_gradient(attack(start, f, x, label, noises))
        logits = _around(f, z, noises)
        loss = jnp.mean(jax.vmap(cross_entropy, (0, None))(logits, label))
        return _terms(loss, logits, label)

    return objective


def macer(
    noise: Any,
    *,
    weight: Scalar = 16.0,
    draws: int = 16,
    gamma: float = 8.0,
    beta: float = 16.0,
) -> Objective:
    """Cross-entropy of the mean softmax, plus a hinge on the certified radius.

    Robustness: sigma / 2 (gamma - PhiInv(p1) + PhiInv(p2)) with p the mean of
    softmax(beta logits), where the example is classified correctly and the difference
    is finite and at most gamma. weight = 0 defers it (the authors: epochs 0..30).

    Source: Zhai et al. 2020, arXiv:2001.02378, algorithm 1 and the authors' code.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        logits = _around(f, x, _draw(noise, key, x, draws))
        mean = jnp.mean(jax.nn.softmax(logits), axis=0)
        classification = -jnp.log(mean[label] + 1e-10)
        sharp = jnp.mean(jax.nn.softmax(beta * logits), axis=0)
        (first, second), index = jax.lax.top_k(sharp, 2)
        gap = _normal_quantile(first) - _normal_quantile(second)
        counts = (index[0] == label) & jnp.isfinite(gap) & (jnp.abs(gap) <= gamma)
        # evaluate at a harmless point where it does not count: no NaN in the gradient
        first = _normal_quantile(jnp.where(counts, first, 0.5))
        second = _normal_quantile(jnp.where(counts, second, 0.5))
        robustness = jnp.where(counts, gamma - first + second, 0.0) * noise.sigma / 2.0
        return _terms(classification + weight * robustness, logits, label)

    return objective


def _normal_quantile(p: Array) -> Array:
    """PhiInv as the authors compute it: infinite where 2 p - 1 rounds to +-1."""
    return jnp.sqrt(2.0) * jax.lax.erf_inv(2.0 * p - 1.0)


def consistency(
    noise: Any,
    *,
    weight: Scalar = 10.0,
    entropy: float = 0.5,
    draws: int = 2,
    attack: NoisyAttack | None = None,
) -> Objective:
    """Mean cross-entropy + weight KL(mean || each) + entropy H(mean) over the noises.

    With an attack, all of it at the attacked point (SmoothAdv + consistency).

    Source: Jeong & Shin 2020, arXiv:2006.04062, equation 9 and the authors' code.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        draw, start = jax.random.split(key)
        noises = _draw(noise, draw, x, draws)
        if attack is not None:
            x = jax.lax.stop_gradient(attack(start, f, x, label, noises))
        logits = _around(f, x, noises)
        mean = jnp.mean(jax.nn.softmax(logits), axis=0)
        loss = jnp.mean(jax.vmap(cross_entropy, (0, None))(logits, label))
        agreement = jnp.mean(jax.vmap(_kl, (None, 0))(mean, logits))
        uncertainty = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-20)))
        loss = loss + weight * agreement + entropy * uncertainty
        return _terms(loss, logits, label)

    return objective


def smoothmix(
    noise: Any,
    *,
    weight: Scalar = 5.0,
    steps: int = 2,
    step_size: float = 1.0,
    draws: int = 4,
    one_step: Scalar | None = None,
) -> Objective:
    """Cross-entropy + weight KL at a mixture of x with an unrestricted adversary.

    The mixture (1 - u) x + u z, u ~ U(0, 1/2), has the target (1 - u) smoothed
    prediction + u uniform, not detached; only where the prediction is correct.

    Args:
      noise: the distribution.
      weight: eta; the authors warm it up linearly over 10 epochs.
      steps: of the adversary: 2, 4, 8 at sigma 0.25, 0.5, 1.0.
      step_size: l2 length of a step.
      draws: noises.
      one_step: start the mixture from the one-step adversary, shortened to this l2
        norm (the authors' `mix_step` 1: step_size times the warm-up); None: from x.

    Source: Jeong et al. 2021, arXiv:2111.09277, and the authors' code.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: Array) -> Terms:
        draw, mix = jax.random.split(key)
        noises = _draw(noise, draw, x, draws)
        ascend = _ascent(_frozen(f, x), label, noises, step_size)
        z = jax.lax.stop_gradient(fori(steps, lambda _, z: ascend(z), x))
        if one_step is not None:
            start = jnp.clip(x + _shorten(ascend(x) - x, one_step), 0.0, 1.0)
            x = jax.lax.stop_gradient(start)
        logits = _around(f, x, noises)
        mean = jnp.mean(jax.nn.softmax(logits), axis=0)
        loss = jnp.mean(jax.vmap(cross_entropy, (0, None))(logits, label))
        u = jax.random.uniform(mix) / 2.0
        target = (1.0 - u) * mean + u / mean.size
        mixed = _around(f, (1.0 - u) * x + u * z, noises)
        mixup = jnp.mean(jax.vmap(_kl, (None, 0))(target, mixed))
        loss = loss + weight * jnp.where(jnp.argmax(mean) == label, mixup, 0.0)
        return _terms(loss, logits, label)

    return objective


def _ascent(
    f: Classifier, label: Array, noises: Array, step_size: float
) -> Callable[[Array], Array]:
    gradient = jax.grad(lambda z: _smoothed_loss(f, z, label, noises))

    def ascend(z: Array) -> Array:
        g = gradient(z)
        return jnp.clip(z + step_size * g / (_length(g) + 1e-8), 0.0, 1.0)

    return ascend


class SmoothedLabel(NamedTuple):
    """The label of CAT-RS: the class, and the smoothed prediction of a base model.

    label: [] int.
    probabilities: [K], votes of a Gaussian-trained model on this training image.
    """

    label: Array
    probabilities: Array


def catrs(
    noise: Any,
    *,
    eps: Scalar = 1.0,
    steps: int = 4,
    weight: Scalar = 1.0,
    draws: int = 4,
    confidence: bool = False,
) -> Objective:
    """Train on as many noises as the example is confident; attack the noise itself.

    With K ~ Binomial(draws, confidence), at least 1: the K smallest cross-entropies,
    and where K = draws also the largest KL to the smoothed prediction over noises that
    were moved by at most eps (then brought back to their mean and power).

    Args:
      noise: the distribution.
      eps: l2 radius of the attack on the noise.
      steps: of that attack, each 2 eps / steps long.
      weight: of the KL term.
      draws: noises.
      confidence: take the confidence from the base model, not from the current votes.

    Its label is a `SmoothedLabel`.

    Source: Jeong et al. 2023, "Confidence-aware training of smoothed classifiers",
    arXiv:2212.09000, and the authors' code.
    """

    @Itemized
    def objective(key: Key, f: Classifier, x: Array, label: SmoothedLabel) -> Terms:  # type: ignore[override]
        draw, coins = jax.random.split(key)
        noises = _draw(noise, draw, x, draws)
        target = label.probabilities
        logits = _around(f, x, noises)
        votes = jnp.mean(jnp.argmax(logits, axis=-1) == label.label)
        trust = target[label.label] if confidence else votes
        accepted = jnp.sum(jax.random.uniform(coins, (draws,)) < trust)
        accepted = jnp.maximum(accepted, 1)
        losses = jnp.sort(jax.vmap(cross_entropy, (0, None))(logits, label.label))
        easy = jnp.sum(jnp.where(jnp.arange(draws) < accepted, losses, 0.0)) / draws
        moved = _move_noises(_frozen(f, x), x, target, noises, eps, steps)
        worst = jnp.max(jax.vmap(_kl, (None, 0))(target, _around(f, x, moved)))
        loss = easy + weight * jnp.where(accepted == draws, worst, 0.0)
        return _terms(loss, logits, label.label)

    return objective


def _move_noises(
    f: Classifier, x: Array, target: Array, noises: Array, eps: Scalar, steps: int
) -> Array:
    """Noises of the same mean and power, within eps, that raise the KL to target."""

    def move(noise: Array) -> Array:
        gradient = jax.grad(lambda d: _kl(target, f(x + d)))

        def step(_: Array, d: Array) -> Array:
            g = gradient(d)
            d = d + (2.0 * eps / steps) * g / (_length(g) + 1e-8)
            d = noise + _shorten(d - noise, eps)
            scaled = (d - jnp.mean(d)) / jnp.sqrt(jnp.mean(d * d))
            return jnp.mean(noise) + scaled * jnp.sqrt(jnp.mean(noise * noise))

        return fori(steps, step, noise)

    return jax.lax.stop_gradient(jax.vmap(move)(noises))
