"""The main job end to end at a size for a test, on folders, parquet and digits, interrupted and continued."""

import io
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.cli.training import draw_routing
from nextscale.common.errors import Interruption, UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.log import read_log
from nextscale.config.quickstart import QuickstartConfig
from nextscale.data.datasets import ImageSet, load_images
from nextscale.encoders.load import load_encoder
from nextscale.pipeline import Pipeline
from nextscale.quickstart.conditions import AskedCaptions
from nextscale.quickstart.few import find_start
from nextscale.quickstart.measure import measure_samples
from nextscale.quickstart.run import encode_features, encode_tokens, run_quickstart
from nextscale.sampling.likelihood import compute_log_likelihood
from nextscale.training.report import describe_copies, format_quickstart_report, report_interruption
from nextscale.training.transformer import read_run_config
from tests import forked
from tests.conftest import randomised, tiny_config

TINY = {
    "tokenizer": {"vocab_size": 16, "code_width": 4, "base_channels": 8, "norm_groups": 4, "res_blocks": 1,
                  "channel_multipliers": [1, 1], "attention": False},
    "transformer": {"depth": 1, "width": 16, "heads": 2, "experts": {"router": "stmoe"}, "alignment": {"hidden": 8}},
    "train_tokenizer": {"steps": 12, "batch_size": 8},
    "encoder": {"widths": [16, 16], "blocks": [0, 0]},
    "moco": {"queue": 16, "hidden": 8, "key_width": 8},
    "train_encoder": {"steps": 6, "batch_size": 8},
    "train_transformer": {"steps": 12, "batch_size": 8},
    "image_size": 8,
    "measure_images": 40,
}  # fmt: skip


def tiny_settings(**changes) -> QuickstartConfig:
    from nextscale.config.parse import from_dict

    return from_dict(QuickstartConfig, {**TINY, **changes})


def picture(label: int, rng: np.random.Generator, side: int = 10) -> Image.Image:
    base = np.zeros((side, side, 3), dtype=np.int64) + (40 if label else 200)
    return Image.fromarray((base + rng.integers(0, 40, base.shape)).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, name in enumerate(("day", "night")):
        (root / name).mkdir()
        for i in range(12):
            picture(label, rng).save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    (root / "day" / "broken.png").write_bytes(b"not a picture")
    (root / "day" / "notes.txt").write_text("left alone")
    return root


OUTPUTS = {
    "config.json", "tokenizer.safetensors", "transformer.safetensors", "samples.png", "reconstructions.png",
    "scales.png", "curves.png", "metrics.json", "log.jsonl", "quickstart.json", "inputs.json", "training",
    "encoder", "routing.json", "routing.png", "best", "README.md",
}  # fmt: skip


def test_a_folder_of_images(folder, tmp_path, capsys):
    metrics = run_quickstart(tiny_settings(data=str(folder)), tmp_path / "run", draw_routing)
    assert {p.name for p in (tmp_path / "run").iterdir()} == OUTPUTS
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert len(metrics["unreadable_images"]) == 1
    assert "broken.png" in metrics["unreadable_images"][0]
    for name in ("generated_read_as_asked", "held_out_read_by_generated_fit", "real_held_out_read_right"):
        assert 0 <= metrics[name] <= 1
    for name in ("samples.png", "reconstructions.png", "scales.png", "curves.png"):
        assert min(Image.open(tmp_path / "run" / name).size) > 60
    pipeline = Pipeline.from_pretrained(tmp_path / "run")
    assert pipeline.config.transformer.experts.router == "stmoe"
    assert "guidance" in read_log(tmp_path / "run" / "log.jsonl")[-2]
    encoder = load_encoder(str(tmp_path / "run" / "encoder"))
    assert encoder.kind == "moco_v2"
    train, _ = load_images(str(folder), 8, 20000, 0).split(0.2, 0)
    features_RC = encode_features(train, encoder, encoder.grid).flatten(0, 2)
    assert features_RC.mean(dim=0).abs().max() < 1e-4, "standardised, as `encoder train` does it"
    assert torch.allclose(features_RC.std(dim=0, correction=0), torch.ones(16), atol=0.02)
    assert pipeline.config.class_names == ("day", "night")
    assert pipeline.sample(["night"]).tensor.shape == (1, 3, 8, 8)
    assert "time on this machine: about" in capsys.readouterr().out
    assert Pipeline.from_pretrained(tmp_path / "run" / "best").config == pipeline.config
    assert "validation_loss" in read_log(tmp_path / "run" / "log.jsonl")[-1]
    # a finished run is not repeated, and says so
    state, written = next((tmp_path / "run" / "training").glob("transformer-*.pt")), tmp_path / "run" / "metrics.json"
    before = state.stat().st_mtime_ns, written.stat().st_mtime_ns
    assert run_quickstart(tiny_settings(data=str(folder)), tmp_path / "run", draw_routing) == metrics
    assert (state.stat().st_mtime_ns, written.stat().st_mtime_ns) == before
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="run with other settings: seed was 0, now 3"):
        run_quickstart(tiny_settings(data=str(folder), seed=3), tmp_path / "run")
    (folder / "day" / "notes.txt").unlink()  # no picture
    run_quickstart(tiny_settings(data=str(folder)), tmp_path / "run")
    picture(0, np.random.default_rng(5)).save(folder / "day" / "1.png")
    with pytest.raises(UserError, match="the files of .* have changed"):
        run_quickstart(tiny_settings(data=str(folder)), tmp_path / "run")
    with pytest.raises(UserError, match="is a quickstart's: resume it with `nextscale quickstart --config"):
        read_run_config(tmp_path / "run")


@pytest.mark.parametrize("named", [False, True])
def test_parquet_as_hugging_face_writes_it(named, tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    rng, rows = np.random.default_rng(1), []
    for i in range(20):
        buffer = io.BytesIO()
        picture(i % 2, rng).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
    table = arrow.table({"image": rows, "label": [i % 2 for i in range(20)]})
    if named:
        features = {"info": {"features": {"label": {"names": ["day", "night"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, tmp_path / "set.parquet")
    data = load_images(str(tmp_path / "set.parquet"), 8, 1000, 0)
    assert data.class_names == (("day", "night") if named else ("0", "1"))
    assert (data.images_B3HW.float().mean(dim=(1, 2, 3)) > 128).tolist() == (data.labels_B == 0).tolist()
    assert len(load_images(str(tmp_path / "set.parquet"), 8, 7, 0)) == 7


def test_split_holds_out_a_share_of_every_class():
    data = load_images("digits", 8, 10**6, 0)
    train, held = data.split(0.2, seed=0)
    assert len(train) + len(held) == 1797
    for label in range(10):
        share = (held.labels_B == label).sum() / (data.labels_B == label).sum()
        assert abs(share - 0.2) < 0.01
    together = torch.cat([train.images_B3HW, held.images_B3HW]).flatten(1)
    assert len(together.unique(dim=0)) == len(data.images_B3HW.flatten(1).unique(dim=0))
    assert torch.equal(data.split(0.2, seed=0)[0].labels_B, train.labels_B)


def test_measures_tell_a_good_generator_from_a_collapsed_and_a_copying_one():
    train, held = load_images("digits", 8, 10**6, 0).split(0.2, seed=0)
    labels = train.labels_B[:1000]
    good = measure_samples(train, held, train.images_B3HW[:1000] / 255, labels)
    assert good["generated_read_as_asked"] > 0.95
    assert good["held_out_read_by_generated_fit"] > 0.9
    assert good["distance_to_nearest_training_image"]["generated"] < 1e-3  # copies
    assert good["distance_to_nearest_training_image"]["held_out_real"] > 0.05
    first = [int((train.labels_B == c).nonzero()[0]) for c in range(10)]
    collapsed = measure_samples(train, held, train.images_B3HW[first][labels] / 255, labels)
    assert collapsed["generated_read_as_asked"] > 0.9  # the first measure alone cannot see it
    assert collapsed["held_out_read_by_generated_fit"] < 0.85
    wrong = measure_samples(train, held, train.images_B3HW[:1000] / 255, (labels + 1) % 10)
    assert wrong["generated_read_as_asked"] < 0.05


def test_bad_data_is_named(tmp_path):
    with pytest.raises(UserError, match="is neither 'digits', a folder"):
        load_images(str(tmp_path / "none"), 8, 10, 0)
    with pytest.raises(UserError, match="has no images; expected"):
        load_images(str(tmp_path), 8, 10, 0)
    (tmp_path / "set.parquet").write_bytes(b"PAR1 junk")
    with pytest.raises(UserError, match="is damaged or no parquet file"):
        load_images(str(tmp_path / "set.parquet"), 8, 10, 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 1 images in .* cannot be read: .*x\.png"):
        load_images(str(tmp_path), 8, 10, 0)


def test_a_dense_model_without_guidance(folder, tmp_path):
    """No encoder, no routing picture."""
    transformer = {**TINY["transformer"], "experts": {"router": "none"}}
    run_quickstart(
        tiny_settings(data=str(folder), transformer=transformer, loss={"encoder": ""}), tmp_path / "run", draw_routing
    )
    assert {p.name for p in (tmp_path / "run").iterdir()} == OUTPUTS - {"encoder", "routing.json", "routing.png"}
    assert Pipeline.from_pretrained(tmp_path / "run").transformer.projector is None


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"loss.encoder is 'dino'; give own, or nothing"):
        tiny_settings(loss={"encoder": "dino"})
    with pytest.raises(UserError, match="image_size 10 must be a multiple of 4"):
        QuickstartConfig(image_size=10).geometry()
    with pytest.raises(UserError, match="must be 4 for images of 16 pixels"):
        QuickstartConfig(scales="1,2,5").geometry()
    assert str(QuickstartConfig(data="x").geometry()[1]) == "1,2,3,4,6,8"


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(folder, tmp_path):
    (tmp_path / "c.json").write_text(
        json.dumps({**TINY, "max_epochs": 100_000, "train_tokenizer": {"steps": 4000, "save_every": 1}})
    )
    command = ["quickstart", "--data", str(folder)]
    command += ["--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "run")]
    process = forked.start(main, command, files=tmp_path / "said")
    states, deadline = tmp_path / "run" / "training", time.monotonic() + 240
    while not list(states.glob("*.pt")) and process.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill(signal.SIGINT)
    status, _, err = process.end()
    assert status == 130, err
    assert "Traceback" not in err
    assert "interrupted while training the tokenizer, at step" in err
    assert "the same command goes on from there" in err
    step = torch.load(max(states.glob("tokenizer-*.pt")), weights_only=True)["step"]
    assert 0 < step < 4000
    assert f"at step {step} of 4000" in err


def test_an_interruption_names_the_states_of_every_folder(tmp_path):
    (tmp_path / "adapter" / "training").mkdir(parents=True)
    for folders, said in (([tmp_path], "nothing was trained yet"), ([tmp_path, tmp_path / "adapter"], "step-3.pt")):
        (tmp_path / "adapter" / "training" / "step-3.pt").touch()
        with pytest.raises(Interruption, match=f"interrupted; .*{said}; the same"), report_interruption(*folders):
            raise KeyboardInterrupt


def test_few_images_start_from_a_trained_model(folder, tmp_path, capsys):
    """An adapter with the classes of the data is trained, merged, sampled and measured."""
    start = randomised(tiny_config(condition=ConditionConfig(num_classes=3)))
    start.save_pretrained(tmp_path / "start")
    settings = tiny_settings(data=str(folder), start=str(tmp_path / "start"), image_size=0)
    metrics = run_quickstart(settings, tmp_path / "run", draw_routing)
    pipeline = Pipeline.from_pretrained(tmp_path / "run")
    assert pipeline.config.class_names == ("0", "1", "2", "day", "night")
    rows = pipeline.to_checkpoint().transformer["condition.embedding.weight"]
    before = start.to_checkpoint().transformer["condition.embedding.weight"]
    assert torch.equal(rows[[0, 1, 2, 5]], before), "the classes of the model stay"
    assert {"samples.png", "scales.png", "curves.png", "README.md", "adapter"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert 0 <= metrics["copies"] <= 1
    assert metrics["labels"] == ["day", "night"]
    report = format_quickstart_report(metrics, tmp_path / "run")
    assert "of the samples are nearer to a training image than 95 % of the held-out images are" in report
    assert f"nextscale sample {tmp_path / 'run'} --labels day,night" in report
    assert run_quickstart(settings, tmp_path / "run", draw_routing) == metrics, "it is finished"


def write_captioned(folder: Path) -> Path:
    """Twelve light and twelve dark pictures with a caption in a file beside each, but two without one."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(24):
        picture(i % 2, rng).save(folder / f"{i}.png")
        if i not in (3, 10):
            (folder / f"{i}.txt").write_text(f"{'dark' if i % 2 else 'light'}\na picture, number {i}\n")
    return folder


def test_captions_in_place_of_classes(tmp_path, capsys):
    data = write_captioned(tmp_path / "photos")
    with pytest.raises(UserError, match="captions trains a new model, and start an adapter"):
        tiny_settings(captions=True, start="models/var-cifar10")
    with pytest.raises(UserError, match="condition.kind is text: the quickstart trains on classes, or with --captions"):
        tiny_settings(transformer={"condition": {"kind": "text"}})
    words = {"condition": {"max_tokens": 16}}
    settings = tiny_settings(data=str(data), captions=True, transformer={**TINY["transformer"], **words})
    metrics = run_quickstart(settings, tmp_path / "run", draw_routing)
    said = capsys.readouterr().out
    assert "note: 44 captions of 24 images" in said
    assert "note: 22 of 44 captions have more than 15 bytes, up to 20: they are cut" in said
    assert "time on this machine: about" in said
    pipeline = Pipeline.from_pretrained(tmp_path / "run")
    transformer = pipeline.config.transformer
    assert (transformer.condition.kind, transformer.mixers) == ("text", ("attention", "cross-attention"))
    assert set(metrics["prompts"]) <= {"light", "dark"}
    _, held_out = load_images(str(data), 8, captioned=True).split(0.2, 0)
    asked = AskedCaptions.create("photos", held_out)
    expected = [held_out.captions[i][0] for i in range(len(held_out)) if held_out.captions[i] != ("",)]
    assert list(asked.prompts) == expected
    assert asked.measure(12)[0]["prompts"] == [expected[i % len(expected)] for i in range(12)]
    tokens_BL = encode_tokens(pipeline, held_out.images_B3HW)
    prompts = [held_out.captions[i][0] for i in range(len(held_out))]
    values = pipeline.transformer.condition.parse(prompts)
    scores = compute_log_likelihood(pipeline.tokenizer, pipeline.transformer, tokens_BL, values)
    entropy = metrics["cross_entropy_nats_per_token"]["held_out"]
    assert entropy == pytest.approx(float(-scores.sum() / tokens_BL.numel()), rel=1e-5)
    report = format_quickstart_report(metrics, tmp_path / "run")
    assert f"nextscale sample {tmp_path / 'run'} --prompt {' '.join(metrics['prompts'])} --out" in report
    assert (tmp_path / "run" / "README.md").exists()
    assert not (tmp_path / "run" / "routing.png").exists()
    assert run_quickstart(settings, tmp_path / "run") == metrics, "it is finished"


def test_a_model_to_start_from_is_found_where_it_fits(capsys):
    few = QuickstartConfig(data="photos")
    assert find_start(few, 48).endswith("models/var-cifar10")
    assert "48 images are few: the quickstart starts from" in capsys.readouterr().out
    assert find_start(few, 300) == find_start(QuickstartConfig(), 48) == ""
    assert find_start(tiny_settings(data="photos"), 48) == "", "other models are asked for"
    assert find_start(replace(few, few_images=0), 48) == ""
    assert capsys.readouterr().out == ""
    assert find_start(replace(few, image_size=64), 48) == ""
    assert "and does not fit 64x64 pixels" in capsys.readouterr().out


def test_copies_are_told_from_new_images():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 8, 8), generator=rng, dtype=torch.uint8)
    train, held_out = (ImageSet(part, torch.zeros(30, dtype=torch.int64), ("a",)) for part in images.split(30))
    labels = torch.zeros(30, dtype=torch.int64)
    copied = measure_samples(train, held_out, train.images_B3HW / 255, labels)["copies"]
    fresh = torch.rand(30, 3, 8, 8, generator=rng)
    new = measure_samples(train, held_out, fresh, labels)["copies"]
    assert copied == 1
    assert new < 0.3
    entropy = {"training": 1.0, "held_out": 2.0}
    assert describe_copies(1.0, entropy).startswith("the model copies: 100% of the samples")
    assert describe_copies(0.1, entropy).startswith("the samples are no copies of the training images")
    assert "knows its training images by heart" in describe_copies(0.1, entropy | {"held_out": 4.0})
