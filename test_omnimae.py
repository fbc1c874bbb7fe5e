"""The tests, which also show how to call everything: `pytest`, two minutes on two cores.

They follow the paper: model, checkpoints, media, pretraining, finetuning, evaluation, and last real
processes. Nothing is downloaded; images, films and data sets are written here.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import finetune
import omnimae
import train
from omnimae import Classifier, OmniMAE, OmniMAEConfig, random_mask

HERE, v2 = Path(__file__).parent, train.v2  # v2: torchvision's transforms
torch.set_num_threads(1)  # the models are tiny
TINY = OmniMAEConfig(
    image_size=32, num_frames=4, patch_size=(2, 8, 8), dim=64, depth=2, heads=4,
    decoder_dim=32, decoder_depth=2, decoder_heads=4,
    image_mask_ratio=0.75, video_mask_ratio=0.90,
)  # fmt: skip
omnimae.MODELS["tiny"] = TINY  # so that the scripts know it


@pytest.fixture
def tiny() -> OmniMAE:
    torch.manual_seed(0)
    return OmniMAE(TINY)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A small demo set: 48 images and 32 videos, for validation 16 and 8."""
    train.write_demo_data(tmp_path_factory.mktemp("data") / "demo", 48, 32, 16, 8)
    return tmp_path_factory.getbasetemp() / "data0" / "demo"


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def clips(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def write_video(path: Path, frames, fps, codec="libx264", options=None, pix_fmt="yuv420p") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {"g": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_film(path: Path, num: int, fps=12, codec="libx264", options=None) -> Path:
    """A video whose frames carry their number, as eight black or white squares: 64 x 32 pixels."""
    bits = (np.arange(num)[:, None] >> np.arange(8)) & 1
    frames = np.repeat(np.repeat(bits.reshape(num, 2, 4), 16, axis=1), 16, axis=2) * 235
    frames = np.repeat(frames[..., None], 3, axis=3).astype(np.uint8)
    return write_video(path, frames, fps, codec, options)


def numbers_in(clip: torch.Tensor) -> list[int]:
    """The numbers that the frames of a film's clip (T, 3, 32, 64) carry."""
    squares = clip.float().mean(1).unflatten(2, (4, 16)).unflatten(1, (2, 16)).mean((2, 4)) > 118
    return (squares.flatten(1).long() << torch.arange(8)).sum(1).tolist()


def save_model(model, path: Path, **more) -> Path:
    torch.save({"model": model.state_dict(), "config": dict(vars(model.cfg))} | more, path)
    return path


def same_bits(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------
# The model


def test_an_image_is_a_one_frame_video(tiny):
    x, mask = images(), random_mask(2, *TINY.masking("images"))
    patches, grid = omnimae.to_patches(x, TINY)  # (B, N, P)
    first, second = patches.unflatten(2, (2, -1)).unbind(2)
    assert grid == (1, 4, 4) and torch.equal(first, second)  # the frame is repeated
    assert torch.equal(tiny(x[:, :, None], mask)[1], tiny(x, mask)[1])


def test_a_patch_holds_frames_then_rows_then_columns_then_channels():
    x = torch.randn(2, 3, 4, 16, 24)
    patches = omnimae.patchify(x, (2, 8, 4))
    patch = x[1, :, 2:4, 8:16, 4:8]  # the second in time, row and column
    assert torch.equal(patches[1, 12 + 6 + 1], patch.permute(1, 2, 3, 0).flatten())
    assert torch.equal(omnimae.unpatchify(patches, (2, 8, 4), (2, 2, 6)), x)


def test_masks_are_drawn_uniformly_over_time_and_space(tiny):
    mask = random_mask(4000, 64, 0.9, torch.Generator().manual_seed(0))
    assert torch.equal(mask, random_mask(4000, 64, 0.9, torch.Generator().manual_seed(0)))
    frequency = mask.float().mean(0)  # (N,): 57 of 64 patches are masked
    assert (frequency - 57 / 64).abs().max() < 5 * (57 / 64 * 7 / 64 / 4000) ** 0.5
    together = torch.corrcoef(mask.T.float()) - torch.eye(64)
    assert together.abs().max() < 0.1  # tube masks would correlate at 1
    assert tiny(images())[2].sum(1).tolist() == [12, 12]  # by default at the model's ratio
    for name, image, video in (("vit_b", 176, 1489), ("vit_h", 230, 1945)):  # as in the paper
        cfg = omnimae.MODELS[name]
        assert random_mask(1, *cfg.masking("images")).sum() == image
        assert random_mask(1, *cfg.masking("videos")).sum() == video


def test_masked_pixels_are_seen_by_the_loss_only(tiny):
    x, mask = clips(), random_mask(2, 32, 0.9)
    patches = omnimae.patchify(x, TINY.patch_size)
    other = patches + torch.randn_like(patches) * mask[..., None]
    other = omnimae.unpatchify(other, TINY.patch_size, TINY.grid)
    assert torch.equal(tiny(other, mask)[1], tiny(x, mask)[1])
    assert tiny(other, mask)[0] != tiny(x, mask)[0]


def test_the_loss_is_the_squared_error_of_masked_patches_normalised(tiny):
    x, mask = clips(), random_mask(2, 32, 0.9)
    x[:, :, :, :8] *= 1e-3  # faint patches show the 1e-6
    loss, pred, _ = tiny(x, mask)
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    pixels, errors = x.movedim(1, -1) * std + mean, []  # (B, T, H, W, 3)
    for (b, n), got in zip(mask.nonzero().tolist(), pred.flatten(0, 1)):
        t, h, w = n // 16 * 2, n // 4 % 4 * 8, n % 4 * 8
        patch = pixels[b, t : t + 2, h : h + 8, w : w + 8].reshape(128, 3)
        patch = patch - patch.mean(0)  # per channel
        patch = patch / (patch.square().sum(0) / 127 + 1e-6).sqrt()
        errors.append((got - patch.flatten()).square().mean().item())
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in tiny(clips())[:2]} == {torch.float32}


def test_pretraining_starts_from_xavier_weights_and_a_small_pixel_head(tiny):
    for name, module in tiny.named_modules():
        if isinstance(module, torch.nn.Linear):
            uniform = (6 / sum(module.weight.shape)) ** 0.5, 3**0.5  # largest, and in deviations
            most, std = uniform if name != "decoder.head" else (0.1, 5)
            assert most * 0.7 < module.weight.abs().max() <= most, name
            assert module.weight.std().item() == pytest.approx(most / std, rel=0.05), name
            if module.bias is not None and name != "encoder.patch_embed":
                assert not module.bias.any(), name
    assert not tiny.decoder.mask_token.any()
    bias = tiny.encoder.patch_embed.bias  # uniform within 1 / sqrt(P), as a convolution's
    assert 0.9 * 384**-0.5 < bias.abs().max() <= 384**-0.5
    weight = Classifier(TINY, 10).encoder.blocks[0].mlp.fc1.weight  # from scratch: normal
    assert weight.std().item() == pytest.approx(0.02, rel=0.05) and weight.abs().max() > 0.05
    assert {x.eps for x in tiny.modules() if isinstance(x, torch.nn.LayerNorm)} == {1e-6}


def test_drop_path_grows_linearly_and_skips_branches_of_samples_in_training_only():
    torch.manual_seed(0)
    model = Classifier(replace(TINY, depth=3), 10, drop_path=0.5)
    x = torch.randn(1, 3, 64).expand(2000, -1, -1)
    for block, rate in zip(model.encoder.blocks, (0, 0.25, 0.5)):
        out = block(x).detach()
        assert len((out[:, 0, 0] * 1e4).round().unique()) == (4 if rate else 1)  # kinds of samples
        skipped = (out == x).flatten(1).all(1).float().mean().item()  # both branches
        assert skipped == pytest.approx(rate**2, abs=0.03)
    assert torch.equal(model.eval()(images()), model(images()))


def predicting(model: OmniMAE, pattern: torch.Tensor) -> OmniMAE:
    """A model that predicts the same pattern for each masked patch, whatever it sees."""
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.copy_(pattern.flatten())
    return model


def test_a_perfect_prediction_gives_the_clip_back(tiny):
    pattern = torch.randn(128, 3)
    pattern = (pattern - pattern.mean(0)) / pattern.std(0)
    means, scales = 0.4 + 0.2 * torch.rand(2, 32, 1, 3), 0.02 + 0.03 * torch.rand(2, 32, 1, 3)
    patches = (means + scales * pattern).flatten(2)  # (B, N, P)
    clip = omnimae.unpatchify(patches, TINY.patch_size, TINY.grid)
    x, mask = omnimae.normalize(clip), random_mask(2, 32, 0.9)
    assert predicting(tiny, pattern)(x, mask)[0] < 1e-4
    torch.testing.assert_close(tiny.reconstruct(x, mask), clip, atol=1e-4, rtol=0)
    wild = predicting(tiny, 99 * pattern).reconstruct(x, mask)
    assert wild.min() == 0 and wild.max() == 1  # still a picture


def test_an_images_reconstruction_is_the_mean_of_its_two_frames(tiny):
    pixels, mask = 0.4 + 0.2 * torch.rand(2, 3, 32, 32), random_mask(2, 16, 0.75)
    pattern = torch.tensor([1.0, -1.0])[:, None].expand(2, 192)  # as far above the mean as below
    picture = predicting(tiny, pattern).reconstruct(omnimae.normalize(pixels), mask)[:, :, 0]
    hidden = F.interpolate(mask.float().view(2, 1, 4, 4), scale_factor=8)  # (B, 1, H, W)
    means = F.interpolate(F.avg_pool2d(pixels, 8), scale_factor=8)
    torch.testing.assert_close(picture, torch.where(hidden > 0, means, pixels))


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_a_picture_shows_the_original_what_is_seen_and_the_reconstruction(tiny, kind):
    video = torch.rand(3, 1 if kind == "images" else 4, 32, 32)
    x, mask = omnimae.normalize(video[None])[0], random_mask(1, *TINY.masking(kind))[0]
    picture = omnimae.pil_to_tensor(omnimae.draw_reconstruction(tiny, x, mask)) / 255
    panels = picture[:, 2:, 2:].unfold(1, 32, 34).unfold(2, 32, 34)  # (3, rows, columns, 32, 32)
    hidden = mask.view(-1, 1, 4, 1, 4, 1).expand(-1, 2, -1, 8, -1, 8).reshape(-1, 32, 32)
    seen = video.masked_fill(hidden[: video.shape[1]], 0.5)
    wanted = torch.stack([video, seen, tiny.reconstruct(x[None], mask[None])[0]], 1)
    torch.testing.assert_close(panels.reshape(wanted.shape), wanted, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 30, 32), (2, 3, 4, 48, 48)])
def test_inputs_of_wrong_shape_or_dtype_are_errors(tiny, shape):
    for x in (torch.zeros(shape), images().byte()):
        with pytest.raises(ValueError, match="normalize"):
            tiny(x)
    with pytest.raises(ValueError, match="uint8"):
        omnimae.normalize(images().long())


def test_a_mask_that_does_not_fit_is_an_error(tiny):
    different = torch.arange(16) < torch.tensor([[12], [11]])  # numbers of masked patches
    for mask in (different, torch.zeros(2, 16).bool(), torch.ones(2, 16).bool(), different[:1]):
        with pytest.raises(ValueError, match="mask"):
            tiny(images(), mask)
    for ratio in (0.06, 1.0):  # of 16 patches
        with pytest.raises(ValueError, match="ratio"):
            random_mask(2, 16, ratio)


# Expected numbers come from the released code, run on a tiny model with these weights.


def released_layout(model) -> dict[str, torch.Tensor]:
    """A model's state dict with the keys and shapes of the released files."""
    names = {"decoder.head.": "head.", "decoder.mask": "trunk.mask", "head.": "head.",
             "decoder.embed": "decoder_embed", "decoder.blocks": "decoder_blocks",
             "encoder.patch_embed": "trunk.patch_embed.proj.1", "encoder.": "trunk.",
             "norm.": "trunk.norm."}  # fmt: skip
    state = {}
    for key, value in model.state_dict().items():
        old = next((x for x in names if key.startswith(x)), "decoder.")
        new = names.get(old, "trunk.decoder.").replace("decoder_", "trunk.decoder.decoder_")
        if key.endswith("pos_embed"):
            value = value[None]  # (1, N, D)
        if old == "encoder.patch_embed" and value.ndim == 2:
            value = value.unflatten(1, (*model.cfg.patch_size, 3)).permute(0, 4, 1, 2, 3)
        state[new + key.removeprefix(old)] = value  # the embedding: (D, 3, t, h, w)
    return state


def released_state(model) -> dict[str, torch.Tensor]:
    rng, state = np.random.RandomState(0), released_layout(model)
    for key in sorted(key for key in state if not key.endswith("pos_embed")):
        value = rng.standard_normal(state[key].shape)
        if value.ndim > 1 and "mask_token" not in key:
            value /= np.sqrt(value[0].size)
        else:
            value = 1 + 0.1 * value if "norm" in key and key.endswith("weight") else 0.1 * value
        state[key] = torch.from_numpy(value).float()
    return state


def released_input(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(1).standard_normal(shape)).float()


@pytest.mark.parametrize(
    ("shape", "masked", "loss", "total", "first"),
    [((2, 3, 32, 32), 12, 1.9721187, -360.58317, [-0.7851663, 0.5453372, -0.8490965]),
     ((2, 3, 4, 32, 32), 28, 1.9156719, -546.03206, [-0.8775964, 0.3987211, -0.3576223])],
)  # fmt: skip
def test_pretraining_gives_the_released_numbers(tiny, shape, masked, loss, total, first):
    level = "heads.0.projector." if masked == 28 else "head."  # as the released trainer saves it
    state = {key.replace("head.", level): value for key, value in released_state(tiny).items()}
    tiny.load_state_dict(omnimae.convert_released(state))
    num = 16 if len(shape) == 4 else 32
    rng, mask = np.random.RandomState(2), torch.zeros(2, num, dtype=torch.bool)
    for row in mask:
        row[rng.permutation(num)[:masked]] = True
    got, pred, _ = tiny(released_input(*shape), mask)
    assert got.item() == pytest.approx(loss, abs=1e-5)
    assert pred.flatten()[:3].tolist() == pytest.approx(first, abs=1e-5)
    assert pred.sum().item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "first", "second"),  # the first logits of the two samples
    [((2, 3, 32, 32), [-0.3827533, 0.8951405, -1.4636081], [-0.1413702, 0.6640937, -1.2242469]),
     ((2, 3, 4, 32, 32), [0.6544462, 0.8064373, -0.8966929], [0.5888182, 0.6105245, -0.2675635]),
     ((2, 3, 48, 48), [0.1560981, 1.0797716, -1.3468279], [0.0473537, 1.0696520, -1.2776462])],
)  # fmt: skip
def test_a_classifier_gives_the_released_logits(shape, first, second):
    model = Classifier(TINY, 10)
    level = {32: "head.", 48: "heads.0.0."}[shape[-1]]
    state = {key.replace("head.", level): value for key, value in released_state(model).items()}
    model.load_state_dict(omnimae.convert_released(state))
    got = model(released_input(*shape))[:, :3]
    torch.testing.assert_close(got, torch.tensor([first, second]), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------
# Checkpoints: the nine released ones and one's own

PARAMETERS = {  # trainable: in pretraining, with 1000 classes, with 174 classes
    "b": (94_217_856, 87_005_416, 86_370_222),
    "l": (317_803_520, 304_910_312, 304_063_662),
    "h": (657_655_448, 632_468_200, 631_410_094),
}
RELEASES = {"pretrain": ("pretrain", None), "in1k": ("in1k_ft", 1000), "ssv2": ("ssv2_ft", 174)}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("size", PARAMETERS)
def test_a_file_in_a_released_layout_loads_and_has_the_papers_size(size, release, tmp_path):
    cfg, classes = omnimae.MODELS[f"vit_{size}"], RELEASES[release][1]
    with torch.device("meta"):
        shapes = released_layout(Classifier(cfg, classes) if classes else OmniMAE(cfg))
    value = torch.full((), 0.5)  # repeated, so that nothing large is written
    torch.save({key: value.expand(x.shape) for key, x in shapes.items()}, tmp_path / "a.torch")
    model = omnimae.load_checkpoint(tmp_path / "a.torch")
    assert type(model) is (Classifier if classes else OmniMAE) and not model.training
    parameters = PARAMETERS[size][[*RELEASES].index(release)]
    assert sum(x.numel() for x in model.parameters() if x.requires_grad) == parameters
    assert (cfg.heads, cfg.decoder_heads) == (12 if size == "b" else 16, 16)


def test_a_name_is_downloaded_once_from_the_released_address(tmp_path, monkeypatch):
    state = released_state(Classifier(omnimae.MODELS["demo"], 8))
    urls, own = [], ["https://one/last.pt", "https://two/last.pt"]  # these are not the same file
    download = lambda url, path, *_, **__: urls.append(url) or torch.save(state, path)  # noqa: E731
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in [*omnimae.CHECKPOINTS, *omnimae.CHECKPOINTS, *own]:
        assert omnimae.load_checkpoint(name).head.out_features == 8
    files = [f"vit{size}_{file}.torch" for size in PARAMETERS for file, _ in RELEASES.values()]
    base = "https://dl.fbaipublicfiles.com/omnivore/omnimae_ckpts/"
    assert urls == [base + file for file in files] + own


@pytest.mark.parametrize("fault", ["missing", "damaged", "code", "missing key", "another size"])
def test_a_bad_checkpoint_is_an_error_that_names_it(fault, tmp_path):
    state, path = released_state(Classifier(omnimae.MODELS["demo"], 8)), tmp_path / "bad.pt"
    small = released_state(Classifier(replace(TINY, dim=32), 8))
    if fault == "missing key":
        del state["trunk.blocks.1.norm1.bias"]
    torch.save({"code": {"model": state, "x": len}, "another size": small}.get(fault, state), path)
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="bad.pt"):
        omnimae.load_checkpoint(tmp_path / "nowhere" / "bad.pt" if fault == "missing" else path)


# ------------------------------------------------------------------------------------------------
# Media: data sets as people download them, images and clips


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_imagenet_has_a_folder_for_each_class_in_train_and_val(tmp_path):
    names = [f"{x}.JPEG" for x in ("n02/b", "n02/a", "n02/c", "n01/d", "n03/e")]
    root, classes = touch(tmp_path, *[f"train/{x}" for x in names]), ["n01", "n02", "n03"]
    touch(tmp_path, "val/n02/f.JPEG", "val/n01/g.JPEG", "val/n03/h.JPEG")
    paths = [f"{root}/train/{x}" for x in sorted(names)]
    assert omnimae.list_media(root, "images") == (paths, [0, 1, 1, 1, 2], classes)
    paths = [f"{root}/val/{x}.JPEG" for x in ("n01/g", "n02/f", "n03/h")]
    assert omnimae.list_media(root, "images", "val") == (paths, [0, 1, 2], classes)


def test_ssv2_has_lists_of_videos_and_templates(tmp_path):
    (tmp_path / "labels").mkdir()
    for name, content in {
        "labels": {f"Class number {i}": str(i) for i in (10, *range(10))},
        "train": [{"id": x, "template": f"Class [number] {i}"} for x, i in (("7", 10), ("3", 9))],
        "validation": [{"id": "5", "template": "[Class] number [2]"}],
    }.items():  # fmt: skip
        (tmp_path / "labels" / f"{name}.json").write_text(json.dumps(content))
    classes = [f"Class number {i}" for i in range(11)]
    paths = [f"{tmp_path}/20bn-something-something-v2/{x}.webm" for x in (7, 3, 5)]
    assert omnimae.list_media(tmp_path, "videos") == (paths[:2], [10, 9], classes)
    assert omnimae.list_media(tmp_path, "videos", "val") == (paths[2:], [2], classes)


def test_other_data_sets_are_folders_of_classes_or_flat_without_labels(tmp_path):
    names = ("b/2.MP4", "a/1.webm", "b/1.mov", "b/notes.txt", "b/.hidden.mp4", ".trash/3.mp4")
    classes, flat = touch(tmp_path / "x", *names), touch(tmp_path / "y", "2.png", "1.jpg", "a.mp4")
    paths = [f"{classes}/{x}" for x in ("a/1.webm", "b/1.mov", "b/2.MP4")]
    assert omnimae.list_media(classes, "videos") == (paths, [0, 1, 1], ["a", "b"])
    assert omnimae.list_media(flat, "images") == ([f"{flat}/1.jpg", f"{flat}/2.png"], None, None)
    with pytest.raises(ValueError, match="val"):
        omnimae.list_media(classes, "videos", "val")
    for i, wrong in enumerate([
        ("readme.txt",), ("1.jpg", "a/2.jpg"),  # empty; both flat and with a class
        ("x/train/a/1.jpg", "x/val/a/1.jpg"), ("a/1.jpg", "b/more/1.jpg"),  # too high, too deep
    ]):  # fmt: skip
        with pytest.raises(ValueError, match=f"data{i}"):
            omnimae.list_media(touch(tmp_path / f"data{i}", *wrong), "images")


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P"])
def test_an_image_is_read_as_rgb_whatever_its_mode(mode, tmp_path):
    pixels = np.full((4, 6, 3), (250, 10, 20), np.uint8)
    pixels[:, 3:] = (5, 60, 240)  # left red, right blue
    image = PIL.Image.fromarray(pixels).convert(mode, palette=PIL.Image.ADAPTIVE)
    image.save(tmp_path / "image", "TIFF" if mode == "CMYK" else "PNG")
    assert torch.equal(omnimae.read_image(tmp_path / "image").movedim(0, 2), torch.tensor(pixels))
    PIL.Image.fromarray(np.full((4, 6), 200 * 256 + 99, np.uint16)).save(tmp_path / "grey.png")
    assert (omnimae.read_image(tmp_path / "grey.png") == 200).all()  # 16 bits: the high byte


def right_frames(path: Path, start, duration, num_frames: int) -> list[int]:
    """The plain rule: of the n frames in start <= time < start + duration, linspace(0, n - 1)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        ticks = sorted(frame.pts for frame in container.decode(stream))
        times = [(tick - ticks[0]) * stream.time_base for tick in ticks]
    end = Fraction(start) + Fraction(duration)
    inside = [i for i, second in enumerate(times) if start <= second < end]
    return [inside[int(x)] for x in np.linspace(0, len(inside) - 1, num_frames)]


FILMS = {
    "mp4": ("libx264", {"g": "10"}),
    "webm": ("libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
}


@pytest.mark.parametrize("suffix", FILMS)
@pytest.mark.parametrize("fps", [8, 10, 12, 15, 24, 25, 30, Fraction(30000, 1001)], ids=str)
def test_clips_of_2_7_seconds_have_exactly_the_right_frames(fps, suffix, tmp_path):
    num = int(4.5 * fps)
    path = write_film(tmp_path / f"a.{suffix}", num, fps, *FILMS[suffix])
    seconds = Fraction(num) / fps
    if suffix == "webm":  # stores no duration: up to the last frame's time, in ms
        seconds = Fraction(round((num - 1) / fps * 1000), 1000)
    starts = [Fraction(i, 5) for i in (2, 0, 4, 1, 3, 5)]
    for start, clip in zip(starts, omnimae.read_clips(path, starts, 16), strict=True):
        begin = start * (seconds - Fraction(2.7))
        assert numbers_in(clip) == right_frames(path, begin, 2.7, 16), start
    frame = Fraction(12) / fps  # a clip may begin with it, or just after it
    for begin in (0, Fraction(1, 10), 1.25, frame, frame + Fraction(1, 10**6)):
        clip = omnimae.read_clip(path, begin, 2.7, 16)
        assert numbers_in(clip) == right_frames(path, begin, 2.7, 16), begin


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
        begin, end = (math.ceil(x * fps - 1e-6) for x in (start, start + 0.5))
        wanted = [range(60)[begin:end][int(x)] for x in np.linspace(0, end - begin - 1, 8)]
        assert numbers_in(omnimae.read_clip(path, start, 0.5, 8)) == wanted


@pytest.mark.parametrize("suffix", FILMS)
def test_a_short_video_has_one_clip_and_repeats_frames(suffix, tmp_path):
    path = write_film(tmp_path / f"film.{suffix}", 3, 12, *FILMS[suffix])
    for clip in omnimae.read_clips(path, [0, Fraction(4, 5), 1], 8):
        assert clip.dtype == torch.uint8 and numbers_in(clip) == [0, 0, 0, 0, 1, 1, 1, 2]
    PIL.Image.new("RGB", (8, 8), (250, 20, 90)).save(tmp_path / "red.gif")
    assert omnimae.read_clip(tmp_path / "red.gif", 0, 1, 2)[1, :, 4, 4].tolist() == [250, 20, 90]


@pytest.mark.parametrize("name", ["bad.jpg", "bad.mp4"])
def test_a_broken_file_is_an_error_that_names_it(name, tmp_path):
    PIL.Image.effect_noise((60, 40), 50).save(tmp_path / "good.jpg")
    write_film(tmp_path / "good.mp4", 24)
    good = (tmp_path / name.replace("bad", "good")).read_bytes()
    open_files = len(os.listdir("/proc/self/fd"))
    for content in (b"", b"text", good[: len(good) // 2], bytes(7200)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            evaluation.read_pixels(str(tmp_path / name), TINY, num_clips=2)
    assert len(os.listdir("/proc/self/fd")) == open_files


# ------------------------------------------------------------------------------------------------
# The pretraining recipe: steps, rates, views; what a run does


@pytest.fixture
def run_script(data, tmp_path):
    """Runs a script's main in this process on the small data. Returns the run's folder."""
    handlers = {number: signal.getsignal(number) for number in train.SIGNALS}

    def run(script, *options, out="run", images=False, videos=False):
        options = [*options, "--out", tmp_path / out, "--device", "cpu", "--workers", 0]
        options += ["--images", data / "images"] * images + ["--videos", data / "videos"] * videos
        script.main(script.parse_args([str(option) for option in options]))
        return tmp_path / out

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def pretrain(run_script):
    """Pretrains a tiny model for an epoch of 5 steps of 16 views: 3 of images, 2 of videos."""

    def run(*options, images=True, videos=True, **more):
        options = ["--model", "tiny", "--batch-size", 16, "--epochs", 1, "--log-every", 1, *options]
        return run_script(train, *options, images=images, videos=videos, **more)

    return run


@pytest.fixture
def adamw(monkeypatch) -> list:
    """Records AdamW's groups at each step."""
    steps, step = [], torch.optim.AdamW.step

    def recorded(self):
        steps.append([dict(group) for group in self.param_groups])
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return steps


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return omnimae.read_checkpoint(str(run / "last.pt"))["model"]


def log_of(run: Path, field: str) -> list:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[field] for line in lines if field in line]


def order_of(*options, rank=0, world=1) -> list[list[train.Sample]]:
    """The micro-batches of a rank, in a run on 48 images and 32 videos."""
    default = ["--images", "x", "--epochs", "3", "--batch-size", "16", "--device", "cpu"]
    args = train.parse_args(default + [str(option) for option in options])
    run = Namespace(rank=rank, world=world, device=torch.device("cpu"))
    views = {"images": 1, "videos": args.video_views}
    steps = train.Steps({"images": 48, "videos": 32}, views, args, run)
    return list(steps.micro_batches(0))


def test_a_step_has_one_kind_and_an_epoch_as_many_views_as_files():
    batches = [x for seed in (0, 1) for x in order_of("--epochs", 20, "--seed", seed)]
    for batch in batches:
        assert len({sample.kind for sample in batch}) == 1
        assert len(batch) == (16 if batch[0].kind == "images" else 4)  # 4 views of each video
        assert sum(sample.views for sample in batch) == 16
    epochs = [batches[i : i + 5] for i in range(0, 200, 5)]
    for epoch, samples in enumerate([[x for batch in epoch for x in batch] for epoch in epochs]):
        assert {x.epoch for x in samples} == {epoch % 20}
        assert sorted(x.index for x in samples if x.kind == "images") == list(range(48))
        assert len({x.index for x in samples if x.kind == "videos"}) == 8
    kinds = {"".join(batch[0].kind[0] for batch in epoch) for epoch in epochs}
    assert 6 <= len(kinds) <= 10  # 3 and 2 steps have 10 orders
    for kind in train.KINDS:
        assert len({str([b for b in epoch if b[0].kind == kind][0]) for epoch in epochs}) == 40
    assert len({x.index for b in batches for x in b if x.kind == "videos"}) == 32


@pytest.mark.parametrize("world", [1, 2])
def test_processes_and_micro_batches_share_a_steps_samples(world):
    ranks = [order_of("--micro-batch", 4, rank=rank, world=world) for rank in range(world)]
    num = 4 // world  # micro-batches of a rank
    for step, batch in enumerate(order_of()):
        parts = [x for rank in ranks for x in rank[step * num : (step + 1) * num]]
        assert [sample for part in parts for sample in part] == batch
    for options in ("--batch-size 64", "--micro-batch 5", "--micro-batch 2"):
        with pytest.raises(ValueError, match="batch"):  # too few files, or not divisible
            order_of(*options.split())


@pytest.mark.parametrize(
    ("options", "values"),
    [("--images x", (800, 2048, 1.6e-3)), ("--images x --batch-size 512", (800, 512, 0.4e-3)),
     ("--images demo", (12, 64, 0.05e-3)), ("--model demo", (12, 64, 6e-4)),
     ("--model demo --images x --batch-size 128 --epochs 3", (3, 128, 12e-4))],
)  # fmt: skip
def test_the_default_learning_rate_is_proportional_to_the_batch_size(options, values):
    args = train.parse_args(options.split())
    assert (args.epochs, args.batch_size, args.lr) == pytest.approx(values)
    assert args.video_views == 4


def test_each_step_uses_and_logs_the_scheduled_learning_rate(pretrain, adamw):
    run = pretrain("--lr", 1e-3, "--epochs", 2)
    angles = [math.pi * (step / 10 - 0.05) / 0.95 for step in range(1, 10)]
    rates = [1e-6] + [0.5e-3 * (1 + math.cos(angle)) for angle in angles]
    for column in range(2):
        assert [groups[column]["lr"] for groups in adamw] == pytest.approx(rates)
    assert log_of(run, "lr") == pytest.approx(rates)
    assert train.learning_rate(25, 1000, 1.6e-3) == pytest.approx((1e-6 + 1.6e-3) / 2)  # warm-up
    shapes = {0.0: [], 0.05: []}
    for group in adamw[0]:
        assert group["betas"] == (0.9, 0.95)
        shapes[group["weight_decay"]] += [x.shape for x in group["params"]]
    named = list(OmniMAE(TINY).named_parameters())
    spared = [x.shape for name, x in named if name.endswith("bias") or "norm" in name]
    assert sorted(shapes[0.0]) == sorted(spared)  # no decay on biases and norms
    assert len(shapes[0.05]) == len(named) - len(spared)


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> dict[str, str]:
    """An image and a film whose pixels encode their position: red 4 x, green 4 y, blue is noise."""
    folder, (y, x) = tmp_path_factory.mktemp("maps"), np.mgrid[:60, :60]
    noise = np.random.default_rng(0).integers(0, 256, (60, 60))
    pixels = np.stack([4 * x, 4 * y, noise], 2).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "map.png")
    film = write_video(folder / "map.mkv", 4 * [pixels], 2, "ffv1", pix_fmt="bgr0")
    return {"images": str(folder / "map.png"), "videos": str(film)}


def crop_of(view: torch.Tensor) -> tuple[list[int], bool]:
    """Where a map's view (3, 32, 32) was cut: top, left, height, width; and if it is flipped."""
    pixel = np.arange(6, 26) + 0.5  # away from the edges
    y_step, top = np.polyfit(pixel, view[1, 6:26, 16].float() / 4 + 0.5, 1)
    x_step, left = np.polyfit(pixel, view[0, 16, 6:26].float() / 4 + 0.5, 1)
    box = top, left + 32 * min(0, x_step), 32 * y_step, 32 * abs(x_step)
    return [round(x) for x in box], x_step < 0


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
    files = finetune.Labelled(TINY, kind, omnimae.Listing([maps[kind]], [0], []), 0, augment)
    return [files[train.Sample(kind, epoch, 0, 1)] for epoch in range(num)]


@pytest.mark.parametrize("kind", train.KINDS)
@pytest.mark.parametrize("stage", ["pretraining", "full", "crop"])
def test_a_view_is_the_recipes_crop_flipped_only_in_images(stage, kind, maps, rand_augment):
    if stage == "pretraining":
        views = train.Views(TINY, {kind: [maps[kind]]}, 0)[train.Sample(kind, 0, 0, 250)][0]
    else:
        views = torch.stack([view for view, _, _ in labelled(maps, kind, 250, stage)])
    views = views if kind == "videos" else views[:, :, None]  # (250, 3, T, 32, 32)
    crops = [crop_of(view[:, 0]) for view in views]
    areas = [height * width / 60**2 for (_, _, height, width), _ in crops]
    least = {"pretraining": {"images": 0.2, "videos": 0.08}[kind], "full": 0.08, "crop": 0.5}[stage]
    assert least - 0.01 < min(areas) < least + 0.04 and max(areas) > 0.93
    flipped = np.mean([flip for _, flip in crops])
    assert 0.4 < flipped < 0.6 if kind == "images" else flipped == 0
    mode = v2.InterpolationMode("bicubic" if kind == "images" else "bilinear")
    for view, (box, flip) in list(zip(views, crops))[:20]:
        whole = omnimae.read_image(maps["images"])
        plain = v2.functional.resized_crop(whole, *box, [32, 32], mode, antialias=True)
        assert torch.equal(view, (plain.flip(2) if flip else plain)[:, None].expand_as(view))


def test_a_view_depends_only_on_seed_epoch_file_and_view(maps):
    def view(seed=0, views=1, **sample):
        files = train.Views(TINY, {"images": [maps["images"]] * 3}, seed)
        return files[train.Sample("images", **{"epoch": 0, "index": 0} | sample, views=views)]

    (pixels, visible), four = view(), view(views=4)
    assert torch.equal(four[0][:1], pixels) and torch.equal(four[1][:1], visible)
    others = [view(seed=1), view(epoch=1), view(index=1), (pixels, visible)]
    assert len({str(x.flatten().tolist()) for x, _ in others}) == 4
    assert len({str(x.tolist()) for _, x in others}) == len({str(x.tolist()) for x in four[1]}) == 4


def test_a_step_of_videos_decodes_each_once_for_four_views(pretrain, monkeypatch):
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda *args: opened.append(args) or real(*args))
    pretrain(images=False)
    assert len(opened) == 2 * 4 + 2 * 8  # 2 steps of 16 views; 8 held-out videos, twice


def test_training_clips_start_anywhere_from_the_first_to_the_last_possible_second(tmp_path):
    film = write_film(tmp_path / "film.mp4", 60)  # 5 seconds
    views = train.Views(TINY, {"videos": [str(film)]}, 0)
    samples = [train.Sample("videos", epoch, 0, 1) for epoch in range(100)]
    begins = [numbers_in(views.read(sample)[0])[0] for sample in samples]
    assert min(begins) <= 2 and 26 <= max(begins) <= 28  # 28: the first after 2.3 s
    assert len(set(begins)) > 20


def test_an_unreadable_file_is_named_and_replaced_by_another_with_the_others_label(data, capsys):
    paths = [f"broken{i}.jpg" for i in range(25)]
    paths += omnimae.list_media(data / "images", "images").paths
    files = finetune.Labelled(TINY, "images", omnimae.Listing(paths, range(73), []), 0, "crop")
    used = [files[train.Sample("images", epoch, 0, 1)][1] for epoch in range(20)]
    assert min(used) >= 25 and len(set(used)) > 10
    assert "broken0.jpg" in capsys.readouterr().err
    views = train.Views(TINY, {"images": paths[:25]}, 0)
    with pytest.raises(ValueError, match="20"):
        views[train.Sample("images", 0, 0, 1)]
    assert len(capsys.readouterr().err.splitlines()) == 20


@pytest.fixture
def attention(monkeypatch) -> list:
    types, real = [], F.scaled_dot_product_attention
    spy = lambda *qkv: types.append(qkv[0].dtype) or real(*qkv)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return types


@pytest.mark.parametrize(
    ("script", "dim", "cpu", "expected"),
    [(train, 64, "AVX512", torch.float32), (train, 256, "AVX512", torch.bfloat16),
     (finetune, 256, "AVX512", torch.bfloat16), (finetune, 256, "AVX2", torch.float32)],
)  # fmt: skip
def test_bfloat16_if_fast(script, dim, cpu, expected, run_script, monkeypatch, attention):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    monkeypatch.setitem(omnimae.MODELS, "wide", replace(TINY, dim=dim, depth=1))
    options = ["--model", "wide", "--epochs", 1, "--batch-size", 48]
    options += ["--checkpoint", "scratch"] if script is finetune else []
    run_script(script, *options, images=True)  # with validation, as eval.py does it
    assert set(attention) == {expected}


def test_checkpointed_activations_are_computed_twice_and_change_no_bit(pretrain, attention):
    one, plain = pretrain(videos=False, out="one"), len(attention)
    other = pretrain("--checkpoint-activations", videos=False, out="other")
    assert len(attention) == 2 * plain + 3 * 4  # 3 steps of 4 blocks
    same_bits(weights_of(one), weights_of(other))


def test_a_run_logs_draws_and_keeps_its_mask_ratios(pretrain, data):
    run = pretrain("--image-mask-ratio", 0.5, "--video-mask-ratio", 0.75, "--micro-batch", 4)
    for field, num in {"loss": 5, "look_loss": 10, "zero_loss": 10}.items():
        assert len(log_of(run, field)) == num
        assert all(0.5 < value < 1.5 for value in log_of(run, field))  # targets have variance 1
    zeros = np.array(log_of(run, "zero_loss")).reshape(5, 2)
    assert (zeros == zeros[0]).all()  # always the same views
    cfg = omnimae.load_checkpoint(run / "last.pt").cfg
    assert cfg == replace(TINY, image_mask_ratio=0.5, video_mask_ratio=0.75)
    pictures = sorted((run / "pictures").iterdir())
    original = omnimae.read_image(pictures[0])[:, 2:34, 2:34]
    first = omnimae.read_image(omnimae.list_media(data / "images", "images", "val").paths[0])
    centre = v2.CenterCrop(32)(v2.Resize(32)(first))
    assert len(pictures) == 10 and (original.int() - centre.int()).abs().max() <= 1


def test_init_starts_from_a_checkpoint_with_the_runs_own_mask_ratios(pretrain, tiny, tmp_path):
    start = save_model(tiny, tmp_path / "start.pt")
    run = pretrain("--init", start, "--seed", 1, "--lr", 1e-9, "--image-mask-ratio", 0.5)
    torch.testing.assert_close(weights_of(run), dict(tiny.state_dict()), atol=1e-5, rtol=0)
    assert omnimae.load_checkpoint(run / "last.pt").cfg.image_mask_ratio == 0.5


@pytest.mark.filterwarnings("ignore:invalid value")  # drawing NaN
def test_a_nonfinite_loss_or_weight_ends_the_run_and_is_never_saved(pretrain, tmp_path):
    with pytest.raises(FloatingPointError, match="loss"):
        pretrain("--lr", 1e39)
    assert not (tmp_path / "run" / "last.pt").exists()
    with pytest.raises(FloatingPointError, match="weights"):
        pretrain("--lr", 1e39, "--log-every", 100, "--save-minutes", 1e-9)
    assert omnimae.read_checkpoint(str(tmp_path / "run" / "last.pt"))["step"] == 1


def test_another_recipe_in_a_runs_folder_is_refused(pretrain):
    run = pretrain(videos=False)
    before = (run / "last.pt").read_bytes()
    changes = ("--epochs 2", "--batch-size 8", "--lr 0.1", "--seed 1", "--image-mask-ratio 0.5")
    for change in changes:
        with pytest.raises(ValueError, match="--out"):
            pretrain(*change.split(), videos=False)
    with pytest.raises(ValueError, match="--out"):
        pretrain()  # more data
    assert (run / "last.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------
# The finetuning recipes


@pytest.fixture
def finetuned(run_script):
    """Finetunes a tiny model for an epoch, from scratch or a checkpoint, in batches of 16."""

    def run(kind, *options, start=None):
        start = ["--checkpoint", start] if start else ["--checkpoint", "scratch", "--model", "tiny"]
        options = [*start, "--epochs", 1, "--batch-size", 16, "--log-every", 1, *options]
        return run_script(finetune, *options, out="finetuned", **{kind: True})

    return run


def recipe_of(kind: str, model="vit_b", options="") -> dict:
    argv = f"--checkpoint scratch --model {model} --{kind} x {options}".split()
    args = finetune.parse_args(argv)
    finetune.fill_in(args, kind)
    return vars(args)


@pytest.mark.parametrize(
    ("kind", "model", "numbers"),
    [  # epochs, batch size, rate, warm-up, weight decay, layer decay, drop path
        ("images", "vit_b", (100, 1024, 4e-3, 0.05, 1e-4, 0.65, 0.1, "full")),
        ("images", "vit_l", (50, 1024, 4e-3, 0.05, 1e-4, 0.75, 0.2, "full")),
        ("images", "vit_h", (50, 1024, 4e-3, 0.05, 1e-4, 0.75, 0.3, "full")),
        ("videos", "vit_b", (40, 256, 1e-3, 0.125, 0.05, 0.75, 0.1, "full")),
        ("videos", "vit_h", (40, 256, 1e-3, 0.125, 0.05, 0.75, 0.3, "full")),
        ("images", "demo", (4, 64, 1e-3, 0.1, 0.05, 1.0, 0.0, "crop")),
    ],
)
def test_recipes_have_the_released_values(kind, model, numbers):
    assert tuple(recipe_of(kind, model)[name] for name in finetune.RECIPES[kind]) == numbers
    assert recipe_of(kind, model, "--batch-size 512")["lr"] == numbers[2] * 512 / numbers[1]
    assert recipe_of(kind, model, "--freeze")["drop_path"] == 0


@pytest.mark.parametrize(
    ("kind", "total", "peak", "warmup", "layer", "decay"),
    [("images", 24, 4e-3 * 4 / 1024, 0.05, 0.65, 1e-4),
     ("videos", 16, 1e-3 * 4 / 256, 0.125, 0.75, 0.05)],
)  # fmt: skip
def test_each_layer_has_its_decayed_rate(kind, total, peak, warmup, layer, decay, finetuned, adamw):
    run = finetuned(kind, "--batch-size", 4, "--epochs", 2)
    assert len(adamw) == total
    for step, groups in enumerate(adamw):
        done = step / total
        fall = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
        rate = 1e-6 + (peak - 1e-6) * (done / warmup if done < warmup else fall)
        assert log_of(run, "lr")[step] == pytest.approx(rate)
        rates = sorted({group["lr"] for group in groups})
        assert rates == pytest.approx([rate * layer**power for power in (4, 3, 2, 1)])
        assert {group["betas"] for group in groups} == {(0.9, 0.999)}
        assert {group["weight_decay"] for group in groups} == {0.0, decay}
    model, powers = Classifier(TINY, 3), {"encoder.patch": 4, "encoder.blocks.0": 3, "encoder.b": 2}
    groups, found = finetune.parameter_groups(model, 0.5, 0.05), {}
    for group in groups:
        found |= dict.fromkeys(group["params"], (group["scale"], group["weight_decay"]))
    for name, parameter in model.named_parameters():
        power = next((p for layer, p in powers.items() if name.startswith(layer)), 1)
        spared = name.endswith("bias") or "norm" in name
        assert found[parameter] == (0.5**power, 0.0 if spared else 0.05)


@pytest.mark.parametrize(("kind", "std"), [("images", 2e-5), ("videos", 0.01)])
@pytest.mark.parametrize("start", [OmniMAE(TINY), Classifier(TINY, 5)])
def test_finetuning_starts_from_the_encoder_a_small_head_and_a_classifiers_norm(start, kind, std):
    torch.nn.init.normal_(start.norm.weight)
    model = finetune.build(Namespace(**recipe_of(kind)), kind, start, [str(i) for i in range(500)])
    same_bits(model.encoder.state_dict(), start.encoder.state_dict())
    pretrained = isinstance(start, OmniMAE)
    same_bits(model.norm.weight, torch.ones(64) if pretrained else start.norm.weight)
    assert model.head.weight.std().item() == pytest.approx(std, rel=0.05)


def test_freeze_trains_norm_and_head_only(finetuned, tiny, tmp_path):
    run = finetuned("images", "--freeze", start=save_model(tiny, tmp_path / "start.pt"))
    model = omnimae.load_checkpoint(run / "last.pt")
    same_bits(model.encoder.state_dict(), tiny.encoder.state_dict())
    assert model.norm.weight.std() > 0  # it began at one


def test_drop_path_is_on_in_each_epoch_of_finetuning_and_off_in_validation(finetuned, monkeypatch):
    calls, real = [], omnimae.stochastic_depth
    spy = lambda x, p, *more: calls.append((round(p, 3), more[1])) or real(x, p, *more)  # noqa: E731
    monkeypatch.setattr(omnimae, "stochastic_depth", spy)
    finetuned("images", "--epochs", 2)
    rates = [0.0, 0.0, 0.1, 0.1]  # twice in each of two blocks
    assert calls == 2 * (3 * [(p, True) for p in rates] + [(p, False) for p in rates])


@pytest.mark.parametrize(("kind", "num", "magnitude"), [("images", 2, 9), ("videos", 4, 7)])
def test_half_the_operations_run_and_a_quarter_is_erased(kind, num, magnitude, maps, rand_augment):
    boxes = torch.stack([box for _, _, box in labelled(maps, kind, 300)])
    assert sum(count for count, _ in rand_augment) == pytest.approx(150 * num, rel=0.12)
    magnitudes = [value for _, value in rand_augment]
    assert np.mean(magnitudes) == pytest.approx(magnitude, abs=0.15)
    assert np.std(magnitudes) == pytest.approx(0.5, abs=0.08)
    areas = boxes[:, 2:].prod(1) / 32**2
    assert 0.19 < (areas > 0).float().mean() < 0.31
    assert 0.01 < areas[areas > 0].min() < 0.05 and 0.25 < areas.max() < 0.34


def test_rand_augment_is_one_draw_for_all_frames_and_uncovers_grey(maps):
    views = [view for view, _, _ in labelled(maps, "videos", 40)]
    assert all(torch.equal(view, view[:, :1].expand_as(view)) for view in views)
    torch.manual_seed(0)
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    views = [finetune.rand_augment(white, 1, 9.0) for _ in range(60)]
    moved = [view for view in views if view.min() < view.max()]  # the others are of one colour
    assert len(moved) > 5 and all(view.min() > 100 and (view == 128).any() for view in moved)


@pytest.mark.parametrize("frames", [(), (4,)])
def test_erasing_fills_boxes_with_black_in_images_and_noise_in_clips(frames):
    torch.manual_seed(0)
    x = torch.full((2, 3, *frames, 32, 32), 9.0)
    erased = finetune.erase(x, torch.tensor([[4, 8, 20, 16], [0, 0, 0, 0]]))
    box = erased[0, ..., 4:24, 8:24]
    assert (erased == 9).sum() == x.numel() - box.numel() and not (box == 9).any()
    if frames:
        assert abs(box.mean()) < 0.1 and abs(box.std() - 1) < 0.1 and len(box.unique()) > 3800
    else:
        torch.testing.assert_close(box, omnimae.normalize(torch.zeros(1, 3, 20, 16))[0])


@pytest.mark.parametrize("kind", train.KINDS)
def test_the_loop_erases_mixes_and_smooths_labels(kind, finetuned, rand_augment, monkeypatch):
    mixed, losses, real_loss = [], [], F.cross_entropy
    for transform in (v2.MixUp, v2.CutMix):

        def forward(self, x, labels, real=transform.forward):
            result = real(self, x, labels)
            mixed.append((type(self).__name__, self.alpha, x.as_subclass(torch.Tensor), result[1]))
            return result

        monkeypatch.setattr(transform, "forward", forward)
    spy = lambda *x, **options: losses.append((x, options)) or real_loss(*x, **options)  # noqa: E731
    monkeypatch.setattr(F, "cross_entropy", spy)
    finetuned(kind, "--epochs", 3, "--micro-batch", 4)
    num = {"images": 36, "videos": 24}[kind]  # one of the two for each micro-batch
    assert len(mixed) == num and len(rand_augment) > 2 * num
    assert {(name, alpha) for name, alpha, *_ in mixed} == {("MixUp", 0.8), ("CutMix", 1.0)}
    assert 0.25 * num < sum(name == "MixUp" for name, *_ in mixed) < 0.75 * num
    x, black = torch.cat([x for _, _, x, _ in mixed]), omnimae.normalize(torch.zeros(1, 3, 1, 1))
    erased = x > 2.7 if kind == "videos" else (x == black).all(1)  # noise, or exactly black
    assert 0.12 < erased.flatten(1).any(1).float().mean() < 0.35
    for (*_, mixed_labels), ((logits, labels), options) in zip(mixed, losses, strict=True):
        assert torch.equal(labels, mixed_labels) and logits.dtype == torch.float32
        assert options == {"label_smoothing": 0.1}


def test_the_best_epochs_model_is_kept_with_its_classes(finetuned):
    run = finetuned("images", "--epochs", 6, "--lr", 0.02, "--augment", "crop")
    accuracies, best = log_of(run, "top1"), omnimae.read_checkpoint(str(run / "best.pt"))
    assert len(accuracies) == 6 and accuracies.index(max(accuracies)) < 5  # the last is not it
    assert best["step"] == 3 * (1 + accuracies.index(max(accuracies)))
    assert omnimae.load_checkpoint(run / "best.pt").classes == sorted(train.SHAPES)


def test_without_validation_every_tenth_file_of_a_class_is_held_out(tmp_path):
    touch(tmp_path, *[f"{x}/{i:02}.png" for x, num in (("a", 21), ("b", 13)) for i in range(num)])
    held_out, rest = (evaluation.list_labelled(tmp_path, "images", x) for x in ("val", "train"))
    names = ["a/00.png", "a/10.png", "a/20.png", "b/00.png", "b/10.png"]
    assert [os.path.relpath(x, tmp_path) for x in held_out.paths] == names
    assert held_out.labels == [0, 0, 0, 1, 1] and rest.labels == [0] * 18 + [1] * 11
    assert not set(rest.paths) & set(held_out.paths)
    turned = evaluation.list_labelled(tmp_path, "images", "val", ["b", "a"])
    assert turned.labels == [1, 1, 1, 0, 0]  # they index the given classes


# ------------------------------------------------------------------------------------------------
# Evaluation


def plain_views(path: Path) -> torch.Tensor:
    """The protocols in plain code: (1, 3, S, S) of an image, (15, 3, T, S, S) of a video."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    if path.suffix == ".png":
        image = PIL.Image.open(path)
        width, height = (int(32 * side / min(image.size)) for side in image.size)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        image = image.resize((width, height), PIL.Image.BICUBIC)
        pixels = np.array(image.crop((left, top, left + 32, top + 32))) / np.float32(255)
        return torch.from_numpy((pixels - mean) / std).movedim(2, 0)[None]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [(frame.pts - frames[0].pts) * stream.time_base for frame in frames]
        duration = times[-1] if stream.duration is None else stream.duration * stream.time_base
    pixels, views = [frame.to_ndarray(format="rgb24") for frame in frames], []
    for i in range(5):
        start = i * max(duration - Fraction(2.7), 0) / 5
        inside = [x for x, second in zip(pixels, times) if start <= second < start + Fraction(2.7)]
        x = np.stack([inside[k * (len(inside) - 1) // 3] for k in range(4)]) / np.float32(255)
        size = [32 * side // min(x.shape[1:3]) for side in x.shape[1:3]]
        x = torch.from_numpy((x - mean) / std).movedim(3, 1)  # (T, 3, H, W)
        x, over = F.interpolate(x, size, mode="bilinear"), max(size) - 32
        for begin in (0, math.ceil(over / 2), over):
            top, left = (begin, 0) if size[0] > size[1] else (0, begin)
            views.append(x[:, :, top : top + 32, left : left + 32].movedim(1, 0))
    return torch.stack(views)


def write_noise(folder: Path, kind: str, i: int) -> Path:
    """A file of noise: portrait, landscape or square; of 10 to 13 frames a second, 1 to 4 s."""
    rng, (width, height) = np.random.default_rng(i), [(54, 70), (70, 54), (52, 52), (90, 50)][i % 4]
    if kind == "images":
        pixels = rng.integers(0, 256, (height + i % 2, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        return folder / f"{i}.png"
    frames = rng.integers(0, 256, (10 + 5 * (i % 7), 15, 15, 3), dtype=np.uint8)
    frames = frames.repeat(6, 1).repeat(6, 2)[:, :height, :width].copy()
    suffix = "mkv" if i % 3 == 0 else "mp4"  # without and with a duration
    return write_video(folder / f"{i}.{suffix}", frames, 10 + i % 4, "mpeg4")


@pytest.fixture(scope="module", params=train.KINDS)
def noise(request, tmp_path_factory) -> tuple:
    """A labelled data set, a model that is right on half of it, and each file's plain logits."""
    kind, folder = request.param, tmp_path_factory.mktemp("noise")
    torch.manual_seed(1)
    model = Classifier(TINY, 8).eval().requires_grad_(False)
    files = [write_noise(folder, kind, i) for i in range(21)]
    views = [plain_views(path) for path in files]
    logits = torch.stack([model(x).mean(0) for x in views])
    model.head.weight *= 1.5 / logits.std(0)[:, None]
    model.head.bias -= logits.mean(0) * 1.5 / logits.std(0)
    plain = {}
    for i, path in enumerate(files):
        logits = model(views[i]).mean(0)
        label = int(logits.argmax()) if i % 2 else i // 2 % 8
        moved = folder / "data" / "val" / f"class {label}" / path.name
        moved.parent.mkdir(parents=True, exist_ok=True)
        plain[path.rename(moved)] = label, logits
    classes = [f"class {i}" for i in range(8)]
    return kind, folder / "data", save_model(model, folder / "model.pt", classes=classes), plain


def test_views_match_plain_code(noise):
    for path in noise[3]:
        views = evaluation.to_views(evaluation.read_pixels(str(path), TINY, 5), 32, 3)
        torch.testing.assert_close(views, plain_views(path), atol=1e-5, rtol=0)
        clip = evaluation.read_pixels(str(path), TINY, 1)  # in finetuning's validation
        centre = plain_views(path)[1:2] if noise[0] == "videos" else plain_views(path)
        torch.testing.assert_close(evaluation.to_views(clip, 32, 1), centre, atol=1e-5, rtol=0)


def test_accuracy_matches_plain_code(noise, run_script, capfd):
    """An unreadable file counts as wrong. On any number of processes each file counts once."""
    kind, root, model, plain = noise
    broken = root / "val" / "class 1" / f"broken{next(iter(plain)).suffix}"
    broken.write_bytes(b"broken")
    run_script(evaluation, "--checkpoint", model, f"--{kind}", root)
    if kind == "images":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [HERE / "eval.py", "--checkpoint", model, "--images", root, "--device", "cpu"]
        subprocess.run([sys.executable, *command], check=True)
    broken.unlink()
    ranks = [int((logits > logits[label]).sum()) for label, logits in plain.values()]
    top1, top5 = (100 * sum(rank < k for rank in ranks) / (len(ranks) + 1) for k in (1, 5))
    shown = capfd.readouterr()
    times = 2 if kind == "images" else 1  # two processes print it once
    assert shown.out.count(f"top-1 {top1:.2f}%, top-5 {top5:.2f}%; 1 ") == times
    assert broken.name in shown.err


def test_the_five_best_labels_match_plain_code(noise, run_script, capsys):
    run_script(evaluation, "--checkpoint", noise[2], *noise[3])
    lines = iter(capsys.readouterr().out.splitlines())
    for path, (_, logits) in noise[3].items():
        assert next(lines) == str(path)
        for value, index in zip(*(x.tolist() for x in logits.softmax(0).topk(5))):
            percent, label = next(lines).split("%")
            assert float(percent) == pytest.approx(100 * value, abs=0.011)
            assert label.strip() == f"class {index}"
    with pytest.raises(ValueError, match="classes"):
        run_script(evaluation, "--checkpoint", noise[2], **{noise[0]: True})  # other classes
    assert evaluation.class_names(Classifier(TINY, 1000), None)[0] == "tench"  # in order of wnid


def test_reconstructions_are_written_as_pictures(tiny, run_script, tmp_path):
    files = write_noise(tmp_path, "images", 0), write_noise(tmp_path, "videos", 4)
    checkpoint = save_model(tiny, tmp_path / "tiny.pt")
    out = run_script(evaluation, "--checkpoint", checkpoint, "--mask-ratio", 0.5, *files)
    image, film = (PIL.Image.open(out / f"{path.name}.png") for path in files)
    assert film.size == (4 * 34 + 2, 3 * 34 + 2)  # four frames in each of three rows
    seen = omnimae.pil_to_tensor(image.crop((36, 2, 68, 34)))[None, :, None].int()
    grey = (omnimae.patchify(seen, (1, 8, 8)) - 127).abs() <= 1
    assert grey.all(2).sum() == 8  # of 16 patches


# ------------------------------------------------------------------------------------------------
# Real processes


def start(name: str, data: Path, out: Path, processes: int = 1, save=10) -> subprocess.Popen:
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
    options = {
        "train": f"--videos {data}/videos --epochs 3",  # 15 steps
        "finetune": "--checkpoint scratch --augment full --drop-path 0.2 --epochs 4",  # 12
    }[name]
    options += f" --model demo --images {data}/images --batch-size 16 --micro-batch 4 --device cpu"
    options += f" --workers 1 --save-minutes {save} --log-every 1 --out {out}"
    command = f"{torchrun if processes > 1 else ''} {HERE}/{name}.py {options}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, env=environment)


@pytest.fixture(scope="module")
def whole_runs(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    started = [start(name, data, folder / name) for name in ("train", "finetune")]
    assert [process.wait() for process in started] == [0, 0]
    return folder


@pytest.mark.parametrize(
    ("name", "number", "processes"),
    [("train", signal.SIGKILL, 1), ("finetune", signal.SIGTERM, 1), ("train", signal.SIGTERM, 2)],
)
def test_a_run_ended_by_a_signal_resumes(name, number, processes, data, tmp_path, whole_runs):
    """One process resumes bit for bit. Two give the weights of one, up to rounding."""
    killed, last = number == signal.SIGKILL, tmp_path / "run" / "last.pt"  # SIGTERM itself saves
    process = start(name, data, tmp_path / "run", processes, save=1e-9 if killed else 10)
    while process.poll() is None and not (last if killed else last.parent / "log.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == (-number if processes == 1 else 1)  # torchrun has its own code
    assert omnimae.read_checkpoint(str(last))["step"] < 12
    assert start(name, data, tmp_path / "run", processes).wait() == 0
    one, other = (omnimae.read_checkpoint(str(x)) for x in (whole_runs / name / "last.pt", last))
    if processes == 1:
        same_bits(*[(x["model"], x["optimizer"]["state"], x.get("best", 0)) for x in (one, other)])
    torch.testing.assert_close(one["model"], other["model"], atol=1e-5, rtol=0)


def test_a_wrong_command_ends_in_a_sentence_without_a_traceback(data, capsys):
    own = f"--model tiny --images {data}/images --batch-size 16"
    commands = [(train, "--images nowhere"), (train, f"{own} --epochs -1")]
    commands += [(finetune, "--checkpoint vit_x --images x"), (evaluation, "--checkpoint x.pt x")]
    for script, options in commands:
        with pytest.raises(SystemExit) as end:
            train.run_script(script.main, lambda: script.parse_args(options.split()))
        message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
        assert end.value.code and 0 < len(message.strip().splitlines()) <= 3
