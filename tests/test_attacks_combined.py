"""Combined and minimum-norm attacks against what is known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certjax import attacks
from certjax.attacks.apgd import Windows
from certjax.attacks.cascade import class_notes
from certjax.attacks.geometry import into_l1_box, largest, to_hyperplane, total
from certjax.bounds import ibp
from certjax.specification import margins
from certjax.threat import Box, L1, L2, Linf


KEY = jax.random.key(0)
SIZE, CLASSES, EXAMPLES = 6, 4, 9
WEIGHT = jax.random.normal(jax.random.key(2), (SIZE, CLASSES))
XS = 0.4 + 0.2 * jax.random.uniform(jax.random.key(1), (EXAMPLES, SIZE))
WIDE = {"low": -10.0, "high": 10.0}


def linear(x):
    return (x - 0.5) @ WEIGHT


LABELS = jnp.argmax(XS @ WEIGHT - 0.5 * jnp.sum(WEIGHT, axis=0)[None], axis=1)


def run(attack, f=linear, labels=LABELS):
    keys = jax.random.split(KEY, EXAMPLES)
    each = jax.vmap(lambda key, x, label: attack(key, f, x, label))
    return jax.jit(each)(keys, XS, labels)


def nearest(dual, classes=CLASSES, labels=LABELS):
    """The exact distance to the boundary of a linear classifier."""
    logits = np.asarray(jax.vmap(linear)(XS), np.float64)
    weight, found = np.asarray(WEIGHT, np.float64).T, []
    for row, label in zip(logits, np.asarray(labels), strict=True):
        gaps = [
            (row[label] - row[k]) / np.linalg.norm(weight[k] - weight[label], dual)
            for k in range(classes)
            if k != label
        ]
        found.append(min(gaps))
    return np.array(found)


NORMS = {2: L2, 1: Linf, np.inf: L1}


@pytest.mark.parametrize(
    ("attack", "dual"),
    [
        (attacks.deepfool(L2(1.0, **WIDE)), 2),
        (attacks.deepfool(Linf(1.0, **WIDE)), 1),
        (attacks.fab_minimum(L2(1.0, **WIDE), steps=20), 2),
        (attacks.fab_minimum(Linf(1.0, **WIDE), steps=20), 1),
        (attacks.fab_minimum(L1(1.0, **WIDE), steps=20), np.inf),
    ],
    ids=["deepfool-l2", "deepfool-linf", "fab-l2", "fab-linf", "fab-l1"],
)
def test_nearest_of_all_boundaries_of_a_linear_classifier(attack, dual):
    distance = attacks.distances(NORMS[dual], linear, XS, run(attack), LABELS)
    exact = nearest(dual)
    assert (distance >= exact * (1 - 1e-4)).all()
    assert (distance <= exact * 1.05 + 1e-3).all()


@pytest.mark.parametrize(
    ("attack", "dual"),
    [
        (attacks.ddn(L2(1.0, **WIDE), steps=200, start_norm=0.1), 2),
        (attacks.fmn(L2(1.0, **WIDE), steps=200, step_size=0.1), 2),
        (attacks.fmn(Linf(1.0, **WIDE), steps=200, step_size=0.1), 1),
        (attacks.minimal(attacks.fgsm, Linf(1.0, **WIDE), bisections=12), 1),
    ],
    ids=["ddn", "fmn-l2", "fmn-linf", "minimal"],
)
def test_distance_to_a_single_boundary(attack, dual):
    """Attacks that follow the likeliest class, where there is only one other."""
    two = lambda x: linear(x)[:2]
    labels = jnp.argmax(jax.vmap(two)(XS), axis=1)
    zs = run(attack, two, labels)
    distance = attacks.distances(NORMS[dual], two, XS, zs, labels)
    exact = nearest(dual, 2, labels)
    assert (distance >= exact * (1 - 1e-4)).all()
    assert (distance <= exact * 1.1 + 2e-3).all()


@pytest.mark.parametrize("shape", [(3,), (7, 7, 1), (28, 28, 1)])
def test_quick_reductions_are_the_plain_ones(shape):
    v = jax.random.normal(KEY, shape)
    assert float(largest(v)) == float(jnp.max(jnp.abs(v)))
    assert float(largest(-v)) == float(largest(v))
    np.testing.assert_allclose(total(v), np.asarray(v, np.float64).sum(), atol=1e-4)
    assert np.isnan(largest(v.at[0].set(jnp.nan)))


def test_robust_accuracy_curve_counts_what_is_further():
    curve = attacks.robust_accuracy_curve([0.0, 0.1, np.inf, 0.3], [0.0, 0.1, 0.2])
    np.testing.assert_array_equal(curve, [0.75, 0.5, 0.5])


@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_hyperplane_is_reached_inside_the_domain(norm):
    z = jnp.array([0.0, 0.2, 0.9, 0.5])
    w = jnp.array([1.0, -2.0, 0.5, 0.0])
    d = to_hyperplane(norm, z, w, jnp.float32(-0.6), 0.0, 1.0)
    assert abs(float(w @ (z + d)) + 0.6) < 1e-5
    assert ((z + d >= 0) & (z + d <= 1)).all()


def test_l1_projection_spends_the_radius_and_beats_the_two_step_one():
    x, z = jnp.array([0.9, 0.5, 0.1]), jnp.array([1.9, 1.2, 0.0])
    exact = into_l1_box(L1(0.5), x, z, 0.5)
    assert abs(float(jnp.sum(jnp.abs(exact - x))) - 0.5) < 1e-4
    twice = L1(0.5).project(x, z)
    assert jnp.sum((exact - z) ** 2) <= jnp.sum((twice - z) ** 2) + 1e-6


def test_checkpoints_of_the_paper():
    window, ends = Windows.first(100), []
    for i in range(100):
        if i == window.end:
            ends.append(i + 1)
        window = window.next(i)
    assert ends == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_strongest_is_as_strong_as_each():
    threat = Linf(0.05)
    each = attacks.fgsm(threat), attacks.square(threat, queries=20)
    margin = lambda zs: jax.vmap(attacks.margin_loss)(jax.vmap(linear)(zs), LABELS)
    best = margin(run(attacks.strongest(*each)))
    broken = margin(run(attacks.until_broken(*each))) > 0
    for attack in each:
        alone = margin(run(attack))
        assert (best >= alone - 1e-6).all() or ((best > 0) >= (alone > 0)).all()
        assert (broken >= (alone > 0)).all()


LONGER = {
    "pgd": lambda n: attacks.pgd(Linf(0.03), steps=n, step_size=0.01),
    "fab": lambda n: attacks.fab(L2(0.1), steps=n),
    "deepfool": lambda n: attacks.deepfool(L2(1.0), steps=n),
    "square": lambda n: attacks.square(Linf(0.03), queries=4 * n),
    "apgd restarts": lambda n: attacks.apgd(Linf(0.03), steps=3, restarts=n),
    "fab restarts": lambda n: attacks.fab(Linf(0.03), steps=2, restarts=n),
    "square restarts": lambda n: attacks.square(Linf(0.03), queries=5, restarts=n),
}


@pytest.mark.parametrize("name", LONGER)
def test_more_steps_or_restarts_are_never_weaker(name):
    broken = lambda n: np.argmax(jax.vmap(linear)(run(LONGER[name](n))), 1) != LABELS
    assert (broken(4) >= broken(2)).all()


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.05), L1(0.1)], ids=str)
def test_no_attack_goes_below_the_certified_margin(threat):
    """On a linear classifier interval bounds of the margins are exact in linf."""
    margin = lambda x, y: margins(linear(x), y)
    lower = jax.vmap(lambda x, y: ibp(lambda z: margin(z, y))(threat, x).lower.min())
    certified = lower(XS, LABELS)
    for attack in (attacks.fgsm(threat), attacks.apgd(threat, steps=10)):
        zs = run(attack)
        attacked = jax.vmap(lambda z, y: margin(z, y).min())(zs, LABELS)
        assert (attacked >= certified - 1e-5).all()


STAGES = (
    attacks.Stage("fgsm", lambda threat, _: attacks.fgsm(threat)),
    attacks.Stage("apgd", lambda threat, _: attacks.apgd(threat, steps=10), 2),
    attacks.Stage(
        "apgd-t",
        lambda threat, i: attacks.apgd_towards(threat, i, steps=10),
        9,
        ranks=True,
    ),
)


def test_cascade_does_not_depend_on_how_it_is_cut():
    whole = attacks.cascade(STAGES, Linf(0.03), lanes=4)
    found = whole(KEY, linear, XS, LABELS)
    for cut in (1, 4):
        pieces = [
            whole(KEY, linear, XS[i : i + cut], LABELS[i : i + cut], first=i)
            for i in range(0, EXAMPLES, cut)
        ]
        assert (np.concatenate([p.z for p in pieces]) == found.z).all()
        assert (np.concatenate([p.by for p in pieces]) == found.by).all()


def test_cascade_records_who_broke_what():
    labels = LABELS.at[0].set((LABELS[0] + 1) % CLASSES)
    found = attacks.cascade(STAGES, Linf(0.03), lanes=4)(KEY, linear, XS, labels)
    right = np.argmax(jax.vmap(linear)(jnp.asarray(found.z)), axis=1) == labels
    assert found.by[0] == -2
    assert ((found.by == -1) == right).all()
    assert found.robust_accuracy == right.mean()
    assert jax.vmap(Linf(0.03).contains)(XS, jnp.asarray(found.z)).all()
    assert any("target classes" in text for text in found.warnings)


def test_cascade_reports_nan_and_zero_gradients():
    f = lambda x: (
        jnp.where(x[0] > 0.5, jnp.nan, 1.0) * jnp.array([1.0, 0.0, -1.0, -2.0])
    )
    found = attacks.cascade(STAGES, Linf(0.03), lanes=4)(KEY, f, XS, LABELS * 0)
    assert (found.finite == ~(np.asarray(XS)[:, 0] > 0.5)).all()
    assert any("NaN" in text for text in found.warnings)
    assert any("zero gradient" in text for text in found.warnings)


def test_saturated_logits_have_a_zero_gradient():
    """Whatever rounding leaves of it, where softmax has come to its end."""
    large = lambda x: 1e6 * linear(x)
    for f, flat in ((large, True), (linear, False)):
        found = attacks.cascade(STAGES[:1], Linf(0.03), lanes=4)(KEY, f, XS, LABELS)
        text = f"{len(XS)} examples have a zero gradient"
        assert any(text in warning for warning in found.warnings) == flat


REFERENCE = {  # names and rounds of the authors' code, set_version in autoattack.py
    ("standard", Linf): "apgd-ce 1, apgd-t 9, fab-t 9, square 1",
    ("standard", L2): "apgd-ce 1, apgd-t 9, fab-t 9, square 1",
    ("standard", L1): "apgd-ce 5, apgd-t 5, fab-t 9, square 1",
    ("plus", Linf): "apgd-ce 5, apgd-dlr 5, fab 1, square 1, apgd-t 9, fab-t 9",
    ("rand", L2): "apgd-ce 1, apgd-dlr 1",
}


@pytest.mark.parametrize(("version", "norm"), REFERENCE)
def test_autoattack_has_the_rounds_of_the_reference(version, norm):
    stages = attacks.autoattack_stages(norm(0.1), version)
    rounds = ", ".join(f"{stage.name} {stage.rounds}" for stage in stages)
    assert rounds == REFERENCE[version, norm]


def test_autoattack_needs_a_norm():
    with pytest.raises(TypeError, match="Box"):
        attacks.autoattack_stages(Box(XS[0], XS[0]))


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "fab", "square"])
def test_autoattack_spends_what_the_reference_does(name):
    """Evaluations that a network sees which is never broken, of one round."""
    stages = {
        stage.name: stage
        for version in ("standard", "plus")
        for stage in attacks.autoattack_stages(Linf(0.1), version)
    }
    seen = []

    def put(value):
        seen.append(value)
        return np.zeros(value.shape, np.float32)

    def told(x):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        x0 = jax.lax.stop_gradient(x[0])
        count = jax.pure_callback(put, like, x0, vmap_method="expand_dims")
        return 1e-3 * jnp.tanh(linear(x)) + jnp.eye(CLASSES)[0] + count

    attack = stages[name].attack(Linf(0.1), 0)
    jax.block_until_ready(jax.jit(lambda x: attack(KEY, told, x, 0))(XS[0]))
    verdicts = {"apgd-ce": 1, "apgd-t": 2, "fab-t": 3, "fab": 3, "square": 1}
    budget = {"apgd-ce": 101, "apgd-t": 101, "fab-t": 200, "fab": 1000, "square": 5000}
    assert len(seen) == budget[name] + verdicts[name]


@pytest.mark.parametrize(
    ("version", "classes", "words"),
    [
        ("standard", 2, ("DLR losses need more than 2", "9 target classes")),
        ("standard", 3, ("DLR losses need more than 3", "9 target classes")),
        ("standard", 10, ()),
        ("rand", 2, ("DLR losses need more than 2",)),
        ("rand", 3, ()),
        ("plus", 5, ("9 target classes",)),
    ],
)
def test_too_few_classes_are_warned_of(version, classes, words):
    notes = class_notes(attacks.autoattack_stages(Linf(0.1), version), classes)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_a_randomised_classifier_is_warned_of(version):
    brief = attacks.Stage("square", lambda t, _: attacks.square(t, queries=2))
    stages = (brief,) if version == "standard" else STAGES[:1]
    run = attacks.cascade(stages, Linf(0.03), lanes=4)
    found = run(KEY, attacks.noisy(linear, 0.01, 2), XS, LABELS)
    warned = any("randomised" in text for text in found.warnings)
    assert warned == (version == "standard")


def test_masked_gradients_are_warned_of():
    """Square breaks what a staircase hides from the attacks that follow gradients."""
    staircase = lambda x: linear(jnp.round(50 * x) / 50)
    labels = jnp.argmax(jax.vmap(staircase)(XS), axis=1)
    search = attacks.Stage("square", lambda t, _: attacks.square(t, queries=50))
    run = attacks.cascade((*STAGES[:1], search), Linf(0.2), lanes=4)
    found = run(KEY, staircase, XS, labels)
    assert (found.by == 1).any()
    assert any("may be masked" in text for text in found.warnings)
    assert run(KEY, linear, XS[:0], LABELS[:0]).warnings == ()


def test_probabilities_are_warned_of():
    found = attacks.cascade(STAGES[:1], Linf(0.03), lanes=4)(
        KEY, lambda x: jax.nn.softmax(linear(x)), XS, LABELS
    )
    assert any("probabilities" in text for text in found.warnings)


THERE, AIMED = Linf(0.3), {"goal": "targeted"}


@pytest.mark.parametrize(
    "combine",
    [
        lambda attack: attacks.restarts(attack(THERE), 2, **AIMED),
        lambda attack: attacks.strongest(attack(THERE), attack(THERE), **AIMED),
        lambda attack: attacks.until_broken(attack(THERE), attack(THERE), **AIMED),
        lambda attack: attacks.minimal(attack, THERE, bisections=3, **AIMED),
    ],
    ids=["restarts", "strongest", "until_broken", "minimal"],
)
def test_combinations_reach_the_targets_of_their_attacks(combine):
    targets = (LABELS + 1) % CLASSES
    make = functools.partial(attacks.bim, **AIMED)
    reached = lambda zs: np.argmax(jax.vmap(linear)(zs), axis=1) == targets
    alone = reached(run(make(THERE), labels=targets))
    assert alone.any()
    zs = run(combine(make), labels=targets)
    assert (reached(zs) >= alone).all()
    assert jax.vmap(THERE.contains)(XS, zs).all()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["standard", "rand"])
def test_autoattack_breaks_a_linear_classifier_where_it_can(version):
    eps = float(np.median(nearest(1)))
    zs = run(attacks.autoattack(Linf(eps, **WIDE), version=version))
    broken = np.argmax(jax.vmap(linear)(zs), axis=1) != LABELS
    assert (broken >= (nearest(1) < eps * (1 - 1e-4))).all()
    assert not broken[nearest(1) > eps * (1 + 1e-4)].any()
