"""Nothing inside the sampling loop makes the host wait for the device, or makes tensors at every step that could be kept.

On the meta device, which has shapes and no numbers, a second device is at hand everywhere: what crosses over to it is seen, and
what reads from it fails.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calib_guidance import denoisers, samplers
from calib_guidance.backend.counters import KnownShapes
from calib_guidance.callbacks import GradientNorm, SampleWriter, TrajectoryCalibration, TrajectoryStrips
from calib_guidance.classifiers import CLIPClassifier, Ensemble, NoiseAwareClassifier, OffTheShelfClassifier
from calib_guidance.denoisers import (
    APG,
    FDG,
    ADMDenoiser,
    Autoguidance,
    ClassifierFreeGuidance,
    Combination,
    DiTDenoiser,
    EDMDenoiser,
    FlowDenoiser,
    IndependentCondition,
    MiddleHead,
    Negative,
    PerturbedAttention,
    PerturbedTime,
    RemapClasses,
    Rule,
    SlidingWindows,
    SmoothedAttention,
    TwoNegatives,
    Unconditional,
    UnconditionalModel,
)
from calib_guidance.diffusion import Interval
from calib_guidance.guidance import (
    ClassifierGuidance,
    ClassifierResolution,
    GradientReuse,
    GradientStabilizer,
    GuidanceSchedule,
    SwitchedGuidance,
    TrainingFreeGuidance,
)
from calib_guidance.networks import DiT, EncoderUNet, LightningDiT, SmallResNet, UNet
from calib_guidance.runs.context import SamplingContext
from calib_guidance.samplers import DDIM, DDPM, DPMSolver, Heun, UniPC
from calib_guidance.scores import DivergenceRegularized, EntropyRegularized, Tilted
from calib_guidance.tasks.retry import FirstNonFinite

SIZE, STEPS = 4, 3
# What Python asks for by shape: the same at every step, and so to be made before the loop. (Zeros are of backward passes.)
MAKES = {"ones", "full", "arange", "linspace", "eye"}
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


KNOWN = KnownShapes()  # what all tests run is found out once


class NoWaiting(TorchDispatchMode):
    """While on, refuses what reads numbers on the host, what copies between devices, and uploads of Python's numbers."""

    def __init__(self, may_make):
        super().__init__()
        self.on, self.seen, self.may_make = False, 0, may_make

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.on:
            self.seen += 1
            assert name not in READS, f"{func} reads numbers on the host"
            if name in ("index", "index_put", "index_put_"):  # masks are counted on the host
                assert not any(i is not None and i.dtype == torch.bool for i in args[1]), f"{func} by a mask"
            assert name != "lift_fresh", "a tensor is made of Python's numbers"
            assert name not in MAKES or self.may_make, f"{func} makes at every step what could be kept"
        result = func(*args, **(kwargs or {}))
        if self.on and name in ("_to_copy", "copy_"):
            devices = {t.device.type for t in (*tree_leaves(args), *tree_leaves(result)) if isinstance(t, torch.Tensor)}
            assert len(devices) == 1, f"{func} copies between devices"
        return result


def loop(sampler, denoiser, guidance=None, device="meta", may_make=False):
    """The observer records of a run that was watched from the second step on, and how many operations were seen."""
    y = torch.arange(SIZE, device=device) % 3
    noise = torch.empty(SIZE, *denoiser.image_shape, device=device).zero_()
    context = SamplingContext()
    context.observe(SampleWriter().stop)
    context.indices = list(range(SIZE))
    run = SimpleNamespace(check=lambda: None, sampler=sampler, denoiser=denoiser, guidance=guidance, context=context)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), datamodule=None)
    for callback in (TrajectoryCalibration(), GradientNorm(), TrajectoryStrips(samples=(0, 2, 7))):
        callback.setup(trainer, run, "predict")
    steps = []
    with KNOWN, NoWaiting(may_make) as watch:

        def begin(record):
            steps.append(record.i)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            watch.on = device == "meta"

        try:
            # Last, so that what observers make at their first call is not of every step.
            sampler(denoiser, lambda: noise, y, guidance, [FirstNonFinite(), *context.observers, begin])
        finally:
            watch.on = False
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert watch.seen or device != "meta", "nothing was watched"
    return steps, watch.seen


def all_samplers():
    """Every sampler that there is, with few steps, but the one whose next step depends on the error of the last."""
    for name, kind in sorted(vars(samplers).items()):
        if name == "AdaptiveODE":
            continue
        if inspect.isclass(kind) and issubclass(kind, samplers.Sampler) and not inspect.isabstract(kind):
            options = inspect.signature(kind).parameters
            yield pytest.param(kind(**{next(o for o in ("steps", "num_steps") if o in options): STEPS}), id=name)


def options_of_the_loop():
    yield pytest.param(DDPM(STEPS, recurrence=2), id="recurrence")
    yield pytest.param(DDIM(STEPS, eta=1.0), id="eta")
    yield pytest.param(Heun(STEPS, s_churn=1.0, guide_correction=True), id="churn")
    yield pytest.param(DPMSolver(STEPS, sde=True), id="sde")
    yield pytest.param(DPMSolver(STEPS, guidance_scaling="ddpm_equivalent", data_std=1.0), id="ancestral ODE")
    yield pytest.param(UniPC(STEPS, guidance_scaling="ddpm_equivalent", data_std=1.0), id="ancestral UniPC")


class Decoder(torch.nn.Conv2d):
    """Latents of four channels to gray images."""

    def __init__(self):
        super().__init__(4, 1, 1)

    def forward(self, x0):
        return super().forward(x0.float()).to(x0.dtype)


def off_the_shelf(in_channels=1, **options):
    return OffTheShelfClassifier(SmallResNet(3, in_channels, (8, 8), 1), 3, softplus_beta=3.0, **options)


def parts(device):
    """Denoisers, and guidances for samplers that have no restrictions of their own."""
    with torch.device(device):
        adm = {"channel_mult": (1,), "num_res_blocks": 1, "use_scale_shift_norm": True, "attention_resolutions": (1,)}
        learned = ADMDenoiser(UNet(8, 1, 32, 2, num_classes=3, **adm))
        dit = DiTDenoiser(DiT(4, 2, 32, 1, 2, num_classes=3), vae=Decoder())
        denoisers = {
            "adm": learned,
            "edm": EDMDenoiser(UNet(8, 1, 32, 1, num_classes=3, **adm)),
            "dit": dit,
            "classifier_free": Combination(learned, ClassifierFreeGuidance(1.5), interval=Interval((100, 900))),
            "autoguidance": Combination(learned, ClassifierFreeGuidance(1.5), negative=UnconditionalModel(learned)),
            "three_channels": Combination(dit, ClassifierFreeGuidance(1.5), channels=3),
            "remapped": RemapClasses(learned, [2, 0, 1]),
        }
        two_heads = LightningDiT(4, 4, 3, 32, depth=2, num_heads=2, mid_depth=1)
        flow = FlowDenoiser(two_heads, path="linear", time_direction="data_to_noise", vae=Decoder())
        denoisers["middle_head"] = Combination(flow, negative=MiddleHead())
        encoder = EncoderUNet(8, 1, 32, 3, 1, channel_mult=(1,), num_head_channels=32, resblock_updown=False)
        noise_aware = ClassifierGuidance(NoiseAwareClassifier(encoder, temperature=[1.0, 2.0]), classifier_input="x_t")
        js = DivergenceRegularized("js", 0.1)
        guidances = {
            "unguided": None,
            "js": ClassifierGuidance(off_the_shelf(), js, schedule=GuidanceSchedule(every=2)),
            "through_denoiser": ClassifierGuidance(
                off_the_shelf(), EntropyRegularized(0.1, "confidence"), backprop_through_denoiser=True
            ),
            "noise_aware": noise_aware,
            "ensemble": ClassifierGuidance(Ensemble([off_the_shelf(), off_the_shelf()]), Tilted(-0.2, 2)),
            "switched": SwitchedGuidance(ClassifierGuidance(off_the_shelf()), noise_aware, 500),
            "half": ClassifierGuidance(off_the_shelf(dtype="float16")),
        }
        return {k: d.to(device) for k, d in denoisers.items()}, {k: g and g.to(device) for k, g in guidances.items()}


@pytest.fixture(scope="module")
def meta():
    return parts("meta")


@pytest.mark.parametrize("sampler", list(all_samplers()))
def test_no_sampler_waits(meta, sampler):
    for name in ("unguided", "js", "switched"):
        steps, seen = loop(sampler, meta[0]["adm"], meta[1][name])
        assert len(steps) >= STEPS, name
        assert seen > 50, name


@pytest.mark.parametrize("name", ["through_denoiser", "noise_aware", "ensemble", "half"])
def test_no_guidance_waits(meta, name):
    for sampler in (DDPM(STEPS), Heun(STEPS)):
        loop(sampler, meta[0]["adm"], meta[1][name])


@pytest.mark.parametrize("sampler", list(options_of_the_loop()))
def test_no_option_of_a_sampler_waits(meta, sampler):
    for name in ("unguided", "js", "noise_aware"):
        loop(sampler, meta[0]["adm"], meta[1][name])


@pytest.mark.parametrize(
    "name", ["edm", "dit", "classifier_free", "autoguidance", "middle_head", "three_channels", "remapped"]
)
def test_no_denoiser_waits(meta, name):
    denoiser, guidances = meta[0][name], meta[1]
    for sampler, kind in ((DDPM(STEPS), "js"), (Heun(STEPS), "through_denoiser"), (DPMSolver(STEPS), "unguided")):
        loop(sampler, denoiser, guidances[kind])
    if name == "classifier_free":
        loop(DDPM(STEPS), denoiser, ClassifierGuidance(off_the_shelf().to("meta"), apply_to="cfg_residual"))


@pytest.mark.parametrize(
    "rule", [kind for kind in vars(denoisers).values() if inspect.isclass(kind) and issubclass(kind, Rule)]
)
def test_no_rule_waits(meta, rule):
    if inspect.isabstract(rule):
        return
    for sampler in (DDIM(STEPS), Heun(STEPS)):
        if not rule.renoises_with_negative or sampler.renoises:
            loop(sampler, Combination(meta[0]["edm"], rule().to("meta")), meta[1]["js"])


def test_projections_of_bands_do_not_wait(meta):
    loop(DDIM(STEPS), Combination(meta[0]["edm"], FDG([3.0, 1.5], 0.5).to("meta")), meta[1]["js"])


NEGATIVES = [
    IndependentCondition(),
    PerturbedTime(),
    PerturbedAttention(["middle_block.1"]),
    SmoothedAttention(["middle_block.1"]),
    SmoothedAttention(["middle_block.1"], 0.5),
    SlidingWindows(4, 3),
    *(
        TwoNegatives(Unconditional(), second)
        for second in (IndependentCondition(), PerturbedAttention(["middle_block.1"]), SlidingWindows(4, 3))
    ),
]


def test_every_negative_is_watched():
    """The others are the default, and denoisers above: ``autoguidance`` and ``middle_head``."""
    kinds = {kind for kind in vars(denoisers).values() if inspect.isclass(kind) and issubclass(kind, Negative)}
    others = {Negative, Unconditional, UnconditionalModel, Autoguidance, MiddleHead}
    assert {type(negative) for negative in NEGATIVES} == kinds - others


@pytest.mark.parametrize("negative", NEGATIVES, ids=lambda negative: type(negative).__name__)
def test_no_negative_waits(meta, negative):
    # Sums of crops begin with zeros, and a doubled batch is made of two.
    for sampler in (DDPM(STEPS), Heun(STEPS)):
        loop(sampler, Combination(meta[0]["adm"], APG(), negative.to("meta")), meta[1]["js"])


def test_no_stabilizer_waits(meta):
    steady = GradientStabilizer(ema=0.9, max_norm=1.0, parallel=0.5)
    loop(DDIM(STEPS), meta[0]["adm"], ClassifierGuidance(off_the_shelf().to("meta"), stabilizer=steady))


def test_training_free_guidance_does_not_wait(meta):
    guidance = TrainingFreeGuidance(off_the_shelf().to("meta"), rho=1.0, mu=0.5, sigma=0.1, samples=2, iterations=2)
    loop(DDIM(STEPS, eta=1.0, recurrence=2), meta[0]["classifier_free"], guidance)


@pytest.mark.parametrize("reuse", [GradientReuse(2), GradientReuse(1, skip_below=0.5)], ids=["every", "skipping"])
def test_no_reuse_waits(meta, reuse):
    options = {"reuse": reuse, "resolution": ClassifierResolution(4)}
    for sampler in (DDPM(STEPS), Heun(STEPS)):
        loop(sampler, meta[0]["adm"], ClassifierGuidance(off_the_shelf().to("meta"), **options))


def test_neither_does_guidance_that_moves_the_sample(meta):
    for classifier in (off_the_shelf(), off_the_shelf(resize=12)):
        guidance = ClassifierGuidance(
            classifier.to("meta"), classifier_input="x_t_normalized", apply_to="sample", schedule=GuidanceSchedule(0.3)
        )
        loop(Heun(STEPS, guide_correction=True), meta[0]["edm"], guidance)


def test_neither_does_clip(meta):
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    clip = CLIPClassifier(["a", "b", "c"], {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, cutouts=2)
    with torch.device("meta"):
        denoiser = ADMDenoiser(UNet(8, 3, 32, 6, 1, channel_mult=(1,))).to("meta")
    # Where the cut-outs lie follows from t: they are made at every step.
    loop(DDPM(STEPS), denoiser, ClassifierGuidance(clip.to("meta")), may_make=True)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: bool(t.sum() > 0),
        lambda t: t.cpu(),
        lambda t: t[t > 0],
        lambda t: t * torch.tensor([2.0], device="meta"),
        lambda t: t * torch.full((1,), 2.0, device="meta"),
    ],
    ids=["scalar", "copy", "mask", "upload", "made at every step"],
)
def test_what_waits_is_noticed(meta, read):
    class Waits(Combination):
        def prepare(self, levels, y):
            predict = super().prepare(levels, y)
            return lambda x_t, i: (read(x_t), predict(x_t, i))[1]

    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        loop(DDPM(STEPS), Waits(meta[0]["adm"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_synchronizes():
    denoisers, guidances = parts("cuda")
    for sampler in (p.values[0] for p in (*all_samplers(), *options_of_the_loop())):
        for name, denoiser in denoisers.items():
            for kind in ("unguided", "js", "through_denoiser") if name != "adm" else guidances:
                try:
                    sampler.check(denoiser, guidances[kind])
                except ValueError:  # they cannot go together
                    continue
                steps, _ = loop(sampler, denoiser, guidances[kind], "cuda")
                assert len(steps) >= STEPS, (name, kind)
