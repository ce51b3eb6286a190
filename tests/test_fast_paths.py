"""Compiled, half-precision and overlapped sampling against the plain way."""

import copy
import json
import os
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from calib_guidance.backend import distributed, tuning
from calib_guidance.backend.distributed import available_cores, sensible_threads
from calib_guidance.classifiers import NoiseAwareClassifier, OffTheShelfClassifier
from calib_guidance.cli import main
from calib_guidance.cli.lightning import subclasses_listed_once
from calib_guidance.denoisers import ADMDenoiser, DiTDenoiser
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.guidance.classifier_guidance import input_gradient
from calib_guidance.metrics.frechet import frechet_distance, mean_and_covariance
from calib_guidance.networks import DiT, EncoderUNet, SmallResNet, UNet
from calib_guidance.networks.adm import GroupNorm
from calib_guidance.samplers import DDPM
from calib_guidance.weights.io import load_weights
from tests.digits import digits_denoiser
from tests.runs import read_samples


def classifier(**options):
    """The shipped one, with the repository root as working directory."""
    return OffTheShelfClassifier(
        SmallResNet(), 10, "checkpoints/digits/classifier.safetensors", softplus_beta=3.0, **options
    )


def gradient(model, x, y, t=None):
    x = x.clone().requires_grad_()
    value = model(x, t).log_softmax(1).gather(1, y[:, None]).sum()
    return torch.autograd.grad(value, x)[0]


def digits(count, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


class TestCompiled:
    def test_a_classifier_forward_and_backward(self):
        torch.manual_seed(0)
        x, y, network = digits(4), torch.arange(4), SmallResNet(10, 1, (16,), 1)
        plain, compiled = (
            OffTheShelfClassifier(copy.deepcopy(network), 10, softplus_beta=3.0, compile=c).freeze()
            for c in (False, True)
        )
        torch.testing.assert_close(compiled(x), plain(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(gradient(compiled, x, y), gradient(plain, x, y), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("make", ["adm", "dit", "noise_aware"])
    def test_every_network_gives_what_it_gives_and_can_be_copied(self, make, monkeypatch):
        """With the compiler's front alone: its kernels are tested above."""
        compiler = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, dynamic, mode: compiler(f, dynamic=dynamic, backend="aot_eager")
        )
        torch.manual_seed(0)
        t, y, x = torch.tensor([10, 900]), torch.tensor([1, 2]), digits(2)
        encoder = {"channel_mult": (1,), "num_head_channels": 32}

        def build(compiled):
            torch.manual_seed(1)
            if make == "noise_aware":
                network = EncoderUNet(8, 1, 32, 3, 1, **encoder, resblock_updown=False)
                return NoiseAwareClassifier(network, compile=compiled).freeze()
            if make == "dit":
                return DiTDenoiser(DiT(8, 2, 32, 1, 2, in_channels=1, out_channels=2, num_classes=3), compile=compiled)
            return ADMDenoiser(UNet(8, 1, 32, 2, 1, **encoder, num_classes=3), compile=compiled)

        def run(part):
            if make == "noise_aware":
                return gradient(part, x, y, t)
            return part.prepare(part.schedule.levels, y)(x, 500).x0

        plain, compiled = build(False), build(True)
        for part in (plain, compiled):
            for parameter in part.parameters():  # zero at first, some of them
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        expected = run(plain)
        for part in (compiled, copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
            torch.testing.assert_close(run(part), expected, atol=1e-4, rtol=1e-4)

    def test_short_batches_are_filled_up_and_compile_nothing_again(self, in_root, tmp_path, monkeypatch):
        """10 digits in batches of 4, 4 and 2."""
        graphs, rows = [], []

        def backend(module, inputs):
            graphs.append(module)

            def run(*args):
                rows.append(max(len(a) for a in args if a.ndim == 4 and a.shape[2:] == (8, 8)))
                return module(*args)

            return run

        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: compiler(f, dynamic=dynamic, backend=backend))

        names = ("SampleWriter", "TrajectoryCalibration", "GradientNorm", "RunReport")
        callbacks = [{"class_path": f"calib_guidance.callbacks.{name}"} for name in names]
        callbacks[-1]["init_args"] = {"plots": False}

        def predict(name, *options):
            words = ["predict", "--config", "lightning_configs/predict/digits.yaml", "--trainer.accelerator=cpu"]
            words += ["--trainer.enable_progress_bar=false", "--trainer.default_root_dir", str(tmp_path / name)]
            words += ["--data.init_args.num_samples=10", "--data.init_args.batch_size=4", *options]
            words += ["--model.init_args.sampler.init_args.steps=3", f"--trainer.callbacks={json.dumps(callbacks)}"]
            with subclasses_listed_once():
                main(words)
            parts = list(read_samples(tmp_path / name / "samples"))
            return torch.cat([p["image"] for p in parts]), json.loads((tmp_path / name / "metrics.json").read_text())

        guiding = "--model.init_args.guidance.init_args.classifier.init_args.compile=true"
        found, counted = predict("compiled", "--model.init_args.denoiser.init_args.compile=true", guiding)
        assert len(graphs) == 2  # network and classifier, for one shape each
        assert set(rows) == {4}
        assert len(rows) == 2 * 3 * 3  # both at three steps of three batches
        expected, metrics = predict("plain")
        assert len(graphs) == 2
        assert (found.int() - expected.int()).abs().max() <= 1
        assert counted["gradient_norm_t"]["mean"] == pytest.approx(metrics["gradient_norm_t"]["mean"], rel=1e-4)
        assert counted["integral_ece"] == pytest.approx(metrics["integral_ece"], rel=1e-4)


class TestHalfPrecision:
    @pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.02), ("float16", 0.003)])
    def test_of_a_classifier_of_clean_images(self, in_root, dtype, error):
        x, y = digits(16), torch.arange(16) % 10
        plain, half = classifier().freeze(), classifier(dtype=dtype).freeze()
        assert half.network.fc.weight.dtype == getattr(torch, dtype)
        logits = half(x)
        assert logits.dtype == torch.float32
        assert 0 < (logits - plain(x)).norm() < error * plain(x).norm()
        found, expected = gradient(half, x, y), gradient(plain, x, y)
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < 3 * error * expected.norm()

    def test_gradients_of_a_sure_classifier_do_not_vanish_in_float16(self, in_root):
        """Those of 1 − p = 1e-9 are below its least number, 6e-8."""
        x = digits(4)
        plain, half = classifier().freeze(), classifier(dtype="float16").freeze()
        weight = torch.tensor([1e-9, 1e-3, 0.0, 1e3])[:, None]

        def weighted(model):
            source = x.clone().requires_grad_()
            return input_gradient(lambda f: (f * weight)[:, 3], model(source), source)

        found, expected = weighted(half), weighted(plain)
        assert torch.equal(found[2], torch.zeros_like(found[2]))
        for row in (0, 1, 3):
            assert (found[row] - expected[row]).norm() < 0.01 * expected[row].norm()

    def test_of_a_noise_aware_classifier(self):
        torch.manual_seed(0)
        options = {"channel_mult": (1,), "num_head_channels": 32, "resblock_updown": False}
        x, y, t = digits(4), torch.tensor([0, 1, 2, 0]), torch.tensor([10, 200, 500, 900])
        plain, half = (EncoderUNet(8, 1, 32, 3, 1, **options, dtype=d) for d in ("float32", "float16"))
        half.load_state_dict(plain.state_dict())
        plain, half = (NoiseAwareClassifier(network).freeze() for network in (plain, half))
        x.requires_grad_()
        found, expected = (input_gradient(lambda f: 1e-9 * f.gather(1, y[:, None]), m(x, t), x) for m in (half, plain))
        assert 0 < (found - expected).norm() < 0.02 * expected.norm()

    def test_guidance_and_samples_stay_float32(self, in_root):
        seen = []
        denoiser = digits_denoiser(class_conditional=False)
        guidance = ClassifierGuidance(classifier(dtype="bfloat16"))
        noise = SampleStreams([0] * 4, range(4), (1, 8, 8))
        DDPM("4")(denoiser, noise, torch.arange(4), guidance, [seen.append])
        for record in seen:
            assert {record.x_next.dtype, record.guided.aux.logits.dtype, record.guided.score.dtype} == {torch.float32}

    def test_a_run_in_bfloat16_is_near_in_frechet_distance(self, in_root):
        """Much nearer than other noise is; how near depends on the processor's order of sums."""
        eval_classifier = SmallResNet(10, 1, (48, 96, 48), 2).eval()
        load_weights(eval_classifier, "checkpoints/digits/eval_classifier.safetensors")
        statistics, images = [], []
        for dtype, seed in (("float32", 0), ("bfloat16", 0), ("float32", 1)):
            denoiser, guidance = digits_denoiser(False, dtype=dtype), ClassifierGuidance(classifier(dtype=dtype))
            noise = SampleStreams([seed] * 100, range(100), (1, 8, 8))
            images.append(DDPM("10")(denoiser, noise, torch.arange(100) % 10, guidance))
            with torch.no_grad():
                statistics.append(mean_and_covariance(eval_classifier.forward_features(images[-1])))
        assert 0 < (images[0] - images[1]).abs().mean() < 0.02
        of_type, of_noise = (frechet_distance(*statistics[0], *other) for other in statistics[1:])
        assert 0 < of_type < 0.01 * of_noise

    def test_unknown_names_are_told(self):
        with pytest.raises(ValueError, match="dtype: unknown 'half'; known: float32, float16, bfloat16, auto"):
            OffTheShelfClassifier(SmallResNet(), 10, dtype="half")

    @pytest.mark.parametrize(
        ("instructions", "capability", "expected"),
        [
            ({"avx512_bf16": True, "amx_bf16": False}, None, "bfloat16"),
            ({"avx512_bf16": False, "amx_bf16": True}, None, "bfloat16"),
            ({"avx512_bf16": False, "avx512_vnni": True}, None, "float32"),
            ({}, (8, 0), "bfloat16"),
            ({"avx512_bf16": True}, (7, 5), "float32"),  # the GPU computes, not the CPU
        ],
    )
    def test_auto_is_what_is_fast_here(self, monkeypatch, instructions, capability, expected):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
        assert classifier(dtype="auto").freeze().network.fc.weight.dtype == getattr(torch, expected)
        assert digits_denoiser(False, dtype="auto").network.dtype == getattr(torch, expected)

    @pytest.mark.parametrize("tokens", [64, 600])
    @torch.no_grad()
    def test_attention_in_bfloat16_is_within_its_rounding(self, monkeypatch, tokens):
        """Against float64 of the same numbers, and found by what looks for PyTorch's attention."""
        monkeypatch.setattr(tuning, "_multiplies_halves", lambda: True)
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, tokens, 3, 64).transpose(1, 2).bfloat16() for _ in range(3))
        expected = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
        found = tuning.attention(q, k, v)
        assert found.dtype == torch.bfloat16
        error = (found - expected).norm() / expected.norm()
        assert 0 < error < 0.01  # two roundings of 2^-9, of scores and of probabilities
        seen = []

        class Look(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with Look():
            tuning.attention(q, k, v)
        assert nn.functional.scaled_dot_product_attention in seen


class TestNoiseAhead:
    def test_the_numbers_are_the_same_and_one_set_ahead(self):
        plain, ahead = (SampleStreams([3, 4, 5], [7, 0, 9], (2, 4, 4), ahead=a) for a in (False, True))
        for _ in range(5):
            assert torch.equal(ahead(), plain())
        assert plain._thread is None
        assert ahead._next.result().shape == (3, 2, 4, 4)

    def test_a_fault_of_the_thread_reaches_the_sampler(self):
        class FailsTheSecondTime:
            calls = 0

            def standard_normal(self, out, dtype):
                self.calls += 1
                if self.calls == 2:
                    raise RuntimeError("no more numbers")

        streams = SampleStreams([0], [0], (1,), ahead=True)
        streams.generators = [FailsTheSecondTime()]
        streams()
        with pytest.raises(RuntimeError, match="no more numbers"):
            streams()

    def test_threads_end_with_the_streams(self):
        before = threading.active_count()
        streams = [SampleStreams([0], [0], (1,), ahead=True) for _ in range(3)]
        for stream in streams:
            stream()
        assert threading.active_count() == before + 3
        threads = [t for stream in streams for t in stream._thread._threads]
        del stream, streams
        for thread in threads:
            thread.join(10)
        assert threading.active_count() == before


class TestGroupNorm:
    @pytest.mark.parametrize(("channels", "side"), [(32, 8), (64, 4), (96, 8), (256, 8), (64, 40)])
    def test_is_pytorchs_whatever_the_shape(self, channels, side):
        torch.manual_seed(0)
        norm = GroupNorm(channels)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        x = torch.randn(3, channels, side, side) * 2 + 5
        scale, shift = torch.randn(2, 3, channels, 1, 1)
        expected = nn.functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
        for memory in (torch.contiguous_format, torch.channels_last):
            source = x.to(memory_format=memory)
            torch.testing.assert_close(norm(source).double(), expected, atol=1e-4, rtol=1e-4)
            scaled = expected * (1 + scale.double()) + shift.double()
            torch.testing.assert_close(norm(source, scale, shift).double(), scaled, atol=2e-4, rtol=1e-4)

    @pytest.mark.parametrize(("channels", "side"), [(32, 8), (96, 8), (256, 8), (64, 40)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_of_halves_is_rounded_once(self, channels, side, dtype):
        """Against float64, of the same halves: the result is off by its own rounding, with its gradient."""
        torch.manual_seed(0)
        norm = GroupNorm(channels)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        x = (torch.randn(3, channels, side, side) * 2 + 5).to(dtype, memory_format=torch.channels_last)
        source, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        expected = nn.functional.group_norm(exact, 32, norm.weight.double(), norm.bias.double(), norm.eps)
        found, half_unit = norm(source), torch.finfo(dtype).eps / 2
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1.01 * half_unit)
        direction = torch.randn_like(x)
        (slope,) = torch.autograd.grad(found, source, direction)
        (true_slope,) = torch.autograd.grad(expected, exact, direction.double())
        torch.testing.assert_close(slope.double(), true_slope, atol=4 * half_unit, rtol=2 * half_unit)

    @pytest.mark.parametrize("channels_last", [True, False])
    @pytest.mark.parametrize("side", [8, 32, 64])
    @pytest.mark.parametrize("mean", [0.0, 10.0, 100.0, 1000.0, -1000.0])
    def test_is_accurate_where_the_mean_exceeds_the_deviation(self, mean, side, channels_last):
        """The mean square minus the squared mean is off by 0.004 at 100 and 0.3 at 1,000, PyTorch's own kernel by 1,000 there."""
        norm, generator = GroupNorm(64), torch.Generator().manual_seed(0)
        x = torch.randn(3, 64, side, side, generator=generator)
        x[1:] += mean  # the first sample stays as it is, whatever happens to the others
        x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
        wide = x.detach().double().requires_grad_()
        expected, found = nn.functional.group_norm(wide, 32, eps=norm.eps), norm(x)
        torch.testing.assert_close(found.double(), expected, atol=1e-5 + 2e-7 * abs(mean), rtol=1e-5)
        torch.testing.assert_close(found[:1], norm(x[:1]), atol=0, rtol=0)
        slopes = torch.randn(x.shape, generator=generator)
        (gradient,) = torch.autograd.grad(found, x, slopes)
        (exact,) = torch.autograd.grad(expected, wide, slopes.double())
        torch.testing.assert_close(gradient.double(), exact, atol=2e-4, rtol=1e-4)


class TestThreads:
    def test_cores_are_shared_among_the_processes_of_a_machine(self):
        assert sensible_threads(1, 8, {}).count == 8
        assert sensible_threads(4, 8, {}).count == 2
        assert sensible_threads(16, 8, {}).count == 1

    def test_what_is_stated_stays_but_for_what_torchrun_sets_by_itself(self):
        assert sensible_threads(2, 8, {"OMP_NUM_THREADS": "1"}) is None
        torchrun = {"TORCHELASTIC_RUN_ID": "none"}
        assert sensible_threads(2, 8, torchrun | {"OMP_NUM_THREADS": "1"}).count == 4
        assert sensible_threads(2, 8, torchrun | {"OMP_NUM_THREADS": "3"}) is None

    def test_slurm_binds_its_tasks_itself(self):
        assert sensible_threads(4, 8, {"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "6"}).count == 6

    def test_hyper_threads_of_a_core_count_once(self, monkeypatch):
        """Four logical CPUs, 0 and 2 on one core, 1 and 3 on another; the process may use three of them."""
        topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        files = {topology.format(number): f"{number % 2},{number % 2 + 2}\n" for number in range(4)}
        monkeypatch.setattr(distributed, "Path", lambda name: SimpleNamespace(read_text=lambda: files[name]))
        monkeypatch.setattr(distributed, "available_cores", lambda: 8)
        for bound, cores in (({0, 1, 2}, 2), ({1, 3}, 1)):
            monkeypatch.setattr(os, "sched_getaffinity", lambda process, bound=bound: bound)
            assert distributed.physical_cores() == cores

    def test_a_container_has_the_cores_of_its_quota(self, tmp_path):
        quota = tmp_path / "cpu.max"
        quota.write_text("50000 100000\n")
        assert available_cores(quota) == 1
        quota.write_text("max 100000\n")
        assert available_cores(quota) == available_cores(tmp_path / "none")
