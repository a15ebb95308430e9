"""What replaces waits for a GPU, on the CPU: checks before the copy, one vector for the log."""

import pytest
import torch

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.training import TrainConfig
from nextscale.data.examples import MemoryExamples
from nextscale.training.engine.log import StepMetrics
from nextscale.training.engine.loop import train
from nextscale.training.transformer import TransformerTask
from nextscale.training.validation import validate
from tests.conftest import randomised, tiny_config


def create_task(tokens_NL):
    pipeline = randomised(tiny_config("1,2"))
    examples = MemoryExamples(tokens=tokens_NL, label=torch.zeros(len(tokens_NL), dtype=torch.int64))
    config = TrainConfig(steps=2, batch_size=4, micro_batch=2)
    return TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, config), config


@pytest.mark.parametrize("wrong", [32, -1])
def test_tokens_beyond_the_codebook_are_refused_before_they_go_to_the_device(tmp_path, wrong):
    tokens = torch.zeros(8, 5, dtype=torch.int64)
    tokens[:, 3] = wrong
    task, config = create_task(tokens)
    with pytest.raises(UserError, match=rf"tokens must lie in 0 to 31; got {min(wrong, 0)}\.\.{max(wrong, 0)}"):
        train(task, config, tmp_path)
    with pytest.raises(UserError, match="tokens must lie in 0 to 31"):
        validate(task, task.examples, 8, World())


def test_the_log_averages_micro_batches_by_name():
    metrics = StepMetrics()
    for loss, scales, share in [(1.0, [1.0, 2.0], 0.25), (5.0, [3.0, 8.0], 0.75)]:
        scalars = {"loss_per_scale": torch.tensor(scales), "accuracy": torch.tensor(loss / 10)}
        metrics.add(torch.tensor(loss), scalars, share)
    values = metrics.average(World())
    assert values.pop("accuracy") == pytest.approx(0.4)
    assert values == {"loss": 4.0, "loss_per_scale": [2.5, 6.5]}
