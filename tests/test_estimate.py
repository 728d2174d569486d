"""`scripts/estimate`: steps of a recipe times the seconds of one."""

import pytest
from runners import composed, SMALL

from experiments import estimate, settings
from experiments.build import ConfigError
from experiments.cli import Launch


def test_an_estimate_is_steps_times_seconds(capsys):
    estimate.work(composed(*SMALL), Launch((), None))
    said = capsys.readouterr().out
    assert "quickstart: 0.0" in said
    assert "= 66 steps of" in said  # 3 epochs of 1433 // 64
    found = estimate.Estimate(step=2.0, compile=60.0, steps=1770)
    assert found.hours == 1.0


def test_data_of_unknown_size_are_told(monkeypatch):
    monkeypatch.setattr(estimate, "SIZES", {})
    wanted = settings.read(settings.TrainSettings, composed(*SMALL))
    with pytest.raises(ConfigError, match="digits is not known"):
        estimate.estimate(wanted)
