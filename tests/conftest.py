"""Settings and locations shared by all tests; imported before JAX is first used."""

import os
from pathlib import Path

import pytest

from experiments import runtime


ROOT = Path(__file__).resolve().parents[1]

runtime.configure(cache=ROOT / ".cache" / "compiled")

import jax  # noqa: E402


# broadcasting (3,) with (2, 3) silently is how a batch axis gets mixed with classes
jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.default_backend() != "cpu":  # tolerances are those of whole float32 factors
    jax.config.update("jax_default_matmul_precision", "highest")


def _folder(variable: str | None, name: str) -> Path:
    chosen = os.environ.get(variable) if variable else None
    return Path(chosen) if chosen else ROOT.parent / "shared" / name


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data: CERTJAX_DATA_DIR, or shared/data beside the checkout."""
    folder = _folder("CERTJAX_DATA_DIR", "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder {folder}; set CERTJAX_DATA_DIR to one")
    return folder


@pytest.fixture(scope="session")
def mnist_dir(data_dir: Path) -> Path:
    """The folder that holds the real `mnist.npz`."""
    if not (data_dir / "mnist.npz").is_file():
        pytest.skip(f"no mnist.npz in {data_dir}")
    return data_dir


@pytest.fixture(scope="session")
def peers_dir() -> Path:
    """Folder of results of other libraries on the same networks."""
    folder = _folder(None, "peers")
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with results of other libraries")
    return folder
