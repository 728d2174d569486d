"""Linear bounds: soundness for every operation, tightness, exactness, equal chunks."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax import lax

from certjax.bounds import (
    alpha_crown,
    best,
    crown,
    forward,
    fused_cross_entropy,
    ibp,
    ibp_with_layers,
    Interval,
    margins_with_layers,
    plot,
    report,
    slopes,
    UnsupportedPrimitive,
)
from certjax.bounds.climb import best_of, Climb
from certjax.specification import margins
from certjax.threat import Box, L1, L2, Linf


KEYS = jax.random.split(jax.random.key(3), 8)
W = jax.random.normal(KEYS[0], (4, 6)) / 2
V = jax.random.normal(KEYS[1], (6, 3)) / 2
X = jax.random.uniform(KEYS[2], (4,), minval=0.3, maxval=0.7)
K = jax.random.normal(KEYS[3], (3, 3, 2, 4)) / 3
K2 = jax.random.normal(KEYS[4], (2, 2, 4, 3)) / 3
IMAGE = jax.random.uniform(KEYS[5], (6, 6, 2))
EXACT = 2e-5


def points(threat, x, samples=200):
    """Random points of the set, and of its corners where it is a box."""
    keys = jax.random.split(jax.random.key(7), samples)
    inner = jax.vmap(lambda key: threat.sample(key, x))(keys)
    if not isinstance(threat, Linf | Box):
        return inner
    lower, upper = (v[None] for v in threat.box(x))
    corner = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, x.shape))(keys)
    return jnp.concatenate([inner, jnp.where(corner, lower, upper)])


def check(found, f, threat, x, slack=EXACT):
    """Sampled values lie inside."""
    outs = jax.vmap(f)(points(threat, x))
    scale = slack * (1 + jnp.abs(outs))
    assert found.lower.shape == found.upper.shape == outs.shape[1:]
    assert (found.lower <= found.upper).all()
    assert (outs >= found.lower[None] - scale).all()
    assert (outs <= found.upper[None] + scale).all()


def check_no_looser(inner, outer, slack=EXACT):
    scale = slack * (1 + jnp.abs(outer.lower) + jnp.abs(outer.upper))
    assert (inner.lower >= outer.lower - scale).all()
    assert (inner.upper <= outer.upper + scale).all()


def conv(x, w, stride=1, padding="SAME", **kw):
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    out = lax.conv_general_dilated(
        x[None], w, strides, padding, dimension_numbers=numbers, **kw
    )
    return out[0]


def attention(h):
    q, k, v = h.reshape(3, 2), h[::-1].reshape(3, 2), (h * h).reshape(3, 2)
    return (jax.nn.softmax(q @ k.T) @ v).ravel()


OPERATIONS = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "square": lambda h: h**2,
    "product": lambda h: h * h[::-1],
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "gelu, tanh": jax.nn.gelu,
    "gelu, erf": lambda h: jax.nn.gelu(h, approximate=False),
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "exp": jnp.exp,
    "log": lambda h: jnp.log(h**2 + 1),
    "sqrt": lambda h: jnp.sqrt(h**2 + 1),
    "sin": jnp.sin,
    "clamp, relu6": lambda h: jax.nn.relu6(h) + jnp.clip(h, -0.2, 0.2),
    "quotient": lambda h: h / (h[::-1] ** 2 + 1),
    "max, min": lambda h: jnp.maximum(h, h[::-1]) + jnp.minimum(h, 2 * h[::-1]),
    "softmax": jax.nn.softmax,
    "attention": attention,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": lambda h: h - jax.nn.logsumexp(h),
    "layernorm": lambda h: (h - h.mean()) / jnp.sqrt(h.var() + 0.1),
    "concatenate": lambda h: jnp.concatenate([jax.nn.relu(h[:3]), h[3:]]),
    "strided slice, flip": lambda h: jnp.repeat(jax.nn.relu(h)[::-2], 2),
    "pad, cumsum, sort": lambda h: jnp.sort(
        jnp.cumsum(jnp.pad(jax.nn.relu(h[:5]), (0, 1)))
    ),
    "einsum": lambda h: jnp.einsum(
        "ij,kj->ik", h.reshape(3, 2), h[:4].reshape(2, 2)
    ).ravel(),
    "gather, where": lambda h: jnp.where(
        V[:, 0] > 0, h[jnp.array([2, 0, 1, 1, 5, 4])], jax.nn.relu(h)
    ),
    "where, undecided": lambda h: jnp.where(h > 0, h, 0.2 * h),
    "reduce max": lambda h: h - jnp.max(h),
    "scan": lambda h: lax.scan(
        lambda c, r: (jax.nn.relu(c + r), c), h[:2], h.reshape(3, 2)
    )[1].ravel(),
    "remat": jax.checkpoint(jax.nn.relu),
    "residual": lambda h: h + jax.nn.relu(h @ W.T @ W),
    "floor": lambda h: h - jnp.floor(h),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_probe(name):
    """x @ W -> operation -> @ V: sound, and never looser than interval arithmetic."""
    f = lambda x: OPERATIONS[name](x @ W) @ V
    threat = Linf(0.1)

    @jax.jit
    def bounds(x):
        return (
            ibp(f)(threat, x),
            crown(f)(threat, x),
            alpha_crown(f, steps=3)(threat, x),
        )

    plain, linear, ascended = bounds(X)
    for found in (linear, ascended):
        check(found, f, threat, X)
    check_no_looser(linear, plain)
    check_no_looser(ascended, linear)


IMAGES = {
    "two convolutions": lambda x: conv(jax.nn.relu(conv(x, K, 2)), K2, padding="VALID"),
    "dilated, padded": lambda x: conv(
        jnp.tanh(conv(x, K, padding=[(1, 0), (0, 2)], rhs_dilation=(2, 2))), K2, 2
    ),
    "grouped": lambda x: conv(
        jax.nn.relu(conv(x, K[:, :, :1], feature_group_count=2)), K2
    ),
    "batch groups": lambda x: lax.conv_general_dilated(
        jax.nn.relu(jnp.stack([x, x[::-1]])),
        K,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        batch_group_count=2,
    )[0],
    "transposed": lambda x: conv(
        jax.nn.relu(conv(x, K, padding=[(1, 1), (1, 1)], lhs_dilation=(2, 2))), K2, 3
    ),
    "residual": lambda x: conv(
        jax.nn.relu(x + conv(jax.nn.relu(conv(x, K)), K.swapaxes(2, 3))), K, 2
    ),
    "max pool": lambda x: conv(
        lax.reduce_window(conv(x, K), -jnp.inf, lax.max, (3, 3, 1), (2, 2, 1), "SAME"),
        K2,
    ),
    "average pool": lambda x: conv(
        lax.reduce_window(
            jax.nn.relu(conv(x, K)), 0.0, lax.add, (2, 2, 1), (2, 2, 1), "VALID"
        ),
        K2,
    ),
    "normalised": lambda x: conv(
        jax.nn.relu(
            (conv((x - 0.4) / 0.3, K) - 0.1) * jnp.arange(1.0, 5.0).reshape(1, 1, 4)
        ),
        K2,
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    """Patches and images of coefficients: sound, and equal to one another."""
    f = lambda x: jax.nn.relu(IMAGES[name](x)).sum((0, 1))
    threat = Linf(0.05)

    @jax.jit
    def bounds(x):
        return ibp(f)(threat, x), crown(f)(threat, x)

    plain, found = bounds(IMAGE)
    check(found, f, threat, IMAGE, slack=5e-5)
    check_no_looser(found, plain)
    rows = crown(lambda x: f(x.reshape(6, 6, 2)))(threat, IMAGE.ravel())
    np.testing.assert_allclose(found.lower, rows.lower, rtol=1e-4, atol=1e-4)


def net(x, w=W):
    return jax.nn.relu(jax.nn.relu(x @ w) @ w.T @ w) @ V


@pytest.mark.parametrize(
    "threat",
    [Linf(0.1), L2(0.2), L1(0.3), Box(X - 0.1, X + 0.2)],
    ids=["linf", "l2", "l1", "box"],
)
def test_threats(threat):
    found = jax.jit(lambda x: crown(net)(threat, x))(X)
    check(found, net, threat, X)
    image = lambda z: jax.nn.relu(conv(jax.nn.relu(conv(z, K, 2)), K2)).sum((0, 1))
    if not isinstance(threat, Box):
        found = jax.jit(lambda x: crown(image)(threat, x))(IMAGE)
        check(found, image, threat, IMAGE)


METHODS = {
    "crown": crown(net),
    "crown-ibp": crown(net, "ibp"),
    "crown-forward": crown(net, "forward"),
    "forward": forward(net),
    "alpha": alpha_crown(net, steps=5),
    "alpha everywhere": alpha_crown(net, 5, "alpha", intermediate_steps=3),
    "chunks": crown(net, max_bytes=1000),
}


def test_methods_are_ordered():
    threat = Linf(0.15)
    found = {name: jax.jit(m)(threat, X) for name, m in METHODS.items()}
    found["best"] = best(METHODS["crown-ibp"], METHODS["forward"])(threat, X)
    for bounds in found.values():
        check(bounds, net, threat, X)
        check_no_looser(bounds, ibp(net)(threat, X))
    check_no_looser(found["crown"], found["crown-ibp"])
    check_no_looser(found["alpha"], found["crown"])
    check_no_looser(found["alpha everywhere"], found["crown"])
    width = lambda name: np.mean(found[name].upper - found[name].lower)
    assert width("alpha everywhere") <= width("alpha") < width("crown")
    check_no_looser(found["best"], found["forward"])
    np.testing.assert_allclose(found["chunks"].lower, found["crown"].lower, rtol=1e-5)


def test_slopes_of_patches_are_ascended():
    """In front of a convolution: a share of its own for every coefficient."""
    f = lambda x: conv(jax.nn.relu(conv(jax.nn.relu(conv(x, K)), K2)), K2[..., :3, :])
    threat = Linf(0.05)
    ascended = alpha_crown(f, 3, "alpha", intermediate_steps=3)
    found, linear = jax.jit(lambda x: (ascended(threat, x), crown(f)(threat, x)))(IMAGE)
    check(found, f, threat, IMAGE, slack=5e-5)
    check_no_looser(found, linear)
    width = lambda bounds: float(jnp.mean(bounds.upper - bounds.lower))
    assert width(found) < 0.99 * width(linear)


def test_chunks_of_patches_change_nothing():
    f = lambda x: conv(jax.nn.relu(conv(jax.nn.relu(conv(x, K)), K2)), K2[..., :3, :])
    whole = crown(f)(Linf(0.05), IMAGE)
    parts = crown(f, max_bytes=200_000)(Linf(0.05), IMAGE)
    np.testing.assert_allclose(whole.lower, parts.lower, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="max_bytes"):
        crown(f, max_bytes=100)(Linf(0.05), IMAGE)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="intermediate must be one of"):
        crown(net, "magic")
    with pytest.raises(ValueError, match="at least one"):
        best()


def test_a_slope_that_depends_on_the_input_is_refused():
    f = lambda x: jax.nn.leaky_relu(x @ W, jnp.abs(x[0]))
    for bound in (ibp, crown, alpha_crown):
        with pytest.raises(UnsupportedPrimitive, match="slope depends on the input"):
            bound(f)(Linf(0.1), X)


def test_degenerate_sets_and_nan():
    bounds = crown(net)(Linf(0.0), X)
    np.testing.assert_allclose(bounds.lower, net(X), rtol=1e-5, atol=1e-6)
    broken = crown(net)(Linf(0.1), X.at[0].set(jnp.nan))
    assert jnp.isnan(broken.lower).all()
    assert not (broken.lower > 0).any()


def test_jit_vmap_and_traced_eps_agree():
    xs = jnp.stack([X, X / 2, 1 - X])
    batched = jax.jit(jax.vmap(crown(net), (None, 0)))(Linf(jnp.float32(0.1)), xs)
    for i, x in enumerate(xs):
        np.testing.assert_allclose(
            batched.lower[i], crown(net)(Linf(0.1), x).lower, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh], ids=["relu", "tanh"])
def test_gradients_agree_with_finite_differences(activation):
    def loss(w):
        f = lambda x: margins(activation(activation(x @ w) @ w.T) @ w[:, :3], 2)
        bounds = crown(f)(Linf(0.05), jnp.asarray(np.asarray(X), w.dtype))
        return jnp.sum(jnp.tanh(bounds.lower))

    with jax.enable_x64(True):
        w = jnp.asarray(np.asarray(W), jnp.float64)
        v = jnp.asarray(np.random.default_rng(0).normal(size=W.shape))
        slope = (loss(w + 1e-5 * v) - loss(w - 1e-5 * v)) / 2e-5
        np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(w), v), slope, rtol=1e-3)


def test_parameters_may_be_the_perturbed_input():
    params = {"w": W, "v": V}
    box = Box(*(jax.tree.map(lambda a, s=s: a + s, params) for s in (-0.01, 0.01)))
    f = lambda q: jax.nn.relu(X @ q["w"]) @ q["v"]
    found = crown(f)(box, params)
    keys = jax.random.split(jax.random.key(0), 200)
    outs = jax.vmap(lambda k: f(box.sample(k, params)))(keys)
    assert (outs >= found.lower[None] - EXACT).all()
    assert (outs <= found.upper[None] + EXACT).all()
    check_no_looser(found, ibp(f)(box, params))


def test_fused_loss_bounds_the_worst_case():
    threat, label = Linf(0.1), 1
    loss = jax.jit(lambda x: fused_cross_entropy(net, label)(threat, x))(X)
    outs = jax.vmap(net)(points(threat, X, 2000))
    worst = jnp.max(jax.nn.logsumexp(outs, axis=1) - outs[:, label])
    assert loss >= worst - EXACT
    gradient = jax.grad(
        lambda w: fused_cross_entropy(lambda x: net(x, w), 1)(threat, X)
    )(W)
    assert jnp.isfinite(gradient).all()
    assert jnp.abs(gradient).max() > 0


@pytest.mark.parametrize("intermediate", ["ibp", "crown"])
def test_margins_of_training_are_those_of_crown(intermediate):
    rows = lambda z: margins(net(z), 1)
    found = margins_with_layers(net, 1, intermediate)(Linf(0.1), X)
    both = crown(rows, intermediate)(Linf(0.1), X)
    np.testing.assert_allclose(found.linear, both.lower, rtol=1e-4, atol=1e-5)
    known, layers = ibp_with_layers(rows)(Linf(0.1), X)
    check_no_looser(found.margins, known)
    assert len(found.layers) == len(layers)
    for a, b in zip(found.layers, layers, strict=True):
        check_no_looser(a, b)


@pytest.mark.parametrize(
    "act",
    [
        lambda z: jax.nn.leaky_relu(z, 0.3),
        lambda z: jnp.minimum(z, 0.2),
        jnp.abs,
        jnp.tanh,
        lambda z: z * jax.nn.sigmoid(2 * z[::-1]),  # two operands
        lambda z: z[:1] * jnp.exp(z[1:]),  # of another shape than the result
    ],
)
def test_training_sums_lines_as_crown_does(act):
    def rows(x, w=W):
        z = act(act(x @ w) @ W.T[: act(x @ w).shape[0]])
        return z @ V[: z.shape[0]]

    threat = Linf(0.1)
    found = margins_with_layers(rows, 1)(threat, X).linear
    both = crown(lambda z: margins(rows(z), 1), "ibp")(threat, X)
    np.testing.assert_allclose(found, both.lower, rtol=1e-4, atol=1e-5)

    def total(bounds_of, w):
        return jnp.sum(bounds_of(lambda z: rows(z, w)))

    kept = lambda f: margins_with_layers(f, 1)(threat, X).linear
    plain = lambda f: crown(lambda z: margins(f(z), 1), "ibp")(threat, X).lower
    slopes_of = [jax.grad(lambda w, b=b: total(b, w))(W) for b in (kept, plain)]
    np.testing.assert_allclose(*slopes_of, rtol=1e-3, atol=1e-4)


def test_fused_loss_of_huge_bounds_has_a_gradient():
    loss = lambda w: fused_cross_entropy(lambda x: net(x, w), 1)(Linf(0.5), X)
    value, gradient = jax.value_and_grad(loss)(300 * W)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    "scores",
    [
        lambda x: 3e37 * net(x),  # slopes of chords underflow
        lambda x: 3e38 * jnp.stack([x[0], x[1] - x[2], -x[3]]),  # bounds overflow
    ],
)
def test_fused_loss_of_bounds_near_overflow_bounds_the_worst_case(scores):
    threat, x = Linf(0.4), jnp.full(4, 0.5)
    loss = fused_cross_entropy(scores, 0)(threat, x)
    outs = jax.vmap(scores)(points(threat, x, 500))
    worst = jnp.max(jax.nn.logsumexp(outs, axis=1) - outs[:, 0])
    assert 1e37 < worst <= loss


def test_report_counts_and_compares():
    layers = report(net, Linf(0.1), X)
    assert [layer.interval.lower.shape for layer in layers] == [(6,), (6,)]
    for layer in layers:
        assert layer.active + layer.inactive + layer.unstable == 6
        assert layer.sampled_width <= layer.width <= layer.ibp_width * (1 + 1e-5)
        assert layer.looseness >= 1
    assert len(plot(layers).axes) == 2


# ------------------------------------------------------------------------ exact answers


def hidden_intervals(weights, biases, low, high):
    """Pre-activation intervals of every hidden layer, for big-M."""
    layers = []
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        centre, radius = (low + high) / 2 @ w + b, (high - low) / 2 @ abs(w)
        layers.append((centre - radius, centre + radius))
        low, high = (np.maximum(v, 0) for v in layers[-1])
    return layers


def relu_rows(w, b, interval, places, total):
    """`z = relu(w x + b)` with a binary a: triples of below <= row <= above."""
    before, z, a = places
    ends = np.minimum(interval[0], 0), np.maximum(interval[1], 0)
    for j, (low, high) in enumerate(zip(*ends, strict=True)):
        row = np.zeros(total)
        row[before : before + w.shape[0]], row[z + j] = -w[:, j], 1
        yield row.copy(), b[j], np.inf  # z >= w x + b
        row[a + j] = -low
        yield row, -np.inf, b[j] - low  # z <= w x + b - low (1 - a)
        gate = np.zeros(total)
        gate[z + j], gate[a + j] = 1, -high
        yield gate, -np.inf, 0  # z <= high a


def exact_minimum(weights, biases, row, low, high):
    """min of row @ net over a box by mixed-integer programming (big-M relu)."""
    layers = hidden_intervals(weights, biases, low, high)
    # variables: x, then for each hidden layer its values z and the binaries a
    widths = [n for w in weights[:-1] for n in (w.shape[1],) * 2]
    start = np.cumsum([0, len(low), *widths])
    lower, upper, binary = (f(start[-1]) for f in (np.zeros, np.ones, np.zeros))
    lower[: len(low)], upper[: len(low)] = low, high
    rows, before = [], 0
    for k, interval in enumerate(layers):
        z, a = start[1 + 2 * k : 3 + 2 * k]
        binary[a : start[3 + 2 * k]] = 1
        upper[z:a] = np.maximum(interval[1], 0)
        rows += relu_rows(weights[k], biases[k], interval, (before, z, a), start[-1])
        before = z
    cost = np.zeros(start[-1])
    cost[before : before + len(weights[-1])] = weights[-1] @ row
    solved = scipy.optimize.milp(
        cost,
        constraints=scipy.optimize.LinearConstraint(
            *map(np.array, zip(*rows, strict=True))
        ),
        bounds=scipy.optimize.Bounds(lower, upper),
        integrality=binary,
    )
    assert solved.success
    return solved.fun + biases[-1] @ row


@pytest.mark.parametrize("eps", [0.02, 0.2])
def test_bounds_against_the_exact_minimum(eps):
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=s) / np.sqrt(s[0]) for s in ((3, 5), (5, 5), (5, 2))]
    biases = [rng.normal(size=n) / 5 for n in (5, 5, 2)]

    def f(x):
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            x = jax.nn.relu(x @ w.astype(np.float32) + b.astype(np.float32))
        return x @ weights[-1].astype(np.float32) + biases[-1].astype(np.float32)

    x = np.full(3, 0.5, np.float32)
    exact = Interval(
        np.array(
            [exact_minimum(weights, biases, r, x - eps, x + eps) for r in np.eye(2)]
        ),
        -np.array(
            [exact_minimum(weights, biases, -r, x - eps, x + eps) for r in np.eye(2)]
        ),
    )
    found = crown(f)(Linf(eps), x)
    ascended = alpha_crown(f, steps=30)(Linf(eps), x)
    check_no_looser(exact, ascended)
    check_no_looser(ascended, found)
    if eps < 0.1:  # hardly a neuron is undecided: next to nothing is lost
        np.testing.assert_allclose(ascended.lower, exact.lower, atol=5e-3)
        np.testing.assert_allclose(ascended.upper, exact.upper, atol=5e-3)


def lower_end_along_a_line(*, steps, sound):
    """t -> the sum of lower bounds of a network whose weights are at t of a line."""
    weights, direction = jax.random.normal(jax.random.key(0), (2, 2, 6, 6))

    @jax.jit
    def lower(t):
        a, b = weights + t * direction
        f = lambda x: (b @ jax.nn.relu(a @ x))[:2]
        bound = alpha_crown(f, steps=steps, sound=sound)
        return bound(Linf(0.1), jnp.full(6, 0.3)).lower.sum()

    return lower


@pytest.mark.parametrize("sound", [False, True])
def test_optimised_bounds_have_a_gradient_and_the_same_value_beside_it(sound):
    lower = lower_end_along_a_line(steps=5, sound=sound)
    value, slope = jax.jit(jax.value_and_grad(lower))(0.0)
    np.testing.assert_allclose(value, lower(0.0), rtol=1e-5)
    assert jnp.isfinite(slope)
    assert slope != 0


def test_the_gradient_of_a_climb_is_that_at_the_shares_it_ends_at():
    """max over a of t^3 - (a - t)^2 is t^3, and its derivative that at a = t."""

    def best(t):
        values = lambda a: t**3 - (a - t) ** 2
        return best_of(Climb(100), lambda a: (values(a), values(a)), jnp.zeros(2))

    value, slope = jax.jvp(best, (jnp.array([0.3, 0.7]),), (jnp.ones(2),))
    np.testing.assert_allclose(value, [0.027, 0.343], atol=1e-3)
    np.testing.assert_allclose(slope, [0.27, 1.47], atol=0.02)


@pytest.mark.parametrize("sound", [False, True])
def test_slopes_outside_0_and_1_are_brought_inside(sound):
    f = lambda x: jax.nn.relu(x @ W) @ V
    wrong = crown(f, slope=lambda x: 2.0 + 0.0 * x.lower, sound=sound)
    found, inside = wrong(Linf(0.2), X), crown(f, slope=slopes.one, sound=sound)
    np.testing.assert_array_equal(found, inside(Linf(0.2), X))


def test_a_climb_keeps_nothing_alive():
    """`lower` closes over weights; a sweep in one process would pile them up."""
    values = lambda a: (-(a**2), -(a**2))
    best_of(Climb(2), values, jnp.ones(2))
    gone = weakref.ref(values)
    del values
    gc.collect()
    assert gone() is None
