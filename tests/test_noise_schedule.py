"""Schedules against guided-diffusion's tables."""

import numpy as np
import pytest

from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas, respaced_timesteps

POSTERIOR = ("variance", "log_variance_clipped", "mean_coef1", "mean_coef2")


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("key", "respacing"), [("full", None), ("r0", "250"), ("r1", "25"), ("r2", "ddim25"), ("r3", "10,10,5")]
)
def test_tables_match_the_reference(golden, name, key, respacing):
    fixture = golden(f"schedule_{name}")
    schedule = NoiseSchedule(named_betas(name))
    if respacing:
        schedule = schedule.respace(respacing)
    assert schedule.timesteps.tolist() == fixture[f"{key}.timesteps"].tolist()
    tables = {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod}
    tables |= {f"posterior_{name}": getattr(schedule.posterior, name) for name in POSTERIOR}
    for name, table in tables.items():
        np.testing.assert_allclose(table, fixture[f"{key}.{name}"].numpy(), rtol=1e-11, atol=0)


def test_sections_may_be_empty():
    assert respaced_timesteps(1000, "6,0,0,0").tolist() == [0, 50, 100, 149, 199, 249]


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("ddim7x", "expected something like"),
        ("ddim999", "no integer stride"),
        ("0", "at least one"),
        ("600,600", "600 of the 500"),
    ],
)
def test_impossible_respacings_say_why(respacing, message):
    with pytest.raises(ValueError, match=message):
        respaced_timesteps(1000, respacing)


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="linear, cosine"):
        named_betas("sigmoid")


def test_a_linear_schedule_has_at_least_21_steps():
    """β ends at 0.02·1000/T: 1 or more for T ≤ 20, where 1 − β has no root."""
    for steps in (2, 10, 20):
        with pytest.raises(ValueError, match=f"β must lie between 0 and 1.*at least 21 steps, this one has {steps}"):
            NoiseSchedule(named_betas("linear", steps))
    schedule = NoiseSchedule(named_betas("linear", 21))
    assert schedule.betas[-1] == pytest.approx(20 / 21)
    assert np.isfinite(schedule.posterior.log_variance_clipped).all()
    assert len(NoiseSchedule(named_betas("cosine", 5))) == 5


class TestLevels:
    schedule = NoiseSchedule(named_betas("linear"))

    def test_of_a_respaced_process(self):
        levels = self.schedule.respace("10").levels
        np.testing.assert_allclose(levels.alphas_cumprod, self.schedule.alphas_cumprod[levels.times.astype(int)])
        assert levels.progress.tolist() == [i / 10 for i in range(10)]
        assert levels.executed.tolist() == [9 - i for i in range(10)]
        assert levels.num_train_steps == 1000
        assert self.schedule.at([7, 3]).times.tolist() == [7, 3]

    def test_at_the_sigmas_of_complete_steps_t_is_complete(self):
        steps = [0, 17, 500, 999]
        there = self.schedule.at(steps)
        found = self.schedule.at_sigmas(there.sigmas)
        np.testing.assert_allclose(found.times, steps, atol=1e-8)
        np.testing.assert_allclose(found.alphas_cumprod, there.alphas_cumprod, rtol=1e-12)

    def test_between_and_beyond_the_steps(self):
        levels = self.schedule.at_sigmas([1e-4, 0.5, 1e4])
        assert levels.times[0] == 0
        assert levels.times[2] == 999
        below = int(levels.times[1])
        sigmas = self.schedule.at([below, below + 1]).sigmas
        assert sigmas[0] < 0.5 < sigmas[1]
        np.testing.assert_allclose(levels.sigmas, [1e-4, 0.5, 1e4], rtol=1e-7)
