"""`calib-guidance reference`, the statistics it makes, and those of other programs."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from calib_guidance.backend.images import to_uint8
from calib_guidance.cli import main
from calib_guidance.data import digits
from calib_guidance.data.image_sets import ImageSet
from calib_guidance.errors import ConfigurationError
from calib_guidance.evaluation.statistics import ReferenceStatistics
from tests import processes
from tests.conftest import ROOT
from tests.image_files import KINDS, Projection, pictures, png, write
from tests.runs import refused

PROJECTION = "tests.image_files:Projection"


def activations(pixels):
    """What ADM's evaluator holds of all images: pool and spatial features, float32."""
    found = Projection()(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    return found.pool.detach().numpy(), found.spatial.detach().numpy()


def moments(features):
    return features.astype(np.float64).mean(0), np.cov(features.astype(np.float64), rowvar=False)


def adm_batch(path, pixels, labels, all_pixels=None):
    """A reference batch as ADM publishes them: some images, and statistics of all of them as its evaluator computes these."""
    pool, spatial = activations(pixels if all_pixels is None else all_pixels)
    statistics = {
        "mu": np.mean(pool, axis=0),
        "sigma": np.cov(pool, rowvar=False),
        "mu_s": np.mean(spatial, axis=0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }
    np.savez(path, pixels, labels, **statistics)
    return path


def close(found, expected, tolerance=1e-12):
    expected = torch.as_tensor(np.asarray(expected))
    torch.testing.assert_close(found, expected.double(), rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_every_form_has_the_same_statistics(tmp_path):
    pixels, labels = pictures(40)
    pool, spatial = activations(pixels)
    found = {}
    for kind in KINDS:
        images = ImageSet(write(tmp_path / kind, kind, pixels, labels))
        found[kind] = ReferenceStatistics.open(images).measured(Projection(), batch_size=7, keep_features=True)
        for one, other in zip((found[kind].mean, found[kind].covariance), moments(pool), strict=True):
            close(one, other, 1e-6)  # the networks' own float32, by the size of batches
        first = found["run folder"]
        for name in ("mean", "covariance", "spatial_mean", "spatial_covariance", "features"):
            close(getattr(found[kind], name).double(), getattr(first, name))
        exact = found[kind].features.numpy()
        for one, other in zip((found[kind].mean, found[kind].covariance), moments(exact), strict=True):
            close(one, other)
        assert found[kind].num_images == 40
        assert found[kind].provenance["images"]["sha256"] == first.provenance["images"]["sha256"]
        assert found[kind].provenance["images"]["kind"].split()[-1] in kind.replace("folders", "folder")
        assert (found[kind].labels is None) == (kind == "image folder")
    np.testing.assert_array_equal(found["npz"].labels, labels)
    close(first.spatial_covariance, np.cov(spatial.astype(np.float64), rowvar=False), 1e-6)


def test_nothing_cancels(tmp_path):
    """Features at 1e6 with a std of 1, for which sums of squares in float64 keep 4 digits."""

    class Far(Projection):
        def forward(self, images):
            found = super().forward(images)
            return found._replace(pool=(found.pool.double() - 100 + 1e6))

    pixels, labels = pictures(60)
    images = ImageSet(write(tmp_path, "npz", pixels, labels))
    found = ReferenceStatistics.open(images).measured(Far(), batch_size=7)
    near = ReferenceStatistics.open(images).measured(Projection(), batch_size=7)
    torch.testing.assert_close(found.mean, near.mean - 100 + 1e6, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.covariance, near.covariance, rtol=1e-8, atol=1e-8)


def test_statistics_are_read_as_they_were_written(tmp_path):
    pixels, labels = pictures(40)
    images = ImageSet(write(tmp_path, "npz", pixels, labels))
    made = ReferenceStatistics.open(images).measured(Projection(), keep_features=True)
    sha256 = made.save(tmp_path / "statistics.npz")
    assert made.save(tmp_path / "again.npz") == sha256
    found = ReferenceStatistics.read(tmp_path / "statistics.npz")
    for name in ("mean", "covariance", "spatial_mean", "spatial_covariance", "features", "labels"):
        assert torch.equal(getattr(found, name), getattr(made, name))
    assert (found.num_images, found.image_shape, found.images) == (40, (3, 8, 8), None)
    assert found.provenance.pop("sha256") == sha256
    assert found.provenance["format"] == "calib-guidance"
    assert json.loads(json.dumps(made.provenance)).items() <= found.provenance.items()
    assert found.notes == []
    found.check(Projection())
    with np.load(tmp_path / "statistics.npz") as file:  # as other programs do
        close(made.mean, file["mu"])
        close(made.covariance, file["sigma"])
    with pytest.raises(ConfigurationError, match="exists already"):
        made.save(tmp_path / "statistics.npz")


# Files of others


def test_reference_batches_of_adm(tmp_path):
    """Mean and covariance of all images, as the file says; features of those in it."""
    pixels, labels = pictures(90)
    path = adm_batch(tmp_path / "VIRTUAL_labeled.npz", pixels[:20], labels[:20], pixels)
    found = ReferenceStatistics.open(path).measured(Projection(), keep_features=True)
    pool, spatial = activations(pixels)
    close(found.mean, pool.mean(0))
    close(found.covariance, np.cov(pool, rowvar=False))
    close(found.spatial_mean, spatial.mean(0))
    close(found.spatial_covariance, np.cov(spatial, rowvar=False))
    close(found.features.double(), pool[:20], 1e-6)
    assert found.labels.tolist() == labels[:20].tolist()
    assert (found.num_images, found.image_shape, found.images.name) == (None, (3, 8, 8), str(path))
    assert found.provenance["format"] == "arr_0, arr_1, mu, mu_s, sigma, sigma_s in .npz"
    assert found.provenance["images"]["num_images"] == 20
    assert "does not say which features" in found.notes[0]
    assert "those of the 20 images in it" in found.notes[1]
    assert ReferenceStatistics.open(path).measured(Projection()).features is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mu_and_sigma_alone(tmp_path, dtype):
    """As EDM, clean-fid and pytorch-fid write them."""
    mu, sigma = moments(activations(pictures(90)[0])[0])
    np.savez(tmp_path / "edm.npz", mu=mu.astype(dtype), sigma=sigma.astype(dtype))
    found = ReferenceStatistics.open(tmp_path / "edm.npz").measured(Projection(), keep_features=True)
    close(found.mean, mu, 1e-6)
    close(found.covariance, sigma, 1e-6)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert (found.spatial_mean, found.features, found.images, found.image_shape) == (None, None, None, None)


MU, SIGMA = np.zeros(16), np.eye(16)
FEATURES = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
KEPT = {"mu": MU, "sigma": SIGMA, "features": FEATURES}
WRONG = {
    "no sigma": ({"mu": MU}, "has no sigma, it has: mu"),
    "neither": ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "has no mu and no sigma, it has: arr_0"),
    "of shapes that do not fit": ({"mu": MU, "sigma": np.eye(15)}, r"mu is float64 \(16,\), sigma float64 \(15, 15\)"),
    "of integers": ({"mu": MU.astype(int), "sigma": SIGMA}, "of floats"),
    "not finite": ({"mu": MU, "sigma": SIGMA * np.nan}, "is not finite"),
    "not symmetric": ({"mu": MU, "sigma": np.triu(np.ones((16, 16)))}, "sigma is not a covariance: not symmetric"),
    "indefinite": (
        {"mu": MU, "sigma": SIGMA - 0.2 * np.ones((16, 16))},
        "eigenvalues from -2.2 to 1, none may be below 0",
    ),
    "empty": ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, "belong together"),
    "features that are NaN": (KEPT | {"features": FEATURES * np.nan}, "features must be finite"),
    "features of integers": (KEPT | {"features": FEATURES.astype(int)}, "features must be finite floats"),
    "labels below 0": (KEPT | {"labels": np.full(20, -7)}, "labels must be integers of at least 0"),
    "labels with fractions": (KEPT | {"labels": np.full(20, 0.5)}, "labels must be integers"),
    "a negative count": ({"mu": MU, "sigma": SIGMA, "num_images": np.array(-3)}, "num_images is -3"),
    "a count below the rank": ({"mu": MU, "sigma": SIGMA, "num_images": np.array(16)}, "of rank 16 needs 17 images"),
    "a count above all images": (
        {"mu": MU, "sigma": SIGMA, "num_images": np.array(10**15)},
        "num_images is 1000000000000000",
    ),
    "counts": ({"mu": MU, "sigma": SIGMA, "num_images": np.array([20, 20])}, "num_images is"),
    "a count of other features": (
        KEPT | {"num_images": np.array(21)},
        "num_images is 21, and there are features of 20",
    ),
    "half spatial": ({"mu": MU, "sigma": SIGMA, "mu_s": MU}, "and no sigma_s"),
    "pickled": ({"mu": MU, "sigma": np.array({"sigma": SIGMA})}, "pickled objects, which are not loaded"),
    "features of another width": ({"mu": MU, "sigma": SIGMA, "features": np.ones((5, 9))}, r"\(5, 9\).*of width 16"),
    "damaged provenance": (
        {"mu": MU, "sigma": SIGMA, "provenance": np.array("{")},
        "provenance cannot be read",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_statistics_that_are_none(tmp_path, wrong):
    arrays, message = WRONG[wrong]
    np.savez(tmp_path / "statistics.npz", **arrays)
    with pytest.raises(ConfigurationError, match=message):
        ReferenceStatistics.read(tmp_path / "statistics.npz")


def test_files_without_statistics(tmp_path):
    for name, message in (
        ("edm2.pkl", "there is no file"),
        ("fidelity.pt", "A .pt is not loaded"),
        ("none.npz", "there is no file"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            ReferenceStatistics.read(tmp_path / name)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        ReferenceStatistics.read(tmp_path / "torn.npz")
    source = write(tmp_path, "npz", *pictures(5))
    assert not ReferenceStatistics.holds(source)
    assert ReferenceStatistics.holds(adm_batch(tmp_path / "adm.npz", *pictures(5)))
    assert ReferenceStatistics.open(source).measured(Projection()).num_images == 5  # images are summed up


# What does not fit


class Wider(Projection):
    width = 17


class OtherResize(Projection):
    def provenance(self):
        return super().provenance() | {"resize": {"size": 299, "how": "bilinear", "library": "PIL 11.0.0"}}


class NewerLibrary(Projection):
    def provenance(self):
        return super().provenance() | {"library": "torch 99.0.0", "weights": "moved.pth"}


def test_statistics_that_do_not_fit_the_features(tmp_path):
    pixels, labels = pictures(40)
    made = ReferenceStatistics.open(ImageSet(write(tmp_path, "npz", pixels, labels))).measured(Projection())
    made.save(tmp_path / "statistics.npz")
    found = ReferenceStatistics.read(tmp_path / "statistics.npz")
    found.check(NewerLibrary())
    for extractor, message in (
        (Wider(), "statistics.npz has statistics of 16 features, random projection gives 17: take the extractor"),
        (
            Projection(seed=1),
            r"of other features than random projection:\n  weights_sha256: \w+ in the reference, \w+ now",
        ),
        (
            OtherResize(),
            r"resize.how: none in the reference, bilinear now\n.*\n  resize.size: None in the reference, 299 now",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            found.check(extractor)
        with pytest.raises(ConfigurationError, match=message):
            ReferenceStatistics.open(tmp_path / "statistics.npz").measured(extractor)


@pytest.mark.parametrize("kind", ["of ours", "of ADM", "images"])
def test_a_reference_of_another_size(in_root, tmp_path, capsys, kind):
    pixels, labels = pictures(40)
    samples = write(tmp_path / "samples", "npz", *pictures(40, size=16))
    reference = write(tmp_path, "npz", pixels, labels)
    if kind == "of ours":
        made = ReferenceStatistics.open(ImageSet(reference)).measured(Projection())
        made.save(reference := tmp_path / "statistics.npz")
    elif kind == "of ADM":
        reference = adm_batch(tmp_path / "adm.npz", pixels, labels)
    words = [str(samples), "--reference", str(reference), "--features", PROJECTION, "--metrics=fid"]
    message = refused(capsys, "evaluate", *words, "--output", tmp_path / "found")
    assert f"16×16 RGB, the reference {reference} 8×8 RGB" in message
    main(["evaluate", *words, "--output", str(tmp_path / "found"), "--size=8"])
    assert json.loads((tmp_path / "found/metrics.json").read_text())["fd"] > 0


def test_too_few_images_and_features_that_are_none(tmp_path):
    with pytest.raises(ConfigurationError, match="statistics need two images or more, there are 1"):
        ReferenceStatistics.open(ImageSet(write(tmp_path / "one", "npz", *pictures(1)))).measured(Projection())
    broken = Projection()
    broken.weight.data[0, 0] = torch.nan
    images = ImageSet(write(tmp_path / "two", "npz", *pictures(9)))
    with pytest.raises(ConfigurationError, match="random projection: features are not finite"):
        ReferenceStatistics.open(images).measured(broken, batch_size=4)


# The command


@pytest.fixture
def eval_classifier(tmp_path):
    config = yaml.safe_load((ROOT / "lightning_configs/predict/digits.yaml").read_text())
    (quality,) = (c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("SampleQuality"))
    path = tmp_path / "eval_classifier.yaml"
    path.write_text(yaml.safe_dump(quality["init_args"]["features"]["init_args"]["classifier"]))
    return path


def test_the_command_makes_a_reference_of_the_digits(in_root, tmp_path, eval_classifier, capsys):
    images, labels = digits("heldout")
    pixels = to_uint8(images).numpy().transpose(0, 2, 3, 1)
    folder = tmp_path / "digits"
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(folder / str(label) / f"{number:04d}.png")
    (folder / "3" / "broken.png").write_bytes(b"no image")
    output = tmp_path / "made" / "digits.npz"
    main(
        [
            "reference",
            str(folder),
            "--output",
            str(output),
            "--features",
            f"classifier:{eval_classifier}",
            "--keep-features",
        ]
    )
    printed = capsys.readouterr().out
    found = ReferenceStatistics.read(output)
    assert found.num_images == len(found.features) == 500
    assert torch.bincount(found.labels).tolist() == [50] * 10
    expected = moments(found.features.numpy())
    close(found.mean, expected[0])
    close(found.covariance, expected[1])
    for words in (
        f"wrote {output}",
        f"sha256 {found.provenance['sha256']}",
        f"500 images of {folder} (image folder); 8×8 gray",
        f"sha256 {found.provenance['images']['sha256']}",
        "1 skipped: 3/broken.png (not an image)",
        "mu, sigma of 48 features; the features of 500 images (with labels)",
        f"weights {found.provenance['features']['weights_sha256']}",
        "500 samples: biased upwards",
    ):
        assert words in printed, words
    before = output.read_bytes()
    message = refused(capsys, "reference", folder, "--output", output, "--features", f"classifier:{eval_classifier}")
    assert f"{output} exists already: remove it, or name another --output" in message
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["digits.npz"]


def test_nothing_is_left_behind(in_root, tmp_path, capsys):
    source = write(tmp_path, "image folder", [*pictures(5)[0], *pictures(1, size=16)[0]], np.zeros(6, int))
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "statistics.npz"
    assert "several sizes" in refused(capsys, "reference", source, "--output", output, "--features", PROJECTION)
    assert "written as .npz" in refused(
        capsys, "reference", source, "--output", tmp_path / "out/x.npy", "--features", PROJECTION
    )
    assert "invalid device" in refused(
        capsys, "reference", source, "--output", output, "--features", PROJECTION, "--device", "abacus"
    )
    assert "--features" in refused(capsys, "reference", source, "--output", output, "--features", "nothing", "--size=8")
    message = refused(capsys, "reference", source, "--output", output, "--features", PROJECTION, "--batch-size=0")
    assert "--batch-size: must be an integer of at least 1, got '0'" in message
    (tmp_path / "file").touch()
    words = ["--size=8", "--features", PROJECTION]
    assert "Not a directory" in refused(capsys, "reference", source, "--output", tmp_path / "file/x.npz", *words)
    assert list((tmp_path / "out").iterdir()) == []
    main(["reference", str(source), "--output", str(output), *words])
    assert "halved (box)" in capsys.readouterr().out


def test_one_and_two_processes_make_the_same(tmp_path):
    """One image cannot be read; three processes have two batches; and one process that ends early ends the others."""
    pixels, labels = pictures(50)
    pixels = [*pixels[:20], png(pixels[20])[:50], *pixels[21:]]
    few = pictures(5)
    mixed = [*pictures(5)[0], *pictures(1, size=16)[0], *pictures(6)[0]]  # the second of two processes meets it
    sources = {
        "many": write(tmp_path / "many", "parquet", pixels, labels),
        "few": write(tmp_path / "few", "npz", *few),
        "mixed": write(tmp_path / "mixed", "parquet", mixed, np.zeros(12, int)),
    }
    options = ["--features", PROJECTION, "--keep-features", "--batch-size=4", "--max-corrupt=0.05", "--device=cpu"]
    commands = [
        [ranks, ["reference", str(sources[name]), "--output", str(tmp_path / f"{name}{ranks}.npz"), *options]]
        for name, ranks in (("many", 1), ("many", 2), ("few", 1), ("few", 3), ("mixed", 2))
    ]
    done = [processes.run(*command, ranks=ranks) for ranks, command in commands]
    assert [each.statuses for each in done] == [[0], [0, 0], [0], [0, 0, 0], [1, 2]], done
    assert "process 0 cannot reach the others: one of them has ended" in done[-1].output
    assert not (tmp_path / "mixed2.npz").exists()
    for one, several, count in (("many1", "many2", 49), ("few1", "few3", 5)):
        one, several = (ReferenceStatistics.read(tmp_path / f"{name}.npz") for name in (one, several))
        assert one.num_images == several.num_images == count
        assert torch.equal(one.features, several.features)
        assert torch.equal(one.labels, several.labels)
        for name in ("mean", "covariance", "spatial_mean", "spatial_covariance"):
            close(getattr(several, name), getattr(one, name))
        for key in ("images", "features"):
            assert one.provenance[key] == several.provenance[key]
    assert one.provenance["images"]["sha256"] is not None
    assert "2 processes on cpu" in done[1].output
    many = ReferenceStatistics.read(tmp_path / "many2.npz").provenance["images"]
    assert (many["num_images"], many["num_skipped"]) == (50, 1)
    assert many["skipped"][0].startswith("split 'train', row 20 (")


def test_an_environment_of_no_launcher(in_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = write(tmp_path, "npz", *pictures(5))
    message = refused(capsys, "reference", source, "--output", tmp_path / "x.npz", "--features", PROJECTION)
    assert "WORLD_SIZE is 2, and LOCAL_RANK, LOCAL_WORLD_SIZE" in message
    assert "torchrun" in message


# EDM2's pickles


def edm2_pickle(path, protocol, **changes):
    """As its calculate_metrics.py writes it: statistics by metric, of two extractors."""
    rows = np.random.default_rng(0).normal(size=(60, 5)), np.random.default_rng(1).normal(size=(60, 3))
    moments = [{"mu": each.mean(0), "sigma": np.cov(each, rowvar=False)} for each in rows]
    content = {"num_images": 60, "fid": moments[0], "fd_dinov2": moments[1]} | changes
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return moments


class OfKind(Projection):
    def __init__(self, kind, width):
        super().__init__()
        self.kind, self.width = kind, width


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_edm2_statistics_are_those_of_the_extractor(tmp_path, protocol):
    moments = edm2_pickle(tmp_path / "img512.pkl", protocol)
    statistics = ReferenceStatistics.open(tmp_path / "img512.pkl")
    for kind, width, expected in (("dinov2", 3, moments[1]), ("inception", 5, moments[0])):
        statistics.check(OfKind(kind, width))
        np.testing.assert_array_equal(statistics.mean, expected["mu"])
        np.testing.assert_allclose(statistics.covariance, expected["sigma"], rtol=1e-15)
    assert statistics.num_images == 60
    assert statistics.provenance["format"] == "EDM2's statistics of dinov2 and inception features"
    with pytest.raises(ConfigurationError, match="has statistics of 5 features"):
        statistics.check(OfKind("", 4))


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": Harm()}, "it asks for posix.mkdir, which no statistics need"),
        ({"fid": 3}, "fid of it is a int where mu and sigma belong"),
        ({"fid": {"mu": np.zeros(2)}}, "it has one of mu and sigma, and no sigma"),
        ({"fid": {"mu": np.array([None]), "sigma": np.eye(1)}}, "has the type O"),
    ],
)
def test_a_pickle_that_is_something_else_is_refused_and_runs_nothing(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    edm2_pickle(tmp_path / "img.pkl", 4, **changes)
    with pytest.raises(ConfigurationError, match=message):
        ReferenceStatistics.read(tmp_path / "img.pkl")
    assert not (tmp_path / "harm").exists()
