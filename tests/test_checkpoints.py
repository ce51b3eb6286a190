"""Every format in which weights come, and files that are none of them or mean harm."""

import io
import json
import os
import pickle
import re
from collections import OrderedDict

import httpx2 as httpx
import huggingface_hub
import lightning as L
import numpy as np
import pytest
import timm
import torch
import torchvision
from huggingface_hub import errors as hub_errors
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors.torch import save_file
from torch import nn

from calib_guidance.callbacks.exact_resume import AtomicCheckpointIO
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.evaluation.features import InceptionFeatures
from calib_guidance.networks import SmallResNet
from calib_guidance.weights import pickles, registry
from calib_guidance.weights.io import (
    CheckpointError,
    load_weights,
    read_weights,
    save_weights,
    tensors_only,
)
from tests.edm_files import edm_bytes, edm_modules


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def state():
    torch.manual_seed(0)
    return SmallResNet(widths=(8, 16, 16), blocks=1).state_dict()


class TestFormats:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize(
        "nest",
        [
            lambda s: s,
            lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
            lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s, "opt": {}, "args": None},
            lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
            lambda s: OrderedDict((f"module.{k}", v) for k, v in s.items()),
            lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
            lambda s: {"n_averaged": torch.tensor(7)} | {f"module.{k}": v for k, v in s.items()},
            lambda s: {f"module.module.{k}": v for k, v in s.items()},
            lambda s: {"params": {k: v + 1 for k, v in s.items()}, "params_ema": s},
            lambda s: {"params": s},
            lambda s: {"state_dict": s | {"stem._extra_state": None}},
        ],
    )
    def test_files_of_torch(self, tmp_path, state, nest, zipped):
        (tmp_path / "a.pth").write_bytes(torch_bytes(nest(state), _use_new_zipfile_serialization=zipped))
        same(read_weights(tmp_path / "a.pth").state, state)

    def test_half_precision_options_of_training_and_files_without_batch_counts(self, tmp_path, state):
        import argparse

        options = argparse.Namespace(lr=1e-4)
        older = {k: v.half() if v.is_floating_point() else v for k, v in state.items() if "num_batches" not in k}
        torch.save({"model": older, "args": options}, tmp_path / "a.pt")
        network = SmallResNet(widths=(8, 16, 16), blocks=1)
        load_weights(network, tmp_path / "a.pt")
        for name, value in network.state_dict().items():
            expected = older[name].float() if name in older else torch.tensor(0)
            assert torch.equal(value, expected), name

    def test_safetensors_complete_in_shards_and_in_folders(self, tmp_path, state):
        names = sorted(state)
        complete, shards = tmp_path / "complete", tmp_path / "shards"
        complete.mkdir()
        shards.mkdir()
        save_file(state, complete / "diffusion_pytorch_model.safetensors")
        save_file({k: v.half() for k, v in state.items()}, complete / "diffusion_pytorch_model.fp16.safetensors")
        parts = {"m-00001-of-00002.safetensors": names[:5], "m-00002-of-00002.safetensors": names[5:]}
        for file, keys in parts.items():
            save_file({k: state[k] for k in keys}, shards / file)
        index = shards / "m.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {k: file for file, keys in parts.items() for k in keys}}))
        for path in (complete, complete / "diffusion_pytorch_model.safetensors", shards, index):
            same(read_weights(path).state, state)
        (shards / "m-00002-of-00002.safetensors").rename(tmp_path / "away.safetensors")
        with pytest.raises(CheckpointError, match="1 of 2 shards are missing: m-00002"):
            read_weights(shards)
        save_file({names[5]: state[names[5]]}, shards / "m-00002-of-00002.safetensors")
        with pytest.raises(CheckpointError, match="do not hold what it lists"):
            read_weights(shards)
        index.write_text(json.dumps({"weight_map": {names[0]: "../away.safetensors"}}))
        with pytest.raises(CheckpointError, match="files outside of its folder"):
            read_weights(shards)
        (complete / "diffusion_pytorch_model.safetensors").unlink()
        save_file(state, complete / "other.safetensors")
        with pytest.raises(
            CheckpointError, match="found diffusion_pytorch_model.fp16.safetensors, other.safetensors: name"
        ):
            read_weights(complete)

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_pickles_of_edm(self, tmp_path, golden, protocol):
        weights = golden("edm_net").weights()
        blob = edm_bytes(weights, protocol, {"img_resolution": 8, "label_dim": 10}, dataset_kwargs={"path": "x.zip"})
        assert b"the source code in the pickle ran" in blob
        (tmp_path / "edm.pkl").write_bytes(blob)
        read = read_weights(tmp_path / "edm.pkl")
        same(read.state, weights)
        assert read.arguments == {"img_resolution": 8, "label_dim": 10}

    def test_the_part_of_a_training_checkpoint_that_fits(self, tmp_path):
        torch.manual_seed(0)
        network, other = SmallResNet(widths=(8, 16, 16), blocks=1), SmallResNet(widths=(8, 8, 8), blocks=1)
        module = L.LightningModule()
        module.classifier, module.second = nn.ModuleDict({"network": network}), other
        trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        found = SmallResNet(widths=(8, 16, 16), blocks=1)
        load_weights(found, tmp_path / "last.ckpt")
        same(found.state_dict(), network.state_dict())
        with pytest.raises(
            CheckpointError, match=r"no part fits SmallResNet.*it has classifier.network, second.*ExportWeights"
        ):
            load_weights(SmallResNet(widths=(8, 8, 16), blocks=1), tmp_path / "last.ckpt")
        content = torch.load(tmp_path / "last.ckpt", weights_only=True)
        content["weights_metadata"] = {"classifier.network": {"temperature": "2.0"}, "second": {}}
        torch.save(content, tmp_path / "noted.ckpt")
        load_weights(found, tmp_path / "noted.ckpt", temperature=2.0)
        with pytest.raises(
            CheckpointError, match="was trained with temperature: 2.0, the configuration says temperature: 1.0"
        ):
            load_weights(found, tmp_path / "noted.ckpt", temperature=1.0)
        module.second = network
        content["state_dict"] = module.state_dict()
        torch.save(content, tmp_path / "twice.ckpt")
        with pytest.raises(CheckpointError, match="several parts fit: classifier.network, second SmallResNet"):
            load_weights(found, tmp_path / "twice.ckpt")

    @pytest.mark.parametrize("lightning", [False, True])
    @pytest.mark.parametrize("prefix", ["", "model.", "net.backbone."])
    def test_a_prefix_and_no_batch_counts(self, tmp_path, state, prefix, lightning):
        content = {f"{prefix}{name}": value for name, value in state.items() if "num_batches" not in name}
        if lightning:
            content = {
                "pytorch-lightning_version": "2.6",
                "state_dict": content | ({"head.weight": torch.zeros(2)} if prefix else {}),
            }
        torch.save(content, tmp_path / "a.pt")
        network = SmallResNet(widths=(8, 16, 16), blocks=1)
        load_weights(network, tmp_path / "a.pt")
        same(network.state_dict(), state)

    def test_a_published_network_below_a_prefix_is_identified(self):
        with torch.device("meta"):
            shapes = torchvision.models.resnet50().state_dict()
        assert "resnet50_v2" in registry.identify({f"model.{name}": value for name, value in shapes.items()})


class TestOtherFiles:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
    def test_weights_that_are_not_finite(self, tmp_path, state, value, dtype):
        name = next(name for name, each in state.items() if each.is_floating_point())
        state[name].view(-1)[0] = value
        state = {key: each.to(dtype) if each.is_floating_point() else each for key, each in state.items()}
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=f"a.pt holds NaN or infinity: {name}. .*name another"):
            read_weights(tmp_path / "a.pt")

    def test_masks_of_minus_infinity_are_weights(self, tmp_path):
        torch.save({"mask": torch.full((2, 2), -float("inf"))}, tmp_path / "a.pt")
        assert read_weights(tmp_path / "a.pt").state["mask"].shape == (2, 2)

    def test_quantized_weights(self, tmp_path, state):
        name = next(name for name, each in state.items() if each.is_floating_point())
        torch.save(state | {name: state[name].to(torch.int8)}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=f"a.pt holds torch.int8 .* torch.float32: {name}. Quantized"):
            load_weights(SmallResNet(widths=(8, 16, 16), blocks=1), tmp_path / "a.pt")

    def test_files_that_refer_to_themselves(self, tmp_path):
        loop, other = {}, {"epoch": 1}
        loop |= {"model": loop, "state_dict": other}
        other["model"] = loop
        torch.save(loop, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="expected a mapping of names to tensors, found a mapping with"):
            read_weights(tmp_path / "a.pt")
        for depth in (0, 64):  # a module that holds itself, and one of 2**64 modules
            with edm_modules() as (_, rebuild):

                class Persistent:
                    def __init__(self, modules):
                        self.modules = modules

                    def __reduce__(self, rebuild=rebuild):
                        parts = {"_parameters": {}, "_buffers": {}, "_modules": self.modules}
                        return rebuild, ({"type": "class", "class_name": "N", "state": parts},)

                modules = {}
                network = Persistent(modules)
                if depth == 0:
                    modules["a"] = Persistent(modules)
                for _ in range(depth):
                    network = Persistent({"a": network, "b": network})
                (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": network}))
            with pytest.raises(CheckpointError, match="a.pkl: not a weights file"):
                read_weights(tmp_path / "a.pkl")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "an empty file"),
            (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer: run `git lfs pull`"),
            (b"\x1f\x8b\x08" + bytes(20), "a gzip archive"),
            (b"a" * 257 + b"ustar" + b"\0" * 300, "a tar archive"),
            (b"\x93NUMPY\x01\x00", r"a file that begins with b'\\x93NUMPY"),
        ],
    )
    def test_another_kind_of_file_is_named(self, tmp_path, content, message):
        (tmp_path / "128x128_diffusion.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"128x128_diffusion.pt: expected weights.*found {message}"):
            read_weights(tmp_path / "128x128_diffusion.pt")

    def test_truncated_files(self, tmp_path, state, golden):
        save_file(state, tmp_path / "a.safetensors")
        files = {
            "zip.pt": torch_bytes(state),
            "legacy.pt": torch_bytes(state, _use_new_zipfile_serialization=False),
            "edm.pkl": edm_bytes(golden("edm_net").weights()),
            "a.safetensors": (tmp_path / "a.safetensors").read_bytes(),
        }
        for name, content in files.items():
            for size in (len(content) // 2, len(content) - 20, 600):
                (tmp_path / name).write_bytes(content[:size])
                with pytest.raises(CheckpointError, match=f"{name}: .*truncated"):
                    read_weights(tmp_path / name)

    def test_what_holds_no_weights(self, tmp_path):
        for content, found in (
            ([1, 2], "list"),
            ({"epoch": 3, "args": {}}, "a mapping with args, epoch"),
            ({}, "a mapping"),
        ):
            torch.save(content, tmp_path / "a.pt")
            with pytest.raises(CheckpointError, match=f"expected a mapping of names to tensors, found {found}"):
                read_weights(tmp_path / "a.pt")
        for content, found in (([1], "found one of list"), ({"G": 1}, "found one with G"), ({"ema": 1}, "found int")):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
            with pytest.raises(CheckpointError, match=found):
                read_weights(tmp_path / "a.pkl")

    def test_a_missing_published_file_says_where_it_is(self, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"no such weights file; the public adm_imagenet128 is at https://openaipublic.*MIT"
        ):
            read_weights(tmp_path / "128x128_diffusion.pt")
        with pytest.raises(CheckpointError, match="see checkpoints/README.md"):
            read_weights(tmp_path / "mine.pt")

    def test_another_published_file_is_recognized(self, tmp_path):
        torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="missing: .*names and shapes of resnet50_v1 or resnet50_v2"):
            load_weights(SmallResNet(), tmp_path / "a.pth")


class TestHarm:
    """What is unpickled runs no code, on any path; that the code would run otherwise is tested too."""

    def evil_files(self, marker, state, golden):
        evil = Evil(marker)
        archive = torch_bytes({"state_dict": state, "hyper_parameters": evil, "pytorch-lightning_version": "2.6"})
        edm = edm_bytes(golden("edm_net").weights(), loss_fn=evil)
        blob = torch_bytes(evil, _use_new_zipfile_serialization=False)
        with edm_modules() as (_, rebuild):

            class Inside:
                def __reduce__(self):
                    return torch.storage._load_from_bytes, (blob,)

            class Persistent:
                def __reduce__(self):
                    return rebuild, ({"type": "class", "class_name": "N", "state": {"_modules": {"a": evil}}},)

            storage, attribute = pickle.dumps({"ema": Inside()}), pickle.dumps({"ema": Persistent()})
        return {
            "zip.pt": archive,
            "lightning.ckpt": archive,
            "nested.pth": torch_bytes({"model": {"a": evil}}),
            "legacy.pth": torch_bytes({"state_dict": evil}, _use_new_zipfile_serialization=False),
            "DiT-XL-2-256x256.pt": torch_bytes({"ema": state, "args": evil}),
            "edm.pkl": edm,
            "edm-attribute.pkl": attribute,
            "edm-storage.pkl": storage,
            "edm-plain.pkl": pickle.dumps({"ema": evil}),
            "eval.pkl": b'\x80\x04cbuiltins\neval\n(S\'__import__("os").system("touch %s")\'\ntR.'
            % str(marker).encode(),
        }

    def test_on_each_format(self, tmp_path, state, golden):
        marker = tmp_path / "ran"
        files = self.evil_files(marker, state, golden)
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match="without executing code") as refused:
                read_weights(tmp_path / name)
            # It names what was asked for, and does not hand on torch's advice to execute it after all.
            assert re.search(r"system|eval|exec", str(refused.value)), name
            assert "arbitrary code" not in str(refused.value), name
            with pytest.raises(CheckpointError, match="without executing code"):
                load_weights(SmallResNet(), tmp_path / name)
            assert not marker.exists(), name
        pickle.loads(files["edm-plain.pkl"])  # the test would notice
        assert marker.exists()

    def test_a_pickle_changes_nothing_that_it_names(self, tmp_path):
        """Attributes can be set on whatever a pickle names, by the opcode that sets an object's state."""

        def build(target):
            return b"\x80\x02c%s\n(N}(X\x04\x00\x00\x00evilK\x01utb." % target

        for target in (
            b"torch._utils\n_rebuild_tensor_v2",
            b"torch_utils.persistence\n_reconstruct_persistent_obj",
            b"torch.nn.modules.container\nModuleDict",
            b"dnnlib.util\nEasyDict",
            b"collections\nOrderedDict",
            b"numpy\ndtype",
        ):
            (tmp_path / "a.pkl").write_bytes(build(target))
            with pytest.raises(CheckpointError):
                read_weights(tmp_path / "a.pkl")
        named = (torch._utils._rebuild_tensor_v2, nn.ModuleDict, OrderedDict, np.dtype, *vars(pickles).values())
        assert not any(hasattr(thing, "evil") for thing in named)

    def test_tensors_outside_of_their_storage(self, tmp_path):
        tensor = torch.arange(4.0)
        storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)

        class Outside:
            def __reduce__(self):
                return torch._utils._rebuild_tensor_v2, (storage, 2, (4,), (1,), False, OrderedDict())

        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": Outside()}))
        with pytest.raises(CheckpointError, match="out of bounds"):
            read_weights(tmp_path / "a.pkl")

    @pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18.tv_in1k"])
    def test_weights_by_name(self, tmp_path, monkeypatch, name):
        """The library finds a harmful file where it caches its downloads."""
        marker, cache = tmp_path / "ran", tmp_path / "hub"
        evil = torch_bytes({"fc.weight": Evil(marker)}, _use_new_zipfile_serialization=False)
        if name.startswith("torchvision"):
            file = cache / "checkpoints" / "resnet18-f37072fd.pth"
            file.parent.mkdir(parents=True)
            monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache))
            weights = "IMAGENET1K_V1"
        else:
            file, weights = tmp_path / "pytorch_model.bin", "pretrained"

            def download(repo_id=None, filename=None, **_):
                if filename.endswith(".safetensors"):
                    raise hub_errors.EntryNotFoundError("no such file")
                return str(file)

            monkeypatch.setattr(timm.models._hub, "hf_hub_download", lambda *a, **k: download(*a, **k))
        file.write_bytes(evil)
        with pytest.raises(CheckpointError, match=rf"{name}: its weights {weights} could not be fetched and loaded"):
            OffTheShelfClassifier(name, weights=weights)
        assert not marker.exists()
        good = timm.create_model("resnet18") if name.startswith("timm") else torchvision.models.resnet18()
        torch.save(good.state_dict(), file)
        found = OffTheShelfClassifier(name, weights=weights)
        same(found.network.state_dict(), good.state_dict())

    def test_libraries_that_ask_for_execution_do_not_get_it(self, tmp_path, monkeypatch):
        torch.save(Evil(tmp_path / "ran"), tmp_path / "a.pt")
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        with pytest.raises(pickle.UnpicklingError), tensors_only():
            torch.load(tmp_path / "a.pt", weights_only=False)
        assert not (tmp_path / "ran").exists()
        assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ

    def test_inception_weights(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some libraries set it
        torch.save(Evil(tmp_path / "ran"), tmp_path / "weights-inception-2015-12-05-6726825d.pth")
        with pytest.raises(CheckpointError):
            InceptionFeatures(str(tmp_path / "weights-inception-2015-12-05-6726825d.pth"))
        assert not (tmp_path / "ran").exists()

    def test_resuming_a_training(self, tmp_path, monkeypatch):
        torch.save({"state_dict": {}, "loops": Evil(tmp_path / "ran")}, tmp_path / "last.ckpt")
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some libraries set it
        with pytest.raises(pickle.UnpicklingError):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
        assert not (tmp_path / "ran").exists()
        asked = []
        monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", lambda self, path, where, only: asked.append(only))
        AtomicCheckpointIO().load_checkpoint("https://example.org/last.ckpt")
        assert asked == [True]


class TestHub:
    def test_files_folders_and_revisions(self, tmp_path, monkeypatch, state):
        save_file(state, tmp_path / "model.safetensors")
        asked = []
        monkeypatch.setattr(
            huggingface_hub,
            "hf_hub_download",
            lambda repo, path, revision: asked.append((repo, path, revision)) or str(tmp_path / path),
        )
        monkeypatch.setattr(
            huggingface_hub,
            "snapshot_download",
            lambda repo, revision, allow_patterns: (
                asked.append((repo, revision, allow_patterns)) or str(tmp_path.parent)
            ),
        )
        same(read_weights("hf://owner/repo.v1/model.safetensors@abc").state, state)
        same(read_weights(f"hf://owner/repo/{tmp_path.name}").state, state)
        folder = [f"{tmp_path.name}/*.json", f"{tmp_path.name}/*.safetensors"]
        assert asked == [("owner/repo.v1", "model.safetensors", "abc"), ("owner/repo", None, folder)]
        for wrong in ("hf://owner", "hf://owner/repo/../x.pt", "hf://"):
            with pytest.raises(CheckpointError, match="expected hf://OWNER/REPO/PATH"):
                read_weights(wrong)

    def test_errors_name_cause_and_cure(self, monkeypatch):
        response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
        cases = {
            hub_errors.GatedRepoError(
                "gated", response=response
            ): "accept its terms at https://huggingface.co/owner/repo",
            hub_errors.RepositoryNotFoundError("no", response=response): "no repository owner/repo, or a private one",
            hub_errors.RevisionNotFoundError("no", response=response): "owner/repo has no revision 'main'",
            hub_errors.RemoteEntryNotFoundError("no", response=response): "owner/repo has no file a.pt",
            hub_errors.LocalEntryNotFoundError("offline"): "cannot be reached.*name the local file",
            hub_errors.HFValidationError("bad name"): "expected hf://OWNER/REPO/PATH.*bad name",
            hub_errors.OfflineModeIsEnabled("offline mode"): "could not be fetched.*offline mode.*name the local file",
            httpx.ReadTimeout("slow"): "could not be fetched.*slow",
        }
        for error, message in cases.items():

            def fail(*_, error=error, **__):
                raise error

            monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
            with pytest.raises(CheckpointError, match=message):
                read_weights("hf://owner/repo/a.pt@main")


def test_weights_can_be_read_by_those_who_may_read_other_files(tmp_path):
    other, path = tmp_path / "other", tmp_path / "w.safetensors"
    other.write_text("")
    save_weights(nn.Linear(2, 2), path, kind="test")
    assert path.stat().st_mode == other.stat().st_mode
    assert read_weights(path).metadata["kind"] == "test"
