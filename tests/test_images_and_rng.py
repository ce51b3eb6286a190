"""Conversion to 8 bits and the random streams of samples."""

import numpy as np
import pytest
import torch

from calib_guidance.backend.images import from_uint8, to_uint8
from calib_guidance.diffusion.rng import DIFFUSION, SampleStreams, random_label, random_steps


def test_the_two_published_roundings():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    assert to_uint8(x).tolist() == [int(v) for v in ((x + 1) * 127.5).clamp(0, 255)]
    assert to_uint8(x, "round_up_half").tolist() == [int(v) for v in (x * 127.5 + 128).clamp(0, 255)]
    assert to_uint8(torch.tensor([0.0])).item() == 127
    assert to_uint8(torch.tensor([0.0]), "round_up_half").item() == 128
    with pytest.raises(ValueError, match="known: truncate, round_up_half"):
        to_uint8(x, "nearest")


def test_every_gray_level_survives_a_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels), "round_up_half"), levels)


def test_a_stream_depends_on_seed_and_index_alone():
    together = SampleStreams([5] * 7, range(7), (1, 3, 3))
    draws = [together() for _ in range(3)]
    for index in (0, 3, 6):
        alone = SampleStreams([5], [index], (1, 3, 3))
        for draw in draws:
            assert torch.equal(alone()[0], draw[index])
    shuffled = SampleStreams([5] * 7, [6, 2, 0, 1, 3, 4, 5], (1, 3, 3))()
    assert torch.equal(shuffled[0], draws[0][6])
    assert not torch.equal(SampleStreams([6], [0], (1, 3, 3))()[0], draws[0][0])


def test_streams_are_standard_normal_and_independent():
    noise = torch.cat([SampleStreams([0] * 500, range(500), (1, 8, 8))() for _ in range(1)]).flatten(1)
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    correlation = np.corrcoef(noise[:200].numpy())[np.triu_indices(200, 1)]
    assert abs(correlation.mean()) < 5 / (64 * len(correlation)) ** 0.5


def test_labels_are_uniform_and_leave_the_noise_alone():
    labels = torch.tensor([random_label(0, i, 10) for i in range(5000)])
    counts = labels.bincount(minlength=10)
    assert (counts - 500).abs().max() < 5 * (5000 * 0.1 * 0.9) ** 0.5
    first = SampleStreams([0], [3], (1, 2, 2))()
    random_label(0, 3, 10)
    assert torch.equal(first, SampleStreams([0], [3], (1, 2, 2))())


def test_the_streams_of_one_sample_are_independent():
    """Noise of samplers, noise of training images and their steps share no numbers, and none moves another."""
    n = 500
    sampling = SampleStreams([0] * n, range(n), (1, 8, 8))()
    diffusion = SampleStreams([0] * n, range(n), (1, 8, 8), stream=DIFFUSION)()
    assert torch.equal(diffusion[7], SampleStreams([0], [7], (1, 8, 8), stream=DIFFUSION)()[0])
    correlation = float((sampling * diffusion).mean())
    assert abs(correlation) < 5 / sampling.numel() ** 0.5
    steps = random_steps(0, range(5000))
    assert steps[7] == random_steps(0, [7])[0] != random_steps(1, [7])[0]
    # The standard deviation of one number is 1/√12.
    assert abs(steps.mean() - 0.5) < 5 / (12 * len(steps)) ** 0.5
    assert np.abs(np.histogram(steps, 10, (0, 1))[0] - 500).max() < 5 * (5000 * 0.1 * 0.9) ** 0.5
    assert abs(np.corrcoef(steps[:n], sampling.mean((1, 2, 3)).numpy())[0, 1]) < 5 / n**0.5
