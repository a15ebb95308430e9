"""Frozen encoders, on small models of random weights in the published architectures and files."""

import json

import pytest
import torch
import torch.nn.functional as F

from nextscale.common.errors import UserError
from nextscale.data.cache import TokenCache
from nextscale.data.cache_writer import CacheWriter
from nextscale.encoders.load import load_encoder
from nextscale.tokenizer.tokenizer import scale_to_unit
from tests.conftest import randomised, tiny_config
from tests.test_data import cache_parts

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def models():
    yield 14, 1, transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, patch_size=14, image_size=28))
    config = transformers.Dinov2WithRegistersConfig(**SMALL, patch_size=14, image_size=28, num_register_tokens=3)
    yield 14, 4, transformers.Dinov2WithRegistersModel(config)
    config = transformers.DINOv3ViTConfig(**SMALL, patch_size=16, num_register_tokens=4)
    yield 16, 5, transformers.DINOv3ViTModel(config)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_features_are_the_patch_tokens_of_the_model_itself(which, tmp_path):
    torch.manual_seed(which)
    patch, special, model = list(models())[which]
    model.eval().save_pretrained(tmp_path)
    means = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(means))
    encoder = load_encoder(str(tmp_path))
    image = torch.rand(2, 3, 8, 12) * 2 - 1
    features = encoder(image, (2, 3))
    larger = F.interpolate(image, (2 * patch, 3 * patch), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(means[k]).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
    with torch.no_grad():
        tokens = model(((larger + 1) / 2 - mean) / std).last_hidden_state
    assert tokens.shape[1] == special + 6
    assert torch.allclose(features.flatten(1, 2), tokens[:, special:], atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_absent_and_foreign_encoders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no encoder: .* give a folder with config.json and model.safetensors"):
        load_encoder(str(tmp_path))
    with pytest.raises(UserError, match=r"there is no encoder 'dino'; give .*MoCo v3's .*`nextscale encoder train`"):
        load_encoder("dino")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"cannot load an encoder from .*expected a folder with config.json and model.saf"
    ):
        load_encoder(str(tmp_path))
    transformers.ViTModel(transformers.ViTConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a 'vit'; encoders are dinov2"):
        load_encoder(str(tmp_path))


def test_the_cache_keeps_features_of_every_view(tmp_path):
    next(models())[2].save_pretrained(tmp_path / "encoder")
    encoder, tokenizer = load_encoder(str(tmp_path / "encoder")), randomised(tiny_config()).tokenizer
    parts = cache_parts(tokenizer)
    writer = CacheWriter(tmp_path / "cache", tokenizer, parts, views=2, shard=8, encoder=encoder)
    writer.record_settings(("a", "b", "c"), {})
    writer.write(show=False)
    batch = TokenCache(tmp_path / "cache").load_examples("train").fetch([5, 20], [5, 20])
    images = [parts["train"].fetch([i], [(i % 2) * 21 + i])["image"] for i in (5, 20)]
    expected = encoder(scale_to_unit(torch.cat(images)), (4, 4))
    assert batch["features"].shape == (2, 4, 4, 16)
    assert torch.allclose(batch["features"].float(), expected, atol=2e-3)
    plain = CacheWriter(tmp_path / "cache", tokenizer, parts, views=2, shard=8)
    with pytest.raises(UserError, match="with other settings .encoder was"):
        plain.record_settings(("a", "b", "c"), {})
