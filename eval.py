"""Evaluate a finetuned model, label files, or look at reconstructions.

    torchrun --nproc_per_node=8 eval.py --checkpoint vit_b_ssv2 --videos /data/ssv2    accuracy
    python eval.py --checkpoint vit_b_in1k dog.jpg cat.jpg                        five best labels
    python eval.py --checkpoint vit_b_pretrain dog.jpg clip.mp4                   reconstructions

As released, an image is one view: the short side resized to 224, the centre cropped. A video is 15
views, 5 clips in time x 3 crops in space, whose logits are averaged.
"""

import argparse
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_pil_image

import omnimae
import train

CLIPS, CROPS = 5, 3  # views of a video

# ------------------------------------------------------------------------------------------------
# Data: labelled files, and the views of a file


def list_labelled(root: str, kind: str, split: str, classes=None) -> omnimae.Listing:
    """Lists the "train" or "val" split. Labels index `classes`, by default the split's. Without
    a val split, every 10th file of a class is held out. ValueError for other classes."""
    has_val = omnimae.has_validation(root, kind)
    paths, labels, names = omnimae.list_media(root, kind, split if has_val else "train")
    if labels is None:
        raise ValueError(f"{root}: {kind} without labels; expected <class>/<file>")
    if not has_val:
        nth = np.arange(len(labels)) - np.searchsorted(labels, labels)  # within a class
        chosen = np.flatnonzero((nth % 10 == 0) == (split == "val")).tolist()
        paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
    classes = classes or names
    if set(names) != set(classes) or len(set(labels)) < 2:
        found = f"{len(set(labels))} classes, {names[0]!r} to {names[-1]!r}"
        raise ValueError(f"{root}: {split} has {found}; expected the training classes, 2 or more")
    index = [classes.index(name) for name in names]
    return omnimae.Listing(paths, [index[label] for label in labels], classes)


def is_video(path: str) -> bool:
    return path.lower().endswith(omnimae.SUFFIXES["videos"])


def read_pixels(path: str, cfg: omnimae.OmniMAEConfig, num_clips: int) -> Tensor:
    """Reads an image, uint8 (1, 3, S, S), resized by PIL (bicubic, antialiased), or the clips of a
    video, uint8 (clips, T, 3, H, W), not resized."""
    if is_video(path):
        starts = [Fraction(i, num_clips) for i in range(num_clips)]
        return omnimae.read_clips(path, starts, cfg.num_frames)
    image = to_pil_image(omnimae.read_image(path))
    image = resize(image, cfg.image_size, InterpolationMode.BICUBIC)
    return pil_to_tensor(center_crop(image, cfg.image_size))[None]


def to_views(pixels: Tensor, size: int, num_crops: int) -> Tensor:
    """Cuts normalised views from what `read_pixels` gave: (B, 3, S, S) or (clips x crops, 3, T, S,
    S). A clip's short side is resized, bilinear without antialiasing. The crops are the start, the
    centre and the end of the long side, or the centre only."""
    if pixels.ndim == 4:
        return omnimae.normalize(pixels)
    height, width = pixels.shape[-2:]
    short = min(height, width)
    height, width = height * size // short, width * size // short  # rounded down
    frames = F.interpolate(pixels.flatten(0, 1) / 255, (height, width), mode="bilinear")
    frames = omnimae.normalize(frames)  # (clips T, 3, H, W)
    over = max(height, width) - size
    offsets = (0, math.ceil(over / 2), over) if num_crops == 3 else (math.ceil(over / 2),)
    crops = [frames.narrow(3 if width >= height else 2, offset, size) for offset in offsets]
    views = torch.stack(crops).unflatten(1, pixels.shape[:2])  # (crops, clips, T, 3, S, S)
    return views.permute(1, 0, 3, 2, 4, 5).flatten(0, 1)  # (clips x crops, 3, T, S, S)


def file_loader(listing: omnimae.Listing, kind: str, cfg, num_clips: int, run: train.Run):
    """Loads pixels and labels of this rank's files. Unreadable files are named and skipped. One
    video per batch: its clips are not resized yet and can be large."""

    def read_batch(batch):
        pixels, labels = [], []
        for path, label in batch:
            try:
                pixels.append(read_pixels(path, cfg, num_clips))
                labels.append(label)
            except ValueError as error:
                print(error, file=sys.stderr, flush=True)
        return pixels, labels

    files = list(zip(listing.paths, listing.labels))[run.rank :: run.world]
    batch_size = 64 if kind == "images" else 1
    return train.make_loader(files, run, batch_size=batch_size, collate_fn=read_batch)


# ------------------------------------------------------------------------------------------------
# Accuracy; labels of files; reconstructions


@torch.compiler.set_stance("force_eager")  # these batch sizes are not worth compiling for
@torch.no_grad()
def predict(model: omnimae.Classifier, pixels: Tensor, num_crops: int, autocast) -> Tensor:
    """Images uint8 (B, 3, S, S) -> logits (B, classes). Or one video's clips (clips, T, 3, H, W) ->
    logits (1, classes), averaged over its views."""
    with autocast:
        logits = model(to_views(pixels, model.cfg.image_size, num_crops)).float()
    return logits if pixels.ndim == 4 else logits.mean(0, keepdim=True)


def accuracy(model, loader, num_crops: int, run: train.Run, autocast) -> list[float]:
    """Top-1 and top-5 in %, over all ranks' files, and how many files were unreadable (wrong)."""
    model.eval()
    counts = torch.zeros(3)  # top-1 hits, top-5 hits, readable
    for pixels, labels in loader:
        if pixels:
            logits = predict(model, torch.cat(pixels).to(run.device), num_crops, autocast).cpu()
            hits = logits.topk(min(5, logits.shape[1])).indices == torch.tensor(labels)[:, None]
            counts += torch.tensor([hits[:, 0].sum(), hits.any(1).sum(), len(labels)])
    hits1, hits5, readable, num = run.sum_over_ranks(*counts.tolist(), len(loader.dataset))
    return [100 * hits1 / num, 100 * hits5 / num, int(num - readable)]


def evaluate(model: omnimae.Classifier, args: argparse.Namespace, run: train.Run, autocast) -> None:
    """Prints the accuracy on a data set's validation split."""
    kind = "images" if args.images else "videos"
    root = train.data_root(args.images or args.videos, kind, run)
    listing = list_labelled(root, kind, "val", model.classes)
    if len(listing.classes) != model.head.out_features:
        raise ValueError(f"{args.checkpoint} was finetuned on other classes than those of {root}")
    loader = file_loader(listing, kind, model.cfg, CLIPS, run)
    top1, top5, unreadable = accuracy(model, loader, CROPS, run, autocast)
    run.say(f"{args.checkpoint} on {len(listing.paths):,} {kind} of {root}:")
    run.say(f"top-1 {top1:.2f}%, top-5 {top5:.2f}%; {unreadable} unreadable, counted as wrong")


def class_names(model: omnimae.Classifier, path: str | None) -> list[str]:
    """Names from --labels or the checkpoint; for IN1k torchvision's; otherwise numbers."""
    names = omnimae.read_classes(path) if path else model.classes
    num = model.head.out_features
    if num == 1000 and (not names or names[0] == "n01440764"):
        return ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]  # sorted by wnid
    if names and len(names) != num:
        raise ValueError(f"{path or 'the checkpoint'} names {len(names)} classes, not {num}")
    return names or [f"class {i}" for i in range(num)]


def classify(model: omnimae.Classifier, args: argparse.Namespace, run: train.Run, autocast) -> None:
    """Prints the five best labels of each file."""
    names = class_names(model, args.labels)
    for path in args.files:
        pixels = read_pixels(path, model.cfg, CLIPS).to(run.device)
        best = predict(model, pixels, CROPS, autocast)[0].softmax(0).topk(min(5, len(names)))
        print(path)
        for value, index in zip(best.values.tolist(), best.indices.tolist()):
            print(f"  {value:7.2%}  {names[index]}")


def reconstruct(model: omnimae.OmniMAE, args: argparse.Namespace, run: train.Run, autocast) -> None:
    """Draws original, visible patches and reconstruction of each file."""
    for path in args.files:
        pixels = read_pixels(path, model.cfg, num_clips=1).to(run.device)
        x = to_views(pixels, model.cfg.image_size, num_crops=1)
        N, ratio = model.cfg.masking("videos" if is_video(path) else "images")
        mask = omnimae.random_mask(1, N, args.mask_ratio or ratio, torch.Generator().manual_seed(0))
        with autocast:
            picture = omnimae.draw_reconstruction(model, x[0], mask[0].to(run.device))
        run.out.mkdir(parents=True, exist_ok=True)
        picture.save(run.out / f"{Path(path).name}.png")
        print(run.out / f"{Path(path).name}.png")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    usage = "%(prog)s --checkpoint NAME (--images|--videos DIR | FILE ...) [options]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="released name (vit_b_in1k, ...), URL or path")
    add("--images", help="folder of images, or 'demo'")
    add("--videos", help="folder of videos, or 'demo'")
    add("files", nargs="*", help="images and videos in any mix")
    add("--labels", help="names to print for files: a JSON like SSv2's labels.json")
    add("--mask-ratio", type=float, help="in reconstructions (default: the checkpoint's)")
    add("--out", default="reconstructions", help="folder for pictures (default: reconstructions)")
    args = train.parse_shared(parser, argv, training=False)
    given = [bool(x) for x in (args.images, args.videos, args.files)]
    if sum(given) != 1 or (args.labels and not args.files):
        parser.error("expected one of --images DIR, --videos DIR, files; --labels only with files")
    return args


def main(args: argparse.Namespace) -> None:
    run = train.Run(args)
    model = run.first_rank_first(omnimae.load_checkpoint, args.checkpoint).to(run.device)
    pretrained = isinstance(model, omnimae.OmniMAE)
    if pretrained and (args.labels or not args.files):
        raise ValueError(f"{args.checkpoint} has no classes: finetune it, or give only files")
    if not pretrained and args.mask_ratio:
        raise ValueError(f"{args.checkpoint} has no decoder: --mask-ratio is for reconstructions")
    autocast, _ = train.precision(args, run.device, model.cfg)
    if not args.files:
        evaluate(model, args, run, autocast)
    elif run.rank == 0:
        (reconstruct if pretrained else classify)(model, args, run, autocast)


if __name__ == "__main__":
    train.run_script(main, parse_args)
