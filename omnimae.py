"""OmniMAE: one Vision Transformer, pretrained by masked autoencoding on images and videos.

Girdhar, El-Nouby, Singh, Alwala, Joulin, Misra, CVPR 2023, https://arxiv.org/abs/2206.08356

The method on one screen. B batch, T frames, H W pixels, N patches, V visible, M masked (V + M = N),
P values in a patch, D encoder width, D' decoder width. Numbers: ViT-B/16, a clip (an image).

    x           (B, 3, T, H, W)  ImageNet-normalised         16 x 224 x 224  (1 x 224 x 224)
      |                          an image is a video of one frame, repeated to fill a patch
    patches     (B, N, P)        2 x 16 x 16 pixels x 3      1568 x 1536     (196 x 1536)
      |                          a random mask hides 95% of a clip's patches, 90% of an image's
    visible     (B, V, P)        all that the encoder sees   V = 79          (20)
      |  linear, + position
      |  12 blocks, norm         a plain ViT: no class token, fixed sine/cosine positions
    tokens      (B, V, D)        D = 768
      |      mask token (D)      learned, one copy for each masked patch: (B, M, D)
      |           |
      |  + position, embed       on both paths: positions of width D, then a linear layer D -> D'
      +-----------+              [visible, masked], in that order
      |  4 blocks                a small decoder over all N
    tokens      (B, N, D')       D' = 384
      |  the last M, norm, linear
    pred        (B, M, P)        compared, by mean squared error, with the
    target      (B, M, P)        masked patches: pixels in [0, 1], in each patch and channel
                                 shifted and scaled to mean 0 and variance 1

After pretraining the decoder is thrown away. `Classifier` runs the encoder on all patches.
"""

import hashlib
import json
import math
import os
from collections import namedtuple
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
from av.video.reformatter import VideoReformatter
from torch import Tensor, nn
from torchvision.ops import stochastic_depth
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

# ------------------------------------------------------------------------------------------------
# The sizes (paper, section 4, and the released checkpoints)


@dataclass(frozen=True)
class OmniMAEConfig:
    """The sizes of a model and its mask ratios. The defaults are ViT-B/16."""

    image_size: int = 224  # height and width in pixels
    num_frames: int = 16  # of a clip
    patch_size: tuple[int, int, int] = (2, 16, 16)  # frames, pixels, pixels
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    decoder_dim: int = 384  # D'
    decoder_depth: int = 4
    decoder_heads: int = 16
    decoder_qkv_bias: bool = False  # as in the released checkpoints; the released code says True
    image_mask_ratio: float = 0.90
    video_mask_ratio: float = 0.95

    @property
    def grid(self) -> tuple[int, int, int]:
        """A clip's patches in time, height and width. An image has one slot in time."""
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


# fmt: off
MODELS = {
    "vit_b": OmniMAEConfig(),
    "vit_l": OmniMAEConfig(dim=1024, depth=24, heads=16, decoder_dim=512),
    "vit_h": OmniMAEConfig(
        patch_size=(2, 14, 14), dim=1280, depth=32, heads=16, decoder_dim=512, decoder_depth=8,
    ),
    # not in the paper: small enough to pretrain on a laptop's CPU in minutes
    "demo": OmniMAEConfig(
        image_size=48, num_frames=8, patch_size=(2, 8, 8), dim=128, depth=4, heads=4,
        decoder_dim=64, decoder_depth=2, decoder_heads=4,
        image_mask_ratio=0.75, video_mask_ratio=0.90,
    ),
}
# fmt: on

# ------------------------------------------------------------------------------------------------
# Pixels, patches and their positions

MEAN = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, for images and videos
STD = torch.tensor([0.229, 0.224, 0.225])


def normalize(x: Tensor) -> Tensor:
    """ImageNet-normalises (B, 3, H, W) or (B, 3, T, H, W): uint8, or floats in [0, 1]."""
    if x.ndim < 4 or x.shape[1] != 3 or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise ValueError(f"got {x.dtype} {tuple(x.shape)}: expected uint8 or floats, (B, 3, ...)")
    x = x / 255 if x.dtype == torch.uint8 else x.float()
    shape = (3, *[1] * (x.ndim - 2))
    mean, std = (v.to(x.device, non_blocking=True).view(shape) for v in (MEAN, STD))
    return (x - mean) / std


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cuts (B, 3, T, H, W) into patches (B, N, P), in raster order of (time, height, width)."""
    (B, C, T, H, W), (t, h, w) = x.shape, patch_size
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

    An image, of any size that the patch divides, is a video of one frame, repeated to fill a patch.
    A clip must have the model's size. ValueError for anything else.
    """
    t, h, w = cfg.patch_size
    video = x.unsqueeze(2) if x.ndim == 4 else x  # (B, 3, T, H, W)
    shape, clip = video.shape[1:], (3, cfg.num_frames, cfg.image_size, cfg.image_size)
    is_image = len(shape) == 4 and shape[:2] == (3, 1) and shape[2] % h == shape[3] % w == 0
    if not x.is_floating_point() or not (is_image or shape == clip):
        raise ValueError(
            f"got {x.dtype} {tuple(x.shape)}: expected floats from normalize(), (B, 3, H, W) of "
            f"whole {h} x {w} patches or (B, {', '.join(map(str, clip))})"
        )
    video = video.expand(-1, -1, t, -1, -1) if is_image else video  # (B, 3, T or t, H, W)
    T, H, W = video.shape[2:]
    return patchify(video, cfg.patch_size), (T // t, H // h, W // w)


def to_pixels(patches: Tensor) -> Tensor:
    """Undoes the ImageNet normalisation of patches (B, N, P). Returns pixels in [0, 1]."""
    mean, std = (v.to(patches.device, non_blocking=True) for v in (MEAN, STD))
    return (patches.unflatten(2, (-1, 3)) * std + mean).flatten(2)  # the channel is last


def normalize_patches(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shifts and scales each patch and channel to mean 0 and variance 1 (divided by n - 1). Takes
    pixels in [0, 1], (B, N, P); ImageNet-normalised ones would only change what the 1e-6 does.
    Returns patches (B, N, P), and the means and standard deviations they had, (B, N, 1, 3)."""
    values = pixels.unflatten(2, (-1, 3))  # (B, N, P/3, 3)
    var, mean = torch.var_mean(values, dim=2, keepdim=True)  # (B, N, 1, 3)
    std = (var + 1e-6).sqrt()
    return ((values - mean) / std).flatten(2), mean, std


def sincos_positions(num: int, dim: int) -> Tensor:
    """The fixed table (num, dim), a row for each flattened (t, h, w) index of a clip's patches."""
    angle = np.arange(num)[:, None] / 10000 ** (np.arange(dim) // 2 * 2 / dim)  # (num, dim)
    table = np.where(np.arange(dim) % 2, np.cos(angle), np.sin(angle))
    return torch.from_numpy(table).float()


def positions_for(table: Tensor, grid: tuple, cfg: OmniMAEConfig) -> Tensor:
    """The positions (N, D) of a grid of patches. An image takes the table's first rows, which are
    the first slot in time, interpolated (bicubic) for an image of another size."""
    _, h, w = cfg.grid
    if grid[1:] == (h, w):
        return table[: math.prod(grid)]
    slot = table[: h * w].T.reshape(1, -1, h, w)  # (1, D, h, w)
    return F.interpolate(slot, size=grid[1:], mode="bicubic").flatten(2)[0].T  # (N, D)


# ------------------------------------------------------------------------------------------------
# Masking (paper, section 3)


def random_mask(B: int, N: int, ratio: float, generator=None) -> Tensor:
    """Draws a mask for each sample, uniformly over time and space at once. Returns bool (B, N),
    True for the int(ratio * N) masked patches."""
    M = int(ratio * N)
    if not 0 < M < N:
        raise ValueError(f"mask ratio {ratio} of {N} patches: mask at least 1, leave at least 1")
    order = torch.rand(B, N, generator=generator).argsort(1)  # (B, N), a random permutation
    return torch.zeros(B, N, dtype=torch.bool).scatter(1, order[:, :M], True)


def split_mask(mask_or_visible: Tensor, B: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns visible (B, V) and masked (B, M) indices in raster order, and the bool mask (B, N).

    Takes a mask, bool (B, N), True = masked; or the visible patches' int64 indices (B, V), from
    which V is known without a GPU sync. Duplicates are not checked.
    """
    visible = mask_or_visible
    if mask_or_visible.dtype == torch.bool and mask_or_visible.shape == (B, N):
        if len(set(mask_or_visible.sum(1).tolist())) > 1:
            raise ValueError("got a mask whose rows mask different numbers of patches")
        visible = (~mask_or_visible).nonzero()[:, 1].view(B, -1)  # (B, V)
    V = visible.shape[-1]
    if visible.dtype != torch.int64 or visible.shape != (B, V) or not 0 < V < N:
        raise ValueError(
            f"got a mask of {mask_or_visible.dtype} {tuple(mask_or_visible.shape)}: expected bool "
            f"{(B, N)}, True = masked, or visible indices, int64 ({B}, V), of some but not all"
        )
    mask = torch.ones(B, N, dtype=torch.bool, device=visible.device).scatter(1, visible, False)
    order = mask.byte().argsort(dim=1, stable=True)  # (B, N): the visible, then the masked
    return order[:, :V], order[:, V:], mask


def take(x: Tensor, index: Tensor) -> Tensor:
    """Selects rows in each sample: (B, N, D), (B, K) -> (B, K, D)."""
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
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # scale 1 / sqrt(D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to its input. In training, drop path
    (stochastic depth) skips such a branch for some samples and scales it up for the others."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + stochastic_depth(self.attn(self.norm1(x)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)


def init_weights(model: nn.Module, init_matrix) -> None:
    """Draws all linear layers' weights with `init_matrix`. Biases are 0, except that of the patch
    embedding: as released, it keeps PyTorch's default, uniform within 1/sqrt(P)."""
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
    linear layer: the released convolution, kernel = stride, computed only for visible patches."""

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
            patches, positions = take(patches, visible), positions[visible]  # (B, V, P), (B, V, D)
        return self.blocks(self.patch_embed(patches) + positions)


class Decoder(nn.Module):
    """Predicts the masked patches (see `normalize_patches`) from the encoder's tokens (after norm).

    Attention does not depend on order, so [visible, masked] is never put back in raster order:
    each token carries its position. Mask token and positions have encoder width, as released.
    """

    def __init__(self, cfg: OmniMAEConfig):
        super().__init__()
        self.cfg = cfg
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.dim))
        self.register_buffer("pos_embed", sincos_positions(math.prod(cfg.grid), cfg.dim))
        self.embed = nn.Linear(cfg.dim, cfg.decoder_dim)
        sizes = cfg.decoder_dim, cfg.decoder_heads, cfg.decoder_qkv_bias
        self.blocks = nn.Sequential(*[Block(*sizes) for _ in range(cfg.decoder_depth)])
        self.norm = nn.LayerNorm(cfg.decoder_dim, eps=1e-6)
        self.head = nn.Linear(cfg.decoder_dim, cfg.patch_values)

    def forward(self, x: Tensor, grid: tuple, visible: Tensor, masked: Tensor) -> Tensor:
        """Tokens (B, V, D), indices (B, V) and (B, M) -> predictions (B, M, P)."""
        positions = positions_for(self.pos_embed, grid, self.cfg)  # (N, D)
        x = self.embed(x + positions[visible])  # (B, V, D')
        mask_tokens = self.embed(self.mask_token + positions)  # (N, D'), the same for all samples
        mask_tokens = F.embedding(masked, mask_tokens)  # mask_tokens[masked], a faster backward
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
        nn.init.trunc_normal_(self.decoder.head.weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts the masked patches. Returns the loss, the prediction and the bool mask (B, N).

        x: (B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised. mask: bool (B, N), True = masked,
        the same number in each row; or the visible patches' indices (B, V); by default random. The
        prediction (B, M, P) is of normalised patches in raster order, values in (t, h, w, channel)
        order. ValueError for other shapes.
        """
        patches, grid = to_patches(x, self.cfg)  # (B, N, P)
        if mask is None:
            _, ratio = self.cfg.masking("images" if grid[0] == 1 else "videos")
            mask = random_mask(*patches.shape[:2], ratio)
        visible, masked, mask = split_mask(mask.to(x.device), *patches.shape[:2])
        tokens = self.norm(self.encoder(patches, grid, visible))  # (B, V, D)
        pred = self.decoder(tokens, grid, visible, masked).float()  # (B, M, P)
        target, _, _ = normalize_patches(to_pixels(take(patches, masked).float()))  # (B, M, P)
        return F.mse_loss(pred, target), pred, mask

    @torch.no_grad()
    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Fills in the masked patches. Returns pixels in [0, 1], (B, 3, T, H, W), T = 1 for images.

        The model predicts normalised patches: the true patch's mean and standard deviation are put
        back. An image is one frame repeated, so the frames of its prediction are averaged.
        """
        _, pred, mask = self(x, mask)
        patches, grid = to_patches(x, self.cfg)
        pixels = to_pixels(patches.float())  # (B, N, P)
        _, mean, std = normalize_patches(pixels)  # (B, N, 1, 3)
        pred = pred.unflatten(2, (-1, 3)).flatten(0, 1)  # (B M, P/3, 3), ordered as pixels[mask]
        pixels[mask] = (pred * std[mask] + mean[mask]).flatten(1)  # (B M, P)
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
        """(B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised -> (B, N, D), before pooling."""
        return self.encoder(*to_patches(x, self.cfg))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised -> logits (B, num_classes)."""
        return self.head(self.norm(self.features(x).mean(1)))


def draw_reconstruction(model: OmniMAE, x: Tensor, mask: Tensor) -> PIL.Image.Image:
    """Draws original | what the encoder sees | reconstruction; of a clip, three rows of frames.
    x: one ImageNet-normalised image (3, H, W) or clip (3, T, H, W); mask: bool (N,)."""
    patches, grid = to_patches(x[None], model.cfg)
    original = to_pixels(patches)  # (1, N, P)
    seen = original.masked_fill(mask[None, :, None], 0.5)
    panels = [unpatchify(p, model.cfg.patch_size, grid) for p in (original, seen)]
    panels.append(model.reconstruct(x[None], mask[None]))  # (1, 3, T, H, W)
    T = panels[-1].shape[2]  # 1 for an image: its patches repeat the frame
    frames = torch.cat([panel[0, :, :T].movedim(1, 0) for panel in panels])  # (3 T, 3, H, W)
    return to_pil_image(make_grid(frames.cpu(), nrow=max(3, T), pad_value=1.0))


# ------------------------------------------------------------------------------------------------
# Checkpoints: the nine released ones (CC-BY-NC 4.0) and this project's own

_URL = "https://dl.fbaipublicfiles.com/omnivore/omnimae_ckpts/"
CHECKPOINTS = {
    f"vit_{size}_{kind}": f"{_URL}vit{size}_{file}.torch"
    for size in "blh"
    for kind, file in (("pretrain", "pretrain"), ("in1k", "in1k_ft"), ("ssv2", "ssv2_ft"))
}


@contextmanager
def _naming_errors(path: str | os.PathLike, what: str = "cannot be read") -> Iterator[None]:
    """Re-raises any error as a ValueError of one line that names the file."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path}: {what}: {reason}") from error


def read_checkpoint(name: str) -> dict:
    """The content of a checkpoint: tensors and plain values. Code in a file is never run.

    `name` is a released checkpoint's or a URL, downloaded once to torch.hub's cache, or a path.
    """
    url = CHECKPOINTS.get(name, name)
    if "://" not in url and not os.path.isfile(url):
        raise ValueError(f"{name}: no such file; released checkpoints: {', '.join(CHECKPOINTS)}")
    try:
        if "://" not in url:
            return dict(torch.load(url, map_location="cpu", weights_only=True))
        file = url.split("?")[0].rsplit("/", 1)[-1]
        if name not in CHECKPOINTS:  # files of other URLs may all be called last.pt
            file = hashlib.sha256(url.encode()).hexdigest()[:16] + "_" + file
        return dict(torch.hub.load_state_dict_from_url(
            url, file_name=file, map_location="cpu", weights_only=True
        ))  # fmt: skip
    except Exception as error:  # torch.load raises many kinds
        reason = "not a checkpoint: truncated, damaged, or with code in it"
        raise ValueError(f"{name}: {error if isinstance(error, OSError) else reason}") from error


def convert_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a released state dict to this project's keys and shapes. Takes the nine files, and
    what the released trainer saves, with the head under `heads.0.`. Other keys stay the same."""
    head = "decoder.head." if "trunk.mask_token" in state else "head."
    renames = {  # the first that fits is used
        "trunk.mask_token": "decoder.mask_token", "trunk.pos_embed": "encoder.pos_embed",
        "trunk.patch_embed.proj.1.": "encoder.patch_embed.", "trunk.blocks.": "encoder.blocks.",
        "trunk.norm.": "norm.", "trunk.decoder.decoder_embed.": "decoder.embed.",
        "trunk.decoder.decoder_blocks.": "decoder.blocks.", "trunk.decoder.": "decoder.",
        "heads.0.projector.": head, "heads.0.0.": head, "heads.0.": head, "head.": head,
    }  # fmt: skip
    converted = {}
    for key, value in state.items():
        old, new = next((x for x in renames.items() if key.startswith(x[0])), ("", ""))
        key = new + key.removeprefix(old)
        if key.endswith("pos_embed") and value.ndim == 3:
            value = value[0]  # (1, N, D) -> (N, D)
        if key == "encoder.patch_embed.weight" and value.ndim == 5:
            value = value.permute(0, 2, 3, 4, 1).flatten(1)  # (D, 3, t, h, w) -> (D, P)
        converted[key] = value
    return converted


def load_checkpoint(name: str | os.PathLike) -> OmniMAE | Classifier:
    """Loads an OmniMAE or a Classifier, by what the file holds, in eval mode on the CPU. `name` is
    a released checkpoint's ("vit_b_ssv2"), a URL, or the path of a released file or of this
    project's. ValueError for what cannot be found, read or fitted."""
    file = read_checkpoint(str(name))
    with _naming_errors(name, "not an OmniMAE checkpoint, or of an unknown size"):
        state = convert_released(file.get("model", file))
        if "config" in file:
            cfg = OmniMAEConfig(**file["config"])
        else:
            sizes = {(cfg.dim, cfg.patch_values): cfg for cfg in MODELS.values()}
            size = tuple(state["encoder.patch_embed.weight"].shape)  # (D, P)
            cfg = replace(sizes[size], decoder_qkv_bias="decoder.blocks.0.attn.qkv.bias" in state)
        with torch.device("meta"):  # build without allocating; assign=True fills it
            if "decoder.mask_token" in state:
                model = OmniMAE(cfg)
            else:
                model = Classifier(cfg, num_classes=len(state.get("head.bias", ())))
                model.classes = file.get("classes")
        model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model.eval()


# ------------------------------------------------------------------------------------------------
# Media: data sets as people download them, images and clips

CLIP_SECONDS = Fraction(2.7)  # of a clip; the float, as released, is not quite 27/10
SUFFIXES = {
    "images": (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"),
    "videos": (".webm", ".mp4", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv"),
}
Listing = namedtuple("Listing", ["paths", "labels", "classes"])  # labels, classes: may be None


def read_classes(path: str | os.PathLike) -> list[str]:
    """The class names in a labels.json such as SSv2's, {"name": "0", ...}, in order of index."""
    with _naming_errors(path, "not a labels.json"):
        index = json.loads(Path(path).read_text())
        return sorted(index, key=lambda name: int(index[name]))


def has_validation(root: str | os.PathLike, kind: str) -> bool:
    """Whether a data set comes with a validation split."""
    ssv2 = kind == "videos" and (Path(root) / "labels" / "labels.json").exists()
    return ssv2 or (Path(root) / "val").is_dir()


def list_media(root: str | os.PathLike, kind: str, split: str = "train") -> Listing:
    """Lists the "images" or "videos" of a data set's "train" or "val" split, in a fixed order.

    Layouts: ImageNet (train/<class>/*, val/<class>/*), SSv2 (labels/*.json and
    20bn-something-something-v2/*.webm), any folder of class folders (none called train or val), a
    flat folder without labels. Class folders are numbered in order. ValueError for anything else.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected a folder of {kind}")
    if split == "val" and not has_validation(root, kind):
        raise ValueError(f"{root}: no validation split; expected a folder val/ in it")
    if kind == "videos" and (root / "labels" / "labels.json").exists():
        return _list_ssv2(root, "train" if split == "train" else "validation")
    root = root / split if (root / split).is_dir() else root

    def media_in(folder: Path) -> list[str]:
        names = (x for x in sorted(os.listdir(folder)) if x.lower().endswith(SUFFIXES[kind]))
        return [os.path.join(folder, name) for name in names if not name.startswith(".")]

    flat = media_in(root)
    folders = sorted(x for x in root.iterdir() if x.is_dir() and not x.name.startswith("."))
    classes = {folder.name: media_in(folder) for folder in folders}
    empty = [name for name, paths in classes.items() if not paths]
    if flat and len(empty) == len(classes):
        return Listing(flat, None, None)
    if flat or empty or not classes:
        raise ValueError(
            f"{root}: expected {kind} in it, or in every one of its class folders; found "
            f"{len(flat)} in it, and none in these folders: {', '.join(empty[:5]) or '-'}"
        )
    labels = [label for label, paths in enumerate(classes.values()) for _ in paths]
    return Listing([path for paths in classes.values() for path in paths], labels, list(classes))


def _list_ssv2(root: Path, split: str) -> Listing:
    folder, path = root / "20bn-something-something-v2", root / "labels" / f"{split}.json"
    classes = read_classes(root / "labels" / "labels.json")
    index = {name: i for i, name in enumerate(classes)}  # names are templates without brackets
    with _naming_errors(path):
        samples = json.loads(path.read_text())
        labels = [index[x["template"].replace("[", "").replace("]", "")] for x in samples]
        return Listing([f"{folder}/{x['id']}.webm" for x in samples], labels, classes)


def read_image(path: str | os.PathLike) -> Tensor:
    """Reads an image, uint8 (3, H, W), always RGB; 16 bit is cut to 8, EXIF orientation ignored.
    ValueError names a file that cannot be read."""
    with _naming_errors(path), PIL.Image.open(path) as image:
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
            image = PIL.Image.fromarray((np.array(image) >> 8).clip(0, 255).astype(np.uint8))
        return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def read_clips(path: str | os.PathLike, starts: Sequence, num_frames: int) -> Tensor:
    """Reads clips of 2.7 s, uint8 (clips, T, 3, H, W). Short videos repeat frames. `starts` are
    fractions of the last possible start: training draws one, evaluation takes Fraction(i, 5).
    ValueError names a file that cannot be read."""
    with _open_video(path) as (container, stream):
        length = stream.duration
        if length is None:  # as in .webm: up to the last frame's timestamp, without decoding
            times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            length = max(times, default=0) - (stream.start_time or 0)
        last_start = max(length * stream.time_base - CLIP_SECONDS, 0)
        begins = [Fraction(fraction) * last_start for fraction in starts]  # in seconds
        clips = [_read_window(container, stream, x, CLIP_SECONDS, num_frames) for x in begins]
        return torch.stack(clips)


def read_clip(path: str | os.PathLike, start: float, duration: float, num_frames: int) -> Tensor:
    """Reads one clip, uint8 (T, 3, H, W), from `start` for `duration`, in seconds from the video's
    first frame. ValueError names a file that cannot be read."""
    with _open_video(path) as (container, stream):
        return _read_window(container, stream, Fraction(start), Fraction(duration), num_frames)


@contextmanager
def _open_video(path: str | os.PathLike) -> Iterator[tuple]:
    with _naming_errors(path), av.open(os.path.abspath(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the loader's workers already use all cores
        stream.codec_context.options = {"max_pixels": str(2**27)}  # broken files claim any size
        yield container, stream


def _read_window(container, stream, start: Fraction, duration: Fraction, num_frames: int) -> Tensor:
    """Decodes one clip: the frames with start <= time < start + duration, exactly as released, in
    whole ticks: ceil(start / time_base) <= pts < ceil((start + duration) / time_base), from the
    first pts. Of these n frames those at linspace(0, n - 1, num_frames), truncated, are kept."""
    first_pts = stream.start_time or 0
    begin = first_pts + math.ceil(start / stream.time_base)
    end = first_pts + math.ceil((start + duration) / stream.time_base)
    # to the keyframe before; where that lands too late, once more from the start of the file
    for seek in ({"offset": begin, "stream": stream}, {"offset": 0}):
        container.seek(**seek)
        frames, landed = [], math.inf
        for frame in container.decode(stream):
            landed = min(landed, frame.pts)
            if frame.pts >= end:
                break
            if frame.pts >= begin:
                frames.append(frame)
        if landed <= begin:
            break
    if not frames:
        raise ValueError(f"no frame between {float(start):.2f} and {float(start + duration):.2f} s")
    kept = [frames[i] for i in np.linspace(0, len(frames) - 1, num_frames).astype(int)]
    to_rgb = VideoReformatter()  # one for all frames: making it costs more than using it
    size = kept[0].width, kept[0].height
    frames = [to_rgb.reformat(x, *size, "rgb24", threads=1).to_ndarray() for x in kept]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # (T, H, W, 3) -> (T, 3, H, W)
