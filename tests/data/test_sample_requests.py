"""Batches of shards."""

import pytest
import torch

from calib_guidance.data import SampleRequests
from calib_guidance.data.sample_requests import RequestData, ShardLoader, cut
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs import RunFolder
from tests.test_run_folder import table


class Numbers(RequestData):
    """Requests of which the third cannot be read."""

    def __init__(self, count, batch_size, num_workers):
        super().__init__()
        self.requests = [{"index": i, "seed": 7} if i != 3 else {"corrupt": "three.png"} for i in range(count)]
        self.batch_size, self.num_workers = batch_size, num_workers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_cut_within_shards_and_say_what_they_are_of(tmp_path, num_workers):
    data = Numbers(11, 3, num_workers)
    data.run_folder = RunFolder(tmp_path, 4, 11)
    data.run_folder.begin({}, {})
    data.run_folder.claims.acquire(range(0, 4))
    data.run_folder.write(range(0, 4), table(range(0, 4)))
    data.remaining = data.run_folder.remaining()
    loader = data.predict_dataloader()
    found = [(loader.shard, loader.rows, batch["index"].tolist()) for batch in loader]
    assert found == [
        (range(4, 8), range(4, 7), [4, 5, 6]),
        (range(4, 8), range(7, 8), [7]),
        (range(8, 11), range(8, 11), [8, 9, 10]),
    ]
    assert len(loader) == 3
    assert data.run_folder.claims.holds(range(4, 8))
    assert not data.run_folder.claims.holds(range(0, 4))


def test_what_cannot_be_read_is_named():
    first = next(iter(Numbers(11, 4, 0).predict_dataloader()))
    assert first["index"].tolist() == [0, 1, 2]
    assert first["corrupt"] == ["three.png"]


def test_shards_that_others_left_come_last():
    requests = [{"index": i} for i in range(9)]
    loader = ShardLoader(requests, 2, lambda: [range(0, 3)], lambda: [range(6, 9)], 4)
    assert [batch["index"].tolist() for batch in loader] == [[0, 1], [2], [6, 7], [8]]


def test_cut():
    assert cut(range(5, 12), 3) == [range(5, 8), range(8, 11), range(11, 12)]
    assert cut(range(0), 3) == []


def test_without_a_folder_all_are_taken_in_order():
    data = SampleRequests(5, num_classes=3, batch_size=2)
    assert torch.cat([batch["label"] for batch in data.predict_dataloader()]).tolist() == [0, 1, 2, 0, 1]


def test_a_shard_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match=r"data.init_args.shard_size must be at least 1, got 0"):
        SampleRequests(5, shard_size=0)
