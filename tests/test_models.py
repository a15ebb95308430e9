"""The models in this repository do what their documents say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.data.datasets import load_images
from nextscale.data.examples import MemoryExamples
from nextscale.encoders.load import load_encoder, load_feature_network
from nextscale.evaluation.metrics.neighbours import knn_accuracy
from nextscale.pipeline import Pipeline
from nextscale.sampling.likelihood import compute_log_likelihood
from nextscale.tokenizer.tokenizer import scale_to_unit
from nextscale.training.encoder import encode_images
from nextscale.training.tokenizer import evaluate_tokenizer

ROOT = Path(__file__).parents[1]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10-test.parquet"


def sample_photographs() -> torch.Tensor:
    """scikit-learn's two photographs, cut into 32-pixel squares at a size where a square shows something."""
    datasets = pytest.importorskip("sklearn.datasets")
    squares = []
    for photograph in datasets.load_sample_images().images:
        small = np.array(Image.fromarray(photograph).resize((160, 96), Image.Resampling.LANCZOS))
        squares += [small[y : y + 32, x : x + 32] for y in range(0, 96, 32) for x in range(0, 160, 32)]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


def test_the_cifar10_tokenizer():
    folder = ROOT / "models" / "tokenizer-cifar10"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 8 * 2**20
    tokenizer = Pipeline.from_pretrained(folder).tokenizer
    assert tokenizer.config.vocab_size >= 512
    assert tokenizer.pyramid.last == (8, 8)
    report = evaluate_tokenizer(tokenizer, MemoryExamples(image=sample_photographs()))
    assert report["psnr_db"] > 26  # photographs of another kind than it was trained on
    if CIFAR.exists():
        report = evaluate_tokenizer(tokenizer, load_images(str(CIFAR), 32, 300, 0).to_examples())
        assert report["psnr_db"] >= 24
        assert report["perplexity"] >= 256


def test_the_cifar10_encoder():
    folder = ROOT / "models" / "encoder-cifar10"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 2 * 2**20
    encoder = load_encoder(str(folder))
    assert (encoder.kind, encoder.width, encoder.grid) == ("moco_v2", 128, (8, 8))
    features = encoder(scale_to_unit(sample_photographs()), (8, 8))
    assert 0.3 < features.std() < 3, "standardised, on photographs of another kind than it was trained on"
    if CIFAR.exists():
        images = load_images(str(CIFAR), 32, 1500, 0).to_examples()
        pool, label = encode_images(encoder, images, 1500, [])
        accuracy = knn_accuracy(pool[:500], label[:500], pool[500:], label[500:])
        assert accuracy > 0.3, "chance is 0.1; with a bank of 50,000 images it is 0.52"


@torch.no_grad()
def test_the_cifar10_generator():
    """Small enough to be kept; it samples as it is, and knows more of pictures than how often tokens occur."""
    folder = ROOT / "models" / "var-cifar10"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 16 * 2**20
    pipeline = Pipeline.from_pretrained(folder)
    images = pipeline.sample(["cat", "ship"], cfg=2.0, top_p=0.95, top_k=0, seed=0)
    assert images.tensor.shape == (2, 3, 32, 32)
    assert images.tensor.std() > 0.05
    if CIFAR.exists():
        data = load_images(str(CIFAR), 32, 200, 0)
        tokens_BL = pipeline.tokenizer.encode(scale_to_unit(data.images_B3HW))
        nats_BK = -compute_log_likelihood(pipeline.tokenizer, pipeline.transformer, tokens_BL, data.labels_B)
        assert nats_BK.sum(dim=1).mean() / pipeline.config.pyramid.length < 5.2, "class and position alone give 5.46"


@torch.no_grad()
def test_the_generator_of_letters():
    """It draws letters that the classifier of letters reads; of the 52, that read 1,944 of 2,000 as asked."""
    folder = ROOT / "models" / "var-letters"
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 24 * 2**20
    pipeline = Pipeline.from_pretrained(folder, dtype="float32")
    classifier = load_feature_network(str(ROOT / "models" / "classifier-letters"))
    letters = pipeline.sample("A,B,E,K,R,a,g,h,r,t", cfg=2.0, top_p=0.95, top_k=0, seed=0)
    read = [
        classifier.class_names[i]
        for i in classifier((letters.tensor * 255).round().to(torch.uint8)).logits_BC.argmax(dim=1)
    ]
    assert sum(a == b for a, b in zip(read, letters.captions, strict=True)) >= 8
