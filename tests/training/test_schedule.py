"""The schedule's values at its corners, worked by hand."""

from __future__ import annotations

import pytest

from trivium.config import ConfigError
from trivium.training.schedule import ScheduleConfig, lr_scale


def test_wsd_rises_holds_and_falls() -> None:
    """Over 100 steps with warm-up 0.1, decay 0.5 and final 0: 1/10 first, 1 from 9 to 49, half way down at 74."""
    config = ScheduleConfig(warmup_frac=0.1, decay_frac=0.5, final_frac=0.0)
    scales = [lr_scale(config, step, 100) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9] == scales[30] == scales[49] == 1.0
    assert scales[74] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(0.0)


def test_cosine_is_half_way_in_the_middle() -> None:
    """Warm-up of one step, then a half cosine over the other 100."""
    config = ScheduleConfig(kind="cosine", warmup_frac=0.0, final_frac=0.2)
    assert lr_scale(config, 50, 101) == pytest.approx(0.6)
    assert lr_scale(config, 100, 101) == pytest.approx(0.2)


def test_a_fraction_above_one_is_refused() -> None:
    """The message names the field, the value and the bound."""
    with pytest.raises(ConfigError, match=r"warmup_frac = 1.5: must be 0 to 1"):
        ScheduleConfig(warmup_frac=1.5)
