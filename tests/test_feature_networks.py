"""Networks that measure images: Inception against the reference implementation's numbers, loading, our classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nextscale.common.errors import UserError
from nextscale.config.classifier import ClassifierConfig
from nextscale.encoders.classifier import Classifier, load_classifier
from nextscale.encoders.inception import Inception, resize_like_tensorflow
from nextscale.encoders.load import load_feature_network

# What torch-fidelity 0.4's FeatureExtractorInceptionV3 gives for `inception_weights()` and `pictures(...)`:
# pool features, class scores without bias, and the first 7 channels of Mixed_6d.branch1x1 in the order (h, w, channel),
# at ten places each, evenly spaced over the flattened tensor.
GOLDEN = {
    32: {
        "pool": [0.0, 1.0947, 0.0543374, 0.263567, 0.168276, 0.614991, 0.00922863, 0.0, 0.416052, 1.0343],
        "logits": [2.26925, -0.482066, -4.03474, 1.4402, -3.21236, 1.73309, 2.17882, 3.93608, -8.39338, 7.66487],
        "spatial": [0.586903, 1.25392, 0.0, 0.355983, 0.0, 1.73333, 1.46101, 0.0, 0.320311, 0.0],
    },
    320: {
        "pool": [0.0, 1.1313, 0.0654866, 0.294726, 0.237411, 0.639103, 0.0100521, 0.0, 0.407093, 0.94587],
        "logits": [2.49939, -0.657604, -4.62345, 1.73103, -3.63608, 2.13365, 2.63876, 4.15788, -9.17988, 8.53762],
        "spatial": [0.691273, 1.63476, 0.0, 0.552847, 0.0, 2.05802, 1.66116, 0.0, 0.406149, 0.0],
    },
}


def inception_weights() -> dict[str, torch.Tensor]:
    """Random weights in the form of the ported file, under which activations neither vanish nor grow."""
    rng = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.ndim == 4:
            deviation = (2 / tensor[0].numel()) ** 0.5
            weights[name] = torch.randn(tensor.shape, generator=rng) * deviation
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = torch.rand(tensor.shape, generator=rng) * 0.4 + 0.8
        else:
            weights[name] = torch.randn(tensor.shape, generator=rng) * 0.1
    return weights


def pictures(side: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def places(tensor: torch.Tensor) -> list[float]:
    flat = tensor.flatten()
    return flat[torch.linspace(0, len(flat) - 1, 10).long()].tolist()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(inception_weights(), path)
    return load_feature_network(str(path))


@pytest.mark.parametrize("side", GOLDEN)
def test_inception_gives_the_reference_features(inception, side):
    found = inception(pictures(side))
    assert {n: tuple(t.shape) for n, t in found.to_dict().items()} == {
        "pool": (2, 2048), "spatial": (2, 17 * 17 * 7), "logits": (2, 1008)
    }  # fmt: skip
    for name, expected in GOLDEN[side].items():
        assert places(found.to_dict()[name]) == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_resizing_follows_tensorflow_1():
    """Target pixel i looks at i * size / side: by a loop over pixels, enlarging and shrinking."""
    image = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.float32)
    for side in (3, 5, 12):
        expected = np.empty((side, side))
        for y in range(side):
            for x in range(side):
                u, v = y * 5 / side, x * 7 / side
                y0, x0 = int(u), int(v)
                y1, x1 = min(y0 + 1, 4), min(x0 + 1, 6)
                top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * (v - x0)
                low = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * (v - x0)
                expected[y, x] = top + (low - top) * (u - y0)
        found = resize_like_tensorflow(torch.from_numpy(image)[None, None].expand(2, 3, 5, 7), side)
        assert np.allclose(found[1, 2].numpy(), expected, atol=1e-4)


def test_files_that_are_not_inceptions(tmp_path):
    with pytest.raises(UserError, match="there is no .*absent.pth; Inception features need pt_inception-2015-12-05"):
        load_feature_network(str(tmp_path / "absent.pth"))
    save_file({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.safetensors")
    with pytest.raises(UserError, match="has no tensor named .*such as 'fc.weight'; expected pt_inception-2015-12-05"):
        load_feature_network(str(tmp_path / "torchvision.safetensors"))
    with pytest.raises(UserError, match="there is no feature network nowhere; give pt_inception"):
        load_feature_network("nowhere")


def test_a_classifier_is_saved_loaded_and_does_not_look_at_the_batch(tmp_path):
    model = Classifier(ClassifierConfig(16, (16, 32), 8), ("cat", "dog", "owl"))
    model.save(tmp_path / "classifier")
    again = load_feature_network(str(tmp_path / "classifier"))
    assert isinstance(again, Classifier)
    assert again.class_names == ("cat", "dog", "owl")
    assert again.fingerprint() == model.fingerprint()
    x = pictures(16)
    both, alone = again(x), again(x[:1])
    assert both.pool_BD.shape == (2, 64)
    assert both.logits_BC.shape == (2, 3)
    assert torch.allclose(both.pool_BD[:1], alone.pool_BD, atol=1e-6)
    assert torch.allclose(again(x.flip(-1)).pool_BD, both.pool_BD, atol=1e-6), "the mirror image has the same features"
    views = again.forward_once(x), again.forward_once(x.flip(-1))
    assert torch.allclose(both.logits_BC, (views[0][1] + views[1][1]) / 2, atol=1e-6)
    assert not torch.allclose(views[0][0], views[1][0])
    assert torch.allclose(again(pictures(48)).logits_BC, again(pictures(48)).logits_BC), "other sizes are resized"
    (tmp_path / "classifier" / "config.json").write_text('{"format": "nextscale-classifier", "version": 7}')
    with pytest.raises(UserError, match="another format or version"):
        load_classifier(tmp_path / "classifier")
    with pytest.raises(UserError, match="widths must be 1 to 8 numbers that groups divides"):
        ClassifierConfig(widths=(30,), groups=16)
