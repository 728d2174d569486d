"""Square attack: random search with squares, no gradients.

Source: Andriushchenko et al. 2020, arXiv:1912.00049, algorithms 1 to 3.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certjax.attacks.geometry import into_l1_box, size
from certjax.attacks.losses import Goal, Loss, margin_loss
from certjax.attacks.search import (
    at_random,
    check_counts,
    choose,
    counting,
    judge,
    Judged,
    keep,
    repeat,
)
from certjax.threat import L1, L2, Threat
from certjax.types import Array, Attack, Classifier, Key


# the share of the pixels that a square covers is halved after these numbers of queries
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    threat: Threat,
    *,
    queries: int = 5000,
    restarts: int = 1,
    share: float = 0.8,
    horizon: int = 10_000,
    loss: Loss = margin_loss,
    goal: Goal = "untargeted",
) -> Attack:
    """Random search over square-shaped changes; black box, stops once it succeeds.

    Args:
      threat: the perturbation set; a Box is searched like a linf ball.
      queries: forward passes of one restart.
      restarts: independent starts.
      share: of the pixels that the first squares cover.
      horizon: number of queries over which the squares shrink; AutoAttack's 10,000
        whatever the queries. With few queries, `horizon=queries` breaks more.
      loss: the score that is compared between queries.
      goal: "targeted": `label` is the class to reach.

    Returns:
      attack(key, f, x, label) -> z. Images are [H, W, C]; a flat input [D] is searched
      with intervals in place of squares. `attack.counted(..)` also returns the number
      of queries that were made.
    """
    check_counts(queries=queries, restarts=restarts, horizon=horizon)

    def counted(key: Key, f: Classifier, x: Array, label: Array) -> tuple[Array, Array]:
        moves = _moves(threat, x, _Schedule(queries, share, horizon))

        def at(z: Array, key: Key) -> Judged:
            return judge(at_random(f, key), label, loss, goal)(threat.project(x, z))

        def query(own: Key, i: Array, best: Judged) -> Judged:
            draw = jax.random.fold_in(own, i)
            new = at(moves.change(draw, best.z, i), draw)
            return choose(new.fooled | (new.loss > best.loss), new, best)

        def restart(r: Array, state: _Spent) -> _Spent:
            own = jax.random.fold_in(key, r)
            first = _Spent(at(moves.start(own), own), jnp.int32(1))
            again = lambda i, s: _Spent(query(own, i, s.best), s.queries + 1)
            end = repeat(queries - 1, again, first, _fooled)
            return _Spent(keep(state.best, end.best), state.queries + end.queries)

        clean = _Spent(at(x, key), jnp.int32(0))  # known before the attack
        end = repeat(restarts, restart, clean, _fooled)
        return end.best.z, end.queries

    return counting(counted)


class _Spent(NamedTuple):
    """The best point so far, and the forward passes that it took."""

    best: Judged
    queries: Array


def _fooled(state: _Spent) -> Array:
    return state.best.fooled


class _Schedule(NamedTuple):
    queries: int
    share: float
    horizon: int


def sides(plan: _Schedule, pixels: int, least: int) -> np.ndarray:
    """[queries] int: the side of the i-th square, which query i + 1 tries."""
    made = np.arange(plan.queries) * (10_000 / plan.horizon)
    halvings = np.searchsorted(HALVINGS, made, side="left")
    side = np.sqrt(plan.share * pixels / 2.0**halvings)
    return np.maximum(np.rint(side).astype(np.int32), least)


class _Moves(NamedTuple):
    start: Callable[[Key], Array]
    change: Callable[[Key, Array, Array], Array]


def _as_image(x: Array) -> Array:
    """[H, W, C] view: a flat [D] becomes [D, 1, 1], other shapes keep the last axis."""
    if x.ndim == 3:
        return x
    if x.ndim < 3:
        return x.reshape((-1, 1, 1))
    return x.reshape((x.shape[0], -1, x.shape[-1]))


def _windows(x: Array, plan: _Schedule, least: int) -> tuple[Array, Array]:
    """[queries] heights and widths; a square's area where the image is a line."""
    h, w, _ = _as_image(x).shape
    side = sides(plan, h * w, least)
    if min(h, w) == 1:
        side = side**2
    return jnp.asarray(np.minimum(side, h)), jnp.asarray(np.minimum(side, w))


def _place(key: Key, shape: tuple, height: Array, width: Array) -> tuple[Array, Array]:
    """The corner of a window drawn uniformly among those that fit."""
    return _corner(jax.random.uniform(key, (2,)), shape, height, width)


def _corner(
    drawn: Array, shape: tuple, height: Array, width: Array
) -> tuple[Array, Array]:
    """The corner that two numbers in [0, 1) choose among those of windows that fit."""
    room = jnp.stack([shape[0] - height, shape[1] - width]) + 1
    corner = jnp.minimum(jnp.floor(drawn * room).astype(jnp.int32), room - 1)
    return corner[0], corner[1]


def _mask(
    shape: tuple, corner: tuple[Array, Array], height: Array, width: Array
) -> Array:
    """[H, W, 1] bool: the window."""
    rows = jnp.arange(shape[0])[:, None, None] - corner[0]
    columns = jnp.arange(shape[1])[None, :, None] - corner[1]
    return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)


def _signs(key: Key, shape: tuple) -> Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _moves(threat: Threat, x: Array, plan: _Schedule) -> _Moves:
    if isinstance(threat, L1 | L2):
        return _smooth_moves(threat, x, plan)
    return _corner_moves(threat, x, plan)


def _corner_moves(threat: Threat, x: Array, plan: _Schedule) -> _Moves:
    """Linf: every change jumps to a corner of the box, the same one per channel."""
    lower, upper = threat.box(x)
    shape = _as_image(x).shape
    heights, widths = _windows(x, plan, 1)

    def start(key: Key) -> Array:
        stripes = jnp.broadcast_to(_signs(key, (1, *shape[1:])), shape)
        return jnp.where(stripes.reshape(x.shape) > 0, upper, lower)

    def change(key: Key, z: Array, i: Array) -> Array:
        # one draw for all: the generator is a tenth of a query of a small network
        drawn = jax.random.uniform(key, (2 + shape[2],))
        window = heights[i], widths[i]
        mask = _mask(shape, _corner(drawn[:2], shape, *window), *window)
        up = drawn[2:] < 0.5
        mask, up = (jnp.broadcast_to(v, shape).reshape(x.shape) for v in (mask, up))
        return jnp.where(mask, jnp.where(up, upper, lower), z)

    return _Moves(start, change)


def _smooth_moves(threat: L1 | L2, x: Array, plan: _Schedule) -> _Moves:
    """L2 and l1: move mass between two windows, shaped as a pair of opposite bumps."""
    shape = _as_image(x).shape
    heights, widths = _windows(x, plan, 3)
    center, norm, eps = _as_image(x), type(threat), jnp.max(jnp.asarray(threat.eps))

    def spent(delta: Array) -> Array:
        """The point at distance eps along a perturbation."""
        length = size(norm, delta)
        delta = delta * eps / jnp.where(length > 0, length, 1.0)
        z = (center + delta).reshape(x.shape)
        return into_l1_box(threat, x, z, eps) if norm is L1 else z

    def start(key: Key) -> Array:
        return spent(_tiles(key, shape))

    def change(key: Key, z: Array, i: Array) -> Array:
        first, second, bump = jax.random.split(key, 3)
        window = heights[i], widths[i]
        corner = _place(first, shape, *window)
        grown = _mask(shape, corner, *window)
        emptied = _mask(shape, _place(second, shape, *window), *window)
        delta = _as_image(z) - center
        new = _bump(bump, shape, corner, *window)
        new = _regrown(norm, new, delta, grown, emptied, eps)
        return spent(jnp.where(grown, new, jnp.where(emptied, 0.0, delta)))

    return _Moves(start, change)


def _regrown(
    norm: type, bump: Array, delta: Array, grown: Array, emptied: Array, eps: Array
) -> Array:
    """The bump plus the old window, with the norm that both windows leave to spend."""
    per_channel = lambda v: jax.vmap(functools.partial(size, norm), -1)(v)[None, None]
    power = 2 if norm is L2 else 1
    old = jnp.where(grown, delta, 0.0)
    new = jnp.where(grown, bump + old / (1e-12 + per_channel(old)), 0.0)
    freed = size(norm, jnp.where(grown | emptied, delta, 0.0)) ** power
    unspent = jnp.maximum(eps**power - size(norm, delta) ** power, 0.0)
    budget = (unspent / delta.shape[-1] + freed) ** (1 / power)
    return new / (1e-12 + per_channel(new)) * budget


def _bump(
    key: Key, shape: tuple, corner: tuple[Array, Array], height: Array, width: Array
) -> Array:
    """[H, W, C]: a window of two opposite bumps, one above or beside the other."""
    turned, sign = jax.random.split(key)
    rows = jnp.arange(shape[0])[:, None] - corner[0]
    columns = jnp.arange(shape[1])[None, :] - corner[1]
    upright = _pair(rows, columns, height, width)
    flat = _pair(columns, rows, width, height)
    turn = jax.random.bernoulli(turned) & (height == width)
    return jnp.where(turn, flat, upright)[..., None] * _signs(sign, (1, 1, shape[2]))


def _pair(rows: Array, columns: Array, height: Array, width: Array) -> Array:
    """A positive bump on the upper half of a window, a negative one on the lower."""
    half = height // 2
    upper = _pyramid(rows, columns, half, width)
    lower = _pyramid(rows - half, columns, height - half, width)
    return (upper - lower) * math.sqrt(0.5)


def _pyramid(rows: Array, columns: Array, height: Array, width: Array) -> Array:
    """Centred bump of l2 norm 1, zero outside [0, height) x [0, width)."""
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    peak = jnp.maximum(height // 2, width // 2) + 1
    distance = jnp.maximum(jnp.abs(rows - height // 2), jnp.abs(columns - width // 2))
    # layer after layer, the c-th of height 1 / (c + 1)^2, covers distances up to c
    layers = np.cumsum(1.0 / np.arange(1, sum(rows.shape) + sum(columns.shape)) ** 2)
    layers = jnp.asarray(np.concatenate([[0.0], layers]), jnp.float32)
    bump = jnp.where(inside, layers[peak] - layers[jnp.minimum(distance, peak)], 0.0)
    norm = jnp.sqrt(jnp.sum(bump**2))
    return bump / jnp.where(norm > 0, norm, 1.0)


def _tiles(key: Key, shape: tuple) -> Array:
    """[H, W, C]: a grid of five by five pairs of bumps of random signs."""
    (h, w, c), sign_key, turn_key = shape, *jax.random.split(key)
    height, width = max(h // 5, 1), max(w // 5, 1)
    top, left = (h - 5 * height) // 2, (w - 5 * width) // 2
    rows, columns = np.arange(h) - max(top, 0), np.arange(w) - max(left, 0)
    grid = h // height, w // width
    local = jnp.asarray(rows % height)[:, None], jnp.asarray(columns % width)[None, :]
    upright = _tile(height, width)[local]
    flat = _tile(width, height).T[local]
    i, j = rows // height, columns // width
    inside = ((i >= 0) & (i < grid[0]))[:, None] & ((j >= 0) & (j < grid[1]))[None, :]
    at = np.clip(i, 0, grid[0] - 1)[:, None], np.clip(j, 0, grid[1] - 1)[None, :]
    turn = jax.random.bernoulli(turn_key, 0.5, grid)[at] & (height == width)
    pattern = jnp.where(inside, jnp.where(turn, flat, upright), 0.0)
    return pattern[..., None] * _signs(sign_key, (*grid, c))[at]


def _tile(height: int, width: int) -> Array:
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return _pair(rows, columns, jnp.asarray(height), jnp.asarray(width))
