import pytest
import torch
from torch.utils.data import Dataset

from calib_guidance.data import heldout_loader, train_loader
from calib_guidance.data.loading import collate, seeded, take_reports
from calib_guidance.errors import ConfigurationError


class Images(Dataset):
    """23 images that are random numbers of (epoch, index)."""

    epoch = 0

    def __len__(self):
        return 23

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        with seeded(1, self.epoch, i):
            return {"image": torch.rand(3, 2, 2), "label": i % 3, "index": i}


def batches(loader, epoch):
    loader.sampler.set_epoch(epoch)  # as Lightning does
    return list(loader)


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_killed_run_sees_the_rest_of_its_epoch_once_and_the_same(num_workers, epoch, tmp_path):
    complete = batches(train_loader(Images(), 4, 3, num_workers=num_workers), epoch)
    assert len(complete) == 5
    first = train_loader(Images(), 4, 3, num_workers=num_workers)
    first.sampler.set_epoch(epoch)
    iterator = iter(first)
    taken = [next(iterator) for _ in range(2)]
    torch.save(first.state_dict(), tmp_path / "state.pt")  # what a checkpoint can hold, read back as Lightning does
    second = train_loader(Images(), 4, 3, num_workers=num_workers)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = batches(second, epoch)
    assert indices(taken + rest) == indices(complete)
    for resumed, uninterrupted in zip(rest, complete[2:], strict=True):
        assert torch.equal(resumed["image"], uninterrupted["image"])
    assert indices(batches(second, epoch + 1)) == indices(batches(first, epoch + 1)) != indices(complete)


def test_the_state_of_a_finished_or_of_another_epoch_is_not_gone_on_from():
    loader = train_loader(Images(), 4)
    complete = batches(loader, 0)
    resumed = train_loader(Images(), 4)
    resumed.load_state_dict(loader.state_dict())
    assert len(batches(resumed, 1)) == 5
    iterator = iter(loader)
    next(iterator)
    resumed.load_state_dict(loader.state_dict())
    assert len(batches(resumed, 1)) == 5
    assert indices(batches(resumed, 0)) == indices(complete)


def test_the_state_outlives_the_iterator():
    loader = train_loader(Images(), 4)
    for _ in loader:
        break
    loader._iterator = None  # what Lightning does at the end of fit
    resumed = train_loader(Images(), 4)
    resumed.load_state_dict(loader.state_dict())
    assert len(batches(resumed, 0)) == 4


def test_the_middle_of_an_epoch_resumes_only_as_it_began(monkeypatch):
    loader = train_loader(Images(), 4, 1, world_size=2)
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(
        ConfigurationError, match="batch_size 4, now 2; batches per epoch 2, now 5.*Resume with the former"
    ):
        train_loader(Images(), 2, 1, world_size=2).load_state_dict(state)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ConfigurationError, match="devices 1, now 2"):
        train_loader(Images(), 4, 1, world_size=2).load_state_dict(state)


def test_devices_train_on_disjoint_samples_and_evaluate_each_once():
    shares = [{i for batch in train_loader(Images(), 4, 0, r, 2) for i in batch["index"].tolist()} for r in (0, 1)]
    assert [len(share) for share in shares] == [8, 8]
    assert not shares[0] & shares[1]
    for world in (1, 2, 3, 30):
        seen = [
            i
            for rank in range(world)
            for batch in heldout_loader(Images(), 4, rank, world)
            for i in batch["index"].tolist()
        ]
        assert sorted(seen) == list(range(23))
    assert indices(heldout_loader(Images(), 4, 1, 2)) == [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21]]


def test_the_loaders_leave_the_random_numbers_of_the_run_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(train_loader(Images(), 4))
    list(heldout_loader(Images(), 4))
    assert torch.equal(torch.rand(3), expected)


def test_too_few_images_for_one_batch_are_an_error():
    with pytest.raises(
        ConfigurationError, match=r"batch_size 16 on 2 device\(s\) needs at least 32 training images, found 23"
    ):
        train_loader(Images(), 16, world_size=2)


def test_a_corrupt_image_is_skipped_and_reported():
    good = {"image": torch.zeros(3, 2, 2), "label": 1, "index": 7, "t": 5}
    batch = collate([good, {"corrupt": ["a.png"]}, good | {"note": ["b.png: two"]}])
    assert take_reports(batch) == (["a.png"], ["b.png: two"])
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "image": (2, 3, 2, 2),
        "label": (2,),
        "index": (2,),
        "t": (2,),
    }
    assert batch["t"].dtype == torch.int64
    assert take_reports(collate([{"corrupt": ["a.png"]}, {"corrupt": ["b.png"]}])) == (["a.png", "b.png"], [])
    with pytest.raises(ConfigurationError, match="label 9"):
        take_reports(collate([good, {"wrong": ["label 9 is outside"]}]))
