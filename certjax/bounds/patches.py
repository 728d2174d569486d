"""Coefficients of the entries of a convolution's result: patches instead of images.

Entry (c, y, x) of a convolutional layer depends on a window of each earlier layer. Its
coefficients are kept on that window alone: [R, Y, X, *window] instead of one image per
entry. Every step is local as well: a convolution widens the window, an elementwise
function multiplies it by the slopes under it.

Coefficients outside the image (where a window hangs over the padding) are kept at 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from certjax.bounds.problem import (
    Anchors,
    distance_at,
    is_nonlinear,
    Problem,
    values_of,
)
from certjax.bounds.relax import operands, relax, Relaxation
from certjax.convolution import convolve
from certjax.threat import Threat
from certjax.types import Array, Interval
from certjax.walk import Equation, Node, primitives as p


_recorders: list[list[int]] = []


@contextmanager
def recording(sizes: list[int]) -> Iterator[None]:
    """Collect the bytes of every array of patches that is made meanwhile."""
    _recorders.append(sizes)
    try:
        yield
    finally:
        _recorders.pop()


class Window(NamedTuple):
    """Where the patch of position (y, x) lies on a node: static numbers.

    It begins at `y * stride - start` along each of the node's axes `space`.
    """

    shape: tuple[int, ...]
    space: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: tuple[int, ...]
    grid: tuple[int, ...]

    @property
    def channels(self) -> int:
        """How many entries the node has at one position."""
        rest = [n for i, n in enumerate(self.shape) if i not in self.space]
        return int(np.prod(rest))

    @property
    def patch(self) -> tuple[int, ...]:
        """The node's shape with the window's size along space."""
        shape = list(self.shape)
        for axis, size in zip(self.space, self.size, strict=True):
            shape[axis] = size
        return tuple(shape)

    def indices(self) -> list[np.ndarray]:
        """For each axis [positions, size]: the entries under the window, unclipped."""
        return [
            (np.arange(n) * stride - start)[:, None] + np.arange(size)[None]
            for n, size, stride, start in zip(
                self.grid, self.size, self.stride, self.start, strict=True
            )
        ]

    def hangs_over(self) -> bool:
        """Does some window leave the image?"""
        return any(
            index.min() < 0 or index.max() >= self.shape[axis]
            for index, axis in zip(self.indices(), self.space, strict=True)
        )

    def covers(self) -> bool:
        """Is the window no smaller than the image?"""
        whole = [self.shape[axis] for axis in self.space]
        return np.prod(self.size) >= np.prod(whole)


class Patches(NamedTuple):
    """values: [R, *grid or 1s, *window.patch]."""

    values: Array
    window: Window


def unfold(value: Array, window: Window) -> Array:
    """[*grid, *patch]: what lies under each window; entries outside are arbitrary."""
    value = jnp.broadcast_to(value, window.shape)
    for i, (index, axis) in enumerate(zip(window.indices(), window.space, strict=True)):
        inside = np.clip(index, 0, window.shape[axis] - 1)
        value = jnp.take(value, inside.ravel(), axis=axis + i)
        shape = value.shape
        value = value.reshape(*shape[: axis + i], *index.shape, *shape[axis + i + 1 :])
        value = jnp.moveaxis(value, axis + i, i)
    return value


def _inside(window: Window) -> np.ndarray:
    """[*grid, *patch with 1 off space] bool: is the entry inside the image?"""
    count, rank = len(window.grid), len(window.shape)
    inside = np.ones((1,) * (count + rank), bool)
    for i, (index, axis) in enumerate(zip(window.indices(), window.space, strict=True)):
        good = (index >= 0) & (index < window.shape[axis])
        shape = [1] * (count + rank)
        shape[i], shape[count + axis] = index.shape
        inside = inside & good.reshape(shape)
    return inside


def identity(problem: Problem, node: Node) -> Window | None:
    """The 1 x 1 window of a convolution's result; None where there is no such thing."""
    space = _space(problem, node)
    shape = node.aval.shape
    if space is None or any(shape[axis] < 2 for axis in space):
        return None
    ones = (1,) * len(space)
    grid = tuple(shape[axis] for axis in space)
    return Window(shape, space, ones, ones, (0,) * len(space), grid)


def channels(window: Window, index: Array, dtype: Any) -> Patches:
    """Rows that pick channels, at every position: under a window of one pixel."""
    ones = (1,) * len(window.grid)
    rows = jax.nn.one_hot(index, window.channels, dtype=dtype)
    return Patches(rows.reshape(-1, *ones, *window.patch), window)


def split_signs(found: Array, window: Window) -> Interval:
    """Lower bounds of rows and of their negatives, [2R, *grid], as an interval."""
    lower, negated = jnp.split(found.reshape(-1, *window.grid), 2)
    return Interval(lower, -negated)


def placed(found: Interval, window: Window) -> Interval:
    """[channels, *grid] as an interval of the node."""
    rest = [n for i, n in enumerate(window.shape) if i not in window.space]
    axes = range(len(rest), len(window.shape))

    def place(v: Array) -> Array:
        return jnp.moveaxis(v.reshape(*rest, *window.grid), tuple(axes), window.space)

    return Interval(*map(place, found))


def bytes_of(way_back: Callable[[Array], Any]) -> int:
    """What one channel occupies: about six copies of the widest patches, both signs."""
    widest: list[int] = []
    with recording(widest):
        jax.eval_shape(way_back, jnp.zeros(1, int))
    return 3 * max(widest, default=1)


def minimum(threat: Threat, x: Array, patches: Patches) -> Array:
    """[R, *grid]: each window's part of the set, closed by its own coefficients."""
    window = patches.window
    known, axes = cropped((threat, x), window.shape, window)

    def one(known: tuple, coefficients: Array) -> Array:
        threat, x = known
        return threat.minimum(x, coefficients)

    for _ in window.grid:
        one = jax.vmap(one, (axes, 0))
    shape = (patches.values.shape[0], *window.grid, *window.patch)
    values = jnp.broadcast_to(patches.values, shape)
    return jax.vmap(one, (None, 0))(known, values)


def _space(problem: Problem, node: Node) -> tuple[int, ...] | None:
    """The image axes of a node, if a convolution made it, up to elementwise steps."""
    if node not in problem.positions:
        return None
    equation = problem.graph.equations[problem.positions[node]]
    if equation.primitive is p.conv_general_dilated_p:
        return tuple(equation.params["dimension_numbers"].out_spec[2:])
    before = [a for a in equation.inputs if a in problem.graph.depends]
    if equation.primitive in RESHAPES:
        space = _space(problem, before[0])
        return (
            None
            if space is None
            else _moved(before[0].aval.shape, node.aval.shape, space)
        )
    same = [a for a in before if a.aval.shape == node.aval.shape]
    if is_nonlinear(equation, values_of(problem, equation)) or not same:
        return None
    return _space(problem, same[0]) if equation.primitive in POINTWISE else None


def _moved(
    shape: Sequence[int], target: Sequence[int], space: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Axes of `shape` in `target`, which differs by axes of size 1 alone."""
    here = [i for i, n in enumerate(shape) if n > 1]
    there = [i for i, n in enumerate(target) if n > 1]
    if [shape[i] for i in here] != [target[i] for i in there]:
        return None
    if any(axis not in here for axis in space):
        return None
    return tuple(there[here.index(axis)] for axis in space)


# ------------------------------------------------------------------------ pulling back

RESHAPES = {p.reshape_p, p.squeeze_p, p.broadcast_in_dim_p}
POINTWISE = {
    p.add_p,
    p.sub_p,
    p.neg_p,
    p.mul_p,
    p.div_p,
    p.copy_p,
    p.stop_gradient_p,
}
Pulled = dict[int, Patches] | None


def pull_affine(equation: Equation, values: list, patches: Patches) -> Pulled:
    """Patches of the operands; None: no local rule."""
    chosen = operands(values)
    if equation.primitive in RESHAPES and len(chosen) == 1:
        return _pull_reshape(values, chosen[0], patches)
    if equation.primitive is p.conv_general_dilated_p and chosen == [0]:
        return _pull_convolution(equation, values, patches)
    if equation.primitive in POINTWISE:
        return _pull_pointwise(equation, values, chosen, patches)
    return None


def _pull_reshape(values: list, i: int, patches: Patches) -> Pulled:
    window, shape = patches.window, values[i].lower.shape
    space = _moved(window.shape, shape, window.space)
    if space is None:
        return None
    window = window._replace(shape=tuple(shape), space=space)
    lead = patches.values.shape[: 1 + len(window.grid)]
    moved = Patches(patches.values.reshape(*lead, *window.patch), window)
    return {i: moved}


def _pull_pointwise(
    equation: Equation, values: list, chosen: list[int], patches: Patches
) -> Pulled:
    window = patches.window
    if any(values[i].lower.shape != window.shape for i in chosen):
        return None
    return {
        i: patches._replace(values=_scaled(equation, values, i, patches))
        for i in chosen
    }


def _scaled(equation: Equation, values: list, i: int, patches: Patches) -> Array:
    """The coefficients of operand i of a pointwise affine equation."""
    flips = equation.primitive is p.neg_p or (equation.primitive is p.sub_p and i == 1)
    if flips:
        return -patches.values
    if equation.primitive is p.mul_p:
        return patches.values * unfold(values[1 - i], patches.window)[None]
    if equation.primitive is p.div_p:
        return patches.values / unfold(values[1], patches.window)[None]
    return patches.values


def weigh(patches: Patches, value: Array) -> Array:
    """[R, *grid]: `<patch, value under it>`."""
    under = unfold(value, patches.window)[None]
    axes = range(1 + len(patches.window.grid), patches.values.ndim)
    return jnp.sum(patches.values * under, axis=tuple(axes))


# A matrix product may do so many times a convolution's arithmetic; more where the image
# has few channels, which leave a convolution's vector lanes idle.
WASTE, WASTE_OF_FEW, FEW = 3.0, 9.0, 8


def _pull_convolution(equation: Equation, values: list, patches: Patches) -> Pulled:
    params, (x, kernel) = equation.params, values
    numbers = params["dimension_numbers"]
    shape = x.lower.shape
    plain = (
        all(d == 1 for d in params["lhs_dilation"]) and shape[numbers.lhs_spec[0]] == 1
    )
    if not plain or params["batch_group_count"] != 1:
        return None
    window = _widened(patches.window, params, shape, kernel.shape)

    params = params | {"padding": ((0, 0),) * len(window.size)}
    apply = lambda v: convolve(params, v, kernel, scatter=False)
    lead = patches.values.shape[: 1 + len(window.grid)]
    rows = patches.values.reshape(-1, *patches.window.patch)
    taps = [kernel.shape[axis] for axis in numbers.rhs_spec[2:]]
    few = kernel.shape[numbers.rhs_spec[1]] < FEW
    waste = np.prod(window.size) / np.prod(taps)
    dense = waste <= (WASTE_OF_FEW if few else WASTE)
    pulled = (
        _product(apply, window.patch, rows, params["precision"])
        if dense
        else _transposed(apply, window.patch, rows)
    )
    pulled = pulled.reshape(*lead, *window.patch)
    for sizes in _recorders:
        sizes.append(int(np.prod(pulled.shape)) * pulled.dtype.itemsize)
    if window.hangs_over():
        pulled = jnp.where(_inside(window)[None], pulled, 0.0)
    return {0: Patches(pulled, window)}


def _transposed(apply: Callable, shape: tuple[int, ...], rows: Array) -> Array:
    """[N, *shape]: every row through the transpose of a linear function."""
    zero = jnp.zeros(shape, rows.dtype)
    return jax.vmap(lambda row: jax.vjp(apply, zero)[1](row)[0])(rows)


def _product(
    apply: Callable, shape: tuple[int, ...], rows: Array, precision: Any
) -> Array:
    """The same by one matrix product."""
    size = int(np.prod(rows.shape[1:]))
    eye = jnp.eye(size, dtype=rows.dtype).reshape(size, *rows.shape[1:])
    matrix = _transposed(apply, shape, eye).reshape(size, -1)
    product = jnp.matmul(rows.reshape(-1, size), matrix, precision=precision)
    return product.reshape(-1, *shape)


def _widened(
    window: Window, params: dict, shape: tuple[int, ...], kernel: tuple[int, ...]
) -> Window:
    """The window on a convolution's operand under a window on its result."""
    numbers = params["dimension_numbers"]
    reach = [
        (kernel[axis] - 1) * d + 1
        for axis, d in zip(numbers.rhs_spec[2:], params["rhs_dilation"], strict=True)
    ]
    steps, pads = params["window_strides"], [low for low, _ in params["padding"]]
    # the result's axes may be listed in another order than the window's
    order = [numbers.out_spec[2:].index(axis) for axis in window.space]
    pick = lambda v: [v[k] for k in order]
    reach, steps, pads = pick(reach), pick(steps), pick(pads)
    return window._replace(
        shape=tuple(shape),
        space=tuple(pick(numbers.lhs_spec[2:])),
        size=tuple(
            (n - 1) * s + r for n, s, r in zip(window.size, steps, reach, strict=True)
        ),
        stride=tuple(a * s for a, s in zip(window.stride, steps, strict=True)),
        start=tuple(
            a * s + b for a, s, b in zip(window.start, steps, pads, strict=True)
        ),
    )


class Lines(NamedTuple):
    """Elementwise lines as they lie under a window; one entry of each list per side.

    slopes: of every operand, [R or 1, *grid, *patch].
    distances: from the result's anchor, likewise; None: they go through it.
    """

    slopes: list[list[Array]]
    distances: list[Array | None]


def elementwise(relaxation: Relaxation, values: list, shape: tuple[int, ...]) -> bool:
    """Are both sides lines in operands of the result's shape?"""
    same = all(values[i].lower.shape == shape for i in operands(values))
    return same and all(side.slopes is not None for side in relaxation)


def lines_under(relaxation: Relaxation, anchors: Anchors, window: Window) -> Lines:
    """The lines that an equation was solved with."""
    under = lambda v: unfold(v, window)[None]
    distances = [distance_at(side, anchors) for side in relaxation]
    return Lines(
        [[under(slope) for slope in side.slopes or ()] for side in relaxation],
        [None if d is None else under(d) for d in distances],
    )


def own_lines_under(
    equation: Equation, values: list, anchors: Anchors, share: Array, window: Window
) -> Lines:
    """Lines with a share of its own for every coefficient: share like the patches."""
    like = lambda v: unfold(v, window) if jnp.shape(v) == window.shape else v
    under = [jax.tree.map(like, v) for v in values]
    placed = Anchors([like(a) for a in anchors.operands], like(anchors.result))

    def one(share: Array) -> tuple:
        sides = relax(equation, under, share)
        spread = lambda v: jnp.broadcast_to(v, share.shape)
        slopes = [[spread(slope) for slope in side.slopes or ()] for side in sides]
        # the anchor lies on the line of the default share, not on this one
        sides = [side._replace(homogeneous=False) for side in sides]
        return slopes, [distance_at(side, placed) for side in sides]

    return Lines(*jax.vmap(one)(share))


def pull_relaxed(
    lines: Lines, chosen: list[int], patches: Patches
) -> tuple[dict[int, Patches], Array]:
    """Patches through elementwise lines, by the sign of each coefficient.

    With the patches [R, *grid]: the lines' distances at the anchors.
    """
    window = patches.window
    signs = (jnp.maximum(patches.values, 0.0), jnp.minimum(patches.values, 0.0))
    parts = {}
    for k, i in enumerate(chosen):
        terms = [
            part * slopes[k] for part, slopes in zip(signs, lines.slopes, strict=True)
        ]
        parts[i] = Patches(terms[0] + terms[1], window)
    total = sum(
        part * distance
        for part, distance in zip(signs, lines.distances, strict=True)
        if distance is not None
    )
    axes = tuple(range(1 + len(window.grid), patches.values.ndim))
    return parts, jnp.sum(total, axis=axes)


def add(a: Patches | None, b: Patches) -> Patches | None:
    """The sum of two windows' coefficients on one node; None: they do not line up."""
    if a is None:
        return b
    if a.window.stride != b.window.stride or a.window.space != b.window.space:
        return None
    starts = [max(s, t) for s, t in zip(a.window.start, b.window.start, strict=True)]
    ends = [
        max(n - s, m - t)
        for n, s, m, t in zip(
            a.window.size, a.window.start, b.window.size, b.window.start, strict=True
        )
    ]
    sizes = tuple(s + e for s, e in zip(starts, ends, strict=True))
    window = a.window._replace(size=sizes, start=tuple(starts))
    return Patches(_grown(a, window) + _grown(b, window), window)


def plus(known: Any, part: Any) -> Any:
    """The sum of coefficients of one node; None where patches do not line up."""
    if isinstance(part, Patches):
        return add(known, part)
    return part if known is None else known + part


def images(coefficients: Any) -> Any:
    """Coefficients as images, whatever they are."""
    local = isinstance(coefficients, Patches)
    return densify(coefficients) if local else coefficients


def _grown(patches: Patches, window: Window) -> Array:
    lead = patches.values.ndim - len(window.shape)
    pads = [(0, 0)] * patches.values.ndim
    for k, axis in enumerate(window.space):
        before = window.start[k] - patches.window.start[k]
        pads[lead + axis] = (before, window.size[k] - patches.window.size[k] - before)
    return jnp.pad(patches.values, pads)


def densify(patches: Patches) -> Array:
    """[R * positions, *node]: one image per row."""
    window, values = patches.window, patches.values
    count, grid = values.shape[0], window.grid
    values = jnp.broadcast_to(values, (count, *grid, *values.shape[1 + len(grid) :]))
    for i, (index, axis) in enumerate(zip(window.indices(), window.space, strict=True)):
        place = (index[..., None] == np.arange(window.shape[axis])).astype(values.dtype)
        here = 1 + len(grid) + axis
        moved = jnp.moveaxis(jnp.moveaxis(values, here, -1), 1 + i, 0)
        shape = moved.shape
        flat = moved.reshape(shape[0], -1, shape[-1])
        placed = jnp.einsum(
            "nap,nph->nah", flat, place, precision=lax.Precision.HIGHEST
        )
        placed = placed.reshape(*shape[:-1], -1)
        values = jnp.moveaxis(jnp.moveaxis(placed, 0, 1 + i), -1, here)
    return values.reshape(-1, *window.shape)


def cropped(tree: Any, like: tuple[int, ...], window: Window) -> tuple[Any, Any]:
    """Arrays of the node's shape unfolded, the rest as it is; and the vmap axes."""
    whole = lambda leaf: jnp.shape(leaf) == like
    values = jax.tree.map(lambda v: unfold(v, window) if whole(v) else v, tree)
    axes = jax.tree.map(lambda v: 0 if whole(v) else None, tree)
    return values, axes
