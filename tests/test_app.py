"""The app: what it samples, and its page in a browser."""

import shlex

import numpy as np
import pytest
import torch

from calib_guidance import classifiers, denoisers, guidance, networks, samplers, scores
from calib_guidance.app.session import Settings, _SecondHalf, open_session
from calib_guidance.backend.images import to_uint8
from calib_guidance.cli import main
from calib_guidance.cli.lightning import run_lightning
from calib_guidance.cli.parsed import ParsedCLI
from calib_guidance.diffusion import SampleStreams
from calib_guidance.errors import ConfigurationError
from tests.browser import Browser, find_browser
from tests.runs import refused


@pytest.fixture(scope="module")
def session():
    return open_session(["--config", "digits"])


@pytest.fixture
def settings(session):
    """Few steps of three digits, so that no row of a batch is another's."""
    return session.settings._replace(steps=6, seed=3, classes=(7, 2, 5))


def sampled(sampler, denoiser, guide, settings, observers=()):
    count = len(settings.classes)
    noise = SampleStreams([settings.seed] * count, range(count), denoiser.image_shape)
    return sampler(denoiser, noise, torch.tensor(settings.classes), guide, observers)


def classifier(beta):
    weights = "checkpoints/digits/classifier.safetensors"
    return classifiers.OffTheShelfClassifier(networks.SmallResNet(), 10, weights, softplus_beta=beta)


def assert_same(images, expected):
    """Equal but for the rounding of batches of another size."""
    assert np.abs(images.astype(int) - to_uint8(expected).numpy()).max() <= 1


def test_the_page_starts_with_the_configuration(session):
    assert session.settings == Settings("js", 1.0, 0.8, 3.0, "dpm_solver_sde", 25, 0, tuple(range(10)))
    assert session.command(session.settings) == "calib-guidance predict --config digits"


@pytest.mark.parametrize("beta", [3.0, 8.0, None])
def test_both_sides_are_what_the_samplers_make_of_the_same_noise(session, settings, beta, in_root):
    settings = settings._replace(sampler="dpm_solver_sde", score="fkl", tau2=0.5, scale=2.0, softplus_beta=beta)
    found = session.compare(settings)
    score = scores.DivergenceRegularized("fkl", 0.1, 0.9, 1.0, 0.5)
    guide = guidance.ClassifierGuidance(classifier(beta), score, scale=2.0)
    sampler = samplers.DPMSolver(6, sde=True, guidance_scaling="ddpm_equivalent", data_std=0.5)
    records = []
    assert_same(found.unguided.images, sampled(sampler, session.denoiser, None, settings))
    assert_same(found.guided.images, sampled(sampler, session.denoiser, guide, settings, [records.append]))
    assert found.nfe == 6
    assert found.t.tolist() == [record.t for record in records]
    for k, record in enumerate(records):
        aux = record.guided.aux
        np.testing.assert_allclose(
            found.guided.gradient_norm[k], aux.gradient.double().flatten(1).norm(dim=1), rtol=2e-3
        )
        p = aux.logits.double().softmax(1)[range(3), settings.classes]
        np.testing.assert_allclose(found.guided.confidence[k], p, atol=2e-3)
    # Before guidance has moved one side away from the other.
    np.testing.assert_allclose(found.guided.confidence[0], found.unguided.confidence[0], atol=1e-5)
    assert np.abs(found.guided.confidence[-1] - found.unguided.confidence[-1]).max() > 0.5


@pytest.mark.parametrize(
    "changed",
    [
        {"score": "tilted", "scale": 3.0, "tau2": 0.6, "seed": 5, "softplus_beta": None},
        {"score": "entropy", "sampler": "flow_ode", "softplus_beta": 5.0},
        {"steps": 4, "sampler": "unipc"},
    ],
)
def test_the_command_samples_the_guided_side(session, changed, in_root):
    settings = session.settings._replace(steps=5, classes=(0, 1, 2, 3))._replace(**changed)
    found = session.compare(settings)
    _, command, *argv = shlex.split(found.command)
    cli = run_lightning([command, *argv], ParsedCLI)
    model = cli.build("model", cli.options.model)
    seed = cli.options.data.init_args.seed
    assert seed == settings.seed
    assert_same(found.guided.images, sampled(model.sampler, model.denoiser, model.guidance, settings))


def test_without_scale_both_sides_are_the_same_and_the_classifier_still_looks(session, settings):
    found = session.compare(settings._replace(scale=0.0))
    assert (found.guided.images == found.unguided.images).all()
    assert (found.unguided.gradient_norm > 0).all()
    assert (found.unguided.confidence > 0).all()


def test_a_shift_of_the_prediction_stays_on_the_guided_side():
    parts = {"means": [[-2.0], [2.0]], "covariances": [0.1, 0.1]}
    model = denoisers.GaussianMixture(**parts, class_conditional=True)
    combined = denoisers.Combination(model)
    of_noise = classifiers.GaussianMixtureClassifier(denoisers.GaussianMixture(**parts), noise_aware=True)
    guide = guidance.ClassifierGuidance(of_noise, scale=0.5, classifier_input="x_t", apply_to="cfg_residual")
    y, sampler = torch.tensor([0, 1, 0, 1]), samplers.DDIM(steps=4)

    def run(guide, rows):
        noise = SampleStreams([0] * len(rows), rows, model.image_shape)
        return sampler(combined, noise, y[: len(rows)], guide)

    both = run(_SecondHalf(guide, guides=True), [0, 1, 0, 1])
    torch.testing.assert_close(both[:2], run(None, [0, 1]))
    torch.testing.assert_close(both[2:], run(guide, [0, 1]))
    assert (both[:2] - both[2:]).abs().min() > 1e-3


def test_what_cannot_be_shown_is_refused(session, settings, capsys, monkeypatch):
    with pytest.raises(ConfigurationError, match="configuration's guidance is none"):
        open_session(["--config", "digits", "--config", "guidance/unguided"])
    with pytest.raises(ValueError, match="no class is chosen"):
        session.compare(settings._replace(classes=()))
    monkeypatch.setattr("calib_guidance.app.find_spec", lambda name: None)
    assert "pip install 'calib-guidance[app]'" in refused(capsys, "app", "--config", "digits")
    with pytest.raises(SystemExit) as stop:
        main(["app", "--help"])
    assert stop.value.code == 0
    assert "--port" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of pandas' options
@pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome")
def test_the_page_in_a_browser(session, settings, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason='needs gradio: pip install "calib-guidance[app]"')
    from calib_guidance.app import page

    monkeypatch.setattr(session, "settings", settings)
    built = page.build(session)
    _, address, _ = page.launch(built, "127.0.0.1", None, prevent_thread_lock=True)
    browser = Browser(find_browser(), tmp_path)
    shown = "[...document.querySelectorAll('#comparison .cg-image')].filter(i => i.naturalWidth == 8).length"
    try:
        browser.open(address, 390)
        browser.wait_for(f"{shown} == 6")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate("[...document.querySelectorAll('#comparison h3')].map(h => h.textContent)") == [
            "Unguided",
            "Guided: Jensen–Shannon, scale 1",
            "Gradient norm",
            "Confidence",
        ]
        lines = "[...document.querySelectorAll('#comparison polyline')].map(p => p.points.numberOfItems)"
        assert browser.evaluate(lines) == [settings.steps] * 4
        expected = session.compare(settings._replace(scale=2.5))
        browser.evaluate(
            "{const n = document.querySelector('#scale input[type=number]'); n.value = '2.5';"
            "n.dispatchEvent(new Event('input', {bubbles: true})); n.dispatchEvent(new Event('change', {bubbles: true}));"
            "n.blur()}"
        )
        browser.evaluate("document.querySelector('#sample').click()")
        browser.wait_for("document.querySelector('#comparison').textContent.includes('scale 2.5')")
        captions = browser.evaluate(
            "[...document.querySelectorAll('#comparison .cg-images span')].map(s => s.textContent)"
        )
        assert captions == [f"{p:.0%}" for side in expected[:2] for p in side.confidence[-1]]
        assert not [request for request in browser.requests if not request.startswith(address.rstrip("/"))]
        assert not browser.messages
    finally:
        browser.close()
        built.close()
