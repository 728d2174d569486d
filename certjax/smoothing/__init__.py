"""Randomized smoothing: noise, votes, exact statistics, certificates."""

from certjax.smoothing.certify import (
    ABSTAIN as ABSTAIN,
    certify as certify,
    decide as decide,
    judge as judge,
    predict as predict,
    SmoothedCertificate as SmoothedCertificate,
)
from certjax.smoothing.noise import (
    Gaussian as Gaussian,
    Laplace as Laplace,
    Table as Table,
    Uniform as Uniform,
)
from certjax.smoothing.votes import (
    Forward as Forward,
    sample_mesh as sample_mesh,
    votes as votes,
)
