"""Settings of the process: set where they help, never against the user's choice."""

import ctypes
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import runtime


ROOT = Path(__file__).resolve().parents[1]
DISPATCH = "JAX_CPU_ENABLE_ASYNC_DISPATCH"
TUNING = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_PLATFORM_NAME", "GLIBC_TUNABLES", DISPATCH)
CACHING = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="malloc is tuned on glibc only"
)


@pytest.fixture
def bare(monkeypatch):
    """The environment of a user on a CPU who has set nothing."""
    for name in [*TUNING, "LD_PRELOAD"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return monkeypatch


def run(code, tmp_path, **environment):
    """Run code in a fresh process; what it prints last, as JSON."""
    inherited = {k: v for k, v in os.environ.items() if k not in (*TUNING, *CACHING)}
    chosen = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | chosen,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CONVOLUTION = """
import json, os
from experiments import runtime
runtime.configure()
import jax, jax.numpy as jnp
numbers = ("NHWC", "HWIO", "NHWC")
def f(x, w):
    y = jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=numbers)
    return jax.nn.relu(y)
program = jax.jit(f).lower(jnp.ones((64, 9, 9, 4)), jnp.ones((3, 3, 4, 8))).compile()
print(json.dumps([os.environ.get("XLA_FLAGS"), "ynn" in program.as_text()]))
"""


def test_configured_process_computes_without_the_slow_path(tmp_path):
    flags, slow = run(CONVOLUTION, tmp_path)
    if runtime.jaxlib_knows_fusion_flag():
        assert flags == "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
        assert not slow
    else:
        assert flags is None
    [folder] = (tmp_path / "certjax").iterdir()
    assert any(folder.iterdir()), "small programs must be kept too"


def test_the_choices_of_the_user_stand(tmp_path):
    theirs = {
        "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs"),
    }
    if not runtime.jaxlib_knows_fusion_flag():
        theirs.pop("XLA_FLAGS")
    flags, _ = run(CONVOLUTION, tmp_path, **theirs)
    assert flags == theirs.get("XLA_FLAGS")
    assert not (tmp_path / "certjax").exists()


def test_other_flags_are_kept(bare):
    bare.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    bare.setattr(runtime, "jaxlib_knows_fusion_flag", lambda: True)
    assert runtime.use_fast_convolutions()
    first, second = os.environ["XLA_FLAGS"].split()
    assert first == "--xla_force_host_platform_device_count=8"
    assert second == f"--{runtime.FUSION_FLAG}=-{runtime.FUSION_VALUE}"
    assert not runtime.use_fast_convolutions(), "a second call changes nothing"
    assert os.environ["XLA_FLAGS"].split() == [first, second]


def test_a_flag_that_jaxlib_does_not_know_is_never_set(bare):
    bare.setattr(runtime, "FUSION_FLAG", "xla_cpu_no_such_flag")
    assert not runtime.jaxlib_knows_fusion_flag()
    assert not runtime.use_fast_convolutions()
    assert "XLA_FLAGS" not in os.environ


def test_a_flag_is_not_set_without_jaxlib(bare):
    bare.setattr(importlib.util, "find_spec", lambda name: None)
    assert not runtime.jaxlib_knows_fusion_flag()


def test_a_library_that_cannot_be_read_knows_nothing(tmp_path):
    (tmp_path / "empty").touch()
    assert not runtime._contains(tmp_path / "empty", (b"x",))
    assert not runtime._contains(tmp_path / "absent", (b"x",))


@pytest.mark.parametrize(
    ("platforms", "cpu"),
    [("cpu", True), ("cpu,cuda", True), ("cuda,cpu", False), ("tpu", False)],
)
def test_the_chosen_platform_decides(bare, platforms, cpu):
    bare.setenv("JAX_PLATFORMS", platforms)
    assert runtime.runs_on_cpu() is cpu
    bare.setattr(runtime, "jaxlib_knows_fusion_flag", lambda: True)
    assert runtime.use_fast_convolutions() is cpu


def test_an_installed_plugin_counts_as_an_accelerator(bare, tmp_path):
    bare.delenv("JAX_PLATFORMS")
    (tmp_path / "jax_plugins" / "some_chip").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "some_chip" / "__init__.py").touch()
    bare.syspath_prepend(tmp_path)
    bare.delitem(sys.modules, "jax_plugins", raising=False)
    assert not runtime.runs_on_cpu()
    assert not runtime.keep_freed_memory()


FAULTS = """
import json, resource
from experiments import runtime
assert not CONFIGURED or runtime.keep_freed_memory()
import numpy
for i in range(12):
    numpy.ones(48 * 2**20, numpy.uint8)  # above 32 MB glibc never learns to keep
    if i == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


@glibc
def test_freed_memory_costs_no_page_faults(tmp_path):
    default, kept = (run(f"CONFIGURED = {c}\n{FAULTS}", tmp_path) for c in (0, 1))
    assert kept < 100 < default


PROGRAM_FAULTS = """
import json, resource
from experiments import runtime
runtime.configure()
import jax, jax.numpy as jnp
large = jnp.ones(20 * 2**20)  # 80 MB, and as much again for what the loop carries
double = lambda v: jnp.sum(jax.lax.fori_loop(0, 2, lambda _, w: 2 * w, v))
program = jax.jit(double).lower(large).compile()
counts = []
for _ in range(8):
    jax.block_until_ready(program(large))
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
each = sorted(after - before for before, after in zip(counts, counts[1:]))
print(json.dumps(each[3]))
"""


@glibc
def test_programs_find_their_memory_again(tmp_path):
    default = run(PROGRAM_FAULTS, tmp_path, **{DISPATCH: "true"})
    assert run(PROGRAM_FAULTS, tmp_path) < 1000 < default


@pytest.mark.parametrize(
    ("name", "value"), [(DISPATCH, "true"), ("JAX_PLATFORMS", "cuda")]
)
def test_dispatch_is_left_as_chosen(bare, name, value):
    bare.setenv(name, value)
    assert not runtime.compute_where_called()


@glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=65536"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
        ("MALLOC_TOP_PAD_", "1"),
    ],
)
def test_a_tuned_malloc_is_left_alone(bare, name, value):
    bare.setenv(name, value)
    assert not runtime.keep_freed_memory()


def test_a_library_without_mallopt_is_left_alone(bare):
    bare.setattr(ctypes, "CDLL", lambda name: object())
    assert not runtime.keep_freed_memory()


def test_processors_have_folders_of_their_own(bare):
    bare.setenv("XDG_CACHE_HOME", "/somewhere")
    here = runtime._cache_folder()
    bare.setattr(platform, "machine", lambda: "another")
    assert here.parent == Path("/somewhere/certjax")
    assert runtime._cache_folder() != here
