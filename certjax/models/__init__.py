"""Networks of the papers as Linen modules of one example; see `networks`."""

from certjax.models.ablated import Ablated as Ablated, ablated_cnn as ablated_cnn
from certjax.models.batchnorm import (
    BatchNorm as BatchNorm,
    classifier as classifier,
    clean_forward as clean_forward,
    population_statistics as population_statistics,
    running_average as running_average,
)
from certjax.models.deep import (
    BottleneckResNet as BottleneckResNet,
    DenseNet as DenseNet,
    densenet40 as densenet40,
    resnet50 as resnet50,
    wide_resnet as wide_resnet,
    WideResNet as WideResNet,
)
from certjax.models.foreign import from_nnx as from_nnx
from certjax.models.initialization import ibp_initialize as ibp_initialize
from certjax.models.layers import Normalize as Normalize
from certjax.models.lipschitz import (
    AOL as AOL,
    aol_cnn as aol_cnn,
    group_sort as group_sort,
    linf_distance_net as linf_distance_net,
    Lipschitz as Lipschitz,
    lipschitz_bound as lipschitz_bound,
    SLL as SLL,
    sll_cnn as sll_cnn,
    sortnet as sortnet,
)
from certjax.models.networks import (
    cnn3 as cnn3,
    cnn4 as cnn4,
    cnn4_bn as cnn4_bn,
    cnn5_bn as cnn5_bn,
    cnn7_bn as cnn7_bn,
    ConvNet as ConvNet,
    Convolution as Convolution,
    dm_large as dm_large,
    dm_medium as dm_medium,
    dm_small as dm_small,
    lenet as lenet,
    mlp as mlp,
)
from certjax.models.residual import (
    ResNet as ResNet,
    resnet as resnet,
    resnet20 as resnet20,
    resnet110 as resnet110,
)
