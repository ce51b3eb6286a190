"""What the parts of a sampling run share."""

from types import SimpleNamespace

import pytest
from torch import nn

from calib_guidance.callbacks import SampleWriter
from calib_guidance.errors import ConfigurationError
from calib_guidance.runs import RunFolder
from calib_guidance.runs.context import UNREADABLE, SamplingContext
from calib_guidance.tasks import GuidedSampling
from tests.test_run_folder import table


def test_who_registers_again_stays_registered_once():
    """Callbacks register in setup, of every run of the same trainer."""
    context, callback = SamplingContext(), SampleWriter()
    for _ in range(2):
        context.observe(callback._observe)
        context.measure(callback)
    assert context.observers == [callback._observe]
    assert context.measurements == [callback]


def test_without_a_run_folder_shards_are_taken_in_order():
    context = SamplingContext([range(0, 3), range(6, 9)])
    assert list(context.take()) == [range(0, 3), range(6, 9)]
    assert list(context.reclaim()) == context.failed() == []


def test_failed_samples_are_those_of_a_complete_run(tmp_path):
    run, context = RunFolder(tmp_path, 3, 6), SamplingContext()
    run.begin({}, {})
    context.store, context.shards = run, run.remaining()
    wrong = {2: "not finite", 5: UNREADABLE}
    found = []
    for shard in context.take():
        failed = [{"index": i, "step": None, "reason": wrong[i]} for i in shard if i in wrong]
        assert run.write(shard, table([i for i in shard if i not in wrong]), failed=failed)
        found.append([sample["index"] for sample in context.failed()])
    assert found == [[], [2]]


@pytest.mark.parametrize(("configuration", "fast_dev_run"), [(None, False), ({}, True)])
def test_nothing_is_written_without_a_configuration_or_in_a_fast_dev_run(tmp_path, configuration, fast_dev_run):
    context = SamplingContext()
    context.configuration = configuration
    module = SimpleNamespace(context=context, check=lambda: None)
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), datamodule=None, fast_dev_run=fast_dev_run)
    with pytest.raises(ConfigurationError, match="calib-guidance predict"):
        SampleWriter().setup(trainer, module, "predict")
    assert not list(tmp_path.iterdir())


def test_progress_within_a_batch():
    """Half of the third batch of 10 is done; what shows it may register again, in another run of the same trainer."""
    shown, module = [], GuidedSampling(nn.Identity(), None)

    def show(done, text):
        shown.append((done, text))

    for _ in range(2):
        module.context.display(show)
    module.context.indices, module.num_done = list(range(10)), 20
    module._show_progress(5, 10)
    assert shown == [(25, "step 5/10")]
