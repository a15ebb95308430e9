"""Model cards: what they say is what the folder's files say, their lines run, and a person's text is never lost."""

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from nextscale.cards.card import write_card
from nextscale.cards.file import MARKER
from nextscale.cards.licences import describe_licence
from nextscale.cards.model import read_model
from nextscale.cards.reports import find_figures
from nextscale.cards.training import Training, read_training
from nextscale.checkpoints.hub import list_published
from nextscale.checkpoints.router_fingerprint import compute_router_fingerprint
from nextscale.checkpoints.saving import write_checkpoint
from nextscale.cli.parser import main
from nextscale.common.contents import identify_folder
from nextscale.common.errors import UserError
from nextscale.config.parse import from_dict
from nextscale.config.transformer import ExpertsConfig
from nextscale.pipeline import Pipeline
from tests.conftest import GOLDEN, randomised, tiny_config
from tests.test_int8 import FAMILIES
from tests.test_processes import write_place
from tests.test_readme import find_blocks

KINDS = ("generator", "tokenizer", "classifier", "encoder")
STEPS = "--train.steps 2 --train.save-every 1 --device cpu"
COMMANDS = [
    "tokenize photos --tokenizer start --out cache --images.held-out 0.25 --images.flip --views 2 --device cpu",
    f"train c.json --data cache --tokenizer start --out generator --sampling.cfg 2 --train.seed 3 {STEPS}",
    f"tokenizer train tokenizer.json --data photos --out tokenizer {STEPS}",
    f"classifier train classifier.json --data photos --out classifier {STEPS}",
    f"encoder train encoder.json --data photos --out encoder {STEPS}",
    "evaluate generator --features classifier --reference photos --num 10 --top-k 5 --device cpu "
    "--out generator/report.json",
    "tokenizer evaluate tokenizer --data photos --out tokenizer/test --device cpu",
    "classifier evaluate classifier --data photos --out classifier/test.json --device cpu",
    "encoder evaluate encoder --data photos --test photos --out encoder/test.json --device cpu",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind, with a report on its model; and pictures, for lines of cards."""
    folder = tmp_path_factory.mktemp("cards")
    write_place(folder)
    (folder / "tokenizer").rename(folder / "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            assert main(command.split()) == 0, command
    return folder


@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    """A copy of the runs, as the working folder."""
    shutil.copytree(runs, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    for name in ("others", "samples"):
        shutil.copytree("photos", name)
    Image.new("RGB", (30, 20), "teal").save("photo.jpg")
    return tmp_path / "place"


def read(folder) -> tuple[dict, str]:
    """(metadata, text) of a card, which the hub's own class reads too."""
    text = (Path(folder) / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert ModelCard.load(Path(folder) / "README.md").data.to_dict().keys() == metadata.keys()
    return metadata, body


def read_json(path) -> dict:
    return json.loads(Path(path).read_text())


def list_metrics(metadata) -> dict[str, float]:
    results = metadata["model-index"][0]["results"] if "model-index" in metadata else []
    return {metric["type"]: metric["value"] for result in results for metric in result["metrics"]}


def run_lines(text: str) -> None:
    """Run the commands and the Python of a card."""
    (commands,), (lines,) = find_blocks(text, "sh"), find_blocks(text, "python")
    for command in commands.splitlines():
        words = shlex.split(command)
        assert words[0] == "nextscale"
        assert main(words[1:]) == 0, command
    exec(lines, {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_what_the_files_of_a_run_say(kind, place):
    assert main(["card", kind]) == 0
    metadata, text = read(kind)
    settings = read_json(place / kind / "run.json")
    log = [json.loads(line) for line in (place / kind / "log.jsonl").read_text().splitlines()]
    names = ("validation_loss", "psnr_db", "validation_accuracy", "knn_accuracy")
    name = names[KINDS.index(kind)]
    (shown,) = metadata["nextscale"]["training"].pop("held_out").values()
    assert shown == [record[name] for record in log if name in record][-1]
    assert metadata["library_name"] == "nextscale"
    assert metadata["nextscale"]["weights"] == read_json(place / kind / "config.json")["digests"]
    training = metadata["nextscale"]["training"]
    assert (training["steps"], training["held_out_step"]) == (2, 2)
    assert training["batch_size"] == settings["train"]["batch_size"]
    assert training["seed"] == settings["train"]["seed"] == (3 if kind == "generator" else 0)
    assert training["precision"] == settings["train"]["precision"]
    count = len(list((place / "photos").rglob("*.png")))
    assert training["images"] == count - len(read_json(place / "cache" / "cache.json")["class_names"]) * math.floor(
        count / 2 * 0.25
    )
    assert "photos" in text
    if kind == "generator":  # the cache says what it was made of
        assert (training["data"], training["views"], training["augmentation"]) == ("photos", 2, ["mirrored at random"])
        assert "![Samples](samples.png)" in text
    pixels = {"generator": 8, "tokenizer": 8, "classifier": 8, "encoder": 8}[kind]
    assert f"{pixels} x {pixels} pixels" in text
    assert "Not stated." in text


FIGURES = {
    "generator": ("report.json", {"classifier_fd": ["measures", "classifier", "classifier_fd"]}),
    "tokenizer": ("test/report.json", {"psnr_db": ["psnr_db"], "codes_used": ["usage"]}),
    "classifier": ("test.json", {"accuracy": ["accuracy"], "cross_entropy": ["loss"]}),
    "encoder": ("test.json", {"knn_accuracy": ["knn_accuracy"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_reports_on_these_weights(kind, place, capsys):
    file, figures = FIGURES[kind]
    path = place / kind / file
    report = read_json(path)
    assert main(["card", kind]) == 0
    metadata, text = read(kind)
    found = list_metrics(metadata)
    for name, keys in figures.items():
        value = report
        for key in keys:
            value = value[key]
        assert found[name] == pytest.approx(value, rel=1e-5)
    assert f"]({file})" in text
    arguments = metadata["model-index"][0]["results"][0]["metrics"][0]["args"]
    assert arguments["report"] == file
    if kind == "generator":
        assert arguments["sampling"]["top_k"] == 5
        assert arguments["feature_weights"] == report["measures"]["classifier"]["weights"]
        assert "--top-k 5" in text, "the lines sample as the figures were measured"
    # a changed digit, other weights, and a report that does not name any
    spoiled = path.read_text()
    path.write_text(re.sub(r'images": \d+', 'images": 9', spoiled, count=1))
    other = {name: value for name, value in report.items() if name != "digest"}
    (place / kind / "old.json").write_text(json.dumps({**other, "model_weights": {}}))
    (place / kind / "changed.json").write_text(json.dumps({**other, "model_weights": {"config.json": "crc32:0"}}))
    capsys.readouterr()
    assert main(["card", kind]) == 0
    out = capsys.readouterr().out
    for name, reason in ((file, "does not match the digest"), ("old.json", "does not say which weights"),
                         ("changed.json", "measured other weights")):  # fmt: skip
        assert re.search(f"note: left out of the card: {kind}/{name}.*{reason}", out), out
    assert list_metrics(read(kind)[0]) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_a_card_run(kind, place):
    assert main(["card", kind]) == 0
    run_lines(read(kind)[1])
    assert Path({"generator": "grid.png", "tokenizer": "restored.png"}.get(kind, "photo.jpg")).exists()


def test_a_person_s_text_and_statements_stay(place, capsys):
    command = ["card", "generator", "--licence", "CC BY-NC 4.0", "--data", "me/photos"]
    assert main(command) == 0
    card = place / "generator" / "README.md"
    first = card.read_text()
    assert main(["card", "generator"]) == 0
    assert card.read_text() == first
    own = "\n## Notes\n\nTaken in *Rome*. ---\n\n| a | b |\n"
    card.write_text(first.replace("tags:\n", "language: it\ntags:\n- rome\n") + own)
    assert main(["card", "generator", "--name", "me/rome"]) == 0
    metadata, text = read("generator")
    assert card.read_text().endswith(MARKER + "\n" + own)
    assert (metadata["license"], metadata["datasets"], metadata["language"]) == ("cc-by-nc-4.0", ["me/photos"], "it")
    assert "rome" in metadata["tags"]
    assert 'from_pretrained("me/rome")' in text
    assert text.startswith("\n# rome\n")
    assert main(["card", "generator", "--licence", "Ask the museum: me@example.org"]) == 0
    assert main(["card", "generator"]) == 0
    metadata, text = read("generator")
    assert (metadata["license"], metadata["license_name"]) == ("other", "ask-the-museum-me-example.org")
    assert "Ask the museum: me@example.org" in text
    card.write_text("---\na: [\n---\n" + MARKER)
    capsys.readouterr()
    assert main(["card", "generator"]) == 2
    assert "its metadata between the lines `---` cannot be read" in capsys.readouterr().err
    assert card.read_text().startswith("---\na: [")


def test_a_readme_of_a_person_is_never_replaced(tiny, tmp_path, capsys):
    card = tmp_path / "README.md"
    card.write_text("# Mine\n")
    tiny.save_pretrained(tmp_path)
    assert card.read_text() == "# Mine\n"
    assert "was not written by nextscale" in capsys.readouterr().out
    assert main(["card", str(tmp_path)]) == 2
    assert MARKER in capsys.readouterr().err, "the line to write above it"
    assert card.read_text() == "# Mine\n"
    card.write_text(f"{MARKER}\n# Mine\n")
    assert main(["card", str(tmp_path)]) == 0
    assert card.read_text().endswith(f"{MARKER}\n# Mine\n")
    card.write_text("# Mine\n")
    assert main(["card", str(tmp_path), "--overwrite"]) == 0
    assert "Mine" not in card.read_text()


def test_what_is_known_goes_with_the_same_weights(place, capsys):
    """Loaded from A and saved to B; saved again with other weights."""
    assert main(["card", "generator", "--licence", "mit"]) == 0
    before, _ = read("generator")
    pipeline = Pipeline.from_pretrained("generator", backend="plain")
    pipeline.save_pretrained("copy")
    metadata, text = read("copy")
    assert metadata["nextscale"]["training"] == before["nextscale"]["training"]
    assert list_metrics(metadata) == list_metrics(before) != {}
    assert "![Samples](samples.png)" in text
    assert {p.name for p in Path("copy").iterdir()} == {
        "README.md", "config.json", "tokenizer.safetensors", "transformer.safetensors", "report.json", "samples.png",
    }  # fmt: skip
    assert identify_folder(Path("copy")) == "a nextscale checkpoint"
    assert main(["card", "copy"]) == 0
    assert read("copy") == (metadata, text), "from the card alone"
    shutil.rmtree("generator")
    Pipeline.from_pretrained("copy").save_pretrained("third")
    assert read("third")[0]["nextscale"] == metadata["nextscale"]

    with torch.no_grad():
        pipeline.transformer.head.bias += 1
    for folder in ("fourth", "copy"):
        pipeline.save_pretrained(folder)
    capsys.readouterr()
    for folder in ("fourth", "copy"):
        changed, text = read(folder)
        assert "The weights were changed" not in text if folder == "fourth" else "![Samples]" not in text
        assert list_metrics(changed) == {}
    again = Pipeline.from_pretrained("third")
    with torch.no_grad():
        again.transformer.head.bias += 1
    again.save_pretrained("third")
    for _ in range(2):
        changed, text = read("third")
        assert changed["nextscale"]["training"] == {**metadata["nextscale"]["training"], "changed": True}
        assert "The weights were changed, or stored in another type, after this training." in text
        assert "![Samples]" not in text
        assert list_metrics(changed) == {}
        assert main(["card", "third"]) == 0
    assert "third/report.json measured other weights" in capsys.readouterr().out
    Pipeline.from_config(tiny_config()).save_pretrained("classless")
    assert "Nothing in its folder says how it was trained." in read("classless")[1]


def test_the_best_model_of_a_run_has_the_facts_of_its_step(place):
    log = place / "generator" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {r["step"]: r["validation_loss"] for r in lines if "validation_loss" in r}
    assert main(["card", "generator/best"]) == 0
    training = read("generator/best")[0]["nextscale"]["training"]
    assert training["held_out_step"] == min(losses, key=losses.get)
    assert training["held_out"] == {"nats per token": min(losses.values())}
    assert training["command"] == "nextscale train"


def write_dynamic(folder: Path) -> None:
    """A model with dynamic experts and a table of thresholds, as calibration leaves it."""
    checkpoint = randomised(tiny_config(**FAMILIES["dynamic"])).to_checkpoint()
    model = checkpoint.config.transformer
    dynamic = replace(model.dynamic, router_fingerprint=compute_router_fingerprint(checkpoint.transformer, model))
    rows = [{"share": share, "tau": [share / 2] * dynamic.scales} for share in (1.0, 0.9, 0.7)]
    config = replace(checkpoint.config, transformer=replace(model, dynamic=dynamic))
    write_checkpoint(folder, replace(checkpoint, config=config, origin={"dynamic": {"budgets": rows}}))


def write_odd_names(folder: Path) -> None:
    names = ("none", 'a "b", c', "x|y", "x|y", "<b>")
    randomised(replace(tiny_config(), class_names=names)).save_pretrained(folder)


def import_official(folder: Path) -> None:
    names = ["--vae", GOLDEN / "var_tiny_l2" / "vae.safetensors", "--var", GOLDEN / "var_tiny_l2" / "var.safetensors"]
    assert main(["import-official", *map(str, names), "--out", str(folder)]) == 0


def quantise(folder: Path) -> None:
    randomised(tiny_config()).save_pretrained(folder.with_name("before"))
    assert main(["quantise", str(folder.with_name("before")), "--out", str(folder)]) == 0


def save_family(name: str):
    return lambda folder: randomised(tiny_config(**FAMILIES[name])).save_pretrained(folder)


VARIANTS = {
    "int8": (quantise, "the transformer's linear layers in 8 bits", "int8"),
    "mixture": (save_family("mixture"), "in each block, router", "mixture-of-experts"),
    "mvar": (save_family("mvar"), "An M-VAR model", "mamba"),
    "dynamic": (write_dynamic, "calibrated: 1.00, 0.90, 0.70", "dynamic-experts"),
    "wide": (lambda f: randomised(tiny_config("1,2x3,4x6")).save_pretrained(f), "8 x 12 pixels", "nextscale"),
    "official": (import_official, "converted from official files, whose authors set their licence", "nextscale"),
    "names": (write_odd_names, r"none, a \"b\", c, x\|y, x\|y, \<b\>".replace('\\"', '"'), "nextscale"),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_models_of_every_family_have_a_card_whose_lines_run(name, tmp_path, monkeypatch):
    make, sentence, tag = VARIANTS[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "my model")
    assert main(["card", "my model"]) == 0
    metadata, text = read("my model")
    assert sentence in " ".join(text.split())
    assert tag in metadata["tags"]
    run_lines(text)
    assert Image.open("grid.png").width > 0
    assert main(["info", "my model", "--verify"]) == 0
    assert main(["card", "my model"]) == 0
    assert read("my model") == (metadata, text)


def test_a_model_with_own_code_names_the_module(tmp_path, monkeypatch, capsys):
    from nextscale.common import registry
    from nextscale.transformer.feed_forward.routers import ScaleTokenRouter

    monkeypatch.setattr(registry.ROUTERS, "_entries", dict(registry.ROUTERS._entries))

    class Mine(ScaleTokenRouter):
        pass

    Mine.__module__ = "my_router"
    registry.ROUTERS.register("mine")(Mine)
    experts = ExpertsConfig(router="mine", count=4, active=2)
    randomised(tiny_config(experts=experts)).save_pretrained(tmp_path)
    _, text = read(tmp_path)
    assert f"nextscale --import my_router sample {tmp_path}" in text
    assert "import my_router\nfrom nextscale" in text
    assert "needs `my_router`, which is not here" in text


def test_what_is_no_model_or_damaged_is_named(tiny, tmp_path, capsys):
    tiny.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    weights = tmp_path / "model" / "transformer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "dinov2"}')
    for name, message in (("model", "transformer.safetensors does not match its digest"),
                          ("nothing", "there is no folder"), ("other", "holds no model of nextscale")):  # fmt: skip
        assert main(["card", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    weights.unlink()
    assert main(["card", str(tmp_path / "model")]) == 2
    assert "there is no" in capsys.readouterr().err
    assert list(tmp_path.rglob("README.md")) == []


def test_damaged_records_are_left_out_and_named(place, capsys):
    run = place / "tokenizer" / "run.json"
    run.write_text(run.read_text().replace('"learning_rate": 0.00', '"learning_rate": 0.01'))
    assert main(["card", "tokenizer"]) == 0
    assert "left out of the card: tokenizer/run.json does not match the digest" in capsys.readouterr().out
    training = read("tokenizer")[0]["nextscale"]["training"]
    assert training["steps"] == 2, "of the log"
    assert "learning_rate" not in training


def list_spoiled(value):
    """The table with a value, or one in a table in it, replaced by another of another type; and without it."""
    for name, inner in value.items():
        for other in ([1], "x", None):
            yield {**value, name: other}
        yield {n: v for n, v in value.items() if n != name}
        if isinstance(inner, dict):
            yield from ({**value, name: spoiled} for spoiled in list_spoiled(inner))


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
def test_records_of_any_content_leave_a_card_that_can_be_read(kind, place):
    model = read_model(Path(kind), verify=False)
    whole = read_training(Path(kind), kind)[0]
    files = ["run.json", "inputs.json", "finished.json", "../cache/inputs.json", "report.json", "test/report.json"]
    files.append(f"training/{max(p.name for p in Path(kind, 'training').glob('*-0*.json'))}")
    for file in (Path(kind, name) for name in files if Path(kind, name).exists()):
        content = file.read_bytes()
        table = {name: value for name, value in json.loads(content).items() if name != "digest"}
        for spoiled in [*list_spoiled(table), [table], None]:
            file.write_text(json.dumps(spoiled))
            if "report" in file.name:
                find_figures(Path(kind), model)
                continue
            training, _ = read_training(Path(kind), kind)
            assert from_dict(Training, training.to_table(), "x") == training
        file.write_bytes(content)
    assert read_training(Path(kind), kind)[0] == whole


def test_the_hub_gets_the_model_the_card_and_what_it_links_to(place, tmp_path, monkeypatch):
    """No states, no records of the run, no report that the card leaves out."""
    import huggingface_hub

    uploaded: dict[str, bytes] = {}

    class Api:
        def __init__(self, token=None):
            assert token in (None, "secret")

        def create_repo(self, repo_id, private, exist_ok):
            return type("Url", (), {"repo_id": repo_id if "/" in repo_id else f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            files = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
            uploaded.clear()
            for name in filter_repo_objects(files, allow_patterns=allow_patterns):
                uploaded[name] = (Path(folder_path) / name).read_bytes()
            return f"https://example.org/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    expected = {"README.md", "config.json", "tokenizer.safetensors", "transformer.safetensors", "report.json",
                "samples.png"}  # fmt: skip
    (place / "generator" / "stale.json").write_bytes((place / "generator" / "report.json").read_bytes()[:-3])
    pipeline = Pipeline.from_pretrained("generator", backend="plain")
    assert pipeline.push_to_hub("photos", token="secret") == "https://example.org/me/photos"
    assert uploaded.keys() == expected
    (tmp_path / "download").mkdir()
    for name, content in uploaded.items():
        (tmp_path / "download" / name).write_bytes(content)
    assert 'from_pretrained("me/photos")' in read(tmp_path / "download")[1]
    pipeline.save_pretrained("generator", push_to_hub=True)
    assert uploaded.keys() == expected
    assert main(["card", "tokenizer"]) == 0
    assert set(list_published(place / "tokenizer")) == {
        "README.md", "config.json", "tokenizer.safetensors", "reconstructions.png", "test/report.json",
    }  # fmt: skip
    card = place / "tokenizer" / "README.md"
    card.write_text(card.read_text() + "[x](../photo.jpg) [y](run.json) [z](nowhere.png) [w](https://a.org/b.png)\n")
    assert set(list_published(place / "tokenizer")) - {"run.json"} == {
        "README.md", "config.json", "tokenizer.safetensors", "reconstructions.png", "test/report.json",
    }  # fmt: skip


def test_licences_are_those_that_the_hub_knows():
    assert describe_licence("Apache-2.0") == {"license": "apache-2.0"}
    assert describe_licence("CC0 1.0") == {"license": "cc0-1.0"}
    assert describe_licence(" ") == {}
    assert describe_licence("Ours, 2026") == {"license": "other", "license_name": "ours-2026"}


def test_the_cards_of_the_repository_are_as_the_command_writes_them(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    shutil.copytree(root / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    for folder in sorted(Path("models").iterdir()):
        before = (folder / "README.md").read_text()
        assert write_card(folder) == []
        assert (folder / "README.md").read_text() == before, folder
        assert read(folder)[0]["license"] == "apache-2.0"


def test_saving_never_fails_for_a_card_that_cannot_be_read(tiny, tmp_path, capsys):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\na: [\n---\n{MARKER}\n")
    Pipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "its metadata between the lines" in capsys.readouterr().out
    with pytest.raises(UserError, match="metadata"):
        write_card(tmp_path)
