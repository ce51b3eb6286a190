"""What stands for the unconditional prediction: by definition, on every network, and whatever the batch."""

import copy
import math

import pytest
import torch
from torch import nn

from calib_guidance.backend.compilation import Compiled
from calib_guidance.denoisers import (
    ADMDenoiser,
    ClassifierFreeGuidance,
    Combination,
    Denoiser,
    DiffusersDenoiser,
    DiTDenoiser,
    EDM2Denoiser,
    EDMDenoiser,
    FlowDenoiser,
    IndependentCondition,
    PerturbedAttention,
    PerturbedTime,
    Prediction,
    RemapClasses,
    SlidingWindows,
    SmoothedAttention,
)
from calib_guidance.denoisers.negatives.attention import with_changed_attention
from calib_guidance.diffusion.rng import KeyedNumbers, SampleStreams
from calib_guidance.diffusion.schedules import NoiseSchedule, named_betas
from calib_guidance.networks import DiT, EDM2UNet, UNet
from calib_guidance.networks.adm import _attend
from calib_guidance.samplers import DDIM, Heun
from calib_guidance.tasks.retry import in_float32

Y = torch.tensor([0, 1, 2, 1, -1])


def random_(module):
    """No layer stays zero, as it is initialized, so that everything matters."""
    for p in module.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return module


def unet(out_channels=2, dtype="float32", in_channels=1, **options):
    adm = {"channel_mult": (1,), "use_scale_shift_norm": True, "attention_resolutions": (1,), "num_classes": 3}
    return random_(UNet(8, in_channels, 32, out_channels, num_res_blocks=1, dtype=dtype, **adm | options))


@pytest.fixture(scope="module")
def denoisers():
    torch.manual_seed(0)
    return {
        "adm": ADMDenoiser(unet()),
        "edm": EDMDenoiser(unet(1)),
        "edm2": EDM2Denoiser(random_(EDM2UNet(8, 1, 3, 32, (1,), 1, [8], channels_per_head=16))),
        "dit": DiTDenoiser(random_(DiT(4, 1, 32, 2, 2, num_classes=3)), vae=nn.Identity()),
        "sit": FlowDenoiser(random_(DiT(4, 1, 32, 2, 2, num_classes=3)), is_latent=False),
    }


LAYERS = {"adm": "middle_block.1", "edm": "middle_block.1", "edm2": "dec.8x8_in0", "dit": "transformer_blocks.1.attn1"}
LAYERS |= {"sit": "transformer_blocks.1"}
EMBEDDING = {"edm2": "emb_noise"}
NEGATIVES = {
    "independent_condition": lambda kind: IndependentCondition(),
    "perturbed_time": lambda kind: PerturbedTime(0.5, embedding=EMBEDDING.get(kind, "time_embed")),
    "perturbed_attention": lambda kind: PerturbedAttention([LAYERS[kind]]),
    "smoothed_attention": lambda kind: SmoothedAttention([LAYERS[kind]], 0.5),
    "smoothed_attention_infinite": lambda kind: SmoothedAttention([LAYERS[kind]]),
    "sliding_windows": lambda kind: SlidingWindows(4, 3),
}
CASES = [
    (name, kind) for name in NEGATIVES for kind in LAYERS if name != "sliding_windows" or kind not in ("dit", "sit")
]


def pair_of(negative, denoiser, y=Y, times=(100, 500), start=True):
    negative.check(denoiser)
    pair = negative.prepare(denoiser, denoiser.schedule.at(list(times)), y)
    x = SampleStreams([0] * len(y), range(len(y)), denoiser.image_shape)()
    if start and hasattr(pair, "start"):
        pair.start(x)
    return pair, x


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_the_conditional_prediction_stays_and_the_negative_differs(denoisers, name, kind):
    denoiser = denoisers[kind]
    negative = NEGATIVES[name](kind)
    pair, x = pair_of(negative, denoiser)
    predict = denoiser.prepare(denoiser.schedule.at([100, 500]), Y)
    for i in (0, 1):
        cond, uncond = pair(x, i)
        torch.testing.assert_close(cond.x0, predict(x, i).x0, atol=1e-5, rtol=1e-5)
        assert uncond.x0.shape == cond.x0.shape
        assert (uncond.x0 - cond.x0).abs().max() > 1e-4
        # The weights are as they were.
        torch.testing.assert_close(predict(x, i).x0, denoiser.prepare(denoiser.schedule.at([100, 500]), Y)(x, i).x0)
    nothing_left = all(not module._forward_hooks for module in denoiser.modules())
    assert nothing_left
    assert Combination(denoiser, negative=negative).state_dict().keys() == Combination(denoiser).state_dict().keys()


@pytest.mark.parametrize(("name", "kind"), [c for c in CASES if c[1] == "adm"] + [("perturbed_attention", "dit")])
@pytest.mark.parametrize("sampler", [DDIM(3, eta=0.5), Heun(3)], ids=["ddim", "heun"])
def test_a_sample_depends_on_no_batch(denoisers, name, kind, sampler):
    denoiser = Combination(denoisers[kind], ClassifierFreeGuidance(3.0), NEGATIVES[name](kind))
    y = torch.arange(16) % 3

    def sample(rows):
        return sampler(denoiser, SampleStreams([3] * len(rows), rows.tolist(), denoiser.image_shape), y[rows])

    expected = sample(torch.arange(16))
    assert torch.equal(sample(torch.arange(16)), expected)  # nothing is left of the first time
    for rows in (torch.tensor([4]), torch.tensor([15, 0, 3])):
        torch.testing.assert_close(sample(rows), expected[rows], atol=2e-3, rtol=1e-3)


# ---------------------------------------------------------------------- random numbers


def test_keyed_numbers_follow_from_the_sample_alone():
    x = SampleStreams([0] * 200, range(200), (1, 8, 8))()
    numbers = KeyedNumbers(x).uniform(50)
    assert torch.equal(KeyedNumbers(x[17:19]).uniform(50), numbers[17:19])
    assert torch.equal(KeyedNumbers(x.flip(0)).uniform(50), numbers.flip(0))
    assert not torch.equal(KeyedNumbers(x).uniform(50, stream=1), numbers)
    changed = x.clone()
    changed[:, 0, 3, 3] += 1e-6  # one pixel decides
    assert not (KeyedNumbers(changed).uniform(50) == numbers).any()


def test_keyed_numbers_are_uniform_and_normal():
    from scipy import stats

    x = SampleStreams([0] * 200, range(200), (1, 4, 4))()
    uniform, normal = KeyedNumbers(x).uniform(100).numpy(), KeyedNumbers(x).normal(100).numpy()
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    # Along samples and along numbers nothing is correlated.
    for rows in (normal, normal.T):
        correlations = torch.corrcoef(torch.from_numpy(rows)) - torch.eye(len(rows))
        assert correlations.abs().max() < 6 / math.sqrt(rows.shape[1])


class Labels(Denoiser):
    """Predicts its label."""

    image_shape, num_classes, clip = (1, 1, 1), 4, False

    def __init__(self):
        super().__init__()
        self.schedule = NoiseSchedule(named_betas("linear"))

    def prepare(self, levels, y):
        return lambda x_t, i: Prediction(y.view(-1, 1, 1, 1).float().expand_as(x_t))


def test_independent_labels_are_uniform_and_new_at_every_level():
    y = torch.arange(400) % 4
    pair, x = pair_of(IndependentCondition(), Labels(), y, range(0, 1000, 50))
    labels = torch.stack([pair(x, i)[1].x0.flatten() for i in range(20)])
    assert torch.equal(pair(x, 3)[0].x0.flatten(), y.float())
    counts = torch.stack([(labels == k).sum() for k in range(4)])
    assert (counts - 2000).abs().max() < 6 * math.sqrt(2000)
    # The sample's own label among them, and no two levels alike.
    assert abs(float((labels == y).float().mean()) - 0.25) < 0.03
    assert abs(float((labels[1:] == labels[:-1]).float().mean()) - 0.25) < 0.03
    without, x = pair_of(IndependentCondition(), Labels(), torch.full((5,), -1))
    assert (without(x, 0)[1].x0 == -1).all()


def test_an_interval_and_the_step_size_change_no_random_label(denoisers):
    """Labels follow from x_T, not from the sample where guidance begins."""
    from calib_guidance.diffusion import Interval

    seen, found = [], []

    class Spy(Labels):
        def prepare(self, levels, y):
            seen.append(y[len(y) // 2 :].clone())
            return super().prepare(levels, y)

    for interval in (Interval(), Interval([0, 400])):
        noise = SampleStreams([0] * 5, range(5), (1, 1, 1))
        DDIM(4)(Combination(Spy(), negative=IndependentCondition(), interval=interval), noise, torch.arange(5) % 4)
        found.append(torch.stack(seen[-4:]))
    assert torch.equal(*found)
    assert found[0].unique().numel() > 1


@torch.no_grad()
def test_perturbed_time_perturbs_the_embedding_as_stated(denoisers):
    denoiser = denoisers["adm"]
    network, t, negative = denoiser.network, 500, PerturbedTime(0.7, exponent=2.0)
    pair, x = pair_of(negative, denoiser, times=(100, t))
    e = network.embed_time(torch.tensor([float(t)]))
    noise = KeyedNumbers(x).normal(e.shape[1], stream=1).float()
    perturbed = e + 0.7 * e.square().mean().sqrt() * (t / 999) ** 2 * noise
    output, _ = network.decode(x, perturbed + network.embed_labels(Y)).chunk(2, dim=1)
    abar = denoiser.schedule.alphas_cumprod[t]
    expected = (x - math.sqrt(1 - abar) * output) / math.sqrt(abar)
    torch.testing.assert_close(pair(x, 1)[1].x0, expected, atol=1e-4, rtol=1e-4)
    still, x = pair_of(PerturbedTime(0.0), denoiser)
    torch.testing.assert_close(*(p.x0 for p in still(x, 1)), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------- attention


def test_attention_with_the_identity_is_published_pag(golden):
    data = golden("small_parts")
    qkv = data["qkv"].transpose(1, 2)
    plain = _attend(qkv, 4, new_order=False).transpose(1, 2)
    torch.testing.assert_close(plain, data["attention"], atol=1e-6, rtol=0)  # upstream's softmax is in float32

    class Attend(nn.Module):
        def forward(self, qkv):
            return _attend(qkv, 4, new_order=False)

    changed = with_changed_attention(nn.Sequential(Attend()), ["0"], PerturbedAttention(["0"]).attend)
    found = changed(torch.cat([qkv, qkv])).transpose(1, 2)
    torch.testing.assert_close(found[:2], data["attention"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[2:], data["attention_identity"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("blur", [1, 10])
def test_queries_are_blurred_as_published(golden, blur):
    data = golden("small_parts")
    found = SmoothedAttention(["0"], float(blur)).smooth(data["seg_query"])
    torch.testing.assert_close(found, data[f"seg_sigma{blur}"], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("blur", [0.8, None])
def test_smoothed_attention_attends_by_blurred_queries(blur):
    q, k, v = torch.randn(3, 2, 4, 16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    negative = SmoothedAttention(["0"], blur)
    for n in range(2):
        for head in range(4):
            image = q[n, head].T.reshape(1, 5, 4, 4)
            query = negative.smooth(image).reshape(5, 16).T if blur else q[n, head].mean(0, keepdim=True).expand(16, 5)
            expected = torch.softmax(query @ k[n, head].T / math.sqrt(5), dim=-1) @ v[n, head]
            torch.testing.assert_close(negative.attend(q, k, v)[n, head], expected, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="15 tokens"):
        SmoothedAttention(["0"], 1.0).attend(q[:, :, :15], k[:, :, :15], v[:, :, :15])


class FromDiffusers(nn.Module):
    """A block of diffusers as a network."""

    def __init__(self, processor):
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16)
        self.block.attn1.set_processor(processor)

    def forward(self, x):
        return self.block(x, encoder_hidden_states=x[:, :9])


@torch.no_grad()
def test_diffusers_modules_are_changed_as_diffusers_changes_them():
    """By its own processor for PAG, self-attention alone."""
    from diffusers.models.attention_processor import AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0

    torch.manual_seed(0)
    network = FromDiffusers(AttnProcessor2_0())
    theirs = FromDiffusers(PAGIdentitySelfAttnProcessor2_0())
    theirs.load_state_dict(network.state_dict())
    x = torch.randn(6, 16, 16)
    for layer in ("attn1", "block"):
        changed = with_changed_attention(network, [layer], PerturbedAttention([layer]).attend)
        torch.testing.assert_close(changed(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert (network(x)[3:] - theirs(x)[3:]).abs().max() > 1e-3


def diffusers_denoiser(attention="Attn", **options):
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {f"{way.lower()}_block_types": (f"{attention}{way}Block2D",) for way in ("Down", "Up")}
    size = {
        "block_out_channels": (32,),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "num_class_embeds": 4,
        "norm_num_groups": 8,
    }
    model = UNet2DModel(8, 1, 1, **blocks, **size)
    return DiffusersDenoiser(random_(model), DDPMScheduler(), null_label=3, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    "negative",
    [PerturbedAttention(["mid_block.attentions.0"]), SmoothedAttention(["mid_block"]), IndependentCondition()],
    ids=lambda negative: type(negative).__name__,
)
def test_negatives_of_a_diffusers_network(negative):
    denoiser = diffusers_denoiser()
    pair, x = pair_of(negative, denoiser)
    cond, uncond = pair(x, 1)
    torch.testing.assert_close(cond.x0, denoiser(x, 500, Y).x0, atol=1e-4, rtol=1e-4)
    assert (uncond.x0 - cond.x0).abs().max() > 1e-4


def test_a_denoiser_that_embeds_t_at_every_step_has_no_perturbed_time():
    with pytest.raises(ValueError, match="DiffusersDenoiser does not embed t before sampling"):
        pair_of(PerturbedTime(embedding="time_embedding"), diffusers_denoiser())


@torch.no_grad()
def test_a_changed_network_shares_its_weights(denoisers):
    denoiser = RemapClasses(denoisers["adm"], [2, 0, 1])
    negative = PerturbedAttention(["middle_block.1", "input_blocks.1.1"])
    pair, x = pair_of(negative, denoiser)
    before = pair(x, 1)
    changed = negative._changed(denoiser)
    assert negative._changed(denoiser) is changed
    weights = {id(tensor) for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    assert {id(tensor) for tensor in (*changed.parameters(), *changed.buffers())} == weights
    one, _ = pair_of(PerturbedAttention(["middle_block.1"]), denoiser)
    assert (one(x, 1)[1].x0 - before[1].x0).abs().max() > 1e-4  # every named layer counts


def test_half_precision_is_retried_in_float32():
    torch.manual_seed(0)
    half = ADMDenoiser(unet(dtype="bfloat16"))
    combination = Combination(half, negative=PerturbedAttention(["middle_block.1"]))
    noise = SampleStreams([0] * 5, range(5), half.image_shape)()
    with torch.no_grad():
        rough = combination.prepare(half.schedule.at([500]), Y)(noise, 0).x0
        with in_float32(combination):
            exact = combination.prepare(half.schedule.at([500]), Y)(noise, 0).x0
        again = combination.prepare(half.schedule.at([500]), Y)(noise, 0).x0
    assert torch.equal(rough, again)
    assert 0 < (rough - exact).abs().max() < 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["adm", "edm2", "sit", "diffusers"])
def test_attention_is_changed_in_a_compiled_network(denoisers, monkeypatch, kind):
    """In one doubled batch, and alone, as the second of two negatives. EDM and DiT run the networks of ADM and SiT."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, dynamic=False, backend="eager", fullgraph=True))
    if kind == "diffusers":
        plain, compiled = (diffusers_denoiser("", compile=compile) for compile in (False, True))
    else:
        plain, compiled = denoisers[kind], copy.copy(denoisers[kind])
        compiled._decode = Compiled(compiled.network.decode)
    negative = PerturbedAttention([LAYERS.get(kind, "mid_block.attentions.0")])
    found, x = pair_of(negative, compiled)
    expected, _ = pair_of(negative, plain)
    for a, b in zip(found(x, 1), expected(x, 1), strict=True):
        torch.testing.assert_close(a.x0, b.x0, atol=1e-5, rtol=1e-5)
    assert (a.x0 - expected(x, 1)[0].x0).abs().max() > 1e-4
    if kind != "sit":  # compiling takes seconds
        return
    alone = negative.prepare_alone(compiled, compiled.schedule.at([100, 500]), Y)
    torch.testing.assert_close(alone(x, 1, None).x0, b.x0, atol=1e-5, rtol=1e-5)


def test_layers_that_cannot_be_are_named(denoisers):
    adm = denoisers["adm"]
    with pytest.raises(ValueError, match=r"'middle_block.7' must be the name of one module.*network.middle_block.1"):
        Combination(adm, negative=PerturbedAttention(["middle_block.7"]))
    with pytest.raises(ValueError, match="and 2 have it"):
        Combination(denoisers["dit"], negative=PerturbedAttention(["attn1"]))
    with pytest.raises(ValueError, match="list of one or more"):
        PerturbedAttention("middle_block.1")
    # The second half of its batch would be that of the inner negative.
    with pytest.raises(ValueError, match=r"a Combination of NFE 2 makes several predictions.*TwoNegatives"):
        Combination(Combination(adm), negative=PerturbedAttention(["middle_block.1"]))
    pair, x = pair_of(PerturbedAttention(["out.0"]), adm)
    with pytest.raises(ValueError, match="GroupNorm without self-attention"):
        pair(x, 0)
    with pytest.raises(ValueError, match="time_embeddings"):
        Combination(adm, negative=PerturbedTime(embedding="time_embeddings"))
    with pytest.raises(ValueError, match="same step"):
        Combination(adm, negative=IndependentCondition())(torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), Y[:2])


# --------------------------------------------------------------------------- sliding windows


class Crops(Denoiser):
    """The predictions of a fixture, in the order of its calls."""

    clip, num_classes = False, None

    def __init__(self, data, size):
        super().__init__()
        self.data, self.size = data, size
        self.image_shape = data[f"{size}_x"].shape[1:]
        self.schedule = NoiseSchedule(named_betas("linear"))

    def prepare(self, levels, y):
        def predict(x_t, i):
            if x_t.shape[1:] == self.image_shape:
                return Prediction(self.data[f"{self.size}_pos"])
            crops, k = self.data[f"{self.size}_crops"], x_t.shape[-1]
            x, corners = self.data[f"{self.size}_x"], self.data[f"{self.size}_corner"].tolist()
            expected = torch.cat([x[..., top : top + k, left : left + k] for top, left in corners])
            assert torch.equal(x_t, expected)
            assert len(y) == len(crops) * 2
            return Prediction(crops.flatten(0, 1))

        return predict


@pytest.mark.parametrize(("size", "crop", "n"), [("a", 10, 2), ("b", 10, 3), ("c", 40, 2), ("d", 5, 2)])
@pytest.mark.parametrize("masked", [True, False])
def test_sliding_windows_are_the_published_ones(golden, size, crop, n, masked):
    data = golden("mswg")
    denoiser, negative = Crops(data, size), SlidingWindows(crop, n, masked)
    negative.check(denoiser)
    pair = negative.prepare(denoiser, denoiser.schedule.at([500]), torch.zeros(2, dtype=torch.long))
    cond, uncond = pair(data[f"{size}_x"], 0)
    guided = cond.x0 + 1.5 * (cond.x0 - uncond.x0)
    # Upstream adds crops up in float32.
    torch.testing.assert_close(guided, data[f"{size}_{'masked' if masked else 'plain'}"], atol=1e-5, rtol=1e-5)
    if not masked:
        torch.testing.assert_close(uncond.x0, data[f"{size}_neg"], atol=1e-6, rtol=1e-6)
    assert negative.nfe(denoiser) == 1 + n**2


def test_the_mask_of_the_published_setting_is_a_cross(golden):
    count = golden("mswg")["c_count"]
    assert float((count > 1).double().mean()) == pytest.approx(0.4375)


def test_crops_that_leave_pixels_out_or_do_not_fit_are_refused(golden, denoisers):
    with pytest.raises(ValueError, match="do not tile a side of 13"):
        SlidingWindows(6, 3).check(Crops(golden("mswg"), "e"))
    with pytest.raises(ValueError, match="do not tile"):
        Combination(denoisers["adm"], negative=SlidingWindows(3, 2))  # a gap in the middle
    with pytest.raises(ValueError, match="do not fit the network"):
        Combination(denoisers["dit"], negative=SlidingWindows(2, 2))
    with pytest.raises(ValueError, match="per_side must be at least 2"):
        SlidingWindows(4, 1)
