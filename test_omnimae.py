"""The tests, which also show how to call everything: `pytest`, two minutes on two cores.

They follow the paper: model, checkpoints, media, pretraining, finetuning, evaluation, and last real
processes. Nothing is downloaded; images, films and data sets are written here.
"""

import errno
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from av.stream import Disposition
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

import eval as evaluation
import finetune
import omnimae
import train
from omnimae import (
    Classifier,
    OmniMAE,
    OmniMAEConfig,
    UserError,
    random_mask,
    to_patches,
    visible_indices,
)

HERE = Path(omnimae.__file__).parent  # the folder of the scripts
torch.set_num_threads(1)  # the models are tiny
TINY = OmniMAEConfig(
    image_size=32,
    num_frames=4,
    patch_size=(2, 8, 8),  # 2 x 4 x 4 patches in a clip, 4 x 4 in an image
    dim=64,
    depth=2,
    heads=4,
    decoder_dim=32,
    decoder_depth=2,
    decoder_heads=4,
    image_mask_ratio=0.75,
    video_mask_ratio=0.90,
)
omnimae.MODELS["tiny"] = TINY  # so that the scripts know it


@pytest.fixture
def tiny() -> OmniMAE:
    torch.manual_seed(0)
    return OmniMAE(TINY)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A small demo set: 48 images and 32 videos, for validation 16 and 8."""
    root = tmp_path_factory.mktemp("data") / "demo"
    train.write_demo_data(root, 48, 32, 16, 8)
    return root


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A demo set of 16 images and 8 videos, for validation 8 and 2."""
    folder = tmp_path_factory.mktemp("small") / "demo"
    train.write_demo_data(folder, 16, 8, 8, 2)
    return folder


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator)


def clips(batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 4, 32, 32, generator=generator)


def write_video(path: Path, frames, fps, codec="libx264", options=None, pix_fmt="yuv420p") -> Path:
    """Writes frames, uint8 (T, H, W, 3)."""
    options = options or {"g": "10"}  # a keyframe every 10 frames
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def numbered_frames(num: int) -> np.ndarray:
    """Frames, uint8 (num, 32, 64, 3), that carry their number as eight black or white squares."""
    bits = (np.arange(num)[:, None] >> np.arange(8)) & 1  # (num, 8)
    squares = bits.reshape(num, 2, 4)
    frames = squares.repeat(16, axis=1).repeat(16, axis=2) * 235
    return np.stack([frames] * 3, axis=-1).astype(np.uint8)


def write_film(path: Path, num: int, fps=12, codec="libx264", options=None) -> Path:
    """A video whose frames carry their number, 64 x 32 pixels."""
    return write_video(path, numbered_frames(num), fps, codec, options)


def numbers_in(clip: torch.Tensor) -> list[int]:
    """The numbers that the frames of a film's clip (T, 3, 32, 64) carry."""
    grey = clip.float().mean(1)  # (T, 32, 64)
    squares = grey.unflatten(2, (4, 16)).unflatten(1, (2, 16)).mean((2, 4))  # (T, 2, 4)
    bits = (squares > 118).flatten(1).long()  # (T, 8)
    return (bits << torch.arange(8)).sum(1).tolist()


def save_model(model, path: Path, **more) -> Path:
    """Saves a model as the scripts do."""
    content = {"model": model.state_dict(), "config": asdict(model.cfg)}
    torch.save(content | more, path)
    return path


def spy_on(patch, owner, name: str, record: Callable) -> None:
    """Calls `record` with what each call of `owner.name` returned, and its arguments. `patch`: as
    pytest's monkeypatch."""
    real = getattr(owner, name)

    def recorded(*args, **options):
        result = real(*args, **options)
        record(result, *args, **options)
        return result

    patch.setattr(owner, name, recorded)


def same_bits(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------
# The model: pixels, patches and positions


def test_pixels_are_normalised_by_imagenets_mean_and_deviation():
    pixels = torch.randint(256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    x = omnimae.normalize(pixels)
    assert x.dtype == torch.float32

    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]
    for channel in range(3):
        plain = (pixels[:, channel] / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(x[:, channel], plain)


def test_a_patch_holds_frames_then_rows_then_columns_then_channels():
    x = torch.randn(2, 3, 4, 16, 24)
    patches = omnimae.patchify(x, (2, 8, 4))  # 2 x 2 x 6 patches
    index = 1 * 12 + 1 * 6 + 1  # the second in time, row and column
    patch = x[1, :, 2:4, 8:16, 4:8]  # (channels, frames, rows, columns)
    same_bits(patches[1, index], patch.permute(1, 2, 3, 0).flatten())


def test_an_images_frame_is_repeated_to_fill_a_patch():
    patches, grid = to_patches(images(), TINY)  # (B, N, P)
    first, second = patches.unflatten(2, (2, -1)).unbind(2)  # the frames of a patch
    same_bits(first, second)
    assert grid == (1, 4, 4)


def test_an_image_is_a_one_frame_video(tiny):
    visible = visible_indices(random_mask(2, *TINY.masking("images")))
    x = images()  # (B, 3, H, W)
    _, of_image, _ = tiny(x, visible)
    _, of_video, _ = tiny(x.unsqueeze(2), visible)  # (B, 3, 1, H, W)
    same_bits(of_video, of_image)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 30, 32), (2, 3, 8, 32, 32)])
def test_inputs_that_do_not_fit_are_an_error_of_the_programmer(shape, tiny):
    with pytest.raises(ValueError, match="normalize") as raised:
        tiny(torch.zeros(shape))
    assert not isinstance(raised.value, UserError)  # those are for what a user can correct


def test_pixels_that_are_not_normalised_are_an_error(tiny):
    with pytest.raises(ValueError, match="normalize"):
        tiny(images().byte())


def test_integers_of_another_range_than_pixels_are_an_error():
    with pytest.raises(ValueError, match="uint8"):
        omnimae.normalize(images().long())


@pytest.mark.parametrize(
    ("x", "index"),
    [(clips(), 1 * 16 + 2 * 4 + 3), (images(), 2 * 4 + 3)],  # an image is at time 0
    ids=["clip", "image"],
)
def test_a_patchs_position_is_its_index_in_time_rows_and_columns(x, index):
    encoder = omnimae.Encoder(replace(TINY, depth=0))
    torch.nn.init.zeros_(encoder.patch_embed.weight)  # only the positions are left
    torch.nn.init.zeros_(encoder.patch_embed.bias)
    tokens = encoder(*to_patches(x, TINY))  # (B, N, D)

    plain = []
    for column in range(0, 64, 2):
        angle = index / 10000 ** (column / 64)
        plain += [math.sin(angle), math.cos(angle)]
    assert tokens[1, index].tolist() == pytest.approx(plain, abs=1e-6)


def test_the_positions_of_an_image_of_another_size_are_interpolated_in_rows_and_columns():
    patches, grid = to_patches(torch.randn(1, 3, 16, 64), TINY)
    assert patches.shape[1] == 16
    assert grid == (1, 2, 8)

    column = torch.arange(4.0).repeat(8)[:, None]  # each patch's column in a clip's 2 x 4 x 4
    found = omnimae.positions_for(column, grid, TINY).view(2, 8)
    same_bits(found[0], found[1])
    assert (found.diff(dim=1) > 0).all()


# ------------------------------------------------------------------------------------------------
# The model: masks


def test_masks_are_drawn_uniformly_over_time_and_space():
    mask = random_mask(4000, 64, 0.9, torch.Generator().manual_seed(0))
    masked = 57 / 64  # int(0.9 * 64) of 64
    deviation = (masked * (1 - masked) / 4000) ** 0.5
    frequency = mask.float().mean(0)  # (N,)
    assert (frequency - masked).abs().max() < 5 * deviation

    together = torch.corrcoef(mask.T.float()) - torch.eye(64)
    assert together.abs().max() < 0.1  # 1 if all frames had the same mask


@pytest.mark.parametrize(
    ("name", "of_image", "of_clip"),  # of 196 and 1568 patches, or of 256 and 2048
    [("vit_b", 176, 1489), ("vit_l", 176, 1489), ("vit_h", 230, 1945)],
)
def test_as_many_patches_are_masked_as_in_the_paper(name, of_image, of_clip):
    cfg = omnimae.MODELS[name]
    assert random_mask(1, *cfg.masking("images")).sum() == of_image
    assert random_mask(1, *cfg.masking("videos")).sum() == of_clip


@pytest.mark.parametrize(
    ("x", "num_masked"), [(images(), 12), (clips(), 28)], ids=["image", "clip"]
)
def test_by_default_a_random_mask_of_the_models_ratio_is_drawn(tiny, x, num_masked):
    _, pred, mask = tiny(x)
    _, _, other_mask = tiny(x)
    assert mask.sum(1).tolist() == [num_masked, num_masked]
    assert pred.shape == (2, num_masked, 384)
    assert not torch.equal(mask, other_mask)


@pytest.mark.parametrize("ratio", [0.06, 1.0], ids=["masks none", "masks all"])  # of 16 patches
def test_a_ratio_that_masks_no_patch_or_all_is_the_users_error(ratio):
    with pytest.raises(UserError, match="ratio"):
        random_mask(2, 16, ratio)


def test_the_model_takes_the_indices_of_the_visible_patches():
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    visible = visible_indices(mask)
    assert visible.dtype == torch.int64
    assert visible.tolist() == [[1, 3], [0, 3]]


@pytest.mark.parametrize(
    "visible",
    [torch.arange(16).expand(2, 16) < 4, torch.tensor([[0, 1]]), torch.zeros(2, 0).long()],
    ids=["a mask", "of one sample", "none"],
)
def test_indices_that_do_not_fit_are_an_error_that_names_visible_indices(tiny, visible):
    with pytest.raises(ValueError, match="visible_indices"):
        tiny(images(), visible)


def test_a_mask_of_numbers_is_an_error():
    with pytest.raises(ValueError, match="bool"):
        visible_indices(torch.tensor([[1, 0, 1, 0]]))


def test_rows_that_mask_different_numbers_are_an_error():
    mask = torch.arange(16) < torch.tensor([[12], [11]])
    with pytest.raises(ValueError, match="different"):
        visible_indices(mask)


# ------------------------------------------------------------------------------------------------
# The model: loss, start and features


def with_other_patches(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Clips with other pixels in the chosen patches, bool (B, N)."""
    patches = omnimae.patchify(x, TINY.patch_size)
    patches = patches + torch.randn_like(patches) * chosen[..., None]
    return omnimae.unpatchify(patches, TINY.patch_size, TINY.grid)


def test_the_prediction_does_not_depend_on_masked_pixels(tiny):
    x = clips()
    mask = random_mask(2, 32, 0.9)
    visible = visible_indices(mask)
    _, pred, _ = tiny(x, visible)
    _, other_pred, _ = tiny(with_other_patches(x, mask), visible)
    same_bits(other_pred, pred)


def test_the_prediction_depends_on_each_visible_patch(tiny):
    x = clips()
    mask = random_mask(2, 32, 0.9)
    visible = visible_indices(mask)  # 4 in each sample
    _, pred, _ = tiny(x, visible)
    for i in range(4):
        chosen = torch.zeros_like(mask).scatter(1, visible[:, i : i + 1], True)
        _, other_pred, _ = tiny(with_other_patches(x, chosen), visible)
        assert ((other_pred - pred).abs().amax((1, 2)) > 1e-4).all()


def test_the_loss_is_the_squared_error_of_masked_patches_normalised(tiny):
    x = clips()
    x[:, :, :, :8] *= 1e-3  # so faint that the 1e-6 counts
    mask = random_mask(2, 32, 0.9)
    loss, pred, _ = tiny(x, visible_indices(mask))

    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    pixels = x.movedim(1, -1) * std + mean  # (B, T, H, W, 3), in [0, 1]
    predictions = pred.flatten(0, 1)  # of the first sample's masked patches, then of the second's
    errors = []
    for prediction, (sample, index) in zip(predictions, mask.nonzero().tolist(), strict=True):
        t = index // 16 * 2
        h = index // 4 % 4 * 8
        w = index % 4 * 8
        patch = pixels[sample, t : t + 2, h : h + 8, w : w + 8].reshape(128, 3)
        patch = patch - patch.mean(0)  # in each channel
        variance = patch.square().sum(0) / 127
        patch = patch / (variance + 1e-6).sqrt()
        errors.append((prediction - patch.flatten()).square().mean().item())
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_loss_and_prediction_are_float32_under_autocast(tiny):
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, _ = tiny(clips())
    assert loss.dtype == torch.float32
    assert pred.dtype == torch.float32


def test_all_weights_learn_from_the_loss(tiny):
    loss, _, _ = tiny(clips())
    loss.backward()
    for name, weight in tiny.named_parameters():
        assert weight.grad.any(), name


@pytest.mark.parametrize("x", [images(size=48), clips()], ids=["larger image", "clip"])
def test_features_are_the_tokens_of_all_patches_after_the_norm(x, tiny):
    patches, grid = to_patches(x, TINY)
    tokens = tiny.encoder(patches, grid)
    same_bits(tiny.features(x), tiny.norm(tokens))
    assert tokens.shape == (2, patches.shape[1], 64)


@pytest.mark.parametrize("model", [OmniMAE(TINY), Classifier(TINY, 10)], ids=["mae", "classifier"])
def test_each_layer_norm_adds_the_released_epsilon(model):
    norms = [x for x in model.modules() if isinstance(x, torch.nn.LayerNorm)]
    assert {x.eps for x in norms} == {1e-6}


def test_a_classifiers_features_are_the_encoders_tokens():
    model = Classifier(TINY, 10)
    tokens = model.features(clips())
    same_bits(tokens, model.encoder(*to_patches(clips(), TINY)))


def test_pretraining_starts_from_xavier_weights(tiny):
    for name, module in tiny.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "decoder.head":
            largest = (6 / sum(module.weight.shape)) ** 0.5
            std = module.weight.std().item()
            assert largest * 0.7 < module.weight.abs().max() <= largest, name
            assert std == pytest.approx(largest / 3**0.5, rel=0.05), name  # uniform


@pytest.mark.parametrize(
    "layer",
    [OmniMAE(TINY).decoder.head, Classifier(TINY, 10).encoder.blocks[0].mlp.fc1],
    ids=["pixel head", "classifier"],
)
def test_the_pixel_head_and_a_classifier_start_from_small_normal_weights(layer):
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert 0.06 < layer.weight.abs().max() <= 0.12


@pytest.mark.parametrize("model", [OmniMAE(TINY), Classifier(TINY, 10)], ids=["mae", "classifier"])
def test_biases_start_from_zero_except_the_patch_embeddings(model):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            assert module.bias.any() == (name == "encoder.patch_embed"), name

    bias = model.encoder.patch_embed.bias  # as a convolution's over the P = 384 values of a patch
    assert 0.9 * 384**-0.5 < bias.abs().max() <= 384**-0.5


def test_the_mask_token_starts_from_zero(tiny):
    assert not tiny.decoder.mask_token.any()


def test_drop_path_skips_branches_of_samples_more_in_each_block():
    torch.manual_seed(0)
    model = Classifier(replace(TINY, dim=16, depth=3), 10, drop_path=0.5)
    x = torch.randn(1, 1, 16).expand(4000, -1, -1)
    for block, rate in zip(model.encoder.blocks, (0, 0.25, 0.5), strict=True):
        out = block(x).detach()
        skipped = (out == x).flatten(1).all(1)  # both branches, in a sample
        assert skipped.float().mean().item() == pytest.approx(rate**2, abs=0.03)

        # None, attention, MLP or both are skipped.
        outcomes = (out[:, 0, 0] * 1e4).round().unique()
        assert len(outcomes) == (1 if rate == 0 else 4)


def test_drop_path_is_off_outside_training():
    model = Classifier(TINY, 10, drop_path=0.5).eval()
    same_bits(model(images()), model(images()))


# ------------------------------------------------------------------------------------------------
# The model: reconstructions


def predicting(model: OmniMAE, pattern: torch.Tensor) -> OmniMAE:
    """A model that predicts the same pattern for each masked patch, whatever it sees."""
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.copy_(pattern.flatten())
    return model


def test_a_perfect_prediction_gives_the_clip_back(tiny):
    # The patches are one pattern, each with a mean and a contrast of its own.
    pattern = torch.randn(128, 3)
    pattern = (pattern - pattern.mean(0)) / pattern.std(0)
    means = 0.4 + 0.2 * torch.rand(2, 32, 1, 3)
    contrasts = 0.02 + 0.03 * torch.rand(2, 32, 1, 3)
    patches = (means + contrasts * pattern).flatten(2)  # (B, N, P)
    clip = omnimae.unpatchify(patches, TINY.patch_size, TINY.grid)

    video = predicting(tiny, pattern).reconstruct(omnimae.normalize(clip))
    torch.testing.assert_close(video, clip, atol=1e-4, rtol=0)


def test_an_images_reconstruction_is_the_mean_of_two_pictures(tiny):
    pixels = 0.4 + 0.2 * torch.rand(2, 3, 32, 32)
    mask = random_mask(2, 16, 0.75)
    x = omnimae.normalize(pixels)
    pattern = torch.tensor([2000.0, -1000.0])[:, None].expand(2, 192)  # far too light, too dark
    picture = predicting(tiny, pattern).reconstruct(x, visible_indices(mask))  # (B, 3, 1, H, W)

    hidden = F.interpolate(mask.float().view(2, 1, 4, 4), scale_factor=8)  # (B, 1, H, W)
    wanted = pixels.masked_fill(hidden.bool(), 0.5)  # the mean of white and black
    torch.testing.assert_close(picture[:, :, 0], wanted)


def test_a_picture_shows_original_visible_patches_and_reconstruction(tiny):
    video = torch.rand(3, 4, 32, 32)
    x = omnimae.normalize(video[None])[0]
    mask = random_mask(1, 32, 0.9)[0]  # (N,)
    picture = pil_to_tensor(omnimae.draw_reconstruction(tiny, x, mask)) / 255

    hidden = mask.view(2, 1, 4, 1, 4, 1).expand(-1, 2, -1, 8, -1, 8)  # patches of 2 x 8 x 8
    seen = video.masked_fill(hidden.reshape(4, 32, 32), 0.5)
    reconstruction = tiny.reconstruct(x[None], visible_indices(mask[None]))[0]

    # Three rows of four frames, with 2 pixels between them
    assert picture.shape == (3, 3 * 34 + 2, 4 * 34 + 2)
    panels = picture[:, 2:, 2:].unfold(1, 32, 34).unfold(2, 32, 34)  # (3, rows, columns, H, W)
    wanted = torch.stack([video, seen, reconstruction], 1)
    torch.testing.assert_close(panels, wanted, atol=1 / 255, rtol=0)


# ------------------------------------------------------------------------------------------------
# The released numbers. They come from the released code, run with the weights of `released_state`.

RELEASED_NAMES = {  # how keys begin here, and in a released file; the first that fits is used
    "encoder.patch_embed.": "trunk.patch_embed.proj.1.",
    "encoder.": "trunk.",
    "norm.": "trunk.norm.",
    "decoder.mask_token": "trunk.mask_token",
    "decoder.embed.": "trunk.decoder.decoder_embed.",
    "decoder.blocks.": "trunk.decoder.decoder_blocks.",
    "decoder.head.": "head.",
    "decoder.": "trunk.decoder.",
    "head.": "head.",
}


def released_layout(model) -> dict[str, torch.Tensor]:
    """A model's state dict with the keys and shapes of the released files."""
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("pos_embed"):
            value = value[None]  # (1, N, D)
        if key == "encoder.patch_embed.weight":
            value = value.unflatten(1, (*model.cfg.patch_size, 3))
            value = value.permute(0, 4, 1, 2, 3)  # (D, 3, t, h, w)
        ours = next(start for start in RELEASED_NAMES if key.startswith(start))
        state[RELEASED_NAMES[ours] + key.removeprefix(ours)] = value
    return state


def released_state(model) -> dict[str, torch.Tensor]:
    """The weights that the released code was run with."""
    rng = np.random.RandomState(0)
    state = released_layout(model)
    for key in sorted(key for key in state if not key.endswith("pos_embed")):
        value = rng.standard_normal(state[key].shape)
        is_matrix = value.ndim > 1 and "mask_token" not in key
        if is_matrix:
            value /= np.sqrt(value[0].size)
        elif "norm" in key and key.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        state[key] = torch.from_numpy(value).float()
    return state


def released_input(*shape: int) -> torch.Tensor:
    x = np.random.RandomState(1).standard_normal(shape)
    return torch.from_numpy(x).float()


@pytest.mark.parametrize(
    ("shape", "sizes", "loss", "total", "first"),
    [
        ((2, 3, 32, 32), (16, 12), 1.9721187, -360.58317, [-0.7851663, 0.5453372, -0.8490965]),
        ((2, 3, 4, 32, 32), (32, 28), 1.9156719, -546.03206, [-0.8775964, 0.3987211, -0.3576223]),
    ],
    ids=["image", "clip"],
)
def test_pretraining_gives_the_released_numbers(tiny, shape, sizes, loss, total, first):
    tiny.load_state_dict(omnimae.convert_released(released_state(tiny)))
    rng = np.random.RandomState(2)
    num, num_masked = sizes
    mask = torch.zeros(2, num, dtype=torch.bool)
    for row in mask:
        row[rng.permutation(num)[:num_masked]] = True

    got, pred, _ = tiny(released_input(*shape), visible_indices(mask))
    assert got.item() == pytest.approx(loss, abs=1e-5)
    assert pred.flatten()[:3].tolist() == pytest.approx(first, abs=1e-5)
    assert pred.sum().item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "first", "second"),  # the first logits of the two samples
    [
        ((2, 3, 32, 32), [-0.3827533, 0.8951405, -1.4636081], [-0.1413702, 0.6640937, -1.2242469]),
        ((2, 3, 4, 32, 32), [0.6544462, 0.8064373, -0.8966929], [0.5888182, 0.6105245, -0.2675635]),
        ((2, 3, 48, 48), [0.1560981, 1.0797716, -1.3468279], [0.0473537, 1.0696520, -1.2776462]),
    ],
    ids=["image", "clip", "larger image"],
)
def test_a_classifier_gives_the_released_logits(shape, first, second):
    model = Classifier(TINY, 10)
    model.load_state_dict(omnimae.convert_released(released_state(model)))
    logits = model(released_input(*shape))
    assert logits[0, :3].tolist() == pytest.approx(first, abs=1e-5)
    assert logits[1, :3].tolist() == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (OmniMAE(TINY), "heads.0.projector."),
        (Classifier(TINY, 10), "heads.0."),  # IN1k
        (Classifier(TINY, 10), "heads.0.0."),  # SSv2
    ],
)
def test_the_heads_of_the_released_trainers_own_files_are_found(model, head):
    layout = released_layout(model)
    state = {re.sub(r"^head\.", head, key): value for key, value in layout.items()}
    same_bits(omnimae.convert_released(state), dict(model.state_dict()))


# ------------------------------------------------------------------------------------------------
# Checkpoints: the nine released ones and one's own


@pytest.mark.parametrize(
    ("name", "num_classes", "num_weights", "heads"),  # num_weights: the trainable ones
    [
        ("vit_b", None, 94_217_856, 12),
        ("vit_l", None, 317_803_520, 16),
        ("vit_h", None, 657_655_448, 16),
        ("vit_b", 1000, 87_005_416, 12),
        ("vit_l", 1000, 304_910_312, 16),
        ("vit_h", 1000, 632_468_200, 16),
        ("vit_b", 174, 86_370_222, 12),
        ("vit_l", 174, 304_063_662, 16),
        ("vit_h", 174, 631_410_094, 16),
    ],
)
def test_a_released_file_loads_with_the_papers_sizes(
    name, num_classes, num_weights, heads, tmp_path
):
    cfg = omnimae.MODELS[name]
    with torch.device("meta"):
        model = OmniMAE(cfg) if num_classes is None else Classifier(cfg, num_classes)
    value = torch.full((), 0.5)  # repeated, so that nothing large is written
    layout = released_layout(model)
    state = {key: value.expand(x.shape) for key, x in layout.items()}
    torch.save(state, tmp_path / "released.torch")

    loaded = omnimae.load_checkpoint(tmp_path / "released.torch")
    assert type(loaded) is type(model)
    assert sum(x.numel() for x in loaded.parameters() if x.requires_grad) == num_weights
    assert (loaded.cfg.heads, loaded.cfg.decoder_heads) == (heads, 16)


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> list[str]:
    """The addresses that torch.hub is asked for."""
    urls = []

    def download(url, path, *args, **kwargs):
        urls.append(url)
        torch.save({"address": url}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return urls


def test_the_released_names_are_downloaded_once_from_their_addresses(downloads):
    folder = "https://dl.fbaipublicfiles.com/omnivore/omnimae_ckpts"
    files = {"pretrain": "pretrain", "in1k": "in1k_ft", "ssv2": "ssv2_ft"}
    assert len(omnimae.CHECKPOINTS) == 9
    for name in [*omnimae.CHECKPOINTS, *omnimae.CHECKPOINTS]:  # such as vit_b_in1k
        _, size, stage = name.split("_")
        url = f"{folder}/vit{size}_{files[stage]}.torch"
        assert omnimae.read_checkpoint(name) == {"address": url}
    assert len(downloads) == 9


def test_files_of_one_name_at_two_addresses_are_two_files(downloads):
    urls = ["https://one/last.pt", "https://two/last.pt"]
    for url in urls + urls:
        assert omnimae.read_checkpoint(url) == {"address": url}
    assert downloads == urls


def test_a_failed_download_is_an_error_that_names_address_and_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="file:///nowhere/last.pt.*No such file"):
        omnimae.load_checkpoint("file:///nowhere/last.pt")


def test_a_cut_download_is_an_error_that_names_the_file_to_delete(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "vitb_ssv2_ft.torch"
    cached.parent.mkdir(parents=True)
    torch.save({"weight": torch.zeros(9000)}, cached)
    cached.write_bytes(cached.read_bytes()[:20_000])
    with pytest.raises(UserError, match=str(cached)):
        omnimae.load_checkpoint("vit_b_ssv2")


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(TINY, 5)


def assert_loads(path: Path, classifier: Classifier) -> Classifier:
    """Loads a file, which must hold this classifier, for evaluation."""
    model = omnimae.load_checkpoint(path)
    assert isinstance(model, Classifier)
    assert not model.training
    same_bits(dict(model.state_dict()), dict(classifier.state_dict()))
    return model


def save_state(state: dict, path: Path, key="model") -> Path:
    """Saves the weights of a tiny model under this key."""
    torch.save({key: state, "config": asdict(TINY)}, path)
    return path


def test_a_saved_classifier_loads_with_its_sizes_and_classes(classifier, tmp_path):
    path = save_model(classifier, tmp_path / "best.pt", classes=list("abcde"))
    model = assert_loads(path, classifier)
    assert model.cfg == TINY
    assert model.classes == list("abcde")


def test_a_decoder_without_blocks_is_refused():
    with pytest.raises(ValueError, match="decoder_depth"):
        OmniMAE(replace(TINY, decoder_depth=0))


def test_a_saved_pretraining_model_loads_with_its_decoder(tiny, tmp_path):
    model = omnimae.load_checkpoint(save_model(tiny, tmp_path / "last.pt"))
    assert isinstance(model, OmniMAE)
    same_bits(dict(model.state_dict()), dict(tiny.state_dict()))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
def test_the_weights_may_be_under_any_common_key(key, classifier, tmp_path):
    assert_loads(save_state(classifier.state_dict(), tmp_path / "own.pt", key), classifier)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_saved_from_ddp_or_torch_compile_load(prefix, classifier, tmp_path):
    state = {prefix + key: value for key, value in classifier.state_dict().items()}
    assert_loads(save_state(state, tmp_path / "own.pt"), classifier)


def test_weights_of_half_precision_load_as_float32(classifier, tmp_path):
    path = save_model(classifier.half(), tmp_path / "half.pt")
    assert_loads(path, classifier.float())


def test_pytorchs_old_file_format_loads(classifier, tmp_path):
    content = {"model": classifier.state_dict(), "config": asdict(TINY)}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "old.pt", classifier)


def test_a_bare_state_dict_has_the_size_that_its_patch_embedding_tells(tmp_path):
    model = Classifier(omnimae.MODELS["demo"], 5)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert assert_loads(tmp_path / "bare.pt", model).cfg == omnimae.MODELS["demo"]


def test_a_decoder_with_the_released_codes_biases_loads(tmp_path):
    cfg = replace(omnimae.MODELS["demo"], decoder_qkv_bias=True)
    torch.save(released_state(OmniMAE(cfg)), tmp_path / "biased.torch")
    assert omnimae.load_checkpoint(tmp_path / "biased.torch").cfg == cfg


def test_a_missing_checkpoint_is_an_error_that_names_the_released_ones(tmp_path):
    with pytest.raises(UserError, match="nowhere/last.pt.*vit_b_ssv2"):
        omnimae.load_checkpoint(tmp_path / "nowhere" / "last.pt")


@pytest.mark.parametrize("size", [0, 5000])
def test_a_damaged_checkpoint_is_an_error_that_names_it(size, classifier, tmp_path):
    path = save_model(classifier, tmp_path / "cut.pt")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="cut.pt"):
        omnimae.load_checkpoint(path)


OTHER_SIZE = Classifier(replace(TINY, dim=32), 5).state_dict()


@pytest.mark.parametrize(
    "content",
    [[1], {}, {"model": {"a": 1}}, OTHER_SIZE],
    ids=["list", "empty", "no weights", "other size"],
)
def test_a_file_of_something_else_is_an_error_that_names_it(content, tmp_path):
    torch.save(content, tmp_path / "else.pt")
    with pytest.raises(UserError, match="else.pt"):
        omnimae.load_checkpoint(tmp_path / "else.pt")


def test_a_missing_and_an_unknown_weight_are_an_error_that_names_them(classifier, tmp_path):
    state = classifier.state_dict()
    state["norm.beta"] = state.pop("norm.bias")
    path = save_state(state, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt.*norm.bias.*norm.beta"):
        omnimae.load_checkpoint(path)


def test_python_objects_in_a_file_are_not_loaded_but_named(classifier, tmp_path):
    path = save_model(classifier, tmp_path / "mae.pt", args=Namespace(lr=1.0))
    with pytest.raises(UserError, match="mae.pt.*argparse.Namespace"):
        omnimae.load_checkpoint(path)


def test_the_reason_why_pytorch_cannot_load_a_file_is_passed_on(classifier, tmp_path, monkeypatch):
    path = save_model(classifier, tmp_path / "own.pt")

    def too_large(*_, **__):
        raise RuntimeError("unable to mmap 9 bytes: Cannot allocate memory")

    monkeypatch.setattr(torch, "load", too_large)
    with pytest.raises(UserError, match="allocate"):
        omnimae.load_checkpoint(path)


# ------------------------------------------------------------------------------------------------
# Names of classes


def test_class_names_come_in_order_of_their_index(tmp_path):
    names = [f"name {i}" for i in (7, 3, 11, 0, 5, 2, 8, 1, 10, 4, 9, 6)]
    index = {name: name.split()[1] for name in names}  # as strings, as in SSv2
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(index))
    assert omnimae.read_classes(path) == [f"name {i}" for i in range(12)]


@pytest.mark.parametrize(
    "content",
    ["a,0", '["a", "b"]', '{"0": "a", "1": "b"}', '{"a": "1", "b": "2"}', '{"a": 0, "b": 2}'],
)
def test_other_files_of_class_names_are_errors_that_name_the_file(content, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(UserError, match="labels.json"):
        omnimae.read_classes(path)


def test_a_list_of_classes_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"é": "1", "a": "0"}', encoding="utf-8-sig")
    assert omnimae.read_classes(path) == ["a", "é"]


# ------------------------------------------------------------------------------------------------
# Media: images


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "tif")]
)
def test_an_image_is_read_as_rgb_whatever_its_mode(mode, suffix, tmp_path):
    pixels = np.full((4, 6, 3), (250, 10, 20), np.uint8)
    pixels[:, 3:] = (5, 60, 240)  # left red, right blue
    image = PIL.Image.fromarray(pixels).convert(mode, palette=PIL.Image.ADAPTIVE)
    image.save(tmp_path / f"image.{suffix}")
    got = omnimae.read_image(tmp_path / f"image.{suffix}")
    same_bits(got, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_16_bit_grey_the_high_byte_is_kept(suffix, tmp_path):
    high = np.arange(256).reshape(8, 32)
    grey = high * 256 + 255 - high  # low bytes of all kinds
    path = tmp_path / f"grey.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 32 8 65535\n" + grey.astype(">u2").tobytes())
    else:
        PIL.Image.fromarray(grey.astype(np.uint16)).save(path)
    same_bits(omnimae.read_image(path), torch.from_numpy(high).byte().expand(3, 8, 32))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_no_known_range_are_an_error(dtype, tmp_path):
    PIL.Image.fromarray(np.full((4, 6), 1, dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match="deep.tif"):
        omnimae.read_image(tmp_path / "deep.tif")


def test_exif_orientation_is_ignored(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "photo.jpg", exif=exif)
    assert omnimae.read_image(tmp_path / "photo.jpg").shape == (3, 40, 60)


def break_file(path: Path, fault: str) -> None:
    good = path.read_bytes()
    contents = {"empty": b"", "text": b"text", "cut": good[: len(good) // 2]}
    path.write_bytes(contents[fault])


@pytest.mark.parametrize("fault", ["empty", "text", "cut"])
def test_a_broken_image_is_an_error_that_names_it(fault, tmp_path):
    PIL.Image.effect_noise((60, 40), 50).save(tmp_path / "bad.jpg")
    break_file(tmp_path / "bad.jpg", fault)
    with pytest.raises(UserError, match="bad.jpg"):
        omnimae.read_image(tmp_path / "bad.jpg")


# ------------------------------------------------------------------------------------------------
# Media: frames of clips


def right_frames(path: Path, start, duration, num_frames: int) -> list[int]:
    """The plain rule: of the n frames in start <= time < start + duration, linspace(0, n - 1)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        ticks = sorted(frame.pts for frame in container.decode(stream))
        times = [(tick - ticks[0]) * stream.time_base for tick in ticks]
    start = Fraction(start)
    end = start + Fraction(duration)
    inside = [i for i, second in enumerate(times) if start <= second < end]
    return [inside[int(x)] for x in np.linspace(0, len(inside) - 1, num_frames)]


VP9 = {"g": "10", "deadline": "realtime", "cpu-used": "8"}
FILMS = {"mp4": ("libx264", {"g": "10"}), "webm": ("libvpx-vp9", VP9)}
RATES = [12, 25, Fraction(30000, 1001)]


@pytest.fixture(
    scope="module",
    params=[(suffix, fps) for suffix in FILMS for fps in RATES],
    ids=lambda param: f"{param[1]}-{param[0]}",
)
def rated_film(request, tmp_path_factory) -> tuple:
    """A film of 4.5 seconds, its frames per second, and what it says of its duration."""
    suffix, fps = request.param
    num = int(4.5 * fps)
    path = tmp_path_factory.mktemp("rated") / f"film.{suffix}"
    write_film(path, num, fps, *FILMS[suffix])
    seconds = Fraction(num) / fps
    if suffix == "webm":  # it stores none: up to the last frame's time, in milliseconds
        seconds = Fraction(round((num - 1) / fps * 1000), 1000)
    return path, fps, seconds


def test_clips_of_2_7_seconds_have_exactly_the_right_frames(rated_film):
    path, _, seconds = rated_film
    starts = [Fraction(i, 5) for i in (2, 0, 4, 5)]  # in any order
    read = omnimae.read_clips(path, starts, 16)
    for start, clip in zip(starts, read, strict=True):
        begin = start * (seconds - Fraction(2.7))
        assert numbers_in(clip) == right_frames(path, begin, 2.7, 16), start


def test_a_clip_may_begin_at_any_time(rated_film):
    path, fps, _ = rated_film
    frame = Fraction(12) / fps  # with a frame, or just after it
    for begin in (0, 1.25, frame, frame + Fraction(1, 10**6)):
        clip = omnimae.read_clip(path, begin, 2.7, 16)
        assert numbers_in(clip) == right_frames(path, begin, 2.7, 16), begin


def test_a_clip_spans_the_float_2_7_a_little_more_than_27_tenths(tmp_path):
    path = write_film(tmp_path / "film.mp4", 60, fps=10)
    clip = omnimae.read_clips(path, [0], 28)[0]
    assert numbers_in(clip) == list(range(28))  # with the frame at 27 tenths of a second


def last_second(path: Path) -> list[int]:
    """The frames of a film's last clip, which ends, excluded, with the film's duration."""
    clip = omnimae.read_clips(path, [1], 10, clip_seconds=1.0)[0]
    return numbers_in(clip)


@pytest.mark.parametrize(
    ("suffix", "num", "last"), [("mp4", 60, 59), ("mkv", 60, 58), ("mkv", 59, 57), ("mkv", 58, 56)]
)
def test_an_mp4_ends_after_its_last_frame_an_mkv_with_it(suffix, num, last, tmp_path):
    options = {"x264-params": "bframes=3:b-adapt=0"}  # the last may be before others in the file
    path = write_film(tmp_path / f"film.{suffix}", num, 10, "libx264", options)
    assert last_second(path) == list(range(last - 9, last + 1))


def test_a_films_time_begins_with_its_first_frame(tmp_path):  # in FLV, later than 0
    path = write_film(tmp_path / "film.flv", 60, 10, "libx264", {"bf": "2"})
    assert last_second(path) == list(range(49, 59))


def copy_video(film: Path, container, first_packet: int = 0) -> None:
    """Copies a film's compressed frames into an open container."""
    with av.open(str(film)) as source:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(video=0))[first_packet:]:
            if packet.dts is not None:  # the last packet is an empty one
                packet.stream = stream
                container.mux(packet)


def test_a_live_recording_lasts_until_its_last_frames_time(tmp_path):
    film = write_film(tmp_path / "film.mkv", 60, 10, "libx264", {"g": "10", "bf": "0"})
    path = tmp_path / "live.mkv"
    with av.open(str(path), "w", options={"live": "1"}) as container:  # stores no duration
        copy_video(film, container)
    assert last_second(path)[-1] == 58


@pytest.mark.parametrize(("suffix", "last"), [("mp4", 59), ("mkv", 58)])
def test_sound_that_lasts_longer_does_not_count(suffix, last, tmp_path):
    film = write_film(tmp_path / "film.mp4", 60, fps=10)  # 6 seconds
    path = tmp_path / f"with_sound.{suffix}"
    samples = np.zeros((1, 8000 * 20), np.int16)  # 20 seconds
    silence = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
    silence.sample_rate = 8000
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        copy_video(film, container)
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    assert last_second(path)[-1] == last


SEEKS = {  # films in which a seek lands before or after the wanted frame
    "open_gop.mp4": ("libx264", 12, {"bf": "3", "x264-params": "open-gop=1:keyint=10"}),
    "one_keyframe.ts": ("libx264", 12, {"g": "250", "bf": "3", "b-adapt": "0"}),
    "open_gop.mpg": ("mpeg2video", 24, {"g": "10", "bf": "2"}),
}


@pytest.mark.parametrize("name", SEEKS)
def test_the_frames_are_right_wherever_a_seek_lands(name, tmp_path):
    codec, fps, options = SEEKS[name]
    path = write_film(tmp_path / name, 60, fps, codec, options)
    for start in (0, 0.1, 0.5, 0.84, 1, 1.5, 1.9):
        clip = omnimae.read_clip(path, start, 0.5, 8)
        assert numbers_in(clip) == right_frames(path, start, 0.5, 8), start


@pytest.mark.parametrize("suffix", FILMS)
def test_a_short_video_has_one_clip_and_repeats_frames(suffix, tmp_path):
    path = write_film(tmp_path / f"film.{suffix}", 3, 12, *FILMS[suffix])
    for clip in omnimae.read_clips(path, [0, Fraction(4, 5), 1], 8):
        assert clip.dtype == torch.uint8
        assert numbers_in(clip) == [0, 0, 0, 0, 1, 1, 1, 2]


# --- Gaps in time, as in recordings of a screen, which have a frame where something changes.


@pytest.fixture(scope="module", params=FILMS)
def screen_recording(request, tmp_path_factory) -> Path:
    """A frame where something changes: 0 to 10 in the first second, 11 to 13 from second 12."""
    codec, options = FILMS[request.param]
    times = [*range(0, 1001, 100), 12_000, 12_100, 12_200]  # in milliseconds
    path = tmp_path_factory.mktemp("screen") / f"screen.{request.param}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = 32, 64
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for pts, frame in zip(times, numbered_frames(len(times)), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.time_base = Fraction(1, 1000)
            picture.pts = pts
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def test_in_a_gap_a_clip_is_the_frame_on_screen(screen_recording):
    for start in (1.05, 5, 9.2):
        clip = omnimae.read_clip(screen_recording, start, 2.7, 4)
        assert numbers_in(clip) == [10] * 4, start


def test_beside_a_gap_a_clip_has_only_frames_inside_it(screen_recording):
    before = omnimae.read_clip(screen_recording, 0.85, 2.7, 4)
    after = omnimae.read_clip(screen_recording, 10.0, 2.7, 6)
    assert numbers_in(before) == [9, 9, 9, 10]
    assert numbers_in(after) == [11, 11, 11, 12, 12, 13]


def test_a_film_cut_between_keyframes_begins_with_its_first_whole_frame(tmp_path):
    options = {"x264-params": "keyint=10:scenecut=0:bframes=0"}
    film = write_film(tmp_path / "film.mp4", 40, 10, "libx264", options)
    path = tmp_path / "cut.ts"
    with av.open(str(path), "w") as container:
        copy_video(film, container, first_packet=3)
    clip = omnimae.read_clip(path, 0, 0.2, 2)
    assert numbers_in(clip) == [10, 10]  # the second keyframe


# --- Films as phones and other programs write them


def test_cover_art_is_not_the_film(tmp_path):
    film = write_film(tmp_path / "film.mp4", 24)
    path = tmp_path / "tagged.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width = 200, 200
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        copy_video(film, container)
        container.mux(cover.encode(av.VideoFrame(200, 200, "yuvj420p")))
        container.mux(cover.encode(None))

    # The cover is the last box of all: put it before the film, as other programs do.
    file = path.read_bytes()
    boxes = file.rindex(b"moov") + 4
    cover = file.rindex(b"udta") - 4
    path.write_bytes(file[:boxes] + file[cover:] + file[boxes:cover])
    with av.open(str(path)) as container:
        assert container.streams.video[0].width == 200
    clip = omnimae.read_clip(path, 0, 1, 12)
    assert numbers_in(clip) == list(range(12))


def test_tags_that_are_not_utf_8_are_ignored(tmp_path):
    film = write_film(tmp_path / "film.avi", 24, 12, "mpeg4")
    path = tmp_path / "tagged.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "QQQQ"
        copy_video(film, container)
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\x8c\xff\x8e\x81"))
    same_bits(omnimae.read_clips(path, [0], 12), omnimae.read_clips(film, [0], 12))


TURNED = {  # a pixel at (x, y) is shown at (a x + c y, b x + d y)
    (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),  # clockwise, as phones held upright
    (0, -1, 1, 0): lambda picture: np.rot90(picture, 1),
    (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
    (-1, 0, 0, 1): lambda picture: picture[:, ::-1],  # mirrored, as of front cameras
}


@pytest.mark.parametrize("matrix", TURNED, ids=str)
def test_a_film_is_turned_and_mirrored_as_it_is_to_be_shown(matrix, tmp_path):
    picture = np.full((32, 64, 3), 40, np.uint8)
    picture[:, :16] = (220, 20, 20)  # red at the left, green at the bottom
    picture[24:] = (20, 200, 20)
    path = write_video(tmp_path / "phone.mp4", [picture] * 10, fps=10)
    file = bytearray(path.read_bytes())
    start = file.index(b"tkhd") + 4 + 40  # of the matrix in the track's header
    a, b, c, d = np.array(matrix) * 2**16
    file[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(file)

    clip = omnimae.read_clip(path, 0, 1, 3)
    wanted = TURNED[matrix](picture).astype(float)
    for frame in clip.permute(0, 2, 3, 1).numpy():
        assert frame.shape == wanted.shape
        assert np.abs(frame - wanted).mean() < 8


def test_a_file_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    write_film(tmp_path / "film.mp4", 12).rename(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert numbers_in(omnimae.read_clip("12:30.mp4", 0, 1, 12)) == list(range(12))


@pytest.mark.parametrize("fault", ["empty", "text", "cut"])
def test_a_broken_film_is_an_error_that_names_it(fault, tmp_path):
    path = write_film(tmp_path / "bad.mp4", 24)
    break_file(path, fault)
    with pytest.raises(UserError, match="bad.mp4"):
        omnimae.read_clips(path, [0, 0.5], 4)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_long_film_is_not_read_whole_for_a_clip(suffix, tmp_path):
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    noise = np.random.default_rng(0).integers(0, 256, (200, 96, 128, 3), np.uint8)  # 20 seconds
    path = write_video(tmp_path / f"long.{suffix}", noise, 10, "mjpeg", pix_fmt="yuvj420p")
    before = bytes_read()
    omnimae.read_clips(path, [0.5], 4, clip_seconds=1.0)
    assert bytes_read() - before < path.stat().st_size / 3


def test_sound_with_a_cover_is_no_film(tmp_path):
    path = tmp_path / "song.m4v"
    with av.open(str(path), "w", format="mp4") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = 64
        cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        picture = np.zeros((64, 64, 3), np.uint8)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(cover.encode(None))
    with pytest.raises(UserError, match="song.m4v"):
        omnimae.read_clip(path, 0, 1, 2)


# ------------------------------------------------------------------------------------------------
# The files of data sets, as people download them


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_imagenet_has_a_folder_for_each_class(tmp_path):
    training = ["train/n01/c.JPEG", "train/n02/a.JPEG", "train/n02/b.JPEG"]
    validation = ["val/n01/e.JPEG", "val/n02/d.JPEG"]
    touch(tmp_path, *reversed(training), *reversed(validation))
    for split, names in {"train": training, "val": validation}.items():
        listing = train.list_media(tmp_path, "images", split)
        assert listing.paths == [f"{tmp_path}/{name}" for name in names]
        assert listing.labels == [["n01", "n02"].index(name.split("/")[1]) for name in names]
        assert listing.classes == ["n01", "n02"]


SSV2 = "20bn-something-something-v2"


@pytest.fixture
def ssv2(tmp_path) -> Path:
    """SSv2's lists, with eleven classes, and its folder, in which one video is missing."""
    touch(tmp_path, "labels/x", f"{SSV2}/3.mp4", f"{SSV2}/5.webm")
    seventh = {"id": "7", "template": "Class [number] 10"}
    third = {"id": "3", "template": "Class [number] 9"}
    fifth = {"id": "5", "template": "[Class] number [2]"}
    names = {f"Class number {i}": str(i) for i in (10, *range(10))}
    lists = {"labels": names, "train": [seventh, third], "validation": [fifth]}
    for name, content in lists.items():
        (tmp_path / f"labels/{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_ssv2_lists_its_videos_in_its_order_with_their_formats(ssv2):
    paths = train.list_media(ssv2, "videos").paths
    assert paths == [f"{ssv2}/{SSV2}/7.webm", f"{ssv2}/{SSV2}/3.mp4"]
    paths = train.list_media(ssv2, "videos", "val").paths
    assert paths == [f"{ssv2}/{SSV2}/5.webm"]


def test_ssv2_labels_a_video_by_its_template(ssv2):
    for split, labels in {"train": [10, 9], "val": [2]}.items():
        listing = train.list_media(ssv2, "videos", split)
        assert listing.labels == labels
        assert listing.classes == [f"Class number {i}" for i in range(11)]


def test_ssv2s_first_lists_are_an_error_that_tells_the_new_names(ssv2):
    old = "something-something-v2-labels.json"
    (ssv2 / "labels/labels.json").rename(ssv2 / "labels" / old)
    with pytest.raises(UserError, match=rf"labels\.json.*{old}"):
        train.list_media(ssv2, "videos")


def test_ssv2_without_its_folder_of_videos_is_an_error_that_names_it(ssv2):
    (ssv2 / SSV2).rename(ssv2 / "videos")
    with pytest.raises(UserError, match=SSV2):
        train.list_media(ssv2, "videos")


def test_an_empty_list_of_videos_is_an_error_that_names_it(ssv2):
    (ssv2 / "labels/validation.json").write_text("[]")
    with pytest.raises(UserError, match="validation.json"):
        train.list_media(ssv2, "videos", "val")


def test_a_template_of_no_class_is_an_error_that_names_the_list(ssv2):
    samples = [{"id": "7", "template": "Class [number] 99"}]
    (ssv2 / "labels/train.json").write_text(json.dumps(samples))
    with pytest.raises(UserError, match=r"train\.json"):
        train.list_media(ssv2, "videos")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_files_beside_train_are_for_validation(name, tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", f"{name}/a/3.jpg", f"{name}/b/4.jpg")
    listing = train.list_media(tmp_path, "images", "val")
    assert listing.paths == [f"{tmp_path}/{name}/a/3.jpg", f"{tmp_path}/{name}/b/4.jpg"]
    assert len(train.list_media(tmp_path, "images").paths) == 2


def test_test_is_used_only_where_there_is_no_val(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "test/a/2.jpg", "val/a/3.jpg")
    listing = train.list_media(tmp_path, "images", "val")
    assert listing.paths == [f"{tmp_path}/val/a/3.jpg"]


@pytest.mark.parametrize("held_out", ["val/a/3.jpg", "val/3.jpg"])
def test_val_beside_class_folders_is_held_out_and_no_class(held_out, tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg", held_out)
    listing = train.list_media(tmp_path, "images")
    assert listing.paths == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b/2.jpg"]
    assert listing.classes == ["a", "b"]
    assert train.list_media(tmp_path, "images", "val").paths == [f"{tmp_path}/{held_out}"]


def test_without_train_a_folder_called_test_is_a_class(tmp_path):
    touch(tmp_path, "exam/1.jpg", "test/2.jpg", "valid/3.jpg")
    listing = train.list_media(tmp_path, "images")
    assert listing.classes == ["exam", "test", "valid"]
    assert train.validation_split(tmp_path, "images") is None


def test_a_class_called_train_does_not_hide_the_others(tmp_path):
    touch(tmp_path, "bus/1.jpg", "train/1.jpg", "val/1.jpg")
    with pytest.raises(UserError, match="train/ and bus/"):
        train.list_media(tmp_path, "images")


def test_flat_splits_may_have_other_folders_beside_them(tmp_path):
    touch(tmp_path, "train/1.jpg", "val/2.jpg", "notes/3.txt")
    assert train.list_media(tmp_path, "images").paths == [f"{tmp_path}/train/1.jpg"]


def test_no_validation_split_is_an_error_that_names_val(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    with pytest.raises(UserError, match="val/"):
        train.list_media(tmp_path, "images", "val")


def test_other_data_sets_are_folders_of_classes(tmp_path):
    touch(tmp_path, "b/2.MP4", "a/1.webm", "b/1.mov")
    touch(tmp_path, "b/notes.txt", "b/.hidden.mp4", ".trash/3.mp4")  # these are skipped
    listing = train.list_media(tmp_path, "videos")
    assert listing.paths == [f"{tmp_path}/{x}" for x in ("a/1.webm", "b/1.mov", "b/2.MP4")]
    assert listing.labels == [0, 1, 1]
    assert listing.classes == ["a", "b"]


def test_a_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "2.png", "1.jpg", "a.mp4", "notes/readme.txt")
    paths = [f"{tmp_path}/1.jpg", f"{tmp_path}/2.png"]
    assert train.list_media(tmp_path, "images") == (paths, None, None)


@pytest.mark.parametrize(
    ("kind", "suffixes"),
    [
        ("images", ".JPEG .jfif .jpe .avif .jp2"),
        ("videos", ".webm .3gp .flv .mts .m2ts .vob .asf .ogv"),
    ],
)
def test_files_of_the_less_common_formats_are_listed(kind, suffixes, tmp_path):
    root = touch(tmp_path, *[f"a{suffix}" for suffix in suffixes.split()])
    assert len(train.list_media(root, kind).paths) == len(suffixes.split())


def test_a_folder_is_the_same_data_set_however_it_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    fingerprints = set()
    for root in (f"{tmp_path}", f"{tmp_path}/", ".", "./"):
        paths = train.list_media(root, "images").paths
        fingerprints.add(train.fingerprint_of_files(paths, root))
    assert len(fingerprints) == 1


def test_a_description_counts_files_classes_and_skipped_files(tmp_path, capsys):
    touch(tmp_path, "n01/1.jpg", "n02/1.jpg", "n02/2.jpg", "n03/1.jpg")
    touch(tmp_path, "n01/2.heic", "n03/3.HEIC", "n03/readme", "n03/deep/1.jpg", "n03/.hidden")
    listing = train.list_media(tmp_path, "images")
    train.describe(listing, "images", "folder", Namespace(rank=0, say=print))
    text = " ".join(capsys.readouterr().out.split())
    for part in ("4 images", "3 classes", "n01", "n03", "1 to 2", "4 skipped", ".heic 2"):
        assert part in text
    assert "folders 1" in text


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["1.heic", "2.heic", "readme.txt"], ".heic 2"),
        (["cat/1.jpg", "dog/1.heic"], "dog; 1 skipped"),
        (["1.jpg", "cat/2.jpg"], "found 1 in it"),  # flat, and with a class
        (["x/train/a/1.jpg", "x/val/a/1.jpg"], "folders: x"),  # the folder above the data set
        (["a/1.jpg", "b/more/1.jpg"], "folders: b"),  # a class with folders in it
    ],
)
def test_another_layout_is_an_error_that_names_what_was_found(names, word, tmp_path):
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        train.list_media(tmp_path, "images")
    assert word in str(error.value)


# ------------------------------------------------------------------------------------------------
# Runs of a tiny model


@pytest.fixture
def run_script(data, tmp_path):
    """Runs a script's main in this process on the small data. Returns the run's folder."""

    def run(script, *options, out="run", images=False, videos=False) -> Path:
        options = [*options, "--out", tmp_path / out, "--device", "cpu", "--workers", 0]
        if images:
            options += ["--images", data / "images"]
        if videos:
            options += ["--videos", data / "videos"]
        argv = [str(option) for option in options]
        script.main(script.parse_args(argv))
        return tmp_path / out

    return run


@pytest.fixture
def few(tmp_path) -> Path:
    """A folder of eight small images."""
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(8):
        noise = PIL.Image.effect_noise((40, 40), 50)
        noise.convert("RGB").save(folder / f"{i}.png")
    return folder


@pytest.fixture
def pretrain(run_script, few):
    """Pretrains a tiny model on eight images, all in one step, for one epoch."""

    def run(*options, out="run") -> Path:
        common = ["--model", "tiny", "--images", few, "--batch-size", 8, "--epochs", 1]
        return run_script(train, *common, "--log-every", 1, *options, out=out)

    return run


@pytest.fixture
def adamw(monkeypatch) -> list:
    """Records AdamW's groups at each step."""
    steps = []

    def record(_, optimizer):
        steps.append([dict(group) for group in optimizer.param_groups])

    spy_on(monkeypatch, torch.optim.AdamW, "step", record)
    return steps


@pytest.fixture
def attention(monkeypatch) -> list:
    """Records the dtype of each attention."""
    dtypes = []
    name = "scaled_dot_product_attention"
    spy_on(monkeypatch, F, name, lambda _, q, k, v: dtypes.append(q.dtype))
    return dtypes


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return omnimae.read_checkpoint(run / "last.pt")["model"]


def log_of(run: Path, field: str) -> list:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[field] for line in lines if field in line]


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory) -> Namespace:
    """An epoch on the small data, in steps of 16 views: 3 of images, 2 of videos."""
    run = Namespace(groups=[], films=[])
    run.folder = tmp_path_factory.mktemp("whole") / "run"

    def record_step(_, optimizer):
        run.groups.append([dict(group) for group in optimizer.param_groups])

    def record_open(_, path, *args, **options):
        run.films.append(path)

    options = f"--images {data}/images --videos {data}/videos --out {run.folder} --model tiny"
    options += " --batch-size 16 --epochs 1 --log-every 1 --seed 3 --device cpu --workers 0"
    with pytest.MonkeyPatch.context() as patch:
        spy_on(patch, torch.optim.AdamW, "step", record_step)
        spy_on(patch, av, "open", record_open)
        train.main(train.parse_args(options.split()))
    return run


# ------------------------------------------------------------------------------------------------
# Which files are read when

FILES = {"images": 48, "videos": 32}
VIEWS = {"images": 1, "videos": 4}  # of a file


def steps_of(epochs=3, seed=0) -> train.Steps:
    """The steps of a run with batches of 16. An epoch has 3 of images and 2 of videos."""
    return train.Steps(FILES, VIEWS, 16, epochs, seed)


def cut_of(model="tiny", device="cpu", world=1, num_files=FILES, rank=0, **options) -> tuple:
    """How a run's steps are cut, and the process that cuts them."""
    args = Namespace(**{"batch_size": 16, "micro_batch": None} | options)
    ranks = Namespace(rank=rank, world=world, device=torch.device(device))
    cfg = omnimae.MODELS[model]
    return train.cut_batch(args, num_files, VIEWS, train.MICRO_BATCH, cfg, ranks), ranks


def pieces_of(steps: train.Steps, first_step=0, **more) -> list[list[train.Sample]]:
    """What the loader of a process reads."""
    cut, ranks = cut_of(**more)
    return list(steps.pieces(first_step, cut, ranks))


def epochs_of(steps: train.Steps) -> list[list]:
    """The kind and the files of each step, for each epoch."""
    epochs = []
    for first in range(0, steps.total, 5):
        epochs.append([steps.at(step) for step in range(first, first + 5)])
    return epochs


def test_a_step_has_one_kind_and_a_batch_of_views():
    for piece in pieces_of(steps_of()):  # a piece has all of a step: the tiny model takes 16 views
        kind = piece[0].kind
        assert {sample.kind for sample in piece} == {kind}
        assert {sample.views for sample in piece} == {VIEWS[kind]}
        assert sum(sample.views for sample in piece) == 16


def test_an_epoch_has_as_many_views_as_there_are_files():
    epochs = epochs_of(steps_of(epochs=20))
    assert len(epochs) == 20
    for number, epoch in enumerate(epochs):
        files = {"images": [], "videos": []}
        for kind, in_epoch, indices in epoch:
            assert in_epoch == number
            files[kind] += indices.tolist()
        assert sorted(files["images"]) == list(range(48))
        assert len(set(files["videos"])) == len(files["videos"]) == 32 / 4


def test_in_the_end_every_video_is_used():
    files = set()
    for kind, _, indices in map(steps_of(epochs=20).at, range(100)):
        if kind == "videos":
            files |= set(indices.tolist())
    assert files == set(range(32))


def test_the_kinds_take_turns_in_random_order():
    orders = set()
    for epoch in epochs_of(steps_of(epochs=40)):
        orders.add("".join(kind[0] for kind, _, _ in epoch))
    assert 6 <= len(orders) <= 10  # 3 and 2 steps have 10 orders


@pytest.mark.parametrize("kind", train.KINDS)
def test_the_order_of_files_differs_by_seed_and_epoch(kind):
    firsts = set()
    for seed in (0, 1):
        for epoch in epochs_of(steps_of(epochs=20, seed=seed)):
            files = [indices for step_kind, _, indices in epoch if step_kind == kind]
            firsts.add(tuple(files[0]))
    assert len(firsts) == 40


def test_an_epoch_has_a_step_of_each_kind_even_of_few_files():
    steps = train.Steps({"images": 640, "videos": 32}, VIEWS, 64, 1, 0)  # 32 videos: 128 views
    kinds = [steps.at(step)[0] for step in range(steps.total)]
    assert sorted(kinds) == 10 * ["images"] + ["videos"]


@pytest.mark.parametrize("model", ["tiny", "vit_b"])
@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_processes_and_micro_batches_share_a_steps_files(world, micro_batch, model):
    steps = steps_of()
    loaders = []
    for rank in range(world):
        pieces = pieces_of(steps, rank=rank, world=world, micro_batch=micro_batch, model=model)
        loaders.append([sample for piece in pieces for sample in piece])

    for step in range(steps.total):
        kind, epoch, files = steps.at(step)
        read = []
        for samples in loaders:  # each reads the next part of the step's files
            for _ in range(len(files) // world):
                read.append(samples.pop(0))
        assert read == [train.Sample(kind, epoch, index, VIEWS[kind]) for index in files]
    assert loaders == [[]] * world


@pytest.mark.parametrize("step", [1, 7, 15])
def test_a_resumed_run_reads_what_an_unbroken_one_reads_from_there_on(step):
    resumed = pieces_of(steps_of(), first_step=step, micro_batch=4)  # four pieces a step
    assert resumed == pieces_of(steps_of(), micro_batch=4)[4 * step :]


def test_an_epoch_of_a_million_files_is_laid_out_at_once():
    began = time.process_time()
    steps = train.Steps({"images": 1_281_167, "videos": 168_913}, VIEWS, 2048, 800, 0)
    for step in range(100):
        steps.at(step)
    assert time.process_time() - began < 1


# ------------------------------------------------------------------------------------------------
# How a step is cut into what a device takes at once

MANY = {"images": 9999, "videos": 9999}


@pytest.mark.parametrize(
    ("model", "device", "images", "videos"),
    [
        ("vit_b", "cuda", 256, 64),
        ("vit_h", "cuda", 256, 64),
        ("vit_b", "cpu", 16, 16),
        ("demo", "cuda", 64, 64),
        ("demo", "cpu", 64, 64),
    ],
)
def test_a_device_takes_so_many_views_at_once(model, device, images, videos):
    for world in (1, 8):
        cut, _ = cut_of(model, device, world, MANY, batch_size=2048)
        for kind, views in {"images": images, "videos": videos}.items():
            files = cut[kind].pieces_per_micro_batch * cut[kind].files_per_piece
            assert files * VIEWS[kind] == views
            assert cut[kind].micro_batches == 2048 / world / views


@pytest.mark.parametrize("model", ["vit_b", "demo"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_whatever_the_batch_is_micro_batches_make_it_up(device, model):
    for batch_size in range(12, 600, 12):
        cut, _ = cut_of(model, device, 3, MANY, batch_size=batch_size)
        for kind, (micro_batches, pieces, files) in cut.items():
            assert micro_batches * pieces * files * VIEWS[kind] * 3 == batch_size


def test_a_default_micro_batch_is_the_largest_divisor_of_an_odd_batch():
    cut, _ = cut_of("vit_b", "cuda", 1, MANY, batch_size=300)
    assert cut["images"].micro_batches == 2  # of 150 images
    assert cut["videos"].micro_batches == 5  # of 15 videos, 60 views


@pytest.mark.parametrize(
    ("options", "largest"),
    [  # of 48 images and 32 videos
        ({"batch_size": 18}, 16),  # videos have 4 views
        ({"batch_size": 47, "world": 2}, 40),  # each process has 4 views
        ({"batch_size": 64}, 48),  # there are 48 images
        ({"batch_size": 44, "micro_batch": 12}, 36),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error_that_names_the_largest(options, largest):
    with pytest.raises(UserError, match=rf"--batch-size.*largest\D*\b{largest}\b"):
        cut_of(**options)
    cut_of(**options | {"batch_size": largest})


def test_a_batch_is_an_error_where_none_fits():
    with pytest.raises(UserError, match="--batch-size.*none"):
        cut_of(batch_size=2)


def test_a_micro_batch_of_part_of_a_videos_views_is_an_error():
    with pytest.raises(UserError, match="--micro-batch 5.*4"):
        cut_of(micro_batch=5)


def test_a_micro_batch_is_joined_from_pieces_in_their_order():
    numbers = torch.arange(12).view(2, 3, 2)  # 2 pieces of 3 files of 2 views
    pieces = iter([[piece, 10 * piece] for piece in numbers])
    one, other = train.join_pieces(pieces, 2, torch.device("cpu"))
    assert one.tolist() == list(range(12))
    assert other.tolist() == list(range(0, 120, 10))


@pytest.fixture
def gradients(monkeypatch) -> list:
    """Records the gradient of the first parameters at each step of AdamW."""
    recorded = []

    def record(_, optimizer):
        recorded.append(optimizer.param_groups[0]["params"][0].grad.clone())

    spy_on(monkeypatch, torch.optim.AdamW, "step", record)
    return recorded


def test_gradient_and_loss_are_means_over_micro_batches(pretrain, gradients):
    whole = pretrain(out="whole")
    parts = pretrain("--micro-batch", 2, out="parts")
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
    assert log_of(parts, "loss") == pytest.approx(log_of(whole, "loss"), abs=1e-5)


def test_finetunings_gradient_and_loss_are_means_over_micro_batches(finetuned, gradients):
    options = ["--batch-size", 48, "--augment", "crop", "--drop-path", 0]
    whole = finetuned("images", *options, out="whole")
    parts = finetuned("images", *options, "--micro-batch", 12, out="parts")
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
    assert log_of(parts, "loss") == pytest.approx(log_of(whole, "loss"), abs=1e-5)


@pytest.mark.parametrize(("script", "model"), [(train, OmniMAE), (finetune, Classifier)])
def test_models_are_trained_on_normalised_pixels(script, model, run_script, monkeypatch):
    inputs = []
    spy_on(monkeypatch, model, "forward", lambda _, model, x, *more: inputs.append(x))
    options = ["--model", "tiny", "--epochs", 1, "--batch-size", 48]
    if script is finetune:
        options += ["--checkpoint", "scratch", "--augment", "crop"]
    run_script(script, *options, images=True)

    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for x in inputs:
        pixels = 255 * (x * std + mean)
        torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)  # whole numbers
        assert pixels.max() > 200


@pytest.mark.parametrize("batch_size", [100, 2048])
def test_a_worker_reads_at_most_32_images_or_one_video_at_a_time(batch_size):
    cut, _ = cut_of("vit_b", "cuda", 1, MANY, batch_size=batch_size)
    assert 32 % cut["images"].files_per_piece == 0
    assert cut["videos"].files_per_piece == 1


# ------------------------------------------------------------------------------------------------
# Learning rate, AdamW and precision


@pytest.mark.parametrize(
    ("options", "epochs", "batch_size", "lr"),
    [
        ("--images x", 800, 2048, 1.6e-3),
        ("--images x --batch-size 512", 800, 512, 0.4e-3),
        ("--images demo", 12, 64, 0.05e-3),
        ("--model demo", 12, 64, 6e-4),
        ("--model demo --images x --batch-size 128 --epochs 3 --lr 0.5", 3, 128, 0.5),
    ],
)
def test_the_default_rate_is_proportional_to_the_batch_size(options, epochs, batch_size, lr):
    args = train.parse_args(options.split())
    assert (args.epochs, args.batch_size) == (epochs, batch_size)
    assert args.lr == pytest.approx(lr)
    assert args.video_views == 4


def test_without_a_data_set_both_are_the_demo():
    args = train.parse_args(["--model", "demo"])
    assert (args.images, args.videos) == ("demo", "demo")
    args = train.parse_args(["--videos", "x"])
    assert (args.images, args.videos) == (None, "x")


def test_each_step_uses_and_logs_the_scheduled_rate(whole_run):
    peak = 1.6e-3 * 16 / 2048
    rates = [1e-6]
    for step in range(1, 5):
        angle = math.pi * (step / 5 - 0.05) / 0.95
        rates.append(peak * (1 + math.cos(angle)) / 2)
    for groups in zip(*whole_run.groups):
        assert [group["lr"] for group in groups] == pytest.approx(rates)
    assert log_of(whole_run.folder, "lr") == pytest.approx(rates)


def test_the_rate_grows_linearly_in_the_first_twentieth_of_the_steps():
    first, half, peak = (train.learning_rate(step, 1000, 1.6e-3) for step in (0, 25, 50))
    assert first == 1e-6
    assert half == pytest.approx((1e-6 + 1.6e-3) / 2)
    assert peak == pytest.approx(1.6e-3)


def test_the_weights_that_adamw_decays_are_matrices(whole_run):
    shapes = {0.0: [], 0.05: []}
    for group in whole_run.groups[0]:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
        shapes[group["weight_decay"]] += [tuple(x.shape) for x in group["params"]]

    expected = {0.0: [], 0.05: []}
    for name, parameter in OmniMAE(TINY).named_parameters():
        is_spared = name.endswith("bias") or "norm" in name
        expected[0.0 if is_spared else 0.05].append(tuple(parameter.shape))
    for decay in (0.0, 0.05):
        assert sorted(shapes[decay]) == sorted(expected[decay])


@pytest.mark.parametrize(
    ("model", "is_fast", "dtype"),
    [
        ("demo", True, torch.float32),
        ("vit_b", False, torch.float32),
        ("vit_b", True, torch.bfloat16),
    ],
)
def test_cpus_use_bfloat16_where_it_is_fast(model, is_fast, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_fast)
    autocast, _ = train.precision(None, torch.device("cpu"), omnimae.MODELS[model])
    with autocast:
        product = torch.ones(1, 1) @ torch.ones(1, 1)
    assert product.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_float16_scales_the_loss(dtype):
    _, scaler = train.precision(dtype, torch.device("cpu"), omnimae.MODELS["vit_b"])
    assert scaler.is_enabled() == (dtype == "float16")


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_gpus_without_bfloat16_use_float16(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    autocast, _ = train.precision(None, torch.device("cuda"), omnimae.MODELS["vit_b"])
    assert autocast.fast_dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("script", "dtype"), [(train, "float16"), (finetune, "bfloat16")])
def test_a_given_dtype_is_used(script, dtype, run_script, attention):
    options = ["--model", "tiny", "--epochs", 1, "--batch-size", 48, "--dtype", dtype]
    if script is finetune:
        options += ["--checkpoint", "scratch"]
    run_script(script, *options, images=True)  # with validation
    assert set(attention) == {getattr(torch, dtype)}


def test_evaluation_uses_a_given_dtype(run_script, attention, tmp_path):
    checkpoint = save_classifier(tmp_path / "model.pt", 8, sorted(train.SHAPES))
    run_script(evaluation, "--checkpoint", checkpoint, "--dtype", "bfloat16", images=True)
    assert set(attention) == {torch.bfloat16}


def test_checkpointed_activations_are_computed_twice_and_change_no_bit(pretrain, attention):
    one = pretrain(out="one")
    num = len(attention)
    other = pretrain("--checkpoint-activations", out="other")
    assert len(attention) == num + num + 4  # the four blocks in the one step
    same_bits(weights_of(one), weights_of(other))


# ------------------------------------------------------------------------------------------------
# Views: the crops that are trained on


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> dict[str, str]:
    """An image and a film whose pixels encode their position: red 4 x, green 4 y, blue is noise."""
    folder = tmp_path_factory.mktemp("maps")
    y, x = np.mgrid[:60, :60]
    noise = np.random.default_rng(0).integers(0, 256, (60, 60))
    pixels = np.stack([4 * x, 4 * y, noise], axis=2).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "map.png")
    film = write_video(folder / "map.mkv", 4 * [pixels], 2, "ffv1", pix_fmt="bgr0")
    return {"images": str(folder / "map.png"), "videos": str(film)}


def crop_of(view: torch.Tensor) -> tuple[list[int], bool]:
    """Where a map's view (3, 32, 32) was cut: top, left, height, width; and if it is flipped."""
    pixel = np.arange(6, 26) + 0.5  # away from the edges
    y_step, top = np.polyfit(pixel, view[1, 6:26, 16].float() / 4 + 0.5, 1)
    x_step, left = np.polyfit(pixel, view[0, 16, 6:26].float() / 4 + 0.5, 1)
    if x_step < 0:  # flipped: the left edge is at the end of the row
        left += 32 * x_step
    box = top, left, 32 * y_step, 32 * abs(x_step)
    return [round(side) for side in box], x_step < 0


@pytest.fixture
def rand_augment(monkeypatch) -> list:
    """RandAugment changes nothing; its calls are recorded as (operations, magnitude of 10)."""
    calls = []

    def forward(self, media):
        calls.append((self.num_ops, 10 * self.magnitude / (self.num_magnitude_bins - 1)))
        return media

    monkeypatch.setattr(v2.RandAugment, "forward", forward)
    return calls


def labelled(maps, kind: str, num: int, augment="full") -> list:
    """A map's view, label and box in each of the first `num` epochs of finetuning."""
    listing = train.Listing([maps[kind]], [0], [])
    files = finetune.Labelled(TINY, kind, listing, 0, augment)
    return [files[train.Sample(kind, epoch, 0, 1)] for epoch in range(num)]


@pytest.mark.parametrize(
    ("stage", "kind", "least"),  # of the file's area
    [
        ("pretraining", "images", 0.2),
        ("pretraining", "videos", 0.08),
        ("full", "images", 0.08),
        ("full", "videos", 0.08),
        ("crop", "images", 0.5),
        ("crop", "videos", 0.5),
    ],
)
def test_a_view_is_the_recipes_crop_and_flipped_only_in_images(
    stage, kind, least, maps, rand_augment
):
    if stage == "pretraining":
        files = train.Views(TINY, {kind: [maps[kind]]}, 0)
        views, _ = files[train.Sample(kind, 0, 0, 100)]
    else:
        views = torch.cat([view for view, _, _ in labelled(maps, kind, 100, stage)])
    if kind == "images":
        views = views[:, :, None]  # (B, 3, T, 32, 32)
    crops = [crop_of(view[:, 0]) for view in views]

    areas = [height * width / 60**2 for (_, _, height, width), _ in crops]
    assert least - 0.01 < min(areas) < least + 0.06
    assert max(areas) > 0.85
    proportions = [width / height for (_, _, height, width), _ in crops]
    assert 0.7 < min(proportions) < 0.85
    assert 1.18 < max(proportions) < 1.4

    flipped = np.mean([flip for _, flip in crops])
    assert 0.3 < flipped < 0.7 if kind == "images" else flipped == 0

    whole = omnimae.read_image(maps["images"])
    mode = v2.InterpolationMode("bicubic" if kind == "images" else "bilinear")
    for view, (box, flip) in list(zip(views, crops))[:20]:
        plain = v2.functional.resized_crop(whole, *box, [32, 32], mode, antialias=True)
        if flip:
            plain = plain.flip(2)
        assert torch.equal(view, plain[:, None].expand_as(view))  # the same in all frames


def view_of(maps, kind="images", seed=0, epoch=0, index=0, views=1) -> tuple:
    """Views of one of three copies of a map, and their visible patches."""
    files = train.Views(TINY, {kind: [maps[kind]] * 3}, seed)
    return files[train.Sample(kind, epoch, index, views)]


def test_views_of_other_seeds_epochs_and_files_differ_in_crop_and_mask(maps):
    views = [view_of(maps)]
    views += [view_of(maps, **{name: 1}) for name in ("seed", "epoch", "index")]
    assert len({str(pixels.tolist()) for pixels, _ in views}) == 4
    assert len({str(visible.tolist()) for _, visible in views}) == 4


def test_a_view_does_not_depend_on_what_was_read_before(maps):
    one = view_of(maps)
    torch.manual_seed(7)
    same_bits(view_of(maps), one)


def test_workers_read_in_order_what_the_main_process_would(maps):
    views = train.Views(TINY, {"images": [maps["images"]]}, 0)
    pieces = [[train.Sample("images", epoch, 0, 1)] * 2 for epoch in range(4)]
    loaders = []
    for num in (0, 2):
        args = Namespace(workers=num)
        loaders.append(train.make_loader(views, args, train.Ranks("cpu"), pieces, read_ahead=1))
    for one, other in zip(*loaders, strict=True):
        same_bits(one, other)


@pytest.mark.parametrize("kind", train.KINDS)
def test_each_view_of_a_file_has_its_own_crop_and_mask(kind, maps):
    pixels, visible = view_of(maps, kind, views=4)
    assert visible.shape == (4, 4)  # of an image's 16 at 0.75, of a clip's 32 at 0.90
    assert len({str(x.tolist()) for x in pixels}) == 4
    assert len({str(x.tolist()) for x in visible}) == 4


def test_a_step_decodes_each_video_once_for_four_views(whole_run):
    # Two steps of 16 views; after each of the five steps the eight held-out videos.
    assert len(whole_run.films) == 2 * 4 + 5 * 8


def test_training_clips_start_anywhere_from_the_first_to_the_last_second(tmp_path):
    film = write_film(tmp_path / "film.mp4", 60)  # 5 seconds
    views = train.Views(TINY, {"videos": [str(film)]}, 0)
    begins = []
    for epoch in range(60):
        clip, _ = views.read(train.Sample("videos", epoch, 0, 1))
        begins.append(numbers_in(clip)[0])
    assert min(begins) <= 3
    assert 25 <= max(begins) <= 28  # 28: the first after 2.3 s
    assert len(set(begins)) > 15


@pytest.mark.parametrize(("seconds", "last"), [(2.7, 32), (1.0, 11)])
def test_a_training_clip_spans_the_models_clip_seconds(seconds, last, tmp_path):
    film = write_film(tmp_path / "film.mp4", 60)  # 12 frames a second
    cfg = replace(TINY, clip_seconds=seconds)
    clip, _ = train.Views(cfg, {"videos": [str(film)]}, 0).read(train.Sample("videos", 0, 0, 1))
    numbers = numbers_in(clip)
    assert last - 1 <= numbers[-1] - numbers[0] <= last


def test_an_unreadable_file_is_named_and_replaced_with_the_others_label(few, capsys):
    paths = [f"broken{i}.jpg" for i in range(8)]
    paths += train.list_media(few, "images").paths
    listing = train.Listing(paths, range(16), [])
    files = finetune.Labelled(TINY, "images", listing, 0, "crop")
    used = []
    for epoch in range(20):
        _, label, _ = files[train.Sample("images", epoch, 0, 1)]
        used.append(int(label))
    assert min(used) >= 8  # none of the broken ones
    assert len(set(used)) > 3  # at random
    assert "broken0.jpg" in capsys.readouterr().err


def test_twenty_unreadable_files_in_a_row_are_an_error(capsys):
    views = train.Views(TINY, {"images": [f"broken{i}.jpg" for i in range(25)]}, 0)
    with pytest.raises(UserError, match="20 images"):
        views[train.Sample("images", 0, 0, 1)]
    assert len(capsys.readouterr().err.splitlines()) == 20


def tensors_in(batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, list | tuple):
        return [x for part in batch for x in tensors_in(part)]
    return []


def tensors_shared_by_a_worker(loader) -> list:
    """Whether a worker's tensors are in shared memory when they leave its collate function. Moved
    there later, in a thread of the worker, a lack of memory would go unreported."""
    collate = loader.collate_fn
    loader.collate_fn = lambda samples: [x.is_shared() for x in tensors_in(collate(samples))]
    return list(loader)


def test_pretrainings_pixels_and_indices_are_shared_by_the_worker(maps):
    views = train.Views(TINY, {"images": [maps["images"]]}, 0)
    samples = [[train.Sample("images", 0, 0, 1)] * 2]
    loader = train.make_loader(views, Namespace(workers=1), train.Ranks("cpu"), samples, 1)
    assert tensors_shared_by_a_worker(loader) == [[True, True]]


def test_finetunings_pixels_labels_and_boxes_are_shared_by_the_worker(maps):
    listing = train.Listing([maps["images"]], [0], ["a"])
    files = finetune.Labelled(TINY, "images", listing, 0, "full")
    samples = [[train.Sample("images", 0, 0, 1)] * 2]
    loader = train.make_loader(files, Namespace(workers=1), train.Ranks("cpu"), samples, 1)
    assert tensors_shared_by_a_worker(loader) == [[True, True, True]]


def test_evaluations_pixels_are_shared_by_the_worker(maps):
    listing = train.Listing([maps["videos"]], [0], ["a"])
    args = Namespace(workers=1)
    loader = evaluation.file_loader(listing, "videos", TINY, 1, args, train.Ranks("cpu"))
    assert tensors_shared_by_a_worker(loader) == [[True]]


# ------------------------------------------------------------------------------------------------
# What a run logs, draws and keeps


def test_a_run_logs_the_loss_of_each_step(whole_run):
    losses = log_of(whole_run.folder, "loss")
    assert len(losses) == 5
    assert all(0.5 < loss < 1.5 for loss in losses)  # targets have variance 1


def test_a_run_validates_on_the_same_held_out_files_each_time(whole_run):
    losses = log_of(whole_run.folder, "val_loss")
    zeros = log_of(whole_run.folder, "zero_loss")  # the loss of predicting 0 on the same views
    assert len(losses) == len(zeros) == 10
    assert all(0.5 < loss < 1.5 for loss in losses)
    assert all(0.97 < loss < 1 for loss in zeros)  # variance 1, divided by n - 1, of n = 128 values
    assert len(set(zeros[0::2])) == len(set(zeros[1::2])) == 1
    assert {"val images", "val videos"} < set(log_of(whole_run.folder, "label"))


def test_a_run_says_how_many_files_it_holds_out(run_script, capsys):
    options = ["--model", "tiny", "--epochs", 1, "--batch-size", 48]
    run_script(train, *options, images=True)
    assert re.search(r"held out\D*\b16 images", capsys.readouterr().out)


def test_a_run_validates_on_all_held_out_files_if_they_are_few(run_script, data, monkeypatch):
    read = set()
    spy_on(monkeypatch, omnimae, "read_image", lambda _, path: read.add(path))
    run_script(train, "--model", "tiny", "--epochs", 1, "--batch-size", 48, images=True)
    held_out = train.list_media(data / "images", "images", "val").paths
    assert len(held_out) == 16
    assert set(held_out) <= read


def test_without_held_out_files_a_run_validates_on_those_it_trains_on(pretrain):
    assert set(log_of(pretrain(), "label")) == {"images", "train images"}


def test_a_picture_shows_the_centre_of_the_first_held_out_file(whole_run, data):
    pictures = sorted((whole_run.folder / "pictures").iterdir())
    assert len(pictures) == 10
    assert pictures[0].name == "images_000001.png"

    original = omnimae.read_image(pictures[0])[:, 2:34, 2:34]
    first = omnimae.read_image(train.list_media(data / "images", "images", "val").paths[0])
    centre = v2.CenterCrop(32)(v2.Resize(32)(first))
    assert (original.int() - centre.int()).abs().max() <= 1


def test_unreadable_held_out_files_do_not_end_a_run(pretrain, few, tmp_path, capsys):
    touch(tmp_path, "set/val/broken.png")
    few.rename(tmp_path / "set/train")
    run = pretrain("--images", tmp_path / "set")
    assert len(log_of(run, "loss")) == 1
    assert log_of(run, "val_loss") == []
    assert "no validation on images" in capsys.readouterr().err


def test_a_checkpoint_keeps_the_runs_options_of_its_model(pretrain):
    options = ["--image-mask-ratio", 0.5, "--video-mask-ratio", 0.75, "--clip-seconds", 1.5]
    cfg = omnimae.load_checkpoint(pretrain(*options) / "last.pt").cfg
    assert cfg == replace(TINY, image_mask_ratio=0.5, video_mask_ratio=0.75, clip_seconds=1.5)


def test_a_mask_ratio_that_masks_no_patch_is_an_error(pretrain):
    with pytest.raises(UserError, match="ratio 0.05"):  # of 16 patches
        pretrain("--image-mask-ratio", 0.05)


def test_init_starts_from_a_checkpoints_weights(pretrain, tiny, tmp_path):
    start = save_model(tiny, tmp_path / "start.pt")
    run = pretrain("--init", start, "--seed", 1)  # otherwise it would start from other weights
    torch.testing.assert_close(weights_of(run), dict(tiny.state_dict()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("given", "kept"), [(None, 1.5), (2.0, 2.0)])
def test_init_keeps_its_clip_seconds_unless_others_are_given(given, kept, tmp_path):
    model = OmniMAE(replace(TINY, clip_seconds=1.5, video_mask_ratio=0.5))
    start = save_model(model, tmp_path / "start.pt")
    args = train.parse_args(["--model", "tiny", "--init", str(start)])
    args.clip_seconds = given
    loaded = train.load_init(args)
    assert loaded.cfg == replace(TINY, clip_seconds=kept)  # with the run's mask ratio


@pytest.mark.parametrize("model", [OmniMAE(replace(TINY, depth=1)), Classifier(TINY, 3)])
def test_init_of_another_size_or_a_classifier_is_an_error(model, tmp_path):
    start = save_model(model, tmp_path / "start.pt")
    with pytest.raises(UserError, match="start.pt"):
        train.load_init(train.parse_args(["--model", "tiny", "--init", str(start)]))


@pytest.fixture(scope="module")
def timed_run(data, tmp_path_factory) -> Namespace:
    """30 steps of 61 seconds. Validation takes 20 seconds. Both and the saves are recorded."""
    run = Namespace(seconds=0, steps=0, events=[])
    run.folder = tmp_path_factory.mktemp("timed") / "run"
    step = torch.optim.AdamW.step
    replace_file = os.replace

    def slow_step(self):
        run.seconds += 61
        run.steps += 1
        return step(self)

    def slow_validation(*args):
        run.seconds += 20
        run.events.append(("validation", run.steps))

    def recorded_replace(*args):
        run.events.append(("save", run.steps))
        return replace_file(*args)

    options = f"--model tiny --images {data}/images --out {run.folder} --batch-size 8"
    options += " --epochs 5 --log-every 7 --save-minutes 2 --device cpu --workers 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", slow_step)
        patch.setattr(train, "validate", slow_validation)
        patch.setattr(os, "replace", recorded_replace)
        patch.setattr(time, "monotonic", lambda: run.seconds)
        train.main(train.parse_args(options.split()))
    return run


def test_a_run_saves_after_some_minutes_and_before_each_of_ten_validations(timed_run):
    expected = []
    for step in range(3, 31, 3):
        # Two steps take more than the two minutes. Validation comes after a save.
        expected += [("save", step - 1), ("save", step), ("validation", step)]
    assert timed_run.events == expected


def test_a_run_logs_its_first_step_every_few_and_its_last(timed_run):
    of_recipe, *steps = log_of(timed_run.folder, "step")
    assert steps == [1, 7, 14, 21, 28, 30]


def test_a_runs_speed_does_not_count_validation(timed_run):
    assert set(log_of(timed_run.folder, "views_per_second")) == {8 / 61}


def report(folder: Path, loss: float, **options) -> None:
    """Logs a step with this loss, and a scaler with these options."""
    log = train.Log(folder, {}, 16, 0, 100, train.Ranks("cpu"))
    scaler = torch.amp.GradScaler("cpu", **options)
    log.report(1, "images", torch.tensor(loss), 0.1, scaler)


@pytest.mark.parametrize(
    "scaler",
    [{"enabled": False}, {"enabled": True, "init_scale": 0.5}],  # under 1 it no longer helps
)
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_rate(scaler, tmp_path):
    with pytest.raises(UserError, match="loss.*--lr"):
        report(tmp_path, math.nan, **scaler)


def test_in_float16_steps_that_the_scaler_skips_do_not_end_a_run(tmp_path):
    report(tmp_path, math.inf, enabled=True)
    assert log_of(tmp_path, "loss") == [None]


def test_a_run_whose_weights_explode_keeps_its_last_finite_checkpoint(pretrain, tmp_path):
    with pytest.raises(UserError, match="weights.*--lr"):
        pretrain("--epochs", 2, "--lr", 1e39)
    assert omnimae.read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1


# ------------------------------------------------------------------------------------------------
# A run's folder: resuming and saving


def test_a_log_begins_with_the_recipe(whole_run):
    first_line, *_ = (whole_run.folder / "log.jsonl").read_text().splitlines()
    recipe = json.loads(first_line)["recipe"]
    assert log_of(whole_run.folder, "recipe") == [recipe]
    values = {"model": "tiny", "epochs": 1, "batch_size": 16, "seed": 3, "video_views": 4}
    values |= {"image_mask_ratio": 0.75, "video_mask_ratio": 0.9, "clip_seconds": 2.7}
    assert values.items() <= recipe.items()
    assert "48 files" in recipe["images"]
    assert "32 files" in recipe["videos"]


def test_a_run_prints_its_recipe(pretrain, capsys):
    pretrain("--lr", 0.00123)
    assert "lr=0.00123" in capsys.readouterr().out


def test_a_finished_run_is_not_run_again(pretrain, adamw):
    run = pretrain()
    before = (run / "last.pt").read_bytes()
    pretrain()
    assert len(adamw) == 1
    assert (run / "last.pt").read_bytes() == before


def test_another_recipe_is_refused_and_what_changed_is_named(pretrain):
    run = pretrain("--lr", 0.5)
    before = (run / "last.pt").read_bytes()
    for name, old, new in [
        ("epochs", 1, 31),
        ("batch_size", 8, 4),
        ("lr", 0.5, 0.125),
        ("seed", 0, 77),
        ("image_mask_ratio", 0.75, 0.55),
        ("video_mask_ratio", 0.9, 0.66),
        ("clip_seconds", 2.7, 3.3),
        ("video_views", 4, 2),
    ]:
        option = "--" + name.replace("_", "-")
        with pytest.raises(UserError, match=f"recipe: {name} {old} -> {new}. .*--resume-anyway"):
            pretrain("--lr", 0.5, option, new)
    assert (run / "last.pt").read_bytes() == before


def test_as_many_files_of_other_names_are_refused(pretrain, few):
    pretrain()
    (few / "7.png").rename(few / "8.png")
    with pytest.raises(UserError, match="images 8 files.*8 files.*--resume-anyway"):
        pretrain()


def test_a_data_set_may_move(pretrain, few, adamw):
    pretrain()
    pretrain("--images", few.rename(few.with_name("moved")))
    assert len(adamw) == 1  # the run had ended


@pytest.mark.parametrize("what", ["weights", "step"])
def test_a_checkpoint_that_was_trained_further_is_refused(what, pretrain, tiny, tmp_path):
    start = save_model(tiny, tmp_path / "start.pt", step=1)
    pretrain("--init", start)
    if what == "weights":
        torch.nn.init.normal_(tiny.norm.bias)
    save_model(tiny, start, step=2 if what == "step" else 1)
    with pytest.raises(UserError, match="init .*start.pt.*start.pt"):
        pretrain("--init", start)


def test_resume_anyway_continues_with_the_new_values(pretrain, adamw):
    pretrain("--lr", 1e-3)
    run = pretrain("--lr", 0.125, "--epochs", 2, "--resume-anyway")
    rates = [groups[0]["lr"] for groups in adamw]
    assert rates == pytest.approx([1e-6, train.learning_rate(1, 2, 0.125)])
    assert omnimae.read_checkpoint(run / "last.pt")["recipe"]["lr"] == 0.125


def test_resume_anyway_is_an_error_where_no_step_is_left(pretrain):
    pretrain("--epochs", 2)
    with pytest.raises(UserError, match="step 2.* 1"):
        pretrain("--resume-anyway")


def states_of(model, **options) -> dict:
    """What is saved of a run. The optimizer has done one step."""
    model(images())[0].backward()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return {"model": model, "optimizer": optimizer, "scaler": scaler}


@pytest.fixture
def states(tiny) -> dict:
    return states_of(tiny, weight_decay=0.5)


def test_a_resumed_optimizer_has_its_old_state_and_the_new_options(states, tmp_path):
    train.save(tmp_path / "last.pt", 7, {"weight_decay": 0.5}, states)
    new = states_of(OmniMAE(TINY), weight_decay=0.25, betas=(0.5, 0.75))
    file = train.resume(tmp_path, {"weight_decay": 0.25}, new, 10, True, train.Ranks("cpu"))
    assert file["step"] == 7
    (group,) = new["optimizer"].param_groups
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.5, 0.75))
    same_bits(new["model"].state_dict(), states["model"].state_dict())
    old = states["optimizer"].state_dict()["state"]
    same_bits(new["optimizer"].state_dict()["state"], old)


@pytest.mark.parametrize("was_on", [True, False])
def test_a_resumed_scaler_has_its_old_scale_or_a_new_one(was_on, states, tmp_path):
    states["scaler"] = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=was_on)
    train.save(tmp_path / "last.pt", 7, {}, states)
    states["scaler"] = torch.amp.GradScaler("cpu")
    train.resume(tmp_path, {}, states, 10, False, train.Ranks("cpu"))
    assert states["scaler"].get_scale() == (4 if was_on else 2**16)


def test_another_model_in_last_pt_is_an_error_that_names_it(states, tmp_path):
    train.save(tmp_path / "last.pt", 7, {}, states)
    other = states_of(OmniMAE(replace(TINY, dim=32)))
    with pytest.raises(UserError, match="last.pt"):
        train.resume(tmp_path, {}, other, 10, True, train.Ranks("cpu"))


def two_ranks(*other) -> train.Ranks:
    """The first of two processes. The other one adds these numbers to their sums."""
    ranks = train.Ranks("cpu")
    ranks.world = 2
    ranks.sum = lambda *own: [one + two for one, two in zip(own, other)]
    return ranks


@pytest.mark.parametrize(("step", "number"), [(0, 5), (7, 6)], ids=["other step", "other recipe"])
def test_machines_that_see_other_folders_or_files_are_an_error(
    step, number, states, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "fingerprint", lambda _: "5")  # of this process's recipe
    train.save(tmp_path / "last.pt", 7, {}, states)
    train.resume(tmp_path, {}, states, 10, False, two_ranks(7, 5))
    with pytest.raises(UserError, match="machines.*last.pt.*files"):
        train.resume(tmp_path, {}, states, 10, False, two_ranks(step, number))


@pytest.fixture
def saved(states, tmp_path) -> Path:
    train.save(tmp_path / "last.pt", 1, {}, states)
    return tmp_path / "last.pt"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_checkpoint(error, saved, states, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        train.save(saved, 2, {}, states)
    assert omnimae.read_checkpoint(saved)["step"] == 1
    assert list(saved.parent.iterdir()) == [saved]


def test_a_save_that_breaks_off_half_way_says_why(saved, states):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = saved.stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))
    try:
        with pytest.raises(OSError, match="last.pt") as error:
            train.save(saved, 2, {}, states)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG  # not PyTorch's error, which comes after it
    assert omnimae.read_checkpoint(saved)["step"] == 1


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_old_ones_place(saved, states, monkeypatch):
    calls = []
    for function in ("fsync", "replace"):
        real = getattr(os, function)

        def recorded(*args, real=real, function=function):
            size = saved.with_name("last.pt.tmp").stat().st_size
            calls.append((function, size))
            return real(*args)

        monkeypatch.setattr(os, function, recorded)
    train.save(saved, 2, {}, states)
    size = saved.stat().st_size
    assert calls == [("fsync", size), ("replace", size)]


# ------------------------------------------------------------------------------------------------
# Processes, errors and options


def end_of(script, *options) -> str | int:
    """How a script ends that fails: its message, or its exit code."""
    argv = [str(option) for option in options]
    with pytest.raises(SystemExit) as end:
        train.run_script(script.main, lambda: script.parse_args(argv))
    return end.value.code


@pytest.mark.parametrize(("cores", "num"), [(1, 1), (4, 3), (200, 16)])
def test_a_process_has_at_most_16_workers(cores, num, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert train.default_workers() == num


def test_an_error_of_the_code_while_reading_a_file_names_its_line(monkeypatch, tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(omnimae, "pil_to_tensor", None)  # "'NoneType' object is not callable"
    with pytest.raises(UserError, match="a.png.*TypeError in line .* of .*omnimae.py"):
        omnimae.read_image(tmp_path / "a.png")


def test_a_file_name_that_is_no_text_is_printed(capsys):
    name = os.fsdecode(b"caf\xe9.png")
    train.run_script(lambda args: print(name), lambda: None)
    assert "caf" in capsys.readouterr().out


SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize("variables", [SLURM, {"OMPI_COMM_WORLD_SIZE": "8"}, {"PMI_SIZE": "8"}])
def test_tasks_that_do_not_know_of_each_other_are_an_error(variables, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(variables))
    with pytest.raises(UserError, match="8 tasks.*torchrun"):
        train.Ranks("cpu")


@pytest.mark.parametrize(
    "variables",
    [
        SLURM | TORCHRUN,
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "8"},  # a shell of salloc
        {},
    ],
)
def test_a_single_process_is_not_an_error(variables, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(variables))
    ranks = train.Ranks("cpu")
    assert (ranks.rank, ranks.world, ranks.local_rank) == (0, 1, 0)


def test_a_process_without_a_gpu_is_an_error_that_names_the_option(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--device cpu"):
        train.Ranks("cuda")


def failing(error: Exception):
    """The main of a script that ends with this error."""

    def main(args):
        raise error

    return main


BUS_ERROR = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
BUS_ERROR += "dataloader's workers are out of shared memory."


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("a.jpg: cannot be read"), "a.jpg: cannot be read"),
        (OSError(errno.ENOSPC, "No space left", "last.pt"), "last.pt: No space left"),
        (OSError("the connection broke off"), "the connection broke off"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "/dev/shm"),
        (RuntimeError(BUS_ERROR), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--micro-batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--micro-batch"),
        (MemoryError(), "--micro-batch"),
        # a worker that was killed while it handed over what it had read
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), "--workers"),
        (EOFError(), "--workers"),
    ],
)
def test_what_a_user_can_mend_is_told_in_one_line(error, words):
    with pytest.raises(SystemExit, match=words) as end:
        train.run_script(failing(error), lambda: Namespace(micro_batch=None))
    assert len(end.value.code.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Caught ValueError in DataLoader worker process 0.\nnot enough values"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_a_mistake_in_the_code_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        train.run_script(failing(error), Namespace)


def test_a_workers_error_is_told_in_one_line(few, tmp_path, capfd):
    for path in few.iterdir():
        path.write_bytes(b"broken")
    options = f"--model tiny --images {few} --out {tmp_path}/run --device cpu --workers 1"
    options += " --batch-size 8 --epochs 1"
    with pytest.raises(SystemExit) as end:
        train.run_script(train.main, lambda: train.parse_args(options.split()))
    for worker in multiprocessing.active_children():  # else Python waits for it some seconds
        worker.terminate()

    assert "20 images" in end.value.code
    assert "UserError" not in end.value.code
    assert len(end.value.code.splitlines()) == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("script", "options", "word"),
    [
        (train, "--model tiny --images nowhere", "nowhere"),
        (finetune, "--checkpoint vit_x --images x", "vit_x"),
        (finetune, "--checkpoint vit_b_pretrain", "--images"),
        (finetune, "--checkpoint scratch --images x", "--model"),
        (evaluation, "--checkpoint x.pt x.jpg", "x.pt"),
        (evaluation, "--checkpoint x.pt --images x dog.jpg", "files"),
        (evaluation, "--checkpoint x.pt --all dog.jpg", "--all"),
    ],
)
def test_a_wrong_command_ends_in_a_sentence(script, options, word, capsys):
    message = end_of(script, *options.split())
    if message == 2:  # argparse has printed it, after the usage
        message = capsys.readouterr().err.strip().splitlines()[-1]
    assert word in message
    assert len(message.splitlines()) == 1


def test_ctrl_c_ends_a_run_with_advice_and_code_130(small, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    options = ["--model", "tiny", "--images", small / "images", "--batch-size", 8]
    assert end_of(train, *options, "--out", tmp_path, "--device", "cpu", "--workers", 0) == 130
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "same command" in line


@pytest.mark.parametrize("option", ["--epochs=0", "--lr=nan", "--workers=-1", "--images="])
def test_a_senseless_value_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        train.parse_args([option])
    assert f"argument {option.split('=')[0]}" in capsys.readouterr().err


def test_a_drop_path_of_all_samples_is_refused(capsys):
    with pytest.raises(SystemExit):
        recipe_of("images", options="--drop-path 1")
    assert "argument --drop-path" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The finetuning recipes


@pytest.fixture
def finetuned(run_script):
    """Finetunes a tiny model for an epoch, from scratch or a checkpoint, in batches of 16."""

    def run(kind, *options, start="scratch", out="finetuned") -> Path:
        begin = ["--checkpoint", start, "--epochs", 1, "--batch-size", 16, "--log-every", 1]
        if start == "scratch":
            begin += ["--model", "tiny"]
        return run_script(finetune, *begin, *options, out=out, **{kind: True})

    return run


def recipe_of(kind: str, model="vit_b", options="") -> dict:
    argv = f"--checkpoint scratch --model {model} --{kind} x {options}".split()
    args = finetune.parse_args(argv)
    finetune.fill_in(args, kind)
    return vars(args)


RECIPES = [  # epochs, batch size, rate, warm-up, weight decay, layer decay, drop path, augmentation
    ("images", "vit_b", (100, 1024, 4e-3, 0.05, 1e-4, 0.65, 0.1, "full")),
    ("images", "vit_l", (50, 1024, 4e-3, 0.05, 1e-4, 0.75, 0.2, "full")),
    ("images", "vit_h", (50, 1024, 4e-3, 0.05, 1e-4, 0.75, 0.3, "full")),
    ("videos", "vit_b", (40, 256, 1e-3, 0.125, 0.05, 0.75, 0.1, "full")),
    ("videos", "vit_l", (40, 256, 1e-3, 0.125, 0.05, 0.75, 0.2, "full")),
    ("videos", "vit_h", (40, 256, 1e-3, 0.125, 0.05, 0.75, 0.3, "full")),
    ("videos", "demo", (4, 64, 1e-3, 0.1, 0.05, 1.0, 0.0, "crop")),
]


@pytest.mark.parametrize(("kind", "model", "values"), RECIPES)
def test_a_recipe_has_the_released_values(kind, model, values):
    recipe = recipe_of(kind, model)
    assert tuple(recipe[name] for name in finetune.RECIPES[kind]) == values


def test_demo_data_has_the_demo_recipe_with_any_model():
    args = finetune.parse_args("--checkpoint scratch --model vit_b --images demo".split())
    finetune.fill_in(args, "images")
    assert (args.epochs, args.augment) == (4, "crop")


def test_a_checkpoints_size_decides_the_recipe(finetuned, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(finetune.LARGER_RECIPES, "tiny", {"layer_decay": 0.125})
    start = save_model(tiny, tmp_path / "start.pt")
    [recipe] = log_of(finetuned("images", start=start), "recipe")
    assert recipe["model"] == "tiny"
    assert recipe["layer_decay"] == 0.125


def test_finetuning_keeps_the_clip_seconds_of_its_checkpoint(finetuned, tmp_path):
    start = save_model(OmniMAE(replace(TINY, clip_seconds=1.5)), tmp_path / "start.pt")
    run = finetuned("videos", start=start)
    assert omnimae.load_checkpoint(run / "last.pt").cfg.clip_seconds == 1.5


def test_a_frozen_encoder_has_no_drop_path():
    assert recipe_of("images", options="--freeze")["drop_path"] == 0


@pytest.fixture(scope="module", params=train.KINDS)
def recipe_run(request, data, tmp_path_factory) -> Namespace:
    """Two epochs of the full recipe in steps of 4 views, 2 at once, with what it did recorded.

    RandAugment changes nothing; its magnitudes, of 10, are recorded.
    """
    kind = request.param
    run = Namespace(kind=kind, groups=[], mixed=[], losses=[], drop_path=[], magnitudes=[])
    run.num_files = {"images": 48, "videos": 32}[kind]
    run.recipe = finetune.RECIPES[kind]

    def record_step(_, optimizer):
        run.groups.append([dict(group) for group in optimizer.param_groups])

    def record_mixing(mixed, transform, x, labels):
        x = x.as_subclass(torch.Tensor)
        way = (type(transform).__name__, transform.alpha)
        run.mixed.append(Namespace(way=way, x=x, labels=mixed[1]))

    def record_loss(_, logits, labels, **options):
        run.losses.append(Namespace(labels=labels, options=options))

    def record_drop_path(_, module, x):
        run.drop_path.append((len(x), round(module.p, 3), module.training))

    def no_augmentation(self, media):
        run.magnitudes.append(10 * self.magnitude / (self.num_magnitude_bins - 1))
        assert self.interpolation == v2.InterpolationMode.BILINEAR
        return media

    out = tmp_path_factory.mktemp("recipe")
    options = f"--checkpoint scratch --model tiny --{kind} {data / kind} --out {out}"
    options += " --epochs 2 --batch-size 4 --micro-batch 2 --device cpu --workers 0"
    with pytest.MonkeyPatch.context() as patch:
        spy_on(patch, torch.optim.AdamW, "step", record_step)
        spy_on(patch, v2.MixUp, "forward", record_mixing)
        spy_on(patch, v2.CutMix, "forward", record_mixing)
        spy_on(patch, F, "cross_entropy", record_loss)
        spy_on(patch, StochasticDepth, "forward", record_drop_path)
        patch.setattr(v2.RandAugment, "forward", no_augmentation)
        finetune.main(finetune.parse_args(options.split()))
    return run


def test_the_rate_follows_the_schedule_scaled_by_layer_decay(recipe_run):
    peak = recipe_run.recipe["lr"] * 4 / recipe_run.recipe["batch_size"]
    warmup = recipe_run.recipe["warmup"]
    layer_decay = recipe_run.recipe["layer_decay"]
    total = 2 * recipe_run.num_files // 4
    assert len(recipe_run.groups) == total

    for step, groups in enumerate(recipe_run.groups):
        done = step / total
        share = done / warmup
        if done >= warmup:
            share = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
        rate = 1e-6 + (peak - 1e-6) * share
        # The patch embedding, two blocks, and the head with the norm before it.
        expected = [rate * layer_decay**power for power in (4, 3, 2, 1)]
        assert sorted({group["lr"] for group in groups}) == pytest.approx(expected)


def test_adamw_has_the_recipes_betas_and_weight_decay(recipe_run):
    groups = recipe_run.groups[0]
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.9, 0.999), 1e-8)}
    decays = {group["weight_decay"] for group in groups}
    assert decays == {0.0, recipe_run.recipe["weight_decay"]}


def test_drop_path_is_on_in_each_epoch_and_off_in_validation(recipe_run):
    rates = [0.0, 0.0, 0.1, 0.1]  # twice in each of two blocks
    num_micro_batches = recipe_run.num_files // 2
    training = num_micro_batches * [(2, rate, True) for rate in rates]
    # Validation takes one view of each file: 16 images at once, but each video alone.
    num_batches, size = {"images": (1, 16), "videos": (8, 1)}[recipe_run.kind]
    validation = num_batches * [(size, rate, False) for rate in rates]
    assert recipe_run.drop_path == 2 * (training + validation)


def test_half_of_the_operations_run_with_magnitudes_around_the_recipes(recipe_run):
    num, mean = {"images": (2, 9), "videos": (4, 7)}[recipe_run.kind]
    num_views = 2 * recipe_run.num_files
    assert len(recipe_run.magnitudes) == pytest.approx(0.5 * num * num_views, rel=0.15)
    assert np.mean(recipe_run.magnitudes) == pytest.approx(mean, abs=0.15)
    assert np.std(recipe_run.magnitudes) == pytest.approx(0.5, abs=0.1)


def test_a_quarter_of_the_views_is_erased(recipe_run):
    x = torch.cat([call.x for call in recipe_run.mixed])
    if recipe_run.kind == "images":
        black = omnimae.normalize(torch.zeros(1, 3, 1, 1))
        is_erased = (x == black).all(1)
        areas = is_erased.float().mean((1, 2))
        areas = areas[areas > 0]
        assert 0.01 < areas.min() < 0.08
        assert 0.24 < areas.max() < 0.34
    else:
        is_erased = x > 2.7  # noise: no colour is that bright
    assert 0.15 < is_erased.flatten(1).any(1).float().mean() < 0.35


def test_each_micro_batch_is_mixed_in_one_of_two_ways(recipe_run):
    num = 2 * recipe_run.num_files // 2
    ways = [call.way for call in recipe_run.mixed]
    assert len(ways) == num
    assert set(ways) == {("MixUp", 0.8), ("CutMix", 1.0)}
    assert 0.25 * num < ways.count(("MixUp", 0.8)) < 0.75 * num


def test_the_loss_is_of_mixed_labels_smoothed(recipe_run):
    for call, loss in zip(recipe_run.mixed, recipe_run.losses, strict=True):
        assert torch.equal(loss.labels, call.labels)
        assert loss.labels.shape == (2, 8)
        assert loss.options == {"label_smoothing": 0.1}


def test_without_weight_decay_adamw_has_the_same_groups():
    sizes = []
    for weight_decay in (0.05, 0.0):  # so that a run can be resumed with another value
        groups = finetune.parameter_groups(Classifier(TINY, 3), 0.5, weight_decay)
        sizes.append([len(group["params"]) for group in groups])
    assert sizes[0] == sizes[1]


def test_layer_decay_and_weight_decay_follow_from_a_parameters_name():
    model = Classifier(TINY, 3)
    found = {}
    for group in finetune.parameter_groups(model, 0.5, 0.05):
        for parameter in group["params"]:
            found[parameter] = (group["scale"], group["weight_decay"])

    expected = {}
    for name, parameter in model.named_parameters():
        power = 1  # norm and head
        if name.startswith("encoder.patch_embed."):
            power = 4
        elif name.startswith("encoder.blocks.0."):
            power = 3
        elif name.startswith("encoder.blocks.1."):
            power = 2
        is_spared = name.endswith("bias") or "norm" in name
        decay = 0.0 if is_spared else 0.05
        expected[parameter] = (0.5**power, decay)
    assert found == expected


def build(kind: str, start) -> Classifier:
    return finetune.build(TINY, kind, start, num_classes=500, drop_path=0.0, freeze=False)


@pytest.mark.parametrize(("kind", "std"), [("images", 2e-5), ("videos", 0.01)])
def test_finetuning_starts_from_a_small_new_head(kind, std):
    model = build(kind, Classifier(TINY, 500))
    assert model.head.weight.std().item() == pytest.approx(std, rel=0.05)
    assert not model.head.bias.any()


@pytest.mark.parametrize("start", [OmniMAE(TINY), Classifier(TINY, 5)])
def test_finetuning_starts_from_the_encoder(start):
    model = build("images", start)
    same_bits(model.encoder.state_dict(), start.encoder.state_dict())


def test_finetuning_starts_from_a_classifiers_norm():
    start = Classifier(TINY, 5)
    torch.nn.init.normal_(start.norm.weight)
    same_bits(build("images", start).norm.weight, start.norm.weight)


def test_finetuning_starts_from_a_new_norm_after_pretraining(tiny):
    torch.nn.init.normal_(tiny.norm.weight)  # it was trained on tokens, not on their mean
    same_bits(build("images", tiny).norm.weight, torch.ones(64))


def test_freeze_leaves_the_encoder_as_it_was(finetuned, tiny, tmp_path):
    start = save_model(tiny, tmp_path / "start.pt")
    run = finetuned("images", "--freeze", start=start)
    model = omnimae.load_checkpoint(run / "last.pt")
    same_bits(model.encoder.state_dict(), tiny.encoder.state_dict())
    assert model.norm.weight.std() > 0  # this was trained: it began at one
    assert model.head.bias.std() > 0


# ------------------------------------------------------------------------------------------------
# Augmentation in finetuning


def test_the_crop_recipe_neither_augments_nor_erases(maps, rand_augment):
    boxes = torch.cat([box for _, _, box in labelled(maps, "images", 25, "crop")])
    assert not rand_augment
    assert not boxes.any()


def test_all_frames_of_a_clip_are_augmented_alike(maps):
    for view, _, _ in labelled(maps, "videos", 20):
        frames = view[0]  # (3, T, H, W), of a film that stands still
        assert torch.equal(frames, frames[:, :1].expand_as(frames))


def test_rand_augment_uncovers_grey():
    torch.manual_seed(0)
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    num_moved = 0
    for _ in range(60):
        view = finetune.rand_augment(white, 1, 9.0)
        if view.min() == view.max():  # one colour
            continue
        num_moved += 1
        assert view.min() > 100
        assert (view == 128).any()
    assert num_moved > 5


@pytest.mark.parametrize("frames", [(), (4,)])
def test_only_the_box_is_erased(frames):
    x = torch.full((2, 3, *frames, 32, 32), 9.0)
    boxes = torch.tensor([[4, 8, 20, 16], [0, 0, 0, 0]])  # top, left, height, width
    erased = finetune.erase(x, boxes)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[4:24, 8:24] = True
    assert torch.equal(erased[0] != 9, inside.expand_as(x[0]))
    assert (erased[1] == 9).all()


def test_a_box_in_an_image_is_black():
    erased = finetune.erase(images(1), torch.tensor([[4, 8, 20, 16]]))
    black = omnimae.normalize(torch.zeros(1, 3, 20, 16))
    torch.testing.assert_close(erased[:, :, 4:24, 8:24], black)


def test_a_box_in_a_clip_is_noise_in_each_frame():
    torch.manual_seed(0)
    erased = finetune.erase(clips(1), torch.tensor([[4, 8, 20, 16]]))
    box = erased[..., 4:24, 8:24]
    assert abs(box.mean()) < 0.1
    assert abs(box.std() - 1) < 0.1
    assert len(box.unique()) > 3800  # of 3 x 4 x 20 x 16


# ------------------------------------------------------------------------------------------------
# A run of finetuning


@pytest.mark.parametrize(("kind", "batch", "views"), [("images", 1024, 32), ("videos", 256, 8)])
def test_a_gpu_takes_the_released_micro_batches(kind, batch, views):
    args = Namespace(batch_size=batch, micro_batch=None)
    gpu = Namespace(world=1, device=torch.device("cuda"))
    cfg = omnimae.MODELS["vit_b"]
    cuts = train.cut_batch(args, {kind: 10**5}, {kind: 1}, finetune.MICRO_BATCH, cfg, gpu)
    assert cuts[kind].micro_batches == batch // views
    assert cuts[kind].pieces_per_micro_batch * cuts[kind].files_per_piece == views


def test_the_crop_recipes_loss_is_of_single_labels_in_float32(finetuned, monkeypatch):
    calls = []
    spy_on(monkeypatch, F, "cross_entropy", lambda _, x, y, **more: calls.append((x, y)))
    finetuned("images", "--augment", "crop", "--dtype", "bfloat16", "--batch-size", 48)
    [(logits, labels)] = calls
    assert logits.dtype == torch.float32
    assert labels.shape == (48,)


def test_drop_path_and_mixup_are_seeded_by_step_rank_and_micro_batch(finetuned, monkeypatch):
    keys = []
    spy_on(monkeypatch, train, "seed_all", lambda _, *key: keys.append(key))
    run = finetuned("images", "--micro-batch", 8, "--seed", 3)
    num_steps = len(log_of(run, "loss"))
    assert num_steps > 1
    expected = [(3, step, 0, i) for step in range(num_steps) for i in range(2)]  # rank 0
    assert [key for key in keys if len(key) == 4] == expected  # those of files are longer


def finetune_long(small: Path, out: Path) -> None:
    """Finetunes by the full recipe for three epochs of two steps, and saves each step."""
    options = f"--checkpoint scratch --model tiny --images {small}/images --out {out}"
    options += " --epochs 3 --batch-size 8 --lr 0.02 --save-minutes 0 --log-every 1"
    options += " --device cpu --workers 0"
    finetune.main(finetune.parse_args(options.split()))


@pytest.fixture(scope="module")
def long_run(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("long")
    finetune_long(small, out)
    return out


def test_the_best_epochs_model_is_kept(small, tmp_path, monkeypatch):
    accuracies = iter([50.0, 75.0, 75.0])
    monkeypatch.setattr(finetune, "accuracy", lambda *_: (next(accuracies), 100.0, 0))
    finetune_long(small, tmp_path)
    best = omnimae.read_checkpoint(tmp_path / "best.pt")
    assert best["step"] == 2 * 2
    assert best["best"] == 75


def test_a_resumed_run_keeps_the_best_epoch_before(small, tmp_path, monkeypatch):
    accuracies = iter([75.0, KeyboardInterrupt, 50.0, 25.0])

    def accuracy(*_):
        result = next(accuracies)
        if result is KeyboardInterrupt:
            raise KeyboardInterrupt
        return result, 100.0, 0

    monkeypatch.setattr(finetune, "accuracy", accuracy)
    with pytest.raises(KeyboardInterrupt):
        finetune_long(small, tmp_path)
    finetune_long(small, tmp_path)
    best = omnimae.read_checkpoint(tmp_path / "best.pt")
    assert (best["step"], best["best"]) == (2, 75)


def test_the_best_model_knows_its_classes(long_run):
    assert omnimae.load_checkpoint(long_run / "best.pt").classes == sorted(train.SHAPES)


def test_a_run_stopped_in_steps_and_validations_ends_with_the_same_bits(
    long_run, small, tmp_path, monkeypatch
):
    stops = []

    def stop_every_third_time(owner, name: str) -> None:
        real = getattr(owner, name)
        calls = []

        def stopped(*args, **options):
            calls.append(name)
            if len(calls) % 3 == 1:
                stops.append(name)
                raise KeyboardInterrupt
            return real(*args, **options)

        monkeypatch.setattr(owner, name, stopped)

    stop_every_third_time(torch.optim.AdamW, "step")
    stop_every_third_time(torch.Tensor, "topk")  # the best labels, in validation
    is_done = False
    while not is_done:
        with suppress(KeyboardInterrupt):
            finetune_long(small, tmp_path)
            is_done = True
    assert {"step", "topk"} == set(stops)

    assert log_of(tmp_path, "loss") == log_of(long_run, "loss")
    # A run that was stopped right after a validation repeats it.
    accuracies = dict(zip(log_of(tmp_path, "epoch"), log_of(tmp_path, "top1"), strict=True))
    assert list(accuracies.values()) == log_of(long_run, "top1")
    for name in ("last.pt", "best.pt"):
        stopped = omnimae.read_checkpoint(tmp_path / name)
        unbroken = omnimae.read_checkpoint(long_run / name)
        assert stopped["step"] == unbroken["step"]
        same_bits(stopped["model"], unbroken["model"])
        same_bits(stopped.get("optimizer"), unbroken.get("optimizer"))


def test_a_log_of_finetuning_begins_with_the_recipe(long_run):
    (recipe,) = log_of(long_run, "recipe")
    expected = {"model": "tiny", "checkpoint": "scratch", "freeze": False, "seed": 0}
    expected |= {"epochs": 3, "batch_size": 8, "lr": 0.02, "warmup": 0.05, "weight_decay": 1e-4}
    expected |= {"layer_decay": 0.65, "drop_path": 0.1, "augment": "full", "clip_seconds": 2.7}
    assert expected.items() <= recipe.items()
    assert recipe["images"].startswith("16 files")
    assert recipe["classes"].startswith("8 ")


def test_a_finetuning_does_not_continue_with_another_recipe(finetuned, tiny, tmp_path):
    start = save_model(tiny, tmp_path / "start.pt", step=1)
    run = finetuned("images", start=start)
    before = (run / "last.pt").read_bytes()
    with pytest.raises(UserError, match="layer_decay"):
        finetuned("images", "--layer-decay", 0.5, start=start)

    torch.nn.init.normal_(tiny.norm.bias)  # trained further
    save_model(tiny, start, step=1)
    with pytest.raises(UserError, match="checkpoint"):
        finetuned("images", start=start)
    assert (run / "last.pt").read_bytes() == before


def test_a_finetuning_does_not_continue_with_other_validation_files(small, run_script, tmp_path):
    folder = shutil.copytree(small / "images", tmp_path / "images")
    options = ["--checkpoint", "scratch", "--model", "tiny", "--images", folder]
    options += ["--epochs", 1, "--batch-size", 16]
    run_script(finetune, *options)
    shutil.rmtree(next(folder.glob("val/*")))  # a class of one file
    with pytest.raises(UserError, match="validation"):
        run_script(finetune, *options)


def test_the_best_accuracy_on_other_validation_files_does_not_count(
    small, run_script, tmp_path, monkeypatch
):
    folder = shutil.copytree(small / "images", tmp_path / "images")
    options = ["--checkpoint", "scratch", "--model", "tiny", "--images", folder]
    options += ["--batch-size", 16, "--epochs"]
    monkeypatch.setattr(finetune, "accuracy", lambda *_: (75.0, 100.0, 0))
    run_script(finetune, *options, 1)

    shutil.rmtree(next(folder.glob("val/*")))
    monkeypatch.setattr(finetune, "accuracy", lambda *_: (50.0, 100.0, 0))
    run = run_script(finetune, *options, 2, "--resume-anyway")
    assert omnimae.read_checkpoint(run / "best.pt")["best"] == 50


def test_a_clips_seconds_are_kept_for_validation_and_evaluation(small, run_script, monkeypatch):
    seconds = []
    spy_on(monkeypatch, omnimae, "read_clips", lambda _, *args: seconds.append(args[3]))
    options = ["--checkpoint", "scratch", "--model", "tiny", "--videos", small / "videos"]
    options += ["--clip-seconds", 1.5, "--epochs", 1, "--batch-size", 8]
    run = run_script(finetune, *options)
    assert seconds == (8 + 2) * [1.5]

    seconds.clear()
    run_script(evaluation, "--checkpoint", run / "best.pt", "--videos", small / "videos")
    assert seconds == 2 * [1.5]


# ------------------------------------------------------------------------------------------------
# Files that are held out


def list_labelled(root: Path, split: str, classes=None) -> train.Listing:
    return evaluation.list_labelled(str(root), "images", split, classes)


def names_in(root: Path, split: str) -> list[str]:
    return [os.path.relpath(path, root) for path in list_labelled(root, split).paths]


def touch_numbered(root: Path, **num_files: int) -> Path:
    """Class folders with files that are called 00.png, 01.png, ..."""
    for name, num in num_files.items():
        touch(root, *[f"{name}/{i:02}.png" for i in range(num)])
    return root


def test_every_tenth_file_of_a_class_is_held_out_and_the_rest_trained_on(tmp_path):
    touch_numbered(tmp_path, a=21, b=13)
    held_out = ["a/00.png", "a/10.png", "a/20.png", "b/00.png", "b/10.png"]
    assert names_in(tmp_path, "val") == held_out
    assert list_labelled(tmp_path, "val").labels == [0, 0, 0, 1, 1]
    rest = names_in(tmp_path, "train")
    assert sorted(rest + held_out) == names_in(tmp_path, "all")
    assert list_labelled(tmp_path, "train").labels == 18 * [0] + 11 * [1]


def test_the_only_file_of_a_class_is_trained_on(tmp_path):
    touch_numbered(tmp_path, rare=1, two=2)
    assert names_in(tmp_path, "train") == ["rare/00.png", "two/01.png"]
    assert list_labelled(tmp_path, "val", ["rare", "two"]).labels == [1]


def test_with_a_validation_split_nothing_else_is_held_out(tmp_path):
    touch_numbered(tmp_path / "train", a=12, b=12, c=12)
    touch_numbered(tmp_path / "val", a=1, c=1)  # it may lack a class
    training = list_labelled(tmp_path, "train")
    assert len(training.paths) == 36
    assert list_labelled(tmp_path, "val", training.classes).labels == [0, 2]


@pytest.mark.parametrize(
    ("names", "split", "word"),
    [
        ("a/1.png b/1.png", "val", "hold out"),
        ("train/a/1.png train/b/1.png val/a/1.png val/new/1.png", "val", "new"),
        ("lonely/1.png lonely/2.png", "train", "only one class"),
        ("1.png 2.png", "train", "labels"),
        ("train/a/1.png train/b/1.png test/1.png", "val", "test: images without labels"),
    ],
)
def test_files_that_cannot_be_used_are_an_error_that_says_why(names, split, word, tmp_path):
    touch(tmp_path, *names.split())
    with pytest.raises(UserError, match=word):
        list_labelled(tmp_path, split, ["a", "b"] if split == "val" else None)


# ------------------------------------------------------------------------------------------------
# Evaluation


def plain_normalize(pixels: np.ndarray) -> torch.Tensor:
    """(..., H, W, 3) from 0 to 255 -> (..., 3, H, W), ImageNet-normalised."""
    mean = np.float32([0.485, 0.456, 0.406])
    std = np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy((pixels / np.float32(255) - mean) / std).movedim(-1, -3)


def plain_image(path: Path) -> torch.Tensor:
    """The released protocol in plain code: one view, (1, 3, 32, 32)."""
    image = PIL.Image.open(path)
    width, height = (int(32 * side / min(image.size)) for side in image.size)
    left = round((width - 32) / 2)
    top = round((height - 32) / 2)
    image = image.resize((width, height), PIL.Image.BICUBIC)
    image = image.crop((left, top, left + 32, top + 32))
    return plain_normalize(np.array(image))[None]


def plain_clips(path: Path) -> torch.Tensor:
    """The released protocol in plain code: 5 clips x 3 crops, (15, 3, T, 32, 32)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [(frame.pts - frames[0].pts) * stream.time_base for frame in frames]
        duration = times[-1]
        if stream.duration is not None:
            duration = stream.duration * stream.time_base
    pixels = [frame.to_ndarray(format="rgb24") for frame in frames]

    views = []
    for i in range(5):
        start = i * max(duration - Fraction(2.7), 0) / 5
        inside = [x for x, second in zip(pixels, times) if start <= second < start + Fraction(2.7)]
        clip = np.stack([inside[k * (len(inside) - 1) // 3] for k in range(4)])
        height, width = (32 * side // min(clip.shape[1:3]) for side in clip.shape[1:3])
        clip = F.interpolate(plain_normalize(clip), (height, width), mode="bilinear")
        over = max(height, width) - 32
        for begin in (0, math.ceil(over / 2), over):
            crop = clip[:, :, :, begin : begin + 32]
            if height > width:
                crop = clip[:, :, begin : begin + 32]
            views.append(crop.movedim(1, 0))  # (3, T, 32, 32)
    return torch.stack(views)


def write_noise(folder: Path, kind: str, i: int) -> Path:
    """A file of noise: portrait, landscape or square; of 10 to 13 frames a second, 1 to 4 s."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(i)
    width, height = [(54, 70), (70, 54), (52, 52), (90, 50)][i % 4]
    if kind == "images":
        pixels = rng.integers(0, 256, (height + i % 2, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        return folder / f"{i}.png"

    frames = rng.integers(0, 256, (10 + 5 * (i % 7), 15, 15, 3), dtype=np.uint8)
    frames = frames.repeat(6, axis=1).repeat(6, axis=2)[:, :height, :width].copy()
    suffix = "mp4" if i % 3 else "mkv"  # with and without a duration
    return write_video(folder / f"{i}.{suffix}", frames, 10 + i % 4, "mpeg4")


@pytest.fixture(scope="module", params=train.KINDS)
def noise(request, tmp_path_factory) -> Namespace:
    """A data set of noise, whose model is right on half of it, and each file's plain logits.

    Of its 13 files one cannot be read.
    """
    kind = request.param
    folder = tmp_path_factory.mktemp("noise")
    torch.manual_seed(1)
    model = Classifier(TINY, 8).eval().requires_grad_(False)
    plain = {"images": plain_image, "videos": plain_clips}[kind]
    written = [write_noise(folder, kind, i) for i in range(12)]
    views = [plain(path) for path in written]

    # Spread the logits, so that each class is some file's best.
    logits = torch.stack([model(x).mean(0) for x in views])
    model.head.weight *= 1.5 / logits.std(0)[:, None]
    model.head.bias -= logits.mean(0) * 1.5 / logits.std(0)

    files = {}
    for i, path in enumerate(written):
        logits = model(views[i]).mean(0)
        label = i // 2 % 8
        if i % 2:
            label = int(logits.argmax())
        moved = folder / "data" / "val" / f"class {label}" / path.name
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
        files[str(moved)] = Namespace(label=label, logits=logits, views=views[i])
    broken = folder / "data" / "val" / "class 1" / f"broken{written[0].suffix}"
    broken.write_bytes(b"broken")

    classes = [f"class {i}" for i in range(8)]
    checkpoint = save_model(model, folder / "model.pt", classes=classes)
    return Namespace(kind=kind, root=folder / "data", checkpoint=checkpoint, files=files)


def test_the_views_of_evaluation_match_plain_code(noise):
    for path, plain in noise.files.items():
        pixels = evaluation.read_pixels(path, TINY, num_clips=5)
        views = evaluation.to_views(pixels, 32, num_crops=3)
        torch.testing.assert_close(views, plain.views, atol=1e-5, rtol=0)


def test_one_clip_and_crop_is_the_first_clips_centre(noise):
    for path, plain in noise.files.items():
        pixels = evaluation.read_pixels(path, TINY, num_clips=1)
        view = evaluation.to_views(pixels, 32, num_crops=1)
        centre = plain.views[1:2] if noise.kind == "videos" else plain.views
        torch.testing.assert_close(view, centre, atol=1e-5, rtol=0)


def plain_accuracy(noise) -> str:
    """What the accuracy should be, in percent of all 13 files."""
    ranks = [int((x.logits > x.logits[x.label]).sum()) for x in noise.files.values()]
    top1 = 100 * sum(rank < 1 for rank in ranks) / 13
    top5 = 100 * sum(rank < 5 for rank in ranks) / 13
    return f"top-1 {top1:.2f}%, top-5 {top5:.2f}%; 1 unreadable"


def test_accuracy_matches_plain_code_and_an_unreadable_file_is_wrong(noise, run_script, capsys):
    run_script(evaluation, "--checkpoint", noise.checkpoint, f"--{noise.kind}", noise.root)
    shown = capsys.readouterr()
    assert plain_accuracy(noise) in shown.out
    assert "broken" in shown.err


def save_classifier(path: Path, num_classes: int, classes=None) -> Path:
    return save_model(Classifier(TINY, num_classes), path, classes=classes)


@pytest.mark.parametrize(("options", "words"), [([], "5 of 34,5 unreadable"), (["--all"], "34 un")])
def test_a_folder_is_evaluated_on_every_tenth_file_or_on_all(
    options, words, run_script, tmp_path, capsys
):
    root = touch_numbered(tmp_path / "data", a=21, b=13)  # empty files
    checkpoint = save_classifier(tmp_path / "model.pt", 2, ["a", "b"])
    run_script(evaluation, "--checkpoint", checkpoint, "--images", root, *options)
    shown = capsys.readouterr().out
    for word in words.split(","):
        assert word in shown


def test_other_files_than_those_that_finetuning_held_out_are_warned_of(
    run_script, tmp_path, capsys
):
    root = touch_numbered(tmp_path / "data", a=21, b=13)
    recipe = {"validation": train.fingerprint_of_files(list_labelled(root, "val").paths, root)}
    model = Classifier(TINY, 2)
    checkpoint = save_model(model, tmp_path / "model.pt", classes=["a", "b"], recipe=recipe)
    options = ["--checkpoint", checkpoint, "--images", root]
    run_script(evaluation, *options)
    assert "warning" not in capsys.readouterr().out

    (root / "a" / "00.png").rename(root / "a" / "99.png")  # now every later file moves up
    run_script(evaluation, *options)
    assert "warning" in capsys.readouterr().out


def test_all_is_refused_where_there_is_a_validation_split(run_script, tmp_path):
    checkpoint = save_classifier(tmp_path / "model.pt", 8, sorted(train.SHAPES))
    with pytest.raises(UserError, match="--all"):
        run_script(evaluation, "--checkpoint", checkpoint, "--all", images=True)


@pytest.mark.parametrize(("classes", "word"), [(["cat", "dog"], "circle"), (None, "2 classes")])
def test_a_model_of_other_classes_is_an_error(classes, word, run_script, tmp_path):
    checkpoint = save_classifier(tmp_path / "model.pt", 2, classes)
    with pytest.raises(UserError, match=word):
        run_script(evaluation, "--checkpoint", checkpoint, images=True)  # of 8 classes


@pytest.mark.parametrize("noise", ["videos"], indirect=True)
def test_evaluation_shows_its_progress_at_each_tenth(noise, run_script, capsys):
    run_script(evaluation, "--checkpoint", noise.checkpoint, "--videos", noise.root)
    lines = re.findall(r"(\d+) of 13 files.* (\d+\.\d+)%", capsys.readouterr().out)
    assert {10 * int(done) // 13 for done, _ in lines} == set(range(1, 10))

    is_right = []
    for path in train.list_media(noise.root, "videos", "val").paths:
        file = noise.files.get(path)  # None for the broken one
        is_right.append(file is not None and int(file.logits.argmax()) == file.label)
    for done, top1 in lines:
        expected = 100 * np.mean(is_right[: int(done)])
        assert float(top1) == pytest.approx(expected, abs=0.006)


def test_progress_is_also_shown_after_half_a_minute(monkeypatch, capsys):
    seconds = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    progress = evaluation.Progress(1000, train.Ranks("cpu"))
    for done in range(1, 10):
        seconds += 16
        progress.show(done, 50.0)
    assert re.findall(r"(\d+) of 1,000", capsys.readouterr().out) == ["2", "4", "6", "8"]


@pytest.mark.parametrize(("pattern", "is_warned"), [("dog{}", True), ("n{:08}", False)])
def test_a_warning_if_folders_are_not_named_like_imagenets(
    pattern, is_warned, run_script, tmp_path, capsys
):
    folders = [f"val/{pattern.format(i)}/1.png" for i in range(1000)]
    root = touch(tmp_path / "data", *folders)
    checkpoint = save_model(Classifier(TINY, 1000), tmp_path / "model.pt")
    run_script(evaluation, "--checkpoint", checkpoint, "--images", root)
    assert ("warning:" in capsys.readouterr().out) == is_warned


# ------------------------------------------------------------------------------------------------
# Evaluation of single files


def test_the_five_best_labels_match_plain_code(noise, run_script, capsys):
    run_script(evaluation, "--checkpoint", noise.checkpoint, *noise.files)
    lines = iter(capsys.readouterr().out.splitlines())
    for path, plain in noise.files.items():
        assert next(lines) == path
        best = plain.logits.softmax(0).topk(5)
        for value, index in zip(best.values.tolist(), best.indices.tolist()):
            percent, label = next(lines).split("%")
            assert float(percent) == pytest.approx(100 * value, abs=0.011)
            assert label.strip() == f"class {index}"
    assert not list(lines)


def test_a_folder_stands_for_the_images_and_videos_in_it(run_script, tmp_path, capsys):
    checkpoint = save_classifier(tmp_path / "model.pt", 3)
    folder = tmp_path / "media"
    image = write_noise(folder, "images", 0)
    video = write_noise(folder / "deep" / "deeper", "videos", 1)
    touch(folder, "notes.txt", ".hidden.png", ".hidden/1.png")
    single = write_noise(tmp_path, "images", 2)

    run_script(evaluation, "--checkpoint", checkpoint, folder, single)
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if not line.startswith(" ")]
    assert shown == [str(image), str(video), str(single)]


@pytest.mark.parametrize("model", [OmniMAE(TINY), Classifier(TINY, 3)])
def test_an_unreadable_file_is_named_and_the_others_are_done(model, tmp_path, capsys):
    checkpoint = save_model(model, tmp_path / "model.pt")
    first = write_noise(tmp_path, "images", 1)
    last = write_noise(tmp_path, "images", 2)
    touch(tmp_path, "broken.png")

    files = [first, tmp_path / "broken.png", last]
    options = ["--checkpoint", checkpoint, "--device", "cpu", "--out", tmp_path / "out"]
    assert "1 of 3" in end_of(evaluation, *options, *files)  # a text: the exit code is 1
    shown = capsys.readouterr()
    assert "broken.png" in shown.err
    assert "1.png" in shown.out
    assert "2.png" in shown.out


def test_labels_of_files_come_from_a_labels_json(run_script, tmp_path, capsys):
    checkpoint = save_classifier(tmp_path / "model.pt", 2, ["a", "b"])
    labels = tmp_path / "labels.json"
    labels.write_text('{"Growing": "1", "Moving": "0"}')
    image = write_noise(tmp_path, "images", 0)
    run_script(evaluation, "--checkpoint", checkpoint, "--labels", labels, image)
    assert {"Growing", "Moving"} < set(capsys.readouterr().out.split())


WNIDS = ["n01440764", *[f"n1{i:07}" for i in range(999)]]  # sorted, as ImageNet's
DOGS = [f"dog {i}" for i in range(1000)]


@pytest.mark.parametrize(
    ("classes", "num", "first"),
    [(None, 1000, "tench"), (WNIDS, 1000, "tench"), (DOGS, 1000, "dog 0"), (None, 3, "class 0")],
)
def test_a_class_is_named_by_imagenet_the_checkpoint_or_its_number(classes, num, first):
    model = Classifier(TINY, num)
    model.classes = classes
    names = evaluation.class_names(model, None)
    assert len(names) == num
    assert names[0] == first


@pytest.mark.parametrize(("options", "num_masked"), [([], 12), (["--mask-ratio", 0.5], 8)])
def test_a_reconstruction_hides_the_mask_ratio(options, num_masked, tiny, run_script, tmp_path):
    image = write_noise(tmp_path, "images", 0)
    checkpoint = save_model(tiny, tmp_path / "tiny.pt")
    out = run_script(evaluation, "--checkpoint", checkpoint, *options, image)
    picture = PIL.Image.open(out / f"{image.name}.png")
    seen = np.array(picture.crop((36, 2, 68, 34))).astype(
        int
    )  # the second of three panels, with 2 pixels between them
    patches = seen.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, -1)
    is_grey = abs(patches - 127) <= 1
    assert is_grey.all(axis=1).sum() == num_masked


def test_a_files_reconstruction_is_the_same_each_time(tiny, run_script, tmp_path):
    image = write_noise(tmp_path, "images", 0)
    checkpoint = save_model(tiny, tmp_path / "tiny.pt")
    one = run_script(evaluation, "--checkpoint", checkpoint, image, out="one")
    other = run_script(evaluation, "--checkpoint", checkpoint, image, out="other")
    name = f"{image.name}.png"
    assert (one / name).read_bytes() == (other / name).read_bytes()


def test_each_file_has_a_picture_in_a_folder_like_its_own(tiny, run_script, tmp_path):
    checkpoint = save_model(tiny, tmp_path / "tiny.pt")
    cat = write_noise(tmp_path / "cat", "images", 0)
    dog = write_noise(tmp_path / "dog", "images", 0)
    film = write_noise(tmp_path / "dog", "videos", 1)
    out = run_script(evaluation, "--checkpoint", checkpoint, cat, dog, film)
    for name in ("cat/0.png.png", "dog/0.png.png"):
        assert PIL.Image.open(out / name).size == (3 * 34 + 2, 34 + 2)
    assert PIL.Image.open(out / "dog" / "1.mp4.png").size == (4 * 34 + 2, 3 * 34 + 2)  # frames


def test_a_classifier_does_not_reconstruct(tmp_path):
    checkpoint = save_classifier(tmp_path / "model.pt", 2)
    options = ["--checkpoint", checkpoint, "--mask-ratio", 0.5, "x.jpg"]
    assert "--mask-ratio" in end_of(evaluation, *options)


def test_names_of_another_number_of_classes_are_an_error(tmp_path):
    checkpoint = save_classifier(tmp_path / "model.pt", 2)
    labels = tmp_path / "labels.json"
    labels.write_text('{"a": "0", "b": "1", "c": "2"}')
    options = ["--checkpoint", checkpoint, "--labels", labels, "x.jpg"]
    assert "labels.json" in end_of(evaluation, *options)


def test_a_pretrained_model_is_not_evaluated(tiny, tmp_path):
    checkpoint = save_model(tiny, tmp_path / "tiny.pt")
    assert "pretraining" in end_of(evaluation, "--checkpoint", checkpoint, "--images", "x")


def test_a_folder_without_media_is_an_error_that_names_it(run_script, tmp_path):
    checkpoint = save_model(Classifier(TINY, 3), tmp_path / "model.pt")
    touch(tmp_path, "texts/notes.txt")
    with pytest.raises(UserError, match="texts"):
        run_script(evaluation, "--checkpoint", checkpoint, tmp_path / "texts")


# ------------------------------------------------------------------------------------------------
# Real processes


def run_as(rank: int, port: int, script, options: str) -> None:
    """Runs a script as one of two processes, with the variables that torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    script.main(script.parse_args(options.split()))


def run_twice(script, options: str) -> None:
    """Runs a script as two processes that share the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, script, options)
    torch.multiprocessing.start_processes(run_as, arguments, 2, start_method="fork")


@pytest.mark.parametrize("noise", ["images"], indirect=True)
def test_two_processes_count_each_file_once(noise, capfd):
    options = f"--checkpoint {noise.checkpoint} --images {noise.root} --device cpu --workers 0"
    run_twice(evaluation, options)
    assert capfd.readouterr().out.count(plain_accuracy(noise)) == 1


def test_files_are_refused_by_two_processes(tmp_path):
    checkpoint = save_classifier(tmp_path / "model.pt", 3)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="one process"):
        run_twice(evaluation, f"--checkpoint {checkpoint} --device cpu x.jpg")


def test_two_processes_finetune_as_one(small, tmp_path):
    options = f"--checkpoint scratch --model tiny --images {small}/images --epochs 2 --lr 0.002"
    options += " --batch-size 8 --micro-batch 2 --augment crop --drop-path 0"
    options += f" --device cpu --workers 0 --out {tmp_path}"
    finetune.main(finetune.parse_args(f"{options}/one".split()))
    run_twice(finetune, f"{options}/two")
    two, one = (weights_of(tmp_path / name) for name in ("two", "one"))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    losses = log_of(tmp_path / "one", "loss")
    assert log_of(tmp_path / "two", "loss") == pytest.approx(losses, abs=1e-4)


def start(*command) -> subprocess.Popen:
    """Starts `python COMMAND` in a session of its own, which a signal reaches as a whole."""
    argv = [sys.executable, *[str(word) for word in command]]
    # As many threads as here: the sums of more differ in their last bits.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, env=environment, start_new_session=True)


def options_of_run(small: Path, out: Path) -> list[str]:
    """Six steps of the demo model, each of 4 micro-batches. Each is saved: validation is due."""
    options = "--model demo --epochs 3 --batch-size 16 --micro-batch 4"
    options += f" --images {small}/images --videos {small}/videos"
    options += f" --out {out} --device cpu --workers 1"
    return options.split()


@pytest.fixture(scope="module")
def unbroken(small, tmp_path_factory) -> Path:
    """The run that nothing stops."""
    out = tmp_path_factory.mktemp("unbroken")
    train.main(train.parse_args(options_of_run(small, out)))
    return out


@pytest.fixture(scope="module")
def killed(small, tmp_path_factory) -> Path:
    """The run, killed with its worker at any moment after its first save."""
    out = tmp_path_factory.mktemp("killed")
    process = start(HERE / "train.py", *options_of_run(small, out))
    while process.poll() is None and not (out / "last.pt").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert omnimae.read_checkpoint(out / "last.pt")["step"] < 6
    return out


def test_a_killed_run_resumes_bit_for_bit(killed, small, tmp_path, unbroken):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    train.main(train.parse_args(options_of_run(small, tmp_path)))
    resumed = omnimae.read_checkpoint(tmp_path / "last.pt")
    whole = omnimae.read_checkpoint(unbroken / "last.pt")
    assert resumed["step"] == whole["step"] == 6
    same_bits(resumed["model"], whole["model"])
    same_bits(resumed["optimizer"], whole["optimizer"])


def test_two_processes_reach_the_loss_and_weights_of_one(killed, small, tmp_path, unbroken):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start(*torchrun, HERE / "train.py", *options_of_run(small, tmp_path))
    assert process.wait() == 0

    two = omnimae.read_checkpoint(tmp_path / "last.pt")
    one = omnimae.read_checkpoint(unbroken / "last.pt")
    assert two["step"] == 6
    torch.testing.assert_close(two["model"], one["model"], atol=1e-5, rtol=0)  # up to rounding
    assert log_of(tmp_path, "loss")[-1] == pytest.approx(log_of(unbroken, "loss")[-1], abs=1e-4)
