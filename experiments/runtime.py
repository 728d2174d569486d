"""What the process needs before JAX is first used: faster CPU code, a compile cache.

`configure()` is the first thing every entry point does. It fills in only what the user
left open; each of the four steps names how to switch it off. Library users who want
the same speed on a CPU call it too, or do what the README says.
"""

import ctypes
import hashlib
import importlib.util
import mmap
import os
import pkgutil
import platform
import sys
from importlib.metadata import entry_points
from pathlib import Path


FUSION_FLAG = "xla_cpu_experimental_ynn_fusion_type"
FUSION_VALUE = "individual_convolution"
LIBRARY_NAMES = ("libjax_common.*", "xla_extension.*", "jax_common.*")

# malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 256 * 2**20


def configure(cache: str | Path | None = None) -> None:
    """Prepare this process; call it before the first JAX computation.

    Four steps, each leaving alone what the user has chosen: `use_fast_convolutions`,
    `keep_freed_memory`, `compute_where_called`, `use_compilation_cache`. Calling it
    again changes nothing.

    Args:
      cache: folder of compiled programs; None: see `use_compilation_cache`.
    """
    use_fast_convolutions()
    keep_freed_memory()
    compute_where_called()
    use_compilation_cache(cache)


def use_fast_convolutions() -> bool:
    """Take single convolutions away from XLA's YNNPACK path on the CPU; True if done.

    That path is the default of jax 0.10 to 0.12 at least, and slower: a convolution of
    13x13x16 images with 32 kernels of 4x4 took 97 instead of 20 ms of CPU time for a
    batch of 1,024, 19 instead of 11 ms for 512 (on other machines up to 12 times as
    much). Sets `XLA_FLAGS`, which XLA reads when JAX is first used, only where
    the computation will run on the CPU, the installed jaxlib knows the flag (an unknown
    one aborts the process), and XLA_FLAGS does not name the flag already. To keep
    JAX's default: `--xla_cpu_experimental_ynn_fusion_type=+individual_convolution`.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if FUSION_FLAG in flags or not runs_on_cpu() or not jaxlib_knows_fusion_flag():
        return False
    os.environ["XLA_FLAGS"] = f"{flags} --{FUSION_FLAG}=-{FUSION_VALUE}".strip()
    return True


def runs_on_cpu() -> bool:
    """Will JAX choose the CPU? Decided without starting JAX.

    `JAX_PLATFORMS` decides where it is set; otherwise any installed plugin (CUDA, ROCm,
    TPU, Metal) counts as an accelerator, used or not.
    """
    chosen = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    if chosen:
        return chosen.split(",")[0].strip().lower() == "cpu"
    if importlib.util.find_spec("libtpu") or entry_points(group="jax_plugins"):
        return False
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else None
    return not (folders and any(pkgutil.iter_modules(folders)))


def jaxlib_knows_fusion_flag() -> bool:
    """Do both the flag's and the value's name occur in jaxlib's shared library?

    Reading the library is the one test that neither depends on a version number nor
    risks the abort: 0.02 s where the flag is known, 0.2 s where 350 MB hold none.
    """
    spec = importlib.util.find_spec("jaxlib")
    folders = spec.submodule_search_locations if spec else None
    names = (FUSION_FLAG.encode(), FUSION_VALUE.upper().encode())
    libraries = [
        path
        for folder in folders or ()
        for pattern in LIBRARY_NAMES
        for path in sorted(Path(folder).glob(pattern))
    ]
    return any(_contains(path, names) for path in libraries)


def _contains(path: Path, names: tuple[bytes, ...]) -> bool:
    """Does the file hold every one of the byte strings?"""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return all(content.find(name) >= 0 for name in names)
    except (OSError, ValueError):  # unreadable or empty: not known
        return False


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step; True if done.

    XLA's CPU backend frees its temporaries after each call; glibc returns large ones
    to the kernel, and the next call pays a page fault for every 4 kB again. Keeping
    them took interval bounds of a four-convolution network at batch 128 from 19,600
    page faults and 118 ms of CPU time a call to 100 faults and 67 ms (its plain forward
    pass from 46 to 29 ms). The price: memory once used stays with the process, whose
    peak grew from 0.5 to 0.8 GB. Holds for what the main thread asks for, hence
    `compute_where_called`.

    Does nothing outside glibc, next to an accelerator, when malloc is replaced by
    LD_PRELOAD, or where `GLIBC_TUNABLES` or `MALLOC_*_` already tune it. To keep
    glibc's defaults: `GLIBC_TUNABLES=glibc.malloc.mmap_max=65536`.
    """
    if platform.libc_ver()[0] != "glibc" or _malloc_is_tuned() or not runs_on_cpu():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)


def _malloc_is_tuned() -> bool:
    """Has the user replaced malloc or set any of its knobs?"""
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return True
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return True
    return any(key.startswith("MALLOC_") and key.endswith("_") for key in os.environ)


def compute_where_called() -> bool:
    """Start CPU programs from the thread that calls them; True if done.

    By default JAX hands a program to a thread of its own. What glibc keeps for such a
    thread holds at most 64 MB: larger temporaries are mapped and faulted in anew at
    every call (CROWN of `cnn4_bn` at batch 16: 280,000 page faults and 610 ms; from the
    main thread 45 faults and 320 ms). One arena for all threads avoids that as well,
    but then the threads that share the work wait for each other's allocations: a
    training step of CROWN-IBP took 54 ms, against 46 here, and that CROWN's process at
    its peak 3.4 GB, against 1.8.

    The price: a call returns when it is done, so that Python's own work no longer runs
    beside it. Does nothing outside glibc or next to an accelerator. To keep JAX's
    default: `JAX_CPU_ENABLE_ASYNC_DISPATCH=true`, a variable read here, not by JAX.
    """
    chosen = os.environ.get("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
    asked = chosen.lower() in ("true", "1")
    if asked or platform.libc_ver()[0] != "glibc" or not runs_on_cpu():
        return False
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


def use_compilation_cache(cache: str | Path | None = None) -> Path | None:
    """Keep compiled programs between runs; the folder, or None if the user chose.

    The second start of a training takes 1.5 s instead of 6 to 8 s. All programs are
    kept, however quickly compiled: JAX's own threshold of 1 s would drop nearly all.

    Args:
      cache: the folder; None: `$XDG_CACHE_HOME/certjax/` (or `~/.cache/certjax/`), in a
        subfolder for this kind of processor: machines that share a home must not share
        machine code.

    `JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE=false` and
    `jax.config.update` win, as do the two thresholds where they are set.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # ty: ignore
        return None
    folder = Path(cache) if cache is not None else _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: compile as without a cache
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    thresholds = {
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in thresholds.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder


def _cache_folder() -> Path:
    """The user's cache folder for programs compiled for this processor."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "certjax" / f"compiled-{_processor()}"


def _processor() -> str:
    """Eight hex digits that differ between processors of different instruction sets."""
    described = platform.machine() + platform.processor()
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        kinds = ("model name", "flags", "Features", "CPU part")
        described += "".join(sorted({v for v in lines if v.startswith(kinds)}))
    return hashlib.sha256(described.encode()).hexdigest()[:8]
