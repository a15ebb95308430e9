"""Encoders that are read without transformers: MoCo v3's files, an encoder of our own, a classifier's map."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from nextscale.checkpoints.verify import accept_changes
from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.config.encoder import EncoderConfig
from nextscale.encoders.classifier import Classifier
from nextscale.encoders.load import load_encoder
from nextscale.encoders.moco_v3 import MocoV3
from nextscale.encoders.self_supervised import SmallEncoder

WIDTH, DEPTH, PATCH, SIDE = 384, 2, 4, 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def moco_v3_tensors() -> dict[str, torch.Tensor]:
    """Random tensors of a ViT-S of two blocks, under timm's names; the class token has no position, as in the files."""
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in MocoV3(WIDTH, DEPTH, PATCH, SIDE).state_dict().items():
        spread = 0.3 if tensor.ndim < 2 or "embed" in name or "token" in name else tensor[0].numel() ** -0.5
        tensors[name] = spread * torch.randn(tensor.shape, generator=rng) + float("norm" in name and "weight" in name)
    tensors["pos_embed"][:, 0] = 0
    return tensors


def as_checkpoint(tensors: dict[str, torch.Tensor]) -> dict:
    """The file of a training run: two encoders with heads, predictor, optimizer."""
    noise = {"head.0.weight": torch.zeros(8, WIDTH), "head.1.running_mean": torch.zeros(8)}
    state = {f"module.base_encoder.{n}": t for n, t in (tensors | noise).items()}
    state |= {f"module.momentum_encoder.{n}": torch.zeros_like(t) for n, t in tensors.items()}
    state["module.predictor.0.weight"] = torch.zeros(8, 8)
    return {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def in_transformers(tensors: dict[str, torch.Tensor], folder):
    """transformers' ViT with the same weights, through the names that the hub's files have."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=12, intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6, image_size=PATCH * SIDE, patch_size=PATCH,
    )  # fmt: skip
    config.save_pretrained(folder)
    names = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    outer = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            stem, dot, kind = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
            found[f"{outer[stem]}{dot}{kind}"] = tensor
        elif block[2] == "attn.qkv":
            for which, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"encoder.layer.{block[1]}.attention.attention.{which}.{block[3]}"] = part.clone()
        else:
            found[f"encoder.layer.{block[1]}.{names[block[2]]}.{block[3]}"] = tensor
    save_file({n: t.contiguous() for n, t in found.items()}, folder / "model.safetensors", {"format": "pt"})
    model, report = transformers.ViTModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def test_moco_v3_equals_the_vit_of_transformers(tmp_path):
    tensors = moco_v3_tensors()
    torch.save(as_checkpoint(tensors), tmp_path / "vit-s-300ep.pth.tar")
    encoder = load_encoder(str(tmp_path / "vit-s-300ep.pth.tar"))
    assert (encoder.kind, encoder.width, encoder.patch, encoder.grid) == ("moco_v3", WIDTH, PATCH, (SIDE, SIDE))
    image = torch.rand(2, 3, 9, 11) * 2 - 1
    features = encoder(image, (SIDE, SIDE))
    larger = F.interpolate(image, (PATCH * SIDE,) * 2, mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = in_transformers(tensors, tmp_path)(((larger + 1) / 2 - mean) / std).last_hidden_state
    assert features.shape == (2, SIDE, SIDE, WIDTH)
    assert torch.allclose(features.flatten(1, 2), tokens[:, 1:], atol=2e-5)


def resized(table_NC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A table of positions (SIDE * SIDE, C) on another grid, channel by channel, by PIL."""
    channels = table_NC.unflatten(0, (SIDE, SIDE)).unbind(-1)
    pictures = [Image.fromarray(c.numpy()).resize(grid[::-1], Image.Resampling.BICUBIC) for c in channels]
    return torch.from_numpy(np.stack([np.array(p) for p in pictures], axis=-1)).flatten(0, 1)


def test_moco_v3_on_another_grid_resamples_its_positions(tmp_path):
    tensors = moco_v3_tensors()
    save_file(tensors, tmp_path / "own.safetensors")
    encoder = load_encoder(str(tmp_path / "own.safetensors"))
    for grid in ((5, 2), (4, 6)):
        assert torch.allclose(
            encoder.position_embedding(grid)[0, 1:], resized(tensors["pos_embed"][0, 1:], grid), atol=1e-5
        )
        assert encoder(torch.zeros(1, 3, 8, 8), grid).shape == (1, *grid, WIDTH)
    table = torch.cat([tensors["pos_embed"][0, :1], resized(tensors["pos_embed"][0, 1:], (5, 5))])
    save_file(tensors | {"pos_embed": table[None]}, tmp_path / "larger.safetensors")
    image = torch.rand(2, 3, 20, 20) * 2 - 1
    assert torch.allclose(
        encoder(image, (5, 5)), load_encoder(str(tmp_path / "larger.safetensors"))(image, (5, 5)), atol=2e-5
    )


def test_moco_v3_is_read_under_all_its_names(tmp_path):
    tensors = moco_v3_tensors()
    head = {"head.weight": torch.zeros(10, WIDTH), "head.bias": torch.zeros(10)}
    torch.save({"state_dict": {f"module.{n}": t for n, t in (tensors | head).items()}}, tmp_path / "linear.pth.tar")
    torch.save(as_checkpoint(tensors), tmp_path / "run.pth")
    save_file(tensors, tmp_path / "plain.safetensors")
    prints = {load_encoder(str(tmp_path / n)).fingerprint() for n in ("linear.pth.tar", "run.pth", "plain.safetensors")}
    assert len(prints) == 1


def test_moco_v3_files_at_fault_are_named(tmp_path):
    tensors = moco_v3_tensors()
    kernel = "patch_embed.proj.weight"
    faults = {
        "no tensor named 'pos_embed' .*'module.base_encoder.conv1.weight'; expected MoCo v3's vit-b-300ep.pth.tar": {
            "module.base_encoder.conv1.weight": tensors[kernel]
        },
        "its patch embedding is .64, 3, 4, 4., known widths are .384, 768, 1024, 1280.": tensors
        | {kernel: tensors[kernel][:64].clone()},
        "missing tensor 'blocks.1.attn.qkv.weight'": {
            n: t for n, t in tensors.items() if n != "blocks.1.attn.qkv.weight"
        },
        "'pos_embed' has shape .1, 9, 384. instead of .1, 10, 384.": tensors
        | {"pos_embed": tensors["pos_embed"][:, 1:].clone()},
    }
    for words, content in faults.items():
        save_file(content, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=words):
            load_encoder(str(tmp_path / "bad.safetensors"))
    with pytest.raises(UserError, match="there is no file .*vit-b-300ep.pth.tar"):
        load_encoder(str(tmp_path / "vit-b-300ep.pth.tar"))


def small_encoder() -> SmallEncoder:
    return SmallEncoder(EncoderConfig(16, (8, 12), (1, 2), 4))


def by_convolutions(encoder: SmallEncoder, image: torch.Tensor) -> torch.Tensor:
    """The last map, written out with torch's functions."""
    weights = encoder.state_dict()
    x = image
    for i, stride in enumerate((2, 1, 2, 1, 1)):
        y = F.conv2d(x, weights[f"layers.{i}.conv.weight"], stride=stride, padding=1)
        groups = y.unflatten(1, (4, -1))
        y = (groups - groups.mean((2, 3, 4), keepdim=True)) / (groups.var((2, 3, 4), False, True) + 1e-5).sqrt()
        y = y.flatten(1, 2) * weights[f"layers.{i}.norm.weight"][:, None, None]
        y = (y + weights[f"layers.{i}.norm.bias"][:, None, None]).clamp(min=0)
        x = y if stride == 2 else x + y
    return (x.permute(0, 2, 3, 1) - weights["mean_C"]) / weights["deviation_C"]


def test_an_encoder_of_our_own_is_kept_and_read(tmp_path):
    encoder = small_encoder()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    image = torch.rand(7, 3, 16, 16) * 2 - 1
    raw_RC = encoder(image, (4, 4)).flatten(0, 2)
    encoder.compute_statistics(image.split([4, 3]))
    deviation_C = (raw_RC.var(dim=0, correction=0) + 1e-5).sqrt()
    expected_RC = (raw_RC - raw_RC.mean(dim=0)) / deviation_C
    assert torch.allclose(encoder(image, (4, 4)).flatten(0, 2), expected_RC, atol=1e-4)
    encoder.set_steps(7)
    encoder.save(tmp_path)
    found = load_encoder(str(tmp_path))
    assert (found.kind, found.width, found.patch, found.grid) == ("moco_v2", 12, 4, (4, 4))
    assert found.fingerprint() == encoder.fingerprint()
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    features = found(image, (4, 4))
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.allclose(features, by_convolutions(encoder, image), atol=1e-4)
    larger = F.interpolate(image, (24, 20), mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.allclose(found(image, (6, 5)), by_convolutions(encoder, larger), atol=1e-4)
    assert torch.allclose(found(image[1:2], (4, 4))[0], features[1], atol=1e-5), "an image does not know its batch"


def test_an_encoder_stored_in_half_precision_is_read(tmp_path):
    small_encoder().save(tmp_path)
    tensors = {n: t.half() for n, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    accept_changes(tmp_path)
    assert {p.dtype for p in load_encoder(str(tmp_path)).parameters()} == {torch.float32}


def test_folders_at_fault_are_named(tmp_path):
    small_encoder().save(tmp_path)
    config = tmp_path / "config.json"
    for before, after, words in (
        ('"version": 1', '"version": 2', "no encoder of this nextscale"),
        ('"steps": 0', '"steps": -1', "steps must be 0 or more, got -1"),
        ('"groups": 4', '"groups": 5', "widths must be 1 to 8 numbers that groups divides"),
        ('"image_size"', '"image_sizes"', "no setting 'image_sizes'; did you mean 'image_size'?"),
    ):
        text = config.read_text()
        config.write_text(text.replace(before, after))
        with pytest.raises(UserError, match=re.escape(words)):
            load_encoder(str(tmp_path))
        config.write_text(text)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="there is no .*model.safetensors"):
        load_encoder(str(tmp_path))


def test_a_classifier_map_is_what_its_own_features_are_means_of(tmp_path):
    model = Classifier(ClassifierConfig(16, (8, 16), 4, mirror=False), ("a", "b"))
    model.save(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert (encoder.kind, encoder.width, encoder.patch, encoder.grid) == ("classifier", 16, 4, (4, 4))
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = encoder(image / 127.5 - 1, (4, 4))
    with torch.no_grad():
        pool = model(image).pool_BD
    assert torch.allclose(features.mean(dim=(1, 2)), pool[:, :16], atol=1e-5)
    assert torch.allclose(features.amax(dim=(1, 2)), pool[:, 16:], atol=1e-5)
    assert encoder(image / 127.5 - 1, (8, 6)).shape == (2, 8, 6, 16)
