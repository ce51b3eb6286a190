"""RAE's order of balanced labels, from a file."""

import pytest

from calib_guidance.data import SampleRequests
from docs.rae_labels import main


def test_labels_are_in_the_publishers_order(golden, tmp_path, capsys):
    """With padding to full batches random labels follow: those are beyond the number asked for."""
    fixture = golden("rae_labels")
    for name, run in fixture.json["hyperparameters"]["runs"].items():
        samples, classes = run["num_fid_samples"], run["num_classes"]
        path = tmp_path / f"{name}.txt"
        main([str(samples), str(path), f"--num-classes={classes}", f"--seed={run['global_seed']}"])
        requests = SampleRequests(samples, classes, labels=str(path)).requests
        labels = [requests[i]["label"] for i in range(samples)]
        assert labels == fixture[f"{name}.labels"].flatten()[:samples].tolist()
        assert [labels.count(label) for label in range(classes)] == [samples // classes] * classes
    with pytest.raises(SystemExit):
        main(["10", str(tmp_path / "labels.txt"), "--num-classes=3"])
    assert "cannot be divided by 3 classes" in capsys.readouterr().err
