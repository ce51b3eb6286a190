"""Metrics against golden data, torchmetrics and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid

from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.evaluation import ClassifierFeatures, InceptionFeatures
from calib_guidance.metrics import (
    Accuracy,
    CalibrationError,
    MaximumCalibrationError,
    ReliabilityBins,
    frechet_distance,
    mean_and_covariance,
    precision_recall,
)
from calib_guidance.networks import SmallResNet


def test_frechet_distance(golden):
    fixture = golden("metrics_features")
    reference, generated = fixture["features_1"], fixture["features_2"]
    expected = fixture.json["values"]["frechet_distance"]
    moments = (*mean_and_covariance(reference), *mean_and_covariance(generated))
    distance = float(frechet_distance(*moments))
    assert distance == pytest.approx(expected, rel=1e-8)
    statistics = [fid_features_to_statistics(f) for f in (reference, generated)]
    fidelity = next(iter(fid_statistics_to_metric(*statistics, verbose=False).values()))
    assert distance == pytest.approx(fidelity, rel=1e-5)
    assert distance == pytest.approx(float(_compute_fid(*moments)), rel=1e-8)


def test_frechet_distance_of_normals_in_closed_form():
    mean, a, b = torch.tensor([1.0, -2.0]), torch.diag(torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([1.0, 25.0]))
    # ‖μ‖² + Σ(√a − √b)²
    assert float(frechet_distance(mean, a, torch.zeros(2), b)) == pytest.approx(5 + (2 - 1) ** 2 + (3 - 5) ** 2)


def test_precision_and_recall(golden):
    fixture = golden("metrics_features")
    reference, generated = fixture["features_1"], fixture["features_2"]
    precision, recall = precision_recall(reference, generated, k=3)
    assert float(precision) == pytest.approx(fixture.json["values"]["precision_k3"], abs=1e-12)
    assert float(recall) == pytest.approx(fixture.json["values"]["recall_k3"], abs=1e-12)
    fidelity = prc_features_to_metric(generated, reference, prc_neighborhood=3, prc_batch_size=500, verbose=False)
    assert float(precision) == pytest.approx(fidelity["precision"], rel=1e-6)
    assert float(recall) == pytest.approx(fidelity["recall"], rel=1e-6)
    with pytest.raises(ValueError, match="more than 3 points"):
        precision_recall(reference, generated[:3])


def test_calibration_error(golden):
    fixture = golden("metrics_ece")
    metrics = ReliabilityBins(), CalibrationError(), MaximumCalibrationError(), Accuracy()
    for batch in zip(fixture["logits"].split(300), fixture["labels"].split(300), strict=True):
        for metric in metrics:
            metric.update(*batch)
    bins, *values = (metric.compute().overall for metric in metrics)
    for value, name in zip(values, ("ece", "mce", "accuracy"), strict=True):
        assert float(value) == pytest.approx(float(fixture[name]), abs=1e-6)
    count, confidence, correct = bins.unbind(1)
    assert count.tolist() == fixture["bin_count"].tolist()
    filled = count > 0
    np.testing.assert_allclose((correct / count)[filled], fixture["bin_accuracy"][filled], atol=1e-6)
    np.testing.assert_allclose((confidence / count)[filled], fixture["bin_confidence"][filled], atol=1e-6)


def test_classifier_features_are_the_input_of_the_last_layer():
    torch.manual_seed(0)
    network = SmallResNet()
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    network.eval()
    expected = network.forward_features(images / 127.5 - 1)
    features, _, logits = ClassifierFeatures(OffTheShelfClassifier(network, 10))(images)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, network.fc(expected), atol=1e-5, rtol=1e-4)


def test_inception_features_read_a_local_file_in_the_published_format(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    plain = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    monkey = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, state, *a, **k: None  # build the network without weights once
    try:
        torch.save({}, path)
        plain.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    finally:
        torch.nn.Module.load_state_dict = monkey
    torch.save(plain.state_dict(), path)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    features, spatial, logits = InceptionFeatures(str(path))(images)
    assert [tuple(f.shape) for f in (features, spatial, logits)] == [(2, 2048), (2, 2023), (2, 1008)]
    torch.testing.assert_close(features, plain.eval()(images)[0].float(), atol=1e-5, rtol=1e-4)
