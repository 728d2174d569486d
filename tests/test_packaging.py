"""What is distributed and how it is installed, from the files that say so."""

import ast
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import certjax


ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
# of extras, imported where they are used; PIL is what matplotlib itself draws with
LAZY = {"onnx", "safetensors", "pooch", "PIL"}
# the peers of the benchmarks, each missing one costs its own row alone
LAZY |= {"torch", "foolbox", "art", "torchattacks", "pyautoattack", "adv_lib"}
LAZY |= {"auto_LiRPA"}


def distribution(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_every_place_names_the_same_version():
    version = certjax.__version__
    assert PYPROJECT["project"]["version"] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == version


def test_the_licence_is_apache():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def test_only_certjax_is_distributed():
    found = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    assert found["include"] == ["certjax", "certjax.*"]
    folders = {path.parent for path in (ROOT / "certjax").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def imports(path):
    """Third-party modules that the file imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"certjax", "experiments"}


def test_every_import_is_a_declared_dependency():
    declared = {distribution(r) for r in PYPROJECT["project"]["dependencies"]}
    provided = importlib.metadata.packages_distributions()
    for path in [
        *(ROOT / "certjax").rglob("*.py"),
        *(ROOT / "experiments").glob("*.py"),
    ]:
        for module in imports(path) - LAZY:
            names = {distribution(name) for name in provided[module]}
            assert names & declared, (path, module)


def test_extras_of_the_readme_exist():
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = {"cuda", "cuda12", "tpu", "data", "sweep", "interop", "bench", "test"}
    assert wanted <= extras.keys()
    assert not any("ax-sweeper" in r for group in extras.values() for r in group)


@pytest.mark.parametrize("name", ["scripts/quickstart", "scripts/test", ".ci/run"])
def test_scripts_are_executable_and_parse(name):
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_continuous_integration_runs_what_the_readme_says():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec ./scripts/test"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    [job] = workflow["jobs"].values()
    assert job["strategy"]["matrix"] == {"python": ["3.11", "3.13"]}
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


# --- the scripts, in a copy of the checkout, with stand-ins for uv and python


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose path has a space, with what the scripts read."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, root)
    return root


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def call(checkout, *arguments, name="test", **environment):
    path = f"{checkout.parent / 'bin'}:/usr/bin:/bin"
    inherited = {k: v for k, v in os.environ.items() if k != "CERTJAX_VENV"}
    return subprocess.run(
        [checkout / "scripts" / name, *arguments],
        cwd=checkout.parent,  # from another directory
        env=inherited | {"PATH": path} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def stand_in_for_uv(checkout):
    """A `uv` that notes its arguments and makes an environment of this interpreter."""
    python = checkout / ".venv" / "bin" / "python"
    script(
        checkout.parent / "bin" / "uv",
        f"""echo "$@" >> '{checkout.parent}/calls'
        mkdir -p '{python.parent}'
        printf '#!/bin/sh\\nexec "{sys.executable}" "$@"\\n' > '{python}'
        chmod +x '{python}'""",
    )
    return checkout.parent / "calls"


def test_installs_once_and_again_when_the_lock_changes(checkout):
    calls = stand_in_for_uv(checkout)
    for _ in range(2):
        done = call(checkout, "--version")
        assert done.returncode == 0, done.stderr
        assert "pytest" in done.stdout + done.stderr
    assert calls.read_text().splitlines() == ["sync --locked --quiet"]
    (checkout / "uv.lock").write_text("another")
    call(checkout, "--version")
    assert len(calls.read_text().splitlines()) == 2


def test_two_scripts_at_once_install_once(checkout):
    calls = stand_in_for_uv(checkout)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: call(checkout, "--version"), range(2)))
    assert [one.returncode for one in done] == [0, 0]
    assert shutil.which("flock") is None or len(calls.read_text().splitlines()) == 1


def test_arguments_with_spaces_reach_the_program(checkout):
    stand_in_for_uv(checkout)
    (checkout / "experiments").mkdir()
    (checkout / "experiments" / "train.py").write_text(
        "import sys; print(sys.argv[1:])"
    )
    done = call(checkout, "name=a b", "eps=8/255", name="quickstart")
    assert done.stdout.strip() == "['name=a b', 'eps=8/255']"


def test_an_old_python_is_refused_in_words(checkout):
    old = checkout.parent / "python3.9"
    script(old, '[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1')
    done = call(checkout, PYTHON=str(old))
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "Python 3.9.1" in done.stderr


def test_a_failed_install_is_not_taken_for_done(checkout):
    script(checkout.parent / "bin" / "uv", "echo no network >&2; exit 2")
    for _ in range(2):
        done = call(checkout, PYTHON="/no/such/python")
        assert done.returncode == 1
        assert "no network" in done.stderr
        assert "no '/no/such/python' found" in done.stderr
    assert not (checkout / ".venv" / ".installed").exists()
