"""The bounds of auto_LiRPA, on PyTorch. Imported only to be compared with.

Version 0.7.1 is in its repository alone (Verified-Intelligence/auto_LiRPA); 0.3 is the
newest on PyPI and asks for an older torch.
"""

from collections.abc import Callable
from typing import Any

import auto_LiRPA
import jax
import numpy as np
import torch

from experiments.suites import Network


ITERATIONS = 20


def auto_lirpa(net: Network, label: str, eps: float) -> Callable[[], Any]:
    """Bounds of the network's batch in the box of radius eps, cut to [0, 1].

    Args:
      net: a `ConvNet` without normalisation, pooling and batch norm.
      label: "CROWN-IBP", "CROWN" or "alpha-CROWN".
    """
    model, x = torch_network(net)
    options = {"iteration": ITERATIONS, "ob_iteration": ITERATIONS}
    bounded = auto_LiRPA.BoundedModule(
        model,
        torch.zeros_like(x),
        bound_opts={"conv_mode": "patches", "optimize_bound_args": options},
    )
    box = auto_LiRPA.PerturbationLpNorm(
        norm=np.inf, eps=eps, x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1)
    )

    def run() -> Any:
        points = auto_LiRPA.BoundedTensor(x, box)
        if label == "alpha-CROWN":
            return bounded.compute_bounds(x=(points,), method="CROWN-Optimized")
        with torch.no_grad():
            first = label == "CROWN-IBP"
            return bounded.compute_bounds(x=(points,), IBP=first, method="backward")

    return run


def ibp_training_step(net: Network, eps: float) -> Callable[[], Any]:
    """A step of Adam on the cross-entropy of the worst logits by interval bounds."""
    model, x = torch_network(net)
    labels = torch.from_numpy(np.array(net.labels, np.int64))
    bounded = auto_LiRPA.BoundedModule(model, torch.zeros_like(x))
    box = auto_LiRPA.PerturbationLpNorm(
        norm=np.inf, eps=eps, x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1)
    )
    points = auto_LiRPA.BoundedTensor(x, box)
    optimizer = torch.optim.Adam(bounded.parameters(), lr=1e-3)
    true = torch.nn.functional.one_hot(labels, 10).bool()

    def run() -> Any:
        optimizer.zero_grad()
        low, high = bounded.compute_bounds(x=(points,), IBP=True, method=None)
        worst = torch.where(true, low, high)
        torch.nn.functional.cross_entropy(worst, labels).backward()
        optimizer.step()

    return run


def torch_network(net: Network) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network as a torch module of [N, C, H, W], and its batch."""
    tensor = lambda a: torch.from_numpy(np.array(a, np.float32, order="C"))
    params: dict[str, Any] = jax.tree.map(np.asarray, net.variables["params"])
    xs = np.asarray(net.xs).transpose(0, 3, 1, 2)
    layers: list[torch.nn.Module] = []
    sides, channels = xs.shape[2:], xs.shape[1]
    for i, conv in enumerate(net.model.convolutions):
        weight = params[f"conv_{i}"]["kernel"].transpose(3, 2, 0, 1)
        layer = torch.nn.Conv2d(
            channels, conv.features, conv.kernel, conv.stride, conv.padding
        )
        layers += [_filled(layer, weight, params[f"conv_{i}"]["bias"]), torch.nn.ReLU()]
        channels = conv.features
        sides = [(n + 2 * conv.padding - conv.kernel) // conv.stride + 1 for n in sides]
    layers.append(torch.nn.Flatten())
    names = [*(f"dense_{i}" for i in range(len(net.model.hidden))), "logits"]
    for i, name in enumerate(names):
        weight = params[name]["kernel"]
        if i == 0:  # flattened as [C, H, W] there, as [H, W, C] here
            weight = weight.reshape(*sides, channels, -1).transpose(2, 0, 1, 3)
            weight = weight.reshape(-1, weight.shape[-1])
        layer = _filled(torch.nn.Linear(*weight.shape), weight.T, params[name]["bias"])
        layers += [layer, torch.nn.ReLU()] if name != "logits" else [layer]
    return torch.nn.Sequential(*layers), tensor(xs)


def _filled(layer: Any, weight: np.ndarray, bias: np.ndarray) -> torch.nn.Module:
    layer.weight.data = torch.from_numpy(np.array(weight, order="C"))
    layer.bias.data = torch.from_numpy(np.array(bias))
    return layer
