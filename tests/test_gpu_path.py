"""What compiled networks and CUDA graphs need, checked without a GPU.

One graph per network, none more at later steps, batches and samplers; static shapes and addresses; inputs that nothing writes to;
attention that flash kernels take; random numbers in one copy. (That the loop waits for nothing is in ``test_no_waiting``.)
"""

import inspect
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from calib_guidance import samplers
from calib_guidance.classifiers import Ensemble, NoiseAwareClassifier, OffTheShelfClassifier
from calib_guidance.denoisers import (
    ADMDenoiser,
    ClassifierFreeGuidance,
    Combination,
    DiTDenoiser,
    EDM2Denoiser,
    EDMDenoiser,
    FlowDenoiser,
)
from calib_guidance.diffusion.rng import KeyedNumbers, SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GradientReuse
from calib_guidance.networks import DiT, EDM2UNet, EncoderUNet, LightningDiT, SmallResNet, UNet
from calib_guidance.samplers import DDIM, DDPM

SIZE = 2
UNET = {"channel_mult": (1,), "num_res_blocks": 1, "use_scale_shift_norm": True, "attention_resolutions": (1,)}
EDM2 = {"model_channels": 32, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (8,), "channels_per_head": 32}
# One network of each architecture. Latents are images here: decoders are not compiled.
NETWORKS = {
    "adm": lambda **o: ADMDenoiser(UNet(8, 1, 32, 1, num_classes=3, **UNET, **o), compile=True),
    "edm": lambda **o: EDMDenoiser(UNet(8, 1, 32, 1, num_classes=3, **UNET, **o), compile=True),
    "edm2": lambda **o: EDM2Denoiser(EDM2UNet(8, 1, 3, **EDM2, **o), compile=True),
    "dit": lambda **o: DiTDenoiser(
        DiT(8, 4, 32, 1, 2, 1, 2, num_classes=3, **o), vae=torch.nn.Identity(), latent_scale=1.0, compile=True
    ),
    "sit": lambda **o: FlowDenoiser(
        DiT(8, 4, 32, 1, 2, 1, 2, num_classes=3, **o), vae=torch.nn.Identity(), latent_scale=1.0, compile=True
    ),
    "lightningdit": lambda **o: FlowDenoiser(
        LightningDiT(8, 1, 3, 32, 1, 2, 4, qk_norm=True, **o), is_latent=False, compile=True
    ),
}


def off_the_shelf(**options):
    return OffTheShelfClassifier(SmallResNet(3, 1, (8, 8), 1), 3, softplus_beta=3.0, compile=True, **options)


def noise_aware():
    options = {"channel_mult": (1,), "num_head_channels": 32, "resblock_updown": False}
    return NoiseAwareClassifier(EncoderUNet(8, 1, 32, 3, 1, **options), compile=True)


CLASSIFIERS = {
    "off the shelf": lambda: ClassifierGuidance(off_the_shelf()),
    "temperature by t, reused": lambda: ClassifierGuidance(
        off_the_shelf(temperature=[1.0, 2.0]), reuse=GradientReuse(2)
    ),
    "noise-aware": lambda: ClassifierGuidance(noise_aware(), classifier_input="x_t"),
    "ensemble": lambda: ClassifierGuidance(Ensemble([off_the_shelf(), off_the_shelf()])),
}


def all_samplers():
    """Every sampler that there is, with two steps."""
    for name, kind in sorted(vars(samplers).items()):
        if inspect.isclass(kind) and issubclass(kind, samplers.Sampler) and not inspect.isabstract(kind):
            options = inspect.signature(kind).parameters
            yield name, kind(**{next(o for o in ("steps", "num_steps") if o in options): 2})


SAMPLERS = dict(all_samplers())
# Alone, each sample is a batch of one, which is one more graph; at its own tolerance it takes dozens of steps.
SAMPLERS["AdaptiveODE"] = samplers.AdaptiveODE(rtol=0.1, atol=0.1, together=True)


class Graphs:
    """A compiler that keeps the graphs and runs them as they are, and notices what is written to."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append((module, inputs))

        def run(*args):
            versions = [arg._version for arg in args if isinstance(arg, torch.Tensor)]
            outputs = module(*args)
            assert versions == [arg._version for arg in args if isinstance(arg, torch.Tensor)], (
                "an input was written to"
            )
            return outputs

        return run


@pytest.fixture(scope="module")
def compiled():
    """Denoisers and guidances by name, each compiled in a first step, with their graphs; later compilations are errors."""
    torch._dynamo.reset()
    graphs, counters, compiler = Graphs(), torch._dynamo.utils.counters, torch.compile
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, dynamic, mode: compiler(f, dynamic=dynamic, backend=graphs))
        torch.manual_seed(0)
        denoisers = {name: make().eval().requires_grad_(False) for name, make in NETWORKS.items()}
        guidances = {name: make() for name, make in CLASSIFIERS.items()}
    # Networks of one architecture share a graph, whose weights are inputs: ADM and EDM, DiT and SiT. Classifiers with folded
    # BatchNorm do not; there are five.
    for denoiser in denoisers.values():
        sample(denoiser, DDIM(2))
    assert len(graphs.graphs) == 4
    for guidance in guidances.values():
        sample(denoisers["adm"], DDIM(2), guidance)
    assert len(graphs.graphs) == 9
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield denoisers, guidances, graphs
    torch._dynamo.reset()


def sample(denoiser, sampler, guidance=None, seed=0):
    noise = SampleStreams([seed] * SIZE, range(SIZE), denoiser.image_shape)
    return sampler(denoiser, noise, (torch.arange(SIZE) + seed) % 3, guidance)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_compiled_again(compiled, sampler):
    """For every network and every classifier: at no later step, in no second batch, and not for another sampler."""
    denoisers, guidances, graphs = compiled
    count = len(graphs.graphs)
    for number, (name, denoiser) in enumerate(denoisers.items()):
        chosen = list(guidances.values()) if name == "adm" else [None, list(guidances.values())[number % 4]]
        for guidance in chosen:
            for seed in (1, 2) if name == "adm" else (1,):  # after the batch that was compiled
                assert sample(denoiser, SAMPLERS[sampler], guidance, seed).isfinite().all()
    assert len(graphs.graphs) == count


def test_guidance_that_doubles_batches_or_runs_backward_compiles_once_more(compiled):
    denoisers, _, graphs = compiled
    for make in (
        lambda: (Combination(denoisers["dit"], ClassifierFreeGuidance(1.5)), None),
        lambda: (denoisers["dit"], ClassifierGuidance(off_the_shelf(), backprop_through_denoiser=True)),
    ):
        before = len(graphs.graphs)
        with torch._dynamo.config.patch(error_on_recompile=False):
            denoiser, guidance = make()
            if guidance is not None:
                guidance.classifier._compiled = None  # this is about the diffusion network
            sample(denoiser, DDPM(2), guidance)
        assert len(graphs.graphs) == before + 1
        sample(denoiser, DDIM(2), guidance, 1)
        assert len(graphs.graphs) == before + 1


def test_shapes_and_weights_are_static(compiled):
    """CUDA graphs read weights where they lie and copy only what is not marked: the image, and the embedding or t."""
    for module, inputs in compiled[2].graphs[:9]:
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        assert all(isinstance(value, torch.Tensor) for value in inputs)
        assert all(isinstance(size, int) for value in inputs for size in value.shape)
        moving = [place for place in places if "_dynamo_static_input_type" not in place.meta["tensor_dict"]]
        assert 1 <= len(moving) <= 2
        assert {len(inputs[places.index(place)]) for place in moving} == {SIZE}
        assert not [node for node in module.graph.nodes if node.op == "get_attr"]


def test_weights_stay_where_they_are(compiled):
    denoisers, guidances, _ = compiled
    for part in (*denoisers.values(), *guidances.values()):
        before = [tensor.data_ptr() for tensor in (*part.parameters(), *part.buffers())]
        pair = (part, None) if part in denoisers.values() else (denoisers["adm"], part)
        sample(pair[0], DDIM(2), pair[1], 3)
        assert before == [tensor.data_ptr() for tensor in (*part.parameters(), *part.buffers())]


class Attention(TorchFunctionMode):
    """Counts attention, and refuses what flash kernels do not take."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.count += 1
            names = ("query", "key", "value", "attn_mask", "dropout_p")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            assert given.get("attn_mask") is None
            assert not given.get("dropout_p")
            for name in names[:3]:
                x = given[name]
                assert x.ndim == 4  # (N, heads, tokens, channels)
                assert x.dtype == torch.bfloat16
                assert x.shape[-1] % 8 == 0
                assert x.shape[-1] <= 256
                assert x.stride(-1) == 1
                assert all(stride % 8 == 0 for stride in x.stride()[:-1])  # rows that start at 16 bytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_is_of_a_kind_that_flash_kernels_take(name):
    torch.manual_seed(0)
    denoiser = NETWORKS[name](dtype="bfloat16").eval()
    denoiser._decode = denoiser.network.decode  # not compiled
    with Attention() as attention:
        sample(denoiser, DDIM(2))
    assert attention.count >= 2


class Copies(TorchDispatchMode):
    """Counts operations, and copies between devices."""

    def __init__(self):
        super().__init__()
        self.count, self.names = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            source = next(arg for arg in args if isinstance(arg, torch.Tensor))
            self.count += source.device != result.device
        return result


def test_the_noise_of_a_batch_is_one_copy():
    launches = []
    for count in (1, 16):
        streams = SampleStreams([0] * count, range(count), (3, 8, 8), "meta", ahead=False)
        with Copies() as copies:
            streams()
        assert copies.count == 1
        with Copies() as copies:
            KeyedNumbers(torch.empty(count, 3, 8, 8, device="meta")).normal(3, 8, 8, stream=1)
        launches.append(copies.names)
    assert launches[0] == launches[1]  # as many for 16 samples as for one
