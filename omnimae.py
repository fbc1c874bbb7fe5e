"""OmniMAE: one Vision Transformer, pretrained by masked autoencoding on images and videos.

Girdhar, El-Nouby, Singh, Alwala, Joulin, Misra, CVPR 2023, https://arxiv.org/abs/2206.08356

"Released" below means the authors' code and checkpoints, facebookresearch/omnivore on GitHub.

The method on one screen. B batch, T frames, H W pixels, N patches, V visible, M masked (V + M = N),
P values in a patch, D encoder width, D' decoder width. Numbers: ViT-B/16, a clip (an image).
At the right, the function or class that does the step.

    x           (B, 3, T, H, W)  16 x 224 x 224  (1 x 224 x 224)                normalize
      |                          an image is a video of one frame, repeated
      |                          to fill a patch of 2 x 16 x 16 pixels x 3
    patches     (B, N, P)        1568 x 1536     (196 x 1536)                   to_patches
      |                          a random mask hides 95% of a clip's patches,   random_mask
      |                          90% of an image's; the others are visible      visible_indices
    patches     (B, V, P)        V = 79          (20)                           take
      |  linear, + position      the encoder sees nothing else                  Encoder
      |  12 blocks, norm         a plain ViT: no class token, fixed positions   Block, OmniMAE.norm
    tokens      (B, V, D)        D = 768
      |      mask token (D)      learned, one copy for each masked patch        masked_indices
      |           |
      |  + position, embed       on both paths: positions of width D, then a    positions_for
      |           |              linear layer D -> D'                           Decoder
      +-----------+              [visible, masked], in that order
      |  4 blocks                a small decoder over all N                     Block
    tokens      (B, N, D')       D' = 384
      |  the last M, norm, linear
    pred        (B, M, P)        the loss is the mean squared error to the      OmniMAE.forward
    target      (B, M, P)        masked patches: their pixels in [0, 1],        normalize_patches
                                 each channel of each patch shifted and
                                 scaled to mean 0 and variance 1

After pretraining the decoder is thrown away. `Classifier` runs the encoder on all patches.
"""

import hashlib
import json
import math
import os
import re
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid


class UserError(ValueError):
    """A mistake that the user can correct, in a file, an option or a setting. The scripts print it
    as one line. Any other exception is a mistake in the code, and keeps its traceback."""


# ------------------------------------------------------------------------------------------------
# The sizes (paper, section 4, and the released checkpoints)


@dataclass(frozen=True)
class OmniMAEConfig:
    """The sizes of a model, its mask ratios, and the length of a clip. The defaults are ViT-B's."""

    image_size: int = 224  # height and width in pixels
    num_frames: int = 16  # of a clip
    patch_size: tuple[int, int, int] = (2, 16, 16)  # frames, pixels, pixels
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    decoder_dim: int = 384  # D'
    decoder_depth: int = 4
    decoder_heads: int = 16
    decoder_qkv_bias: bool = False  # as in the released files; the released config says True
    image_mask_ratio: float = 0.90
    video_mask_ratio: float = 0.95
    clip_seconds: float = 2.7  # of a video that a clip spans

    @property
    def grid(self) -> tuple[int, int, int]:
        """A clip's patches in time, height and width. (An image has only one in time.)"""
        t, h, w = self.patch_size
        return self.num_frames // t, self.image_size // h, self.image_size // w

    @property
    def patch_values(self) -> int:
        """P, the values in a patch."""
        return 3 * math.prod(self.patch_size)

    def masking(self, kind: str) -> tuple[int, float]:
        """N and the mask ratio for "images" or "videos"."""
        if kind == "images":
            return math.prod(self.grid[1:]), self.image_mask_ratio
        return math.prod(self.grid), self.video_mask_ratio


MODELS = {
    "vit_b": OmniMAEConfig(),
    "vit_l": OmniMAEConfig(dim=1024, depth=24, heads=16, decoder_dim=512),
    "vit_h": OmniMAEConfig(
        patch_size=(2, 14, 14), dim=1280, depth=32, heads=16, decoder_dim=512, decoder_depth=8
    ),
    # not in the paper: small enough to pretrain on a laptop's CPU in minutes
    "demo": OmniMAEConfig(
        image_size=48,
        num_frames=8,
        patch_size=(2, 8, 8),
        dim=128,
        depth=4,
        heads=4,
        decoder_dim=64,
        decoder_depth=2,
        decoder_heads=4,
        image_mask_ratio=0.75,
        video_mask_ratio=0.90,
    ),
}

# ------------------------------------------------------------------------------------------------
# Pixels, patches and their positions

MEAN = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, for images and videos
STD = torch.tensor([0.229, 0.224, 0.225])


def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, each (3,), on a device, without a GPU sync."""
    return MEAN.to(device, non_blocking=True), STD.to(device, non_blocking=True)


def normalize(x: Tensor) -> Tensor:
    """ImageNet-normalises (B, 3, H, W) or (B, 3, T, H, W): uint8, or floats in [0, 1]. Returns
    float32. ValueError for other shapes or dtypes."""
    known = x.dtype == torch.uint8 or x.is_floating_point()
    if x.ndim < 4 or x.shape[1] != 3 or not known:
        raise ValueError(f"got {x.dtype} {tuple(x.shape)}: expected uint8 or floats, (B, 3, ...)")

    x = x / 255 if x.dtype == torch.uint8 else x.float()
    mean, std = mean_and_std(x.device)
    shape = (3, *[1] * (x.ndim - 2))  # (3, 1, 1) or (3, 1, 1, 1)
    return (x - mean.view(shape)) / std.view(shape)


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cuts (B, 3, T, H, W) into patches (B, N, P), in raster order of (time, height, width). The
    values of a patch are in (time, height, width, channel) order."""
    B, C, T, H, W = x.shape
    t, h, w = patch_size
    x = x.reshape(B, C, T // t, t, H // h, h, W // w, w)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, T/t, H/h, W/w, t, h, w, C)
    return x.reshape(B, -1, t * h * w * C)  # (B, N, P)


def unpatchify(patches: Tensor, patch_size: tuple, grid: tuple) -> Tensor:
    """The inverse of `patchify`: (B, N, P) -> (B, 3, T, H, W), for a grid of patches in T, H, W."""
    x = patches.reshape(-1, *grid, *patch_size, 3)  # (B, T/t, H/h, W/w, t, h, w, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, T/t, t, H/h, h, W/w, w)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (B, C, T, H, W)


def to_patches(x: Tensor, cfg: OmniMAEConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """Images (B, 3, H, W) or clips (B, 3, T, H, W) -> patches (B, N, P), and the grid they form.

    An image, of any size that the patch divides, is a video of one frame, (B, 3, 1, H, W), repeated
    to fill a patch. A clip must have the model's size. ValueError for anything else.
    """
    t, h, w = cfg.patch_size
    video = x.unsqueeze(2) if x.ndim == 4 else x  # (B, 3, T, H, W)

    shape = video.shape[1:]
    clip_shape = (3, cfg.num_frames, cfg.image_size, cfg.image_size)
    is_image = len(shape) == 4 and shape[:2] == (3, 1)
    if is_image:
        fits = shape[2] % h == 0 and shape[3] % w == 0
    else:
        fits = shape == clip_shape
    if not x.is_floating_point() or not fits:
        raise ValueError(
            f"got {x.dtype} {tuple(x.shape)}: expected floats from normalize(), (B, 3, H, W) of "
            f"whole {h} x {w} patches or (B, {', '.join(map(str, clip_shape))})"
        )

    if is_image:
        video = video.expand(-1, -1, t, -1, -1)  # (B, 3, t, H, W), without copying
    T, H, W = video.shape[2:]
    return patchify(video, cfg.patch_size), (T // t, H // h, W // w)


def to_pixels(patches: Tensor) -> Tensor:
    """Undoes the ImageNet normalisation of patches (B, N, P). Returns pixels in [0, 1]."""
    mean, std = mean_and_std(patches.device)
    return (patches.unflatten(2, (-1, 3)) * std + mean).flatten(2)  # the channel is last


def normalize_patches(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shifts and scales each patch and channel to mean 0 and (unbiased) variance 1.

    Takes pixels in [0, 1], (B, N, P), as released. (ImageNet-normalised ones would give slightly
    different values, because of the 1e-6.) Returns patches (B, N, P), and the means and standard
    deviations that they had, each (B, N, 1, 3).
    """
    values = pixels.unflatten(2, (-1, 3))  # (B, N, P/3, 3)
    var, mean = torch.var_mean(values, dim=2, keepdim=True)  # (B, N, 1, 3)
    std = (var + 1e-6).sqrt()
    return ((values - mean) / std).flatten(2), mean, std


def sincos_positions(num: int, dim: int) -> Tensor:
    """The fixed sine/cosine table (num, dim), a row for each patch of a clip.

    One-dimensional, unlike MAE's, which gives half of its columns to the row and half to the
    column: here a patch's position is its index in the flattened (time, height, width) raster.
    """
    position = np.arange(num)[:, None]  # (num, 1)
    column = np.arange(dim)
    angle = position / 10000 ** (column // 2 * 2 / dim)  # (num, dim)
    table = np.where(column % 2, np.cos(angle), np.sin(angle))
    return torch.from_numpy(table).float()


def positions_for(table: Tensor, grid: tuple, cfg: OmniMAEConfig) -> Tensor:
    """The positions (N, D) of a grid of patches. An image takes those of a clip's first slot in
    time, the table's first rows. For an image of another size they are interpolated (bicubic)."""
    _, rows, columns = cfg.grid
    if grid[1:] == (rows, columns):
        return table[: math.prod(grid)]
    slot = table[: rows * columns].T.reshape(1, -1, rows, columns)  # (1, D, rows, columns)
    return F.interpolate(slot, size=grid[1:], mode="bicubic").flatten(2)[0].T  # (N, D)


# ------------------------------------------------------------------------------------------------
# Masking (paper, section 3). A mask is bool (B, N), True = masked: easy to read and to draw. The
# model takes the indices of the visible patches (B, V) instead: their shape says what V is, without
# a GPU sync.


def random_mask(B: int, N: int, ratio: float, generator=None) -> Tensor:
    """Draws a mask for each sample, uniformly over time and space at once. Returns bool (B, N),
    True for the int(ratio * N) masked patches. UserError for a ratio that masks none or all."""
    M = int(ratio * N)
    if not 0 < M < N:
        raise UserError(
            f"mask ratio {ratio} of {N} patches: mask at least 1 patch and leave at least 1 visible"
        )
    order = torch.rand(B, N, generator=generator).argsort(1)  # (B, N), a random permutation
    return torch.zeros(B, N, dtype=torch.bool).scatter(1, order[:, :M], True)


def visible_indices(mask: Tensor) -> Tensor:
    """The indices of the visible patches: mask, bool (B, N), True = masked -> int64 (B, V), in
    raster order. ValueError if the rows do not mask the same number of patches. Syncs a GPU."""
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"got a mask of {mask.dtype} {tuple(mask.shape)}: expected bool (B, N)")
    num_masked = set(mask.sum(1).tolist())
    if len(num_masked) > 1:
        raise ValueError(f"got a mask whose rows mask different numbers of patches: {num_masked}")
    return (~mask).nonzero()[:, 1].view(len(mask), -1)  # (B, V)


def masked_indices(visible: Tensor, B: int, N: int) -> tuple[Tensor, Tensor]:
    """The indices of the masked patches (B, M), in raster order, and the mask, bool (B, N), from
    those of the visible patches (B, V). Duplicates are not checked: that needs a GPU sync."""
    V = visible.shape[-1]
    if visible.dtype != torch.int64 or visible.shape != (B, V) or not 0 < V < N:
        raise ValueError(
            f"got visible patches as {visible.dtype} {tuple(visible.shape)}: expected indices, "
            f"int64 ({B}, V), 0 < V < {N}; visible_indices(mask) makes them from a bool mask"
        )
    mask = torch.ones(B, N, dtype=torch.bool, device=visible.device).scatter(1, visible, False)
    order = mask.byte().argsort(dim=1, stable=True)  # (B, N): visible, then masked, in raster order
    return order[:, V:], mask


def take(x: Tensor, index: Tensor) -> Tensor:
    """Selects each sample's own rows: (B, N, D), (B, K) -> (B, K, D)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


# ------------------------------------------------------------------------------------------------
# The transformer: a plain pre-norm ViT


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # N: tokens, D: their width; in the encoder's pretraining N is V, in the decoder D is D'.
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to its input. In training, drop path
    (stochastic depth) skips either one for some samples, and scales it up for the others."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.drop_path = StochasticDepth(drop_path, "row")  # "row": each sample by itself

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_weights(model: nn.Module, init_matrix) -> None:
    """Initialises the weights of all linear layers with `init_matrix`. Biases are 0, except that of
    the patch embedding: as released, it keeps PyTorch's default, uniform within 1/sqrt(P)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            init_matrix(module.weight)
            if module.bias is not None and name != "encoder.patch_embed":
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------
# The models (paper, section 3). `Encoder` leaves the final LayerNorm to its caller: `OmniMAE`
# applies it to each token, `Classifier` after the mean over patches.


class Encoder(nn.Module):
    """Patches, visible ones or all -> tokens before the final LayerNorm. The patch embedding is a
    linear layer: the same as the released convolution with kernel = stride, but only of the visible
    patches."""

    def __init__(self, cfg: OmniMAEConfig, drop_path: float = 0.0):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.Linear(cfg.patch_values, cfg.dim)
        self.register_buffer("pos_embed", sincos_positions(math.prod(cfg.grid), cfg.dim))
        rates = np.linspace(0, drop_path, cfg.depth).tolist()  # grows linearly over the blocks
        self.blocks = nn.Sequential(*[Block(cfg.dim, cfg.heads, drop_path=rate) for rate in rates])

    def forward(self, patches: Tensor, grid: tuple, visible: Tensor | None = None) -> Tensor:
        """Patches (B, N, P), visible indices (B, V) or None for all -> (B, V or N, D)."""
        positions = positions_for(self.pos_embed, grid, self.cfg)  # (N, D)
        if visible is not None:
            patches = take(patches, visible)  # (B, V, P)
            positions = positions[visible]  # (B, V, D)
        return self.blocks(self.patch_embed(patches) + positions)


class Decoder(nn.Module):
    """Predicts the masked patches (see `normalize_patches`) from the encoder's tokens (after norm).

    Attention does not depend on the order of tokens, so [visible, masked] is never put back in
    raster order: each token carries its position. As released, mask token and positions have
    encoder width, and the mask token starts from 0.
    """

    def __init__(self, cfg: OmniMAEConfig):
        super().__init__()
        if cfg.decoder_depth < 1:
            raise ValueError("decoder_depth 0: without a block, mask tokens do not see the visible")
        self.cfg = cfg
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.dim))
        # the encoder's table once more, as in the released files
        self.register_buffer("pos_embed", sincos_positions(math.prod(cfg.grid), cfg.dim))
        self.embed = nn.Linear(cfg.dim, cfg.decoder_dim)
        sizes = (cfg.decoder_dim, cfg.decoder_heads, cfg.decoder_qkv_bias)
        self.blocks = nn.Sequential(*[Block(*sizes) for _ in range(cfg.decoder_depth)])
        self.norm = nn.LayerNorm(cfg.decoder_dim, eps=1e-6)
        self.head = nn.Linear(cfg.decoder_dim, cfg.patch_values)

    def forward(self, x: Tensor, grid: tuple, visible: Tensor, masked: Tensor) -> Tensor:
        """Tokens (B, V, D), indices (B, V) and (B, M) -> predictions (B, M, P)."""
        positions = positions_for(self.pos_embed, grid, self.cfg)  # (N, D)
        x = self.embed(x + positions[visible])  # (B, V, D')

        # Mask tokens differ only in their position, so all samples choose from the same N of them.
        # F.embedding(masked, y) is y[masked], with a faster backward pass.
        all_mask_tokens = self.embed(self.mask_token + positions)  # (N, D')
        mask_tokens = F.embedding(masked, all_mask_tokens)  # (B, M, D')

        x = torch.cat([x, mask_tokens], dim=1)  # (B, N, D')
        x = self.blocks(x)[:, visible.shape[1] :]  # (B, M, D')
        return self.head(self.norm(x))  # (B, M, P)


class OmniMAE(nn.Module):
    """The masked autoencoder, for pretraining."""

    def __init__(self, cfg: OmniMAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.decoder = Decoder(cfg)
        init_weights(self, nn.init.xavier_uniform_)
        nn.init.trunc_normal_(self.decoder.head.weight, std=0.02)  # as released

    def forward(self, x: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts the masked patches. Returns the loss, the prediction and the mask.

        x: (B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised. visible: the visible patches'
        indices, int64 (B, V), from `visible_indices`; by default, drawn at random. The prediction
        (B, M, P) is of normalised patches in raster order, values in (t, h, w, channel) order. The
        mask is bool (B, N), True = masked. ValueError for other shapes.
        """
        patches, grid = to_patches(x, self.cfg)  # (B, N, P)
        B, N, _ = patches.shape
        if visible is None:
            _, ratio = self.cfg.masking("images" if grid[0] == 1 else "videos")
            visible = visible_indices(random_mask(B, N, ratio)).to(x.device)  # (B, V)
        masked, mask = masked_indices(visible, B, N)  # (B, M), (B, N)

        tokens = self.norm(self.encoder(patches, grid, visible))  # (B, V, D)
        pred = self.decoder(tokens, grid, visible, masked).float()  # (B, M, P)
        # As released, the target is made from pixels in [0, 1].
        pixels = to_pixels(take(patches, masked).float())  # (B, M, P)
        target, _, _ = normalize_patches(pixels)  # (B, M, P)
        return F.mse_loss(pred, target), pred, mask

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised -> tokens (B, N, D), after the final
        LayerNorm. Nothing is masked. ValueError for other shapes."""
        return self.norm(self.encoder(*to_patches(x, self.cfg)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Fills in the masked patches. Returns pixels in [0, 1], (B, 3, T, H, W), T = 1 for images.

        Arguments and errors are those of `forward`. The model predicts normalised patches: the true
        patch's mean and standard deviation are put back. An image is one frame repeated, so the
        frames of its prediction are averaged.
        """
        _, pred, mask = self(x, visible)
        patches, grid = to_patches(x, self.cfg)
        pixels = to_pixels(patches.float())  # (B, N, P)
        _, mean, std = normalize_patches(pixels)  # (B, N, 1, 3)

        pred = pred.unflatten(2, (-1, 3)).flatten(0, 1)  # (B M, P/3, 3), ordered as pixels[mask]
        filled = pred * std[mask] + mean[mask]  # std[mask], mean[mask]: (B M, 1, 3)
        pixels[mask] = filled.flatten(1)  # (B M, P)
        video = unpatchify(pixels, self.cfg.patch_size, grid).clamp(0, 1)  # (B, 3, T, H, W)
        return video.mean(2, keepdim=True) if grid[0] == 1 else video


class Classifier(nn.Module):
    """The encoder with a linear head, for finetuning: mean over patches, then norm, then head."""

    def __init__(self, cfg: OmniMAEConfig, num_classes: int, drop_path: float = 0.0):
        super().__init__()
        self.cfg = cfg
        self.classes: list[str] | None = None  # their names, where known
        self.encoder = Encoder(cfg, drop_path)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.head = nn.Linear(cfg.dim, num_classes)
        init_weights(self, lambda matrix: nn.init.trunc_normal_(matrix, std=0.02))

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised -> tokens (B, N, D). Unlike those of
        `OmniMAE.features`, they are before the norm, which here follows the mean over patches."""
        return self.encoder(*to_patches(x, self.cfg))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised -> logits (B, num_classes)."""
        return self.head(self.norm(self.features(x).mean(1)))


def draw_reconstruction(model: OmniMAE, x: Tensor, mask: Tensor) -> PIL.Image.Image:
    """Draws original | what the encoder sees | reconstruction; for a clip, three rows of frames.
    x: one ImageNet-normalised image (3, H, W) or clip (3, T, H, W); mask: bool (N,)."""
    patches, grid = to_patches(x[None], model.cfg)
    pixels = to_pixels(patches)  # (1, N, P)
    seen = pixels.masked_fill(mask[None, :, None], 0.5)

    panels = [
        unpatchify(pixels, model.cfg.patch_size, grid),  # (1, 3, T, H, W)
        unpatchify(seen, model.cfg.patch_size, grid),
        model.reconstruct(x[None], visible_indices(mask[None])),
    ]
    T = panels[-1].shape[2]  # 1 for an image: its patches repeat the frame
    frames = torch.cat([panel[0, :, :T].movedim(1, 0) for panel in panels])  # (3 T, 3, H, W)
    return to_pil_image(make_grid(frames.cpu(), nrow=T if T > 1 else 3, pad_value=1.0))


# ------------------------------------------------------------------------------------------------
# Checkpoints: the nine released ones (CC-BY-NC 4.0) and this project's own


def one_line(error: Exception) -> str:
    """An error's message without line breaks, cut to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def naming_errors(path: str | os.PathLike, what: str = "cannot be read") -> Iterator[None]:
    """Re-raises any error as a UserError of one line that names the file. Broken files make the
    libraries that read them raise errors of many kinds, so this catches them all. An error that
    this file itself raised may be a mistake in the code: its line is named."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        place = traceback.extract_tb(error.__traceback__)[-1]
        if place.filename == __file__ and not isinstance(error, UserError):
            reason += f" ({type(error).__name__} in line {place.lineno} of {place.filename})"
        raise UserError(f"{path}: {what}: {reason}") from error


_URL = "https://dl.fbaipublicfiles.com/omnivore/omnimae_ckpts/"
CHECKPOINTS = {
    "vit_b_pretrain": _URL + "vitb_pretrain.torch",
    "vit_b_in1k": _URL + "vitb_in1k_ft.torch",
    "vit_b_ssv2": _URL + "vitb_ssv2_ft.torch",
    "vit_l_pretrain": _URL + "vitl_pretrain.torch",
    "vit_l_in1k": _URL + "vitl_in1k_ft.torch",
    "vit_l_ssv2": _URL + "vitl_ssv2_ft.torch",
    "vit_h_pretrain": _URL + "vith_pretrain.torch",
    "vit_h_in1k": _URL + "vith_in1k_ft.torch",
    "vit_h_ssv2": _URL + "vith_ssv2_ft.torch",
}


def _download(url: str) -> str:
    """Downloads a file to torch.hub's cache, unless it is there. Returns its path."""
    file = url.split("?")[0].rsplit("/", 1)[-1]
    if url not in CHECKPOINTS.values():  # files of other URLs may all be called last.pt
        file = hashlib.sha256(url.encode()).hexdigest()[:16] + "_" + file
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, file)
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        with naming_errors(url, "cannot be downloaded"):
            torch.hub.download_url_to_file(url, path)
    return path


def read_checkpoint(name: str | os.PathLike) -> dict:
    """The content of a checkpoint: tensors and plain values. Code in a file is never run.

    `name` is a released checkpoint's name or a URL, downloaded once to torch.hub's cache, or a
    path. UserError names the file, and says why PyTorch cannot load it.
    """
    url = CHECKPOINTS.get(str(name), str(name))
    if "://" in url:
        path = _download(url)
        advice = f". If its download broke off, delete {path} and try again"
    else:
        path = url
        advice = ""
    if not os.path.isfile(path):
        raise UserError(f"{name}: no such file; released checkpoints: {', '.join(CHECKPOINTS)}")

    try:
        # With mmap a tensor is read from the file where it is used. Only the zip format allows it.
        mmap = zipfile.is_zipfile(path)
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises many kinds
        reason = one_line(error)
        objects = re.findall(r"GLOBAL (\S+) was not", str(error))
        if objects:  # such as argparse.Namespace
            reason = f"Python objects in it ({objects[0]}) are not loaded"
        elif "weights_only" in str(error):  # PyTorch's message advises to run code in the file
            reason = "not a checkpoint, or a damaged one"
        raise UserError(f"{name}: PyTorch cannot load it: {reason}{advice}") from error
    if not isinstance(file, dict):
        raise UserError(f"{name}: not a checkpoint: expected a dict, got a {type(file).__name__}")
    return file


def _weights_in(file: dict) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without the prefixes that DistributedDataParallel and
    torch.compile add to its keys."""
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(file.get(name), dict):
            file = file[name]
    state = {}
    for key, value in file.items():
        while key.startswith(("module.", "_orig_mod.")):
            key = key.split(".", 1)[1]
        state[key] = value
    return state


def convert_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a released state dict to this project's keys and shapes: that of one of the nine
    files, or of one saved by the released trainer, with the head under `heads.0.`. Other keys stay
    the same."""
    head = "decoder.head." if "trunk.mask_token" in state else "head."
    renames = {  # the first that fits is used, so the order matters
        "trunk.mask_token": "decoder.mask_token",
        "trunk.pos_embed": "encoder.pos_embed",
        "trunk.patch_embed.proj.1.": "encoder.patch_embed.",
        "trunk.blocks.": "encoder.blocks.",
        "trunk.norm.": "norm.",
        "trunk.decoder.decoder_embed.": "decoder.embed.",
        "trunk.decoder.decoder_blocks.": "decoder.blocks.",
        "trunk.decoder.": "decoder.",
        "heads.0.projector.": head,  # as the released trainer saves pretraining
        "heads.0.0.": head,  # as it saves SSv2
        "heads.0.": head,  # as it saves IN1k
        "head.": head,  # the nine files
    }
    converted = {}
    for key, value in state.items():
        for old, new in renames.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        if key.endswith("pos_embed") and value.ndim == 3:
            value = value[0]  # (1, N, D) -> (N, D)
        if key == "encoder.patch_embed.weight" and value.ndim == 5:
            value = value.permute(0, 2, 3, 4, 1).flatten(1)  # (D, 3, t, h, w) -> (D, P)
        converted[key] = value
    return converted


def load_checkpoint(name: str | os.PathLike) -> OmniMAE | Classifier:
    """Loads an OmniMAE or a Classifier, by what the file holds, in eval mode on the CPU.

    `name` is a released checkpoint's name ("vit_b_ssv2"), a URL, or the path of a released file or
    of this project's. Weights are read from the file only when they are used: while the model is in
    use, do not overwrite the file in place (replacing it is fine). UserError for what cannot be
    found, read or fitted.
    """
    file = read_checkpoint(name)
    with naming_errors(name, "not an OmniMAE checkpoint, or of an unknown size"):
        state = convert_released(_weights_in(file))
        state = {key: value.float() for key, value in state.items()}
        if "config" in file:
            cfg = OmniMAEConfig(**file["config"])
        else:
            sizes = {(cfg.dim, cfg.patch_values): cfg for cfg in MODELS.values()}
            size = tuple(state["encoder.patch_embed.weight"].shape)  # (D, P)
            cfg = replace(sizes[size], decoder_qkv_bias="decoder.blocks.0.attn.qkv.bias" in state)

    with torch.device("meta"):  # build without allocating; load_state_dict(assign=True) fills it
        if "decoder.mask_token" in state:
            model = OmniMAE(cfg)
        else:
            num_classes = len(state.get("head.bias", ()))  # 0: load_state_dict says what is missing
            model = Classifier(cfg, num_classes)
            model.classes = file.get("classes")
    with naming_errors(name, "does not fit the model"):  # keys that are missing or left over
        model.load_state_dict(state, assign=True)
    return model.eval()


def read_classes(path: str | os.PathLike) -> list[str]:
    """The class names in a labels.json such as SSv2's, {"name": "0", ...}, in order of index.
    UserError for any other file."""
    with naming_errors(path, "not a labels.json of names and their indices"):
        index = json.loads(Path(path).read_bytes())  # as bytes: a byte-order mark is recognised
        names = sorted(index, key=lambda name: int(index[name]))
        if [int(index[name]) for name in names] != list(range(len(names))):
            raise UserError(f"the indices are not 0 to {len(names) - 1}")
        return names


# ------------------------------------------------------------------------------------------------
# Media: images, and the frames of a clip


def read_image(path: str | os.PathLike) -> Tensor:
    """Reads an image, uint8 (3, H, W), always RGB. 16-bit grey is reduced to its high byte. EXIF
    orientation is ignored, as released. UserError names a file that cannot be read."""
    with naming_errors(path), PIL.Image.open(path) as image:
        mode = image.mode
        is_16_bit = mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM"))
        if is_16_bit:  # PIL itself would clip to 255
            high_byte = (np.array(image) >> 8).astype(np.uint8)
            return pil_to_tensor(PIL.Image.fromarray(high_byte).convert("RGB"))
        if mode in ("I", "F"):  # integers of 32 bits, or floats: which value is white is undefined
            raise UserError(f"pixels of mode {mode}: convert it to 8 or 16 bits per value")
        return pil_to_tensor(image if mode == "RGB" else image.convert("RGB"))


@contextmanager
def _open_video(path: str | os.PathLike) -> Iterator[tuple]:
    """Opens a file, and chooses the video stream that FFmpeg would. Rejects cover art."""
    path_in_full = os.path.abspath(path)  # FFmpeg takes "a:b" for a protocol
    ignore = {"metadata_errors": "ignore"}  # tags that are not UTF-8
    with naming_errors(path), av.open(path_in_full, **ignore) as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise UserError("no video stream")
        stream.codec_context.thread_count = 1  # the loader's workers already use all cores
        stream.codec_context.options = {"max_pixels": str(2**27)}  # broken files claim any size
        yield container, stream


def _seconds_in(container, stream) -> Fraction:
    """The duration of a video: what its stream says or, if it says nothing, as in .webm, the time
    of the last frame. (As released, not the container's, which may be that of its sound.)"""
    if stream.duration is not None:
        return stream.duration * stream.time_base

    first_pts = stream.start_time or 0
    # Packets are read without decoding. Where the container knows its duration, those after the
    # last keyframe are enough. If no packet is found there, all are read.
    offsets = [first_pts]
    if container.duration is not None:
        end = Fraction(container.duration, av.time_base) / stream.time_base
        offsets = [math.floor(end), first_pts]
    for offset in offsets:
        container.seek(offset, stream=stream)
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        if times:
            return (max(times) - first_pts) * stream.time_base
    return Fraction(0)


def _upright(clip: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turns and mirrors (T, H, W, 3) as the frame's display matrix says: phones film sideways."""
    display_matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if display_matrix is None:
        return clip
    # Its rows are (a, b, u), (c, d, v), (x, y, w). Apart from an offset, a pixel at (p, q) is shown
    # at (a p + c q, b p + d q).
    a, b, _, c, d, *_ = np.frombuffer(display_matrix, np.int32).tolist()
    across = a
    down = d
    if abs(b) > abs(a):  # columns are shown as rows
        clip = clip.swapaxes(1, 2)
        across = c
        down = b
    if across < 0:
        clip = clip[:, :, ::-1]
    if down < 0:
        clip = clip[:, ::-1]
    return np.ascontiguousarray(clip)


def _read_window(container, stream, start: Fraction, duration: Fraction, num_frames: int) -> Tensor:
    """Decodes one clip, uint8 (T, 3, H, W): the frames with start <= time < start + duration.

    Exactly as released, this is counted in ticks of the stream from its first timestamp:
    ceil(start / time_base) <= pts < ceil((start + duration) / time_base). Of these n frames, those
    at linspace(0, n - 1, num_frames), truncated, are kept. If no frame lies in this window,
    as in the recording of a still screen, the clip repeats the last frame before it (or, if there
    is none, the first frame of all).
    """
    first_pts = stream.start_time or 0
    begin = first_pts + math.ceil(start / stream.time_base)
    end = first_pts + math.ceil((start + duration) / stream.time_base)

    # Decode from the keyframe before `begin`. If the seek lands too late, as in a file without an
    # index, decode once more from the start of the file.
    for seek in ({"offset": begin, "stream": stream}, {"offset": 0}):
        container.seek(**seek)
        on_screen = None  # the last frame before `begin`
        frames = []
        frame = None
        for frame in container.decode(stream):
            if frame.pts < begin:
                on_screen = frame
            elif frame.pts < end:
                frames.append(frame)
            else:
                break
        if on_screen or (frames and frames[0].pts == begin):
            break  # it landed early enough
    if not frames:
        still = on_screen or frame
        if still is None:
            raise UserError("no frame in it")
        frames = [still]

    kept = [frames[i] for i in np.linspace(0, len(frames) - 1, num_frames).astype(int)]
    to_rgb = VideoReformatter()  # one for all frames: making it costs more than using it
    size = {"width": kept[0].width, "height": kept[0].height}  # it may change within a video
    pixels = []
    for frame in kept:
        rgb = to_rgb.reformat(frame, **size, format="rgb24", threads=1)
        pixels.append(rgb.to_ndarray())  # (H, W, 3)
    clip = _upright(np.stack(pixels), kept[0])  # (T, H, W, 3)
    return torch.from_numpy(clip).permute(0, 3, 1, 2)  # (T, 3, H, W)


def read_clip(path: str | os.PathLike, start: float, duration: float, num_frames: int) -> Tensor:
    """Reads one clip, uint8 (T, 3, H, W), from `start` for `duration`, in seconds from the video's
    first frame. UserError names a file that cannot be read."""
    with _open_video(path) as (container, stream):
        return _read_window(container, stream, Fraction(start), Fraction(duration), num_frames)


def read_clips(
    path: str | os.PathLike,
    starts: Sequence,
    num_frames: int,
    clip_seconds: float = OmniMAEConfig.clip_seconds,
) -> Tensor:
    """Reads clips of a video, uint8 (clips, T, 3, H, W). Short videos repeat frames. `starts` are
    fractions of the last possible start: training draws one, evaluation takes Fraction(i, 5).
    UserError names a file that cannot be read."""
    duration = Fraction(clip_seconds)  # the float, as released: 2.7 is not quite 27/10
    with _open_video(path) as (container, stream):
        last_start = max(_seconds_in(container, stream) - duration, 0)
        clips = []
        for fraction in starts:
            start = Fraction(fraction) * last_start
            clips.append(_read_window(container, stream, start, duration, num_frames))
        return torch.stack(clips)
