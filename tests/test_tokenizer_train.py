"""Tokenizer training: codebook rules against loops, losses against formulas, the run end to end."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nextscale.cli.parser import main
from nextscale.common.distributed import World
from nextscale.common.errors import UserError
from nextscale.config.log import read_log
from nextscale.config.tokenizer_training import CodebookConfig, TokenizerLossConfig, derive_pyramid
from nextscale.config.training import TrainConfig
from nextscale.data.examples import MemoryExamples
from nextscale.evaluation.metrics.codebook import CodebookUsage, compute_perplexity, compute_usage, count_codes
from nextscale.evaluation.metrics.lpips import Lpips
from nextscale.evaluation.metrics.reconstruction import psnr, ssim
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from nextscale.tokenizer.codebook import CodebookLearner
from nextscale.tokenizer.discriminator import PatchDiscriminator, compute_adaptive_weight, compute_hinge_loss
from nextscale.tokenizer.quantizer import Quantized
from nextscale.training.engine.loop import train
from nextscale.training.tokenizer import TokenizerTask, evaluate_tokenizer
from tests.conftest import randomised, read_fixture, tiny_config


def images(count=24, side=8):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_moving_averages_against_a_loop():
    tokenizer = randomised(tiny_config()).tokenizer
    learner = CodebookLearner(tokenizer.quantizer, ema_decay=0.9, revive_below=0.0)
    book = tokenizer.quantizer.codebook.weight.detach().clone()
    count, total = np.ones(32), book.double().numpy().copy()
    for seed in range(3):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        quantized = tokenizer(x)[1]
        learner.observe(quantized, count_codes(quantized.tokens_BL, tokenizer.pyramid, 32))
        learner.update(World(), None)
        seen, summed = np.zeros(32), np.zeros((32, 4))
        for token, vector in zip(quantized.tokens_BL.flatten(), quantized.residual_BLC.flatten(0, 1), strict=True):
            seen[token] += 1
            summed[token] += vector.double().numpy()
        count, total = 0.9 * count + 0.1 * seen, 0.9 * total + 0.1 * summed
        found = tokenizer.quantizer.codebook.weight.detach().numpy()
        np.testing.assert_allclose(found, total / np.maximum(count, 1e-5)[:, None], rtol=1e-4, atol=1e-5)
    assert not tokenizer.quantizer.codebook.weight.requires_grad


def test_wanted_vectors_are_what_codes_were_looked_up_for():
    tokenizer = randomised(tiny_config()).tokenizer
    quantized = tokenizer(torch.randn(2, 3, 8, 8))[1]
    assert torch.equal(tokenizer.quantizer.find_nearest(quantized.residual_BLC), quantized.tokens_BL)
    assert not quantized.residual_BLC.requires_grad


def test_dead_codes_move_to_vectors_of_the_batch_and_living_ones_stay():
    quantizer = randomised(tiny_config()).tokenizer.quantizer
    learner = CodebookLearner(quantizer, None, revive_below=0.1)
    quantizer.usage_KV.zero_()
    quantizer.usage_KV[:, :10] = 5.0
    before, wanted = quantizer.codebook.weight.detach().clone(), torch.randn(2, 30, 4)
    alive = torch.randint(10, (2, 30))

    def learn():
        seen = Quantized(wanted, torch.zeros(()), alive, wanted)
        learner.observe(seen, count_codes(alive, quantizer.pyramid, 32))
        learner.update(World(), torch.Generator().manual_seed(0))

    learn()
    assert learner.revived == 22
    after = quantizer.codebook.weight.detach()
    assert torch.equal(after[:10], before[:10])
    rows = {tuple(r.tolist()) for r in wanted.flatten(0, 1)}
    assert all(tuple(r.tolist()) in rows for r in after[10:])
    learn()
    assert learner.revived == 22, "a revived code gets time to find users"


def test_images_are_decoded_from_the_scales_they_keep():
    """The canvas of each image against `build_canvases` of its tokens; gradients reach the encoder as without."""
    tokenizer = randomised(tiny_config()).tokenizer
    x, scales = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), len(tokenizer.pyramid)
    kept = torch.tensor([1, 2, scales, 1, scales])
    features = tokenizer.extract_features(x).detach().requires_grad_()
    quantized = tokenizer.quantizer(features, kept)
    canvases = list(tokenizer.build_canvases(quantized.tokens_BL))
    for i, count in enumerate(kept.tolist()):
        torch.testing.assert_close(quantized.features_BChw[i], canvases[count - 1][i], rtol=1e-4, atol=1e-5)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((quantized.features_BChw * weight).sum(), features)
    assert torch.equal(gradient, weight)
    complete = tokenizer.quantizer(features.detach())
    assert torch.equal(complete.tokens_BL, quantized.tokens_BL)
    assert torch.equal(complete.loss, quantized.loss)


def test_scale_dropout_keeps_all_scales_of_the_other_images():
    tokenizer = randomised(tiny_config("1,2,4,8")).tokenizer
    task = TokenizerTask(tokenizer, MemoryExamples(image=images(4, 16)), codebook=CodebookConfig(scale_dropout=0.4))
    kept = task.draw_noise(20_000, torch.Generator().manual_seed(0))["decoded_scales"]
    shares = kept.bincount(minlength=5)[1:] / len(kept)
    np.testing.assert_allclose(shares, [0.1, 0.1, 0.1, 0.7], atol=0.01)
    plain = TokenizerTask(tokenizer, MemoryExamples(image=images(4, 16)))
    assert plain.draw_noise(4, torch.Generator()) == {}


@given(st.lists(st.integers(0, 9), min_size=14, max_size=14))
def test_usage_and_perplexity_against_a_loop(tokens):
    pyramid = Pyramid.parse("1,2,3")
    use = CodebookUsage.empty(pyramid, 10)
    use.add(torch.tensor([tokens]), pyramid)
    report = use.report()
    for k, (start, end) in enumerate(pyramid.spans):
        part = tokens[start:end]
        share = [part.count(v) / len(part) for v in set(part)]
        assert report["usage_per_scale"][k] == pytest.approx(len(set(part)) / 10)
        assert report["perplexity_per_scale"][k] == pytest.approx(np.exp(-sum(p * np.log(p) for p in share)))
    assert report["usage"] == pytest.approx(len(set(tokens)) / 10)


def test_perplexity_known_answers():
    assert compute_perplexity(torch.ones(16)) == pytest.approx(16)
    assert compute_perplexity(torch.tensor([5, 0, 0])) == pytest.approx(1)
    assert compute_usage(torch.tensor([5, 0, 0, 1])) == 0.5


def test_psnr_of_the_scales_so_far_against_a_loop():
    tokenizer = randomised(tiny_config("1,2,4,8")).tokenizer
    data = images(7, 16)
    report = evaluate_tokenizer(tokenizer, MemoryExamples(image=data), per_scale=True)
    found = []
    for picture in data:
        target = picture.double().numpy() / 255
        tokens = tokenizer.encode(picture[None].float() / 127.5 - 1)
        for canvas in tokenizer.build_canvases(tokens):
            decoded = (tokenizer.decode_canvas(canvas)[0].double().numpy() + 1) / 2
            found.append(-10 * np.log10(np.square(decoded - target).mean()))
    np.testing.assert_allclose(report["psnr_db_per_scale"], np.reshape(found, (7, 4)).mean(axis=0), rtol=1e-4)
    assert report["psnr_db"] == report["psnr_db_per_scale"][-1]


def test_psnr_and_ssim_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 14, 13)), rng.random((2, 3, 14, 13))
    expected = [10 * np.log10(1 / np.mean((x - y) ** 2)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(torch.tensor(a), torch.tensor(b)), expected)
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(g, g) / g.sum() ** 2
    for n in range(2):
        values = []
        for c in range(3):
            for i in range(4):
                for j in range(3):
                    x, y = a[n, c, i : i + 11, j : j + 11], b[n, c, i : i + 11, j : j + 11]
                    mx, my = (window * x).sum(), (window * y).sum()
                    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                    cov = (window * (x - mx) * (y - my)).sum()
                    values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
        assert ssim(torch.tensor(a), torch.tensor(b))[n].item() == pytest.approx(np.mean(values))
    assert ssim(torch.tensor(a), torch.tensor(a)).tolist() == pytest.approx([1, 1])


def test_hinge_loss_and_adaptive_weight():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert compute_hinge_loss(real, fake).item() == pytest.approx((0.25 + 0.75) / 2)
    layer = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    weight = compute_adaptive_weight((3 * layer).sum(), (layer**2).sum(), layer)
    assert weight.item() == pytest.approx(np.sqrt(18) / (np.sqrt(4 + 16) + 1e-4))


def test_discriminator_and_painter_see_each_other_without_gradient():
    """The judge's loss must not reach the painter, nor the painter's the judge."""
    tokenizer = randomised(tiny_config("1,2,8")).tokenizer
    losses = TokenizerLossConfig(l1=0, l2=1, adversarial=0.5, adversarial_start=2, discriminator_channels=4,
                                 discriminator_layers=1)  # fmt: skip
    task = TokenizerTask(tokenizer, MemoryExamples(), losses, CodebookConfig(revive_every=0))
    judge = task.discriminator

    def gradients(step):
        task.trained.zero_grad()
        loss, scalars = task({"image": images(4, 16)}, {}, step)
        loss.backward()
        painter = [p.grad.clone() for p in tokenizer.decoder.parameters()]
        return painter, [p.grad.clone() for p in judge.parameters() if p.grad is not None], scalars

    early, judged_early, _ = gradients(0)
    late, judged_late, scalars = gradients(5)
    assert all(torch.equal(a, b) for a, b in zip(judged_early, judged_late, strict=True))
    assert any(not torch.allclose(a, b) for a, b in zip(early, late, strict=True)), "the painter is not pushed"
    task.discriminator = None
    alone, _, _ = gradients(5)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(early, alone, strict=True))
    assert scalars["discriminator"] > 0
    assert PatchDiscriminator(4, 2)(torch.zeros(1, 3, 16, 16)).shape[1] == 1


def test_a_loss_with_a_discriminator_that_is_not_finite_is_explained(tmp_path):
    """Its adaptive weight needs gradients, in the explanation too."""
    losses = TokenizerLossConfig(adversarial=0.5, adversarial_start=0, discriminator_channels=4, discriminator_layers=1)
    task = TokenizerTask(randomised(tiny_config("1,2,8")).tokenizer, MemoryExamples(image=images(4, 16)), losses)
    with torch.no_grad():
        task.tokenizer.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="the first layer at fault is tokenizer.decoder.conv_out"):
        train(task, TrainConfig(steps=1, batch_size=2), tmp_path)


def lpips_files(folder, cut=None):
    """Files in the forms of torchvision and of the LPIPS repository, with random weights."""
    rng = torch.Generator().manual_seed(0)
    vgg, before, i, heads = {}, 3, 0, {}
    for stage, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for _ in range(count):
            vgg[f"features.{i}.weight"] = torch.randn(width, before, 3, 3, generator=rng) * (2 / (9 * before)) ** 0.5
            vgg[f"features.{i}.bias"] = torch.randn(width, generator=rng) * 0.1
            before, i = width, i + 2
        i += 1
        heads[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=rng)
    vgg["classifier.0.weight"] = torch.zeros(2, 2)
    if cut:
        cut(vgg, heads)
    save_file(vgg, folder / "vgg16.safetensors")
    torch.save(heads, folder / "vgg.pth")
    return folder / "vgg16.safetensors", folder / "vgg.pth"


@torch.no_grad()
def test_lpips_against_the_formula(tmp_path):
    files = lpips_files(tmp_path)
    model = Lpips.from_files(*files)
    from nextscale.checkpoints.official_files import read_tensors

    vgg, heads = (read_tensors(f, "") for f in files)
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((t - shift[:, None, None]) / scale[:, None, None] for t in (a, b))
    expected, stage = torch.zeros(2), 0
    layers = [0, 2, "t", "p", 5, 7, "t", "p", 10, 12, 14, "t", "p", 17, 19, 21, "t", "p", 24, 26, 28, "t"]
    for layer in layers:
        if layer == "p":
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        elif layer == "t":
            u, v = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
            expected += ((u - v) ** 2 * heads[f"lin{stage}.model.1.weight"]).sum(1).mean((1, 2))
            stage += 1
        else:
            w, c = vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"]
            x, y = (F.relu(F.conv2d(t, w, c, padding=1)) for t in (x, y))
    assert torch.allclose(model(a, b), expected, rtol=1e-4)
    assert model(a, a).abs().max() == 0


def test_lpips_files_that_are_wrong_or_absent(tmp_path):
    with pytest.raises(UserError, match="lpips needs two weight files: lpips_vgg .*lpips_linear"):
        TokenizerLossConfig(lpips=1.0)
    with pytest.raises(UserError, match="there is no file"):
        Lpips.from_files(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    files = lpips_files(tmp_path, lambda vgg, heads: vgg.pop("features.28.bias"))
    with pytest.raises(
        UserError, match=r"vgg16.safetensors does not fit .*features.28.bias.*expected torchvision's VGG-16"
    ):
        Lpips.from_files(*files)
    files = lpips_files(tmp_path, lambda vgg, heads: heads.update({"lin0.model.1.weight": torch.zeros(1, 96, 1, 1)}))
    with pytest.raises(UserError, match=r"vgg.pth does not fit .*\(1, 96, 1, 1\) instead of \(1, 64, 1, 1\)"):
        Lpips.from_files(*files)


@pytest.mark.parametrize("codebook", [{"update": "ema", "scale_dropout": 0.5}, {"update": "gradient"}])
def test_every_loss_together_trains_resumes_and_repeats(codebook, tmp_path):
    """LPIPS, discriminator, moving averages and revival at once; a resumed run equals an uninterrupted one."""
    vgg, linear = map(str, lpips_files(tmp_path))
    losses = TokenizerLossConfig(lpips=0.1, lpips_vgg=vgg, lpips_linear=linear, adversarial=0.5, adversarial_start=2,
                                 discriminator_channels=4, discriminator_layers=1)  # fmt: skip
    config = TrainConfig(steps=5, batch_size=2, save_every=2, log_every=1)

    def task():
        torch.manual_seed(0)
        tokenizer = randomised(tiny_config("1,2,8")).tokenizer
        examples = MemoryExamples(image=images(8, 16))
        return TokenizerTask(tokenizer, examples, losses, CodebookConfig(revive_every=2, **codebook))

    whole = task()
    train(whole, config, tmp_path / "whole")

    class Stop(TokenizerTask):
        def forward(self, batch, noise, step):
            if step == 3:
                raise KeyboardInterrupt
            return super().forward(batch, noise, step)

    first = task()
    first.__class__ = Stop
    with pytest.raises(KeyboardInterrupt):
        train(first, config, tmp_path / "parts")
    second = task()
    train(second, config, tmp_path / "parts")
    ours = second.trained.state_dict()
    assert all(torch.equal(ours[n], t) for n, t in whole.trained.state_dict().items())
    assert {"lpips", "discriminator", "l1", "vq"} <= read_log(tmp_path / "whole" / "log.jsonl")[-1].keys()


CONFIG = {
    "image_size": 16,
    "images": {"held_out": 0.1},
    "tokenizer": {"vocab_size": 16, "code_width": 4, "base_channels": 8, "norm_groups": 4, "res_blocks": 1,
                  "channel_multipliers": [1, 1], "attention": False},
    "train": {"steps": 6, "batch_size": 8, "save_every": 3, "log_every": 2},
}  # fmt: skip


def test_train_and_evaluate_commands(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    command = ["tokenizer", "train", str(tmp_path / "c.json"), "--data", "digits", "--out", str(tmp_path / "run")]
    assert main([*command, "--images.limit", "100"]) == 0
    assert "dB PSNR" in capsys.readouterr().out
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "tokenizer.safetensors", "reconstructions.png", "curves.png", "evaluation.json",
                     "inputs.json", "log.jsonl", "run.json", "training", "best"}  # fmt: skip
    evaluate = ["tokenizer", "evaluate", str(tmp_path / "run"), "--data", "digits", "--limit", "50"]
    assert main([*evaluate, "--per-scale", "--out", str(tmp_path / "report")]) == 0
    assert "PSNR of the scales so far" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["images"] == 50
    assert report["ssim"] <= 1
    assert len(report["perplexity_per_scale"]) == 6
    assert (tmp_path / "report" / "reconstructions.png").exists()
    assert main([*command, "--images.limit", "90"]) == 2
    assert "run with other settings: images.limit was 100, now 90" in capsys.readouterr().err
    # fine-tuning starts from its weights and scales; with a rate of nearly zero they stay
    (tmp_path / "start.json").write_text(json.dumps({"train": CONFIG["train"]}))
    tuned = [
        "tokenizer",
        "train",
        str(tmp_path / "start.json"),
        "--data",
        "digits",
        "--out",
        str(tmp_path / "tuned"),
        "--start",
        str(tmp_path / "run"),
    ]
    tuned += ["--images.limit", "100", "--train.learning-rate", "1e-12", "--codebook.revive-every", "0"]
    assert main(tuned) == 0
    old, new = (Pipeline.from_pretrained(tmp_path / f).tokenizer for f in ("run", "tuned"))
    assert torch.allclose(old.encoder.conv_in.weight, new.encoder.conv_in.weight, atol=1e-6)
    assert old.pyramid == new.pyramid


def test_revival_brings_a_collapsed_codebook_back(tmp_path):
    """All codes but two start far outside: without revival they are never used again."""
    used = {}
    for every in (0, 5):
        tokenizer = randomised(tiny_config()).tokenizer
        with torch.no_grad():
            tokenizer.quantizer.codebook.weight[2:] += 100
        task = TokenizerTask(tokenizer, MemoryExamples(image=images()), codebook=CodebookConfig(revive_every=every))
        train(task, TrainConfig(steps=20, batch_size=12), tmp_path / str(every))
        used[every] = len(tokenizer.encode(images().float() / 127.5 - 1).unique())
    assert used[0] <= 2 < 8 <= used[5]


def test_pyramid_from_size():
    assert str(derive_pyramid(256, 16, "")) == "1,2,3,4,6,8,10,13,16"
    with pytest.raises(UserError, match="image_size 30 must be a multiple of 16"):
        derive_pyramid(30, 16, "")


def test_an_official_tokenizer_is_fine_tuned_and_goes_back(tmp_path, capsys):
    """Imported, trained a little at its own size and scales, and exported again under the official names."""
    fixture = read_fixture("var_tiny_l2")
    vae, _ = fixture.files
    run = [
        "--data",
        "digits",
        "--images.limit",
        "60",
        "--device",
        "cpu",
        "--train.steps",
        "4",
        "--train.batch-size",
        "8",
    ]
    (tmp_path / "empty.json").write_text("{}")
    scales = ",".join(map(str, fixture.meta["patch_nums"]))
    assert main(["import-official", "--vae", str(vae), "--scales", scales, "--out", str(tmp_path / "old")]) == 0
    command = ["tokenizer", "train", str(tmp_path / "empty.json"), *run, "--start", str(tmp_path / "old")]
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    assert main(["export-official", str(tmp_path / "new"), "--vae", str(tmp_path / "new.safetensors")]) == 0
    before, after = load_file(vae), load_file(tmp_path / "new.safetensors")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert any(n.startswith("decoder.") for n in moved)
    assert any(n.startswith("encoder.") for n in moved)
