"""Lightning modules: two that fit, two that predict.

>>> import calib_guidance, lightning, torch
>>> from calib_guidance import classifiers, data, networks, samplers
>>> options = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_progress_bar": False}
>>> trainer = lightning.Trainer(max_steps=2, enable_checkpointing=False, limit_val_batches=0, **options)
>>> network = networks.SmallResNet(widths=(8,))
>>> trainer.fit(CalibrateClassifier(classifiers.OffTheShelfClassifier(network)), data.Digits(seed=0))
>>> trainer.global_step
2
>>> sizes = {"in_channels": 1, "out_channels": 1, "model_channels": 32, "channel_mult": (1,), "num_classes": 10}
>>> network = networks.UNet(image_size=8, **sizes)
>>> trainer = lightning.Trainer(max_steps=1, enable_checkpointing=False, limit_val_batches=0, **options)
>>> trainer.fit(TrainDiffusion(network, prediction="v", variance="fixed"), data.Digits(seed=0))
>>> trainer.global_step
1

>>> model = calib_guidance.load_pretrained("digits", class_conditional=False)
>>> trainer = lightning.Trainer(inference_mode=False, **options)
>>> requests = data.SampleRequests(4, num_classes=10)
>>> (samples,) = trainer.predict(GuidedSampling(model, samplers.DDIM(steps="5")), requests)
>>> samples.columns["image"].shape, samples.failed
(torch.Size([4, 1, 8, 8]), [])
>>> images = torch.utils.data.Subset(data.DigitImages("heldout"), range(3))
>>> (samples,) = trainer.predict(DenoiseImages(model), data.DenoiseRequests(images, num_classes=10))
>>> samples.columns["image"].shape, samples.columns["t"].shape  # x̂0, at a step t for each
(torch.Size([3, 1, 8, 8]), torch.Size([3]))
"""

from calib_guidance.tasks.calibrate_classifier import CalibrateClassifier
from calib_guidance.tasks.predict import DenoiseImages, GuidedSampling
from calib_guidance.tasks.train_diffusion import TrainDiffusion

__all__ = ["CalibrateClassifier", "DenoiseImages", "GuidedSampling", "TrainDiffusion"]
