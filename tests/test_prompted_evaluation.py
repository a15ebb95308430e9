"""Models that read texts are measured on images drawn from the captions of the reference set."""

import pytest
import torch

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.pictures import to_uint8
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.condition import ConditionConfig
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.sampling import SampleConfig
from nextscale.encoders.classifier import Classifier
from nextscale.evaluation.images import PromptedImages, open_images
from nextscale.evaluation.run import evaluate
from tests.conftest import randomised, tiny_config
from tests.test_captions import write_captioned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompted")
    condition = ConditionConfig("text", max_tokens=6)
    randomised(tiny_config(condition=condition, mixers=("attention", "cross-attention"))).save_pretrained(folder / "m")
    write_captioned(folder / "x.parquet", count=12)
    torch.manual_seed(0)
    Classifier(ClassifierConfig(8, (8,), 4), ("a", "b", "c")).save(folder / "classifier")
    return folder


def test_images_are_drawn_from_the_captions_of_the_reference(folder, tmp_path):
    settings = SampleConfig(seed=5)
    images = open_images(str(folder / "m"), 20, 0, settings, 4, captions_of=str(folder / "x.parquet"))
    assert isinstance(images, PromptedImages)
    prompts = [f"{i}.0" for i in range(12) if i % 4]  # row i has i % 4 captions
    assert images.prompts == prompts
    expected = images.pipeline.sample(prompts=(prompts * 3)[:20], config=settings)
    assert torch.equal(images.fetch(0, 20), to_uint8(expected.tensor))
    assert torch.equal(images.fetch(13, 16), images.fetch(0, 20)[13:16])
    config = EvaluationConfig(count=20, references=5, sampling=settings)
    networks, out = [str(folder / "classifier")], tmp_path / "r.json"
    report = evaluate(str(folder / "m"), out, networks, [str(folder / "x.parquet")], config, World())
    assert report["measures"]["classifier"]["classifier_fd"] > 0
    assert not any("read_as_asked" in name for name in report["measures"]["classifier"])


def test_a_reference_without_captions_is_refused(folder):
    with pytest.raises(UserError, match="m draws images from captions: give a --reference that has some"):
        open_images(str(folder / "m"), 4, 0, SampleConfig(), 4)
    with pytest.raises(UserError, match="digits have no captions"):
        open_images(str(folder / "m"), 4, 0, SampleConfig(), 4, captions_of="digits")
