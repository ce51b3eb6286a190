"""The command line: ``calib-guidance fit|validate|test|predict --config FILE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

_PREDICT_CKPT = (
    "predict takes no --ckpt_path: Lightning would put the training module of that checkpoint in place of the sampling "
    "one. Name the weights in the YAML instead: the `checkpoint` of the denoiser or the `weights` of the classifier"
)


class CalibGuidanceCLI(LightningCLI):
    """LightningCLI with what sampling needs set: any module and data class, gradients inside predict."""

    def before_instantiate_classes(self) -> None:
        if self.subcommand == "predict" and self.config.predict.ckpt_path is not None:
            self.parser.error(_PREDICT_CKPT)


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the words after ``calib-guidance``; None takes those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    CalibGuidanceCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        # Predict runs under inference mode unless told not to, and guidance takes gradients inside it.
        trainer_defaults={"inference_mode": False},
        args=args,
    )
