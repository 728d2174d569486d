"""Interval bounds: soundness for every operation, tightness where it is a theorem."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from certjax.bounds import (
    crown,
    ibp,
    ibp_with_layers,
    Interval,
    UnsupportedPrimitive,
)
from certjax.specification import margins
from certjax.threat import Box, L2, Linf


ULPS = 4e-6
SHAPE = (4, 6)
KEY = jax.random.key(0)
X = jax.random.uniform(KEY, SHAPE)
W = jax.random.normal(jax.random.key(1), (6, 6))
IMAGE = jax.random.uniform(KEY, (6, 6, 2))


def interval_shifted(shift, scale=2.0, eps=0.3):
    """A box of radius eps whose centres spread around `shift`."""
    centre = shift + scale * (X - 0.5)
    return Box(centre - eps, centre + eps), centre


def points(threat, x, samples=256):
    """Random points and random corners of the set."""
    keys = jax.random.split(jax.random.key(7), samples)
    inner = jax.vmap(lambda key: threat.sample(key, x))(keys)
    lower, upper = (v[None] for v in threat.box(x))
    corner = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, x.shape))(keys)
    return jnp.concatenate([inner, jnp.where(corner, lower, upper)])


def check_sound(f, threat, x, slack=ULPS):
    @jax.jit  # one program: compiling is what takes the time here
    def evaluate(x, zs):
        return ibp(f)(threat, x), jax.vmap(f)(zs)

    (lower, upper), outs = jax.tree.map(np.asarray, evaluate(x, points(threat, x)))
    assert lower.shape == upper.shape == outs.shape[1:]
    scale = slack * (1 + np.abs(outs))
    assert not np.isnan(lower).any()
    assert not np.isnan(upper).any()
    assert (lower <= upper).all()
    below, above = lower[None] - outs, outs - upper[None]
    assert (below <= scale).all(), f"below by {below.max()}"
    assert (above <= scale).all(), f"above by {above.max()}"
    return lower, upper


def check_tight(f, threat, x, slack=1e-3, samples=4000):
    """The bounds are reached, up to sampling (monotone and one-entry functions)."""
    lower, upper = check_sound(f, threat, x)

    @jax.jit
    def reached(zs):
        outs = jax.vmap(f)(zs)
        return outs.min(0), outs.max(0)

    lo, hi = (v[None] for v in threat.box(x))
    t = jnp.linspace(0, 1, samples).reshape(-1, *[1] * x.ndim)
    least, greatest = reached(lo + t * (hi - lo))
    np.testing.assert_allclose(lower, least, atol=slack, rtol=slack)
    np.testing.assert_allclose(upper, greatest, atol=slack, rtol=slack)


ELEMENTWISE = {
    "abs": jnp.abs,
    "neg": jnp.negative,
    "sign": jnp.sign,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "square": jnp.square,
    "times itself": lambda x: x * x,
    "cube": lambda x: x**3,
    "fourth power": lambda x: x**4,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "leaky_relu falling": lambda x: jax.nn.leaky_relu(x, -0.4),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "gelu tanh": partial(jax.nn.gelu, approximate=True),
    "gelu erf": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "jitted silu": jax.jit(jax.nn.silu),
    "hard_tanh": jax.nn.hard_tanh,
    "clamp": lambda x: jnp.clip(x, -0.5, 0.4),
    "scale down": lambda x: x / -3.0,
    "atan": jnp.arctan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "floor": jnp.floor,
    "identity": lax.stop_gradient,
    "power of two": lambda x: jnp.power(2.0, x),
    "remat": jax.checkpoint(jnp.tanh),
}
LOOSE = {"celu", "floor", "sign"}  # a hull, or a jump that a grid cannot hit


@pytest.mark.parametrize("shift", [-4.0, 0.0, 4.0])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name, shift):
    check = check_sound if name in LOOSE else check_tight
    check(ELEMENTWISE[name], *interval_shifted(shift))


POSITIVE = {
    "log": jnp.log,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "reciprocal": lambda x: 1.0 / x,
    "power -2": lambda x: x**-2,
    "power 2.5": lambda x: x**2.5,
    "power -0.5": lambda x: jnp.power(x, -0.5),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_elementwise_on_positive_numbers(name):
    check_tight(POSITIVE[name], *interval_shifted(2.0), slack=4e-3)


STRUCTURE = {
    "dense": lambda x: x @ W + 1.0,
    "dense from the left": lambda x: W.T[:4, :4] @ x,
    "batched matmul": lambda x: jnp.matmul(x.reshape(2, 2, 6), W.reshape(2, 6, 3)),
    "einsum": lambda x: jnp.einsum("ij,jk,k->i", x, W, W[0]),
    "add": lambda x: x + x[::-1],
    "subtract": lambda x: x - 2.0 * x[::-1],
    "product of two": lambda x: x * x[::-1],
    "quotient of two": lambda x: x / (2.0 + x[::-1] ** 2),
    "product of matrices": lambda x: (x - 0.5) @ (x - 0.5).T,
    "reduce max": lambda x: x.max(axis=1),
    "reduce min": lambda x: x.min(axis=0),
    "reduce sum": lambda x: x.sum(axis=1),
    "mean": lambda x: x.mean(),
    "variance": lambda x: x.var(axis=1),
    "cumsum": lambda x: jnp.cumsum(x, axis=1),
    "cummax": lambda x: lax.cummax(x, axis=1),
    "reshape, transpose": lambda x: x.reshape(6, 4).T,
    "slice": lambda x: x[1:3, ::2],
    "dynamic slice": lambda x: lax.dynamic_slice(x, (1, 2), (2, 2)),
    "gather": lambda x: x[jnp.array([2, 0, 2])],
    "concatenate": lambda x: jnp.concatenate([x, -x, jnp.ones((1, 6))]),
    "split": lambda x: jnp.split(x, 2)[1] - jnp.split(x, 2)[0],
    "stack": lambda x: jnp.stack([x, 2 * x]),
    "pad": lambda x: jnp.pad(x, 1, constant_values=-1.0),
    "rev": lambda x: x[::-1, ::-1],
    "broadcast": lambda x: jnp.broadcast_to(x[:, :1], (2, 4, 3)),
    "where, constant": lambda x: jnp.where(W[:4] > 0, x, -x),
    "where, undecided": lambda x: jnp.where(x > 0.5, x, 0.2 * x),
    "where, equal": lambda x: jnp.where(x == 0.5, 1.0, x),
    "where, between": lambda x: jnp.where((x > 0.3) & ~(x > 0.6) | (x < 0.1), x, -x),
    "maximum of two": lambda x: jnp.maximum(x, x[::-1]),
    "minimum of two": lambda x: jnp.minimum(x, x[::-1]),
    "sort": lambda x: jnp.sort(x, axis=1),
    "softmax": lambda x: jax.nn.softmax(5 * x, axis=-1),
    "softmax, axis 0": lambda x: jax.nn.softmax(5 * x, axis=0),
    "log_softmax": lambda x: jax.nn.log_softmax(5 * x),
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=1),
    "layer norm": lambda x: (x - x.mean()) / jnp.sqrt(x.var() + 1e-3),
    "convert": lambda x: (10 * x).astype(jnp.int32).astype(jnp.float32),
    "iota": lambda x: x * lax.broadcasted_iota(jnp.float32, SHAPE, 1),
    "scan": lambda x: lax.scan(lambda c, r: (jnp.tanh(c + r), c), x[0], x)[1],
    "scan, reversed": lambda x: lax.scan(
        lambda c, r: (c + r, c * 2), x[0], x, reverse=True
    )[1],
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ W / 3) + i, x),
    "cond, constant": lambda x: lax.cond(W[0, 0] > 0, jnp.tanh, jnp.negative, x),
    "dynamic update": lambda x: lax.dynamic_update_slice(x, 2 * x[:1], (2, 0)),
    "attention": lambda x: jax.nn.softmax(x @ x.T) @ x,
}


@pytest.mark.parametrize("eps", [0.02, 0.4])
@pytest.mark.parametrize("name", STRUCTURE)
def test_structure(name, eps):
    check_sound(STRUCTURE[name], Linf(eps), X)


@pytest.mark.parametrize("name", ELEMENTWISE | POSITIVE | STRUCTURE)
def test_a_degenerate_interval_gives_the_value(name):
    f = (ELEMENTWISE | POSITIVE | STRUCTURE)[name]
    x = 1.5 + X
    (lower, upper), value = jax.jit(lambda x: (ibp(f)(Box(x, x), x), f(x)))(x)
    np.testing.assert_allclose(lower, value, rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(upper, value, rtol=3e-6, atol=1e-6)


def conv(x, w, stride=1, padding="SAME", **kw):
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    y = lax.conv_general_dilated(
        x[None], w, strides, padding, dimension_numbers=numbers, **kw
    )
    return y[0]


K = jax.random.normal(jax.random.key(2), (3, 3, 2, 4))
IMAGES = {
    "conv": lambda x: conv(x, K),
    "conv, strided": lambda x: conv(x, K, 2, [(1, 0), (0, 2)]),
    "conv, dilated": lambda x: conv(x, K, rhs_dilation=(2, 2)),
    "conv, transposed": lambda x: conv(x, K, 1, [(1, 1)] * 2, lhs_dilation=(2, 2)),
    "conv, groups": lambda x: conv(x, K[:, :, :1], feature_group_count=2),
    "max pool": lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"),
    "average pool": lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    "conv with a bounded kernel": lambda x: conv(x, x[:2, :2, :, None]),
    "residual": lambda x: x + jax.nn.relu(conv(x, K[..., :2])),
    "weights and images": lambda x: conv(x, jnp.tile(x[:2, :2, :, None], (1, 1, 1, 2))),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=["linf", "l2"])
def test_images(name, threat):
    check_sound(IMAGES[name], threat, IMAGE, slack=2e-5)


# ----------------------------------------------------------------- what must not happen


def test_division_by_an_interval_with_zero_is_unbounded_and_never_nan():
    x = jnp.array([-1.0, 0.0, 0.0, -1.0, 0.0, 1.0])
    y = jnp.array([1.0, 1.0, 0.0, 0.0, 2.0, 2.0])
    lower, upper = ibp(lambda v: 1.0 / v)(Box(x, y), x)
    np.testing.assert_array_equal(lower, [-np.inf, 1, -np.inf, -np.inf, 0.5, 0.5])
    np.testing.assert_array_equal(upper, [np.inf, np.inf, np.inf, -1, np.inf, 1])
    lower, upper = ibp(lambda v: (v - 0.5) / v)(Box(x, y), x)
    assert not jnp.isnan(lower).any()
    assert not jnp.isnan(upper).any()


def test_a_domain_that_the_set_leaves_gives_no_nan():
    box = Box(jnp.array([-1.0]), jnp.array([4.0]))
    for f in (jnp.log, jnp.sqrt, lax.rsqrt, lambda v: v**1.5, lambda v: v**-3):
        lower, upper = ibp(f)(box, box.lower)
        assert not jnp.isnan(lower).any()
        assert not jnp.isnan(upper).any()


@pytest.mark.parametrize("method", [ibp, partial(crown, intermediate="ibp")])
@pytest.mark.parametrize("f", [jnp.exp, jnp.exp2, jnp.cosh, jax.nn.logsumexp])
def test_the_compiler_forgets_no_nan_inside_an_exponential(f, method):
    # sort says NaN in a select, which XLA:CPU takes for any value inside exp
    box = Box(jnp.array([1.0, jnp.nan, 0.0]), jnp.array([1.5, jnp.nan, 2.0]))
    bound = jax.jit(lambda box: method(lambda x: f(jnp.sort(x)))(box, jnp.ones(3)))
    assert all(np.isnan(end).all() for end in bound(box))


def test_nan_in_stays_nan():
    x = jnp.array([jnp.nan, 1.0])
    for f in (jnp.tanh, jnp.sin, lambda v: v * v[::-1], lambda v: jnp.ones((2, 2)) @ v):
        assert jnp.isnan(ibp(f)(Linf(0.1, -5.0, 5.0), x).lower[0])


NAN_HIDERS = {
    "where": lambda v: jnp.where(v > 0, 1.0, 2.0),
    "where, less": lambda v: jnp.where(v < 0, 1.0, 2.0),
    "where, equal": lambda v: jnp.where(v == 0, 1.0, 2.0),
    "to bool": lambda v: v.astype(bool).astype(jnp.float32),
    "to integer": lambda v: v.astype(jnp.int32),
    "argmax": lambda v: jnp.argmax(jnp.stack([v, v[::-1]]), axis=0),
    "sort": lambda v: jnp.sort(v, descending=True),
    "max": lambda v: jnp.maximum(v, v[::-1]),
    "reduce max": lambda v: v.max(keepdims=True),
    "max pool": lambda v: nn.max_pool(v[:, None], (2,))[:, 0],
    "clip": lambda v: jnp.clip(v, -1, 1),
    "relu": jax.nn.relu,
}


@pytest.mark.parametrize("name", NAN_HIDERS)
def test_an_unknown_operand_is_never_decided(name):
    x = jnp.array([jnp.nan, 1.0])
    lower, upper = ibp(NAN_HIDERS[name])(Box(x, x), x)
    assert lower[0] != upper[0]  # an interval of one value would be a statement


UNSUPPORTED = {
    "bits": lambda x: (8 * x).astype(jnp.int32) & 3,
    "narrow integers": lambda x: (900 * x).astype(jnp.int32).astype(jnp.int8),
    "floats to bytes": lambda x: (900 * x).astype(jnp.uint8),
    "fft": lambda x: jnp.abs(jnp.fft.fft(x)),
    "top_k": lambda x: lax.top_k(x, 2)[0],
    "cumprod": lambda x: jnp.cumprod(x),  # noqa: PLW0108
    "lgamma": lambda x: lax.lgamma(x),  # noqa: PLW0108
    "while": lambda x: lax.while_loop(lambda v: v.sum() < 9, lambda v: v + 1, x),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_unknown_raises_and_names_itself(name):
    with pytest.raises(UnsupportedPrimitive, match=r"test_interval\.py"):
        ibp(UNSUPPORTED[name])(Linf(0.1), X[0])


def test_indices_that_depend_on_the_input_are_refused():
    with pytest.raises(UnsupportedPrimitive, match="depend on the input"):
        ibp(lambda x: X[jnp.argmax(x[0])])(Linf(0.1), X)


def test_a_lookalike_of_a_known_activation_is_not_taken_for_it():
    @jax.jit
    def silu(x):
        return -3.0 * x * jax.nn.sigmoid(x + 1.0)

    def softmax(x):
        e = jnp.exp(x - x.max(keepdims=True))
        return 2.0 * e / e.sum()

    check_sound(silu, *interval_shifted(0.0))
    check_sound(softmax, Linf(0.1), X[0])


def test_argmax_is_an_interval_of_indices_decided_or_not():
    x = jnp.array([0.1, 0.9, 0.5, 0.2])
    assert ibp(jnp.argmax)(Linf(0.1), x) == (1, 1)
    assert ibp(jnp.argmax)(Linf(0.25), x) == (1, 2)
    assert ibp(jnp.argmin)(Linf(0.1), x) == (0, 3)


# -------------------------------------------------------------------------- tightness


def network(x, w=W):
    h = jax.nn.relu(x.ravel()[:6] @ w)
    return jax.nn.relu(h @ w.T) @ w[:, :5] + 0.1


def test_margins_equal_the_elided_last_layer():
    threat, label = Linf(0.1), 3
    h = ibp(lambda x: jax.nn.relu(jax.nn.relu(x.ravel()[:6] @ W) @ W.T))(threat, X)
    rows = jnp.stack([W[:, label] - W[:, k] for k in (0, 1, 2, 4)])
    middle, spread = (
        rows @ (h.lower + h.upper) / 2,
        jnp.abs(rows) @ (h.upper - h.lower) / 2,
    )
    lower, upper = ibp(lambda x: margins(network(x), label))(threat, X)
    np.testing.assert_allclose(lower, middle - spread, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(upper, middle + spread, rtol=1e-5, atol=1e-5)
    logits = ibp(network)(threat, X)
    naive = logits.lower[label] - jnp.delete(logits.upper, label)
    assert (lower >= naive - 1e-5).all()
    assert (lower > naive + 1e-3).any()


def test_an_affine_function_is_bounded_exactly():
    f = lambda x: jnp.cumsum((x @ W)[:, ::2].ravel() @ jnp.ones((12, 3)) - x.sum())
    rows = jax.jacobian(f)(X).reshape(3, -1)
    exact = f(X) + jnp.abs(rows).sum(1) * 0.1
    np.testing.assert_allclose(ibp(f)(Linf(0.1, -9.0, 9.0), X).upper, exact, rtol=1e-5)


def test_softmax_bounds_by_hand():
    x = jnp.array([0.0, 1.0])
    lower, upper = ibp(jax.nn.softmax)(Linf(0.5, -9.0, 9.0), x)
    np.testing.assert_allclose(lower[0], 1 / (1 + np.exp(2.0)), rtol=1e-6)
    np.testing.assert_allclose(upper[0], 0.5, rtol=1e-6)


def test_bounds_shrink_with_eps_and_reach_the_value():
    widths = [ibp(network)(Linf(eps), X) for eps in (0.0, 0.01, 0.1)]
    for inner, outer in itertools.pairwise(widths):
        assert (inner.lower >= outer.lower - 1e-6).all()
        assert (inner.upper <= outer.upper + 1e-6).all()
    np.testing.assert_allclose(widths[0].lower, network(X), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- transformations


def test_jit_vmap_and_traced_eps_agree_and_compile_once():
    xs = jnp.stack([X, X / 2, 1 - X])
    traces = []

    @jax.jit
    def bound(threat, xs):
        traces.append(1)
        return jax.vmap(lambda x: ibp(network)(threat, x))(xs)

    for eps in (0.01, 0.1):
        batched = bound(Linf(eps), xs)
        single = [ibp(network)(Linf(eps), x) for x in xs]
        np.testing.assert_allclose(
            batched.lower, [s.lower for s in single], rtol=2e-5, atol=1e-5
        )
    assert len(traces) == 1


def test_gradients_agree_with_finite_differences():
    def loss(w):
        bounds = ibp(lambda x: margins(network(x, w), 2))(Linf(0.05), X)
        return jnp.sum(jnp.tanh(bounds.lower))

    with jax.enable_x64(True):
        w = jnp.asarray(np.asarray(W), jnp.float64)
        v = jnp.asarray(np.random.default_rng(0).normal(size=W.shape))
        slope = (loss(w + 1e-6 * v) - loss(w - 1e-6 * v)) / 2e-6
        np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(w), v), slope, rtol=1e-5)


def test_parameters_may_be_the_perturbed_input():
    params = {"w": W, "b": jnp.ones(6)}
    box = Box(*(jax.tree.map(lambda v, s=s: v + s, params) for s in (-0.01, 0.01)))
    f = lambda p: jax.nn.relu(X[0] @ p["w"] + p["b"])
    lower, upper = ibp(f)(box, params)
    keys = jax.random.split(KEY, 200)
    outs = jax.vmap(lambda k: f(box.sample(k, params)))(keys)
    assert (outs >= lower[None] - ULPS).all()
    assert (outs <= upper[None] + ULPS).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_centre_and_radius_are_exact_halves(dtype):
    """The divisor that the compiler cannot see changes no bit, nor of a gradient."""

    def plain(lower, upper, w):
        middle, spread = (lower + upper) * 0.5 @ w, (upper - lower) * 0.5 @ jnp.abs(w)
        return middle - spread, middle + spread

    def bound(lower, upper, w):
        return tuple(ibp(lambda z: z @ w)(Box(lower, upper), lower))

    ends = [v.astype(dtype) for v in (X, X + 0.3, W)]
    outcomes = []
    for f in (bound, plain):
        values, pull = jax.vjp(f, *ends)
        outcomes.append([*values, *pull(values)])
    for got, expected in zip(*outcomes, strict=True):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, expected)


def test_layers_are_the_pre_activation_intervals():
    output, layers = ibp_with_layers(network)(Linf(0.1), X)
    assert [layer.lower.shape for layer in layers] == [(6,), (6,)]
    first = ibp(lambda x: x.ravel()[:6] @ W)(Linf(0.1), X)
    np.testing.assert_allclose(layers[0].lower, first.lower, rtol=1e-5, atol=1e-6)
    assert isinstance(output, Interval)


def test_functions_of_several_outputs_keep_their_tree():
    bounds = ibp(lambda x: {"a": x + 1, "b": (x.sum(), jnp.ones(3))})(Linf(0.1), X)
    assert bounds.lower["b"][0].shape == ()
    assert bounds.upper["a"].shape == SHAPE
    np.testing.assert_array_equal(bounds.lower["b"][1], np.ones(3))
