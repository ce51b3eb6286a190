"""Data for ``fit`` and requests for ``predict``."""

from calib_guidance.data.digits import DigitImages, Digits, digits
from calib_guidance.data.image_data import ImageData, ImageSplit
from calib_guidance.data.image_sets import ImageBatch, ImageSet
from calib_guidance.data.imagenet import imagenet_labels, imagenet_names
from calib_guidance.data.loading import ResumableLoader, heldout_loader, train_loader
from calib_guidance.data.requests import DenoiseRequests, SampleRequests

__all__ = [
    "DenoiseRequests",
    "DigitImages",
    "Digits",
    "ImageBatch",
    "ImageData",
    "ImageSet",
    "ImageSplit",
    "ResumableLoader",
    "SampleRequests",
    "digits",
    "heldout_loader",
    "imagenet_labels",
    "imagenet_names",
    "train_loader",
]
