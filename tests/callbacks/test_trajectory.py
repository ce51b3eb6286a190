"""What is measured along the trajectory."""

import json

import numpy as np
import torch
import yaml

from calib_guidance.callbacks.trajectory import StepMoments
from calib_guidance.cli import main
from calib_guidance.noise_schedule import NoiseSchedule, named_betas
from tests.test_faults import QUICK, configuration


def test_moments_of_each_step_over_batches():
    values = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)) + 3
    metric = StepMoments(3)
    for batch in values.split([4, 3], dim=1):
        metric.update(2, batch[1])
        metric.update(0, batch[0])
    mean, deviation = metric.compute()
    expected_mean, expected_deviation = values.double().mean(1), values.double().std(1, correction=0)
    torch.testing.assert_close(mean[[0, 2]], expected_mean)
    torch.testing.assert_close(deviation[[0, 2]], expected_deviation)
    assert mean[1].isnan()


def test_reliability_by_range_of_t_and_the_schedule_are_saved(in_root, tmp_path):
    path = configuration(tmp_path / "run")
    config = yaml.safe_load(path.read_text())
    guidance = config["model"]["init_args"]["guidance"]["init_args"]
    guidance["schedule"]["init_args"] = {"gamma": 0.3, "interval": [100, 700]}
    guidance["scale"] = 2.0
    path.write_text(yaml.safe_dump(config))
    main(["predict", "--config", str(path), *QUICK])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    levels, bins = metrics["reliability"]["levels"], np.array(metrics["reliability"]["bins"])
    assert levels == ["t = 0–199", "t = 200–399", "t = 400–599", "t = 600–799", "t = 800–999"]
    assert bins.shape == (5, 15, 3)
    assert bins[..., 0].sum(1).tolist() == [0, 20, 0, 20, 0]  # guidance is on at 333 and 666 of 0, 333, 666, 999
    # A range with one step has the ECE of that step.
    gaps = np.abs(bins[..., 1] - bins[..., 2]).sum(1) / 20
    np.testing.assert_allclose(gaps[[1, 3]], metrics["ece_t"]["ece"][1:3])
    schedule = metrics["guidance_schedule"]
    assert schedule["t"] == [0, 333, 666, 999]
    assert schedule["unit"] == "variance"
    betas = NoiseSchedule(named_betas("cosine")).respace("4").betas
    expected = 2 * betas * [0, 1, 1, 0] / betas.max()
    np.testing.assert_allclose(schedule["strength"]["without sine factor"], expected)
    sine = 2 * 0.3 * np.sin(np.pi * np.arange(4) / 4) * [0, 1, 1, 0]
    (with_sine,) = [values for name, values in schedule["strength"].items() if "0.3" in name]
    np.testing.assert_allclose(with_sine, expected + sine)
