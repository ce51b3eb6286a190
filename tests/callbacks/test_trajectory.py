"""What is measured along the trajectory."""

import torch

from calib_guidance.callbacks.trajectory import StepMoments


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
