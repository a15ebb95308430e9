"""`nextscale evaluate` from end to end: the same samples in every form, resuming, several processes, refusals."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.evaluation import EvaluationConfig
from nextscale.config.sampling import SampleConfig
from nextscale.encoders.classifier import Classifier
from nextscale.evaluation.images import NpzImages, StoredImages, open_images
from nextscale.evaluation.metrics.lpips import ALEX, VGG, Lpips
from nextscale.evaluation.reference import read_npz
from nextscale.evaluation.run import evaluate, make_statistics
from nextscale.pipeline import Pipeline
from nextscale.tokenizer.autoencoder import Decoder
from tests import forked
from tests.conftest import randomised, tiny_config

SAMPLING = SampleConfig(cfg=1.0, seed=3)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model of 32 x 32 pixels, a classifier that resizes and a folder of reference pictures."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    randomised(tiny_config("1,2,16")).save_pretrained(folder / "model")
    Classifier(ClassifierConfig(16, (16, 32), 8), tuple("abcde")).save(folder / "classifier")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / "real").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "real" / f"{i:03d}.png")
    return folder


def figures(places, out, source, networks=("classifier",), reference="real", decode_batch=0, **more):
    settings = EvaluationConfig(count=24, sampling=SAMPLING, shard=10, batch=4, decode_batch=decode_batch)
    names, references = [str(places / n) for n in networks], [str(places / reference)] if reference else []
    return evaluate(str(source), out, names, references, settings, World(), **more)


class DecodedBatches:
    """A context that notes how many images every call of a decoder is given."""

    def __enter__(self):
        self.sizes = []
        self.hook = register_module_forward_pre_hook(self._note)
        return self

    def _note(self, module, arguments):
        if isinstance(module, Decoder):
            self.sizes.append(len(arguments[0]))

    def __exit__(self, *error):
        self.hook.remove()


def test_model_pictures_npz_and_features_give_the_same_figures(places, tmp_path):
    """Images are 8-bit in every form, so the figures are equal; a file of features needs no network."""
    model = figures(places, tmp_path / "model.json", places / "model", images_out=tmp_path / "pictures")
    with DecodedBatches() as decoded:
        parts = figures(places, tmp_path / "parts.json", places / "model", decode_batch=3)
    assert parts["measures"] == model["measures"]
    assert max(decoded.sizes) == 3, "of batches of 4"
    values = model["measures"]["classifier"]
    assert {"classifier_fd", "classifier_score", "classifier_precision", "classifier_recall"} <= values.keys()
    assert not {"fid", "inception_score", "precision"} & values.keys(), "nobody must take these for Inception's"
    assert json.loads((tmp_path / "model.json").read_text())["measures"] == model["measures"]
    protocol = model["protocol"]
    assert protocol["sampling"]["cfg"] == 1.0
    assert protocol["sampling"]["seed"] == 3
    assert protocol["samples_per_class"] == 24 / 5
    folder = figures(places, tmp_path / "folder.json", tmp_path / "pictures")["measures"]["classifier"]
    images = np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / "pictures").iterdir())])
    np.savez(tmp_path / "samples.npz", images)
    npz = figures(places, tmp_path / "npz.json", tmp_path / "samples.npz")["measures"]["classifier"]
    asked = values.pop("classifier_read_as_asked")  # what was asked for is known of a model alone
    assert 0 <= asked <= 1
    assert values == folder == npz

    make_statistics(str(places / "real"), str(places / "classifier"), tmp_path / "ref.npz", EvaluationConfig(), World())
    make_statistics(
        str(tmp_path / "pictures"), str(places / "classifier"), tmp_path / "own.npz", EvaluationConfig(), World()
    )
    by_file = figures(places, tmp_path / "ref.json", places / "model", reference=tmp_path / "ref.npz")
    for name in ("classifier_fd", "classifier_precision", "classifier_recall"):
        assert by_file["measures"]["classifier"][name] == pytest.approx(values[name], rel=1e-5)
    of_features = evaluate(
        str(tmp_path / "own.npz"), tmp_path / "f.json", [], [str(tmp_path / "ref.npz")], EvaluationConfig(), World()
    )
    for name in ("classifier_fd", "classifier_precision", "classifier_recall"):
        assert of_features["measures"]["classifier"][name] == pytest.approx(values[name], rel=1e-5)


def test_figures_are_those_of_the_metrics(places, tmp_path):
    """The report against features computed by hand."""
    from nextscale.encoders.load import load_feature_network
    from nextscale.evaluation.metrics.frechet import Moments, frechet_distance
    from nextscale.evaluation.metrics.manifold import precision_recall

    report = figures(places, tmp_path / "r.json", places / "model")["measures"]["classifier"]
    eye = load_feature_network(str(places / "classifier"))
    pipeline = Pipeline.from_pretrained(places / "model")
    sampled = (pipeline.sample([i % 5 for i in range(24)], SAMPLING).tensor * 255).round().to(torch.uint8)
    real = torch.stack([
        torch.from_numpy(np.asarray(Image.open(f)).copy()).permute(2, 0, 1) for f in sorted((places / "real").iterdir())
    ])  # fmt: skip
    with torch.no_grad():
        a, b = eye(sampled).pool_BD, eye(real).pool_BD
        asked = (eye(sampled).logits_BC.argmax(1) == torch.arange(24) % 5).double().mean()
    assert report["classifier_fd"] == pytest.approx(
        frechet_distance(Moments.compute(a, "a"), Moments.compute(b, "b")), rel=1e-4
    )
    assert (report["classifier_precision"], report["classifier_recall"]) == precision_recall(a, b)
    assert report["classifier_read_as_asked"] == float(asked)
    assert "covariance is singular" in report["notes"][0]


def test_adm_statistics_with_samples(places, tmp_path, monkeypatch):
    """ADM's file: statistics of the whole set under Inception, and images for precision and recall."""
    from nextscale.encoders.inception import Inception

    torch.manual_seed(0)
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    real = np.stack([np.asarray(Image.open(f)) for f in sorted((places / "real").iterdir())])[:6]
    rng = np.random.default_rng(0)
    spread = {n: rng.normal(size=(5, w)) for n, w in (("", 2048), ("_s", 2023))}
    arrays = {f"mu{n}": x.mean(0) for n, x in spread.items()} | {
        f"sigma{n}": np.cov(x, rowvar=False) for n, x in spread.items()
    }
    np.savez(tmp_path / "adm.npz", arr_0=real, **arrays)
    settings = EvaluationConfig(count=5, sampling=SAMPLING, batch=5)
    report = evaluate(
        str(places / "model"), tmp_path / "r.json", [str(tmp_path / "inception.pth")], [str(tmp_path / "adm.npz")],
        settings, World(),
    )  # fmt: skip
    values = report["measures"]["inception"]
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= values.keys()
    with pytest.raises(UserError, match=r"adm.npz is of the inception network; the features measured are classifier's"):
        figures(places, tmp_path / "other.json", places / "model", reference=tmp_path / "adm.npz")


def test_it_goes_on_after_a_kill_and_two_processes_equal_one(places, tmp_path):
    """Shards that are done are not made again; sharing the work changes nothing."""
    whole = figures(places, tmp_path / "whole.json", places / "model")["measures"]
    command = ["evaluate", str(places / "model"), "--features", str(places / "classifier"),
               "--reference", str(places / "real"), "--num", "24", "--cfg", "1", "--seed", "3", "--shard", "2",
               "--batch-size", "1", "--device", "cpu", "--out", str(tmp_path / "killed.json")]  # fmt: skip
    process = forked.start(main, command, files=tmp_path / "said")
    work = tmp_path / "killed.work" / "samples"
    deadline = time.monotonic() + 120
    while len(list(work.glob("features-*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill(signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    done = {f: f.stat().st_mtime_ns for f in work.glob("features-*.safetensors")}
    assert 3 <= len(done) < 12, "killed in the middle"
    assert main(command) == 0
    assert all(f.stat().st_mtime_ns == at for f, at in done.items()), "a shard was made again"
    killed = json.loads((tmp_path / "killed.json").read_text())["measures"]

    command[command.index(str(tmp_path / "killed.json"))] = str(tmp_path / "two.json")
    ended = [process.end() for process in forked.start_all(2, main, command, files=tmp_path / "two")]
    assert [status for status, _, _ in ended] == [0, 0], ended
    two = json.loads((tmp_path / "two.json").read_text())["measures"]
    for other in (killed, two):
        for name, value in whole["classifier"].items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert other["classifier"][name] == expected, name


def test_features_of_other_images_are_not_mixed_in(places, tmp_path, capsys):
    figures(places, tmp_path / "r.json", places / "model", reference="")
    config = EvaluationConfig(count=24, sampling=SampleConfig(cfg=2.0, seed=3), shard=10, batch=4)
    arguments = [str(places / "classifier")], [], config, World()
    again = evaluate(str(places / "model"), tmp_path / "r.json", *arguments)["measures"]
    assert "r.work/samples are made again: images.sampling.cfg was 1.0, now 2.0" in capsys.readouterr().out
    assert again == evaluate(str(places / "model"), tmp_path / "new.json", *arguments)["measures"]


def alexnet_files(folder):
    """Random weights in the forms of torchvision's AlexNet and LPIPS's heads."""
    rng = torch.Generator().manual_seed(0)
    trunk, heads, before = {}, {}, 3
    sizes = ((0, 64, 11), (3, 192, 5), (6, 384, 3), (8, 256, 3), (10, 256, 3))
    for stage, (i, width, kernel) in enumerate(sizes):
        fan = before * kernel * kernel
        trunk[f"features.{i}.weight"] = torch.randn(width, before, kernel, kernel, generator=rng) * (2 / fan) ** 0.5
        trunk[f"features.{i}.bias"] = torch.randn(width, generator=rng) * 0.1
        heads[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=rng)
        before = width
    torch.save(trunk | {"classifier.1.weight": torch.zeros(2, 2)}, folder / "alexnet.pth")
    torch.save(heads, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"


@torch.no_grad()
def test_lpips_with_alexnet_against_the_formula(tmp_path):
    files = alexnet_files(tmp_path)
    model = Lpips.from_files(*files)
    assert model.trunk is ALEX
    assert VGG.indices() == [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]], "torchvision's places"
    trunk, heads = (torch.load(f, weights_only=True) for f in files)
    a, b = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (1, 2))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((t - shift[:, None, None]) / scale[:, None, None] for t in (a, b))
    expected = torch.zeros(2)
    strides = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
    for stage, (layer, (stride, padding)) in enumerate(strides.items()):
        if stage in (1, 2):
            x, y = (torch.nn.functional.max_pool2d(t, 3, 2) for t in (x, y))
        weights = trunk[f"features.{layer}.weight"], trunk[f"features.{layer}.bias"]
        x, y = (torch.conv2d(t, *weights, stride=stride, padding=padding).relu() for t in (x, y))
        u, v = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
        expected += ((u - v) ** 2 * heads[f"lin{stage}.model.1.weight"]).sum(1).mean((1, 2))
    assert torch.allclose(model(a, b), expected, rtol=1e-4)


def test_lpips_between_two_models(places, tmp_path):
    """The same seed and labels, image by image; a model against itself is 0."""
    files = alexnet_files(tmp_path)
    randomised(tiny_config("1,2,16"), seed=1).save_pretrained(tmp_path / "other")
    settings = EvaluationConfig(count=4, sampling=SAMPLING, size=0, batch=2)
    arguments = [(), (), settings, World()]
    with pytest.raises(UserError, match="give both --against and --lpips"):
        evaluate(str(places / "model"), tmp_path / "x.json", *arguments, against=str(tmp_path / "other"))
    if True:
        same = evaluate(
            str(places / "model"), tmp_path / "same.json", *arguments, against=str(places / "model"), lpips=files
        )
    assert same["measures"]["lpips"]["mean"] == 0


def test_what_cannot_be_measured_is_refused(places, tmp_path):
    def run(source, networks=("classifier",), references=(), **more):
        names = [str(places / n) for n in networks]
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        return evaluate(str(source), out, names, references, EvaluationConfig(**more), World())

    with pytest.raises(UserError, match="nothing to measure: give --features"):
        run(places / "model", networks=())
    with pytest.raises(UserError, match="holds 40 images, 41 are asked for"):
        run(places / "real", count=41)
    with pytest.raises(UserError, match="official_seeding makes an image depend on its batch"):
        run(places / "model", sampling=SampleConfig(official_seeding=True))
    np.savez(tmp_path / "float.npz", np.zeros((2, 8, 8, 3)))
    with pytest.raises(UserError, match=r"arr_0 must be uint8 \(N, H, W, 3\); got float64 \(2, 8, 8, 3\)"):
        run(tmp_path / "float.npz")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(UserError, match="other.npz holds weights; expected statistics"):
        run(tmp_path / "other.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="broken.npz is damaged or no .npz file"):
        run(tmp_path / "broken.npz")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match="mu.npz holds statistics alone"):
        run(tmp_path / "mu.npz")
    with pytest.raises(UserError, match="does not name its network, and 5 channels are not Inception's"):
        run(places / "real", references=[str(tmp_path / "mu.npz")])
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    with pytest.raises(UserError, match="mu or sigma is not finite"):
        run(places / "real", references=[str(tmp_path / "nan.npz")])
    Image.new("RGB", (20, 16)).save(tmp_path / "wide.png")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, size in enumerate([(16, 16), (20, 16)]):
        Image.new("RGB", size).save(mixed / f"{i}.png")
    with pytest.raises(UserError, match="two feature networks are named classifier"):
        run(places / "real", networks=("classifier", "classifier"))
    with pytest.raises(UserError, match="real has 40 images, .*mixed 2: give --num to pair as many"):
        evaluate(
            str(places / "real"), tmp_path / "pair.json", [], [], EvaluationConfig(size=16), World(), against=str(mixed)
        )
    np.savez(tmp_path / "features.npz", pool=np.zeros((9, 64)), network="classifier", fingerprint="other")
    with pytest.raises(UserError, match="features.npz was made with other weights of the classifier network"):
        run(places / "real", references=[str(tmp_path / "features.npz")])
    assert StoredImages(str(mixed), size=8).fetch(0, 2).shape == (2, 3, 8, 8)


def test_npz_is_read_in_portions(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 9, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", images, np.arange(7))
    np.savez_compressed(tmp_path / "packed.npz", images)
    for name in ("plain.npz", "packed.npz"):
        samples = NpzImages(tmp_path / name)
        assert len(samples) == 7
        assert np.array_equal(samples.fetch(2, 5).permute(0, 2, 3, 1).numpy(), images[2:5])
    part = open_images(str(tmp_path / "plain.npz"), 3, 0, SAMPLING, 1)
    assert len({*part.labels().tolist()}) == 3
    chosen = torch.from_numpy(images[part.labels()]).permute(0, 3, 1, 2)
    assert torch.equal(part.fetch(0, 3), chosen), "the rows that have these labels"
    assert read_npz(tmp_path / "plain.npz").has_samples
