"""Frozen text encoders, on small models of random weights in the published architectures and files."""

import io
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextscale.checkpoints.shards import read_owner, write_shard
from nextscale.common.errors import UserError
from nextscale.data.cache import TokenCache
from nextscale.data.captions import TextInput, choose_captions
from nextscale.encoders.text import load_text_encoder
from tests.test_captions import tokenize as tokenize_captions
from tests.test_captions import write_model_and_captions

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
TEXTS = ["a red letter", "b", "", "a bold blue letter on green, and 7 more of them!"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
POSITIONS = 24


def train_spiece():
    """spiece.model with the special tokens of T5 (and of SigLIP, but for its padding)."""
    lines = [f"a {c} letter {x} on {d}, and {i} more" for c in ("red", "blue") for d in ("green", "bold") for i, x in
             enumerate("abcdefghijklmnopqrstuvwxyz")]  # fmt: skip
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return stream.getvalue()


def write_t5(folder, spiece):
    config = transformers.T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(spiece)


def write_clip(folder, end=None):
    """Image and text tower, with a tokenizer of bytes. `end`: the end token in the config, 2 in the first files."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocab = {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters), "re", "red</w>"])}
    vocab |= {"<|startoftext|>": 514, "<|endoftext|>": 515}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[("r", "e"), ("re", "d</w>")])
    text = SMALL | {"vocab_size": 516, "max_position_embeddings": POSITIONS, "projection_dim": 8}
    text |= {"bos_token_id": 514, "eos_token_id": end or 515}
    image = SMALL | {"image_size": 8, "patch_size": 4}
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_siglip(folder, spiece):
    text = SMALL | {"vocab_size": 200, "max_position_embeddings": POSITIONS, "projection_size": 12}
    image = SMALL | {"image_size": 8, "patch_size": 4}
    transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=image)).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(spiece)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of encoders: t5 with spiece.model, t5-json with tokenizer.json, clip, clip-old, siglip."""
    folder, spiece = tmp_path_factory.mktemp("encoders"), train_spiece()
    torch.manual_seed(0)
    write_t5(folder / "t5", spiece)
    transformers.T5EncoderModel.from_pretrained(folder / "t5").save_pretrained(folder / "t5-json")
    transformers.AutoTokenizer.from_pretrained(folder / "t5").save_pretrained(folder / "t5-json")
    write_clip(folder / "clip")
    write_clip(folder / "clip-old", end=2)
    write_siglip(folder / "siglip", spiece)
    return folder


def compute_expected(folder, kind, max_tokens):
    """Outputs (texts, T, E), and tokens of each text, as transformers computes them in one batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = {
        "t5": transformers.T5EncoderModel, "clip": transformers.CLIPTextModel, "siglip": transformers.SiglipTextModel,
    }[kind].from_pretrained(folder).eval()  # fmt: skip
    lengths = [len(ids) for ids in tokenizer(TEXTS, truncation=True, max_length=max_tokens)["input_ids"]]
    whole = {"padding": "max_length", "max_length": POSITIONS} if kind == "siglip" else {"padding": True}
    inputs = tokenizer(TEXTS, truncation=True, return_tensors="pt", **{"max_length": max_tokens, **whole})
    if kind == "siglip":
        inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        return model(**inputs).last_hidden_state, lengths


@pytest.mark.parametrize("name", ["t5", "t5-json", "clip", "clip-old", "siglip"])
def test_embeddings_are_those_of_the_model_itself(encoders, name):
    kind, folder = name.partition("-")[0], encoders / name
    encoder = load_text_encoder(str(folder), POSITIONS)
    states, lengths = compute_expected(folder, kind, POSITIONS)
    batch = encoder.encode_batch(TEXTS)
    assert batch.text_BTE.shape == (4, POSITIONS, encoder.width)
    assert batch.text_BTE.dtype == torch.float16
    lengths[TEXTS.index("")] = 0  # it stands for "no text"
    assert batch.length_B.tolist() == lengths
    assert len(set(lengths)) >= 3
    for row, state, length in zip(batch.text_BTE, states, lengths, strict=True):
        assert torch.allclose(row[:length].float(), state[:length], atol=4e-3)
        assert not row[length:].any()
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", ["t5", "clip", "siglip"])
def test_an_embedding_does_not_depend_on_its_batch_nor_on_padding(encoders, name):
    encoder = load_text_encoder(str(encoders / name), POSITIONS)
    together = encoder.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        assert torch.equal(encoder.encode([text])[0], together[i])
    tokens = encoder.tokenize(TEXTS)  # in one padded batch, as on a GPU
    states = encoder(tokens)
    for i, ids in enumerate(tokens):
        assert torch.allclose(states[i, : len(ids)], encoder([ids])[0, : len(ids)], atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "clip", "siglip"])
def test_long_texts_are_cut_and_counted(encoders, name):
    encoder, whole = (load_text_encoder(str(encoders / name), n) for n in (8, POSITIONS))
    assert encoder.list_truncated(TEXTS) == [text for text in TEXTS if len(whole.tokenize([text])[0]) > 8]
    assert TEXTS[3] in encoder.list_truncated(TEXTS)
    (cut,), (full,) = (e.tokenize(TEXTS[3:]) for e in (encoder, whole))
    assert len(cut) == 8 < len(full)
    assert cut == [*full[:7], full[-1]], "the end token stays"
    states, lengths = compute_expected(encoders / name, name, 8)
    assert encoder.encode_batch(TEXTS).length_B.tolist() == [n if t else 0 for n, t in zip(lengths, TEXTS, strict=True)]
    if name != "siglip":  # its reference would be padded to another length
        assert torch.allclose(encoder.encode(TEXTS[3:])[0].float(), states[3], atol=4e-3)


def test_the_fingerprint_tells_weights_tokenizer_and_length_apart(encoders, tmp_path):
    shutil.copytree(encoders / "clip", tmp_path / "copy")
    marks = [load_text_encoder(str(encoders / "clip"), n).fingerprint() for n in (8, 9)]
    assert load_text_encoder(str(tmp_path / "copy"), 8).fingerprint() == marks[0], "the place does not matter"
    marks.append(load_text_encoder(str(encoders / "clip-old"), 8).fingerprint())
    path = tmp_path / "copy" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    marks.append(load_text_encoder(str(tmp_path / "copy"), 8).fingerprint())
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    name = next(name for name in weights if "text_model" in name and name.endswith("fc1.bias"))
    weights[name][0] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    marks.append(load_text_encoder(str(tmp_path / "copy"), 8).fingerprint())
    assert len({*marks}) == 5


def test_what_is_missing_is_named_with_where_it_comes_from(encoders, tmp_path):
    with pytest.raises(
        UserError, match=r"no text encoder 'abc': expected the folder of a T5 .*`hf download google/flan"
    ):
        load_text_encoder("abc", 8)
    for gone, named in (
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("spiece.model", "tokenizer.json"),
    ):
        shutil.copytree(encoders / "t5", tmp_path / gone)
        (tmp_path / gone / gone).unlink()
        with pytest.raises(UserError, match=rf"is no text encoder: it lacks {named}; expected .*`hf download"):
            load_text_encoder(str(tmp_path / gone), 8)
    with pytest.raises(UserError, match=r"clip takes up to 24 tokens, not 64: give --text-max-tokens 24"):
        load_text_encoder(str(encoders / "clip"), 64)
    shutil.copytree(encoders / "clip", tmp_path / "vit")
    transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="is a 'vit'; text encoders are t5, clip, siglip"):
        load_text_encoder(str(tmp_path / "vit"), 8)
    shutil.copytree(encoders / "t5", tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors, such as encoder.block.1.layer.0.SelfAttention.q.weight"):
        load_text_encoder(str(tmp_path / "part"), 8)
    (tmp_path / "part" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"cannot load a text encoder from .*part' \(.*; expected the folder"):
        load_text_encoder(str(tmp_path / "part"), 8)


# ---- in the token cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_and_captions(tmp_path_factory.mktemp("text-cache"))


def tokenize(folder, out, encoder, *options):
    return tokenize_captions(folder, out, "--text-encoder", str(encoder), "--text-max-tokens", "6", *options)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_a_cache_holds_the_embeddings_of_every_caption(encoders, folder, tmp_path, name, capsys):
    assert tokenize(folder, tmp_path / "cache", encoders / name, "--images.flip", "--views", "2") == 0
    said = capsys.readouterr().out
    encoder = load_text_encoder(str(encoders / name), 6)
    cache = TokenCache(tmp_path / "cache")
    assert (cache.text.encoder, cache.text.max_tokens) == (encoder.fingerprint(), 6)
    train = cache.load_examples("train").with_text(TextInput("embeddings"), seed=4)
    assert train.text_head.width == encoder.width
    captions = [train.captions[i] for i in range(len(train))]
    every = [text for part in (train, cache.load_examples("held_out")) for i in range(len(part)) for text in
             part.captions[i] if text]  # fmt: skip
    long = len([text for text in every if text in encoder.list_truncated(every)])
    assert (f"note: {long} of 36 captions have more than 6 tokens: they are cut" in said) == bool(long)
    rows = [(7 * i) % len(train) for i in range(40)]
    for positions in (None, range(40)):
        batch = train.fetch(rows, positions)
        chosen = choose_captions(4, positions, [len(captions[i]) for i in rows])
        expected = encoder.encode_batch([captions[i][n] for i, n in zip(rows, chosen, strict=True)])
        assert batch["text"].dtype == torch.float16
        assert torch.equal(batch["text"], expected.text_BTE)
        assert torch.equal(batch["text_length"], expected.length_B)
    letters = train.with_text(TextInput("bytes", 4), seed=4).fetch(rows, None)
    assert bytes(letters["text"][1].tolist()).rstrip(b"\0").decode() == captions[rows[1]][0]
    with pytest.raises(UserError, match=r"holds up to 6 tokens of a caption, not 9: .* --text-max-tokens 9`"):
        train.with_text(TextInput("embeddings", 9), 0)


def test_a_cache_of_another_text_encoder_is_refused(encoders, folder, tmp_path, capsys):
    assert tokenize(folder, tmp_path / "cache", encoders / "t5") == 0
    (tmp_path / "cache" / "train-00001.safetensors").unlink()
    for other in (["--text-max-tokens", "7"], ["--text-encoder", str(encoders / "clip")]):
        assert tokenize(folder, tmp_path / "cache", encoders / "t5", *other) == 2
        assert "holds a cache with other settings (text was {'encoder': " in capsys.readouterr().err
    assert tokenize(folder, tmp_path / "cache", encoders / "t5") == 0, "the same one goes on"
    assert tokenize(folder, tmp_path / "cache", encoders / "none") == 2
    assert "no text encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("caption_count", lambda t: t + 1),
        ("caption_length", lambda t: t.flip(0) - t),
        ("caption_bytes", lambda t: t | 128),
        ("text_length", lambda t: t * 0),
    ],
)
def test_captions_that_do_not_fit_are_refused(encoders, folder, tmp_path_factory, tmp_path, name, change):
    """Shards whose digests are right, as a faulty program would write them."""
    whole = folder / "clip-cache"
    if not whole.exists():
        assert tokenize(folder, whole, encoders / "clip") == 0
    shutil.copytree(whole, tmp_path / "cache")
    path = tmp_path / "cache" / "train-00001.safetensors"
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    tensors[name] = change(tensors[name]).contiguous()
    write_shard(path, path, tensors, read_owner(tmp_path / "cache" / "cache.json"))
    train = TokenCache(tmp_path / "cache").load_examples("train")
    assert train.fetch([0], [0]), "the other shards are whole"
    with pytest.raises(UserError, match=r"train-00001.safetensors is damaged: .*captions.*; delete it and run"):
        train.fetch([8], [0])
