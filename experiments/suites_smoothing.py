"""Votes of a smoothed classifier beside the noise-free forward pass of its network."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from certjax.smoothing import Gaussian, Table, votes
from certjax.types import Array, Key, PyTree
from experiments.suites import Case, CIFAR, Group, MNIST, Network, network


SIGMA = 0.25
THROUGHPUT = 0.85  # of the forward pass, that the votes must reach
BLOCKS = 8  # forward passes of one measurement
IMAGENET = (224, 224, 3)


def smoothing_suite() -> list[Group]:
    """LeNet and ResNet-20; on other devices than a CPU, ResNet-50 as well.

    torch's loop too where torch can be imported.
    """
    groups = [
        votes_group("lenet", 64, MNIST),
        votes_group("lenet", 1000, MNIST, peers=True),
        votes_group("resnet20", 64, CIFAR),
    ]
    if jax.default_backend() != "cpu":
        groups.append(votes_group("resnet50", 256, IMAGENET))
    return groups


def jax_normal(key: Key, x: Array) -> Array:
    """A noisy copy drawn by JAX's own generator, whichever the key is of."""
    return x + SIGMA * jax.random.normal(key, x.shape)


def votes_group(
    name: str, block: int, shape: tuple[int, ...], *, peers: bool = False
) -> Group:
    """Forward passes of `block` rows; the same with noise, and the predictions counted.

    A second's votes against a second's forward passes is 1 / "x least work".
    """
    net = network(name, block, shape)
    n, x = BLOCKS * block, net.xs[0]

    def forward(variables: PyTree, xs: Array) -> Array:
        return jax.vmap(net.f(variables))(xs)

    def count(noise: Any, key: Key) -> np.ndarray:
        f = jax.tree_util.Partial(net.model.apply, net.variables)
        return votes(f, noise, key, x, n, n, block=block)

    work, target = float(BLOCKS), round(1 / THROUGHPUT, 3)
    plain = Table(jax_normal, (1.0,), (0.0,), "l2")
    threefry, rbg = jax.random.key(0), jax.random.key(0, impl="rbg")
    cases = [
        Case("forward", forward, (net.variables, net.xs)),
        Case("votes", count, (Gaussian(SIGMA), threefry), work, target, host=True),
        Case("votes, jax.random.normal", count, (plain, threefry), work, host=True),
        Case("the same with rbg", count, (plain, rbg), work, host=True),
    ]
    if peers and importlib.util.find_spec("torch"):
        cases.append(torch_case(net, block, work))
    return Group(f"{name} batch {block}", cases)


def torch_case(net: Network, block: int, work: float) -> Case:
    """The loop of locuslab/smoothing (core.py, `_sample_noise`) on the same LeNet."""
    torch = importlib.import_module("torch")
    model = torch_lenet(torch, net.variables["params"])
    x = torch.from_numpy(np.array(net.xs[0])).permute(2, 0, 1).contiguous()

    def sample(num: int) -> np.ndarray:
        with torch.no_grad():
            counts = np.zeros(10, dtype=int)
            for _ in range(-(-num // block)):
                this = min(block, num)
                num -= this
                batch = x.repeat((this, 1, 1, 1))
                noise = torch.randn_like(batch) * SIGMA
                predictions = model(batch + noise).argmax(1)
                counts += count_array(predictions.numpy(), 10)
            return counts

    check_alike(net, lambda xs: model(torch.from_numpy(xs)).detach().numpy())
    return Case("locuslab's loop in torch", sample, (BLOCKS * block,), work, host=True)


def count_array(predictions: np.ndarray, classes: int) -> np.ndarray:
    """As locuslab/smoothing counts."""
    counts = np.zeros(classes, dtype=int)
    for prediction in predictions:
        counts[prediction] += 1
    return counts


def torch_lenet(torch: Any, params: PyTree) -> Callable[[Any], Any]:
    """The network of the smoothing papers in torch, with the weights of ours."""
    layers = [
        torch.nn.Conv2d(1, 20, 5),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(20, 50, 5),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(800, 500),
        torch.nn.ReLU(),
        torch.nn.Linear(500, 10),
    ]
    kernels = {
        0: params["conv_0"]["kernel"].transpose(3, 2, 0, 1),
        3: params["conv_1"]["kernel"].transpose(3, 2, 0, 1),
        # torch flattens channels first
        7: params["dense_0"]["kernel"].reshape(4, 4, 50, 500).transpose(3, 2, 0, 1),
        9: params["logits"]["kernel"].T,
    }
    names = {0: "conv_0", 3: "conv_1", 7: "dense_0", 9: "logits"}
    with torch.no_grad():
        for i, kernel in kernels.items():
            layer = layers[i]
            values = np.array(kernel).reshape(tuple(layer.weight.shape))
            layer.weight.copy_(torch.from_numpy(values))
            layer.bias.copy_(torch.from_numpy(np.array(params[names[i]]["bias"])))
    return torch.nn.Sequential(*layers).eval()


def check_alike(net: Network, peer: Callable[[np.ndarray], np.ndarray]) -> None:
    """Refuse to time a peer that computes something else."""
    xs = net.xs[:8]
    ours = jax.vmap(net.f(net.variables))(xs)
    theirs = peer(np.ascontiguousarray(jnp.transpose(xs, (0, 3, 1, 2))))
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)
