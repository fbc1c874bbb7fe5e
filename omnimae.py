"""OmniMAE: one Vision Transformer, pretrained by masked autoencoding on images and videos.

Girdhar, El-Nouby, Singh, Alwala, Joulin, Misra, CVPR 2023, https://arxiv.org/abs/2206.08356

The method on one screen. B batch, T frames, H W pixels, N patches, V visible, M masked (V + M = N),
P values in a patch, D encoder width, D' decoder width. Numbers: ViT-B/16, a clip (an image).

    x          (B, 3, T, H, W)  ImageNet-normalised; an image is a video of one frame, repeated
      |                         to fill a patch                     16 x 224 x 224  (1 x 224 x 224)
    patches    (B, N, P)        2 x 16 x 16 pixels x 3 channels     1568 x 1536     (196 x 1536)
      |  random mask            hides 95 % of a clip's patches      V = 79          (20)
      |                         and 90 % of an image's
    visible    (B, V, P)        the encoder sees only these: this is what makes it cheap
      |  linear, + position
      |  12 blocks, norm        a plain ViT: no class token, fixed sine/cosine positions
    tokens     (B, V, D)        D = 768
      |  + position, linear     and a mask token, treated alike, for each masked patch
      |  concatenated           [visible, masked], in that order
      |  4 blocks               a small decoder over all N
    tokens     (B, N, D')       D' = 384
      |  last M, norm, linear
    pred       (B, M, P)        compared, by mean squared error, with the
    target     (B, M, P)        masked patches in [0, 1], each normalised, per channel,
                                to mean 0 and variance 1

After pretraining the decoder is thrown away; `Classifier` runs the encoder on all patches.
"""

import difflib
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

# ------------------------------------------------------------------------------------------------
# The sizes (paper, section 4, and the released checkpoints)


@dataclass(frozen=True)
class OmniMAEConfig:
    """The sizes of a model, and its mask ratios. The defaults are ViT-B/16."""

    image_size: int = 224  # pixels, height and width
    num_frames: int = 16  # of a clip
    patch_size: tuple[int, int, int] = (2, 16, 16)  # frames, pixels, pixels
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    decoder_dim: int = 384  # D'
    decoder_depth: int = 4
    decoder_heads: int = 16
    decoder_qkv_bias: bool = False  # as in the released checkpoints (their configuration: True)
    image_mask_ratio: float = 0.90
    video_mask_ratio: float = 0.95

    @property
    def grid(self) -> tuple[int, int, int]:
        """A clip's patches in time, height and width; an image has one slot in time."""
        t, h, w = self.patch_size
        return self.num_frames // t, self.image_size // h, self.image_size // w

    def masking(self, kind: str) -> tuple[tuple[int, int, int], float]:
        """The grid of patches and the mask ratio of "images" or "videos"."""
        if kind == "videos":
            return self.grid, self.video_mask_ratio
        return (1, *self.grid[1:]), self.image_mask_ratio

    @property
    def patch_values(self) -> int:
        """P, values in a patch."""
        return 3 * math.prod(self.patch_size)


MODELS = {
    "vit_b": OmniMAEConfig(),
    "vit_l": OmniMAEConfig(dim=1024, depth=24, heads=16, decoder_dim=512),
    "vit_h": OmniMAEConfig(
        patch_size=(2, 14, 14), dim=1280, depth=32, heads=16, decoder_dim=512, decoder_depth=8
    ),
    # not of the paper: small enough to pretrain on a laptop's CPU in minutes
    "demo": OmniMAEConfig(
        image_size=48, num_frames=8, patch_size=(2, 8, 8), dim=128, depth=4, heads=4,
        decoder_dim=64, decoder_depth=2, decoder_heads=4,
        image_mask_ratio=0.75, video_mask_ratio=0.90,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Pixels, patches and their positions

MEAN = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, for both kinds
STD = torch.tensor([0.229, 0.224, 0.225])


def normalize(x: Tensor) -> Tensor:
    """uint8, or floats in [0, 1], (B, 3, ...) -> ImageNet-normalised floats of the same shape."""
    if x.ndim < 4 or x.shape[1] != 3:
        raise ValueError(f"got shape {tuple(x.shape)}; expected (B, 3, H, W) or (B, 3, T, H, W)")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"got {x.dtype}: expected uint8, or floats in [0, 1]")
    shape = (3, *[1] * (x.ndim - 2))  # the channel is second
    mean, std = (v.to(x.device, non_blocking=True).view(shape) for v in (MEAN, STD))
    x = x / 255 if x.dtype == torch.uint8 else x.float()
    return (x - mean) / std


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """(B, 3, T, H, W) -> (B, N, P): patches in raster order, values in (t, h, w, channel) order."""
    t, h, w = patch_size
    x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # B 3 T/t t H/h h W/w w
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)  # (B, N, P)


def unpatchify(patches: Tensor, patch_size: tuple, grid: tuple) -> Tensor:
    """The inverse of `patchify`: (B, N, P) -> (B, 3, T, H, W), for `grid` patches in T, H and W."""
    x = patches.unflatten(2, (*patch_size, 3)).unflatten(1, grid)  # B T/t H/h W/w t h w 3
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


def to_patches(x: Tensor, cfg: OmniMAEConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """(B, 3, H, W) or (B, 3, T, H, W) -> patches (B, N, P), and how many in time, height and width.

    An image is a video of one frame, which is repeated to fill a patch. It may have any size that
    the patch divides; a clip only the model's own: positions are interpolated for images alone.
    ValueError for anything else.
    """
    t, h, w = cfg.patch_size
    frames, size = cfg.num_frames, cfg.image_size
    wanted = f"expected images (B, 3, H, W) or clips (B, 3, {frames}, {size}, {size})"
    if not x.is_floating_point():
        raise ValueError(f"got {x.dtype}: expected floats; omnimae.normalize() makes them")
    if x.ndim not in (4, 5) or x.shape[1] != 3 or 0 in x.shape:
        raise ValueError(f"got shape {tuple(x.shape)}; {wanted}")
    if x.shape[-2] % h or x.shape[-1] % w:
        raise ValueError(f"got {x.shape[-2]} x {x.shape[-1]} pixels: not whole {h} x {w} patches")
    x = x.unsqueeze(2) if x.ndim == 4 else x  # (B, 3, T, H, W)
    if x.shape[2] == 1:
        x = x.expand(-1, -1, t, -1, -1)  # (B, 3, t, H, W)
    elif x.shape[2:] != (frames, size, size):
        raise ValueError(f"got clips of {' x '.join(map(str, x.shape[2:]))}; {wanted}")
    return patchify(x, cfg.patch_size), (x.shape[2] // t, x.shape[3] // h, x.shape[4] // w)


def to_pixels(patches: Tensor) -> Tensor:
    """Patches (B, N, P) of ImageNet-normalised values -> of pixels in [0, 1]."""
    mean, std = (values.to(patches.device, non_blocking=True) for values in (MEAN, STD))
    return (patches.unflatten(2, (-1, 3)) * std + mean).flatten(2)  # the channel is last


def normalize_patches(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches with mean 0 and variance 1 (divided by n - 1) in each patch and channel, (B, N, P), and the
    means and deviations that they had, each (B, N, 1, 3)."""
    values = pixels.unflatten(2, (-1, 3))  # (B, N, P/3, 3)
    var, mean = torch.var_mean(values, dim=2, keepdim=True)  # (B, N, 1, 3)
    std = (var + 1e-6).sqrt()
    return ((values - mean) / std).flatten(2), mean, std


def sincos_positions(num: int, dim: int) -> Tensor:
    """The fixed table (num, dim) over the raster index: sines in even, cosines in odd columns."""
    angle = np.arange(num)[:, None] / 10000 ** (np.arange(dim) // 2 * 2 / dim)  # (num, dim)
    table = np.where(np.arange(dim) % 2, np.cos(angle), np.sin(angle))
    return torch.from_numpy(table).float()


def positions_for(table: Tensor, grid: tuple, cfg: OmniMAEConfig) -> Tensor:
    """The rows (N, D) of a clip's table for `grid`: an image takes the first slot in time,
    bicubically interpolated when its size is not the model's."""
    _, h, w = cfg.grid
    if grid[1:] == (h, w):
        return table[: math.prod(grid)]
    slot = table[: h * w].T.reshape(1, -1, h, w)  # (1, D, h, w)
    return F.interpolate(slot, size=grid[1:], mode="bicubic").flatten(2)[0].T  # (N, D)


# ------------------------------------------------------------------------------------------------
# Masking (paper, section 3; its ablations compare random and tube masks)


def random_mask(
    batch: int,
    grid: tuple[int, int, int],
    ratio: float,
    mask_kind: str = "random",
    generator: torch.Generator | None = None,
) -> Tensor:
    """bool (B, N), True = masked: int(ratio * N) patches of each sample, drawn uniformly.

    "random" draws over time and space at once; "tube" draws once over space and repeats that over
    time, so it masks T/t * int(ratio * H/h * W/w) patches.
    """
    if mask_kind not in ("random", "tube"):
        raise ValueError(f"masking {mask_kind!r}: expected 'random' or 'tube'")
    repeats = grid[0] if mask_kind == "tube" else 1
    num = math.prod(grid) // repeats
    masked = int(ratio * num)
    if not 0 < masked < num:
        raise ValueError(
            f"a mask ratio of {ratio} masks {masked} of {num} patches: expected one at least, not all"
        )
    order = torch.rand(batch, num, generator=generator).argsort(1)
    mask = torch.zeros(batch, num, dtype=torch.bool).scatter_(1, order[:, :masked], True)
    return mask.repeat(1, repeats)


def split_mask(mask: Tensor, batch: int, num: int) -> tuple[Tensor, ...]:
    """A mask -> visible (B, V) and masked (B, M) indices in raster order, and bool (B, N).

    `mask` is bool (B, N), True = masked; or the int64 visible indices (B, V), which is what the
    loader sends, because V must be known without waiting for the device. (Nor is it checked that
    the indices of a row differ: that would wait, too.)
    """
    if mask.dtype == torch.bool and mask.shape == (batch, num):
        counts = (~mask).sum(1).unique().tolist()
        if len(counts) > 1 or counts[0] in (0, num):
            raise ValueError(
                f"got masks that leave {counts} of {num} patches visible: "
                "expected as many in each row, at least one and not all"
            )
        num_visible = counts[0]
    elif mask.dtype == torch.int64 and mask.shape[:-1] == (batch,) and 0 < mask.shape[-1] < num:
        num_visible = mask.shape[1]
        mask = torch.ones(batch, num, dtype=torch.bool, device=mask.device).scatter(1, mask, False)
    else:
        raise ValueError(
            f"got a mask of {mask.dtype} {tuple(mask.shape)}: expected bool {(batch, num)}, "
            f"True = masked, or the visible patches' int64 indices ({batch}, V)"
        )
    order = mask.byte().argsort(dim=1, stable=True)  # (B, N): the visible, then the masked
    return order[:, :num_visible], order[:, num_visible:], mask


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample: (B, N, D), (B, K) -> (B, K, D)."""
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
        if torch.is_autocast_enabled("cpu"):
            qkv = qkv.float()  # there, the backward pass in bfloat16 takes up to four times as long
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        with torch.autocast("cpu", enabled=False):  # which would cast them back
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
    """Attention and MLP, each after a norm and added to its input. Drop path (stochastic depth) skips
    such a branch for some samples, and scales it up for the others."""

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


class Blocks(nn.ModuleList):
    """Blocks one after the other. With `checkpointing` set, activations are not kept but computed
    again in the backward pass: a third more work for a fraction of the memory."""

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def init_weights(module: nn.Module) -> None:
    """Xavier uniform for linear layers, the flattened patch embedding among them; zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------
# The models (paper, section 3)


class Encoder(nn.Module):
    """Visible patches (or all of them) -> tokens, not yet normed.

    The patch embedding is a linear layer on flattened patches: a convolution whose kernel equals
    its stride, computed only where something is visible.
    """

    def __init__(self, cfg: OmniMAEConfig, drop_path: float = 0.0):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.Linear(cfg.patch_values, cfg.dim)
        self.register_buffer("pos_embed", sincos_positions(math.prod(cfg.grid), cfg.dim))
        rates = np.linspace(0, drop_path, cfg.depth).tolist()  # grows linearly over the blocks
        self.blocks = Blocks(Block(cfg.dim, cfg.heads, drop_path=rate) for rate in rates)

    def forward(self, patches: Tensor, grid: tuple, visible: Tensor | None = None):
        """(B, N, P) and the visible indices (B, V), default all -> (B, V, D)."""
        positions = positions_for(self.pos_embed, grid, self.cfg)  # (N, D)
        if visible is not None:
            patches, positions = take(patches, visible), positions[visible]  # (B, V, P), (B, V, D)
        return self.blocks(self.patch_embed(patches) + positions)


class Decoder(nn.Module):
    """Normed tokens of the visible patches -> the masked ones, as `normalize_patches` makes them.

    Attention does not care about order, so [visible, masked] is never shuffled back into the
    raster: each token carries its position. Mask token and positions are of encoder width.
    """

    def __init__(self, cfg: OmniMAEConfig):
        super().__init__()
        self.cfg = cfg
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.dim))
        self.register_buffer("pos_embed", sincos_positions(math.prod(cfg.grid), cfg.dim))
        self.embed = nn.Linear(cfg.dim, cfg.decoder_dim)
        self.blocks = Blocks(
            Block(cfg.decoder_dim, cfg.decoder_heads, cfg.decoder_qkv_bias)
            for _ in range(cfg.decoder_depth)
        )
        self.norm = nn.LayerNorm(cfg.decoder_dim, eps=1e-6)
        self.head = nn.Linear(cfg.decoder_dim, cfg.patch_values)

    def forward(self, x: Tensor, grid: tuple, visible: Tensor, masked: Tensor):
        """(B, V, D) and both kinds of indices -> (B, M, P)."""
        positions = positions_for(self.pos_embed, grid, self.cfg)  # (N, D)
        x = self.embed(x + positions[visible])  # (B, V, D')
        mask_tokens = self.embed(self.mask_token + positions)  # (N, D'), the same for every sample
        mask_tokens = F.embedding(masked, mask_tokens)  # (B, M, D'); indexing has a slow backward
        x = torch.cat([x, mask_tokens], dim=1)  # (B, N, D')
        x = self.blocks(x)[:, visible.shape[1] :]  # (B, M, D')
        return self.head(self.norm(x))  # (B, M, P)


class OmniMAE(nn.Module):
    """The masked autoencoder: what is pretrained."""

    def __init__(self, cfg: OmniMAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.decoder = Decoder(cfg)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.decoder.head.weight, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the prediction and the mask.

        x: (B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised. mask: bool (B, N), True = masked,
        as many in each row; or the visible patches' indices (B, V), which need no host sync;
        default: random at the model's ratio. Returns the loss (scalar), pred (B, M, P): the masked
        patches, normalised, in raster order, values in (t, h, w, channel) order, and the bool mask.
        """
        patches, grid = to_patches(x, self.cfg)  # (B, N, P)
        if mask is None:
            _, ratio = self.cfg.masking("images" if grid[0] == 1 else "videos")
            mask = random_mask(len(x), grid, ratio)
        visible, masked, mask = split_mask(mask.to(x.device), *patches.shape[:2])
        tokens = self.norm(self.encoder(patches, grid, visible))  # (B, V, D)
        pred = self.decoder(tokens, grid, visible, masked).float()  # (B, M, P)
        target, _, _ = normalize_patches(to_pixels(take(patches, masked).float()))  # (B, M, P)
        return F.mse_loss(pred, target), pred, mask

    @torch.no_grad()
    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pixels in [0, 1], (B, 3, T, H, W), T = 1 for images: visible patches as they are, masked
        ones predicted and un-normalised with the true patch's mean and deviation.

        The model predicts normalised patches, so it does not say how bright a patch is. An image is
        one frame repeated; its predictions are averaged.
        """
        _, pred, mask = self(x, mask)
        patches, grid = to_patches(x, self.cfg)
        pixels = to_pixels(patches.float())  # (B, N, P)
        _, mean, std = normalize_patches(pixels)  # (B, N, 1, 3)
        pred = pred.unflatten(2, (-1, 3)).flatten(0, 1) * std[mask] + mean[mask]  # (B M, P/3, 3)
        pixels[mask] = pred.flatten(1)  # (B M, P)
        video = unpatchify(pixels, self.cfg.patch_size, grid).clamp(0, 1)  # (B, 3, T, H, W)
        return video.mean(2, keepdim=True) if grid[0] == 1 else video


class Classifier(nn.Module):
    """The encoder with a linear head: what is finetuned. Mean over the patches first, then norm."""

    def __init__(
        self,
        cfg: OmniMAEConfig,
        num_classes: int,
        drop_path: float = 0.0,
        classes: list[str] | None = None,
    ):
        super().__init__()
        self.cfg = cfg
        self.classes = classes  # their names, where known
        self.encoder = Encoder(cfg, drop_path)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.head = nn.Linear(cfg.dim, num_classes)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised -> (B, N, D), before pooling."""
        return self.encoder(*to_patches(x, self.cfg))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W), ImageNet-normalised -> logits (B, num_classes)."""
        return self.head(self.norm(self.features(x).mean(1)))


def draw_reconstruction(model: OmniMAE, x: Tensor, mask: Tensor) -> PIL.Image.Image:
    """One normalised image (3, H, W) or clip (3, T, H, W), mask bool (N,) -> a picture: original |
    what the encoder sees | reconstruction; of a clip, three rows of frames."""
    patches, grid = to_patches(x[None], model.cfg)
    original = to_pixels(patches)  # (1, N, P)
    seen = original.masked_fill(mask[None, :, None], 0.5)
    panels = [unpatchify(p, model.cfg.patch_size, grid) for p in (original, seen)]
    panels.append(model.reconstruct(x[None], mask[None]))  # (1, 3, T, H, W)
    shown = panels[2].shape[2]  # of an image, repeated to fill a patch, one frame
    frames = torch.cat([panel[0, :, :shown].movedim(1, 0) for panel in panels])  # (3 T, 3, H, W)
    return to_pil_image(make_grid(frames.cpu(), nrow=max(3, shown), pad_value=1.0))


# ------------------------------------------------------------------------------------------------
# Checkpoints: the nine released ones (CC-BY-NC 4.0) and this project's own

_URL = "https://dl.fbaipublicfiles.com/omnivore/omnimae_ckpts/"
CHECKPOINTS = {
    f"vit_{size}_{kind}": f"{_URL}vit{size}_{file}.torch"
    for size in "blh"
    for kind, file in (("pretrain", "pretrain"), ("in1k", "in1k_ft"), ("ssv2", "ssv2_ft"))
}


@contextmanager
def _errors_name(path: str | os.PathLike, what: str = "cannot be read") -> Iterator[None]:
    """Whatever a file's content makes its reader say becomes a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {what}: {reason}") from error


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question for the end of an error message: the names that begin so, or else the nearest."""
    near = [other for other in names if other.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), names, 1)
    return f": did you mean {', '.join(near)}?" if near else ""


def _fetch(name: str) -> Path:
    """A checkpoint's path, downloaded first where `name` is a released one's or a URL."""
    if os.path.exists(name):  # Path(name).exists() would fail for a long URL
        return Path(name)
    url = CHECKPOINTS.get(name, name)
    if "://" not in url:
        known = did_you_mean(name, CHECKPOINTS) or f" ({', '.join(CHECKPOINTS)})"
        raise ValueError(f"{name}: no such file, and not a released checkpoint{known}")
    file = url.split("?")[0].rsplit("/", 1)[-1]
    if url not in CHECKPOINTS.values():  # others may all be called last.pt
        file = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{file}"
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.lock", "w") as lock:  # stays: another may be waiting for it
                with suppress(OSError):  # a file system without locks
                    fcntl.lockf(lock, fcntl.LOCK_EX)  # one process downloads, the others wait
                if not path.exists():
                    torch.hub.download_url_to_file(url, str(path))  # temporary, then renamed
        except Exception as error:  # urllib raises many kinds
            raise ValueError(f"{name}: cannot download {url} to {path}: {error}") from error
    return path


def read_checkpoint(path: str | os.PathLike) -> dict:
    """What torch.save wrote, a dict of tensors and plain values; code in a file is never run.
    OSError, or ValueError for anything else."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: expected a file, such as {path}/last.pt")
    with open(path, "rb") as file:
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises many kinds
            raise ValueError(
                f"{path}: not a checkpoint: truncated, damaged, not a dict, or with more in it "
                "than tensors, such as code; if it was downloaded, delete it to download it again"
            ) from error


def convert_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict's keys and shapes -> this project's.

    Takes the nine released files, and what the released trainer saves, which has the head under
    `heads.0.` with one more level. A key of neither is kept, so that strict loading names it.
    """
    head = "decoder.head." if "trunk.mask_token" in state else "head."
    renames = (
        ("trunk.mask_token", "decoder.mask_token"),
        ("trunk.patch_embed.proj.1.", "encoder.patch_embed."),
        ("trunk.pos_embed", "encoder.pos_embed"),
        ("trunk.blocks.", "encoder.blocks."),
        ("trunk.norm.", "norm."),
        ("trunk.decoder.decoder_embed.", "decoder.embed."),
        ("trunk.decoder.decoder_blocks.", "decoder.blocks."),
        ("trunk.decoder.", "decoder."),
        ("heads.0.projector.", head),
        ("heads.0.0.", head),
        ("heads.0.", head),
        ("head.", head),
    )
    converted = {}
    for key, value in state.items():
        old, new = next((pair for pair in renames if key.startswith(pair[0])), ("", ""))
        key = new + key.removeprefix(old)
        if key.endswith("pos_embed") and value.ndim == 3:
            value = value[0]  # (1, N, D) -> (N, D)
        if key == "encoder.patch_embed.weight" and value.ndim == 5:
            value = value.permute(0, 2, 3, 4, 1).flatten(1)  # (D, 3, t, h, w) -> (D, P)
        converted[key] = value
    return converted


def _released_config(state: dict[str, Tensor]) -> OmniMAEConfig:
    """The size of a released model, read from its tensors."""
    shape = tuple(state.get("encoder.patch_embed.weight", torch.empty(0)).shape)  # (D, P)
    depth = len({key.split(".")[2] for key in state if key.startswith("encoder.blocks.")})
    for cfg in MODELS.values():
        if shape == (cfg.dim, cfg.patch_values) and depth == cfg.depth:
            return replace(cfg, decoder_qkv_bias="decoder.blocks.0.attn.qkv.bias" in state)
    raise ValueError(f"a patch embedding of {shape} and {depth} blocks fit none of {list(MODELS)}")


def load_checkpoint(name: str | os.PathLike) -> OmniMAE | Classifier:
    """A model in eval mode on the CPU: OmniMAE or Classifier, by what the file holds.

    `name` is a released checkpoint's ("vit_b_ssv2"; see CHECKPOINTS), a URL (both are downloaded
    once, to torch.hub's cache), or the path of a released file or one of this project's.
    ValueError or OSError, in one sentence, for what cannot be found, read or fitted.
    """
    path = _fetch(str(name))
    file = read_checkpoint(path)
    state = file.get("model", file)
    with _errors_name(path, "not an OmniMAE checkpoint"):
        if "settings" in file:  # this project's
            cfg = OmniMAEConfig(**file["config"])
        else:
            state = convert_released(state)
            cfg = _released_config(state)
        with torch.device("meta"):  # no memory, no work: the file's tensors take the place
            if "decoder.mask_token" in state:
                model = OmniMAE(cfg)
            else:
                num_classes = len(state.get("head.bias", ()))
                model = Classifier(cfg, num_classes, classes=file.get("classes"))
        model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model.requires_grad_().eval()


# ------------------------------------------------------------------------------------------------
# Media: data sets as people download them, images and clips

CLIP_SECONDS = 2.7  # of a clip, in training and evaluation
MAX_PIXELS = 2**27  # of an image; the frames of a clip's window together may have 16 times as many
VALIDATION = ("val", "valid", "validation")  # names of that folder, in class folders' layout
SUFFIXES = {
    "images": (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"),
    "videos": (".webm", ".mp4", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv"),
}


class Listing(NamedTuple):
    """The files of a data set; labels and class names where the layout has them."""

    paths: list[str]
    labels: list[int] | None
    classes: list[str] | None


def read_classes(path: str | os.PathLike) -> list[str]:
    """The class names of a labels.json, in the order of their numbers; else ValueError."""
    with _errors_name(path, 'expected JSON like SSv2\'s labels.json, {"name": "0", ...}'):
        content = json.loads(Path(path).read_text())
        number = {k: int(i) for k, i in content.items()} if isinstance(content, dict) else {}
        if not number or sorted(number.values()) != list(range(len(number))):
            raise ValueError("it does not number names 0, 1, 2 and so on, each once")
        return sorted(number, key=number.get)


def _list_ssv2(root: Path, split: str) -> Listing:
    folder, path = root / "20bn-something-something-v2", root / "labels" / f"{split}.json"
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: expected the data set's .webm files in it")
    classes = read_classes(root / "labels" / "labels.json")
    with _errors_name(path):
        samples = json.loads(path.read_text())
        names = [sample["template"].replace("[", "").replace("]", "") for sample in samples]
        paths = [str(folder / f"{sample['id']}.webm") for sample in samples]
    if unknown := set(names) - set(classes):
        raise ValueError(f"{path}: labels.json has no {min(unknown)!r} ({len(unknown)} such)")
    number = {name: i for i, name in enumerate(classes)}
    return Listing(paths, [number[name] for name in names], classes)


def has_validation(root: str | os.PathLike, kind: str) -> bool:
    """Whether a data set has a validation part of its own."""
    own = (*VALIDATION, "labels/labels.json") if kind == "videos" else VALIDATION
    return any((Path(root) / name).exists() for name in own)


def list_media(root: str | os.PathLike, kind: str, split: str = "train") -> Listing:
    """The "images" or "videos" of a data set's "train" or "val" part, in a fixed order.

    Layouts: ImageNet (train/<class>/*, val/<class>/*; see VALIDATION), SSv2 (labels/*.json and
    20bn-something-something-v2/*.webm), any folder of class folders, a flat folder. ValueError says
    what is wrong.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}: expected a folder of {kind}")
    if kind == "videos" and (root / "labels" / "labels.json").exists():
        return _list_ssv2(root, "train" if split == "train" else "validation")
    parts = ("train",) if split == "train" else VALIDATION
    part = next((root / name for name in parts if (root / name).is_dir()), root)
    if part is root and split != "train":
        raise ValueError(f"{root}: has none of the folders {', '.join(VALIDATION)}")

    def files(folder):
        return sorted(
            entry.path
            for entry in os.scandir(folder)
            if entry.name.lower().endswith(SUFFIXES[kind]) and not entry.name.startswith(".")
        )

    entries = sorted(os.scandir(part), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    inside = {name: found for name in folders if (found := files(part / name))}
    flat = files(part)
    if inside and flat:
        raise ValueError(
            f"{part} holds {kind} beside folders of {kind}, such as {Path(flat[0]).name} beside "
            f"{min(inside)}/: expected one or the other"
        )
    if inside:
        for name in sorted({*folders} - {*inside, "test", *VALIDATION}):
            if any(x.name.lower().endswith(SUFFIXES[kind]) for x in (part / name).rglob("*")):
                raise ValueError(
                    f"{part / name} holds {kind} only in folders of its own: expected them in "
                    f"{name}/ itself, as in {min(inside)}/"
                )
        labels = [label for label, found in enumerate(inside.values()) for _ in found]
        return Listing([path for found in inside.values() for path in found], labels, list(inside))
    if not flat:
        raise ValueError(
            f"{part}: no {kind} found: expected <class>/<file> or files that end in "
            f"{' '.join(SUFFIXES[kind])}"
            + (f"; it holds the folders {', '.join(folders[:5])}" if folders else "")
        )
    others = [] if part is root else sorted({*os.listdir(root)} - {"train", "test", *VALIDATION})
    for name in others:
        if (root / name).is_dir() and files(root / name):
            raise ValueError(
                f"{root} has {kind} in {part.name}/ and in {name}/: if both are classes, rename "
                f"{part.name}/, which is taken for a part of the data set; if not, move {name}/ away"
            )
    return Listing(flat, None, None)


def _check_size(width: int, height: int) -> None:
    """A broken header can claim any size; and one row of pixels, resized to 224 rows, is huge."""
    if width * height > MAX_PIXELS or max(width, height) > 100 * min(width, height):
        raise ValueError(
            f"its size is {width} x {height}: expected at most {MAX_PIXELS:,} pixels, and at most "
            "100 times as long as wide"
        )


def read_image(path: str | os.PathLike) -> Tensor:
    """uint8 (3, H, W), always RGB: grey and CMYK converted, 16 bit cut to 8, alpha dropped, EXIF
    orientation left as stored. ValueError names a file that cannot be read."""
    with _errors_name(path), PIL.Image.open(path) as image:
        _check_size(*image.size)
        if image.mode == "F":
            raise ValueError("its pixels are floats: expected 8 or 16 bit")
        if image.mode.startswith("I"):  # 16 bit grey, which PIL would clip
            image = PIL.Image.fromarray((np.array(image).clip(0, 65535) >> 8).astype(np.uint8))
        return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


class Video(AbstractContextManager):
    """An open video file: its duration in seconds, and clips from it. Leaving `with` closes it."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self.rgb = VideoReformatter()  # kept: making one costs more than using it
        with _errors_name(path), ExitStack() as on_error:
            self.container = on_error.enter_context(av.open(os.path.abspath(path)))
            if not self.container.streams.video:
                raise ValueError("it has no video stream")
            self.stream = self.container.streams.video[0]
            self.stream.codec_context.thread_count = 1  # a loader's workers are the threads
            self.first = self.stream.start_time or 0
            length = self.stream.duration
            if length is None:  # as in .webm: to the last frame's timestamp, without decoding
                packets = self.container.demux(self.stream)
                times = (packet.pts for packet in packets if packet.pts is not None)
                length = max(times, default=self.first) - self.first
            self.duration = float(length * self.stream.time_base)
            on_error.pop_all()  # it stays open

    def __exit__(self, *_) -> None:
        self.container.close()

    def clip(self, start: float, duration: float, num_frames: int) -> Tensor:
        """uint8 (T, 3, H, W): of the n frames with start <= time < start + duration, in seconds
        from the first, those at linspace(0, n - 1, T) truncated; short clips repeat frames. Where
        the picture stands still for longer than that, the frame that is shown."""
        if not (duration > 0 and num_frames > 0):
            raise ValueError(f"got {num_frames} frames of {duration} s: expected more than none")
        with _errors_name(self.path):
            frames, total = [], 0
            for frame in self._window(start, start + duration):
                _check_size(frame.width, frame.height)
                total += frame.width * frame.height
                if total > 16 * MAX_PIXELS:
                    raise ValueError(f"more than {len(frames)} large frames in {duration} s")
                frames.append(frame)
            if not frames:
                raise ValueError(f"no frame between {start:.3f} and {start + duration:.3f} s")
            kept = [frames[i] for i in np.linspace(0, len(frames) - 1, num_frames).astype(int)]
            size = kept[0].width, kept[0].height
            clip = np.stack(
                [self.rgb.reformat(frame, *size, "rgb24", threads=1).to_ndarray() for frame in kept]
            )
            return torch.from_numpy(clip).permute(0, 3, 1, 2)  # (T, H, W, 3) -> (T, 3, H, W)

    def _window(self, start: float, end: float) -> Iterator[av.VideoFrame]:
        """Decode from the keyframe before `start` to `end`. Where frames are not stored in the
        order they are shown, a seek can land after `start`: then again, from further back, at last
        from where the file begins."""
        for back in (0, 1, 10, None):  # seconds
            if back is None:
                self.container.seek(0)
            else:
                target = self.first + max(0, int((start - back) / self.stream.time_base))
                self.container.seek(target, stream=self.stream)
            frames = self._decode()
            time, frame = next(frames, (math.inf, None))
            if time <= start:
                break
        shown = None  # from before `start`, if nothing follows in time
        while time < end:
            if time >= start:
                yield frame
            shown = frame if time < start else None
            time, frame = next(frames, (math.inf, None))
        if shown and start <= self.duration:
            yield shown

    def _decode(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frames from where the file stands, each with its time in seconds."""
        for frame in self.container.decode(self.stream):
            if frame.pts is None:
                raise ValueError("its frames have no timestamps")
            yield float((frame.pts - self.first) * self.stream.time_base), frame


def read_clip(path: str, start: float, duration: float, num_frames: int) -> Tensor:
    """uint8 (T, 3, H, W): `num_frames` of the frames from `start` for `duration` seconds, as
    `Video.clip` chooses them. ValueError names a file that cannot be read."""
    with Video(path) as video:
        return video.clip(start, duration, num_frames)


# ------------------------------------------------------------------------------------------------
# The demo data set: small, but real files in the layouts of ImageNet and SSv2

# A shape is where its function of x and y (right and down, both about -1 to 1) is under 1.
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) * 1.1,
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) * 3.2, np.maximum(abs(x), abs(y))),
    "diamond": lambda x, y: abs(x) + abs(y),
    "half": lambda x, y: np.maximum(np.hypot(x, y + 0.45), 1 - 2 * (y + 0.45)),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) * 4,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) * 1.25,
    "star": lambda x, y: np.hypot(x, y) / (0.65 + 0.35 * np.cos(5 * np.arctan2(x, -y))),
    "triangle": lambda x, y: np.maximum(y + 0.4, 1.5 * abs(x) - y) * 1.05,
}
# A motion is what changes from the first frame to the last: x, y, size and angle.
MOTIONS = {
    "Growing [something]": (0, 0, 1, 0),
    "Moving [something] down": (0, 1, 0, 0),
    "Moving [something] to the left": (-1, 0, 0, 0),
    "Moving [something] to the right": (1, 0, 0, 0),
    "Moving [something] up": (0, -1, 0, 0),
    "Shrinking [something]": (0, 0, -1, 0),
    "Turning [something] clockwise": (0, 0, 0, 1),
    "Turning [something] counterclockwise": (0, 0, 0, -1),
}


def write_clip(path: str | os.PathLike, frames: np.ndarray, rate: int = 12) -> None:
    """Frames (T, H, W, 3) uint8 -> a VP9 .webm file, or an H.264 .mp4 (even sizes only), which any
    player shows."""
    codec, options = "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}
    if str(path).endswith(".mp4"):
        codec, options = "libx264", {}
    with av.open(str(path), "w", container_options={"fflags": "bitexact"}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate, stream.codec_context.thread_count = 500_000, 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _draw(rng, shape: str, num_frames: int = 1, motion=(0, 0, 0, 0), angle: float = 0.0):
    """One large shape before a wall: uint8 (T, 72, 96, 3).

    The wall is bright above, the shape below, in every file: whatever else differs between files
    a masked autoencoder learns first, and in minutes it learns little more.
    """
    height, width = 72, 96
    y, x = np.mgrid[:height, :width] - np.array([height / 2, width / 2])[:, None, None]
    at = np.linspace(-0.5, 0.5, num_frames)[:, None, None] * (num_frames > 1)  # (T, 1, 1)
    x0 = rng.uniform(-14, 14) + 32 * motion[0] * at
    y0 = rng.uniform(-8, 8) + 26 * motion[1] * at
    size = rng.uniform(20, 28) * np.exp(motion[2] * at)
    turn = angle + 2.4 * motion[3] * at
    u = (np.cos(turn) * (x - x0) + np.sin(turn) * (y - y0)) / size
    v = (np.cos(turn) * (y - y0) - np.sin(turn) * (x - x0)) / size
    inside = np.clip((1 - SHAPES[shape](u, v)) * size / 2 + 0.5, 0, 1)[..., None]  # soft edge

    above = 0.5 - y[..., None] / height  # 0 at the bottom, 1 at the top
    dark, bright = rng.uniform(0, 60, 3), rng.uniform(195, 255, 3)
    wall = dark + (bright - dark) * above
    colour = rng.permutation([30, 230, rng.uniform(30, 230)])
    front = colour * (1.3 - above)
    return (wall + (front - wall) * inside).clip(0, 255).astype(np.uint8)


def write_demo_data(
    root: str | os.PathLike,
    images: int = 3200,
    videos: int = 1600,
    val_images: int = 400,
    val_videos: int = 320,
) -> Path:
    """Write the demo data set to a new folder: the same files every time, complete or not at all.

    root/images: JPEGs in ImageNet's layout, the class is the shape. root/videos: VP9 .webm, 12
    frames a second, 2 to 4 s, in SSv2's layout; the class is the motion, which the frame in the middle
    does not tell.
    """
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    shapes, motions = list(SHAPES), list(MOTIONS)
    names = [motion.replace("[", "").replace("]", "") for motion in motions]

    def write_image(split, i):
        rng, shape = np.random.default_rng([0, split == "val", i]), shapes[i % len(shapes)]
        path = work / "images" / split / shape / f"{shape}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(_draw(rng, shape)[0]).save(path, quality=95)

    def write_video(i):
        rng = np.random.default_rng([1, i])
        frames = _draw(
            rng,
            shape=("half", "star", "triangle", "square")[rng.integers(4)],  # whose turning shows
            num_frames=int(rng.integers(24, 49)),
            motion=MOTIONS[motions[i % len(motions)]],
            angle=rng.uniform(0, 2 * np.pi),
        )
        write_clip(clips / f"{i + 1}.webm", frames)

    def sample(i):
        k = i % len(motions)
        return {"id": str(i + 1), "label": names[k], "template": motions[k], "placeholders": []}

    files = {
        "labels.json": {name: str(i) for i, name in enumerate(names)},
        "train.json": [sample(i) for i in range(videos)],
        "validation.json": [sample(i) for i in range(videos, videos + val_videos)],
    }
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        work = Path(folder, "complete")
        clips, labels = work / "videos" / "20bn-something-something-v2", work / "videos" / "labels"
        clips.mkdir(parents=True)
        labels.mkdir()
        for name, content in files.items():
            (labels / name).write_text(json.dumps(content, indent=1))
        with ThreadPoolExecutor() as pool:
            list(pool.map(write_video, range(videos + val_videos)))
            list(pool.map(write_image, ["train"] * images, range(images)))
            list(pool.map(write_image, ["val"] * val_images, range(val_images)))
        work.rename(root)
    return root
