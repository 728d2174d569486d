"""Votes, CERTIFY and PREDICT: counts that depend on nothing but the key."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from certjax.smoothing import (
    ABSTAIN,
    certify,
    decide,
    Gaussian,
    judge,
    Laplace,
    predict,
    sample_mesh,
    Table,
    Uniform,
    votes,
)
from certjax.smoothing.confidence import proportion_lower


ROOT = Path(__file__).resolve().parents[1]
KEY = jax.random.key(7)
NOISE = Gaussian(0.5)
WEIGHTS = jnp.asarray([[1.0, -0.5], [-1.0, 0.2], [0.3, 1.0]])
X = jnp.asarray([0.3, 0.1])
ON_CPU = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="compares with virtual devices of the CPU"
)


def linear(weights, x):
    return weights @ x


def halfplane(x):
    """Class 1 where x[0] > 0; the distance to the border is |x[0]|."""
    return jnp.stack([-x[0], x[0]])


def nan_right_of(border):
    """NaN where x[0] > border, class 1 elsewhere."""
    return lambda x: jnp.where(x[0] > border, jnp.nan, jnp.asarray([0.0, 1.0]))


F = jax.tree_util.Partial(linear, WEIGHTS)


def reference(f, noise, key, x, n):
    """One sample after the other, as the definition reads."""
    draw = jax.jit(lambda i: jnp.argmax(f(noise.sample(jax.random.fold_in(key, i), x))))
    return np.bincount([int(draw(i)) for i in range(n)], minlength=3)


def test_counts_are_those_of_the_samples_one_by_one():
    np.testing.assert_array_equal(
        votes(F, NOISE, KEY, X, 200), reference(F, NOISE, KEY, X, 200)
    )


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 2501])
def test_counts_do_not_depend_on_the_batch(n):
    expected = votes(F, NOISE, KEY, X, n)
    assert expected.sum() == n
    for batch in (1, 64, 77, 1000, 10_000):
        np.testing.assert_array_equal(votes(F, NOISE, KEY, X, n, batch), expected)


def test_more_samples_extend_the_same_stream():
    """Counts of the first n samples are part of the counts of more."""
    few, more = votes(F, NOISE, KEY, X, 500), votes(F, NOISE, KEY, X, 1000)
    assert np.all(more >= few)


def test_mesh_of_one_device_changes_nothing():
    np.testing.assert_array_equal(
        votes(F, NOISE, KEY, X, 1000, mesh=sample_mesh()), votes(F, NOISE, KEY, X, 1000)
    )


def convolutional(weights, x):
    """Rounding in the last bit moves votes here: classes are close."""
    kernel, head = weights
    z = jax.lax.conv_general_dilated(
        x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(z).reshape(-1) @ head


CONV = jax.tree_util.Partial(
    convolutional,
    (
        jax.random.normal(jax.random.key(1), (3, 3, 1, 4)),
        jax.random.normal(jax.random.key(2), (6 * 6 * 4, 5)),
    ),
)
IMAGE = jnp.zeros((6, 6, 1))

MANY_DEVICES = """
import json, sys
from experiments import runtime
runtime.configure(cache=sys.argv[1])
import jax
from tests.test_smoothing import CONV, IMAGE, KEY, NOISE, sample_mesh, votes
assert jax.device_count() == 8
counts = [votes(CONV, NOISE, KEY, IMAGE, 2501)]
for devices in (3, 8):
    mesh = sample_mesh(jax.devices()[:devices])
    for batch in (64, 1000, 10_000):
        counts.append(votes(CONV, NOISE, KEY, IMAGE, 2501, batch, mesh=mesh))
print(json.dumps([c.tolist() for c in counts]))
"""

TWO_PROCESSES = """
import json, sys
from experiments import runtime
runtime.configure(cache=sys.argv[1])
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
from tests.test_smoothing import CONV, IMAGE, KEY, NOISE, sample_mesh, votes
assert (jax.process_count(), jax.local_device_count()) == (2, 2)
batches = (64, 1000, 10_000)
mesh = sample_mesh()
counts = [votes(CONV, NOISE, KEY, IMAGE, 2501, batch, mesh=mesh) for batch in batches]
print(json.dumps([c.tolist() for c in counts]))
"""


def script(code, *words):
    """A fresh process at the root of the repository."""
    command = [sys.executable, "-c", code, str(ROOT / ".cache" / "compiled"), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def printed(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@ON_CPU
def test_counts_of_a_network_do_not_depend_on_batch_or_devices(monkeypatch):
    """1, 3 and 8 virtual devices in a fresh process, against this one."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    expected = votes(CONV, NOISE, KEY, IMAGE, 2501).tolist()
    assert printed(script(MANY_DEVICES)) == [expected] * 7
    for batch in (64, 333, 10_000):
        assert votes(CONV, NOISE, KEY, IMAGE, 2501, batch).tolist() == expected


@ON_CPU
def test_counts_of_a_network_do_not_depend_on_processes(monkeypatch):
    """Two processes of two virtual devices each, joined by jax.distributed."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    pair = [script(TWO_PROCESSES, port, str(i)) for i in range(2)]
    expected = votes(CONV, NOISE, KEY, IMAGE, 2501).tolist()
    try:
        assert [printed(process) for process in pair] == [[expected] * 3] * 2
    finally:
        for process in pair:
            process.kill()


def test_memory_does_not_depend_on_n():
    """One program serves every n, and its buffers hold one block."""
    traces = []

    def counted(x):
        traces.append(1)
        return F(x)

    votes(counted, NOISE, KEY, X, 10)
    first = len(traces)
    for n in (1000, 5000):
        votes(counted, NOISE, KEY, X, n)
    assert len(traces) == first


def test_nan_logits_vote_for_no_class_and_are_reported():
    """x[0] > 0.5 has probability 0.5 at x = (0.5, 0)."""
    x = jnp.asarray([0.5, 0.0])
    result = certify(nan_right_of(0.5), NOISE, KEY, x, n=2000)
    counts = result.counts
    assert counts[0] == 0
    assert result.invalid == 2000 - counts.sum()
    assert abs(result.invalid - 1000) < 4.5 * math.sqrt(500)
    assert (result.prediction, result.radius) == (ABSTAIN, 0.0)
    assert result.p_lower <= counts[1] / 2000


def test_nan_logits_lower_the_radius_as_votes_against():
    x = jnp.zeros(2)
    some = certify(nan_right_of(0.5), NOISE, KEY, x, n=2000)  # 16 % NaN
    none = certify(nan_right_of(9.9), NOISE, KEY, x, n=2000)
    assert some.prediction == none.prediction == 1
    assert 0 < some.radius < none.radius
    assert none.invalid == 0 < some.invalid


def test_network_of_nans_is_never_certified():
    broken = jax.tree_util.Partial(linear, WEIGHTS * jnp.nan)
    result = certify(broken, NOISE, KEY, X, n=200)
    assert (result.prediction, result.radius, result.invalid) == (ABSTAIN, 0.0, 200)
    assert predict(broken, NOISE, KEY, X) == ABSTAIN


def test_predict_counts_nan_as_a_rival():
    """Class 1 beats class 0 by far, but not the NaNs."""
    assert predict(nan_right_of(0.0), NOISE, KEY, jnp.zeros(2), n=200) == ABSTAIN
    assert decide(np.asarray([0, 60]), 160, 0.001) == ABSTAIN
    assert decide(np.asarray([0, 160]), 160, 0.001) == 1


def test_predict_is_the_binomial_test():
    for first in range(50, 101):
        p_value = stats.binomtest(first, 100, 0.5).pvalue
        expected = 2 if p_value <= 0.001 else ABSTAIN
        assert decide(np.asarray([100 - first, 0, first]), 100, 0.001) == expected


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.001])
def test_100_000_certifications_keep_their_promise(alpha):
    """Selection and estimation simulated at the border where certificates go wrong."""
    rng, runs, wrong = np.random.default_rng(5), 100_000, 0
    for distance in (0.1, 0.6):
        p = special.ndtr(distance / 0.5)
        counts0 = rng.multinomial(100, [1 - p, p], runs // 2)
        counts = rng.multinomial(1000, [1 - p, p], runs // 2)
        for c0, c in zip(counts0, counts, strict=True):
            result = judge(c0, c, NOISE, 2, 100, 1000, alpha)
            good = result.prediction in (1, ABSTAIN) and result.radius <= distance
            wrong += not good
    assert wrong / runs <= alpha + 4.5 * math.sqrt(alpha / runs)


def test_votes_that_tie_are_never_decided():
    assert decide(np.asarray([50, 50]), 100, 0.999) == ABSTAIN
    assert decide(np.asarray([1]), 1, 0.5) == ABSTAIN


def test_certificate_is_cohens():
    """Radius sigma PhiInv(p_lower) of the recorded counts, below the true distance."""
    x = jnp.asarray([0.4, 5.0])
    result = certify(halfplane, NOISE, KEY, x, n0=10, n=1000, alpha=0.01)
    exact = 0.5 * special.ndtri(proportion_lower(int(result.counts[1]), 1000, 0.01))
    assert result.prediction == 1
    assert exact * (1 - 1e-8) <= result.radius <= exact
    assert 0.3 < result.radius < 0.4
    assert result.counts0.sum() == 10
    assert result.counts.sum() == 1000
    assert result[6:10] == (10, 1000, 0.01, 0.5)
    assert result[10:] == ("l2", "Gaussian", NOISE.guarantee, "float32")


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_wrong_certificates_are_as_rare_as_promised(alpha):
    """Simulated counts of halfplanes whose true radius is known, selection included."""
    rng = np.random.default_rng(3)
    runs, wrong = 4000, 0
    for distance in (0.05, 0.8):
        p = special.ndtr(distance / 0.5)
        counts0 = rng.multinomial(10, [1 - p, p], runs // 2)
        counts = rng.multinomial(500, [1 - p, p], runs // 2)
        for c0, c in zip(counts0, counts, strict=True):
            result = judge(c0, c, NOISE, 2, 10, 500, alpha)
            good = result.prediction in (1, ABSTAIN) and result.radius <= distance
            wrong += not good
    assert wrong / runs <= alpha + 4.5 * math.sqrt(alpha / runs)


@pytest.mark.parametrize("noise", [Gaussian(0.5), Laplace(0.5), Uniform(0.5)])
def test_abstention_and_radius_zero_are_the_same(noise):
    for top in range(0, 201, 4):
        counts = np.asarray([200 - top, top])
        result = judge(np.asarray([0, 10]), counts, noise, 2, 10, 200, 0.001)
        assert (result.prediction == ABSTAIN) == (result.radius == 0.0)
        assert result.radius <= noise.radius(top / 200, 2) + 1e-12
        assert 0.0 <= result.radius < math.inf


def test_infinite_radius_is_no_certificate():
    class Boundless:
        norm, guarantee = "l2", "none"

        def radius(self, p_lower, size):
            return math.inf

    counts = np.asarray([0, 200])
    result = judge(counts, counts, Boundless(), 2, 200, 200, 0.001)
    assert (result.prediction, result.radius) == (ABSTAIN, 0.0)
    assert math.isnan(result.sigma)


def test_linf_radius_knows_the_dimension():
    ball = certify(halfplane, Gaussian(0.5), KEY, jnp.asarray([1.0, 0.0]), n=500)
    cube = certify(
        halfplane, Gaussian(0.5, "linf"), KEY, jnp.asarray([1.0, 0.0]), n=500
    )
    assert cube.norm == "linf"
    assert cube.radius == pytest.approx(ball.radius / math.sqrt(2), rel=1e-6)


def test_certificate_depends_on_the_key_alone():
    first = certify(F, NOISE, KEY, X, n=1000)
    again = certify(F, NOISE, KEY, X, n=1000, batch=64)
    other = certify(F, NOISE, jax.random.key(8), X, n=1000)
    assert first.radius == again.radius
    np.testing.assert_array_equal(first.counts, again.counts)
    assert np.any(first.counts != other.counts)


def test_selection_and_estimation_draw_different_samples():
    result = certify(F, NOISE, KEY, X, n0=1000, n=1000)
    assert np.any(result.counts0 != result.counts)


def test_bfloat16_is_named_in_the_record():
    result = certify(F, NOISE, KEY, X, n=500, dtype=jnp.bfloat16)
    assert result.dtype == "bfloat16"
    assert np.abs(result.counts - certify(F, NOISE, KEY, X, n=500).counts).max() < 25
    with pytest.raises(ValueError, match=r"dtype=bfloat16 .*got a plain.*Partial"):
        certify(halfplane, NOISE, KEY, X, n=500, dtype=jnp.bfloat16)


def test_weights_are_arguments_of_the_program():
    """Training between two certifications compiles nothing again."""
    module = sys.modules["certjax.smoothing.votes"]
    votes(F, NOISE, KEY, X, 100)
    size = module._count_blocks._cache_size()
    votes(jax.tree_util.Partial(linear, -WEIGHTS), Gaussian(0.1), KEY, X, 100)
    assert module._count_blocks._cache_size() == size


def test_table_noise_is_certified_by_its_table():
    table = Table(lambda key, x: Gaussian(0.5).sample(key, x), (0.6,), (0.05,), "l2")
    result = certify(halfplane, table, KEY, jnp.asarray([1.0, 0.0]), n=200)
    assert (result.prediction, result.radius) == (1, 0.05)


BAD = {
    r"n0 must be an integer .*got 0": lambda: certify(F, NOISE, KEY, X, n0=0),
    r"n must be an integer .*got 0": lambda: certify(F, NOISE, KEY, X, n=0),
    r"n must be an integer .*got 1.5": lambda: certify(F, NOISE, KEY, X, n=1.5),
    r"n must be .*got -1": lambda: predict(F, NOISE, KEY, X, n=-1),
    r"batch must be .*got 0": lambda: votes(F, NOISE, KEY, X, 10, 0),
    r"block must be .*got 0": lambda: votes(F, NOISE, KEY, X, 10, block=0),
    r"alpha must lie .*got 0": lambda: certify(F, NOISE, KEY, X, alpha=0),
    r"alpha must lie .*got 1.0": lambda: predict(F, NOISE, KEY, X, alpha=1.0),
    r"alpha must lie .*got nan": lambda: certify(F, NOISE, KEY, X, alpha=math.nan),
    r"f must return \[K\] logits .*got \(1, 3\)": lambda: votes(
        lambda x: (WEIGHTS @ x)[None], NOISE, KEY, X, 10
    ),
    r"f must return \[K\] logits .*got \(\)": lambda: votes(
        lambda x: x[0], NOISE, KEY, X, 10
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_says_got_expected_and_fix(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
