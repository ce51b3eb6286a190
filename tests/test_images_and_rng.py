"""Conversion to 8 bits and the random streams of samples."""

import numpy as np
import pytest
import torch

from calib_guidance.images import from_uint8, to_uint8
from calib_guidance.rng import SampleStreams, random_label


def test_the_two_published_roundings():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    assert to_uint8(x).tolist() == [int(v) for v in ((x + 1) * 127.5).clamp(0, 255)]
    assert to_uint8(x, "round_up_half").tolist() == [int(v) for v in (x * 127.5 + 128).clamp(0, 255)]
    assert to_uint8(torch.tensor([0.0])).item() == 127
    assert to_uint8(torch.tensor([0.0]), "round_up_half").item() == 128
    with pytest.raises(ValueError, match="known: truncate, round_up_half"):
        to_uint8(x, "nearest")


def test_every_grey_level_survives_a_round_trip():
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
