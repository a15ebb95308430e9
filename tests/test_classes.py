"""Classes are matched by their names: what users type, and data that meets something trained, in any order."""

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
from safetensors.torch import load_file

from nextscale.checkpoints.adapt import NewClass, parse_classes
from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.classes import find_class, index_labels
from nextscale.config.classes import parse_classes as parse_list
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.data import DataConfig
from nextscale.config.encoder import EncoderConfig
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.data.cache import TokenCache
from nextscale.data.classes import Classes, match_classes, read_trained_classes, relabel
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
from tests.test_cli import fails

NAMES = ("tench, Tinca tinca", "crane", "Crane", "none", "5", "café", "a", "b", "a,b", "cat", "cat")


# ---- what a user types


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("tench, Tinca tinca,a", [0, 6]),
        ("TENCH,tinca  TINCA", [0]),
        ("crane , Crane", [1, 2]),
        ('"none",""', [3, None]),
        ("5,3, 10", [4, 3, 10]),
        ("Cafe\u0301, CAFÉ", [5, 5]),
        ('"a,b","a","b"', [8, 6, 7]),
    ],
)
def test_names_are_understood(text, meant):
    assert parse_list(text, NAMES, len(NAMES)) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CRANE", r"any of the classes 'crane' \(1\), 'Crane' \(2\)"),
        ("cat", r"any of the classes 'cat' \(9\), 'cat' \(10\)"),
        ("None", "both no label and the name of class 3"),
        ("a,b", "read in two ways: 'a' or 'a,b'"),
        ("tench", "did you mean 'tench, Tinca tinca'"),
        ('"7"', "no class named '7'"),
        ("11", "label 11 is out of range: this model has 11 classes, 0 to 10"),
        ("-1", "label -1 is out of range"),
        ("a,,b", "has an empty entry"),
        ('"a', "not closed"),
    ],
)
def test_what_is_ambiguous_or_unknown_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_list(text, NAMES, len(NAMES))


def test_numbers_as_names_are_names():
    """Folders 0 to 10 sort as text; the class 10 is the third, and a number that is no name is not a position."""
    names = ("1", "10", "2")
    assert parse_list("10, 2", names, 3) == [1, 2]
    with pytest.raises(UserError, match="no class named '0': the names are numbers"):
        find_class("0", names, 3)
    assert (find_class("none", names, 3), find_class("2", (), 3)) == (None, 2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(alphabet='ab ,"=5é', min_size=1, max_size=5), min_size=1, max_size=4, unique=True), st.data())
def test_a_quoted_name_always_means_its_class(names, data):
    names = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)) if names else []
    text = ",".join('"' + name.replace('"', '""') + '"' for name in chosen)
    if chosen and not {*names} & {text, *('"' + name.replace('"', '""') + '"' for name in names)}:
        assert [names[i] for i in parse_list(text, names, len(names))] == chosen


def test_the_same_answer_in_every_command(tmp_path, capsys):
    """sample, edit, score, adapt, analyse and Python, with a name of two words, a comma and other case."""
    config = replace(tiny_config("1,2"), class_names=("7", "Tench, tinca", "bee", "none", "emu"))
    pipeline = randomised(config)
    pipeline.save_pretrained(tmp_path / "m")
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    model, picture = str(tmp_path / "m"), str(tmp_path / "p.png")

    def tokens(*arguments):
        assert main([*map(str, arguments), "--tokens-out", str(tmp_path / "t.safetensors")]) == 0
        return load_file(tmp_path / "t.safetensors")["tokens"]

    by_number = pipeline.sample([1, 0, 4, None]).tokens
    text = 'TENCH,Tinca,7,4,""'
    assert torch.equal(tokens("sample", model, "--labels", text, "--out", tmp_path / "o.png"), by_number)
    assert torch.equal(pipeline.sample(text).tokens, by_number)
    assert torch.equal(pipeline.sample(["tench, tinca", "7", np.int64(4), None]).tokens, by_number)
    mask = ["--mask", picture, "--out", tmp_path / "e.png"]
    assert torch.equal(tokens("edit", model, picture, "--label", "tench,TINCA", *mask)[0], by_number[0])
    assert torch.equal(pipeline.score([picture] * 2, ["Bee", "tench,tinca"]), pipeline.score([picture] * 2, [2, 1]))
    assert parse_classes('mine=TENCH, tinca,"x,y"=7,z', config) == (
        NewClass("mine", 1), NewClass("x,y", 0), NewClass("z"),
    )  # fmt: skip
    errors = ["analyse", "errors", model, "--out", tmp_path / "x", "--num", "1"]
    capsys.readouterr()
    for command in (
        ["sample", model, "--out", tmp_path / "o.png", "--labels", "none"],
        ["edit", model, picture, *mask, "--label", "None"],
        [*errors, "--labels", "none"],
        ["adapt", model, "--out", tmp_path / "a", "--classes", "x=none"],
    ):
        assert "both no label and the name of class 3" in fails(capsys, *command)


@pytest.mark.parametrize(
    ("text", "said"),
    [("0", "--classes must be 1 to"), ("-3", "--classes must be 1 to"), ("9" * 30, "--classes must be 1 to"),
     ("cat,cat", "names a class twice: cat"), ("x=9", "label 9 is out of range"), ("=1", "neither NAME nor NAME=OLD")],
)  # fmt: skip
def test_new_classes_that_make_no_sense(text, said):
    with pytest.raises(UserError, match=said):
        parse_classes(text, tiny_config())


@pytest.mark.parametrize("label", [True, 1.5, np.float32(1), torch.tensor(2.0), object()])
def test_what_is_no_label_is_refused(label):
    with pytest.raises(UserError, match="a label is a class name, a whole number or None"):
        index_labels([label], (), 5)
    assert index_labels(torch.tensor(3), (), 5) == index_labels(3, (), 5) == index_labels(np.int8(3), (), 5) == [3]


# ---- a data set's classes and a trained thing's


def classes(*names: str, where: str = "data") -> Classes:
    return Classes.of_data(where, names)


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(6)), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_a_permutation_of_the_names_changes_no_label(order, labels):
    """The plain oracle: a label stands for its name."""
    known = ("ant", "Bee", "cat", "dog, big", "10", "é")
    names = [known[i] for i in order]
    match = match_classes(classes(*names), classes(*known))
    assert [known[i] for i in match.map_labels(torch.tensor(labels)).tolist()] == [names[i] for i in labels]
    assert (match.names, match.note) == (known, "")
    folded = [name.upper().replace("É", "E\u0301") for name in names]
    assert match_classes(classes(*folded), classes(*known)).index == match.index


@pytest.mark.parametrize(
    ("data", "known", "index", "noted"),
    [
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), (0, 1, 3, 2), False),
        (("1", "0", "2"), ("ant", "bee", "cat"), (1, 0, 2), True),  # without names, or folders named by number
        (("ant", "bee", "cat"), ("2", "0", "1"), (1, 2, 0), True),
        (("ant", "bee", "cat"), (), (0, 1, 2), True),
        (("0", "1", "2"), (), (0, 1, 2), False),
        (("2", "0", "1"), (), (2, 0, 1), False),
        (("photos",), ("pictures",), (0,), True),
    ],
)
def test_sides_without_names_are_matched_by_number_with_a_note(data, known, index, noted):
    match = match_classes(classes(*data), Classes("model", known, len(index)))
    assert (match.index, bool(match.note)) == (index, noted)
    if noted and len(index) > 1:
        assert "matched by number" in match.note or "by number" in match.note


@pytest.mark.parametrize(
    ("data", "known", "said"),
    [
        (("cat", "owl"), ("cat", "dog"), "only data has owl; only model has dog"),
        (("cat",), ("cat", "dog"), "only model has dog"),
        (("1", "2", "3"), ("ant", "bee", "cat"), "only data has 1, 2, 3; only model has ant, bee, cat"),
        (("0", "1", "2"), ("1", "x", "y"), "only data has 0, 2; only model has x, y"),
        (("cat", "Cat", "dog"), ("dog", "cat", "CAT"), "occurs more than once"),
        (("crane", "crane", "owl"), ("owl", "crane", "crane"), "occurs more than once"),
    ],
)
def test_other_classes_are_refused_with_what_each_side_lacks(data, known, said):
    with pytest.raises(UserError, match=said):
        match_classes(classes(*data), classes(*known, where="model"))
    assert match_classes(classes(*known), classes(*known)).unchanged, "equal lists are equal, whatever they hold"


def test_a_part_of_the_classes_is_enough_only_where_it_is_asked_for():
    known = classes("ant", "bee", "cat", where="model")
    assert match_classes(classes("cat", "bee"), known, subset=True).index == (2, 1)
    assert match_classes(classes("2"), known, subset=True).index == (2,)
    with pytest.raises(UserError, match="only data has owl"):
        match_classes(classes("cat", "owl"), known, subset=True)
    with pytest.raises(UserError, match="do not have the same classes"):
        match_classes(classes("x", "y"), Classes("model", (), 3), subset=True)


# ---- the commands


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
