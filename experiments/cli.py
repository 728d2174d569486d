"""The frame of every entry point: Hydra around it, errors in words, clean endings."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments import build, console, runtime
from experiments.runs import RunError, Stopped


CONF = str(Path(__file__).resolve().parent.parent / "conf")


class Launch(NamedTuple):
    """How a run was asked for: the words of the command line, and the sweep if any."""

    overrides: tuple[str, ...]
    sweep: str | None


def launch(config_name: str, work: Callable[[dict[str, Any], Launch], None]) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and do the work.

    A user's mistake ends in one line and exit code 1, a signal in one line and
    128 + signal; HYDRA_FULL_ERROR=1 shows where it happened.
    """
    runtime.configure()
    build.register_resolvers()

    @hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)
    def main(cfg: DictConfig) -> None:
        job = HydraConfig.get()
        in_sweep = job.mode == RunMode.MULTIRUN
        chosen = job.runtime.choices.get("sweep") or "multirun"
        about = Launch(tuple(job.overrides.task), str(chosen) if in_sweep else None)
        try:
            work(build.plain(cfg), about)
        except (build.ConfigError, RunError) as error:
            _refuse(error, in_sweep)
        except Stopped as stopped:
            console.say(f"stopped {stopped.where}; the same command continues")
            raise
        except KeyboardInterrupt:
            console.say("stopped; the same command continues")
            raise SystemExit(130) from None

    main()


def _refuse(error: Exception, in_sweep: bool) -> None:
    """Say what is wrong and end, or in a sweep let the other cells run first."""
    console.fail(str(error))
    if in_sweep or os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    raise SystemExit(1) from None
