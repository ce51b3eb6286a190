"""Denoisers and callbacks with the faults that tests ask for."""

import os
import signal

import lightning as L
import torch
from torch import nn

from calib_guidance.denoisers.base import Denoiser

BATCH_LIMIT = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Faulty(Denoiser):
    """A denoiser that fails at one step.

    Args:
        denoiser: the sound one.
        label: class whose samples fail.
        step: t at which they do; None is every one.
        fault: ``nan`` and ``inf`` always; ``overflow`` only while the weights are in half precision.
        largest: batches above this run out of memory at that step.
    """

    def __init__(
        self, denoiser: Denoiser, label: int = -1, step: int | None = None, fault: str = "nan", largest: int = 10**6
    ):
        super().__init__()
        self.denoiser, self.label, self.step, self.fault, self.largest = denoiser, label, step, fault, largest
        self.schedule, self.image_shape, self.clip = denoiser.schedule, denoiser.image_shape, denoiser.clip
        self.num_classes, self.has_learned_variance = denoiser.num_classes, denoiser.has_learned_variance
        self.weight = nn.Parameter(torch.tensor(6e4, dtype=torch.float16), requires_grad=False)

    def decode(self, x0):
        return self.denoiser.decode(x0)

    def prepare(self, levels, y):
        sound = self.denoiser.prepare(levels, y)
        failing = (y == self.label).view(-1, 1, 1, 1)

        def predict(x_t, i):
            prediction = sound(x_t, i)
            t = torch.as_tensor(levels.times)[i].round()
            here = torch.ones(1, 1, 1, 1, dtype=torch.bool) if self.step is None else (t == self.step).view(-1, 1, 1, 1)
            if len(x_t) > self.largest and here.any():
                raise torch.OutOfMemoryError(BATCH_LIMIT)
            wrong = {
                "nan": torch.nan,
                "inf": torch.inf,
                # 120,000 is more than half precision holds: 0 in float32, and not a number otherwise.
                "overflow": 0.0 * (2 * self.weight).float(),
            }[self.fault]
            return prediction._replace(x0=torch.where(failing & here, prediction.x0 + wrong, prediction.x0))

        return predict


class SignalAt(L.Callback):
    """Sends signals to this process in the middle of batches: ``{batch: name}``, after the first step of each."""

    def __init__(self, batches: dict[int, str]):
        self.batches, self.batch = batches, -1

    def setup(self, trainer, pl_module, stage):
        pl_module.context.observers.insert(0, self)

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.batch += 1

    def __call__(self, record):
        if record.i == record.num_steps - 1 and self.batch in self.batches:
            os.kill(os.getpid(), signal.Signals[self.batches.pop(self.batch)])
