"""Callbacks for runs that tests interrupt."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L


class Record(L.Callback):
    """Appends epoch, batch number and sample indices of every training batch to a file of its rank."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        line = json.dumps([trainer.current_epoch, batch_idx, batch["index"].tolist()])
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rank{trainer.global_rank}.jsonl", "a") as file:
            file.write(line + "\n")


class Interrupt(L.Callback):
    """Sends a signal to this process before a training batch. List it first, so that nothing has been saved for that batch."""

    def __init__(self, step: int, name: str = "SIGKILL"):
        self.step, self.signal = step, signal.Signals[name]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal)


class KillRank(L.Callback):
    """SIGKILL to one rank before a batch of sampling; not to one that torchrun has started again."""

    def __init__(self, rank: int, batch: int):
        self.rank, self.batch = rank, batch

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and (trainer.global_rank, batch_idx) == (self.rank, self.batch):
            os.kill(os.getpid(), signal.SIGKILL)


class StopAfter(L.Callback):
    """Raises after so many batches of sampling, when they have been dealt with. List it last."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx + 1 == self.batches:
            raise KeyError("stopped by the test")


class KillOnce(L.Callback):
    """SIGKILL to the first process that has dealt with so many batches of sampling, each a shard, and written them."""

    def __init__(self, batches: int, marker: str):
        self.batches, self.marker = batches, Path(marker)

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx + 1 == self.batches and not self.marker.exists():
            written = Path(trainer.default_root_dir, "shards")
            for _ in range(6000):  # in the background
                if len(list(written.glob("*.json"))) == self.batches:
                    break
                time.sleep(0.01)
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class ByWorker(L.Callback):
    """In a batch of one of the processes that a command has forked: a signal to it, or an error."""

    def __init__(self, worker: int, batch: int, name: str = "SIGKILL"):
        self.worker, self.batch, self.name = worker, batch, name

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if (pl_module.context.workers.number, batch_idx) == (self.worker, self.batch):
            if self.name == "error":
                raise KeyError("made by the test")
            os.kill(os.getpid(), signal.Signals[self.name])


class HalfWritten(L.Callback):
    """After a batch of sampling, leaves a half-written file of a dead process among the samples."""

    def __init__(self, folder: str, batch: int):
        self.folder, self.batch = Path(folder), batch

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.batch:
            code = "from calib_guidance.backend.atomic import new_worker; print(new_worker())"
            worker = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.strip()
            (self.folder / f"samples/.00000000.parquet.{worker}.tmp").write_bytes(b"PAR1")
