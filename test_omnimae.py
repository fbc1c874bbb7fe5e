"""The tests, which also show how to call everything: `pytest`, two minutes on two cores.

Nothing is downloaded. Files are real: JPEG, PNG, VP9, H.264, made here; runs are real processes.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

import omnimae
import train
from omnimae import MODELS, Classifier, OmniMAE, OmniMAEConfig, random_mask

HERE = Path(__file__).parent
TINY = OmniMAEConfig(
    image_size=32, num_frames=4, patch_size=(2, 8, 8), dim=64, depth=2, heads=4,
    decoder_dim=32, decoder_depth=2, decoder_heads=4,
    image_mask_ratio=0.75, video_mask_ratio=0.90,
)  # fmt: skip


@pytest.fixture
def tiny() -> OmniMAE:
    torch.manual_seed(0)
    return OmniMAE(TINY)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A small demo data set: 48 images, 32 clips."""
    return omnimae.write_demo_data(tmp_path_factory.mktemp("data") / "demo", 48, 32, 16, 8)


def clips(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------
# The released implementation's outputs, for a tiny model with reproducible weights


def released_shapes(cfg: OmniMAEConfig, num_classes: int | None) -> dict[str, tuple]:
    """Keys and shapes of a released file: pretraining, or with a head of `num_classes`."""
    num = math.prod(cfg.grid)
    shapes = {"trunk.pos_embed": (1, num, cfg.dim)}
    shapes["trunk.patch_embed.proj.1.weight"] = (cfg.dim, 3, *cfg.patch_size)

    def vector(name, size):
        shapes[name] = (size,)

    def block(name, dim, bias=True):
        for layer, out, into in (
            ("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim)
        ):  # fmt: skip
            shapes[f"{name}.{layer}.weight"] = (out, into)
            if bias or layer != "attn.qkv":
                vector(f"{name}.{layer}.bias", out)
        for norm in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            vector(f"{name}.{norm}", dim)

    vector("trunk.patch_embed.proj.1.bias", cfg.dim)
    for i in range(cfg.depth):
        block(f"trunk.blocks.{i}", cfg.dim)
    vector("trunk.norm.weight", cfg.dim)
    vector("trunk.norm.bias", cfg.dim)
    if num_classes is None:
        shapes["trunk.mask_token"] = (1, cfg.dim)
        shapes["trunk.decoder.pos_embed"] = (1, num, cfg.dim)
        shapes["trunk.decoder.decoder_embed.weight"] = (cfg.decoder_dim, cfg.dim)
        vector("trunk.decoder.decoder_embed.bias", cfg.decoder_dim)
        for i in range(cfg.decoder_depth):
            block(f"trunk.decoder.decoder_blocks.{i}", cfg.decoder_dim, cfg.decoder_qkv_bias)
        vector("trunk.decoder.norm.weight", cfg.decoder_dim)
        vector("trunk.decoder.norm.bias", cfg.decoder_dim)
    head = (cfg.patch_values, cfg.decoder_dim) if num_classes is None else (num_classes, cfg.dim)
    shapes["head.weight"] = head
    vector("head.bias", head[0])
    return shapes


def released_state(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    """The reproducible weights with which the released implementation was run."""
    rng, state = np.random.RandomState(seed), {}
    for key in sorted(shapes):
        if key.endswith("pos_embed"):
            state[key] = omnimae.sincos_positions(*shapes[key][1:])[None]
            continue
        value = rng.standard_normal(shapes[key])
        if value.ndim > 1 and "mask_token" not in key:
            value /= np.sqrt(value[0].size)
        else:
            value = 1 + 0.1 * value if "norm" in key and key.endswith("weight") else 0.1 * value
        state[key] = torch.from_numpy(value).float()
    return state


def released_input(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(1).standard_normal(shape)).float()


@pytest.mark.parametrize(
    ("shape", "masked", "loss", "total", "size", "first"),
    [
        ((2, 3, 32, 32), 12, 1.9721187353134155, -360.58316726825433, 0.7915540333198692,
         [-0.7851663, 0.5453372, -0.8490965, -0.2152212, -2.3779705, 1.697933, -0.8014199, -1.2947648]),
        ((2, 3, 4, 32, 32), 28, 1.915671944618225, -546.0320600966224, 0.7531061867804499,
         [-0.8775964, 0.3987211, -0.3576223, -0.4171163, -1.9236377, 1.8995413, -0.8503618, -1.6930891]),
    ],
    ids=["image", "clip"],
)  # fmt: skip
def test_pretraining_gives_the_released_outputs(shape, masked, loss, total, size, first):
    model = OmniMAE(TINY)
    model.load_state_dict(omnimae.convert_released(released_state(released_shapes(TINY, None))))
    num = 16 if len(shape) == 4 else 32
    rng, mask = np.random.RandomState(2), torch.zeros(2, num, dtype=torch.bool)
    for row in mask:
        row[rng.permutation(num)[:masked]] = True
    got_loss, pred, _ = model(released_input(*shape), mask)
    assert got_loss.item() == pytest.approx(loss, abs=1e-5)
    assert pred.shape == (2, masked, 384)
    assert pred.flatten()[:8].tolist() == pytest.approx(first, abs=1e-5)
    assert pred.abs().mean().item() == pytest.approx(size, abs=1e-5)
    assert pred.sum().item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "logits"),
    [
        ((2, 3, 32, 32), [
            [-0.3827533, 0.8951405, -1.4636081, 0.1930384, -0.1961182, -1.9474981, -0.3910766, -2.1509352, 0.5176293, -0.3272088],
            [-0.1413702, 0.6640937, -1.2242469, 0.8773792, 0.1473149, -1.3445582, 1.5131497, -1.9921417, -0.1722132, 0.0052025]]),
        ((2, 3, 4, 32, 32), [
            [0.6544462, 0.8064373, -0.8966929, 0.3817626, -0.1404685, -1.78161, 1.686047, -1.5617799, 0.1644358, 0.1191466],
            [0.5888182, 0.6105245, -0.2675635, 0.0600854, -0.3339333, -2.0888586, 1.2047135, -1.7288182, 0.029908, -0.003691]]),
        ((2, 3, 48, 48), [
            [0.1560981, 1.0797716, -1.3468279, 0.1145808, 0.6012425, -1.8897772, 0.2689897, -1.920724, -0.211691, -0.1395528],
            [0.0473537, 1.069652, -1.2776462, 0.7613778, 0.4295346, -0.9731373, 0.3631272, -2.2204399, -0.0126853, -0.2181708]]),
    ],
    ids=["image", "clip", "image at another resolution"],
)  # fmt: skip
def test_classifying_gives_the_released_logits(shape, logits):
    model = Classifier(TINY, num_classes=10)
    model.load_state_dict(omnimae.convert_released(released_state(released_shapes(TINY, 10))))
    torch.testing.assert_close(model(released_input(*shape)), torch.tensor(logits), atol=1e-5, rtol=0)


def test_positions_are_the_released_ones():
    table = omnimae.sincos_positions(32, 64)
    assert table[1, :4].tolist() == pytest.approx(
        [0.8414709568023682, 0.5403022766113281, 0.6815613508224487, 0.7317609786987305], abs=1e-7
    )
    assert table[31, -2:].tolist() == pytest.approx([0.004133904818445444, 0.9999914765357971], abs=1e-7)


# ------------------------------------------------------------------------------------------------
# Patches, masks, the model


def test_patchify_and_back():
    x = clips()
    patches = omnimae.patchify(x, TINY.patch_size)
    assert patches.shape == (2, 2 * 4 * 4, 2 * 8 * 8 * 3)
    assert torch.equal(patches[0, 4 * 4 + 1, :3], x[0, :, 2, 0, 8])  # (t, h, w, channel) order
    assert torch.equal(omnimae.unpatchify(patches, TINY.patch_size, TINY.grid), x)


def test_normalize_is_torchvisions_and_takes_bytes():
    from torchvision.transforms import v2

    x = torch.randint(256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    plain = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = torch.stack([plain(frame) for frame in (x / 255).transpose(1, 2).flatten(0, 1)])
    assert torch.equal(omnimae.normalize(x).transpose(1, 2).flatten(0, 1), expected)
    assert torch.equal(omnimae.normalize(x / 255), omnimae.normalize(x))


@pytest.mark.parametrize(
    ("model", "image", "clip"), [("vit_b", (176, 20), (1489, 79)), ("vit_h", (230, 26), (1945, 103))]
)
def test_the_papers_numbers_of_masked_patches(model, image, clip):
    cfg = MODELS[model]
    for grid, ratio, (masked, visible) in (
        ((1, *cfg.grid[1:]), cfg.image_mask_ratio, image), (cfg.grid, cfg.video_mask_ratio, clip),
    ):  # fmt: skip
        mask = random_mask(3, grid, ratio)
        assert mask.dtype == torch.bool
        assert mask.sum(1).tolist() == [masked] * 3
        assert (~mask).sum(1).tolist() == [visible] * 3


@pytest.mark.parametrize("kind", ["random", "tube"])
def test_masks_are_uniform_and_different_for_each_view(kind):
    def worst(mask):  # patch, in standard deviations from as often masked as the others
        share = mask.float().mean()
        return ((mask.sum(0) - len(mask) * share).abs() / (len(mask) * share * (1 - share)).sqrt()).max()

    mask = random_mask(4000, (4, 8, 8), 0.9, kind, torch.Generator().manual_seed(0))
    assert mask.sum(1).unique().tolist() == [230 if kind == "random" else 4 * 57]
    if kind == "tube":
        time = mask.unflatten(1, (4, 64))
        assert (time == time[:, :1]).all()
        mask = time[:, 0]
    assert len(mask.unique(dim=0)) > 3900  # the next view's is another
    assert worst(mask) < 5
    biased = mask.clone()
    biased[:200, 0] = False  # a patch that is masked 5 % too seldom is found
    assert worst(biased) > 5


def test_an_image_is_a_one_frame_clip(tiny):
    x, mask = images(), random_mask(2, (1, 4, 4), 0.75)
    loss, pred, _ = tiny(x, mask)
    assert torch.equal(tiny(x[:, :, None], mask)[1], pred)
    patches, grid = omnimae.to_patches(x, TINY)
    assert grid == (1, 4, 4)
    frames = patches.unflatten(2, (2, -1))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])  # the frame is repeated to fill a patch


def test_a_mask_is_drawn_at_the_models_ratio_when_none_is_given(tiny):
    assert tiny(images())[2].sum(1).tolist() == [12, 12]
    assert tiny(clips())[2].sum(1).tolist() == [28, 28]


def test_visible_indices_are_the_same_as_a_mask(tiny):
    mask = random_mask(2, TINY.grid, 0.9)
    visible = torch.stack([(~row).nonzero()[:, 0] for row in mask])
    loss, pred, same = tiny(clips(), visible)
    assert torch.equal(same, mask)
    assert torch.equal(tiny(clips(), mask)[1], pred)


def test_the_prediction_does_not_see_masked_pixels(tiny):
    x, mask = clips(1), random_mask(1, TINY.grid, 0.9)
    patches = omnimae.patchify(x, TINY.patch_size)
    noise = patches + torch.randn_like(patches) * mask[..., None]
    other = omnimae.unpatchify(noise, TINY.patch_size, TINY.grid)
    assert torch.equal(tiny(other, mask)[1], tiny(x, mask)[1])
    assert tiny(other, mask)[0] != tiny(x, mask)[0]


def test_the_loss_is_over_masked_patches_only(tiny):
    x, mask = clips(1), random_mask(1, TINY.grid, 0.9)
    loss, pred, _ = tiny(x, mask)
    pixels = x * omnimae.STD.view(3, 1, 1, 1) + omnimae.MEAN.view(3, 1, 1, 1)
    target = omnimae.patchify(pixels, TINY.patch_size)[mask].unflatten(1, (-1, 3))  # (M, P/3, 3)
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    assert loss.item() == pytest.approx((pred[0] - target.flatten(1)).square().mean().item(), rel=1e-5)


def test_gradients_reach_every_parameter_and_no_position(tiny):
    (tiny(images())[0] + tiny(clips())[0]).backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert {name for name, _ in tiny.named_buffers()} == {"encoder.pos_embed", "decoder.pos_embed"}
    assert not any(buffer.requires_grad for buffer in tiny.buffers())


def test_permuting_samples_permutes_outputs(tiny):
    x, mask, order = clips(4), random_mask(4, TINY.grid, 0.9), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(tiny(x[order], mask[order])[1], tiny(x, mask)[1][order])


def test_reconstruction_keeps_visible_patches_and_the_brightness_of_masked_ones(tiny):
    pixels = torch.rand(2, 3, 4, 32, 32)
    mask = random_mask(2, TINY.grid, 0.9)
    video = tiny.reconstruct(omnimae.normalize(pixels), mask)
    assert video.shape == pixels.shape
    assert video.min() >= 0 and video.max() <= 1
    got, true = (omnimae.patchify(v, TINY.patch_size) for v in (video, pixels))
    torch.testing.assert_close(got[~mask], true[~mask], atol=1e-6, rtol=0)
    assert not torch.allclose(got[mask], true[mask], atol=0.1)
    assert tiny.reconstruct(images()).shape == (2, 3, 1, 32, 32)


def test_a_perfect_prediction_reconstructs_the_clip(tiny, monkeypatch):
    pixels = torch.rand(2, 3, 4, 32, 32)
    x, mask = omnimae.normalize(pixels), random_mask(2, TINY.grid, 0.9)
    masked = omnimae.patchify(pixels, TINY.patch_size)[mask].unflatten(0, (2, -1))
    perfect, _, _ = omnimae.normalize_patches(masked)
    monkeypatch.setattr(tiny.decoder, "forward", lambda *_: perfect)
    assert tiny(x, mask)[0] < 1e-9
    torch.testing.assert_close(tiny.reconstruct(x, mask), pixels, atol=1e-5, rtol=0)


def test_a_picture_shows_original_visible_and_reconstruction(tiny):
    picture = omnimae.draw_reconstruction(tiny, clips(1)[0], random_mask(1, TINY.grid, 0.9)[0])
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 3 * 34 + 2, 4 * 34 + 2)  # three rows of four frames
    picture = omnimae.draw_reconstruction(tiny, images(1)[0], random_mask(1, (1, 4, 4), 0.75)[0])
    assert picture.shape == (3, 34 + 2, 3 * 34 + 2)  # one row of three


def test_images_of_other_sizes_and_shapes(tiny):
    assert Classifier(TINY, 10).features(torch.randn(2, 3, 48, 64)).shape == (2, 6 * 8, 64)
    assert tiny(torch.randn(2, 3, 64, 48))[1].shape == (2, int(0.75 * 48), 384)


def test_drop_path_leaves_out_samples_in_training_only():
    torch.manual_seed(0)
    kept = omnimae.drop_path(torch.ones(1000, 1, 2), 0.25)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert 0.7 < (kept[:, 0, 0] > 0).float().mean() < 0.8
    model = Classifier(replace(TINY, depth=3), 10, drop_path=0.2)
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 0.1, 0.2])
    model.eval()
    assert torch.equal(model.features(images()), model.features(images()))


def test_activation_checkpointing_changes_no_gradient(tiny):
    def gradients():
        tiny.zero_grad()
        tiny(clips(), random_mask(2, TINY.grid, 0.9, generator=torch.Generator().manual_seed(0)))[0].backward()
        return [parameter.grad.clone() for parameter in tiny.parameters()]

    plain = gradients()
    tiny.encoder.blocks.checkpointing = tiny.decoder.blocks.checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients()))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "torch.uint8.*normalize"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\).*expected"),
        (torch.zeros(2, 1, 32, 32), r"\(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 30, 32), "30 x 32 pixels: not whole 8 x 8 patches"),
        (torch.zeros(2, 3, 8, 32, 32), r"clips of 8 x 32 x 32.*\(B, 3, 4, 32, 32\)"),
        (torch.zeros(2, 3, 4, 48, 48), "clips of 4 x 48 x 48"),
        (torch.zeros(0, 3, 32, 32), r"\(0, 3, 32, 32\)"),
    ],
)
def test_a_wrong_input_is_named(tiny, x, words):
    for model in (tiny, Classifier(TINY, 10)):
        with pytest.raises(ValueError, match=words):
            model(x)


def test_a_wrong_mask_is_named(tiny):
    unequal = random_mask(2, (1, 4, 4), 0.75)
    unequal[0] = True
    unequal[0, :3] = False
    for mask, words in (
        (unequal, r"leave \[3, 4\] of 16 patches visible"),
        (torch.ones(2, 16, dtype=torch.bool), r"\[0\] of 16"),
        (torch.ones(2, 17, dtype=torch.bool), r"shape \(2, 17\), expected \(2, 16\)"),
        (torch.ones(2, 16), "torch.float32.*expected bool"),
        (torch.zeros(3, 4, dtype=torch.int64), r"torch.int64 \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(images(), mask)
    with pytest.raises(ValueError, match="masks 0 of 16"):
        random_mask(2, (1, 4, 4), 0.01)
    with pytest.raises(ValueError, match="'tubes'"):
        random_mask(2, (1, 4, 4), 0.5, "tubes")
