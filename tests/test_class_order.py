"""Commands match the classes of data and of what is trained by name, in any order."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.data import DataConfig
from nextscale.config.encoder import EncoderConfig
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import TokenCache
from nextscale.data.classes import match_classes, read_trained_classes, relabel
from nextscale.data.datasets import ImageSet
from nextscale.encoders.classifier import Classifier, load_classifier
from nextscale.encoders.self_supervised import SmallEncoder
from nextscale.evaluation.compute import compute_class_accuracy
from nextscale.evaluation.images import ModelImages, StoredImages, compare_pairs
from nextscale.evaluation.run import evaluate
from nextscale.pipeline import Pipeline
from nextscale.research.analysis.analyzed_model import open_models
from nextscale.training.classifier import evaluate_classifier
from nextscale.training.components import load_components
from nextscale.training.encoder import evaluate_encoder
from nextscale.training.engine.loop import train
from nextscale.training.tokenize import tokenize
from nextscale.training.transformer import TransformerTask
from tests.conftest import randomised, tiny_config
from tests.test_classes import classes


def write_pictures(folder, order=("cat", "dog", "owl"), names=None, count=8, side=8):
    """Pictures of a class differ from those of others by their colour; `names` renames the folders."""
    for i, name in enumerate(order):
        place = folder / (names or {}).get(name, name)
        place.mkdir(parents=True)
        rng = np.random.default_rng(i)
        for j in range(count):
            pixels = rng.integers(0, 60, (side, side, 3)) + 190 * np.eye(3)[i]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{j}.png")
    return str(folder)


@pytest.fixture
def start(tmp_path):
    """A model of three named classes, in an order that is not that of folders."""
    config = tiny_config()
    condition = replace(config.transformer.condition, num_classes=3)
    config = replace(config, transformer=replace(config.transformer, condition=condition))
    randomised(replace(config, class_names=("owl", "cat", "dog"))).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def test_training_from_a_model_goes_by_name(tmp_path, start, capsys):
    """Labels that the trainer gets, from images and from a cache, are those of the model's names."""
    data = write_pictures(tmp_path / "data")
    tokenize(data, start, tmp_path / "cache", DataConfig(), 0, World())
    for source in (data, str(tmp_path / "cache")):
        components = load_components(RunConfig(data=source, start=str(start)).complete(), World())
        assert components.model.class_names == ("owl", "cat", "dog")
        batch = components.examples.fetch(range(len(components.examples)), None)
        if "image" in batch:
            colours = batch["image"].float().mean(dim=(2, 3)).argmax(dim=1)
            assert torch.equal(batch["label"], torch.tensor([1, 2, 0])[colours])
            by_name = sorted(batch["label"].tolist())
        else:
            assert torch.equal(batch["label"], components.examples.labels_N)
            raw = TokenCache(tmp_path / "cache").load_examples("train").labels_N
            assert torch.equal(batch["label"], torch.tensor([1, 2, 0])[raw])
            assert sorted(batch["label"].tolist()) == by_name
    other = write_pictures(tmp_path / "other", names={"owl": "emu, big"})
    with pytest.raises(
        UserError, match=r"only .*other has emu, big; only .*start has owl .*--classes 'cat=cat,dog=dog,\"emu, big\"'"
    ):
        load_components(RunConfig(data=other, start=str(start)).complete(), World())
    capsys.readouterr()


def write_table(path, order):
    """Pictures of three classes as parquet, whose rows and pictures do not depend on the order of the names."""
    import pyarrow as arrow
    from pyarrow import parquet

    rows = []
    for i in range(18):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append(
            {"image": {"bytes": buffer.getvalue(), "path": None}, "label": order.index(["cat", "dog", "owl"][i % 3])}
        )
    features = {"info": {"features": {"label": {"names": list(order), "_type": "ClassLabel"}}}}
    table = arrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path)


def test_permuted_classes_give_the_same_training_bit_for_bit(tmp_path, start):
    """The same rows with the classes in two orders, as images and as a cache: equal weights, and the start's names."""
    weights = []
    for number, order in enumerate((("owl", "cat", "dog"), ("cat", "dog", "owl"))):
        source = str(tmp_path / f"{number}.parquet")
        write_table(source, order)
        if number == 1:
            tokenize(source, start, tmp_path / "cache", DataConfig(held_out=0.2), 0, World())
            source = str(tmp_path / "cache")
        images, settings = DataConfig(held_out=0.2), TrainConfig(steps=2, batch_size=4, learning_rate=1e-2)
        config = RunConfig(data=source, start=str(start), images=images, train=settings).complete()
        parts = load_components(config, World())
        assert parts.model.class_names == ("owl", "cat", "dog")
        train(
            TransformerTask(parts.transformer, parts.tokenizer, parts.examples, settings), settings, tmp_path / order[0]
        )
        weights.append(parts.transformer.state_dict())
    assert all(torch.equal(tensor, weights[0][name]) for name, tensor in weights[1].items())


def test_a_model_without_names_takes_those_of_the_data(tmp_path, start, capsys):
    pipeline = Pipeline.from_pretrained(start)
    pipeline.config = replace(pipeline.config, class_names=())
    pipeline.save_pretrained(start)
    data = write_pictures(tmp_path / "data")
    components = load_components(RunConfig(data=data, start=str(start)).complete(), World())
    assert components.model.class_names == ("cat", "dog", "owl")
    assert "note: " in capsys.readouterr().out


def test_a_resumed_run_keeps_the_order_of_its_classes(tmp_path, start):
    """Folders that sort otherwise give the same labels; other classes are refused."""
    data = write_pictures(tmp_path / "data")
    (tmp_path / "run" / "training").mkdir(parents=True)
    (tmp_path / "run" / "training" / "transformer-00000001.pt").touch()
    (tmp_path / "run" / "config.json").write_bytes((start / "config.json").read_bytes())
    small = TransformerConfig(depth=1, width=16, heads=1)
    config = RunConfig(data=data, tokenizer=str(start), transformer=small).complete()
    resumed, anew = load_components(config, World(), tmp_path / "run"), load_components(config, World(), tmp_path / "x")
    assert (resumed.model.class_names, anew.model.class_names) == (("owl", "cat", "dog"), ("cat", "dog", "owl"))
    assert torch.equal(resumed.examples.labels_B, torch.tensor([1, 2, 0])[anew.examples.labels_B])
    assert torch.equal(resumed.examples.memory_B3HW, anew.examples.memory_B3HW), "rows and splits are the same"
    Classifier(ClassifierConfig(8, (16,), 8), ("owl", "cat")).save(tmp_path / "run")
    assert read_trained_classes(tmp_path / "run").names == ("owl", "cat")
    with pytest.raises(UserError, match="do not have the same classes"):
        load_components(config, World(), tmp_path / "run")


def test_analyses_and_sparsification_go_by_name(tmp_path, start):
    from nextscale.checkpoints.native import read_checkpoint
    from nextscale.config.analysis import AnalysisConfig
    from nextscale.config.sparsify import SparsifyConfig
    from nextscale.sparsify.data import open_data

    data = write_pictures(tmp_path / "data")
    (model,) = open_models([str(start)], [], data, AnalysisConfig())
    sparse = open_data(start, read_checkpoint(start), SparsifyConfig(data=data), tmp_path / "s", World())
    for examples in (model.held_out, sparse.train, sparse.held_out):
        colours = examples.memory_B3HW.float().mean(dim=(2, 3)).argmax(dim=1)
        assert torch.equal(examples.labels_B, torch.tensor([1, 2, 0])[colours])


@settings(deadline=None, max_examples=4)
@given(st.permutations(["cat", "dog", "owl"]))
def test_figures_do_not_depend_on_the_order_of_classes(order):
    """Accuracy of a classifier and of the nearest neighbours, after the classes of both were permuted."""
    from nextscale.evaluation.metrics.neighbours import knn_accuracy

    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(30, 3, generator=rng), torch.randint(3, (30,), generator=rng)
    names = ("cat", "dog", "owl")
    images = ImageSet(torch.zeros(30, 3, 1, 1, dtype=torch.uint8), labels, names)
    position = torch.tensor([order.index(name) for name in names])
    permuted = replace(images, labels_B=position[labels], class_names=tuple(order))
    match = match_classes(classes(*order), classes(*names))
    assert torch.equal(relabel(permuted, match).labels_B, labels)
    expected = compute_class_accuracy(logits, labels, classes(*names), classes(*names))
    assert compute_class_accuracy(logits, permuted.labels_B, classes(*order), classes(*names)) == expected
    asked = torch.nn.functional.normalize(logits, dim=1)
    figure = knn_accuracy(asked[:10], labels[:10], asked[10:], labels[10:])
    assert knn_accuracy(asked[:10], relabel(permuted, match).labels_B[:10], asked[10:], labels[10:]) == figure


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A classifier that reads the colour of a picture: red, green, blue are cat, dog, owl; it knows a fourth class."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reader")
    model = Classifier(ClassifierConfig(8, (16,), 8), ("emu", "owl", "cat", "dog"))
    pictures = torch.full((3, 3, 8, 8), 30, dtype=torch.uint8)
    for i in range(3):
        pictures[i, i] = 220
    with torch.no_grad():
        pool = model(pictures).pool_BD
        weight = torch.linalg.pinv(pool - pool.mean(dim=0))  # each centred feature vector to its own unit vector
        model.head.weight.zero_()
        model.head.weight[[2, 3, 1]] = weight.T
        model.head.bias.copy_(-model.head.weight @ pool.mean(dim=0))
        model.head.bias[0] = -100
    assert model(pictures).logits_BC.argmax(dim=1).tolist() == [2, 3, 1]
    model.save(folder)
    return str(folder)


def test_read_as_asked_goes_by_name(tmp_path, reader):
    """Folders of a part of the classes; names in another order; numbers; names that the classifier does not know."""

    def figure(data):
        report = evaluate(data, tmp_path / f"{random.random()}.json", [reader], [], EvaluationConfig(), World())
        return report["measures"]["classifier"].get("classifier_read_as_asked"), " ".join(report.get("notes", []))

    assert figure(write_pictures(tmp_path / "named")) == (1.0, "")
    assert figure(write_pictures(tmp_path / "part", order=("cat", "owl"), names={"owl": "dog"})) == (1.0, "")
    numbers = {"cat": "2", "dog": "3", "owl": "1"}
    value, note = figure(write_pictures(tmp_path / "numbers", names=numbers))
    assert value == 1.0
    assert "by number" in note
    value, note = figure(write_pictures(tmp_path / "unknown", names={"owl": "yak"}))
    assert value is None
    assert "no classifier_read_as_asked" in note
    assert "has yak" in note
    images = np.stack([np.asarray(Image.open(tmp_path / "named" / "cat" / f"{i}.png")) for i in range(4)])
    np.savez(tmp_path / "images.npz", images, np.array([2, 2, 2, 0]))
    value, note = figure(str(tmp_path / "images.npz"))
    assert value == 0.75
    assert "by number" in note


def test_classifier_and_encoder_go_by_name(tmp_path, reader, capsys):
    names = ("owl", "cat", "dog")
    model = load_classifier(Path(reader))
    small = Classifier(model.config, names)
    small.load_state_dict({n: t[[1, 2, 3]] if n.startswith("head") else t for n, t in model.state_dict().items()})
    small.save(tmp_path / "small")
    data = write_pictures(tmp_path / "data")
    assert evaluate_classifier(tmp_path / "small", data, None)["accuracy"] == 1.0
    with pytest.raises(UserError, match="only .*reader.* has emu"):
        evaluate_classifier(Path(reader), data, None)
    torch.manual_seed(0)
    SmallEncoder(EncoderConfig(image_size=8, widths=(16, 16))).save(tmp_path / "encoder")
    numbers = write_pictures(tmp_path / "numbers", names={"cat": "0", "dog": "1", "owl": "2"})
    same = evaluate_encoder(str(tmp_path / "encoder"), data, data, 8, None)["knn_accuracy"]
    assert evaluate_encoder(str(tmp_path / "encoder"), data, numbers, 8, None)["knn_accuracy"] == same
    assert "by number" in capsys.readouterr().out


def test_models_that_are_compared_in_pairs_and_refiners_go_by_name(start):
    """The same model with its classes in another order draws the same images, as partner and as refiner."""
    pipeline = Pipeline.from_pretrained(start)
    order, checkpoint = [2, 0, 1], pipeline.to_checkpoint()
    rows = checkpoint.transformer["condition.embedding.weight"]
    names = tuple(pipeline.config.class_names[i] for i in order)
    checkpoint.transformer["condition.embedding.weight"] = rows[[*order, 3]].clone()
    checkpoint.config = replace(checkpoint.config, class_names=names)
    other = Pipeline.from_checkpoint(checkpoint)
    first, partner = (ModelImages(p, "m", 6, SampleConfig(seed=1), 6) for p in (pipeline, other))
    assert not torch.equal(first.fetch(0, 6), partner.fetch(0, 6))
    assert partner.match_order(first) == ""
    assert torch.equal(first.fetch(0, 6), partner.fetch(0, 6))
    assert compare_pairs(first, partner) == ""
    stored = StoredImages(write_pictures(start.parent / "pairs", count=2))  # cat, cat, dog, ...; owl, cat, dog, ...
    assert compare_pairs(stored, first) == "4 of 6 pairs compare images of different classes"
    refined = Pipeline.from_pretrained(start).refine_with(pipeline).sample([0, 1, None], draft_scales=2).tokens
    assert torch.equal(
        Pipeline.from_pretrained(start).refine_with(other).sample([0, 1, None], draft_scales=2).tokens, refined
    )
    checkpoint.config = replace(checkpoint.config, class_names=("a", "b", "c"))
    with pytest.raises(UserError, match="only this model has owl, cat, dog; only the refiner has a, b, c"):
        pipeline.refine_with(Pipeline.from_checkpoint(checkpoint))
