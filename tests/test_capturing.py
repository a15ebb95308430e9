"""Captured steps without a GPU, on fixed memory: who uses which, when they are dropped, when they are used."""

import gc
import weakref

import pytest
import torch

from nextscale.backends.cuda.graphs import MOST_IDLE, GraphPool
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.sampling import SampleConfig
from nextscale.pipeline import Pipeline
from nextscale.sampling.capturing import MOST_SEQUENCES, Capturing, check_capture
from nextscale.sampling.sampler import ModelPredictor
from nextscale.transformer.context import index_scales
from nextscale.transformer.feed_forward.thresholds import Thresholds
from tests.conftest import randomised, tiny_config
from tests.test_dynamic import dynamic_pipeline


class Broken(Exception):
    pass


def break_at_scale_2(logits_BNV, k):
    if k == 2:
        raise Broken
    return logits_BNV


def test_batches_of_all_sizes_side_by_side_with_errors_and_dropped_generators():
    """Images are those of plain steps, and no more than some steps stay when nothing uses them."""
    pipeline = randomised(tiny_config(depth=1))
    labels = [[i % 5] * (1 + i % 7) for i in range(14)]
    plain = [pipeline.sample(batch, seed=i).tokens for i, batch in enumerate(labels)]
    pipeline.capture()
    dropped = []
    for i, batch in enumerate(labels):
        dropped.append(pipeline.sample_scales(labels[-1 - i], seed=99))
        next(dropped[-1])
        with pytest.raises(Broken):
            pipeline.sample(batch, logits_processors=[break_at_scale_2])
        assert torch.equal(pipeline.sample(batch, seed=i).tokens, plain[i])
        del dropped[:-2]
    dropped.clear()
    gc.collect()
    pool = pipeline._capturing.pool
    assert len(pool._idle) == MOST_IDLE
    for count in (7, 1, 9, 7, 2, 3, 7):
        pipeline.sample([1] * count, cfg=0.0)
    assert [sequences for (sequences, _), _ in pool._idle] == [(9,) * 4, (2,) * 4, (3,) * 4, (7,) * 4]


@torch.no_grad()
def test_thresholds_have_steps_of_their_own():
    pipeline = dynamic_pipeline()
    model, pool = pipeline.transformer, GraphPool()
    values = model.condition.parse([0, 1, 4])
    inputs = pipeline.tokenizer.teacher_inputs(torch.arange(90).view(3, 30) % 32)
    for tau in (1.0, 0.2, None, 1.0):
        thresholds = None if tau is None else Thresholds((1.0, 1.0, tau, tau))
        captured, plain = pool.create_predictor(model, values, thresholds), ModelPredictor(model, values, thresholds)
        for k, (start, end) in enumerate(model.pyramid.spans):
            x_BNC = inputs[:, start - 1 : end - 1] if k else None
            assert torch.equal(captured(x_BNC, k).logits_BNV, plain(x_BNC, k).logits_BNV), (tau, k)
        del captured
    assert len(pool._idle) == 3


def test_what_a_step_reads_from_a_cache_lives_as_long_as_the_steps():
    model, pool = randomised(tiny_config()).transformer, GraphPool()
    index_scales.cache_clear()  # steps of other tests may hold the tensor that is in the cache
    predictor = pool.create_predictor(model, model.condition.parse([1]))
    held = weakref.ref(index_scales(model.pyramid, model.pos_embed.device))
    index_scales.cache_clear()
    gc.collect()
    assert held() is not None
    del predictor
    pool._idle.clear()
    gc.collect()
    assert held() is None


def test_auto_captures_small_batches_from_the_second_on():
    model, settings, capturing = randomised(tiny_config()).transformer, SampleConfig(), Capturing()
    choices = [capturing.choose("auto", model, settings, None, 2) for _ in range(3)]
    assert choices == [None, capturing.pool.create_predictor, capturing.pool.create_predictor]
    for images, changed in ((MOST_SEQUENCES // 2 + 1, settings), (2, SampleConfig(prune=(0.5,)))):
        assert [capturing.choose("auto", model, changed, None, images) for _ in range(2)] == [None, None]
    unguided = SampleConfig(cfg=0.0)
    assert [capturing.choose("auto", model, unguided, None, MOST_SEQUENCES) is None for _ in range(2)] == [True, False]


def test_capture_is_refused_where_there_are_no_graphs(tiny_folder, tmp_path, capsys):
    command = f"sample {tiny_folder} --labels 1 --out {tmp_path / 'a.png'} --device cpu --capture"
    assert main([*command.split(), "on"]) == 2
    assert "capture on needs a CUDA device, and this is cpu: use auto or off" in capsys.readouterr().err
    assert main([*command.split(), "auto"]) == 0
    with pytest.raises(UserError, match="there is no capture 'yes'; use auto, on, off"):
        Pipeline.from_pretrained(tiny_folder, device="cpu", capture="yes")
    check_capture("on", torch.device("cuda", 1))
