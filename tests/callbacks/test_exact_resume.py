"""Training that is killed once or several times around the end of an epoch: the same batches, validations and weights."""

import itertools
import os
import shutil
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import Dataset

from calib_guidance.callbacks import ExactResume
from calib_guidance.callbacks.exact_resume import AtomicCheckpointIO
from calib_guidance.data import heldout_loader, train_loader
from calib_guidance.errors import ConfigurationError, StoppedError

IMAGES, BATCH, STEPS, EPOCHS = 8, 2, 4, 3
SETTINGS = {
    "validation at epoch ends": {},
    "validation of the last epoch": {"check_val_every_n_epoch": EPOCHS},
    "validation twice an epoch": {"val_check_interval": 2},
    "no validation": {"limit_val_batches": 0},
    "so many steps": {"max_epochs": -1, "max_steps": EPOCHS * STEPS},
    "steps that end in mid-epoch": {"max_epochs": -1, "max_steps": EPOCHS * STEPS - 1},
    "accumulated": {"accumulate_grad_batches": 2},
}


class Killed(BaseException):
    """In place of SIGKILL: what is on disk stays as it is."""


class Numbers(Dataset):
    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        return {"image": torch.full((1,), float(i)), "index": i}


class Data(L.LightningDataModule):
    def __init__(self, batch_size=BATCH):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return train_loader(Numbers(), self.batch_size, 3)

    def val_dataloader(self):
        return heldout_loader(Numbers(), 4)


class Module(L.LightningModule):
    """A number that every batch moves, in an order that matters."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return (self.number * torch.rand(1) - batch["image"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.number - batch["image"]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Diary(L.Callback):
    """What happened at each step, and where the run is killed: at ``(hook, step)``; a set takes all places there are."""

    def __init__(self, pages, kill=None):
        self.pages, self.kill = pages, kill

    def note(self, trainer, hook, entry=None):
        if entry is not None:
            self.pages[entry[0], trainer.current_epoch, trainer.global_step] = entry[1]
        if isinstance(self.kill, set):
            self.kill.add((hook, trainer.global_step))
        if self.kill == (hook, trainer.global_step):
            raise Killed(hook)
        if self.kill == (hook, trainer.global_step, "SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(trainer, "on_train_batch_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(trainer, "on_train_batch_end", (f"batch {batch_idx}", batch["index"].tolist()))

    def on_validation_start(self, trainer, pl_module):
        self.note(trainer, "on_validation_start")

    def on_validation_end(self, trainer, pl_module):
        self.note(trainer, "on_validation_end", ("validation", float(trainer.callback_metrics["val/loss"])))

    def on_train_epoch_start(self, trainer, pl_module):
        self.note(trainer, "on_train_epoch_start")

    def on_train_epoch_end(self, trainer, pl_module):
        self.note(trainer, "on_train_epoch_end")

    def on_train_end(self, trainer, pl_module):
        self.pages["end"] = float(pl_module.number.detach())
        self.note(trainer, "on_train_end")


def fit(folder, pages, kill=None, *, every=STEPS, batch_size=BATCH, ckpt_path="last", **options):
    """One process: it resumes from what is there. Returns the trainer, or None where it was killed."""
    torch.manual_seed(0)
    # Without `every` it saves as Lightning does when nothing is asked for: the newest, at the end of epochs.
    kinds = {} if every is None else {"save_last": True, "save_top_k": 0, "every_n_train_steps": every}
    callbacks = [EMAWeightAveraging(decay=0.5), ModelCheckpoint(folder / "checkpoints", **kinds)]
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0} | options
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    trainer.callbacks.append(ExactResume())
    # A kill comes after what is written in its hook, a signal before it is answered.
    trainer.callbacks.insert(-1 if kill and len(kill) == 3 else len(trainer.callbacks), Diary(pages, kill))
    try:
        trainer.fit(Module(), datamodule=Data(batch_size), ckpt_path=ckpt_path)
    except Killed:
        return None
    return trainer


HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_validation_end")
HOOKS += ("on_train_epoch_start", "on_train_epoch_end", "on_train_end")


@pytest.mark.parametrize(("name", "every"), [*zip(SETTINGS, itertools.cycle((1, STEPS, 3))), ("no validation", None)])
def test_chains_of_kills_around_the_end_of_an_epoch(tmp_path, name, every):
    """Every position from the step before an epoch's end to the step after it, twice, then around the end of the run."""
    options = SETTINGS[name]
    complete, places = {}, set()
    trainer = fit(tmp_path / "complete", complete, places, every=every, **options)
    first, end = STEPS // options.get("accumulate_grad_batches", 1), trainer.global_step
    kills = [place for place in itertools.product(HOOKS[:-1], (first - 1, first, first + 1)) if place in places]
    assert {hook for hook, _ in kills} >= {"on_train_batch_start", "on_train_batch_end"}
    chains = [(kill, kill, (kill[0], kill[1] + first)) for kill in kills]
    chains += [((hook, end), (hook, end)) for hook in HOOKS if (hook, end) in places]
    assert ("on_train_end", end) in places
    for chain in chains:
        pages = {}
        stopped = [fit(tmp_path / "killed", pages, kill, every=every, **options) is None for kill in chain]
        assert stopped[0]
        assert fit(tmp_path / "killed", pages, every=every, **options).global_step == end
        assert pages == complete, chain[: sum(stopped)]
        shutil.rmtree(tmp_path / "killed")


def batches(pages, epoch):
    """Samples of an epoch, in order."""
    found = sorted(
        (key[2], indices) for key, indices in pages.items() if key[0].startswith("batch") and key[1] == epoch
    )
    return [index for _, indices in found for index in indices]


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_start"])
def test_another_batch_size_at_the_end_of_an_epoch_trains_what_is_left(tmp_path, hook):
    """Two epochs of 4 batches and one of 8: 16 steps, and every sample once."""
    pages = {}
    assert fit(tmp_path, pages, (hook, 2 * STEPS)) is None
    assert fit(tmp_path, pages, batch_size=1).global_step == 2 * STEPS + IMAGES
    assert [sorted(batches(pages, epoch)) for epoch in range(EPOCHS)] == [list(range(IMAGES))] * EPOCHS


def test_another_batch_size_in_mid_epoch_names_a_checkpoint_that_is_there(tmp_path):
    assert fit(tmp_path, {}, ("on_train_batch_start", STEPS + 3), every=2) is None
    with pytest.raises(ConfigurationError, match="batch_size 2, now 1.*the end of an epoch: (.*)$") as refusal:
        fit(tmp_path, {}, every=2, batch_size=1)
    path = tmp_path / "checkpoints/last.ckpt.previous"
    assert str(refusal.value).endswith(f"epoch: {path}")
    assert fit(tmp_path, {}, every=2, batch_size=1, ckpt_path=path).global_step == STEPS + 2 * IMAGES
    path.unlink()
    assert fit(tmp_path / "again", {}, ("on_train_batch_start", 2), every=1) is None
    with pytest.raises(ConfigurationError, match="there is none in its folder"):
        fit(tmp_path / "again", {}, batch_size=1)


@pytest.mark.parametrize("every", [5, 1000, None])
@pytest.mark.parametrize("options", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": 6}])
def test_a_finished_run_can_be_extended(tmp_path, every, options):
    """Whatever every_n_train_steps is, to the same weights as a run that was long from the start."""
    complete, pages = {}, {}
    fit(tmp_path / "complete", complete, every=every)
    fit(tmp_path / "part", pages, every=every, **options)
    assert fit(tmp_path / "part", pages, every=every).global_step == EPOCHS * STEPS
    assert pages == complete


@pytest.mark.parametrize("changed", [{}, {"every": 2}])
def test_a_copied_folder_has_one_last_checkpoint(tmp_path, changed):
    complete, pages = {}, {}
    fit(tmp_path / "complete", complete)
    assert fit(tmp_path / "run", pages, ("on_train_batch_start", STEPS + 1)) is None
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    fit(tmp_path / "copy", pages, **changed)
    assert pages == complete
    names = sorted(path.name for path in (tmp_path / "copy/checkpoints").iterdir())
    assert names == ["last.ckpt", "last.ckpt.previous"]
    assert torch.load(tmp_path / "copy/checkpoints/last.ckpt", weights_only=True)["global_step"] == EPOCHS * STEPS


def test_a_new_run_in_the_folder_keeps_the_last_checkpoint_of_the_old_one(tmp_path):
    fit(tmp_path, {}, max_epochs=1)
    old = (tmp_path / "checkpoints/last.ckpt").read_bytes()
    fit(tmp_path, {}, max_epochs=1, ckpt_path=None)
    assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == old
    assert (tmp_path / "checkpoints/last-v1.ckpt").exists()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_start"])
def test_control_c_saves_and_says_how_to_resume(tmp_path, hook, accumulate):
    complete, pages, options = {}, {}, {"accumulate_grad_batches": accumulate, "every": 1000}
    fit(tmp_path / "complete", complete, **options)
    handler, step = signal.getsignal(signal.SIGINT), STEPS // accumulate
    with pytest.raises(
        StoppedError, match=r"stopped by SIGINT, after step \d\. To resume, re-run with --ckpt_path (.*)"
    ) as stop:
        fit(tmp_path / "run", pages, (hook, step, "SIGINT"), **options)
    assert signal.getsignal(signal.SIGINT) == handler
    path = str(stop.value).rpartition(" ")[2]
    assert fit(tmp_path / "run", pages, ckpt_path=path, **options).global_step == EPOCHS * step
    assert pages == complete
