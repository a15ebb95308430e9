"""Conditions: what they give the transformer, cross-attention, and sampling and training with them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nextscale.common.errors import UserError
from nextscale.config.condition import ConditionConfig
from nextscale.config.sampling import SampleConfig
from nextscale.config.training import TrainConfig
from nextscale.config.transformer import TransformerConfig
from nextscale.data.examples import MemoryExamples
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.sampling import build_sampler
from nextscale.sampling.sampler import ModelPredictor, sample_images
from nextscale.training.engine.loop import train
from nextscale.training.transformer import TransformerTask
from nextscale.transformer.conditions.text import PAD, START, ByteEncoder
from nextscale.transformer.cross_attention import CrossAttention
from tests.conftest import check_flops, randomised, tiny_config

CROSS = ("attention", "cross-attention")
PROMPTS = ["red cat", "", "a long blue dog that sits", "größer"]


def text_config(**condition):
    return tiny_config(condition=ConditionConfig("text", **{"max_tokens": 16, **condition}), mixers=CROSS)


@pytest.fixture(scope="module")
def text():
    return randomised(text_config())


def embed_texts(length_B, width=6):
    """Embeddings of a frozen encoder for some texts of these lengths, as a token cache has them."""
    rng = torch.Generator().manual_seed(2)
    return torch.randn(len(length_B), max(length_B), width, generator=rng).half(), torch.tensor(length_B)


def test_cross_attention_is_softmax_over_the_visible_tokens():
    """Against a loop in NumPy, with normalised queries and keys and without."""
    rng = np.random.default_rng(0)
    for qk_norm in (True, False):
        layer = CrossAttention(TransformerConfig(depth=1, width=12, heads=3, qk_norm=qk_norm))
        x, sequence = (rng.standard_normal(shape).astype("float32") for shape in ((2, 3, 12), (2, 5, 12)))
        mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
        with torch.no_grad():
            state = layer.read_sequence(torch.from_numpy(sequence), torch.from_numpy(mask))
            got = layer(torch.from_numpy(x), None, state).numpy()
        w = {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
        expected = np.zeros((2, 3, 12))
        for b in range(2):
            q, kv = x[b] @ w["q.weight"].T + w["q.bias"], sequence[b] @ w["kv.weight"].T + w["kv.bias"]
            for h in range(3):
                cols = slice(4 * h, 4 * h + 4)
                keys, values, queries = kv[:, :12][:, cols], kv[:, 12:][:, cols], q[:, cols]
                for n in range(3):
                    query = queries[n] / np.linalg.norm(queries[n]) * 4 if qk_norm else queries[n] / (4 * 2)
                    lengths = np.linalg.norm(keys, axis=1, keepdims=True) if qk_norm else 1
                    scores = np.exp((keys / lengths) @ query)[mask[b]]
                    expected[b, n, cols] = scores / scores.sum() @ values[mask[b]]
        expected = expected @ w["proj.weight"].T + w["proj.bias"]
        assert np.abs(got - expected).max() < 1e-5


def test_texts_are_bytes_with_a_start_and_padding(text):
    condition = text.transformer.condition
    rows = condition.parse(["ab", None, "größer, und länger als sechzehn Bytes"])
    assert rows[0].tolist() == [START, 97, 98] + [PAD] * 13
    assert rows[1].tolist() == [START] + [PAD] * 15 == condition.parse([""])[0].tolist()
    assert bytes(rows[2, 1:].tolist()) == "größer, und länger als sechzehn Bytes".encode()[:15]
    stored = torch.tensor([list(b"abzz"), list(b"zzzz"), list(b"cdef")], dtype=torch.uint8)
    batch = {"text": stored, "text_length": torch.tensor([2, 0, 4])}
    assert torch.equal(condition.from_batch(batch), condition.parse(["ab", "", "cdef"]))
    long = {"text": torch.full((1, 40), 97, dtype=torch.int64), "text_length": torch.tensor([40])}
    assert torch.equal(condition.from_batch(long), condition.parse(["a" * 40]))
    drop = torch.tensor([True, False])
    assert torch.equal(condition.drop(drop, condition.parse(["ab", "cd"])), condition.parse([None, "cd"]))
    with pytest.raises(UserError, match="a prompt is a text, or None for no text; got 3"):
        condition.parse([3])
    with pytest.raises(UserError, match="the condition needs 'text' of every example, and the data have none"):
        condition.from_batch({"label": drop})


def test_embeddings_of_a_frozen_encoder_are_padded_and_projected():
    condition = randomised(text_config(embedding_width=6)).transformer.condition
    embeddings, lengths = embed_texts([3, 0, 20])
    rows = condition.parse((embeddings, lengths))
    assert rows["embeddings"].shape == (3, 15, 6)
    assert rows["length"].tolist() == [3, 0, 15]
    batch = {"text": embeddings, "text_length": lengths}
    assert torch.equal(condition.from_batch(batch)["embeddings"], rows["embeddings"])
    given, none = condition(rows), condition(condition.nothing(1))
    assert given.mask_BT.sum(dim=1).tolist() == [4, 1, 16]
    assert torch.allclose(given.vector_BD[1], none.vector_BD[0])
    tokens = condition.tokens
    start, projected = tokens.start.weight[0], tokens.project(embeddings[0, :3].float())
    mean = torch.cat([start[None], projected]).mean(dim=0)
    assert torch.allclose(given.vector_BD[0], condition.pool(condition.norm(mean)), atol=1e-5)
    with pytest.raises(UserError, match=r"reads text embeddings \(B, t, 6\); the data have \(3, 20, 5\)"):
        condition.from_batch({"text": embeddings[..., :5], "text_length": lengths})
    with pytest.raises(UserError, match="through the text encoder that it was trained with"):
        condition.parse(["a cat"])


def list_values(pipeline):
    """Values of the pipeline's condition, of which none equals another."""
    condition = pipeline.transformer.condition
    if pipeline.transformer.config.condition.embedding_width:
        return condition.parse(embed_texts([5, 0, 20, 1]))
    return condition.parse(PROMPTS)


@pytest.mark.parametrize("settings", [{}, {"embedding_width": 6}], ids=["bytes", "embeddings"])
def test_an_image_does_not_depend_on_the_texts_beside_it(settings, threads_set):
    pipeline = randomised(text_config(**settings))
    values = list_values(pipeline)
    for threads in (1, 2):
        threads_set(threads)
        together = sample_images(build_sampler(pipeline.tokenizer, pipeline.transformer, values, SampleConfig()))
        for i in range(len(values)):
            sampler = build_sampler(
                pipeline.tokenizer, pipeline.transformer, values[i : i + 1], SampleConfig(), first_image=i
            )
            assert torch.equal(sample_images(sampler).images_B3HW, together.images_B3HW[i : i + 1])
    assert len({image.sum().item() for image in together.images_B3HW}) == len(values)


@pytest.mark.parametrize("settings", [{}, {"embedding_width": 6}], ids=["bytes", "embeddings"])
@torch.no_grad()
def test_scales_with_kept_keys_and_values_equal_one_pass(settings):
    """Bit for bit those of keys and values that are computed anew at each scale; to rounding all scales in one pass."""
    pipeline = randomised(text_config(**settings))
    model, values = pipeline.transformer, list_values(pipeline)
    tokens = torch.randint(32, (len(values), model.pyramid.length), generator=torch.Generator().manual_seed(1))
    x_BLC = pipeline.tokenizer.teacher_inputs(tokens)
    whole = model(values, x_BLC).logits_BNV
    predictor, cache = ModelPredictor(model, values), model.new_cache(len(values))
    for k, (start, end) in enumerate(model.pyramid.spans):
        x_BNC = x_BLC[:, start - 1 : end - 1] if k else None
        logits = predictor(x_BNC, k).logits_BNV
        assert torch.equal(logits, model.step(model.embed_condition(values), x_BNC, k, cache).logits_BNV)
        assert torch.allclose(logits, whole[:, start:end], atol=1e-4)
        assert not torch.allclose(logits[0], logits[2], atol=1e-2), "the text has an effect"


@pytest.mark.parametrize("settings", [{}, {"embedding_width": 6}, {"layers": 0}])
def test_flops_of_texts_are_counted(settings):
    check_flops(text_config(**settings))


def test_bytes_see_their_neighbours():
    """Our own encoder without layers, against a loop over bytes in float64; what lies outside of a text counts as 0."""
    encoder = ByteEncoder(ConditionConfig("text", max_tokens=9, layers=0), width=8)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    texts = ["", "a", "ab c", "abcdefghijk"]
    found, vector, mask = encoder(encoder.parse(texts))
    embedding, positions, weight, bias = (p.detach().double().numpy() for p in encoder.parameters())
    for i, text in enumerate(texts):
        numbers = [START, *text.encode()[:8]]
        content = embedding[numbers] + positions[: len(numbers)]
        assert mask[i].tolist() == [place < len(numbers) for place in range(9)]
        for place in range(len(numbers)):
            window = np.zeros((8, 5))
            for offset in range(-2, 3):
                if 0 <= place + offset < len(numbers):
                    window[:, offset + 2] = content[place + offset]
            x = weight @ window.reshape(-1) + bias
            expected = content[place] + x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
            assert np.allclose(found[i, place].detach().numpy(), expected, atol=1e-4)
    assert torch.equal(vector, found[:, 0])


def test_a_cross_attention_without_a_sequence_is_refused():
    with pytest.raises(UserError, match="mixers must not have cross-attention .* the condition is 5 classes"):
        tiny_config(mixers=CROSS)
    layer = CrossAttention(TransformerConfig(depth=1, width=8, heads=1))
    given = randomised(tiny_config()).transformer.condition(torch.tensor([1]))
    with pytest.raises(UserError, match="needs a condition that gives a sequence"):
        layer.read_condition(given)


def test_training_learns_what_a_text_says(tmp_path):
    """Two texts of the same bytes in another order, each with tokens of its own: no bag of bytes tells them apart."""
    config = replace(text_config(), pyramid=Pyramid.parse("1,4"))
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randint(32, (2, config.pyramid.length), generator=rng)
    texts = torch.tensor([list(b"ab"), list(b"ba")], dtype=torch.uint8)
    which = torch.arange(16) % 2
    examples = MemoryExamples(
        tokens=kinds[which], label=torch.zeros(16, dtype=torch.int64), text=texts[which],
        text_length=torch.full((16,), 2),
    )  # fmt: skip
    settings = TrainConfig(steps=80, batch_size=8, learning_rate=4e-3, warmup_steps=5, log_every=80, save_every=80)
    pipeline = Pipeline.from_config(config, seed=1)
    train(TransformerTask(pipeline.transformer, pipeline.tokenizer, examples, settings), settings, tmp_path)
    model = pipeline.transformer
    with torch.no_grad():
        values = model.condition.parse(["ab", "ba"])
        logits = model(values, pipeline.tokenizer.teacher_inputs(kinds)).logits_BNV[:, 0]  # the first scale: text alone
        right = logits.log_softmax(-1)[torch.arange(2), kinds[:, 0]].exp()
    assert right.min() > 0.6, right


def test_classes_and_old_settings_are_as_they_were():
    config = ConditionConfig(num_classes=5)
    assert (config.count_of_classes, config.takes_labels, config.gives_sequence) == (5, True, False)
    assert config.fit(7, (8, 8)) == replace(config, num_classes=7)
    condition = randomised(tiny_config()).transformer.condition
    given = condition(torch.tensor([1, 5]))
    assert torch.equal(given.vector_BD, condition.embedding.weight[[1, 5]])
    assert given.sequence_BTD is None
    assert math.isclose(
        condition.draw_drop(10000, 0.3, torch.Generator().manual_seed(0)).float().mean(), 0.3, abs_tol=0.02
    )
