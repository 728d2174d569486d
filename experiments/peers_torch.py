"""The attacks of other libraries, on PyTorch, each with the budget of ours.

Imported only by the benchmark that compares with them. Each library is imported when
its attack is first asked for, so that a missing one costs only its own row:

    pip install torch foolbox adversarial-robustness-toolbox
    pip install --no-deps torchattacks pyautoattack adv-lib

(torchattacks pins an old `requests`, adv-lib needs visdom and torchvision for plots.)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch


Weights = Mapping[str, np.ndarray]


class Arena(NamedTuple):
    """net: a torch module of [N, C, H, W]; x, y: images and labels for it."""

    net: Any
    x: torch.Tensor
    y: torch.Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.net(self.x[:1]).shape[1]


Run = Callable[[], torch.Tensor]


def seeded(run: Run) -> Callable[[int], torch.Tensor]:
    """A run that draws by the given seed; AutoAttack's code keeps one of its own."""

    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what these libraries draw from
        return run()

    return start


def arena(weights: Weights, xs: np.ndarray, labels: np.ndarray, threads: int) -> Arena:
    """The network of `peers_attacks.classify` as a torch module, and its images."""
    torch.set_num_threads(threads)
    tensor = lambda a: torch.from_numpy(np.array(a, np.float32, order="C"))
    kernels = [tensor(weights[f"conv{i}_w"].transpose(3, 2, 0, 1)) for i in (1, 2)]
    hidden = weights["fc1_w"].reshape(10, 10, kernels[1].shape[0], -1)
    hidden = hidden.transpose(2, 0, 1, 3).reshape(weights["fc1_w"].shape)
    matrices = tensor(hidden.T), tensor(weights["fc2_w"].T)
    biases = [tensor(weights[f"{n}_b"]) for n in ("conv1", "conv2", "fc1", "fc2")]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # attacks look for the device of a module in its parameters
            self.kernel = torch.nn.Parameter(kernels[0], requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            conv, linear = torch.nn.functional.conv2d, torch.nn.functional.linear
            h = torch.relu(conv(x, self.kernel, biases[0], stride=2))
            h = torch.relu(conv(h, kernels[1], biases[1]))
            h = torch.relu(linear(h.flatten(1), matrices[0], biases[2]))
            return linear(h, matrices[1], biases[3])

    x = tensor(xs.transpose(0, 3, 1, 2))
    return Arena(Net().eval(), x, torch.from_numpy(labels.astype(np.int64)))


def foolbox(attack: str, eps: float | None, **numbers: Any) -> Callable[[Arena], Run]:
    """An attack of `foolbox.attacks`; eps None: of minimum norm."""

    def prepare(on: Arena) -> Run:
        import foolbox as library

        model = library.PyTorchModel(on.net, bounds=(0, 1), device="cpu")
        run = getattr(library.attacks, attack)(**numbers)
        return lambda: run(model, on.x, on.y, epsilons=eps)[0 if eps is None else 1]

    return prepare


def torchattacks(attack: str, **numbers: Any) -> Callable[[Arena], Run]:
    """An attack of `torchattacks`."""

    def prepare(on: Arena) -> Run:
        import torchattacks as library

        more = {"n_classes": on.classes} if attack == "AutoAttack" else {}
        run = getattr(library, attack)(on.net, **numbers, **more)
        return lambda: run(on.x, on.y)

    return prepare


def art(attack: str, **numbers: Any) -> Callable[[Arena], Run]:
    """An attack of the Adversarial Robustness Toolbox."""

    def prepare(on: Arena) -> Run:
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            on.net,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=tuple(on.x.shape[1:]),
            nb_classes=on.classes,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        settings = {"batch_size": len(on.x), "verbose": False} | numbers
        run = getattr(evasion, attack)(classifier, **settings)
        one_hot = np.eye(on.classes, dtype=np.float32)[on.y.numpy()]
        return lambda: torch.from_numpy(run.generate(on.x.numpy(), one_hot))

    return prepare


def adv_lib(attack: str, **numbers: Any) -> Callable[[Arena], Run]:
    """An attack of adversarial-library."""

    def prepare(on: Arena) -> Run:
        from adv_lib import attacks as library

        run = getattr(library, attack)
        return lambda: run(on.net, on.x, on.y, **numbers)

    return prepare


def autoattack(
    *attacks: str, norm: str, eps: float, queries: int = 5000
) -> Callable[[Arena], Run]:
    """The code of AutoAttack's authors, as packaged by pyautoattack."""

    def prepare(on: Arena) -> Run:
        import pyautoattack as library

        version = {"version": "custom", "attacks": list(attacks)} if attacks else {}
        run = library.AutoAttack(on.net, norm=norm, eps=eps, seed=0, **version)
        if attacks:  # chosen one by one they are given other restarts
            run.apgd.n_restarts = 1
            run.apgd.use_largereps = norm == "L1"
            run.fab.n_restarts = 1
        run.square.n_queries = queries
        size = {"batch_size": len(on.x)}
        return lambda: run.run_standard_evaluation(on.x, on.y, **size)[0]

    return prepare
