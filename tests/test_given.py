"""Models of captions, edges and several conditions are measured and analysed with what the images of a set give."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.common.pictures import to_uint8
from nextscale.common.rng import make_generator
from nextscale.config.analysis import AnalysisConfig, CopiesConfig
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.condition import ConditionConfig
from nextscale.config.data import DataConfig
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.transformer import ExpertsConfig
from nextscale.config.tune import TuneConfig
from nextscale.data.datasets import load_images, open_dataset
from nextscale.data.given import ImageConditions
from nextscale.encoders.classifier import Classifier
from nextscale.encoders.load import load_feature_network
from nextscale.evaluation.images import ConditionedImages, open_images
from nextscale.evaluation.run import evaluate
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.copies import analyse_copies
from nextscale.research.analysis.errors import analyse_errors
from nextscale.research.analysis.features import analyse_features
from nextscale.research.analysis.load import analyse_load
from nextscale.sampling import build_sampler
from nextscale.sampling.sampler import sample_images
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.tune.measure import ModelMeasurer
from nextscale.tune.options import DENSE
from tests.conftest import randomised, tiny_config
from tests.test_cli import fails

CROSS = ("attention", "cross-attention")
TEXT = ConditionConfig("text", max_tokens=6)
EDGES = ConditionConfig("picture", control="edges", picture_size=(8, 8), layers=0)
SMALL = ConditionConfig("picture", control="low-resolution", picture_size=(8, 8), layers=0)
LETTER = ConditionConfig(num_classes=3)
CONDITIONS = {
    "m": TEXT,
    "edges": EDGES,
    "all": ConditionConfig("combined", parts={"what": LETTER, "edges": EDGES, "small": SMALL, "words": TEXT}),
}
ALL = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, a classifier, and 12 random pictures in folders a, b and c; all but every fourth have a caption."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "real" / ALL[i // 4] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 2, (8, 8, 3), dtype=np.uint8) * 255).save(path)
        path.with_suffix(".txt").write_text(f"{i}.0\n{i}.1" if i % 4 else "")
    for name, condition in CONDITIONS.items():
        experts = {"experts": ExpertsConfig("stmoe", count=3, active=2)} if name == "all" else {}
        mixers = CROSS if condition.gives_sequence else CROSS[:1]
        config = tiny_config(condition=condition, mixers=mixers, **experts)
        randomised(replace(config, class_names=("c", "a", "b") if name == "all" else ())).save_pretrained(folder / name)
    torch.manual_seed(0)
    Classifier(ClassifierConfig(8, (8,), 4), ALL).save(folder / "classifier")
    return folder


def read_batch(folder, rows):
    """Images of these numbers, with captions and the model's labels, as training would give them."""
    images = load_images(str(folder / "real"), 8, captioned=True)
    texts = [f"{i}.0".encode() if i % 4 else b"" for i in rows]
    return {
        "image": images.images_B3HW[rows],
        "label": torch.tensor([(1, 2, 0)[i // 4] for i in rows]),
        "text": torch.tensor([[*text.ljust(5)] for text in texts]),
        "text_length": torch.tensor([len(text) for text in texts]),
    }


@pytest.mark.parametrize("name", CONDITIONS)
def test_samples_have_what_the_images_of_the_reference_give(folder, name):
    """The tokens are those of the values that a training batch of the same images has."""
    rows = list(range(12)) if name == "edges" else [i for i in range(12) if i % 4]
    images = open_images(str(folder / name), 14, 0, SampleConfig(seed=5), 4, given_by=str(folder / "real"))
    assert isinstance(images, ConditionedImages)
    pipeline = images.pipeline
    values = pipeline.transformer.condition.from_batch(read_batch(folder, (rows * 2)[:14]))
    sampler = build_sampler(pipeline.tokenizer, pipeline.transformer, values, SampleConfig(seed=5))
    drawn = images.fetch(0, 14)
    assert torch.equal(drawn, to_uint8(sample_images(sampler).images_B3HW))
    assert torch.equal(images.fetch(7, 11), drawn[7:11])
    assert len({image.sum().item() for image in drawn}) > 10


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_report_names_what_was_given(folder, tmp_path, name):
    """Where classes are among it, the classifier says how many images it reads as they were asked for."""
    config = EvaluationConfig(count=9, references=5)
    networks, real = [str(folder / "classifier")], str(folder / "real")
    report = evaluate(str(folder / name), tmp_path / "r.json", networks, [real], config, World())
    measures = report["measures"]["classifier"]
    assert measures["classifier_fd"] > 0
    assert report["protocol"]["given by"]["where"] == real
    assert ("classifier_read_as_asked" in measures) == (name == "all")


def test_two_models_of_captions_are_compared_with_equal_captions(folder, tmp_path):
    """`--against` the same model gives equal pictures."""
    images, partner = (
        open_images(str(folder / "all"), 6, 0, SampleConfig(), 4, given_by=str(folder / "real")) for _ in range(2)
    )
    assert partner.match_order(images) == ""
    assert torch.equal(images.fetch(0, 6), partner.fetch(0, 6))
    assert torch.equal(images.labels(), torch.tensor([1, 1, 1, 2, 2, 2]))


def test_what_the_reference_does_not_give_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="m draws images from captions of up to 6 tokens: give images to take them fr"):
        open_images(str(folder / "m"), 4, 0, SampleConfig(), 4)
    with pytest.raises(UserError, match="digits have no captions"):
        open_images(str(folder / "m"), 4, 0, SampleConfig(), 4, given_by="digits")
    for condition, message in (
        (ConditionConfig("vector", embedding_width=4), "vectors of width 4, and images of a data set give no vectors"),
        (ConditionConfig("picture", picture_size=(8, 8)), "images of a data set give no control pictures"),
        (ConditionConfig("text", source="words"), "give no texts 'words'"),
        (ConditionConfig("combined", parts={"shape": ConditionConfig(source="shape")}), "give no labels 'shape'"),
    ):
        mixers = CROSS if condition.gives_sequence else CROSS[:1]
        randomised(tiny_config(condition=condition, mixers=mixers)).save_pretrained(tmp_path / condition.kind)
        with pytest.raises(UserError, match=message):
            open_images(str(tmp_path / condition.kind), 4, 0, SampleConfig(), 4, given_by=str(folder / "real"))
    (tmp_path / "d").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "0.png")
    (tmp_path / "d" / "0.txt").write_text("\n")
    with pytest.raises(UserError, match="d has captions without any text"):
        open_images(str(folder / "m"), 4, 0, SampleConfig(), 4, given_by=str(tmp_path / "d"))
    (tmp_path / "d" / "0.txt").write_text("a cat")
    with pytest.raises(UserError, match="do not have the same classes"):
        open_images(str(folder / "all"), 4, 0, SampleConfig(), 4, given_by=str(tmp_path / "d"))


# ---- tuning


def test_candidates_are_measured_on_the_conditions_of_the_reference(folder, tmp_path):
    """Features of the first samples, whose captions are those of random images of the reference."""
    pipeline, real = Pipeline.from_pretrained(folder / "m", device="cpu"), str(folder / "real")
    network, settings = load_feature_network(str(folder / "classifier")), SampleConfig(seed=3)
    reference = open_images(real, 0, 8, settings, 4)
    given = ImageConditions(real, "m", pipeline.config)
    config = TuneConfig(batch=2, shard=4)
    measurer = ModelMeasurer(
        str(folder / "m"), network, reference, settings, config, tmp_path, torch.device("cpu"), given
    )
    features = measurer.extract(DENSE, 4, held_out=False)
    order = torch.randperm(9, generator=make_generator(0, "classes")).tolist()
    captions = [f"{i}.0" for i in range(12) if i % 4]
    drawn = pipeline.sample(prompts=[captions[i] for i in order[:4]], config=settings)
    expected = network(to_uint8(drawn.tensor)).to_dict()["pool"]
    assert torch.allclose(features, expected.float(), atol=1e-5)
    assert torch.equal(measurer.extract(DENSE, 8, held_out=False)[:4], features), "the first ones stay valid"
    assert measurer.measure_speed(DENSE, 1) > 0


def test_the_command_tunes_a_model_of_edges_and_refuses_vectors(folder, tmp_path, capsys):
    shutil.copytree(folder / "edges", tmp_path / "edges")
    options = ["--features", folder / "classifier", "--time", "1s", "--shard", "6", "--batch-size", "2"]
    options += ["--reference", folder / "real", "--device", "cpu"]
    assert main(list(map(str, ["tune", tmp_path / "edges", *options]))) == 0
    found = tmp_path / "edges.tune"
    assert json.loads((found / "results.json").read_text())["rows"]
    assert json.loads((found / "inputs.json").read_text())["given by"]["where"] == str(folder / "real")
    assert Image.open(found / "samples.png").width > 8 * 8
    capsys.readouterr()
    config = tiny_config(condition=ConditionConfig("vector", embedding_width=4))
    randomised(config).save_pretrained(tmp_path / "vector")
    assert "images of a data set give no vectors" in fails(capsys, "tune", tmp_path / "vector", *options)


# ---- analyses


def test_held_out_images_are_analysed_with_their_conditions(folder, tmp_path):
    """Expert load against a loop over the images, each with what a training batch has of it; and features."""
    options = AnalysisConfig(num=0, batch_size=2, images=DataConfig(held_out=0.5))
    (model,) = analyse_load([str(folder / "all")], str(folder / "real"), tmp_path, options)["models"]
    pipeline, counts = Pipeline.from_pretrained(folder / "all"), torch.zeros(4, 3, dtype=torch.int64)
    _, held_out, _ = open_dataset(str(folder / "real"), 8, options.images, 0, captioned=True)
    pictures = load_images(str(folder / "real"), 8).images_B3HW
    rows = [next(i for i in range(12) if torch.equal(pictures[i], image)) for image in held_out.memory_B3HW]
    assert len(rows) == 6
    for i in rows:
        batch = read_batch(folder, [i])
        tokens = pipeline.tokenizer.encode(scale_to_unit(batch["image"]))
        values = pipeline.transformer.condition.from_batch(batch)
        with torch.no_grad():
            records = pipeline.transformer(values, pipeline.tokenizer.teacher_inputs(tokens)).records
        for record in records:
            for position, scale in enumerate(pipeline.config.pyramid.scale_of_L):
                counts[scale] += record.routing.selected_BNM[0, position]
    assert np.array(model["counts"]).sum(axis=0).tolist() == counts.tolist()
    report = analyse_features([str(folder / "m"), str(folder / "edges")], str(folder / "real"), tmp_path / "f", options)
    assert [entry["name"] for entry in report["models"]] == ["m", "edges"]


def test_copies_are_sought_among_samples_of_held_out_captions(folder, tmp_path):
    real, config = str(folder / "real"), CopiesConfig(num=10, shown=2)
    report = analyse_copies(str(folder / "m"), real, real, tmp_path, config)
    assert report["samples"] == 10
    assert report["distance"]["held_out"]["median"] == 0, "they are the training images themselves"
    prompts = [f"{i}.0" for i in range(12) if i % 4]
    drawn = Pipeline.from_pretrained(folder / "m").sample(prompts=[*prompts, prompts[0]]).tensor
    pictures = load_images(real, 8).images_B3HW / 255
    distances = [min((x - y).square().mean().sqrt() for y in pictures) for x in drawn]
    assert report["distance"]["samples"]["smallest"] == pytest.approx(float(min(distances)), rel=1e-5)


def test_figures_of_classes_refuse_other_conditions(folder, tmp_path, capsys):
    with pytest.raises(UserError, match="draws images by their class, and this model's images are conditioned on cap"):
        analyse_errors([str(folder / "m")], tmp_path)
    words = ["analyse", "copies", str(folder / "m"), "--data", str(folder / "real"), "--held-out", str(folder / "real")]
    assert "images by their class" in fails(capsys, *words, "--labels", "1", "--out", tmp_path / "c")
