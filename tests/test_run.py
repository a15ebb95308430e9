"""`nextscale tokenize`, `train` and `resume`: from pictures to a model that samples, and what is refused on the way."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from nextscale.checkpoints import build_on_meta
from nextscale.cli.parser import main
from nextscale.config.files import read_settings
from nextscale.config.log import read_log
from nextscale.config.model import ModelConfig
from nextscale.config.presets import preset
from nextscale.config.transformer import AlignmentConfig
from nextscale.config.transformer_training import RunConfig
from nextscale.evaluation.metrics.frequencies import frequency_loss
from nextscale.pipeline import Pipeline
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.estimate import count_head_flops
from tests.conftest import randomised, tiny_config
from tests.test_data import write_folder

CONFIG = {
    "transformer": {"depth": 2, "width": 32, "heads": 4},
    "images": {"held_out": 0.25},
    "train": {"steps": 6, "batch_size": 6, "micro_batch": 3, "save_every": 2, "log_every": 1, "warmup_steps": 2,
              "sample_every": 4, "ema": 0.5, "label_smoothing": 0.1},
}  # fmt: skip


def zoo(folder) -> list[str]:
    """Pictures of every kind; their names."""
    rng = np.random.default_rng(0)
    rgb, grey = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8), rng.integers(0, 256, (12, 20), dtype=np.uint8)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    pictures = {
        "grey.png": (Image.fromarray(grey), {}),
        "alpha.png": (Image.fromarray(np.dstack([rgb, grey])), {}),
        "palette.gif": (Image.fromarray(rgb).quantize(16), {}),
        "cmyk.jpg": (Image.fromarray(rgb).convert("CMYK"), {}),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "rotated.jpg": (Image.fromarray(rgb), {"exif": rotated}),
        "animated.gif": (frames[0], {"save_all": True, "append_images": frames[1:]}),
        "dot.png": (Image.new("RGB", (1, 1), "teal"), {}),
        "bits.png": (Image.fromarray(grey).convert("1"), {}),
        "large.webp": (Image.fromarray(rgb).resize((300, 200)), {}),
    }
    folder.mkdir(parents=True)
    for name, (picture, options) in pictures.items():
        picture.save(folder / name, **options)
    return list(pictures)


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    """A folder with pictures, a tokenizer and a config, as the working directory."""
    write_folder(tmp_path / "photos")
    pipeline = randomised(tiny_config())
    Pipeline(ModelConfig(pipeline.config.pyramid, pipeline.config.tokenizer, None), pipeline.tokenizer, None)
    pipeline.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str) -> int:
    return main(text.split())


TRAIN = "train c.json --data photos --tokenizer tokenizer --out run --device cpu"


def test_the_whole_road(place, capsys, monkeypatch):
    assert run("tokenize photos --tokenizer tokenizer --out cache --images.held-out 0.25 --shard 7 --device cpu") == 0
    assert run(TRAIN.replace("photos", "cache")) == 0
    assert "held-out cross-entropy" in capsys.readouterr().out
    files = {p.name for p in (place / "run").iterdir()}
    assert files == {"best", "config.json", "curves.png", "finished.json", "inputs.json", "log.jsonl", "run.json",
                     "samples", "samples.png", "tokenizer.safetensors", "training",
                     "transformer.safetensors"}  # fmt: skip
    assert {p.name for p in (place / "run" / "samples").iterdir()} == {"step-00000004.png", "step-00000006.png"}
    log = read_log(place / "run" / "log.jsonl")
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 7))
    assert all(len(r["loss_per_scale"]) == len(r["accuracy_per_scale"]) == 4 for r in steps)
    assert {"images_per_s", "tokens_per_s", "learning_rate", "gradient_norm"} <= steps[0].keys()
    assert [r["step"] for r in log if "validation_loss" in r] == [2, 4, 6]
    assert run("sample run --labels dog,none --out grid.png") == 0
    assert Pipeline.from_pretrained(place / "run" / "best").config.class_names == ("cat", "dog")
    # the same from pictures, which are encoded as they come
    assert run(TRAIN.replace("run", "direct")) == 0
    direct = [r for r in read_log(place / "direct" / "log.jsonl") if "loss" in r]
    assert [r["loss"] for r in direct] == [r["loss"] for r in steps]


def test_the_cached_step_does_no_tokenizer_work(place, monkeypatch):
    assert run("tokenize photos --tokenizer tokenizer --out cache --images.held-out 0.25 --device cpu") == 0

    def refuse(*arguments):
        raise AssertionError("an image was encoded")

    monkeypatch.setattr(Tokenizer, "extract_features", refuse)
    assert run(TRAIN.replace("photos", "cache")) == 0


def test_runs_are_resumed_extended_and_refused(place, capsys):
    assert run(TRAIN) == 0
    assert run(TRAIN) == 2
    assert "the run in run is finished; choose another --out, or give --extend" in capsys.readouterr().err
    assert run(f"{TRAIN} --train.learning-rate 0.5") == 2
    assert "other settings: train.learning_rate was 0.001, now 0.5 (run.json); choose" in capsys.readouterr().err
    assert run(f"{TRAIN} --train.steps 8 --train.learning-rate 0.5 --extend") == 2
    assert "train.learning_rate was 0.001" in capsys.readouterr().err
    assert run(f"{TRAIN} --train.steps 8 --extend") == 0
    assert [r["step"] for r in read_log(place / "run" / "log.jsonl") if "loss" in r] == list(range(1, 9))
    # as if killed after step 6: the command without a config goes on with what the run was started with
    for path in (place / "run" / "training").glob("*8.pt"):
        path.unlink()
    (place / "run" / "finished.json").unlink()
    before = (place / "run" / "transformer.safetensors").read_bytes()
    (place / "run" / "transformer.safetensors").write_bytes(b"gone")
    assert run("resume run --device cpu") == 0
    assert (place / "run" / "transformer.safetensors").read_bytes() == before
    assert run("resume nowhere") == 2
    assert "nowhere holds no run" in capsys.readouterr().err
    # settings that say how, not what, may change at any time; others when it is said
    assert run(f"{TRAIN} --train.steps 10 --extend --train.workers 1 --train.log-every 3") == 0
    assert run(f"{TRAIN} --train.steps 10 --extend --train.seed 1 --accept-changes") == 0


def test_a_run_of_an_earlier_version_goes_on(place, capsys):
    """Its record lacks newer settings: they have their defaults. Another value of one is a change."""
    assert run(TRAIN) == 0
    record = json.loads((place / "run" / "run.json").read_text())
    del record["digest"], record["train"]["backend"]
    del record["transformer"]["feed_forward"], record["transformer"]["options"]
    (place / "run" / "run.json").write_text(json.dumps(record))
    assert run(f"{TRAIN} --train.steps 8 --extend --transformer.feed-forward dense") == 2
    assert "transformer.feed_forward was auto, now dense (run.json); choose" in capsys.readouterr().err
    assert run(f"{TRAIN} --train.steps 8 --extend") == 0
    assert [r["step"] for r in read_log(place / "run" / "log.jsonl") if "loss" in r] == list(range(1, 9))


def test_what_does_not_belong_together_is_named(place, capsys):
    assert run("train c.json --data photos --out run") == 2
    assert "give either --tokenizer DIR" in capsys.readouterr().err
    assert run("train c.json --tokenizer tokenizer --out run") == 2
    assert "no data: give --data" in capsys.readouterr().err
    assert run("train c.json --data photos --start tokenizer --out run --device cpu") == 2
    assert (
        "photos has cat, dog; tokenizer has 5 classes without names; carry the model over first"
        in capsys.readouterr().err
    )
    randomised(tiny_config(), seed=3).save_pretrained("other")
    assert run("tokenize photos --tokenizer tokenizer --out cache --device cpu") == 0
    assert run("train c.json --data cache --tokenizer other --out run --device cpu") == 2
    assert "cache was made by another tokenizer" in capsys.readouterr().err
    assert run("tokenize photos --tokenizer tokenizer --out cache --seed 4 --device cpu") == 2
    assert "holds a cache with other settings (seed was 0, now 4)" in capsys.readouterr().err
    assert run("train no-such-recipe --out run") == 2
    assert "no recipe named 'no-such-recipe'" in capsys.readouterr().err


def test_fine_tuning_starts_from_the_adapted_model(place):
    assert run("adapt tokenizer --classes cat=1,dog --out start") == 0
    rate = "--train.learning-rate 1e-12 --train.final-learning-rate 0"
    assert run(f"train c.json --data photos --start start --out tuned --device cpu {rate}") == 0
    old, new = (Pipeline.from_pretrained(place / name) for name in ("start", "tuned"))
    for name, tensor in new.transformer.state_dict().items():
        assert torch.allclose(tensor, old.transformer.state_dict()[name], atol=1e-6), name
    assert new.config == old.config


def test_a_full_disk_keeps_the_last_state(place, capsys):
    """A limit on file sizes stands for the disk: the first state fits, the next cannot be written."""
    import resource
    import signal

    assert run(f"{TRAIN} --train.steps 2") == 0
    before = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file() and p.name != "log.jsonl"}
    capsys.readouterr()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        assert run(f"{TRAIN} --train.steps 4 --extend") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in (error := capsys.readouterr().err)
    assert "what was there before is unchanged" in error
    for path, content in before.items():
        if path.suffix in (".pt", ".safetensors"):
            assert path.read_bytes() == content, path
    assert run(f"{TRAIN} --train.steps 4 --extend") == 0


def test_pictures_of_every_kind_and_damaged_ones(place, capsys, monkeypatch):
    """The former are converted, the latter named, whether decoded ahead or as they are needed."""
    from nextscale.data import datasets

    names = zoo(place / "zoo" / "a")
    for i in range(95 - len(names)):
        Image.new("RGB", (9, 9), (i, 2 * i, 40)).save(place / "zoo" / "a" / f"plain{i}.png")
    whole = (place / "zoo" / "a" / "plain0.png").read_bytes()
    damaged = {"cut.png": whole[:-30], "zero.jpg": b"", "text.jpg": b"this is no picture", "cut2.png": whole[:40],
               "zero2.png": b""}  # fmt: skip
    for name, content in damaged.items():
        (place / "zoo" / "a" / name).write_bytes(content)
    command = TRAIN.replace("photos", "zoo")
    assert run(command) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in damaged)
    monkeypatch.setattr(datasets, "_MEMORY_LIMIT", 0)
    assert run(command.replace("run", "lazy") + " --train.steps 20 --train.workers 1") == 0
    named = (place / "lazy" / "unreadable.txt").read_text()
    assert all(name in named for name in damaged)
    assert "plain" not in named
    assert run(command.replace("run", "strict") + " --train.steps 20 --images.max-unreadable 0.01") == 2
    assert "examples cannot be read" in capsys.readouterr().err


def test_dry_run_of_every_recipe(place, capsys):
    published = {"16": 310_283_520, "20": 600_917_136, "24": 1_033_399_360, "30": 2_010_020_356, "36": 2_353_893_904}
    for depth, parameters in published.items():
        assert run(f"train var-d{depth} --out none --dry-run") == 0
        out = capsys.readouterr().out
        assert f"{parameters:,} parameters" in out
        assert "GPU-hours" in out
        assert "GiB" in out
    assert not (place / "none").exists()
    # 300 GMAC for two sequences with guidance, so 300 GFLOP for one; three times that for a training step
    assert run("train var-d16 --out none --dry-run") == 0
    assert 0.88 < float(capsys.readouterr().out.split("arithmetic")[1].split()[0]) < 0.92
    assert run("train var-d16 --out none --dry-run --transformer.depth 12") == 0
    assert "133,186,960 parameters" in capsys.readouterr().out, "width and heads follow the depth"


def test_dry_run_of_adapters(place, capsys):
    from torch.nn import Linear

    start = randomised(tiny_config())
    start.save_pretrained(place / "start")
    for i in range(10):
        (place / "few" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(place / "few" / "cat" / f"{i}.png")
    assert run("train lora --start start --data few --out none --dry-run --lora.rank 2") == 0
    said = capsys.readouterr().out
    layers = [
        m for b in start.transformer.blocks for m in (*b.mixers.modules(), *b.ffn.modules()) if isinstance(m, Linear)
    ]
    trained = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    assert f"parameters, {trained:,} of them trained (adapters)" in said
    assert "epochs of 8)" in said
    assert "GiB of weights that stay as they are" in said
    assert "assumed" not in said


def test_dry_run_of_divided_experts(place, capsys):
    """Weights, gradients and two moments in float32: those of the experts are divided, all others are not."""
    command = "train mepa-d12 --out none --dry-run --train.sharding experts"
    assert run(command) == 0
    out = capsys.readouterr().out
    everything = int(out.split("model")[1].split()[0].replace(",", ""))
    experts = 12 * 8 * (768 * 3072 + 3072 + 3072 * 768 + 768)
    divided, whole = 16 * experts / 2**30, 16 * (everything - experts) / 2**30
    assert f"{divided:.2f} GiB divided by the number of devices and {whole:.2f} GiB per device" in out
    assert run("train var-d16 --out none --dry-run --train.sharding experts") == 2
    assert "needs a mixture of experts; the transformer has none" in capsys.readouterr().err


def test_dry_run_counts_the_alignment_head(place, capsys):
    """Of a ViT-B's width where no encoder is at hand; its arithmetic on the tokens of the guided scales alone."""
    found = {}
    for encoder in ("cache", ""):
        assert run(f"train mepa-d12 --out none --dry-run --loss.group 6,7 --loss.encoder={encoder}") == 0
        out = capsys.readouterr().out
        assert ("assumed features of width 768" in out) == bool(encoder)
        parameters = int(out.split("model")[1].split()[0].replace(",", ""))
        found[encoder] = parameters, float(out.split("arithmetic")[1].split()[0])
    weights = 768 * 2048 + 2048 * 2048 + 2048 * 768
    assert found["cache"][0] - found[""][0] == weights + 2048 + 2048 + 768
    tokens = sum(side * side for side in (1, 2, 3, 4, 5, 6, 8))
    assert found["cache"][1] - found[""][1] == pytest.approx(3 * 2 * tokens * weights / 1e12, abs=1.1e-3)


def test_flops_of_the_alignment_head_equal_torch_s_counter():
    config = tiny_config(alignment=AlignmentConfig(width=6, hidden=8))
    _, model = build_on_meta(config)
    totals = []
    for guided in (0, 2, 4):
        with FlopCounterMode(display=False) as counter:
            model(
                torch.zeros(1, dtype=torch.int64, device="meta"),
                torch.empty(1, 29, 4, device="meta"),
                aligned_scales=guided,
            )
        totals.append(counter.get_total_flops() - count_head_flops(model, guided))
    assert len(set(totals)) == 1
    assert count_head_flops(model, 2) == 2 * 5 * (32 * 8 + 8 * 8 + 8 * 6)


def test_recipes_say_what_was_published():
    from pathlib import Path

    settings = read_settings(RunConfig, Path("var-d30"))
    assert settings.train.schedule_steps(1_281_167) == (round(350 * 1_281_167 / 1024), round(7 * 1_281_167 / 1024))
    assert settings.train.learning_rate == pytest.approx(8e-5 * 1024 / 256)
    assert settings.init.adaln_gamma == 1e-5
    assert settings.scales == str(preset("var-d30").pyramid)


def test_token_frequencies_against_a_loop():
    rng = np.random.default_rng(0)
    train, labels = rng.integers(0, 5, (40, 3)), rng.integers(0, 2, 40)
    held, held_labels = rng.integers(0, 5, (10, 3)), rng.integers(0, 2, 10)
    losses = []
    for a in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        nats = []
        for tokens, label in zip(held, held_labels, strict=True):
            for place, token in enumerate(tokens):
                same = train[labels == label][:, place]
                nats.append(-np.log(((same == token).sum() + a) / (len(same) + 5 * a)))
        losses.append(np.mean(nats))
    arrays = (train, labels, held, held_labels)
    assert frequency_loss(*map(torch.from_numpy, arrays), classes=2, vocab=5) == pytest.approx(min(losses), rel=1e-5)
    assert frequency_loss(*map(torch.from_numpy, arrays), classes=10**6, vocab=4096) is None


def test_values_go_to_tensorboard(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(f"{TRAIN} --train.loggers tensorboard") == 0
    events = EventAccumulator(str(place / "run" / "tensorboard"))
    events.Reload()
    assert {"transformer/loss", "transformer/loss_per_scale/3"} <= set(events.Tags()["scalars"])
    logged = [r["loss"] for r in read_log(place / "run" / "log.jsonl") if "loss" in r]
    np.testing.assert_allclose([e.value for e in events.Scalars("transformer/loss")], logged, rtol=1e-6)
    shutil.rmtree(place / "run")
