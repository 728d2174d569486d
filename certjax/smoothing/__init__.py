"""Randomized smoothing: noise, votes, exact statistics, certificates.

Left out: double sampling (DSRS, Li et al. 2022, arXiv:2206.07912). Its radius is found
by a numerical search over integrals for every pair of counts (1 to 2 days on 24 cores,
the authors say), while here every radius is a closed form or an exact count, rounded
down by more than the error of its float64 evaluation. To keep that promise the error
of the search would have to be bounded first.
"""

from certjax.smoothing.ablation import Ablation as Ablation
from certjax.smoothing.adaptive import (
    certify_radius as certify_radius,
    FixedRadius as FixedRadius,
)
from certjax.smoothing.certify import (
    ABSTAIN as ABSTAIN,
    certify as certify,
    decide as decide,
    judge as judge,
    predict as predict,
    SmoothedCertificate as SmoothedCertificate,
)
from certjax.smoothing.denoised import denoised as denoised
from certjax.smoothing.discrete import Discrete as Discrete
from certjax.smoothing.ensemble import mean_logits as mean_logits
from certjax.smoothing.noise import (
    Gaussian as Gaussian,
    Laplace as Laplace,
    Table as Table,
    Uniform as Uniform,
)
from certjax.smoothing.patch import (
    Band as Band,
    Block as Block,
    certify_band as certify_band,
    certify_block as certify_block,
    PatchCertificate as PatchCertificate,
    visible as visible,
)
from certjax.smoothing.percentile import (
    percentile_bounds as percentile_bounds,
    PercentileBounds as PercentileBounds,
)
from certjax.smoothing.quantized import QuantizedGaussian as QuantizedGaussian
from certjax.smoothing.soft import (
    certify_soft as certify_soft,
    SoftCertificate as SoftCertificate,
)
from certjax.smoothing.splitting import (
    certify_split as certify_split,
    ExactCertificate as ExactCertificate,
)
from certjax.smoothing.votes import (
    Forward as Forward,
    sample_mesh as sample_mesh,
    votes as votes,
)
