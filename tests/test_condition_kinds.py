"""Vectors, control pictures and combined conditions; guidance for each part; what callers give for each image."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.conditions import read_condition
from nextscale.config.condition import ConditionConfig
from nextscale.config.sampling import SampleConfig
from nextscale.sampling import build_sampler
from nextscale.sampling.guidance import count_sequences, guide_by_parts, schedule_parts, stack_copies
from nextscale.sampling.sampler import sample_images, sample_scales
from nextscale.transformer.conditions.batch import Rows, join_rows
from nextscale.transformer.conditions.layers import average_tokens
from nextscale.transformer.conditions.picture import compute_control
from tests.conftest import check_flops, randomised, tiny_config
from tests.test_cli import fails

CROSS = ("attention", "cross-attention")
TEXT = ConditionConfig("text", max_tokens=8)
EDGES = ConditionConfig("picture", control="edges", picture_size=(8, 8), layers=1)
VECTOR = ConditionConfig("vector", embedding_width=6)
CLASS, SHAPE = ConditionConfig("class", num_classes=5), ConditionConfig("class", num_classes=3, source="shape")
CONFIGS = {
    "vector": tiny_config(condition=VECTOR),
    "picture": tiny_config(condition=EDGES, mixers=CROSS),
    "text and picture": tiny_config(
        condition=ConditionConfig("combined", parts={"edges": EDGES, "caption": TEXT}), mixers=CROSS
    ),
    "attributes": tiny_config(condition=ConditionConfig("combined", parts={"what": CLASS, "shape": SHAPE})),
}


@pytest.fixture(scope="module")
def pipelines():
    return {name: randomised(config) for name, config in CONFIGS.items()}


def draw_edges(count):
    return (torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(3)) > 0.5).float()


def list_given(name):
    """What a caller gives for three images."""
    return {
        "vector": {"vectors": torch.randn(3, 6, generator=torch.Generator().manual_seed(4))},
        "picture": {"control": [*draw_edges(2), None]},
        "text and picture": {"control": [None, *draw_edges(2)], "prompts": ["a cat", None, "two dogs"]},
        "attributes": {"labels": {"what": [1, None, 2], "shape": [0, 1, None]}},
    }[name]


def read(pipeline, given):
    return read_condition(pipeline, given.get("labels"), {n: v for n, v in given.items() if n != "labels"}, None)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_image_does_not_depend_on_its_batch(name, pipelines):
    pipeline, given = pipelines[name], list_given(name)
    together = pipeline.sample(**given)
    assert len({image.sum().item() for image in together.tensor}) == 3
    values = read(pipeline, given)
    for i in range(3):
        sampler = build_sampler(
            pipeline.tokenizer, pipeline.transformer, values[i : i + 1], SampleConfig(), first_image=i
        )
        assert torch.equal(sample_images(sampler).images_B3HW[0], together.tensor[i])


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_counted(name):
    check_flops(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_kinds_are_saved_and_loaded(name, pipelines, tmp_path):
    pipelines[name].save_pretrained(tmp_path)
    loaded = type(pipelines[name]).from_pretrained(tmp_path)
    assert loaded.config == CONFIGS[name]
    given = list_given(name)
    assert torch.equal(loaded.sample(**given).tokens, pipelines[name].sample(**given).tokens)


def test_a_vector_is_normalised_and_projected(pipelines):
    condition = pipelines["vector"].transformer.condition
    x = torch.tensor([3.0, 1, 4, 1, 5, 9])
    expected = condition.project((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt())
    given = condition(condition.parse([x.tolist(), None]))
    assert torch.allclose(given.vector_BD[0], expected, atol=1e-5)
    assert torch.equal(given.vector_BD[1], condition.none.weight[0])
    rows = condition.from_batch({"vector": x.half()[None]})
    assert torch.equal(rows["vector"], x[None])
    with pytest.raises(UserError, match=r"6 finite numbers; got \(5,\)"):
        condition.parse([x[:5]])
    with pytest.raises(UserError, match=r"reads vectors \(B, 6\); the data have \(1, 5\)"):
        condition.from_batch({"vector": x[None, :5]})


def test_patches_of_a_picture_have_their_places():
    """The sequence of a picture without layers, against a loop over its patches."""
    config = ConditionConfig("picture", picture_size=(8, 12), channels=3, patch=4, layers=0)
    condition = randomised(tiny_config(condition=config, mixers=CROSS)).transformer.condition
    picture = torch.rand(3, 8, 12)
    given = condition(condition.parse([picture, None]))
    assert given.sequence_BTD.shape == (2, 7, 32)
    assert given.mask_BT.tolist() == [[True] * 7, [True] + [False] * 6]
    for i in range(2):
        for j in range(3):
            patch = picture[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten()
            token = condition.project(patch) + condition.rows.weight[i] + condition.columns.weight[j]
            assert torch.allclose(given.sequence_BTD[0, 1 + 3 * i + j], condition.norm(token), atol=1e-4)
    mean = given.sequence_BTD[0].mean(dim=0)
    assert torch.allclose(given.vector_BD[0], condition.pool(mean), atol=1e-4)


def test_the_mean_over_tokens_is_that_of_the_visible_ones():
    for tokens in (1, 2, 7, 16):
        x, mask = torch.randn(3, tokens, 5), torch.rand(3, tokens) > 0.4
        mask[:, 0] = True
        expected = torch.stack([row[seen].mean(dim=0) for row, seen in zip(x, mask, strict=True)])
        assert torch.allclose(average_tokens(x, mask), expected, atol=1e-6)


def test_control_pictures_of_images():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[..., 4:] = 200
    edges = compute_control(image, "edges")[0, 0]
    assert edges.unique().tolist() == [0, 255]
    assert (edges == 255).nonzero()[:, 1].unique().tolist() == [3, 4], "where the brightness changes"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    low = compute_control(torch.from_numpy(pixels).permute(2, 0, 1)[None], "low-resolution")[0]
    blocks = pixels.reshape(2, 4, 2, 4, 3).mean(axis=(1, 3)).repeat(4, 0).repeat(4, 1)
    assert np.abs(low.permute(1, 2, 0).numpy() - blocks).max() <= 0.51
    with pytest.raises(UserError, match="there is no control picture 'depth'"):
        compute_control(image, "depth")


def test_training_batches_have_the_values_of_all_parts(pipelines):
    condition = pipelines["text and picture"].transformer.condition
    image = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    text = {"text": torch.tensor([list(b"ab"), list(b"cd")]), "text_length": torch.tensor([2, 1])}
    rows = condition.from_batch({"image": image, **text})
    assert torch.equal(rows["caption"], condition.parts["caption"].parse(["ab", "c"]))
    edges = compute_control(image, "edges")
    assert torch.equal(rows["edges"]["picture"], edges / 255)
    assert torch.equal(condition.from_batch({"edges": edges, **text})["edges"]["picture"], edges / 255)
    drop = condition.drop(torch.tensor([[True, False], [False, True]]), rows)
    assert drop["edges"]["given"].tolist() == [False, True]
    assert torch.equal(drop["caption"], condition.parts["caption"].parse(["ab", ""]))
    drawn = condition.draw_drop(20000, 0.2, torch.Generator().manual_seed(0)).float()
    assert torch.allclose(drawn.mean(dim=0), torch.tensor(1 - 0.8**2), atol=0.02)
    assert abs(float(drawn.prod(dim=1).mean()) - (0.2 + 0.8 * 0.04)) < 0.02, "together more often than by chance"


def test_guidance_of_each_part_is_the_formula_of_instruct_pix2pix(pipelines):
    """One step by hand: logits without any part, with the edges, and with both."""
    pipeline, given = pipelines["text and picture"], list_given("text and picture")
    model, values = pipeline.transformer, read(pipeline, given)
    settings = SampleConfig(cfg_parts={"edges": 0.5, "caption": 2.0})
    strengths_PK = schedule_parts(settings, model.pyramid)
    assert [strengths[-1] for strengths in strengths_PK] == [0.5, 2.0]
    assert count_sequences(*strengths_PK) == (3,) * 4
    sampler = build_sampler(pipeline.tokenizer, model, values, settings)
    step = list(sample_scales(sampler))[-1]
    tokens = sample_images(build_sampler(pipeline.tokenizer, model, values, settings)).tokens_BL
    nothing = model.condition.nothing(3)
    edges_alone = Rows({"edges": values["edges"], "caption": nothing["caption"]})
    inputs = pipeline.tokenizer.teacher_inputs(tokens)
    none, edges, both = (model(v, inputs).logits_BNV[:, -16:] for v in (nothing, edges_alone, values))
    expected = none + 1.5 * (edges - none) + 3.0 * (both - edges)
    assert torch.allclose(step.logits_BNV, expected, atol=1e-3)
    one = schedule_parts(SampleConfig(cfg_parts={"caption": 2.0}), model.pyramid)
    copies = stack_copies(model.condition, values, ["caption"])
    assert count_sequences(*one) == (2,) * 4
    assert torch.equal(copies["edges"]["picture"], join_rows(values, values)["edges"]["picture"]), "edges stay"
    joint = guide_by_parts([both, none], [1.5])
    assert torch.equal(joint, 2.5 * both - 1.5 * none)
    same = guide_by_parts([both, edges, none], [1.5, 1.5])
    assert torch.allclose(same, joint, atol=1e-3), "of equal strengths it is guidance of the whole"


def test_negative_prompts_stand_in_place_of_no_condition(pipelines):
    pipeline = pipelines["text and picture"]
    given = {"prompts": ["a cat"], "control": draw_edges(1)}
    plain = pipeline.sample(**given)
    assert torch.equal(plain.tokens, pipeline.sample(**given, negative_prompts="").tokens)
    assert not torch.equal(plain.tokens, pipeline.sample(**given, negative_prompts="a dog").tokens)
    with pytest.raises(UserError, match="negative prompts have no effect without guidance"):
        pipeline.sample(**given, negative_prompts="a dog", cfg=0)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("vector", {"prompts": "a cat"}, "takes no prompts: .* conditioned on vectors of width 6; give vectors"),
        ("picture", {"labels": 3}, "takes no labels: its images are conditioned on control pictures of 8 x 8 pixels"),
        ("picture", {}, "conditioned on control pictures of 8 x 8 pixels: give control"),
        ("picture", {"control": torch.zeros(1, 9, 8)}, "of this model is 8 x 8 pixels; got one of 8 x 9"),
        ("attributes", {"labels": [1]}, "labels must be a table of values for what and shape"),
        ("attributes", {"labels": {"size": [1]}}, "has no part 'size' that takes labels; it has what, shape"),
        ("attributes", {"labels": {"shape": [3]}}, "label 3 is out of range: this model has 3 classes"),
        ("text and picture", {"prompts": ["a", "b"], "control": [None] * 3}, "prompts has 2 values, for 3 images"),
        ("text and picture", {"prompts": ["a", 2]}, "a prompt is a text, or None for no text; got 2"),
        ("text and picture", {"prompts": "a", "cfg_parts": {"cat": 1.0}}, "no part 'cat'; it has edges, caption"),
        ("vector", {"vectors": [[1.0] * 6], "cfg_parts": {"a": 1.0}}, "cfg_parts is for a combined condition"),
        ("vector", {"vectors": [[1.0] * 6], "negative_prompts": "a"}, "negative prompts are for a model that reads"),
    ],
)
def test_what_a_model_does_not_take_is_refused(name, given, message, pipelines):
    with pytest.raises(UserError, match=message):
        pipelines[name].sample(**given)


def test_prompts_and_pictures_are_not_for_a_model_of_classes(tiny):
    with pytest.raises(UserError, match="takes no prompts: its images are conditioned on 5 classes; give labels"):
        tiny.sample(prompts=["a cat"])
    with pytest.raises(UserError, match="negative prompts are for a model that reads texts; this one takes 5 classes"):
        tiny.sample([1], negative_prompts=["a cat"])


def test_one_value_serves_all_images(pipelines):
    pipeline, edges = pipelines["text and picture"], draw_edges(1)
    images = pipeline.sample(prompts=["a cat", "a dog"], control=edges)
    each = pipeline.sample(prompts=["a cat", "a dog"], control=[edges[0], edges[0]])
    assert torch.equal(images.tokens, each.tokens)
    assert images.captions == ("a cat", "a dog")


def test_likelihood_and_editing_take_all_conditions(pipelines):
    pipeline = pipelines["text and picture"]
    images = torch.rand(2, 3, 8, 8)
    right = pipeline.score(images, prompts=["a cat", "a dog"], control=draw_edges(2))
    other = pipeline.score(images, prompts=["a dog", "a dog"], control=draw_edges(2))
    assert torch.equal(right[1], other[1])
    assert not torch.equal(right[0], other[0])
    mask = torch.zeros(8, 8)
    edited = pipeline.edit(images[:1], mask, prompts="a cat", control=draw_edges(1))
    assert torch.equal(edited.tokens, pipeline.sample(prompts="a cat", control=draw_edges(1)).tokens)
    assert len(pipeline.edit(images[:1], mask)) == 1, "without a prompt the image is continued"


def test_the_command_line_takes_prompts_and_pictures(pipelines, tmp_path, capsys, tiny_folder):
    model, out = tmp_path / "model", tmp_path / "out.png"
    pipelines["text and picture"].save_pretrained(model)
    Image.fromarray((draw_edges(1)[0, 0].numpy() * 255).astype(np.uint8)).save(tmp_path / "edges.png")
    (tmp_path / "prompts.txt").write_text("a cat\n\ntwo dogs\n")
    options = ["--control", str(tmp_path / "edges.png"), "--out", str(out), "--overwrite"]
    options += ["--cfg-parts", "caption", "2"]
    tokens = ["--tokens-out", str(tmp_path / "tokens.safetensors")]
    main(["sample", str(model), "--prompt-file", str(tmp_path / "prompts.txt"), *options, *tokens])
    assert "wrote 3 images" in capsys.readouterr().out
    main(["sample", str(model), "--prompt", "a cat", "a dog", "--negative-prompt", "a hat", *options])
    assert "wrote 2 images" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    edit = ["edit", str(model), str(tmp_path / "image.png"), "--mask", str(tmp_path / "image.png")]
    main([*edit, "--prompt", "a cat", *options])
    Image.new("RGB", (9, 8)).save(tmp_path / "large.png")
    said = fails(capsys, "sample", model, "--control", tmp_path / "large.png", "--out", out, "--overwrite")
    assert "a control picture of this model is 8 x 8 pixels; got one of 9 x 8" in said
    said = fails(capsys, "sample", model, "--labels", "cat", "--out", out, "--overwrite")
    assert "this model takes no labels" in said
    assert "so give --control or --prompt" in fails(capsys, "sample", model, "--out", out, "--overwrite")
    said = fails(capsys, "sample", tiny_folder, "--out", out, "--overwrite")
    assert "this model is conditioned on 5 classes, so give --labels" in said
    said = fails(capsys, "sample", tiny_folder, "--prompt", "a cat", "--out", out, "--overwrite")
    assert "this model takes no prompts" in said
