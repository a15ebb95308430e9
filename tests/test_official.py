"""Parity with the official VAR implementation, from its own numbers (tests/golden), in both directions."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextscale.checkpoints.official import export_official, import_official
from nextscale.checkpoints.official_shapes import Hints
from nextscale.cli.parser import main
from nextscale.common.errors import UserError
from nextscale.config.transformer import AlignmentConfig
from nextscale.pipeline import Pipeline
from nextscale.pyramid import Pyramid
from tests.conftest import randomised, read_fixture, tiny_config


def build_pipeline(fixture) -> Pipeline:
    hints = Hints(heads=fixture.meta["num_heads"])
    return Pipeline.from_checkpoint(import_official(*fixture.files, hints))


def close(ours, theirs, tolerance=1e-4):
    worst = (ours - theirs).abs().max().item()
    assert worst <= tolerance, f"largest difference {worst:.2e}, allowed {tolerance:.0e}"


@torch.no_grad()
def test_tokenizer_and_logits(official):
    pipeline, io = build_pipeline(official), official.io
    tokenizer = pipeline.tokenizer
    close(tokenizer.extract_features(io["in.image"]), io["out.encoder_features"])
    assert torch.equal(tokenizer.encode(io["in.image"]), io["out.tokens"])
    inputs = tokenizer.teacher_inputs(io["out.tokens"])
    close(inputs, io["out.teacher_forcing_input"])
    close(tokenizer.decode(io["out.tokens"]), io["out.reconstruction"])
    close(pipeline.transformer(io["in.label"], inputs).logits_BNV, io["out.logits"], 2e-4)


def test_sampling(official):
    pipeline, io, meta = build_pipeline(official), official.io, official.meta
    seeding = {"cfg": meta["cfg"], "seed": meta["seed"], "official_seeding": True}
    greedy = pipeline.sample(io["in.label"], top_k=1, top_p=0.0, **seeding)
    assert torch.equal(greedy.tokens, io["out.greedy.tokens"])
    close(greedy.tensor, io["out.greedy.image"])
    seeding |= {"top_k": meta["top_k"], "top_p": meta["top_p"]}
    seeded = pipeline.sample(io["in.label"], **seeding)
    assert torch.equal(seeded.tokens, io["out.seeded.tokens"])
    close(seeded.tensor, io["out.seeded.image"])
    close(pipeline.sample(io["in.label"], smooth=True, **seeding).tensor, io["out.smooth.image"])


def test_image_files(official):
    if not (official.folder / "png.safetensors").exists():
        pytest.skip("this fixture has no image files")
    expected = load_file(official.folder / "png.safetensors")
    images = build_pipeline(official).reconstruct([official.folder / "image0.png", official.folder / "image1.png"])
    assert torch.equal(images.tokens, expected["tokens"])
    close(images.tensor * 2 - 1, expected["reconstruction"])


def assert_same_tensors(ours, theirs):
    """A file that we wrote holds a fixture's tensors: the same names, types and bits."""
    ours = load_file(ours) if str(ours).endswith(".safetensors") else torch.load(ours, weights_only=True)
    theirs = load_file(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_round_trip_restores_every_tensor(official, suffix, tmp_path):
    """Official -> native folder -> pipeline in float32 -> native folder -> official: same names, types, bits."""
    build_pipeline(official).save_pretrained(tmp_path / "one")
    Pipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    out = tmp_path / f"vae{suffix}", tmp_path / f"var{suffix}"
    export_official(Pipeline.from_pretrained(tmp_path / "two").to_checkpoint(), *out)
    for ours, theirs in zip(out, official.files, strict=True):
        assert_same_tensors(ours, theirs)


def edited(tmp_path, change, which="var"):
    """Copies of a fixture's files, one of them changed."""
    fixture = read_fixture("var_tiny_l2")
    for file in fixture.files:
        shutil.copy(file, tmp_path / file.name)
    tensors = load_file(tmp_path / f"{which}.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / f"{which}.safetensors")
    return tmp_path / "vae.safetensors", tmp_path / "var.safetensors"


@pytest.mark.parametrize("name", sorted(load_file(read_fixture("var_tiny_l2").files[1])))
def test_any_missing_tensor_of_the_transformer_is_named(name, tmp_path):
    with pytest.raises(UserError, match=rf"var.safetensors.*missing tensor '{name}'"):
        import_official(*edited(tmp_path, lambda tensors: tensors.pop(name)), Hints(Pyramid.parse("1,2,3,4")))


@pytest.mark.parametrize("name", sorted(load_file(read_fixture("var_tiny_l2").files[0]))[::5])
def test_a_missing_tensor_of_the_tokenizer_is_named(name, tmp_path):
    with pytest.raises(UserError, match=rf"vae.safetensors.*missing tensor '{name}'"):
        import_official(*edited(tmp_path, lambda tensors: tensors.pop(name), "vae"), Hints())


def test_extra_and_misshapen_tensors_are_named(tmp_path):
    def add(tensors):
        tensors["blocks.0.gate.weight"] = torch.zeros(3)

    def cut(tensors):
        tensors["blocks.1.attn.proj.weight"] = tensors["blocks.1.attn.proj.weight"][:, :-1].contiguous()

    with pytest.raises(UserError, match=r"unknown tensor 'blocks.0.gate.weight' \(3,\)"):
        import_official(*edited(tmp_path, add), Hints())
    with pytest.raises(UserError, match=r"'blocks.1.attn.proj.weight' has shape \(128, 127\) instead of \(128, 128\)"):
        import_official(*edited(tmp_path, cut), Hints())


def strip_buffers(tensors):
    for name in [n for n in tensors if n in ("lvl_1L", "attn_bias_for_masking") or n.endswith("zero_k_bias")]:
        del tensors[name]


def test_a_file_without_derived_buffers_needs_the_scales_and_goes_back_without_them(tmp_path):
    files = edited(tmp_path, strip_buffers)
    with pytest.raises(UserError, match="does not say its token map sides .* --scales"):
        import_official(*files, Hints())
    checkpoint = import_official(*files, Hints(Pyramid.parse("1,2,3,4")))
    export_official(checkpoint, None, tmp_path / "back.safetensors")
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(files[1]).keys()


def test_wrong_scales_are_refused(tmp_path):
    files = read_fixture("var_tiny_l2").files
    with pytest.raises(UserError, match="4 scales, 30 tokens .* check --scales"):
        import_official(*files, Hints(Pyramid.parse("1,2,4")))
    with pytest.raises(UserError, match="'lvl_1L' does not fit the pyramid"):
        import_official(*files, Hints(Pyramid.parse("1,3,2,4")))


def test_non_square_pyramid_is_taken_from_the_hint(tmp_path):
    """The same 30 positions as another pyramid: 1x1, 2x2, 1x9, 4x4 has map sides that the file cannot tell."""

    def reorder(tensors):
        levels = torch.tensor([0] * 1 + [1] * 4 + [2] * 10 + [3] * 15)
        tensors["lvl_1L"] = levels[None]
        visible = levels[:, None] >= levels[None]
        tensors["attn_bias_for_masking"] = torch.where(visible, 0.0, -torch.inf)[None, None]

    files = edited(tmp_path, reorder)
    with pytest.raises(UserError, match="give them with --scales"):
        import_official(*files, Hints())
    config = import_official(*files, Hints(Pyramid.parse("1,2,2x5,3x5"))).config
    assert config.image_size == (6, 10)


def test_swapped_files_are_recognised():
    vae, var = read_fixture("var_tiny_l2").files
    with pytest.raises(UserError, match="is a transformer, not a tokenizer; pass it with --var"):
        import_official(var, vae, Hints())
    with pytest.raises(UserError, match="is a tokenizer, not a transformer"):
        import_official(vae, vae, Hints())


def test_parts_of_different_models_are_refused(tmp_path):
    def widen(tensors):
        for name in ("head.weight", "head.bias"):
            tensors[name] = torch.cat([tensors[name]] * 2)

    with pytest.raises(UserError, match="they belong to different models"):
        import_official(*edited(tmp_path, widen), Hints())


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no zip", b"\x80\x02}q\x00.", bytes(100)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoint(content, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        import_official(path, None, Hints())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot be|can be read safely"):
        import_official(tmp_path / "evil.pth", None, Hints())


def test_a_truncated_pickle_is_named(tmp_path):
    torch.save(load_file(read_fixture("var_tiny_l2").files[0]), tmp_path / "vae.pth")
    data = (tmp_path / "vae.pth").read_bytes()
    (tmp_path / "vae.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="vae.pth is damaged"):
        import_official(tmp_path / "vae.pth", None, Hints())


def test_training_checkpoint_of_the_official_trainer(tmp_path):
    vae, var = (load_file(f) for f in read_fixture("var_tiny_l2").files)
    torch.save({"epoch": 3, "trainer": {"vae_local": vae, "var_wo_ddp": var}}, tmp_path / "ar-ckpt-last.pth")
    checkpoint = import_official(tmp_path / "ar-ckpt-last.pth", tmp_path / "ar-ckpt-last.pth", Hints())
    assert checkpoint.transformer["head.weight"].equal(var["head.weight"])


def test_a_tokenizer_of_another_number_of_scales_keeps_its_usage_statistics(tmp_path):
    def more(tensors):
        tensors["quantize.ema_vocab_hit_SV"] = torch.rand(10, 64)

    files = edited(tmp_path, more, "vae")
    Pipeline.from_checkpoint(import_official(*files, Hints())).save_pretrained(tmp_path / "native")
    export_official(Pipeline.from_pretrained(tmp_path / "native").to_checkpoint(), tmp_path / "back.safetensors", None)
    key = "quantize.ema_vocab_hit_SV"
    assert load_file(tmp_path / "back.safetensors")[key].equal(load_file(files[0])[key])


def test_imported_bf16_computes_in_fp32_unless_asked_otherwise():
    checkpoint = import_official(*read_fixture("var_tiny_l2").files, Hints())
    assert checkpoint.transformer["head.weight"].dtype == torch.bfloat16
    assert Pipeline.from_checkpoint(checkpoint).transformer.head.weight.dtype == torch.float32
    half = Pipeline.from_checkpoint(checkpoint, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.to_checkpoint().transformer["head.weight"].dtype == torch.bfloat16
    assert half.tokenizer.quantizer.codebook.weight.dtype == torch.float32
    images = half.sample([1, 2])
    assert images.tensor.isfinite().all()
    assert images.tensor.dtype == torch.float32


@pytest.mark.parametrize(
    ("tokenizer", "transformer", "scales", "options"),
    [
        ({}, {"qk_norm": False}, "1,2,3,4", "--heads 4"),  # heads that are not 64 wide
        ({"phi_ratio": 0.25, "cosine_lookup": True}, {"qk_norm": True}, "1,2x3,4", "--phi-ratio 0.25 --cosine-lookup"),
        ({}, {"qk_norm": True, "alignment": AlignmentConfig(width=8)}, "1,2,3,4", ""),
    ],
)
def test_what_official_files_do_not_hold_is_said(tokenizer, transformer, scales, options, tmp_path, capsys):
    """With the options of the notes, the import gives the same model; without the guidance head, which is named."""
    config = tiny_config(scales, **transformer)
    names = ("a", "b", "c", "d", "e")
    tokenizer = replace(config.tokenizer, base_channels=32, norm_groups=32, **tokenizer)
    config = replace(config, tokenizer=tokenizer, class_names=names)
    pipeline = randomised(config)
    pipeline.save_pretrained(tmp_path / "m")
    files = ["--vae", str(tmp_path / "vae.pth"), "--var", str(tmp_path / "var.pth")]
    assert main(["export-official", str(tmp_path / "m"), *files]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert any("the names of the 5 classes are left out" in note for note in notes)
    assert any("projector.*" in note for note in notes) == ("alignment" in transformer)
    needed = [note for note in notes if "the files do not say" in note]
    found = needed[0].partition("say ")[2].partition(": give")[0] if needed else ""
    scales_option = f" --scales {scales}" if "x" in scales else ""
    assert found == options + scales_option
    (tmp_path / "names.txt").write_text("\n".join(names))
    command = ["import-official", *files, *found.split(), "--class-names", str(tmp_path / "names.txt")]
    assert main([*command, "--out", str(tmp_path / "back")]) == 0
    back = Pipeline.from_pretrained(tmp_path / "back")
    plain = replace(config.transformer, alignment=AlignmentConfig())
    assert back.config == replace(config, transformer=plain)
    assert torch.equal(back.sample([0, 1], seed=1).tokens, pipeline.sample([0, 1], seed=1).tokens)


def test_a_part_alone_says_what_it_lacks(tmp_path):
    checkpoint = randomised(replace(tiny_config(), class_names=tuple("abcde"))).to_checkpoint()
    assert export_official(checkpoint, tmp_path / "vae.pth", None) == [
        "tokenizer.norm_groups is 4, the official code's 32",
        "the files do not say --scales 1,2,3,4: give it to `nextscale import-official`",
    ]
