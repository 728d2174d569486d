"""Imports of certjax point strictly down, as read from the source by `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"certjax.types"},
    {"certjax.walk"},
    {"certjax.convolution"},
    {"certjax.loops"},
    {"certjax.threat", "certjax.specification", "certjax.certificate"},
    {"certjax.models", "certjax.interop"},
    {"certjax.attacks", "certjax.bounds", "certjax.smoothing", "certjax.defenses"},
    {"certjax.verification", "certjax.training"},
    {"experiments"},
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
FILES = sorted(
    path
    for folder in ("certjax", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "certjax" / "__init__.py"
)
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def unit(module: str) -> str:
    """The package or module that is one unit of the architecture."""
    return ".".join(module.split(".")[: 1 if module.startswith("experiments") else 2])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Every module and name that the file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the full name of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_down(path):
    here = unit(module_of(path))
    ours = {
        unit(m) for m in imported(path) if m.split(".")[0] in ("certjax", "experiments")
    }
    # `from certjax import __version__` is below everything
    for there in ours - {here, "certjax.__version__"}:
        assert there in RANK, f"{there}: give it a layer in {__file__}"
        assert RANK[there] < RANK[here], f"{here} must not import {there}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_the_walker_touches_jax_internals(path):
    internal = {m for m in imported(path) if m.startswith(("jax._src", "jax.extend"))}
    # the bare generator, a documented function of arrays, not of the tracing machinery
    internal -= {"jax.extend.random.threefry_2x32"}
    assert not internal or module_of(path) == "certjax.walk", internal


def test_statistics_of_smoothing_import_no_jax():
    path = ROOT / "certjax" / "smoothing" / "confidence.py"
    if not path.exists():
        pytest.skip("smoothing/confidence.py is not written yet")
    foreign = {m.split(".")[0] for m in imported(path)} & {"jax", "flax", "certjax"}
    assert not foreign, f"{path} must be auditable without {foreign}"


def test_library_needs_no_runner_library():
    """The library never imports what only the entry points need.

    matplotlib is loaded by the one function that draws, when it is called.
    """
    runners = {"hydra", "omegaconf", "wandb", "orbax", "rich", "sklearn"}
    for path in (p for p in FILES if p.is_relative_to(ROOT / "certjax")):
        assert not {m.split(".")[0] for m in imported(path)} & runners, path


def test_importing_the_library_does_not_load_matplotlib():
    code = "import certjax.bounds, certjax.attacks, certjax.training, sys"
    code += "; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
