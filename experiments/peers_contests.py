"""Which attacks are compared with those of other libraries, and with what budgets."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.tree_util import Partial

from certjax import attacks
from certjax.attacks import cascade, Stage
from certjax.threat import L1, L2, Linf, Threat
from certjax.types import Array, Attack


LANES = 128
L1_RADIUS = 12.0  # input units


class Images(NamedTuple):
    """xs: [N, 28, 28, 1] float32 in [0, 1].  labels: [N] int32."""

    xs: np.ndarray
    labels: np.ndarray


Run: TypeAlias = Callable[[int], Any]
"""`run(seed) -> the attacked images`; the seed is the number of the turn."""


class Entrant(NamedTuple):
    """An attack of one library: `prepare(field) -> run`."""

    name: str
    prepare: Callable[["Field"], Run]


class Contest(NamedTuple):
    """One attack; `eps` None: of minimum norm, where the median distance counts.

    norm: Linf, L2, L1 (the classes), or 0 for the number of changed coordinates.
    """

    name: str
    norm: type | int
    eps: float | None
    entrants: tuple[Entrant, ...]


class Field(NamedTuple):
    """What the entrants attack; arena: the same for torch, None without torch."""

    f: Partial
    images: Images
    arena: Any


def whole(attack: Attack) -> Callable[[Field], Run]:
    """Ours, all images in one compiled call."""

    @jax.jit
    def batch(f: Partial, keys: Array, xs: Array, labels: Array) -> Array:
        return jax.vmap(lambda k, x, y: attack(k, f, x, y))(keys, xs, labels)

    def prepare(field: Field) -> Run:
        def run(seed: int) -> Array:
            keys = jax.random.split(jax.random.key(seed), len(field.images.labels))
            return jax.block_until_ready(batch(field.f, keys, *field.images))

        return run

    return prepare


def compacted(stages: tuple[Stage, ...], threat: Threat) -> Callable[[Field], Run]:
    """Ours, broken images leaving the batch between rounds."""
    run = cascade(stages, threat, lanes=LANES)
    return lambda field: (
        lambda seed: run(jax.random.key(seed), field.f, *field.images).z
    )


def contest(
    name: str, norm: type | int, eps: float | None, ours: dict, rivals: dict
) -> Contest:
    """Ours take the field, rivals its torch side."""
    from experiments.peers_torch import seeded

    on_torch = lambda prepare: lambda field: seeded(prepare(field.arena))
    entrants = ours | {k: on_torch(prepare) for k, prepare in rivals.items()}
    return Contest(name, norm, eps, tuple(Entrant(*pair) for pair in entrants.items()))


def gradient_contests(eps: float, radius: float) -> list[Contest]:
    """PGD and APGD."""
    from experiments import peers_torch as peers

    ball, disk, step = Linf(eps), L2(radius), eps / 30
    hundred = lambda set_, _: attacks.pgd(set_, steps=100, step_size=step)
    madry = {"eps": eps, "eps_step": step}
    return [
        contest(
            "pgd, 40 steps",
            Linf,
            eps,
            {"certjax": whole(attacks.pgd(ball, steps=40, step_size=step))},
            {
                "foolbox": peers.foolbox("LinfPGD", eps, steps=40, abs_stepsize=step),
                "torchattacks": peers.torchattacks(
                    "PGD", eps=eps, alpha=step, steps=40
                ),
                "art": peers.art(
                    "ProjectedGradientDescent", **madry, max_iter=40, num_random_init=1
                ),
                "adv-lib": peers.adv_lib(
                    "pgd_linf", ε=eps, steps=40, absolute_step_size=step
                ),
            },
        ),
        contest(
            "pgd, 5 x 100 steps",
            Linf,
            eps,
            {"certjax": compacted((Stage("pgd", hundred, 5),), ball)},
            {
                "art": peers.art(
                    "ProjectedGradientDescent", **madry, max_iter=100, num_random_init=5
                ),
                "adv-lib": peers.adv_lib(
                    "pgd_linf", ε=eps, steps=100, restarts=5, absolute_step_size=step
                ),
            },
        ),
        contest(
            "pgd l2, 50 steps",
            L2,
            radius,
            {"certjax": whole(attacks.pgd(disk, steps=50, step_size=radius / 20))},
            {
                "foolbox": peers.foolbox(
                    "L2PGD", radius, steps=50, abs_stepsize=radius / 20
                ),
                "torchattacks": peers.torchattacks(
                    "PGDL2", eps=radius, alpha=radius / 20, steps=50
                ),
            },
        ),
        contest(
            "apgd-ce, 100 steps",
            Linf,
            eps,
            {"certjax": whole(attacks.apgd(ball))},
            {
                "torchattacks": peers.torchattacks("APGD", eps=eps, steps=100),
                "autoattack": peers.autoattack("apgd-ce", norm="Linf", eps=eps),
                "art": peers.art(
                    "AutoProjectedGradientDescent",
                    eps=eps,
                    eps_step=2 * eps,
                    nb_random_init=1,
                    loss_type="cross_entropy",
                ),
                "adv-lib": peers.adv_lib(
                    "apgd", eps=eps, norm=float("inf"), loss_function="ce"
                ),
            },
        ),
    ]


def nearest_contests() -> list[Contest]:
    """Attacks of minimum norm; tighter budgets than the defaults, the same for all."""
    from experiments import peers_torch as peers

    anywhere = L2(1.0)
    cw = {"searches": 9, "steps": 100, "learning_rate": 0.05, "constant": 1.0}
    return [
        contest(
            "c&w l2, 9 x 100 steps",
            L2,
            None,
            {"certjax": whole(attacks.carlini_wagner(anywhere, **cw))},
            {
                "foolbox": peers.foolbox(
                    "L2CarliniWagnerAttack",
                    None,
                    binary_search_steps=9,
                    steps=100,
                    stepsize=0.05,
                    initial_const=1.0,
                ),
                "adv-lib": peers.adv_lib(
                    "carlini_wagner_l2",
                    binary_search_steps=9,
                    max_iterations=100,
                    learning_rate=0.05,
                    initial_const=1.0,
                ),
                "torchattacks, one constant": peers.torchattacks(
                    "CW", c=1.0, steps=900, lr=0.05
                ),
            },
        ),
        contest(
            "ddn, 100 steps",
            L2,
            None,
            {"certjax": whole(attacks.ddn(anywhere, steps=100))},
            {
                "foolbox": peers.foolbox("DDNAttack", None, steps=100),
                "adv-lib": peers.adv_lib("ddn", steps=100, levels=None),
            },
        ),
        contest(
            "fmn l2, 100 steps",
            L2,
            None,
            {"certjax": whole(attacks.fmn(anywhere, steps=100))},
            {
                "foolbox": peers.foolbox("L2FMNAttack", None, steps=100),
                "adv-lib": peers.adv_lib("fmn", norm=2, steps=100),
            },
        ),
        contest(
            "deepfool l2, 50 steps",
            L2,
            None,
            {"certjax": whole(attacks.deepfool(anywhere, steps=50))},
            {
                "foolbox": peers.foolbox("L2DeepFoolAttack", None, steps=50),
                "adv-lib": peers.adv_lib("df", norm=2, steps=50),
            },
        ),
    ]


def further_contests(eps: float) -> list[Contest]:
    """The parts of AutoAttack alone, and attacks in the other norms."""
    return [*_part_contests(eps), *_sparse_contests(), *_other_nearest_contests()]


def _part_contests(eps: float) -> list[Contest]:
    from experiments import peers_torch as peers

    ball = Linf(eps)
    parts = {stage.name: stage for stage in attacks.autoattack_stages(ball)}
    dlr = attacks.apgd(ball, loss=attacks.dlr)
    everywhere = {"eps": eps, "norm": float("inf")}
    return [
        contest(
            "dlr: apgd, 100 steps",
            Linf,
            eps,
            {"certjax": whole(dlr)},
            {
                "torchattacks": peers.torchattacks(
                    "APGD", eps=eps, steps=100, loss="dlr"
                ),
                "autoattack": peers.autoattack("apgd-dlr", norm="Linf", eps=eps),
                "adv-lib": peers.adv_lib("apgd", **everywhere),
            },
        ),
        contest(
            "targets: apgd-t, 9 x 100 steps",
            Linf,
            eps,
            {"certjax": compacted((parts["apgd-t"],), ball)},
            {
                "torchattacks": peers.torchattacks("APGDT", eps=eps, steps=100),
                "autoattack": peers.autoattack("apgd-t", norm="Linf", eps=eps),
                "adv-lib": peers.adv_lib("apgd_targeted", **everywhere),
            },
        ),
        contest(
            "targets: fab-t, 9 x 100 steps",
            Linf,
            eps,
            {"certjax": compacted((parts["fab-t"],), ball)},
            {
                "torchattacks": peers.torchattacks(
                    "FAB", eps=eps, steps=100, n_restarts=1, multi_targeted=True
                ),
                "autoattack": peers.autoattack("fab-t", norm="Linf", eps=eps),
            },
        ),
    ]


def _sparse_contests() -> list[Contest]:
    """In l1."""
    from experiments import peers_torch as peers

    ball, step = L1(L1_RADIUS), L1_RADIUS / 20
    return [
        contest(
            "l1: pgd, 50 steps",
            L1,
            L1_RADIUS,
            {
                "certjax": whole(
                    attacks.pgd(ball, steps=50, step_size=step, random_start=False)
                )
            },
            {
                "foolbox": peers.foolbox(
                    "SparseL1DescentAttack", L1_RADIUS, steps=50, abs_stepsize=step
                )
            },
        ),
        contest(
            "l1: apgd-ce, 100 steps",
            L1,
            L1_RADIUS,
            {"certjax": whole(attacks.apgd(ball))},
            {
                "autoattack": peers.autoattack("apgd-ce", norm="L1", eps=L1_RADIUS),
                "adv-lib": peers.adv_lib(
                    "apgd",
                    eps=L1_RADIUS,
                    norm=1,
                    loss_function="ce",
                    use_large_reps=True,
                ),
            },
        ),
        contest(
            "l1: autoattack",
            L1,
            L1_RADIUS,
            {"certjax": compacted(attacks.autoattack_stages(ball), ball)},
            {"autoattack": peers.autoattack(norm="L1", eps=L1_RADIUS)},
        ),
        contest(
            "l1: ead, 9 x 100 steps",
            L1,
            None,
            {
                "certjax": whole(
                    attacks.ead(ball, steps=100, learning_rate=0.05, constant=1.0)
                )
            },
            {
                "foolbox": peers.foolbox(
                    "EADAttack",
                    None,
                    steps=100,
                    initial_stepsize=0.05,
                    initial_const=1.0,
                    decision_rule="L1",
                )
            },
        ),
    ]


def _other_nearest_contests() -> list[Contest]:
    """Nearest points in linf, l1 and l0."""
    from experiments import peers_torch as peers

    ball = Linf(1.0)
    norms = {
        "linf": (Linf, ball, "LInfFMNAttack", float("inf")),
        "l1": (L1, L1(1.0), "L1FMNAttack", 1),
    }
    follow = [
        contest(
            f"{name}: fmn, 100 steps",
            norm,
            None,
            {"certjax": whole(attacks.fmn(threat, steps=100))},
            {
                "foolbox": peers.foolbox(theirs, None, steps=100),
                "adv-lib": peers.adv_lib("fmn", norm=power, steps=100),
            },
        )
        for name, (norm, threat, theirs, power) in norms.items()
    ]
    return [
        *follow,
        contest(
            "l0: fmn, 100 steps",
            0,
            None,
            {"certjax": whole(attacks.fmn(L2(1.0), steps=100, sparse=True))},
            {
                "foolbox": peers.foolbox("L0FMNAttack", None, steps=100),
                "adv-lib": peers.adv_lib("fmn", norm=0, steps=100),
            },
        ),
        contest(
            "linf: deepfool, 50 steps",
            Linf,
            None,
            {"certjax": whole(attacks.deepfool(ball, steps=50))},
            {
                "foolbox": peers.foolbox("LinfDeepFoolAttack", None, steps=50),
                "adv-lib": peers.adv_lib("df", norm=float("inf"), steps=50),
            },
        ),
        # adv-lib lowers its ceiling until five doublings of the constant find nothing
        contest(
            "linf: c&w, 20 x 100 steps",
            Linf,
            None,
            {
                "certjax": whole(
                    attacks.carlini_wagner(
                        ball,
                        searches=20,
                        steps=100,
                        learning_rate=0.05,
                        constant=1.0,
                    )
                )
            },
            {
                "adv-lib": peers.adv_lib(
                    "carlini_wagner_linf",
                    max_iterations=100,
                    learning_rate=0.05,
                    initial_const=1.0,
                )
            },
        ),
    ]


def ensemble_contests(eps: float, radius: float, queries: int) -> list[Contest]:
    """Square, and AutoAttack with full and with torchattacks' budgets."""
    from experiments import peers_torch as peers

    ball, full = Linf(eps), attacks.autoattack_stages(Linf(eps))
    round_ball = L2(radius)
    search = Stage(
        "square", lambda set_, _: attacks.square(set_, queries=queries, horizon=queries)
    )
    rival = {"norm": "Linf", "eps": eps}
    return [
        contest(
            f"square, {queries} queries",
            Linf,
            eps,
            {"certjax": compacted((search,), ball)},
            {
                "torchattacks": peers.torchattacks(
                    "Square", eps=eps, n_queries=queries
                ),
                "autoattack": peers.autoattack("square", **rival, queries=queries),
                "art": peers.art("SquareAttack", eps=eps, max_iter=queries),
            },
        ),
        contest(
            "autoattack",
            Linf,
            eps,
            {"certjax": compacted(full, ball)},
            {"autoattack": peers.autoattack(**rival)},
        ),
        contest(
            "autoattack l2",
            L2,
            radius,
            {"certjax": compacted(attacks.autoattack_stages(round_ball), round_ball)},
            {"autoattack": peers.autoattack(norm="L2", eps=radius)},
        ),
        # torchattacks takes 10 steps in APGD and FAB, where the reference takes 100
        contest(
            "brief autoattack, 10 steps",
            Linf,
            eps,
            {"certjax": compacted(short_stages(), ball)},
            {"torchattacks": peers.torchattacks("AutoAttack", eps=eps)},
        ),
    ]


def short_stages(steps: int = 10) -> tuple[Stage, ...]:
    """AutoAttack with other numbers of steps, Square as it is."""
    brief = {"steps": steps, "early_exit": True}
    towards = lambda set_, i: attacks.apgd_towards(set_, i, **brief)
    nearest = lambda set_, i: attacks.fab(set_, rank=i, **brief)
    return (
        Stage("apgd-ce", lambda set_, _: attacks.apgd(set_, **brief)),
        Stage("apgd-t", towards, 9, ranks=True),
        Stage("fab-t", nearest, 9, ranks=True),
        Stage("square", lambda set_, _: attacks.square(set_)),
    )


def contests(eps: float, radius: float, queries: int) -> list[Contest]:
    """All comparisons."""
    return [
        *gradient_contests(eps, radius),
        *nearest_contests(),
        *further_contests(eps),
        *ensemble_contests(eps, radius, queries),
    ]
