"""Gradients that serve for several steps, and classifiers at a lower resolution."""

import pytest
import torch
from torch import nn

from calib_guidance.callbacks import GradientNorm, TrajectoryCalibration
from calib_guidance.classifiers import Classifier, GaussianMixtureClassifier, OffTheShelfClassifier
from calib_guidance.denoisers import Combination, GaussianMixture
from calib_guidance.diffusion import SampleStreams
from calib_guidance.guidance import (
    ClassifierGuidance,
    ClassifierResolution,
    GradientReuse,
    GuidanceSchedule,
    SwitchedGuidance,
    fit_gain,
)
from calib_guidance.networks import SmallResNet
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, FlowODE, FlowSDE, Heun, UniPC
from calib_guidance.scores import TemperedLogProb, Tilted

MIXTURE = GaussianMixture([[0.7, 0.0], [-0.5, 0.4], [0.0, -0.8]], [0.04, 0.09, 0.02])
Y = torch.arange(3)
# Of the joint energy alone, τ2 = 0, the gradient is the row of a linear classifier.
ENERGY = TemperedLogProb(tau2=0.0)


class Linear(Classifier):
    """Logits a(t)·W·x; counts its calls."""

    def __init__(self, weight, strength=lambda t: torch.ones_like(t, dtype=torch.float32)):
        super().__init__()
        self.num_classes, self.weight, self.strength, self.calls = len(weight), nn.Parameter(weight), strength, []

    def forward(self, x, t=None):
        self.calls.append(int(t[0]))
        return self.strength(t)[:, None] * (x.flatten(1) @ self.weight.T)


def linear(**options):
    return Linear(torch.tensor([[0.3, 0.1], [-0.2, 0.4], [0.1, -0.5]]), **options)


def run(guidance, sampler=None, rows=Y, denoiser=MIXTURE):
    """Samples and the records of their trajectory."""
    records, noise = [], SampleStreams([0] * len(rows), rows.tolist(), denoiser.image_shape)
    return (sampler or DDIM(12))(denoiser, noise, rows % 3, guidance, [records.append]), records


SAMPLERS = {
    "ddpm": (DDPM(12), {"schedule": GuidanceSchedule(0.3)}),
    "ddim": (DDIM(12, eta=0.5), {}),
    "ddim, ddpm_equivalent": (DDIM(12, guidance_scaling="ddpm_equivalent", data_std=1.0), {}),
    "recurrence": (DDIM(12, recurrence=2), {}),
    "dpm_solver": (DPMSolver(12, sde=True), {}),
    "unipc": (UniPC(12), {}),
    "heun": (Heun(8, sigma_max=10), {}),
    "algorithm 2": (
        Heun(8, sigma_max=10, s_churn=2.0),
        {"apply_to": "sample", "classifier_input": "x_t_normalized", "schedule": GuidanceSchedule(0.3)},
    ),
    "flow_ode": (FlowODE(12), {}),
    "flow_sde": (FlowSDE(12), {}),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_of_a_constant_gradient_every_k_gives_the_same_samples(name):
    """As strong as k guided steps: each step scales the gradient with its own variance. Bit for bit."""
    sampler, options = SAMPLERS[name]
    expected, plain = run(ClassifierGuidance(linear(), ENERGY, 2.0, **options), sampler)
    assert (expected - run(None, sampler)[0]).abs().min() > 1e-3
    for reuse in (GradientReuse(), GradientReuse(3), GradientReuse(50), GradientReuse(2, 0.9, 5)):
        classifier = linear()
        found, records = run(ClassifierGuidance(classifier, ENERGY, 2.0, reuse=reuse, **options), sampler)
        assert torch.equal(found, expected)
        taken = [r.i for r in records if r.guided.aux.logits is not None]
        steps = list(dict.fromkeys(r.i for r in records))
        assert list(dict.fromkeys(taken)) == steps[:: reuse.every]
        assert len(classifier.calls) * reuse.every >= len(plain)


def test_residuals_scale_a_reused_gradient_too():
    labeled = GaussianMixture(MIXTURE.means.tolist(), [0.04, 0.09, 0.02], class_conditional=True)
    free, options = Combination(labeled), {"apply_to": "cfg_residual", "schedule": GuidanceSchedule(0.3)}
    expected = run(ClassifierGuidance(linear(), ENERGY, 0.5, **options), denoiser=free)[0]
    found = run(ClassifierGuidance(linear(), ENERGY, 0.5, reuse=GradientReuse(4), **options), denoiser=free)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, run(None, denoiser=free)[0])


@pytest.mark.parametrize("options", [{}, {"classifier_input": "x_t"}, {"backprop_through_denoiser": True}])
def test_between_two_gradients_the_first_is_applied(options):
    """Of a Gaussian mixture: what each step applies is the gradient at the x_t of the last step that took one."""
    classifier = GaussianMixtureClassifier(MIXTURE, noise_aware=options.get("classifier_input") == "x_t")
    guidance = ClassifierGuidance(classifier, scale=3.0, reuse=GradientReuse(4), **options)
    taken, sampler = None, DDPM(12, clip_denoised=False)
    for count, record in enumerate(run(guidance, sampler)[1]):
        if count % 4 == 0:
            taken = ClassifierGuidance(classifier, **options)(MIXTURE, record.x_t, int(record.t), Y).aux.gradient
            torch.testing.assert_close(record.guided.aux.gradient, taken)
        else:
            assert record.guided.aux.logits is None
        torch.testing.assert_close(record.guided.score, 3 * taken)


def test_reuse_is_nearer_to_full_guidance_than_no_guidance_in_between():
    """Of a Gaussian mixture under its own classifier: at the true score, 40 steps."""
    wide = GaussianMixture([[1.0], [-1.0]], [0.3, 0.3])
    classifier, rows = GaussianMixtureClassifier(wide, noise_aware=True), torch.arange(60)

    def sampled(**options):
        guidance = ClassifierGuidance(classifier, scale=2.0, classifier_input="x_t", **options)
        noise = SampleStreams([0] * 60, rows.tolist(), wide.image_shape)
        return DDIM("ddim40")(wide, noise, rows % 2, guidance)

    def distance(**options):
        return (sampled(**options) - full).square().mean()

    full = sampled()
    assert distance(reuse=GradientReuse(4)) < 0.3 * distance(schedule=GuidanceSchedule(every=4))
    assert 0 < distance(reuse=GradientReuse(2)) < distance(reuse=GradientReuse(4))


def test_an_interval_and_a_switch_begin_with_a_gradient_of_their_own():
    early, late = linear(), linear()
    schedule = GuidanceSchedule(interval=[100, 800])
    parts = [ClassifierGuidance(c, ENERGY, schedule=schedule, reuse=GradientReuse(3)) for c in (early, late)]
    guidance = SwitchedGuidance(*parts, switch_at=400)
    run(guidance, DDIM(20))
    levels = DDIM(20).levels(MIXTURE)
    guided = [round(t) for t in levels.times[::-1] if 100 <= t <= 800]
    assert early.calls == [t for t in guided if t > 400][::3]
    assert late.calls == [t for t in guided if t <= 400][::3]
    plan = guidance.plan(levels)
    assert [round(t) for t in levels.times[plan.runs][::-1]] == early.calls + late.calls


def strength(t):
    """Gradients that fall and rise again."""
    return 0.05 + (t.float() / 1000 - 0.45).abs() ** 2


def skipping(norms, fraction, every, skip):
    """Steps at which one sample's gradient is taken: the rule, number by number."""
    taken, due, seen = [], 0, []
    for step, norm in enumerate(norms):
        if step >= due:
            taken.append(step)
            seen.append(norm)
            due = step + (skip if norm < fraction * sum(seen) / len(seen) else every)
    return taken


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_each_sample_skips_by_its_own_norms(every, count):
    # Class 1 is as strong everywhere, so its samples never skip.
    def by_class(x, t):
        a = strength(t)[:, None] * (x.flatten(1) @ torch.tensor([[0.3, 0.1], [0.0, 0.0], [0.1, -0.5]]).T)
        return torch.cat([a[:, :1], x.flatten(1)[:, :1], a[:, 2:]], dim=1)

    classifier = linear()
    classifier.forward = lambda x, t: (classifier.calls.append(int(t[0])), by_class(x, t))[1]
    reuse, sampler = GradientReuse(every, skip_below=0.6, skip_every=5), DDIM(30)
    _, records = run(ClassifierGuidance(classifier, ENERGY, 2.0, reuse=reuse), sampler, torch.arange(count))
    norms = strength(torch.tensor([r.t for r in records])).tolist()
    weak, strong = skipping(norms, 0.6, every, 5), list(range(0, 30, every))
    assert len(weak) < len(strong)
    expected = [strong if n % 3 == 1 else weak for n in range(count)]
    batch = sorted(set().union(*expected))
    assert [step for step, r in enumerate(records) if r.guided.aux.logits is not None] == batch
    assert classifier.calls == [records[step].t for step in batch]
    for n, steps in enumerate(expected):
        assert [step for step in batch if records[step].guided.aux.fresh[n]] == steps
        for step, record in enumerate(records):
            last = max(s for s in steps if s <= step)
            row = torch.tensor([[0.3, 0.1], [1.0, 0.0], [0.1, -0.5]])[n % 3]
            applied = 2 * row * (1 if n % 3 == 1 else norms[last])
            shift = record.guided.aux.gradient if last == step else None
            if shift is not None:
                torch.testing.assert_close(2 * shift[n].flatten(), applied)


def test_a_sample_does_not_depend_on_its_batch():
    classifier = GaussianMixtureClassifier(MIXTURE)
    for reuse in (GradientReuse(3), GradientReuse(1, 0.7, 6), GradientReuse(2, 0.5, 4)):
        guidance = ClassifierGuidance(classifier, scale=4.0, reuse=reuse)
        together, records = run(guidance, DDPM(30), torch.arange(16))
        for rows in (torch.tensor([5]), torch.tensor([2, 9, 12])):
            alone, own = run(guidance, DDPM(30), rows)
            torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=1e-4)
            for mine, shared in zip(own, records, strict=True):
                fresh = [r.guided.aux.fresh for r in (mine, shared)]
                if reuse.skip_below is not None:  # where none of a batch is due
                    fresh = [
                        torch.zeros(n).bool() if f is None else f for f, n in zip(fresh, (len(rows), 16), strict=True)
                    ]
                    assert torch.equal(fresh[0], fresh[1][rows])


def test_groups_are_taken_together():
    guidance = ClassifierGuidance(
        linear(strength=strength), Tilted(-0.2, 2), 2.0, reuse=GradientReuse(1, skip_below=0.8, skip_every=4)
    )
    for record in run(guidance, DDIM(20), torch.arange(6))[1]:
        if (fresh := record.guided.aux.fresh) is not None:
            assert torch.equal(fresh[::2], fresh[1::2])


def test_what_is_measured_is_what_was_taken():
    """Of one sample alone, or beside others that take more gradients."""
    guidance = ClassifierGuidance(GaussianMixtureClassifier(MIXTURE), scale=4.0, reuse=GradientReuse(1, 0.7, 6))
    sums = []
    for rows in (torch.tensor([5]), torch.arange(16)):
        norm, calibration = GradientNorm(), TrajectoryCalibration()
        norm.metric, calibration.metric = norm.build(30)["steps"], calibration.build(30)["steps"]
        for record in run(guidance, DDPM(30), rows)[1]:
            for callback in (norm, calibration):
                if (terms := callback.terms(record)) is not None:
                    callback.add(record.i, [term[rows == 5] for term in terms])
        sums.append((norm.metric.sums, calibration.metric.sums))
    for alone, beside in zip(*sums, strict=True):
        torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-4)
    assert 0 < sums[0][0][:, 0].sum() < 30


class TestResolution:
    # A classifier of 8×8 that sees the means of blocks alone, and the same one of 4×4.
    small = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    blocks = small.view(3, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1) / 4

    def gradient(self, classifier, resolution=None, score=None):
        denoiser = OnImages()
        guidance = ClassifierGuidance(classifier, score, resolution=resolution)
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return guidance(denoiser, x, 500, Y).aux

    def test_coarse_content_moves_the_score_as_at_full_size(self):
        full = self.gradient(Linear(self.blocks))
        reduced = self.gradient(Linear(self.small), ClassifierResolution(4))
        torch.testing.assert_close(reduced.logits, full.logits)
        torch.testing.assert_close(reduced.gradient, full.gradient)
        doubled = self.gradient(Linear(self.small), ClassifierResolution(4, gain=2.0))
        torch.testing.assert_close(doubled.gradient, 2 * full.gradient)

    @pytest.mark.parametrize("side", [3, 5, 7])
    def test_sides_that_do_not_divide(self, side):
        """Brightness is kept, and brightening the image by 1 everywhere moves the score by as much as on the small image."""
        resize, weight = ClassifierResolution(side), torch.randn(3, side * side)
        torch.testing.assert_close(resize(torch.full((1, 1, 8, 8), 0.3)), torch.full((1, 1, side, side), 0.3))
        found = self.gradient(Linear(weight), resize, ENERGY).gradient.sum((1, 2, 3))
        torch.testing.assert_close(found, weight.sum(1), atol=1e-5, rtol=1e-4)

    def test_smaller_images_stay(self):
        x = torch.randn(2, 3, 8, 8)
        assert ClassifierResolution(8)(x) is x
        assert ClassifierResolution(2)(torch.randn(1, 3, 8, 4)).shape[2:] == (2, 1)

    def test_the_gain_is_that_of_the_best_fit(self):
        images, rest = torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        y = torch.arange(5) % 3

        blocks, small = self.blocks, self.small

        class BySize(Classifier):
            num_classes = 3

            def forward(self, x, t=None):
                if x.shape[-1] == 8:
                    return x.flatten(1) @ blocks.T + (x * fine).flatten(1).sum(1, keepdim=True)
                return x.flatten(1) @ small.T / 2.5

        fine = rest[:1] - ClassifierResolution(4)(rest[:1]).repeat_interleave(2, 2).repeat_interleave(2, 3)
        gain, cosine = fit_gain(BySize().freeze(), ENERGY, images, y, 4)
        assert gain == pytest.approx(2.5)  # what no coarse image shows has no part in it
        coarse = blocks[y].square().sum()
        assert cosine == pytest.approx(float((coarse / (coarse + 5 * fine.square().sum())).sqrt()))

    def test_only_the_classifier_is_resized(self):
        network = SmallResNet(3, 1, (8, 8), 1)
        aux = self.gradient(OffTheShelfClassifier(network, 3), ClassifierResolution(4))
        assert aux.gradient.shape == (3, 1, 8, 8)
        blocks = aux.gradient.unfold(2, 2, 2).unfold(3, 2, 2)
        torch.testing.assert_close(blocks, blocks[..., :1, :1].expand_as(blocks))

    def test_noisy_images_are_refused(self):
        with pytest.raises(ValueError, match="resolution needs classifier_input: x0, got x_t"):
            ClassifierGuidance(linear(), classifier_input="x_t", resolution=ClassifierResolution(4))


class OnImages(GaussianMixture):
    """One Gaussian of 8×8 pixels."""

    def __init__(self):
        super().__init__(torch.zeros(1, 64).tolist(), [1.0])
        self.num_classes, self.image_shape = None, (1, 8, 8)

    def prepare(self, levels, y):
        predict = super().prepare(levels, None)
        return lambda x, i: predict(x.flatten(1)[..., None, None], i)._replace(x0=x * levels.alphas_cumprod[i] ** 0.5)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GradientReuse(0), "every must be at least 1, got 0"),
        (lambda: GradientReuse(1, 1.0), "skip_below must be above 0 and below 1, or null for no skipping, got 1.0"),
        (lambda: GradientReuse(4, 0.5), r"skip_every must exceed every \(4\), got 4"),
        (lambda: ClassifierResolution(0), "side must be at least 1"),
        (lambda: ClassifierResolution(4, 0.0), "gain must be above 0"),
    ],
)
def test_wrong_options_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
