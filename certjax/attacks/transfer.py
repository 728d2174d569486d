"""Attacks through other functions: surrogates, straight-through gradients, noise.

Adaptive attacks compute gradients of something other than the function that decides:
an ensemble of surrogates, a differentiable stand-in for a defense, a noisy average.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from certjax.attacks.gradient import pgd
from certjax.attacks.losses import log_odds, Loss
from certjax.attacks.search import (
    at_random,
    bare,
    check_counts,
    checked_input,
    Expectation,
    guarded,
    judge,
    Judged,
    keep,
    radius,
    repeat,
    unit,
)
from certjax.loops import fori, loopable
from certjax.threat import Box, Threat
from certjax.types import Array, Attack, Classifier, Key, Scalar


CEILING = 5.0  # of an input's loss in `universal`: once well broken it stops counting


def transfer(attack: Attack, surrogates: Sequence[Classifier]) -> Attack:
    """Attack the mean probabilities of surrogates; f itself is never evaluated.

    Args:
      attack: with gradients, e.g. `mi_fgsm(threat)`.
      surrogates: other classifiers of the same classes.

    Source: Liu et al. 2017, arXiv:1611.02770, section 2.
    """
    if not surrogates:
        raise ValueError("transfer needs at least one surrogate, got none")

    def ensemble(z: Array) -> Array:
        log_p = [jax.nn.log_softmax(each(z)) for each in surrogates]
        return jax.nn.logsumexp(jnp.stack(log_p), axis=0) - jnp.log(len(log_p))

    def run(key: Key, f: Classifier, x: Array, label: Array) -> Array:  # noqa: ARG001
        return attack(key, ensemble, x, label)

    return run


def straight_through(
    defense: Callable[[Array], Array],
    stand_in: Callable[[Array], Array] = lambda x: x,
) -> Callable[[Array], Array]:
    """BPDA: the values of a defense with the gradients of a stand-in.

    Attack `lambda x: f(straight_through(defense)(x))`.

    Args:
      defense: any function of an input, differentiable or not.
      stand_in: a differentiable function close to it; the identity by default.

    Source: Athalye et al. 2018, arXiv:1802.00420, section 4.1.
    """

    def through(x: Array) -> Array:
        smooth = stand_in(x)
        return smooth + jax.lax.stop_gradient(defense(x) - smooth)

    return through


def noisy(f: Classifier, sigma: Scalar, draws: int) -> Expectation:
    """f under Gaussian noise, fresh at every step of an attack.

    An attack on it, PGD for instance, is the attack of SmoothAdv on the smoothed
    classifier; its points maximise the mean loss over the noise.

    Source: Salman et al. 2019, arXiv:1906.04584, section 2.2.
    """
    check_counts(draws=draws)

    def sample(key: Key, x: Array) -> Array:
        return f(x + sigma * jax.random.normal(key, x.shape, x.dtype))

    return Expectation(sample, draws, jax.random.key(0))


def smoothed(
    f: Classifier, key: Key, x: Array, sigma: Scalar, draws: int
) -> Classifier:
    """The log of f's mean softmax over fixed draws of noise: a plain function.

    Any attack may follow, DDN for instance, as in SmoothAdv.

    Args:
      f: the base classifier.
      key: of the draws.
      x: an input, for its shape.
      sigma: standard deviation of the noise, input units.
      draws: number of noise samples, the same at every point.

    Source: Salman et al. 2019, arXiv:1906.04584, equation 5.
    """
    check_counts(draws=draws)
    noise = sigma * jax.random.normal(key, (draws, *jnp.shape(x)))

    def g(z: Array) -> Array:
        log_p = jax.nn.log_softmax(jax.vmap(lambda n: f(z + n))(noise), axis=-1)
        return jax.nn.logsumexp(log_p, axis=0) - jnp.log(draws)

    return g


def diverse(
    f: Classifier, *, smallest: float = 0.9, share: float = 0.5, draws: int = 1
) -> Expectation:
    """f on randomly shrunk and padded images: the diverse inputs of DI-FGSM.

    Args:
      f: classifier of one image [H, W, C].
      smallest: the least scale.
      share: probability of a change.
      draws: per gradient.

    Source: Xie et al. 2019, arXiv:1803.06978, section 3.3.
    """
    check_counts(draws=draws)

    def sample(key: Key, x: Array) -> Array:
        size_key, place_key, flip_key = jax.random.split(key, 3)
        scale = jax.random.uniform(size_key, (2,), x.dtype, smallest, 1.0)
        sides = jnp.asarray(x.shape[:2], x.dtype)
        room = (1.0 - scale) * sides
        offset = jax.random.uniform(place_key, (2,), x.dtype) * room
        resized = jax.image.scale_and_translate(
            x, x.shape, (0, 1), scale, offset, "linear", antialias=False
        )
        change = jax.random.bernoulli(flip_key, share)
        return f(jnp.where(change, resized, x))

    return Expectation(sample, draws, jax.random.key(0))


def universal(
    threat: Threat,
    *,
    steps: int = 100,
    step_size: Scalar | None = None,
    loss: Loss = log_odds,
) -> Callable[[Key, Classifier, Array, Array], Array]:
    """One perturbation for all inputs: projected ascent on their mean loss.

    Returns:
      run(key, f, xs, labels) -> delta, shaped like one input; the attacked inputs are
      `threat.project(x, x + delta)`.

    Source: Shafahi et al. 2018, arXiv:1811.11304, algorithm 2.
    """
    check_counts(steps=steps)

    def run(key: Key, f: Classifier, xs: Array, labels: Array) -> Array:
        xs = checked_input(xs)
        center = jnp.zeros_like(xs[0])
        free = _around_zero(threat)
        length = 2.5 / steps * radius(free, center)
        length = length if step_size is None else step_size
        start = free.sample(key, center)

        g = loopable(f, xs[0])

        def mean_loss(delta: Array) -> Array:
            each = lambda x, y: jnp.minimum(
                loss(g(threat.project(x, x + delta)), y), CEILING
            )
            return jnp.mean(jax.vmap(each)(xs, labels))

        def step(_: int, delta: Array) -> Array:
            slope = jnp.nan_to_num(jax.grad(mean_loss)(delta))
            return free.project(center, delta + length * free.ascend(unit(slope)))

        return fori(steps, step, start)

    return run


def _around_zero(threat: Threat) -> Threat:
    if not hasattr(threat, "eps"):
        raise TypeError("universal needs Linf, L2 or L1, got a Box")
    width = threat.high - threat.low
    return dataclasses.replace(threat, low=-width, high=width)


def rotation_translation(
    threat: Threat,
    *,
    degrees: float = 30.0,
    pixels: float = 3.0,
    angles: int = 31,
    shifts: int = 5,
    loss: Loss = log_odds,
) -> Attack:
    """The worst rotation and translation of a grid, by exhaustive search.

    Args:
      threat: for its domain only: the result is a moved image, not a near one.
      degrees: largest rotation either way.
      pixels: largest shift either way, along both axes.
      angles: grid points of the rotation.
      shifts: grid points of each shift.
      loss: what is worst.

    Source: Engstrom et al. 2019, arXiv:1712.02779, section 3.
    """
    check_counts(angles=angles, shifts=shifts)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        if x.ndim != 3:
            raise ValueError(f"rotation needs an image [H, W, C], got {x.shape}")
        at = judge(at_random(f, key), label, loss, "untargeted")
        turn = jnp.deg2rad(jnp.linspace(-degrees, degrees, angles))
        slide = jnp.linspace(-pixels, pixels, shifts)
        grid = jnp.stack(jnp.meshgrid(turn, slide, slide), axis=-1).reshape(-1, 3)

        def attempt(i: Array, best: Judged) -> Judged:
            moved = jnp.clip(_moved(x, grid[i]), threat.low, threat.high)
            return keep(best, at(moved))

        return fori(len(grid), attempt, at(x)).z

    return guarded(attack)


def _moved(x: Array, pose: Array) -> Array:
    """[H, W, C] rotated about its centre and shifted, bilinear, 0 outside."""
    angle, down, right = pose
    h, w, _ = x.shape
    rows, columns = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij")
    rows, columns = rows - (h - 1) / 2 - down, columns - (w - 1) / 2 - right
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    source = [
        cos * rows - sin * columns + (h - 1) / 2,
        sin * rows + cos * columns + (w - 1) / 2,
    ]
    sample = functools.partial(jax.scipy.ndimage.map_coordinates, order=1)
    return jax.vmap(lambda c: sample(c, source), in_axes=-1, out_axes=-1)(x)


def patch(
    threat: Threat,
    *,
    side: int = 5,
    steps: int = 100,
    places: int = 5,
    step_size: float = 0.1,
    loss: Loss = log_odds,
) -> Attack:
    """A square of free pixels, at the worst of several random places.

    Args:
      threat: for its domain only: inside the square anything is allowed.
      side: of the square, in pixels.
      steps: gradient evaluations per place.
      places: number of places that are tried.
      step_size: of the sign steps, as a share of half the domain's width.
      loss: what is ascended.

    Source: Brown et al. 2017, arXiv:1712.09665, for one image, without transforms.
    """
    check_counts(side=side, steps=steps, places=places)

    def attack(key: Key, f: Classifier, x: Array, label: Array) -> Array:
        if x.ndim != 3 or side > min(x.shape[:2]):
            raise ValueError(
                f"a patch of side {side} needs an image [H, W, C] of at least that "
                f"side, got {x.shape}"
            )
        at = judge(at_random(f, key), label, loss, "untargeted")

        def place(i: Array, best: Judged) -> Judged:
            own = jax.random.fold_in(key, i)
            inside = _square_at(own, x.shape, side)
            free = Box(
                jnp.where(inside, threat.low, x), jnp.where(inside, threat.high, x)
            )
            climb = pgd(free, steps=steps, step_size=step_size, loss=loss)
            return keep(best, at(bare(climb)(own, f, x, label)))

        return repeat(places, place, at(x), lambda best: best.fooled).z

    return guarded(attack)


def _square_at(key: Key, shape: tuple, side: int) -> Array:
    """[H, W, 1] bool: a square at a random place."""
    room = jnp.asarray(shape[:2]) - side + 1
    corner = jax.random.randint(key, (2,), 0, room)
    rows = jnp.arange(shape[0])[:, None, None] - corner[0]
    columns = jnp.arange(shape[1])[None, :, None] - corner[1]
    return (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
