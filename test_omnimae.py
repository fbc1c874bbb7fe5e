"""The tests, which also show how to call everything: `pytest`, three minutes on two cores; those
that take long, about real kills and long runs: `SLOW=1 pytest`.

Nothing is downloaded. Files are real: JPEG, PNG, VP9, H.264, made here; runs are real processes.
"""

import ast
import csv
import functools
import glob
import http.server
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import engine
import eval as evaluation
import finetune
import omnimae
import train
from omnimae import MODELS, Classifier, OmniMAE, OmniMAEConfig, random_mask

HERE = Path(__file__).parent
torch.set_num_threads(1)  # the models are tiny: threads would mostly wait for each other
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes long: SLOW=1 pytest")
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
    torch.testing.assert_close(
        model(released_input(*shape)), torch.tensor(logits), atol=1e-5, rtol=0
    )


def test_positions_are_the_released_ones():
    table = omnimae.sincos_positions(32, 64)
    assert table[1, :4].tolist() == pytest.approx(
        [0.8414709568023682, 0.5403022766113281, 0.6815613508224487, 0.7317609786987305], abs=1e-7
    )
    assert table[31, -2:].tolist() == pytest.approx(
        [0.004133904818445444, 0.9999914765357971], abs=1e-7
    )


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
    assert omnimae.normalize(x.double() / 255).dtype == torch.float32  # as from NumPy
    with pytest.raises(ValueError, match="got torch.int64: expected uint8, or floats in"):
        omnimae.normalize(x.long())


@pytest.mark.parametrize(
    ("model", "image", "clip"),
    [("vit_b", (176, 20), (1489, 79)), ("vit_h", (230, 26), (1945, 103))],
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
        return (
            (mask.sum(0) - len(mask) * share).abs() / (len(mask) * share * (1 - share)).sqrt()
        ).max()

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
    _, pred, _ = tiny(x, mask)
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
    _, pred, same = tiny(clips(), visible)
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
    assert loss.item() == pytest.approx(
        (pred[0] - target.flatten(1)).square().mean().item(), rel=1e-5
    )


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
    assert picture.size == (4 * 34 + 2, 3 * 34 + 2)  # three rows of four frames
    picture = omnimae.draw_reconstruction(tiny, images(1)[0], random_mask(1, (1, 4, 4), 0.75)[0])
    assert picture.size == (3 * 34 + 2, 34 + 2)  # one row of three


def test_images_of_other_sizes_and_shapes(tiny):
    assert Classifier(TINY, 10).features(torch.randn(2, 3, 48, 64)).shape == (2, 6 * 8, 64)
    assert tiny(torch.randn(2, 3, 64, 48))[1].shape == (2, int(0.75 * 48), 384)


def test_drop_path_leaves_out_samples_in_training_only():
    torch.manual_seed(0)
    block, x = omnimae.Block(8, 2, drop_path=0.25), torch.randn(1, 3, 8).repeat(1000, 1, 1)
    kinds = block(x).detach()[:, 0, 0].unique().numel()
    assert kinds == 4  # either branch, both or none
    assert block.eval()(x).detach()[:, 0, 0].unique().numel() == 1
    model = Classifier(replace(TINY, depth=3), 10, drop_path=0.2)
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 0.1, 0.2])
    model.eval()
    assert torch.equal(model.features(images()), model.features(images()))


def test_in_autocast_a_cpu_computes_attention_in_float32(monkeypatch):
    attend, dtypes = F.scaled_dot_product_attention, []

    def recorded(q, k, v):
        out = attend(q, k, v)
        dtypes.extend([q.dtype, out.dtype])
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    attention = omnimae.Attention(dim=8, heads=2, qkv_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(torch.randn(1, 5, 8)).dtype == torch.bfloat16
    assert dtypes == [torch.float32, torch.float32]


def test_activation_checkpointing_changes_no_gradient(tiny):
    def gradients():
        tiny.zero_grad()
        tiny(clips(), random_mask(2, TINY.grid, 0.9, generator=torch.Generator().manual_seed(0)))[
            0
        ].backward()
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
        (torch.ones(2, 17, dtype=torch.bool), r"bool \(2, 17\): expected bool \(2, 16\)"),
        (torch.ones(2, 16), "torch.float32.*expected bool"),
        (torch.zeros(2, 16, dtype=torch.int64), r"torch.int64 \(2, 16\)"),
        (torch.zeros(3, 4, dtype=torch.int64), r"\(3, 4\): expected.* indices \(2, V\)"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(images(), mask)
    with pytest.raises(ValueError, match="masks 0 of 16"):
        random_mask(2, (1, 4, 4), 0.01)
    with pytest.raises(ValueError, match="'tubes'"):
        random_mask(2, (1, 4, 4), 0.5, "tubes")


# ------------------------------------------------------------------------------------------------
# Checkpoints


NINE = {  # parameters that train, and the head's classes (REFERENCE of the released files)
    "vit_b_pretrain": (94_217_856, None),
    "vit_b_in1k": (87_005_416, 1000),
    "vit_b_ssv2": (86_370_222, 174),
    "vit_l_pretrain": (317_803_520, None),
    "vit_l_in1k": (304_910_312, 1000),
    "vit_l_ssv2": (304_063_662, 174),
    "vit_h_pretrain": (657_655_448, None),
    "vit_h_in1k": (632_468_200, 1000),
    "vit_h_ssv2": (631_410_094, 174),
}


@pytest.mark.parametrize("name", NINE)
def test_the_nine_released_layouts_load_and_have_the_published_size(name, tmp_path):
    parameters, num_classes = NINE[name]
    shapes = released_shapes(MODELS[name[:5]], num_classes)
    if name.startswith("vit_b"):  # at full size; the larger ones as one number, repeated
        state = {key: torch.randn(shape) for key, shape in shapes.items()}
    else:
        state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    path = tmp_path / omnimae.CHECKPOINTS[name].rsplit("/", 1)[-1]
    torch.save(OrderedDict(state), path)  # as torch's own state_dict() is
    model = omnimae.load_checkpoint(path)
    assert isinstance(model, OmniMAE if num_classes is None else Classifier)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    if num_classes:
        assert model.head.out_features == num_classes


def test_names_lead_to_the_released_files():
    assert list(omnimae.CHECKPOINTS) == list(NINE)
    assert omnimae.CHECKPOINTS["vit_h_ssv2"] == (
        "https://dl.fbaipublicfiles.com/omnivore/omnimae_ckpts/vith_ssv2_ft.torch"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_b_inlk", "vit_b_inlk: no such file, and not a released checkpoint: did you mean vit_b_in1k?"),
        ("vitl_pretrain.torch", "did you mean vit_l_pretrain?"),
        ("ViT_H", "did you mean vit_h_pretrain, vit_h_in1k, vit_h_ssv2?"),
        ("runs/mine/last.pt", "not a released checkpoint (vit_b_pretrain, vit_b_in1k, "),
        (HERE, "is a folder: expected a file, such as "),
    ],
)  # fmt: skip
def test_a_misspelt_checkpoint_is_answered_with_the_nearest(name, words):
    with pytest.raises(ValueError) as error:
        omnimae.load_checkpoint(name)
    assert words in str(error.value)


@pytest.fixture
def released(monkeypatch):
    """Tiny released-layout weights, and a model of that size to read them as."""
    monkeypatch.setitem(omnimae.MODELS, "tiny", TINY)
    return lambda num_classes=None, cfg=TINY: released_state(released_shapes(cfg, num_classes))


def test_a_name_is_downloaded_once(released, tmp_path, monkeypatch):
    torch.save(released(10), tmp_path / "somewhere.torch")
    monkeypatch.setitem(omnimae.CHECKPOINTS, "tiny_in1k", (tmp_path / "somewhere.torch").as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert omnimae.load_checkpoint("tiny_in1k").head.out_features == 10
    (tmp_path / "somewhere.torch").unlink()
    assert omnimae.load_checkpoint("tiny_in1k").head.out_features == 10  # from the cache
    for folder, classes in (("a", 3), ("b", 4)):  # two files of one name
        (tmp_path / folder).mkdir()
        torch.save(released(classes), tmp_path / folder / "best.pt")
        url = (tmp_path / folder / "best.pt").as_uri()
        assert omnimae.load_checkpoint(url).head.out_features == classes
    for url in ((tmp_path / "tiny_gone.torch").as_uri(), "http://no host/a b.pt"):
        with pytest.raises(ValueError, match=f"{url}: cannot download"):
            omnimae.load_checkpoint(url)


def test_of_several_processes_one_downloads(tmp_path):
    torch.save(released_state(released_shapes(MODELS["demo"], 8)), tmp_path / "model.pt")
    gets = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            gets.append(words)

    address = ("localhost", 0)
    with http.server.ThreadingHTTPServer(
        address, functools.partial(Server, directory=tmp_path)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}/model.pt?signature={'x' * 300}"
        load = f"omnimae.load_checkpoint({url!r})"
        command = [sys.executable, "-c", f"import omnimae; {load}"]
        where = {"cwd": HERE, "env": os.environ | {"TORCH_HOME": str(tmp_path / "home")}}
        ranks = [subprocess.Popen(command, stderr=subprocess.DEVNULL, **where) for _ in range(2)]
        assert [rank.wait() for rank in ranks] == [0, 0] and len(gets) == 1
        server.shutdown()


@pytest.mark.parametrize(
    ("num_classes", "level"), [(None, "heads.0.projector."), (10, "heads.0."), (174, "heads.0.0.")]
)
def test_files_of_the_released_trainer_load(released, tmp_path, num_classes, level):
    state = released(num_classes, replace(TINY, decoder_qkv_bias=True))
    trainer = {key.replace("head.", level): value for key, value in state.items()}
    torch.save({"model": trainer}, tmp_path / "trainer.torch")
    model = omnimae.load_checkpoint(tmp_path / "trainer.torch")
    if num_classes is None:
        assert model.decoder.blocks[0].attn.qkv.bias is not None
        assert torch.equal(model.decoder.head.weight, state["head.weight"])
    else:
        assert torch.equal(model.head.weight, state["head.weight"])


def test_a_checkpoint_that_does_not_fit_is_named(released, tmp_path):
    path = tmp_path / "file.torch"
    good = released()

    def message(content):
        torch.save(content, path)
        with pytest.raises(ValueError) as error:
            omnimae.load_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert 'Missing key(s) in state_dict: "encoder.blocks.1.norm1.bias"' in message(
        {key: value for key, value in good.items() if key != "trunk.blocks.1.norm1.bias"}
    )
    assert "trunk.cls_token" in message(good | {"trunk.cls_token": torch.zeros(64)})
    assert "norm.weight: copying a param with shape torch.Size([65])" in message(
        good | {"trunk.norm.weight": torch.zeros(65)}
    )
    assert "patch embedding of (0,) and 0 blocks" in message({"fc.weight": torch.zeros(10, 10)})
    assert "not a dict" in message([1, 2, 3])
    assert "patch embedding of (32, 384)" in message(
        released_state(released_shapes(replace(TINY, dim=32), None))
    )


def test_a_damaged_or_dangerous_file_is_refused(released, tmp_path):
    path, ran = tmp_path / "file.torch", tmp_path / "ran"
    torch.save(released(), path)
    whole = path.read_bytes()

    class Code:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    torch.save({"model": Code()}, path)
    code = path.read_bytes()
    for content in (
        b"",
        whole[:1000],
        whole[: len(whole) // 2],
        whole[:-100],
        b"<html>404</html>",
        code,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file.torch"):
            omnimae.load_checkpoint(path)
    assert not ran.exists()
    with pytest.raises(ValueError, match="http://localhost:9/x.torch"):
        omnimae.load_checkpoint("http://localhost:9/x.torch")


# ------------------------------------------------------------------------------------------------
# Media


def pixels_of(mode: str) -> np.ndarray:
    y, x = np.mgrid[:40, :60]
    rgb = np.stack([x * 4, y * 6, 255 - x * 4], -1).astype(np.uint8)
    return {"RGB": rgb, "L": rgb[..., 0], "RGBA": np.dstack([rgb, rgb[..., 1]])}[mode]


def test_read_image_is_rgb_whatever_the_file(tmp_path):
    rgb = PIL.Image.fromarray(pixels_of("RGB"))
    grey = PIL.Image.fromarray(pixels_of("L"))
    sixteen = PIL.Image.fromarray(pixels_of("L").astype(np.uint16) * 257)
    rotated = PIL.Image.Exif()
    rotated[0x0112] = 6
    files = {
        "rgb.jpg": (rgb, {}), "cmyk.jpg": (rgb.convert("CMYK"), {}), "grey.jpg": (grey, {}),
        "rgb.png": (rgb, {}), "alpha.png": (PIL.Image.fromarray(pixels_of("RGBA")), {}),
        "grey16.png": (sixteen, {}), "palette.png": (rgb.convert("P"), {}), "rgb.bmp": (rgb, {}),
        "rgb.tif": (rgb, {}), "rgb.webp": (rgb, {}), "rgb.gif": (rgb, {}),
        "turned.jpg": (rgb, {"exif": rotated}),
    }  # fmt: skip
    for name, (picture, options) in files.items():
        picture.save(tmp_path / name, **options)
        got = omnimae.read_image(tmp_path / name)
        assert got.dtype == torch.uint8 and got.shape == (3, 40, 60), name
        expected = np.asarray(
            (grey if "16" in name else PIL.Image.open(tmp_path / name)).convert("RGB")
        )
        assert torch.equal(got, torch.from_numpy(expected.copy()).permute(2, 0, 1)), name
    (tmp_path / "rgb.png").rename(tmp_path / "png_named.JPEG")
    assert omnimae.read_image(tmp_path / "png_named.JPEG").shape == (3, 40, 60)


def test_a_broken_image_is_a_value_error_with_its_name(tmp_path):
    PIL.Image.fromarray(pixels_of("RGB")).save(tmp_path / "good.jpg")
    good = (tmp_path / "good.jpg").read_bytes()
    for name, content in {
        "empty.jpg": b"", "half.jpg": good[: len(good) // 2], "text.jpg": b"not a picture",
        "header.png": b"\x89PNG\r\n\x1a\n", "end.jpg": good[:-20],
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            omnimae.read_image(tmp_path / name)
    with pytest.raises(ValueError, match="gone.jpg"):
        omnimae.read_image(tmp_path / "gone.jpg")
    PIL.Image.fromarray(np.full((40, 60), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif.*its pixels are floats: expected 8 or 16 bit"):
        omnimae.read_image(tmp_path / "float.tif")


def numbered(num: int) -> np.ndarray:
    """Frames that carry their number as eight squares, black or white: (T, 32, 64, 3)."""
    bits = (np.arange(num)[:, None] >> np.arange(8)) & 1
    frames = np.repeat(np.repeat(bits.reshape(num, 2, 4), 16, axis=1), 16, axis=2) * 235
    return np.repeat(frames[..., None], 3, axis=3).astype(np.uint8)


def numbers(clip: torch.Tensor) -> list[int]:
    squares = clip.float().mean(1).unflatten(2, (4, 16)).unflatten(1, (2, 16)).mean((2, 4)) > 118
    return (squares.flatten(1).long() << torch.arange(8)).sum(1).tolist()


def write_numbered(path, num=48, codec="libvpx-vp9", rate=12, times=None, first=0, options=None):
    """A video of numbered frames; `times`: in 1/1000 s, where they are not regular."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(numbered(num)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = first + i if times is None else times[i]
            frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


X264 = {"g": "10", "bf": "3", "b-adapt": "0"}
VIDEOS = {
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime"}},
    "h264.mp4": {"codec": "libx264", "options": X264},
    "open_gop.mp4": {"codec": "libx264", "options": X264 | {"x264-params": "open-gop=1:keyint=10"}},
    "open_gop.mpg": {"codec": "mpeg2video", "rate": 24, "options": {"g": "10", "bf": "2"}},
    "h264.ts": {"codec": "libx264", "options": X264},
    "one_keyframe.ts": {"codec": "libx264", "options": X264 | {"g": "250"}},
    "open_gop.ts": {"codec": "mpeg2video", "rate": 24, "options": {"g": "10", "bf": "2"}},
    "late.ts": {"codec": "libx264", "first": 30, "options": X264},
    "late.mkv": {"codec": "libx264", "first": 30, "options": X264},
    "late.mp4": {"codec": "libx264", "first": 30, "options": X264},
}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_clip_has_the_right_frames(name, tmp_path):
    options = VIDEOS[name]
    path, rate = write_numbered(tmp_path / name, **options), options.get("rate", 12)
    for start in (0.0, 0.1, 0.5, 0.84, 1.0, 1.9):
        for duration, num_frames in ((1.0, 16), (0.5, 4), (10.0, 8)):
            inside = [i for i in range(48) if start - 1e-4 <= i / rate < start + duration - 1e-4]
            wanted = [inside[int(x)] for x in np.linspace(0, len(inside) - 1, num_frames)]
            clip = omnimae.read_clip(path, start, duration, num_frames)
            assert clip.dtype == torch.uint8 and clip.shape == (num_frames, 3, 32, 64)
            assert numbers(clip) == wanted, (start, duration)


def test_a_clip_of_variable_frame_rate_goes_by_time(tmp_path):
    times = [0, 10, 20, 500, 900, 950, 1400, 2000, 2050, 2600, 3000]
    path = write_numbered(tmp_path / "vfr.webm", num=len(times), times=times)
    assert numbers(omnimae.read_clip(path, 0.5, 1.5, 4)) == [3, 4, 5, 6]
    assert numbers(omnimae.read_clip(path, 0.9, 2.7, 3)) == [4, 7, 10]
    with omnimae.Video(path) as video:
        assert video.duration == 3.0


def test_a_still_picture_is_a_clip(tmp_path):
    path = write_numbered(tmp_path / "slides.webm", num=4, times=[0, 100, 5000, 5100])
    assert numbers(omnimae.read_clip(path, 1.0, 2.7, 3)) == [1, 1, 1]
    assert numbers(omnimae.read_clip(path, 4.0, 2.7, 4)) == [2, 2, 2, 3]
    with pytest.raises(ValueError, match="no frame between 5.200 and 7.900 s"):
        omnimae.read_clip(path, 5.2, 2.7, 3)  # after its end


def test_the_duration_is_the_streams_or_the_last_frames(tmp_path):
    with omnimae.Video(write_numbered(tmp_path / "a.webm")) as video:
        assert video.duration == pytest.approx(47 / 12, abs=1e-3)
    with omnimae.Video(write_numbered(tmp_path / "a.mp4", codec="libx264")) as video:
        assert video.duration == pytest.approx(4.0)


def test_short_clips_repeat_frames(tmp_path):
    path = write_numbered(tmp_path / "short.webm", num=3)
    assert numbers(omnimae.read_clip(path, 0, 2.7, 8)) == [0, 0, 0, 0, 1, 1, 1, 2]


def test_one_open_video_gives_several_clips_and_is_closed(tmp_path):
    path = write_numbered(tmp_path / "a.webm")
    before = len(os.listdir("/proc/self/fd"))
    with omnimae.Video(path) as video:
        for start in (2.0, 0.0, 1.0):
            assert numbers(video.clip(start, 0.2, 1)) == [int(start * 12)]
    for _ in range(20):
        omnimae.read_clip(path, 0, 1, 4)
    assert len(os.listdir("/proc/self/fd")) == before


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_broken_video_is_a_value_error_with_its_name(tmp_path):
    good = write_numbered(tmp_path / "good.webm").read_bytes()
    write_audio(tmp_path / "audio.mp4")
    for name, content in {
        "empty.webm": b"", "text.mp4": b"not a video", "start.webm": good[:400],
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))
    for name in ("empty.webm", "text.mp4", "start.webm", "audio.mp4", "gone.mp4"):
        with pytest.raises(ValueError, match=name):
            omnimae.read_clip(tmp_path / name, 0, 2.7, 8)
    with pytest.raises(ValueError, match=r"good.webm.*no frame between 9.000 and 11.700 s"):
        omnimae.read_clip(tmp_path / "good.webm", 9, 2.7, 8)
    for duration, num_frames in ((0, 8), (-1, 8), (2.7, 0)):  # not the file's fault
        with pytest.raises(
            ValueError, match=rf"^got {num_frames} frames of {duration} s: expected"
        ):
            omnimae.read_clip(tmp_path / "good.webm", 0, duration, num_frames)
    assert len(os.listdir("/proc/self/fd")) == before


def test_data_sets_are_listed_as_downloaded(demo, tmp_path):
    train_part = omnimae.list_media(demo / "images", "images")
    assert len(train_part.paths) == len(train_part.labels) == 48
    assert train_part.classes == list(omnimae.SHAPES)
    assert all(Path(p).parent.name == train_part.classes[k] for p, k in zip(*train_part[:2]))
    assert len(omnimae.list_media(demo / "images", "images", "val").paths) == 16
    ssv2 = omnimae.list_media(demo / "videos", "videos")
    assert len(ssv2.paths) == 32 and ssv2.labels[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert ssv2.classes[0] == "Growing something"
    assert len(omnimae.list_media(demo / "videos", "videos", "val").paths) == 8

    for path in ("mine/zebra/b.MP4", "mine/ant/ä b.mov", "mine/ant/a.webm", "mine/ant/notes.txt", "mine/ant/.x.mp4"):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    mine = omnimae.list_media(tmp_path / "mine", "videos")
    assert [Path(path).name for path in mine.paths] == ["a.webm", "ä b.mov", "b.MP4"]
    assert (mine.labels, mine.classes) == ([0, 0, 1], ["ant", "zebra"])
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert len(omnimae.list_media(tmp_path / "link", "videos").paths) == 3
    assert omnimae.list_media(tmp_path / "mine" / "zebra", "videos").labels is None  # flat


def test_a_wrong_folder_is_named(demo, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for root, kind, split, words in (
        (tmp_path / "gone", "images", "train", "gone does not exist: expected a folder of images"),
        (tmp_path / "file", "images", "train", "file is a file: expected a folder"),
        (tmp_path / "empty", "videos", "train", "empty: no videos found"),
        (demo / "images", "videos", "train", "no videos found"),
        (
            demo / "images" / "train",
            "images",
            "val",
            "has none of the folders val, valid, validation",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            omnimae.list_media(root, kind, split)
    labels = demo / "videos" / "labels"
    (tmp_path / "ssv2" / "labels").mkdir(parents=True)
    for name in ("labels", "train"):
        (tmp_path / "ssv2" / "labels" / f"{name}.json").write_text(
            (labels / f"{name}.json").read_text()
        )
    for numbers in ('{"a": "0", "b": "2"}', '{"a": "0", "b": "0"}', '{"a": "1"}', '["a"]', "{}"):
        (tmp_path / "labels.json").write_text(numbers)
        with pytest.raises(ValueError, match=r"labels.json: expected JSON .* each once"):
            omnimae.read_classes(tmp_path / "labels.json")
    for part in omnimae.VALIDATION:
        (tmp_path / part / part / "cat").mkdir(parents=True)
        (tmp_path / part / part / "cat" / "1.jpg").touch()
        assert omnimae.has_validation(tmp_path / part, "images")
        assert omnimae.list_media(tmp_path / part, "images", "val").classes == ["cat"]
    for name in ("car", "plane", "train", "val"):  # a class, named like a part
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "1.jpg").touch()
    for split in ("train", "val"):
        words = rf"own has images in {split}/ and in car/: if both are classes, rename {split}/"
        with pytest.raises(ValueError, match=words):
            omnimae.list_media(tmp_path / "own", "images", split)
    for path in ("train/a/1.jpg", "train/b/deep/1.jpg", "val/a/1.jpg", "val/b/1.jpg"):
        (tmp_path / "nested" / path).parent.mkdir(parents=True)
        (tmp_path / "nested" / path).touch()
    with pytest.raises(
        ValueError, match=r"train/b holds images only in folders of its own: expected"
    ):
        omnimae.list_media(tmp_path / "nested", "images")
    for name in ("cat", ".thumbnails"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "1.jpg").touch()
    assert omnimae.list_media(tmp_path / "mine", "images").classes == ["cat"]
    assert not omnimae.has_validation(tmp_path / "ssv2", "images")
    (tmp_path / "mine" / "2.jpg").touch()
    with pytest.raises(
        ValueError, match="holds images beside folders of images, such as 2.jpg bes"
    ):
        omnimae.list_media(tmp_path / "mine", "images")
    with pytest.raises(ValueError, match=r"20bn-something-something-v2 does not exist: expected"):
        omnimae.list_media(tmp_path / "ssv2", "videos")
    (tmp_path / "ssv2" / "20bn-something-something-v2").mkdir()
    (tmp_path / "ssv2" / "labels" / "labels.json").write_text('{"Holding something": "0"}')
    with pytest.raises(ValueError, match=r"train.json.*labels.json has no 'Growing something'"):
        omnimae.list_media(tmp_path / "ssv2", "videos")


def test_the_demo_data_is_the_same_every_time(demo, tmp_path):
    again = omnimae.write_demo_data(tmp_path / "again", 48, 32, 16, 8)
    files = sorted(path.relative_to(demo) for path in demo.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for kind, suffix in (("images", ".JPEG"), ("videos", ".webm"), ("videos", ".json")):
        some = [path for path in files if path.parts[0] == kind and path.suffix == suffix]
        assert some and all(
            (demo / path).read_bytes() == (again / path).read_bytes() for path in some
        )
    with av.open(str(demo / "videos" / "20bn-something-something-v2" / "1.webm")) as video:
        assert video.streams.video[0].codec_context.name == "vp9"
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # nothing left over


# ------------------------------------------------------------------------------------------------
# Pretraining


@pytest.fixture
def signals():
    """A run in this process catches signals; after the test, pytest does again."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def pretrain(demo, tmp_path, signals):
    """Run train.py in this process on the small demo set: 3 steps of images, 2 of videos an epoch."""

    def run(*options, out="run", data=("--images", demo / "images", "--videos", demo / "videos")):
        arguments = [
            "--model", "demo", *data, "--batch-size", 16, "--micro-batch", 16, "--epochs", 1,
            "--workers", 0, "--log-every", 1, "--device", "cpu", "--out", tmp_path / out, *options,
        ]  # fmt: skip
        train.main(train.parse_args([str(argument) for argument in arguments]))
        return tmp_path / out

    return run


def torchrun(processes: int, script: str, *options, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command = [str(word) for word in (*command, processes, HERE / script, *options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return omnimae.read_checkpoint(run / "last.pt")["model"]


def log(run: Path, field: str = "loss") -> list:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[field] for line in lines if field in line]


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = (omnimae.read_checkpoint(run / "last.pt") for run in (one, other))
    assert a["step"] == b["step"]
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[key], b["optimizer"]["state"][i][key]) for key in state)
    for field in ("step", "kind", "loss", "lr", "held_out_loss", "unreadable"):
        assert log(one, field) == log(other, field)


def test_the_learning_rate_by_hand():
    rates = [train.learning_rate(step, 1000, peak=1.6e-3) for step in (0, 25, 50, 525, 999)]
    expected = [
        1e-6,
        1e-6 + 1.599e-3 / 2,
        1.6e-3,
        0.8e-3,
        0.8e-3 * (1 + math.cos(math.pi * 949 / 950)),
    ]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert train.learning_rate(1000, 1000, 1.0) == pytest.approx(0)
    assert train.learning_rate(1000, 1000, 1.0, end=1e-6) == pytest.approx(1e-6)


def test_the_order_of_a_run():
    sizes, views = {"images": 50, "videos": 37}, {"images": 1, "videos": 4}
    steps = train.Steps(sizes, views, batch=8, epochs=3, seed=0)
    assert steps.total == 3 * (50 // 8 + 37 // 8)  # an epoch counts every file once
    batches = list(steps)
    kinds = [batch[0][0] for batch in batches]
    assert [steps.at(step)[:2] for step in range(steps.total)] == [
        (step // 10, kind) for step, kind in enumerate(kinds)
    ]
    assert kinds[:10] != kinds[10:20]
    for kind, files in (("images", 8), ("videos", 2)):
        first = [sample for batch in batches[:10] for sample in batch if sample[0] == kind]
        assert all(len(batch) == files for batch in batches if batch[0][0] == kind)
        assert len({index for _, _, index, _, _ in first}) == len(first)  # no file twice
        assert {sample[-1] for sample in first} == {views[kind]}

    steps.start = 7  # a resumed run
    assert list(steps) == batches[7:]
    steps.start = 0
    parts = []  # two ranks and micro-batches of 4 views see the same samples
    for rank in (0, 1):
        share = {"rank": rank, "world": 2, "micro": 4}
        parts.append(list(train.Steps(sizes, views, batch=8, epochs=3, seed=0, **share)))
    assert [a + b for a, b in zip(*parts)] == batches
    tiny_set = train.Steps({"images": 3}, views, batch=8, epochs=1, seed=0)
    samples = next(iter(tiny_set))
    assert len(set(samples)) == 8  # the same files again, but other views of them


def test_a_batch_that_does_not_divide_is_named():
    for world, micro in ((3, None), (2, 6), (1, 2)):
        with pytest.raises(ValueError, match=r"batch of 16 views does not divide.*--batch-size"):
            train.Steps({"videos": 100}, {"videos": 4}, 16, 1, seed=0, world=world, micro=micro)


def test_views_follow_from_seed_epoch_sample_and_view(demo):
    listings = {kind: omnimae.list_media(demo / kind, kind).paths for kind in train.KINDS}
    views = train.Views(MODELS["demo"], listings, seed=0)
    pixels, visible, unreadable = train.collate([views["videos", 0, 5, 0, 4]])
    assert pixels.shape == (4, 3, 8, 48, 48) and pixels.dtype == torch.uint8
    assert visible.shape == (4, 144 - 129) and unreadable == []
    assert len({tuple(row) for row in visible.tolist()}) == 4  # each view has its own mask
    assert len({view.float().mean().item() for view in pixels}) == 4  # and crop
    torch.manual_seed(123)
    again, same, _ = train.collate([views["videos", 0, 5, 0, 4]])
    assert torch.equal(pixels, again) and torch.equal(visible, same)
    for other in (("videos", 1, 5, 0, 4), ("videos", 0, 5, 4, 4)):
        assert not torch.equal(train.collate([views[other]])[0], pixels)
    pixels, visible, _ = train.collate([views["images", 0, 0, 0, 1], views["images", 0, 1, 0, 1]])
    assert pixels.shape == (2, 3, 48, 48) and visible.shape == (2, 9)


def test_processes_accumulation_and_workers_change_nothing(pretrain, demo, tmp_path):
    one = pretrain()
    assert len(log(one)) == 5 and set(log(one, "kind")) == {"images", "videos"}
    for workers in (1, 2):
        assert_same_bits(one, pretrain("--workers", workers, out=f"workers{workers}"))
    accumulated = pretrain("--micro-batch", 4, out="accumulated")
    done = torchrun(
        2, "train.py", "--model", "demo", "--images", demo / "images", "--videos", demo / "videos", "--batch-size",
        16, "--epochs", 1, "--log-every", 1, "--device", "cpu", "--workers", 1, "--out", "two", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for other in (accumulated, tmp_path / "two"):
        assert log(other) == pytest.approx(log(one), rel=1e-5)
        for key, value in weights(one).items():
            torch.testing.assert_close(weights(other)[key], value, rtol=1e-5, atol=1e-6)


def test_a_stopped_run_goes_on_to_the_same_bits(pretrain, monkeypatch):
    whole = pretrain(out="whole")
    agree = engine.Run.agree
    for stop_after in (1, 3):

        def stopped(run, *args, after=stop_after):
            if run.step == after:
                os.kill(os.getpid(), signal.SIGTERM)  # as a cluster's scheduler does
            return agree(run, *args)

        monkeypatch.setattr(engine.Run, "agree", stopped)
        assert omnimae.read_checkpoint(pretrain(out="stopped") / "last.pt")["step"] == stop_after
    monkeypatch.undo()
    stopped = pretrain(out="stopped")
    assert_same_bits(whole, stopped)
    files = {path.relative_to(stopped).as_posix() for path in stopped.rglob("*") if path.is_file()}
    pictures = {f"pictures/{kind}_{step:06d}.png" for kind in train.KINDS for step in range(1, 6)}
    assert files == {"last.pt", "log.jsonl", "args.json"} | pictures
    assert_same_bits(whole, pretrain(out="stopped"))  # and a finished run stays as it is


def test_a_run_saves_a_model_that_loads(pretrain):
    out = pretrain("--image-mask-ratio", 0.5)
    model = omnimae.load_checkpoint(out / "last.pt")
    assert model.cfg == replace(MODELS["demo"], image_mask_ratio=0.5)
    assert all(torch.equal(value, weights(out)[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "bfloat16"),
        ("--checkpoint-activations",),
        ("--mask", "tube", "--image-views", 2, "--video-views", 2),
    ],
)
def test_options_run(pretrain, options):
    assert all(0.5 < loss < 2 for loss in log(pretrain(*options)))


def test_the_benchmark_times_model_loader_and_both(pretrain, tmp_path, capsys):
    pretrain("--json", "--batch-size", 8, "--micro-batch", 100)
    assert not (tmp_path / "run").exists()  # nothing is trained
    *table, line = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert (report["batch_size"], report["micro_batch"]) == (8, 8)
    for kind in train.KINDS:
        figures = report[kind]
        assert figures["flops_per_view"] == engine.count_flops(omnimae.MODELS["demo"], kind)
        assert 0 < figures["memory_gb"] < 100
        for part in ("model", "loader", "both"):
            took = figures[part]
            assert took["views_per_second"] == pytest.approx(8000 / took["ms"])
            assert any(row.startswith(f"{kind:8}{part:8}{took['ms']:12,.1f}") for row in table)
        for part in ("model", "both"):
            work = figures[part]["views_per_second"] * figures["flops_per_view"]
            assert figures[part]["of_matmul"] == pytest.approx(
                work / figures["matmul_flops_per_second"]
            )
            assert 0 < figures[part]["of_matmul"] < 1
        loader, model = (figures[part]["views_per_second"] for part in ("loader", "model"))
        assert figures["cores"] == pytest.approx(model / loader)  # without workers: one core


def test_held_out_views_take_the_runs_masks_and_name_broken_files(demo, tmp_path, capsys):
    shutil.copytree(demo, tmp_path / "demo")
    broken = min((tmp_path / "demo" / "images" / "val").rglob("*.JPEG"))
    broken.write_text("no picture")
    sources = {kind: tmp_path / "demo" / kind for kind in train.KINDS}
    cfg = MODELS["demo"]
    run = engine.Run(train.parse_args(["--model", "demo"]))
    batches = train.held_out_batches(cfg, sources, "tube", run)
    _, visible, _ = batches["videos"]  # (B, V)
    slots = visible.unflatten(1, (cfg.grid[0], -1)) % math.prod(cfg.grid[1:])
    assert (slots == slots[:, :1]).all()  # the same places at all times
    assert f"{broken}: cannot be read" in capsys.readouterr().err


def test_init_starts_from_a_checkpoint(pretrain, tmp_path):
    first = pretrain()
    second = pretrain("--init", first / "last.pt", "--lr", 1e-9, out="second")
    for key, value in weights(first).items():
        torch.testing.assert_close(weights(second)[key], value, atol=1e-4, rtol=0)
    torch.save(released_state(released_shapes(replace(MODELS["demo"], decoder_qkv_bias=True), None)), tmp_path / "released.torch")  # fmt: skip
    model = omnimae.load_checkpoint(
        pretrain("--init", tmp_path / "released.torch", out="third") / "last.pt"
    )
    assert model.cfg.decoder_qkv_bias
    torch.save(released_state(released_shapes(MODELS["demo"], 10)), tmp_path / "finetuned.torch")
    with pytest.raises(
        ValueError, match=r"finetuned.torch is a finetuned checkpoint.*expected a pretraining"
    ):
        pretrain("--init", tmp_path / "finetuned.torch", out="fourth")


def test_an_unreadable_file_is_named_once_and_replaced(pretrain, demo, tmp_path, capsys):
    shutil.copytree(demo, tmp_path / "data")
    data = ("--images", tmp_path / "data/images", "--videos", tmp_path / "data/videos")
    (tmp_path / "data/images/train/ring/ring_4.JPEG").write_bytes(b"")
    (tmp_path / "data/videos/20bn-something-something-v2/7.webm").write_bytes(b"broken")
    out = pretrain("--epochs", 2, data=data)
    assert log(out, "unreadable")[-1] in (2, 3, 4)  # of the videos, an epoch reads a part
    errors = capsys.readouterr().err
    assert errors.count("ring_4.JPEG: cannot be read") == 1
    assert_same_bits(out, pretrain("--epochs", 2, "--workers", 2, out="again", data=data))

    for path in list((tmp_path / "data/images/train").rglob("*.JPEG"))[::3]:
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"files tried so far cannot be read, more than 10"
    ) as error:
        pretrain("--epochs", 20, out="bad", data=data[:2])
    unreadable, tried = map(int, re.findall(r"\d+", str(error.value))[:2])
    assert 100 <= tried and unreadable / tried == pytest.approx(1 / 3, abs=0.1)
    assert not (tmp_path / "bad" / "last.pt").exists()


def test_a_loss_that_is_not_finite_ends_the_run(pretrain, monkeypatch):
    good = pretrain(out="good")
    forward = OmniMAE.forward

    def broken(self, x, mask=None):
        loss, pred, mask = forward(self, x, mask)
        counting = x.device.type == "meta"  # the operations of a step
        bad = torch.is_grad_enabled() and not counting and next(calls) == 3
        return loss * (float("nan") if bad else 1), pred, mask

    calls = iter(range(100))
    monkeypatch.setattr(OmniMAE, "forward", broken)
    with pytest.raises(FloatingPointError, match="loss of step 4 is nan"):
        pretrain("--save-minutes", 0, out="broken")
    saved = omnimae.read_checkpoint(good.parent / "broken" / "last.pt")
    assert saved["step"] == 3
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        (MODELS["vit_b"], "vit_b"),
        (replace(MODELS["vit_l"], decoder_qkv_bias=True, video_mask_ratio=0.9), "vit_l"),
        (replace(MODELS["vit_b"], decoder_depth=2), "other"),
    ],
)
def test_the_name_of_a_size(cfg, name):
    assert engine.size_name(cfg) == name


def test_another_runs_folder_is_refused(pretrain, monkeypatch):
    out = pretrain()
    with pytest.raises(
        ValueError, match=r"of a run with seed 0, this one has 1: choose another --out"
    ):
        pretrain("--seed", 1)
    with monkeypatch.context() as patch:  # as someone does who edits MODELS
        patch.setitem(MODELS, "demo", replace(MODELS["demo"], heads=8))
        with pytest.raises(ValueError, match=r"of a run with heads 4, this one has 8: choose"):
            pretrain()
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="last.pt: not a checkpoint: truncated"):
        pretrain()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--images", "gone"), "gone does not exist: expected a folder of images"),
        (("--images", "file"), "file is a file: expected a folder of images"),
        (("--videos", "."), ".wmv; it holds the folders demo_data"),
        (("--init", "vit_b_preterm"), "vit_b_preterm: no such file"),
        (("--batch-size", "63"), "does not divide"),
        (("--device", "cuda"), "has no GPU: PyTorch sees 0"),
        (("--model", "vit-B"), "'vit-B': none of vit_b, vit_l, vit_h, demo: did you mean vit_b?"),
        (("--model", "resnet"), "'resnet': none of vit_b, vit_l, vit_h, demo\n"),
        (("--image-mask-ratio", "1.5"), "'1.5': expected a number, 0 or more, less than 1"),
        (("--image-mask-ratio", "many"), "'many': expected a number, 0 or more, less than 1"),
        (
            ("--image-mask-ratio", "0.001"),
            "ratio of 0.001 masks 0 of 36 patches: expected one at least",
        ),
        (("--video-mask-ratio", "0"), "ratio of 0.0 masks 0 of 144 patches: expected one at least"),
        (("--lr", "nan"), "--lr: 'nan': expected a number, 0 or more, less than 1,000,000"),
        (
            ("--epochs", "1000000000000000"),
            "expected a whole number, 1 or more, less than 1,000,000",
        ),
        (("--save-minutes", "-1"), "--save-minutes: '-1': expected a number, 0 or more"),
        (("--videos", ""), "--videos: '', perhaps of an unset variable: expected a name or path"),
        (("--seed", "-1"), "--seed: '-1': expected a whole number, 0 or more"),
        (("--out", "file"), "--out file is a file: expected a folder"),
        (("--epochs", "0"), "--epochs: '0': expected a whole number, 1 or more"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_a_sentence(tmp_path, demo, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    Path("file").touch()
    Path("demo_data").symlink_to(demo)
    with pytest.raises((ValueError, SystemExit)) as error:
        train.main(train.parse_args(["--model", "demo", "--workers", "0", *options]))
    assert words in str(error.value) + capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_mistake_on_the_command_line_ends_without_a_traceback(tmp_path):
    command = [sys.executable, HERE / "train.py", "--images", "gone"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "train.py: gone does not exist: expected a folder of images\n"
    assert done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGPIPE])
def test_a_run_whose_reader_has_gone_is_saved(demo, tmp_path, number):
    process = start(*pretraining(demo, tmp_path / "run", "--save-minutes", 10, "--epochs", 20))
    assert any(line.startswith("step      1") for line in process.stdout)
    process.stdout.close()  # as tee's, which the same Ctrl-C ends, or head's
    if number == signal.SIGINT:
        process.send_signal(number)
    assert process.wait(60) == -number
    step = omnimae.read_checkpoint(tmp_path / "run" / "last.pt")["step"]
    assert 0 < step == steps_logged(tmp_path / "run") < 100  # of as many


def test_out_of_memory_is_a_sentence():
    with pytest.raises(SystemExit, match="out of memory: try a smaller --micro-batch"):
        engine.run_script(lambda _: torch.empty(2**55), lambda: None)
    with pytest.raises(RuntimeError, match="shapes cannot"):  # a mistake of ours stays a traceback
        engine.run_script(lambda _: torch.ones(2, 3) @ torch.ones(2, 3), lambda: None)


def test_what_the_system_refuses_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=": .*/gone/x cannot be read or written: No such file or"):
        engine.run_script(lambda _: (tmp_path / "gone" / "x").mkdir(), lambda: None)


class Killed(torch.utils.data.Dataset):
    """A loader's worker that the system ends, as when memory is full."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_worker_is_a_sentence():
    with pytest.raises(SystemExit, match="a loader's process was ended.*try fewer --workers"):
        loader = engine.make_loader(Killed(), [[0]], 1, torch.device("cpu"), None)
        engine.run_script(lambda _: next(engine.start_workers(loader)), lambda: None)


def test_two_first_runs_at_once_share_the_demo_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write = omnimae.write_demo_data

    def another_was_first(root):
        for _ in range(2):
            write(root, 8, 8, 8, 8)

    monkeypatch.setattr(omnimae, "write_demo_data", another_was_first)
    args = train.parse_args(["--model", "demo", "--device", "cpu"])
    assert engine.demo_data("images", engine.Run(args)) == "demo_data/images"
    assert len(list(tmp_path.rglob("*.JPEG"))) == 16 and not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------------------
# Finetuning


@pytest.fixture
def finetuning(demo, tmp_path, signals):
    """Run finetune.py in this process: from scratch, 6 steps of images in two epochs."""

    def run(*options, start=("scratch", "--model", "demo"), out="run", data=None):
        arguments = [
            "--checkpoint", *start, *(data or ("--images", demo / "images")), "--batch-size", 16,
            "--epochs", 2, "--workers", 0, "--log-every", 1, "--device", "cpu", "--out", tmp_path / out,
            *options,
        ]  # fmt: skip
        finetune.main(finetune.parse_args([str(argument) for argument in arguments]))
        return tmp_path / out

    return run


def test_layer_decay_and_weight_decay_by_hand():
    with torch.device("meta"):
        model = Classifier(MODELS["vit_b"], 1000)
    groups = finetune.parameter_groups(model, layer_decay=0.65, weight_decay=1e-4)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale, decay = {}, {}
    for group in groups:
        for parameter in group["params"]:
            scale[names[parameter]] = group["scale"]
            decay[names[parameter]] = group["weight_decay"]
    assert len(scale) == len(names)
    for name, power in (
        ("head.weight", 1), ("head.bias", 1), ("norm.weight", 1), ("encoder.blocks.11.mlp.fc2.bias", 2),
        ("encoder.blocks.0.attn.qkv.weight", 13), ("encoder.patch_embed.weight", 14),
    ):  # fmt: skip
        assert scale[name] == pytest.approx(0.65**power)
    assert decay["head.weight"] == decay["encoder.blocks.3.attn.qkv.weight"] == 1e-4
    assert decay["head.bias"] == decay["encoder.blocks.3.norm1.weight"] == 0
    assert {name for name in decay if decay[name]} == {
        name for name, parameter in model.named_parameters() if parameter.ndim == 2
    }


@pytest.mark.parametrize(
    ("options", "rates"),
    [  # before layer decay, at the start, after half of the warm-up, at the peak, at the end
        (("--images", "x"), (1e-6, (1e-6 + 4e-3) / 2, 4e-3, 1e-6)),
        (("--videos", "x"), (1e-6, (1e-6 + 1e-3) / 2, 1e-3, 1e-6)),
    ],
)
def test_the_schedules_by_hand(options, rates):
    args = finetune.parse_args(["--checkpoint", "vit_b_pretrain", *options])
    args.model = "vit_b"
    finetune.fill_in(args, "images" if args.images else "videos")
    steps = (0, 1000 * args.warmup / 2, 1000 * args.warmup, 1000)
    got = [train.learning_rate(step, 1000, args.lr, end=1e-6, warmup=args.warmup) for step in steps]
    assert got == pytest.approx(rates, rel=1e-6)
    assert args.warmup == (0.05 if args.images else 0.125)
    assert args.layer_decay == (0.65 if args.images else 0.75)


def test_each_layers_rate_at_three_steps_by_hand(finetuning):
    rates = []

    def note(optimizer, *_):
        rates.append(sorted({group["lr"] for group in optimizer.param_groups}, reverse=True))

    hook = register_optimizer_step_pre_hook(note)
    try:
        finetuning("--lr", 1e-3, "--layer-decay", 0.5)
    finally:
        hook.remove()
    assert len(rates) == 6  # warm-up over the first tenth; 80 and 146.7 degrees of the cosine after
    for step, rate in ((0, 1e-6), (3, 5.872373e-4), (5, 8.317384e-5)):
        assert len(rates[step]) == 6  # head and norm, four blocks, the patch embedding
        assert rates[step][0] == pytest.approx(rate / 2, rel=1e-6)
        assert rates[step][1] == pytest.approx(rate / 4, rel=1e-6)
        assert rates[step][-1] == pytest.approx(rate / 64, rel=1e-6)


def test_recipes_go_with_the_size_and_the_batch():
    def recipe(model, *options):
        args = finetune.parse_args(["--checkpoint", "x", *options])
        args.model = model
        finetune.fill_in(args, "images" if args.images else "videos")
        return args

    assert recipe("vit_b", "--images", "x", "--batch-size", "256").lr == pytest.approx(1e-3)
    large = recipe("vit_l", "--videos", "x")
    assert (large.epochs, large.layer_decay, large.drop_path, large.lr) == (50, 0.75, 0.2, 1e-3)
    assert recipe("vit_h", "--images", "x", "--drop-path", "0.4").drop_path == 0.4
    assert recipe("vit_b", "--images", "demo").batch_size == 64
    assert recipe("vit_b", "--images", "x", "--freeze").drop_path == 0


def test_rand_augment_is_one_draw_for_all_frames():
    frame = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        clip = finetune.rand_augment(frame.expand(4, -1, -1, -1), 4, 7.0)
        assert clip.shape == (4, 3, 32, 32) and clip.dtype == torch.uint8
        assert all(torch.equal(other, clip[0]) for other in clip)
        torch.manual_seed(seed)
        assert torch.equal(finetune.rand_augment(frame, 4, 7.0), clip[0])
        changed += not torch.equal(clip[0], frame)
    assert changed > 10


def test_rand_augment_applies_every_second_operation_at_about_its_magnitude(monkeypatch):
    bins = []

    class Counted(finetune.v2.RandAugment):
        def __init__(self, num_ops, magnitude, num_magnitude_bins, interpolation):
            super().__init__(num_ops, magnitude, num_magnitude_bins, interpolation)
            bins.append(magnitude)

    monkeypatch.setattr(finetune.v2, "RandAugment", Counted)
    torch.manual_seed(0)
    for _ in range(500):
        finetune.rand_augment(torch.zeros(3, 8, 8, dtype=torch.uint8), 2, 9.0)
    assert len(bins) == pytest.approx(500, rel=0.1)  # of 1000 drawn
    assert np.mean(bins) == pytest.approx(90, abs=1)  # of 100: magnitude 9 of 10
    assert np.std(bins) == pytest.approx(5, rel=0.1)


def test_erasing_blackens_images_and_fills_clips_with_noise():
    torch.manual_seed(0)
    boxes = torch.tensor([[4, 8, 20, 16], [0, 0, 0, 0]])
    image = finetune.erase(torch.ones(2, 3, 32, 32), boxes)
    black = -omnimae.MEAN / omnimae.STD
    torch.testing.assert_close(
        image[0, :, 4:24, 8:24], black[:, None, None].expand(-1, 20, 16), atol=1e-6, rtol=0
    )
    assert (image[0] == 1).sum() == 3 * (32 * 32 - 20 * 16) and (image[1] == 1).all()
    clip = finetune.erase(torch.ones(2, 3, 4, 32, 32), boxes)
    noise = clip[0, :, :, 4:24, 8:24]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(noise[:, 0], noise[:, 1])  # a value of its own for each pixel and frame
    assert (clip[0] == 1).sum() == 3 * 4 * (32 * 32 - 20 * 16) and (clip[1] == 1).all()


@pytest.mark.parametrize("kind", train.KINDS)
def test_augmented_samples_follow_from_seed_epoch_and_sample(demo, kind):
    listing = evaluation.list_labelled(demo / kind, kind, "train")
    files = finetune.Labelled(MODELS["demo"], kind, listing, 0, "full")
    samples = [(kind, 0, i, 0, 1) for i in range(16)]
    one = finetune.collate([files[sample] for sample in samples])
    torch.manual_seed(5)
    other = finetune.collate([files[sample] for sample in reversed(samples)])
    shape = (3, 48, 48) if kind == "images" else (3, 8, 48, 48)
    assert one[0].shape == (16, *shape) and one[0].dtype == torch.uint8
    for a, b in zip(one[:3], other[:3]):
        assert torch.equal(a, b.flip(0))
    assert one[1].tolist() == listing.labels[:16]
    assert 0 < (one[2].sum(1) > 0).sum() < 16  # some are erased
    assert not torch.equal(finetune.collate([files[kind, 1, 0, 0, 1]])[0][0], one[0][0])


def test_a_replaced_file_has_its_own_label(demo, tmp_path):
    shutil.copytree(demo / "images", tmp_path / "data")
    listing = evaluation.list_labelled(tmp_path / "data", "images", "train")
    for path in listing.paths[:40]:
        Path(path).write_bytes(b"")
    files = finetune.Labelled(MODELS["demo"], "images", listing, 0, "crop")
    labels = [files["images", 0, i, 0, 1][1] for i in range(8)]
    assert set(labels) <= set(listing.labels[40:]) and labels != listing.labels[:8]


@pytest.mark.parametrize("kind", ["images", pytest.param("videos", marks=slow)])
def test_a_finetuned_run_stopped_or_killed_goes_on_to_the_same_bits(
    finetuning,
    demo,
    monkeypatch,
    kind,
):
    data = (f"--{kind}", demo / kind)
    options = ("--augment", "full", "--drop-path", 0.3, "--micro-batch", 8)  # all that is random
    whole = finetuning(*options, data=data, out="whole")
    agree = engine.Run.agree

    def stopped(run, *args):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return agree(run, *args)

    def killed(run, *args):
        if run.step == (5 if kind == "images" else 3):
            raise ZeroDivisionError
        return agree(run, *args)

    monkeypatch.setattr(engine.Run, "agree", stopped)
    part = finetuning(*options, data=data, out="part")
    assert omnimae.read_checkpoint(part / "last.pt")["step"] == 1
    monkeypatch.setattr(engine.Run, "agree", killed)
    with pytest.raises(ZeroDivisionError):
        finetuning(*options, data=data, out="part")
    assert not (part / "last.pt.tmp").exists()
    monkeypatch.undo()
    finetuning(*options, "--workers", 2, data=data, out="part")
    assert_same_bits(whole, part)
    for field in ("top1", "top5"):
        assert log(whole, field) == log(part, field) and len(log(part, field)) == 2
    files = {path.name for path in part.iterdir()}
    assert files == {"last.pt", "best.pt", "log.jsonl", "args.json"}


def test_workers_of_finetuning_start_once(finetuning, monkeypatch):
    agree, workers = engine.Run.agree, []

    def watched(run, *args):
        workers.append({worker.pid for worker in multiprocessing.active_children()})
        return agree(run, *args)

    monkeypatch.setattr(engine.Run, "agree", watched)
    finetuning("--workers", 1, out="run")
    assert len(workers) == 6 and len(workers[0]) == 2  # of training and of validation
    assert all(later == workers[0] for later in workers)


def test_a_run_saves_classes_and_the_best_epoch(finetuning):
    out = finetuning("--lr", 1e-3)
    model = omnimae.load_checkpoint(out / "best.pt")
    assert isinstance(model, Classifier) and model.classes == list(omnimae.SHAPES)
    best = omnimae.read_checkpoint(out / "best.pt")
    assert best["best"] == max(log(out, "top1"))


def test_finetuning_starts_from_the_encoder(pretrain, finetuning, demo):
    first = pretrain(out="first")
    still = ("--lr", 0.0, "--epochs", 1)  # a rate so small that weights stay
    second = finetuning(*still, start=(first / "last.pt",), out="second")
    for key, value in weights(second).items():
        if key.startswith("encoder."):
            torch.testing.assert_close(value, weights(first)[key], atol=1e-4, rtol=0)
    assert abs(weights(second)["norm.weight"] - 1).max() < 1e-4  # not the pretraining model's
    assert weights(second)["head.weight"].abs().max() < 1e-3
    tuned = finetuning("--freeze", "--lr", 0.1, start=(first / "last.pt",), out="tuned")
    for key, value in weights(tuned).items():
        same = torch.equal(value, weights(first).get(key, value + 1))
        assert same == key.startswith("encoder."), key
    videos = ("--videos", demo / "videos")
    third = finetuning(*still, start=(tuned / "best.pt",), data=videos, out="third")
    tuned_best = omnimae.read_checkpoint(tuned / "best.pt")["model"]
    torch.testing.assert_close(
        weights(third)["norm.weight"], tuned_best["norm.weight"], atol=1e-4, rtol=0
    )
    assert weights(third)["head.weight"].std() == pytest.approx(0.01, rel=0.2)
    assert omnimae.load_checkpoint(third / "last.pt").classes[0] == "Growing something"


@pytest.mark.parametrize(
    "options", [("--checkpoint-activations",), ("--dtype", "bfloat16"), ("--micro-batch", 4)]
)
def test_options_of_finetuning_run(finetuning, options):
    assert log(finetuning(*options, "--epochs", 1))[0] == pytest.approx(math.log(8), abs=0.05)


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_of_one_sample_say_that_nothing_is_mixed(finetuning, capsys, micro):
    finetuning("--augment", "full", "--micro-batch", micro, "--epochs", 1)
    assert ("MixUp and CutMix do nothing" in capsys.readouterr().out) == (micro == 1)


# ------------------------------------------------------------------------------------------------
# Evaluation


def run_eval(*options) -> None:
    options = ["--device", "cpu", "--workers", 0, *options]
    evaluation.main(evaluation.parse_args([str(option) for option in options]))


def plain_image(path: Path) -> torch.Tensor:
    """The protocol of images in PIL and torch alone: (3, 224, 224)."""
    image = PIL.Image.open(path).convert("RGB")
    width, height = image.size
    if width < height:
        image = image.resize((224, int(224 * height / width)), PIL.Image.BICUBIC)
    else:
        image = image.resize((int(224 * width / height), 224), PIL.Image.BICUBIC)
    width, height = image.size
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    image = image.crop((left, top, left + 224, top + 224))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture(scope="module")
def released_vit_b(tmp_path_factory) -> Path:
    """torch.hub's folder, with released-layout ViT-B files of reproducible weights."""
    hub = tmp_path_factory.mktemp("hub")
    (hub / "checkpoints").mkdir()
    for name, num_classes in (("vit_b_in1k", 1000), ("vit_b_ssv2", 174)):
        path = hub / "checkpoints" / omnimae.CHECKPOINTS[name].rsplit("/", 1)[-1]
        torch.save(released_state(released_shapes(MODELS["vit_b"], num_classes)), path)
    return hub


@pytest.fixture
def hub(released_vit_b, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(released_vit_b))


def test_a_released_in1k_checkpoint_is_evaluated_exactly(hub, tmp_path, capsys):
    rng, paths = np.random.default_rng(0), []
    for i in range(1000):  # as many folders as classes; but for four, of an unreadable file each
        folder = tmp_path / "in1k" / "val" / f"n{i:08d}"
        folder.mkdir(parents=True)
        (folder / "image.JPEG").touch()
    for i, (height, width) in enumerate(((301, 225), (224, 500), (97, 133), (640, 223))):
        paths.append(tmp_path / "in1k" / "val" / f"n{i:08d}" / "image.JPEG")
        coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
        PIL.Image.fromarray(coarse).resize((width, height)).save(paths[-1])
    x = torch.stack([plain_image(path) for path in paths])
    for path, plain in zip(paths, x):  # bit for bit before the model
        pixels = evaluation.read_pixels(str(path), "images", MODELS["vit_b"], 1)
        assert torch.equal(evaluation.crop_views(pixels, 224, 1)[0], plain)
    logits = omnimae.load_checkpoint("vit_b_in1k")(x)
    run_eval(
        "--checkpoint", "vit_b_in1k", "--images", tmp_path / "in1k", "--dtype", "float32",
        "--predictions", tmp_path / "p.csv",
    )  # fmt: skip
    top5 = logits.topk(5).indices.tolist()
    right1 = sum(row[0] == i for i, row in enumerate(top5)) / 10
    right5 = sum(i in row for i, row in enumerate(top5)) / 10
    shown = capsys.readouterr().out
    assert f"top-1 {right1:.2f} % (published: 83.0 %)" in shown
    assert f"top-5 {right5:.2f} %, 996 unreadable counted as wrong" in shown
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1000 and rows[10]["best_1"] == "unreadable"
    for i, row in enumerate(rows[:4]):
        assert (row["path"], row["label"]) == (str(paths[i]), f"n{i:08d}")
        assert [row[f"best_{k}"] for k in range(1, 6)] == [f"n{c:08d}" for c in top5[i]]
        expected = logits[i].softmax(0).topk(5).values.tolist()
        assert [float(row[f"probability_{k}"]) for k in range(1, 6)] == pytest.approx(
            expected, rel=1e-4
        )

    run_eval("--checkpoint", "vit_b_in1k", paths[0], "--dtype", "float32")
    names = evaluation.ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    assert names[top5[0][0]] in capsys.readouterr().out.splitlines()[1]


@slow
def test_a_released_ssv2_checkpoint_evaluates_and_predicts(hub, tmp_path, capsys):
    names = [f"Doing {i}" for i in range(174)]
    root = tmp_path / "ssv2"
    (root / "20bn-something-something-v2").mkdir(parents=True)
    (root / "labels").mkdir()
    samples = [{"id": "7", "template": "Doing [3]"}, {"id": "8", "template": "Doing [5]"}]
    (root / "labels/labels.json").write_text(
        json.dumps({name: str(i) for i, name in enumerate(names)})
    )
    (root / "labels/validation.json").write_text(json.dumps(samples))
    path = write_numbered(root / "20bn-something-something-v2" / "7.webm")
    options = ("--checkpoint", "vit_b_ssv2", "--dtype", "float32", "--views", "1x1")
    run_eval(*options, "--videos", root)
    shown = capsys.readouterr()
    assert "2 videos, 1 view of each" in shown.out and "(published: 69.5 %)" in shown.out
    assert "1 unreadable counted as wrong" in shown.out and "8.webm: cannot be read" in shown.err
    run_eval(*options, "--labels", root / "labels/labels.json", path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path) and len(lines) == 6 and "Doing " in lines[1]
    run_eval(*options, path)
    assert "class " in capsys.readouterr().out


def plain_views(path: Path, size: int, num_frames: int) -> list[torch.Tensor]:
    """The 15 views of a clip, written down plainly: (3, T, S, S) each."""
    with av.open(str(path)) as container:
        frames = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    duration, views = frames[-1][0], []
    for i in range(5):
        start = i * max(duration - 2.7, 0) / 5
        inside = [pixels for time, pixels in frames if start <= time < start + 2.7]
        kept = [inside[int(at)] for at in np.linspace(0, len(inside) - 1, num_frames)]
        x = torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2) / 255
        height, width = x.shape[2:]
        if width < height:
            shape = (math.floor(height * size / width), size)
        else:
            shape = (size, math.floor(width * size / height))
        x = F.interpolate(x, shape, mode="bilinear", align_corners=False, antialias=False)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        long = max(shape)
        for at in (0, math.ceil((long - size) / 2), long - size):
            crop = x[..., at : at + size] if width >= height else x[..., at : at + size, :]
            views.append(crop.transpose(0, 1))
    return views


@pytest.mark.parametrize(("width", "height"), [(90, 52), (50, 70), (64, 64)])
def test_the_views_of_a_clip_are_the_protocols(tmp_path, width, height):
    noise = np.random.default_rng(0).integers(0, 256, (44, height, width, 3), dtype=np.uint8)
    omnimae.write_clip(tmp_path / "clip.webm", noise)
    clips = evaluation.read_pixels(str(tmp_path / "clip.webm"), "videos", MODELS["demo"], 5)
    views = evaluation.crop_views(clips, 64, 3)
    plain = torch.stack(plain_views(tmp_path / "clip.webm", 64, 8))
    assert views.shape == (15, 3, 8, 64, 64)
    assert torch.equal(views, plain)
    assert torch.equal(evaluation.crop_views(clips, 64, 1), plain[1::3])  # the centre


def test_logits_are_averaged_over_views(released, tmp_path, capsys):
    torch.save(released(6), tmp_path / "tiny.torch")
    model = omnimae.load_checkpoint(tmp_path / "tiny.torch")
    path = write_numbered(tmp_path / "clip.webm")
    run_eval("--checkpoint", tmp_path / "tiny.torch", path, "--dtype", "float32")
    probability = model(torch.stack(plain_views(path, 32, 4))).mean(0).softmax(0)
    shown = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in shown] == [f"{p:.2%}" for p in probability.topk(5).values]


def test_each_file_counts_once_on_any_number_of_processes(demo, tmp_path, capfd):
    torch.save(released_state(released_shapes(MODELS["demo"], 8)), tmp_path / "eight.torch")
    shutil.copytree(demo / "images", tmp_path / "data")
    files = sorted((tmp_path / "data/val").rglob("*.JPEG"))
    for path in files[1:6:2]:
        path.unlink()  # leaves 13
    files[0].write_bytes(b"broken")
    files[2].rename(os.fsdecode(os.fsencode(files[2].parent) + b"/\xff.JPEG"))  # not UTF-8
    shown = []
    for processes in (1, 2, 3):
        table = tmp_path / f"{processes}.csv"
        options = (
            "--checkpoint", tmp_path / "eight.torch", "--images", tmp_path / "data", "--device", "cpu",
            "--workers", 0, "--micro-batch", 3, "--predictions", table,
        )  # fmt: skip
        if processes == 1:
            run_eval(*options)
            output, errors = capfd.readouterr()
        else:
            done = torchrun(processes, "eval.py", *options, cwd=tmp_path)
            output, errors = done.stdout, done.stderr
            assert done.returncode == 0, errors
        assert errors.count("cannot be read") == 1
        shown.append(output)
        text = table.read_text(errors="surrogateescape")
        rows = list(csv.DictReader(text.splitlines()))
        assert len({row["path"] for row in rows}) == len(rows) == 13
        assert all(Path(row["path"]).exists() for row in rows)
        right = sum(row["label"] == row["best_1"] for row in rows)
        assert f"13 images, 1 view of each\ntop-1 {100 * right / 13:.2f} %" in output
    assert shown[0] == shown[1] == shown[2] and "1 unreadable counted as wrong" in shown[0]


def test_pictures_and_films_of_reconstructions(released, demo, tmp_path, capsys):
    torch.save(released(), tmp_path / "tiny.torch")
    clip = demo / "videos" / "20bn-something-something-v2" / "1.webm"
    image = next((demo / "images" / "val").rglob("*.JPEG"))
    options = ("--checkpoint", tmp_path / "tiny.torch", image, clip)
    run_eval(*options, "--out", tmp_path / "one")
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    assert {path.name for path in one.iterdir()} == {
        f"{image.name}.png",
        "1.webm.png",
        "1.webm.mp4",
    }
    assert PIL.Image.open(one / f"{image.name}.png").size == (3 * 34 + 2, 34 + 2)
    assert PIL.Image.open(one / "1.webm.png").size == (4 * 34 + 2, 3 * 34 + 2)
    film = omnimae.read_clip(one / "1.webm.mp4", 0, 10, 4)
    picture = np.array(PIL.Image.open(one / "1.webm.png"))
    assert film.shape == (4, 3, 3 * 34 + 2, 36)
    assert np.abs(film[2].permute(1, 2, 0).numpy() - picture[:, 68:104].astype(float)).mean() < 12
    run_eval(*options, "--out", two)
    run_eval(*options, "--out", three, "--seed", 1, "--mask-ratio", 0.5)
    for name in (f"{image.name}.png", "1.webm.png"):
        pictures = [np.array(PIL.Image.open(folder / name)) for folder in (one, two, three)]
        assert np.array_equal(pictures[0], pictures[1])
        assert not np.array_equal(pictures[0], pictures[2])
    assert str(one / "1.webm.mp4") in capsys.readouterr().out

    # files of the same name, and one of the name that tells them apart
    (tmp_path / "other").mkdir()
    same, clash = tmp_path / "other" / image.name, tmp_path / "other" / f"1_{image.name}"
    shutil.copy(image, same)
    shutil.copy(image, clash)
    run_eval(*options[:2], image, same, clash, "--out", tmp_path / "four")
    assert len(list((tmp_path / "four").iterdir())) == 3


def test_a_folder_of_class_folders_lends_every_tenth_file(demo, finetuning, tmp_path, capsys):
    clips = sorted((demo / "videos" / "20bn-something-something-v2").iterdir())
    for i, clip in enumerate(clips[:24]):
        (tmp_path / "mine" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / "mine" / "ab"[i % 2])
    parts = [
        evaluation.list_labelled(tmp_path / "mine", "videos", split) for split in ("train", "val")
    ]
    assert [len(part.paths) for part in parts] == [20, 4]
    assert not set(parts[0].paths) & set(parts[1].paths)
    assert parts[1].labels == [0, 0, 1, 1] and parts[1].classes == ["a", "b"]
    assert all(Path(path).parent.name == "ab"[label] for path, label in zip(*parts[1][:2]))
    out = finetuning("--epochs", 1, data=("--videos", tmp_path / "mine"))
    assert "every tenth file is kept for it, 4 in all" in capsys.readouterr().out
    (tmp_path / "mine" / "b").rename(tmp_path / "mine" / "c")
    with pytest.raises(ValueError, match="run is of a run on other classes: choose another --out"):
        finetuning("--epochs", 1, data=("--videos", tmp_path / "mine"))
    (tmp_path / "mine" / "c").rename(tmp_path / "mine" / "b")
    assert omnimae.load_checkpoint(out / "best.pt").classes == ["a", "b"]
    run_eval("--checkpoint", out / "best.pt", "--videos", tmp_path / "mine")
    assert "4 videos, 15 views of each; every tenth file, as it has no" in capsys.readouterr().out


def test_one_model_takes_images_and_videos(finetuning, demo, capsys):
    out = finetuning("--epochs", 1)
    clip = demo / "videos" / "20bn-something-something-v2" / "1.webm"
    run_eval("--checkpoint", out / "best.pt", clip, next((demo / "images" / "val").rglob("*.JPEG")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-12] == str(clip) and all("%" in line for line in lines[-11:-6])


def test_a_users_mistake_in_finetuning_or_evaluation_is_one_sentence(
    pretrain,
    finetuning,
    released,
    demo,
    tmp_path,
    capsys,
):
    pretrained, tuned = pretrain(out="pre") / "last.pt", finetuning("--epochs", 1) / "best.pt"
    image = next((demo / "images" / "val").rglob("*.JPEG"))
    images, videos = demo / "images", demo / "videos"
    torch.save(released(10), tmp_path / "ten.torch")
    (tmp_path / "empty").mkdir()
    labels = videos / "labels" / "labels.json"
    for part in ("train", "val"):
        (tmp_path / "one" / part / "a").mkdir(parents=True)
        shutil.copy(image, tmp_path / "one" / part / "a")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "1.jpg").write_text("no picture")
    for part, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            shutil.copy(image, tmp_path / "mine" / part / name)
    for options, words in (
        (("--checkpoint", pretrained, "--images", images), "is a pretraining checkpoint.*expected a finetuned one, such as vit_b_in1k"),
        (("--checkpoint", tuned, "--mask-ratio", 0.5, image), "finetuned checkpoint, which makes no reconstructions.*or no --mask-ratio"),
        (("--checkpoint", pretrained, "--views", "5x3", image), "pretraining checkpoint, which makes no labels.*or no --views"),
        (("--checkpoint", tuned, "--videos", videos), r"lacks \['circle', .*expected the same classes .in evaluation: or a"),
        (("--checkpoint", tmp_path / "ten.torch", "--images", images), "ten.torch has 10 classes, .*images has 8: expected a checkpoint"),
        (("--checkpoint", tmp_path / "ten.torch", "--labels", labels, image), "labels.json has 8 classes, the checkpoint has 10"),
        (("--checkpoint", tuned, "--labels", image, image), "expected JSON like SSv2's"),
        (("--checkpoint", tuned, "--images", tmp_path / "empty"), "empty: no images found"),
        (("--checkpoint", tuned, "--images", image.parent), "have no labels: expected <class>/<file>"),
        (("--checkpoint", tuned, tmp_path / "gone.mp4"), "gone.mp4: cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            run_eval(*options)
        assert "\n" not in str(error.value)
    for data, words in (
        (
            ("--images", tmp_path / "mine"),
            r"its val part lacks \['b'\] of the 2 classes trained on, and has \['c'\] besides",
        ),
        (("--videos", tmp_path / "empty"), "empty: no videos found"),
        (("--images", tmp_path / "mine" / "train"), "'a' has one file in all"),
        (("--images", tmp_path / "one"), "one has images of one class, 'a': expected at least two"),
    ):
        with pytest.raises(ValueError, match=words):
            finetuning(data=data, out="bad")
    assert not (tmp_path / "bad").exists()
    for module, options, words in (
        (evaluation, ("--checkpoint", tuned), "expected one of these: --images DIR, --videos DIR, files"),
        (evaluation, ("--checkpoint", tuned, image, "--views", "5x2"), "'5x2': expected CLIPSxCROPS, 1 to 99 clips, 1 or 3 crops, as 5x3"),
        (evaluation, ("--checkpoint", tuned, "--images", images, "--views", "5x3"), "--views is for videos"),
        (evaluation, ("--checkpoint", pretrained, image, "--out", image), "is a file: expected a folder"),
        (evaluation, ("--checkpoint", tuned, tmp_path), "is a folder: expected files, or --images or"),
        (evaluation, ("--checkpoint", tuned, image, "--predictions", "a.csv"), "--predictions is for a data set"),
        (evaluation, ("--checkpoint", tuned, "--images", images, "--predictions", "no/a.csv"), "no/a.csv cannot be written: no such folder"),
        (evaluation, ("--checkpoint", tuned, "--images", images, "--predictions", tmp_path), "is a folder: expected a file"),
        (evaluation, ("--checkpoint", tuned, "--images", images, "--labels", labels), "--labels is for files: a data set has labels"),
        (finetune, ("--checkpoint", "scratch", "--model", "vit_bb", "--images", images), "did you mean vit_b?"),
        (finetune, ("--checkpoint", "scratch", "--images", images), "expected --model with"),
        (finetune, ("--checkpoint", tuned), "expected one of --images DIR and --videos DIR"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            module.parse_args([str(option) for option in options])
        assert words in capsys.readouterr().err
    command = [sys.executable, HERE / "finetune.py", "--checkpoint", "vit_b_x", "--images", "gone"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("finetune.py: vit_b_x: no such file, and not a released")
    command = [sys.executable, HERE / "finetune.py", "--checkpoint", "scratch", "--model", "demo"]
    command += ["--images", "broken", "--workers", "1"]  # what a worker says comes as a traceback
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "finetune.py: 20 images in a row cannot be read, the last: broken"
    )


@pytest.mark.parametrize("script", [train, finetune, evaluation])
def test_help_fits_a_terminal_and_begins_with_what_matters(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    first = shown.split("model and data", 1)[1].split("\n\n")[0]
    assert "--images DIR" in first and "--videos DIR" in first
    assert "--model" in first or "--checkpoint NAME" in first


# ------------------------------------------------------------------------------------------------
# The README

README = (HERE / "README.md").read_text()
SCRIPTS = {"train": train, "finetune": finetune, "eval": evaluation}


@functools.cache
def places(file: str) -> dict[str, str]:
    """Where the functions, classes, methods and constants of a file are: name -> file.py#L1-L9."""
    found = {}

    def add(nodes, within=""):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = within + node.name
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{name}.")
            elif isinstance(node, ast.Assign):
                name = within + ast.unparse(node.targets[0])
            else:
                continue
            found[name] = f"{file}#L{node.lineno}-L{node.end_lineno}"

    add(ast.parse((HERE / file).read_text()).body)
    return found


def test_the_readme_says_where_each_part_of_the_paper_is_in_the_code():
    table = README.split("## The paper in the code")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    wrong = []
    for row in rows:
        links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L\d+-L\d+\)", row)
        right = row
        for name, file in links:
            assert name in places(file), f"README.md: {file} has no {name}, in: {row}"
            right = re.sub(rf"\[`{name}`\]\([^)]*\)", f"[`{name}`]({places(file)[name]})", right)
        if right != row or not links:
            wrong.append(right)
    assert len(rows) > 15 and not wrong, "README.md: these rows should be:\n" + "\n".join(wrong)


def commands() -> list[tuple[str, list[str]]]:
    """The README's commands of this project's scripts: the script and its arguments."""
    text = README.replace("\\\n", " ")
    for name, value in (("seed", "0"), ("kind", "images"), ("start", "both")):  # of loops
        text = re.sub(rf"\$\{{?{name}\b\}}?", value, text)
    found = re.findall(r"\b(?:torchrun|python) (?:--\S+ +)*(\w+)\.py\b([^`#;&|\n]*)", text)
    return [(script, shlex.split(arguments)) for script, arguments in found]


def test_the_commands_of_the_readme_have_options_that_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(commands()) > 12 and {script for script, _ in commands()} == set(SCRIPTS)
    known = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts"}
    for script, arguments in commands():
        SCRIPTS[script].parse_args(arguments)
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known
    for name in re.findall(r"omnimae\.(\w+)", README):
        assert hasattr(omnimae, name) or name == "py", name


def test_commands_of_the_readme_that_take_seconds_run(demo, tmp_path, monkeypatch, capsys):
    clips = sorted((demo / "videos" / "20bn-something-something-v2").iterdir())
    names = {
        "demo/last": None,
        "vit_b_videos/best": 2,
        "demo_images/best": 8,
        "demo_videos/best": 8,
    }
    for name, num_classes in names.items():
        path = tmp_path / "runs" / f"{name}.pt"
        path.parent.mkdir(parents=True)
        torch.save(released_state(released_shapes(MODELS["demo"], num_classes)), path)
    for name, clip in zip(
        ("my_videos/a/1", "my_videos/a/2", "my_videos/b/1", "my_videos/b/2"), clips
    ):
        path = tmp_path / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, path)
    shutil.copytree(demo, tmp_path / "demo_data")
    for name in ("new_clip.mp4", "demo_data/videos/20bn-something-something-v2/1601.webm"):
        shutil.copy(clips[0], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for script, arguments in commands():
        arguments = [path for word in arguments for path in sorted(glob.glob(word)) or [word]]
        if script == "eval" and arguments[1].startswith("runs/"):
            run_eval(*arguments)
            ran += 1
    said = capsys.readouterr().out
    assert ran == 7
    assert "reconstructions/1601.webm.mp4" in said and "2 videos, 15 views of each" in said
    assert "new_clip.mp4\n" in said


# ------------------------------------------------------------------------------------------------
# Faults: what happens to a run, and to the files that it reads


def start(script: str, *options, processes: int = 0, **more) -> subprocess.Popen:
    """A real process; `processes`: torchrun of so many. What it says goes to one pipe."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", processes]
        command += ["--standalone", *more.pop("torchrun", ())]
    command = [str(word) for word in [*command, HERE / script, *options]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **more
    )  # fmt: skip


def pretraining(demo: Path, out: Path, *options) -> tuple:
    data = ("--images", demo / "images", "--videos", demo / "videos")
    return (
        "train.py", "--model", "demo", *data, "--batch-size", 16, "--micro-batch", 8, "--epochs", 2,
        "--workers", 1, "--log-every", 1, "--device", "cpu", "--save-minutes", 0, "--out", out, *options,
    )  # fmt: skip


def finetuning_images(demo: Path, out: Path, *options) -> tuple:
    return (
        "finetune.py", "--checkpoint", "scratch", "--model", "demo", "--images", demo / "images",
        "--batch-size", 16, "--augment", "full", "--drop-path", 0.2, "--epochs", 3, "--workers", 1,
        "--log-every", 1, "--device", "cpu", "--save-minutes", 0, "--out", out, *options,
    )  # fmt: skip


def wait_until(process: subprocess.Popen, moment) -> bool:
    """Until moment() is true: True; until the process has ended: False."""
    while process.poll() is None:
        if moment():
            return True
        time.sleep(0.0005)
    return False


def steps_logged(out: Path) -> int:
    """The last step with a loss in the log, 0 for none."""
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    return max((json.loads(x)["step"] for x in text.splitlines() if x.endswith("}") and '"loss"' in x), default=0)  # fmt: skip


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            pass
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """The same bits, the same log but for times, and nothing left over."""
    assert_same_bits(one, other)
    times = ("views_per_second", "data_wait", "utilisation", "memory_gb")
    logs = []
    for run in (one, other):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k not in times} for line in lines])
    assert logs[0] == logs[1]
    files = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (one, other)]
    assert files[0] == files[1] and not any(name.endswith(".tmp") for name in files[0])


@slow
@pytest.mark.parametrize("command", [pretraining, finetuning_images])
def test_a_run_killed_ten_times_ends_with_the_same_bits(demo, tmp_path, command):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    process = start(*command(demo, whole))
    assert "are done" in process.communicate()[0]
    last = steps_logged(whole)
    rng = np.random.default_rng(0)
    temporary, began = out / "last.pt.tmp", (lambda: (out / "args.json").exists())

    def after(step):  # and a little
        return lambda: steps_logged(out) >= step and not time.sleep(rng.uniform(0, 0.3))

    def decoding():  # a worker has just started
        return bool(children(process.pid)) and not time.sleep(rng.uniform(0, 0.1))

    moments = [
        began, decoding, decoding, temporary.exists, after(1), temporary.exists, after(2), after(3),
        temporary.exists, after(last - 1), lambda: steps_logged(out) >= last,
    ]  # fmt: skip
    killed = half_written = 0
    for moment in moments:
        process = start(*command(demo, out))
        if wait_until(process, moment):
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        half_written += temporary.exists()
        process.stdout.close()
    assert killed >= 10 and half_written >= 1
    assert "are done" in start(*command(demo, out)).communicate()[0]
    assert_same_run(whole, out)


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_ends_within_seconds(demo, tmp_path, number):
    options = ("--save-minutes", 100, "--epochs", 4)
    assert "are done" in start(*pretraining(demo, tmp_path / "whole", *options)).communicate()[0]
    for processes, out in ((0, tmp_path / "one"), (2, tmp_path / "two")):
        command = pretraining(demo, out, *options)
        process = start(*command, processes=processes)
        assert wait_until(process, lambda out=out: steps_logged(out) >= 2)
        sent = time.monotonic()
        process.send_signal(number)
        said = process.communicate()[0]
        assert time.monotonic() - sent < 15
        assert "stopped and saved after step" in said, said
        assert process.returncode == (1 if processes else -number)
        assert omnimae.read_checkpoint(out / "last.pt")["step"] < 20
        assert "going on after step" in start(*command, processes=processes).communicate()[0]
    assert_same_run(tmp_path / "whole", tmp_path / "one")
    assert log(tmp_path / "two") == pytest.approx(log(tmp_path / "whole"), rel=1e-5)


@slow
def test_a_lost_process_is_named_or_replaced(demo, tmp_path):
    assert "are done" in start(*pretraining(demo, tmp_path / "whole"), processes=2).communicate()[0]
    for restarts in (0, 1):
        out = tmp_path / f"restarts{restarts}"
        command = pretraining(demo, out)
        process = start(*command, processes=2, torchrun=("--max-restarts", restarts))
        assert wait_until(process, lambda out=out: steps_logged(out) >= 3)
        ranks = [pid for pid in children(process.pid) if rank_of(pid) == "1"]
        os.kill(ranks[0], signal.SIGKILL)
        killed = time.monotonic()
        said = process.communicate(timeout=120)[0]
        if restarts:
            assert process.returncode == 0 and "going on after step" in said, said
            assert_same_run(tmp_path / "whole", out)
        else:
            assert process.returncode != 0 and time.monotonic() - killed < 60
            assert re.search(r"rank\s*: 1 ", said) and "Signal 9 (SIGKILL)" in said, said


def rank_of(pid: int) -> str:
    pairs = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    return dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair).get(b"RANK", b"").decode()


@slow
def test_another_number_of_processes_on_resume_changes_no_loss(demo, tmp_path):
    options = ("--epochs", 4)
    assert "are done" in start(*pretraining(demo, tmp_path / "one", *options)).communicate()[0]
    out = tmp_path / "changing"
    for processes, until in ((2, 4), (1, 9), (2, math.inf)):
        process = start(*pretraining(demo, out, *options), processes=processes)
        if wait_until(process, lambda until=until: steps_logged(out) >= until):
            process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
        assert ("stopped and saved" if until < 20 else "are done") in said, said
    assert log(out, "step") == log(tmp_path / "one", "step")
    assert log(out) == pytest.approx(log(tmp_path / "one"), rel=1e-5)
    assert log(out, "unreadable") == log(tmp_path / "one", "unreadable")


def bad_checkpoints(good: Path, folder: Path) -> dict[str, bytes]:
    """Broken contents of a checkpoint; the code in one makes the file `ran`."""

    class Code:
        def __reduce__(self):
            return os.system, (f"touch '{folder / 'ran'}'",)

    whole = good.read_bytes()
    contents = {f"{tenth} tenths": whole[: len(whole) * tenth // 10] for tenth in range(10)}
    contents |= {"no end": whole[:-1], "zeros": bytes(len(whole)), "text": b"<html>404</html>"}
    for name, content in {
        "code": omnimae.read_checkpoint(good) | {"more": Code()}, "list": [1], "numbers": {1: 2},
        "numbered": {1: torch.zeros(2, 2)}, "scalar": {"encoder.patch_embed.weight": torch.tensor(1)},
        "small": released_state(released_shapes(TINY, None)),
    }.items():  # fmt: skip
        torch.save(content, folder / "content")
        contents[name] = (folder / "content").read_bytes()
    return contents


@slow
def test_a_bad_checkpoint_is_refused_and_left_as_it_is(pretrain, finetuning, tmp_path):
    runs = [(pretrain(out="pretrained"), pretrain), (finetuning(out="tuned"), finetuning)]
    for run, again in runs:
        for name, content in bad_checkpoints(run / "last.pt", tmp_path).items():
            (run / "last.pt").with_name("good.pt").write_bytes((run / "last.pt").read_bytes())
            (run / "last.pt").write_bytes(content)
            for attempt in (
                lambda run=run, again=again: again(out=run.name),
                lambda run=run: pretrain("--init", run / "last.pt", out="new"),
                lambda run=run: finetuning(start=(run / "last.pt",), out="new"),
            ):
                with pytest.raises(ValueError, match="last.pt") as error:
                    attempt()
                assert "\n" not in str(error.value), name
            assert (run / "last.pt").read_bytes() == content
            (run / "good.pt").replace(run / "last.pt")
        assert_same_bits(run, again(out=run.name))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"is of a run with .* choose another --out"):
        pretrain(out="tuned")
    with pytest.raises(ValueError, match=r"is of a run with .* choose another --out"):
        finetuning(out="pretrained")


@slow
def test_other_settings_are_named_when_they_change_the_result(pretrain, finetuning):
    pretrain(out="pretrained")
    finetuning(out="tuned")
    both = (
        ("--seed", 1), ("--lr", 0.5), ("--epochs", 3), ("--batch-size", 8, "--micro-batch", 8),
        ("--weight-decay", 0.5), ("--dtype", "bfloat16"),
    )  # fmt: skip
    own = (
        (pretrain, "pretrained", (("--mask", "tube"), ("--video-views", 2), ("--image-mask-ratio", 0.5))),
        (finetuning, "tuned", (("--layer-decay", 0.5), ("--drop-path", 0.5), ("--freeze",), ("--augment", "full"))),
    )  # fmt: skip
    for run, out, more in own:
        for option, *value in (*both, *more):
            name = "precision" if option == "--dtype" else option[2:].replace("-", "_")
            with pytest.raises(ValueError, match=f"of a run with {name} .*choose another --out"):
                run(option, *value, out=out)


@contextmanager
def file_size_limit(size: int):
    """As on a full disk: no file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    state = {str(i): torch.full((10_000,), float(i)) for i in range(50)}
    engine.replace_file(path, lambda file: torch.save({"kept": torch.ones(3)}, file))
    before = path.read_bytes()
    for size in (0, 10, 30_000, 100_000, 1_000_000, 1_999_999):
        with (
            file_size_limit(size),
            pytest.raises(OSError, match=r"last.pt cannot be written.*File too large") as error,
        ):
            engine.replace_file(path, lambda file: torch.save(state, file))
        assert "\n" not in str(error.value)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@slow
@pytest.mark.parametrize("command", [pretraining, finetuning_images])
def test_a_run_on_a_full_disk_ends_in_a_sentence_and_goes_on_later(demo, tmp_path, command):
    whole, out = tmp_path / "whole", tmp_path / "full"
    start(*command(demo, whole)).communicate()
    process = start(*command(demo, out))
    assert wait_until(process, lambda: steps_logged(out) >= 2)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    before = (out / "last.pt").read_bytes()

    with file_size_limit(5_000_000):  # for this process and the one it starts
        process = start(*command(demo, out))
        said = process.communicate(timeout=100)[0]  # with loader workers, for which nothing waits
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith(f"{command(demo, out)[0]}: {out}"), said
    assert "cannot be written, and stays as it was: [Errno 27] File too large" in said
    assert "Traceback" not in said
    assert (out / "last.pt").read_bytes() == before
    omnimae.load_checkpoint(out / "last.pt")
    assert not list(out.glob("*.tmp"))
    assert "are done" in start(*command(demo, out)).communicate()[0]
    assert_same_run(whole, out)


def test_a_folder_that_cannot_be_written_is_named(pretrain, tmp_path):
    (tmp_path / "file").touch()
    for out in ("file/run", "/proc/run"):
        with pytest.raises(OSError, match=f"--out .*{out} cannot be made or written"):
            pretrain(out=out)


def encode(path: Path, frames: np.ndarray, codec="libx264", pix_fmt="yuv420p", format=None) -> Path:
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=12)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def with_timestamps(webm: bytes, times) -> bytes:
    """The blocks of a .webm at other times: duplicate or decreasing ones, which no muxer writes."""
    block, content = (
        rb"\xa3(?:[\x81-\xfe]|[\x40-\x7f].|[\x20-\x3f]..)\x81(..)[\x00\x80]",
        bytearray(webm),
    )
    starts = [match.start(1) for match in re.finditer(block, webm, re.DOTALL)]
    for i, at in enumerate(starts):
        content[at : at + 2] = struct.pack(">h", times(i))
    return bytes(content)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def write_corpus(folder: Path) -> dict[str, tuple | None]:
    """Over 150 broken and odd files, and of those whose reading has one right end, that: a shape, or
    None for an error. The others may end either way."""
    folder.mkdir()
    ends, good, rng = {}, {}, np.random.default_rng(0)

    def put(name, content, *end):
        (folder / name).write_bytes(content)
        if end:
            ends[name] = end[0]

    for suffix, kind in (("jpg", "JPEG"), ("png", "PNG"), ("gif", "GIF"), ("webp", "WEBP"), ("tif", "TIFF")):  # fmt: skip
        PIL.Image.fromarray(pixels_of("RGB")).save(folder / f"good.{suffix}", kind)
        ends[f"good.{suffix}"] = (3, 40, 60)
    for suffix, codec in (("webm", "libvpx-vp9"), ("mp4", "libx264")):
        write_numbered(folder / f"good.{suffix}", num=24, codec=codec)
        ends[f"good.{suffix}"] = (8, 3, 32, 64)
    for suffix in ("jpg", "png", "gif", "webp", "tif", "webm", "mp4"):
        content = good[suffix] = (folder / f"good.{suffix}").read_bytes()
        for tenth in range(10):
            put(f"cut{tenth}.{suffix}", content[: len(content) * tenth // 10], *[None][tenth:])
        for i in range(8):
            flipped = np.frombuffer(content, np.uint8).copy()
            at = rng.integers(len(flipped), size=1 + 2 * i)
            flipped[at] ^= (1 << rng.integers(8, size=len(at))).astype(np.uint8)
            put(f"flip{i}.{suffix}", flipped.tobytes())
        put(f"header.{suffix}", bytes(16) + content[16:])
        put(f"zeros.{suffix}", bytes(len(content)), None)

    # sizes that only a header has
    for size in ((2**31 - 1, 2**31 - 1), (13000, 13000), (65500, 1), (1, 2**27), (0, 0)):
        put(f"png{size[0]}x{size[1]}.png", png_of_size(*size), None)
    at = good["jpg"].index(b"\xff\xc0") + 5
    for size in ((65535, 65535), (1, 65535), (0, 0)):
        put(f"jpg{size[0]}x{size[1]}.jpg", good["jpg"][:at] + struct.pack(">HH", *size) + good["jpg"][at + 4 :], None)  # fmt: skip
    webm = good["webm"]
    put(
        "wide.webm", webm.replace(b"\xb0\x81\x40", b"\xb0\x81\xff"), (8, 3, 32, 64)
    )  # a frame knows better
    at = webm.index(b"\x49\x83\x42") + 3  # VP9's start code, then its frame's size from bit 4 on
    for side in (16383, 65535):
        bits = int.from_bytes(webm[at : at + 5], "big") & ~(0xFFFFFFFF << 4) | (
            side << 20 | side << 4
        )
        put(f"vp9_{side}.webm", webm[:at] + bits.to_bytes(5, "big") + webm[at + 5 :], None)

    # odd, but whole
    put("duplicate.webm", with_timestamps(webm, lambda i: 0))
    put("decreasing.webm", with_timestamps(webm, lambda i: 2000 - 80 * i))
    put("negative.webm", with_timestamps(webm, lambda i: 80 * i - 1000))
    frames = numbered(24)
    for name, end, how in (
        ("one_frame.webm", (8, 3, 32, 64), {"frames": frames[:1], "codec": "libvpx-vp9"}),
        ("one_frame.mp4", (8, 3, 32, 64), {"frames": frames[:1]}),
        ("no_frame.mkv", None, {"frames": frames[:0]}),
        ("no_times.mp4", None, {"frames": frames, "format": "h264"}),
        ("one_pixel.webm", (8, 3, 1, 1), {"frames": frames[:, :1, :1], "codec": "libvpx-vp9"}),
        ("line.mkv", None, {"frames": frames[:, :1].repeat(3, 2), "codec": "ffv1"}),
        ("ten_bits.mp4", (8, 3, 32, 64), {"frames": frames, "pix_fmt": "yuv420p10le"}),
        ("grey.mp4", (8, 3, 32, 64), {"frames": frames, "pix_fmt": "gray"}),
        ("alpha.webm", (8, 3, 32, 64), {"frames": frames, "codec": "libvpx-vp9", "pix_fmt": "yuva420p"}),
    ):  # fmt: skip
        encode(folder / name, **how)
        ends[name] = end
    write_numbered(folder / "variable.webm", 11, times=[0, 1, 2, 500, 900, 950, 1400, 2000, 2050, 2600, 3000])  # fmt: skip
    mp4 = good["mp4"]
    at = mp4.index(b"tkhd") + 44  # the matrix by which a player turns it
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    put("turned.mp4", mp4[:at] + turned + mp4[at + 36 :], (8, 3, 32, 64))
    write_audio(folder / "audio.mp4")
    PIL.Image.fromarray(pixels_of("RGB")[:1, :1]).save(folder / "one_pixel.png")
    for name, end in (("audio.mp4", None), ("one_pixel.png", (3, 1, 1)), ("variable.webm", (8, 3, 32, 64))):  # fmt: skip
        ends[name] = end
    put("a_webm.mp4", webm, (8, 3, 32, 64))
    put("a_png.jpg", good["png"], (3, 40, 60))
    put("a_jpg.webm", good["jpg"])
    put("a_webm.jpg", webm, None)
    put("text.avi", b"not a video", None)
    return ends


READ_ALL = """
import json, os, sys, time, warnings
import omnimae, eval as evaluation
def memory(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) / 1e3
warnings.simplefilter("ignore")
for path in sys.argv[1:] * 2:  # twice: what the first time makes is no leak
    before = time.monotonic(), len(os.listdir("/proc/self/fd"))
    try:
        if evaluation.kind_of(path) == "videos":
            end = tuple(omnimae.read_clip(path, 0.0, 2.7, 8).shape)
        else:
            end = tuple(omnimae.read_image(path).shape)
    except ValueError as error:
        assert path in str(error) and "\\n" not in str(error), error
        end = None
    seconds, leaked = time.monotonic() - before[0], len(os.listdir("/proc/self/fd")) - before[1]
    row = os.path.basename(path), end, seconds, leaked, memory("VmRSS"), memory("VmHWM")
    print(json.dumps(row), flush=True)
"""


def test_broken_media_end_in_a_right_result_or_an_error_with_the_files_name(tmp_path):
    ends = write_corpus(tmp_path / "corpus")
    paths = sorted((tmp_path / "corpus").iterdir())
    assert len(paths) > 150
    done = subprocess.run(  # a process of its own, because a decoder could crash it
        [sys.executable, "-c", READ_ALL, *map(str, paths)],
        cwd=HERE, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * len(paths)
    for name, end, seconds, leaked, _, _ in rows:
        assert seconds < 5 and leaked == 0, (name, seconds, leaked)
        if name in ends:
            assert end == (ends[name] and list(ends[name])), name
    memory, peak = ([row[i] for row in rows] for i in (4, 5))
    assert max(peak) - memory[0] < 300  # MB
    assert memory[-1] - memory[len(paths)] < 30


def test_an_epoch_with_a_twentieth_of_broken_files_finishes_and_counts_them(pretrain, demo, tmp_path):  # fmt: skip
    write_corpus(tmp_path / "corpus")
    shutil.copytree(demo, tmp_path / "data")
    clips = tmp_path / "data/videos/20bn-something-something-v2"
    broken = [
        ("cut5.jpg", tmp_path / "data/images/train/ring/ring_4.JPEG"),
        ("png1x134217728.png", tmp_path / "data/images/train/star/star_6.JPEG"),
        ("cut2.webm", clips / "3.webm"), ("vp9_16383.webm", clips / "17.webm"),
    ]  # fmt: skip
    for name, path in broken:
        shutil.copy(tmp_path / "corpus" / name, path)
    data = ("--images", tmp_path / "data/images", "--videos", tmp_path / "data/videos")
    out = pretrain("--video-views", 1, data=data)  # so that each clip is read
    assert len(log(out)) == 5 and log(out, "unreadable")[-1] == len(broken)


@pytest.fixture
def overflow(monkeypatch):
    """The gradient of one step is not finite, though its loss is."""

    def at(call: int) -> None:
        forward, calls = OmniMAE.forward, iter(range(1000))

        def overflowing(self, x, mask=None):
            loss, pred, mask = forward(self, x, mask)
            if loss.requires_grad and x.device.type == "cpu" and next(calls) == call:
                loss.register_hook(lambda gradient: gradient * math.inf)
            return loss, pred, mask

        monkeypatch.setattr(OmniMAE, "forward", overflowing)

    return at


def test_a_step_that_the_scaler_skips_is_no_failure(pretrain, overflow, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    overflow(2)
    out = pretrain()
    file = omnimae.read_checkpoint(out / "last.pt")
    assert file["scaler"]["scale"] == 2.0**15  # half of what it starts with
    assert file["step"] == 5 and log(out, "step")[-1] == 5
    assert all(value.isfinite().all() for value in file["model"].values())
    assert {state["step"].item() for state in file["optimizer"]["state"].values()} == {4}


def test_weights_that_are_not_finite_are_never_saved(pretrain, overflow, tmp_path):
    overflow(2)
    with pytest.raises(FloatingPointError, match="weights after step 3 are not finite"):
        pretrain("--save-minutes", 0)
    saved = omnimae.read_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["step"] == 2
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_float16_is_refused_on_a_cpu(pretrain, finetuning):
    for run in (pretrain, finetuning):
        with pytest.raises(ValueError, match="float16 is for GPUs.*give bfloat16 or float32"):
            run("--dtype", "float16")


@slow
def test_a_rate_is_never_asked_for_past_the_end(pretrain, finetuning, monkeypatch):
    rate, asked = train.learning_rate, []
    monkeypatch.setattr(
        train, "learning_rate", lambda *args, **more: asked.append(args[:2]) or rate(*args, **more)
    )
    for run, total in ((pretrain, 5), (finetuning, 6)):
        for _ in range(2):  # and not by a finished run that is started again
            run(out=str(total))
        assert asked == [(step, total) for step in range(total)]
        asked.clear()


@slow
def test_a_long_run_stays_as_large_and_as_fast_as_it_was(demo, tmp_path):
    out = tmp_path / "long"
    options = ("--batch-size", 4, "--micro-batch", 4, "--epochs", 100, "--log-every", 20, "--save-minutes", 0.1)  # fmt: skip
    process = start(*pretraining(demo, out, *options))
    rows, later = [], 0.0

    def sample():
        nonlocal later
        if time.monotonic() > later:
            later = time.monotonic() + 0.5
            try:
                pids = [process.pid, *children(process.pid)]
                pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
                files = max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
                rows.append((steps_logged(out), pages * 4096 / 1e6, files))
            except OSError:  # it has ended meanwhile
                pass
        return time.sleep(0.1)

    wait_until(process, sample)
    assert "all 2,000 steps are done" in process.communicate()[0]
    step, memory, files = np.array([row for row in rows if 500 <= row[0] < 1990]).T
    speed = log(out, "views_per_second")
    growth = 1000 * np.polyfit(step, memory, 1)[0]  # MB in 1,000 steps
    early, late = np.median(speed[10:50]), np.median(speed[-40:])
    print(f"{growth:.1f} MB in 1,000 steps, {files.min()} to {files.max()} files, {early:.0f} and {late:.0f} views/s")  # fmt: skip
    assert growth < 20
    half = len(files) // 2
    assert files[half:].min() <= files[:half].min()  # a leak raises even the lowest count
    assert late > 0.6 * early


@slow
def test_odd_names_links_and_read_only_data_change_nothing(pretrain, finetuning, demo, tmp_path, monkeypatch):  # fmt: skip
    one = pretrain()
    odd = tmp_path / "schöne: Daten & 映像"
    shutil.copytree(demo / "images", odd / "Bilder 100%")
    (odd / "videos").symlink_to(demo / "videos")
    (odd / "Bilder 100%/train/star").rename(tmp_path / "star")
    (odd / "Bilder 100%/train/star").symlink_to(tmp_path / "star")  # a folder and a file
    file = next((odd / "Bilder 100%/train/cross").iterdir())
    shutil.copy(file, tmp_path / "file")
    file.unlink()
    file.symlink_to(tmp_path / "file")
    for path in (odd, *odd.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(odd.rglob("*"))
    monkeypatch.chdir(tmp_path)
    name = odd.relative_to(tmp_path)
    data = ("--images", name / "Bilder 100%", "--videos", name / "videos")
    pretrain("--out", "Läufe/mein Lauf 1", data=data)
    assert_same_bits(one, tmp_path / "Läufe/mein Lauf 1")
    finetuning("--out", "Läufe/2", start=("Läufe/mein Lauf 1/last.pt",), data=data[:2])
    run_eval("--checkpoint", "Läufe/2/last.pt", "--images", name / "Bilder 100%")
    assert sorted(odd.rglob("*")) == before
    for path in (odd, *odd.rglob("*")):
        path.chmod(0o755)


@slow
def test_names_are_read_in_a_plain_locale(demo, tmp_path):
    data = tmp_path / "schöne Daten"
    shutil.copytree(demo, data)
    star = data / "images/train/star"
    (star / "star_6.JPEG").rename(star / os.fsdecode(b"\xff.JPEG"))  # no UTF-8
    environment = os.environ | {"LC_ALL": "C"}
    command = [sys.executable, HERE / "train.py", *pretraining(data, tmp_path / "Läufe")[1:]]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "cannot be read" not in done.stderr, done.stderr


@slow
def test_the_second_of_two_runs_in_one_folder_refuses(demo, tmp_path):
    runs = [start(*pretraining(demo, tmp_path / "run", "--epochs", 4)) for _ in range(2)]
    said = [run.communicate()[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1]
    second = said[[run.returncode for run in runs].index(1)]
    assert (
        second == f"train.py: another run is writing to {tmp_path / 'run'}: choose another --out\n"
    )
    assert "are done" in start(*pretraining(demo, tmp_path / "whole", "--epochs", 4)).communicate()[0]  # fmt: skip
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@slow
@pytest.mark.parametrize("workers", [0, 1])
def test_one_image_and_one_video_are_enough(pretrain, demo, tmp_path, workers):
    for kind, path in (
        ("images", next((demo / "images/train/ring").iterdir())),
        ("videos", demo / "videos/20bn-something-something-v2/1.webm"),
    ):
        (tmp_path / kind).mkdir()
        shutil.copy(path, tmp_path / kind)
    data = ("--images", tmp_path / "images", "--videos", tmp_path / "videos")
    out = pretrain("--epochs", 3, "--workers", workers, data=data)
    assert len(log(out)) == 6  # a step of each kind in an epoch
    assert log(out, "unreadable")[-1] == 0
