"""Evaluate a finetuned model, label files, or look at reconstructions.

    torchrun --nproc_per_node=8 eval.py --checkpoint vit_b_ssv2 --videos /data/ssv2    # accuracy
    python eval.py --checkpoint vit_b_in1k dog.jpg cats/                       # five best labels
    python eval.py --checkpoint vit_b_pretrain dog.jpg clip.mp4                 # reconstructions

As released, an image is one view: the short side resized to 224, the centre cropped. A video is 15
views, 5 clips in time x 3 crops in space, whose logits are averaged.
"""

import argparse
import math
import os
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_pil_image

import omnimae
import train
from omnimae import UserError

CLIPS = 5  # of a video: they begin at 0/5 to 4/5 of the last possible start (released protocol)
CROPS = 3  # of a clip, along its long side (released protocol)
HELD_OUT = 10  # without a val split, every 10th file of a class is held out (this project)

# ------------------------------------------------------------------------------------------------
# Evaluation


def main(args: argparse.Namespace) -> None:
    ranks = train.Ranks(args.device)
    model = ranks.first_then_others(omnimae.load_checkpoint, args.checkpoint).to(ranks.device)
    autocast, _ = train.precision(args.dtype, ranks.device, model.cfg)

    if args.files and ranks.world > 1:
        raise UserError(f"files need one process, not {ranks.world}: run python eval.py")
    is_pretrained = isinstance(model, omnimae.OmniMAE)
    if is_pretrained and (args.labels or not args.files):
        raise UserError(
            f"{args.checkpoint} is a pretraining checkpoint, which only reconstructs files: it has "
            "no labels, and no accuracy"
        )
    if not is_pretrained and args.mask_ratio is not None:
        raise UserError(f"{args.checkpoint} has no decoder: --mask-ratio is for reconstructions")

    if not args.files:
        evaluate(model, args, ranks, autocast)
    elif not is_pretrained:
        classify_files(model, args, ranks.device, autocast)
    else:
        reconstruct_files(model, args, ranks.device, autocast)
    ranks.close()


def evaluate(model: omnimae.Classifier, args, ranks: train.Ranks, autocast) -> None:
    """Prints the accuracy on a data set's validation split, or with --all on all its files."""
    kind = "images" if args.images else "videos"
    root = train.data_root(args.images or args.videos, kind, ranks)
    split = "all" if args.all else "val"
    listing = list_labelled(root, kind, split, model.classes)
    num_classes = model.head.out_features
    if len(listing.classes) != num_classes:
        raise UserError(
            f"{args.checkpoint} has {num_classes} classes without names, and {root} has "
            f"{len(listing.classes)} classes: expected the same, in the same order"
        )
    train.describe(listing, kind, root, ranks)
    if not args.all:
        describe_split(root, kind, len(listing.paths), ranks)
        # Without val/, adding or renaming files changes which ones are held out.
        recipe = omnimae.read_checkpoint(args.checkpoint).get("recipe", {})
        held_out_now = train.fingerprint_of_files(listing.paths, root)
        changed = recipe.get("validation", held_out_now) != held_out_now
        if changed and train.validation_split(root, kind) is None:
            ranks.say("warning: finetuning held out other files, and may have seen some of these")
    is_wnid = [bool(re.fullmatch(r"n\d{8}", name)) for name in listing.classes]
    if num_classes == 1000 and model.classes is None and not all(is_wnid):
        ranks.say("warning: the class folders are not named as ImageNet's (n01440764, ...)")

    loader = file_loader(listing, kind, model.cfg, CLIPS, args, ranks)
    progress = Progress(len(loader.dataset), ranks)
    top1, top5, unreadable = accuracy(model, loader, CROPS, ranks, autocast, progress)
    ranks.say(f"{args.checkpoint} on {len(listing.paths):,} {kind} of {root}:")
    ranks.say(f"top-1 {top1:.2f}%, top-5 {top5:.2f}%; {unreadable} unreadable, counted as wrong")


def accuracy(
    model, loader, num_crops: int, ranks: train.Ranks, autocast, progress=None
) -> tuple[float, float, int]:
    """Top-1 and top-5 in %, over all ranks' files, and how many files were unreadable (wrong)."""
    model.eval()
    hits1 = 0
    hits5 = 0
    readable = 0  # files
    done = 0  # files, also unreadable ones
    for pixels, labels, num_files in loader:
        if pixels is not None:
            logits = predict(model, pixels.to(ranks.device), num_crops, autocast)
            top5 = logits.topk(min(5, logits.shape[1])).indices.cpu()  # (B, 5)
            hits = top5 == torch.tensor(labels)[:, None]
            hits1 += hits[:, 0].sum().item()
            hits5 += hits.any(1).sum().item()
            readable += len(labels)
        done += num_files
        if progress is not None:
            progress.show(done, 100 * hits1 / done)
    hits1, hits5, readable, num = ranks.sum(hits1, hits5, readable, done)
    return 100 * hits1 / num, 100 * hits5 / num, int(num - readable)


@torch.compiler.set_stance("force_eager")  # these batch sizes are not worth compiling for
@torch.no_grad()
def predict(model: omnimae.Classifier, pixels: Tensor, num_crops: int, autocast) -> Tensor:
    """Images uint8 (B, 3, S, S) -> logits (B, classes). Or one video's clips (clips, T, 3, H, W) ->
    logits (1, classes), averaged over its views."""
    with autocast:
        logits = model(to_views(pixels, model.cfg.image_size, num_crops)).float()
    return logits if pixels.ndim == 4 else logits.mean(0, keepdim=True)


class Progress:
    """Prints how far rank 0 is, at every tenth of its files and about every 30 seconds."""

    def __init__(self, num_files: int, ranks: train.Ranks):
        self.num_files = num_files
        self.ranks = ranks
        self.began = time.monotonic()
        self.shown = self.began
        self.shown_tenth = 0

    def show(self, done: int, top1: float) -> None:
        now = time.monotonic()
        tenth = 10 * done // self.num_files
        if done == self.num_files or (tenth == self.shown_tenth and now - self.shown < 30):
            return
        self.shown = now
        self.shown_tenth = tenth
        left = train.time_left((now - self.began) / done * (self.num_files - done))
        rank = "process 0: " if self.ranks.world > 1 else ""
        files = f"{rank}{done:,} of {self.num_files:,} files"
        self.ranks.say(f"{files}, top-1 so far {top1:.2f}%, {left} left")


# ------------------------------------------------------------------------------------------------
# The views of a file


def file_loader(listing: train.Listing, kind: str, cfg, num_clips: int, args, ranks: train.Ranks):
    """Loads pixels and labels of this rank's files, and the number of files tried. Unreadable files
    are named and skipped. One video per batch: its clips are not resized yet and can be large."""

    def read_batch(batch: list) -> tuple[Tensor | None, list, int]:
        parts = []
        labels = []
        for path, label in batch:
            try:
                parts.append(read_pixels(path, cfg, num_clips))
                labels.append(label)
            except UserError as error:
                print(error, file=sys.stderr, flush=True)
        if not parts:
            return None, [], len(batch)

        pixels = torch.cat(parts)
        if get_worker_info():
            # PyTorch would do this later, in a thread whose errors are lost: without room in
            # /dev/shm, the main process would hang.
            pixels.share_memory_()
        return pixels, labels, len(batch)

    files = list(zip(listing.paths, listing.labels))[ranks.rank :: ranks.world]
    num = 64 if kind == "images" else 1  # files in a batch
    batches = [range(i, min(i + num, len(files))) for i in range(0, len(files), num)]
    return train.make_loader(files, args, ranks, batches, read_ahead=1, collate_fn=read_batch)


def is_video(path: str) -> bool:
    return path.lower().endswith(train.SUFFIXES["videos"])


def read_pixels(path: str, cfg: omnimae.OmniMAEConfig, num_clips: int) -> Tensor:
    """Reads an image, uint8 (1, 3, S, S), resized by PIL (bicubic, antialiased), or the clips of a
    video, uint8 (clips, T, 3, H, W), not resized. A single clip is that at the video's start."""
    if is_video(path):
        starts = [Fraction(i, num_clips) for i in range(num_clips)]
        return omnimae.read_clips(path, starts, cfg.num_frames, cfg.clip_seconds)
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
    height = height * size // short  # rounded down
    width = width * size // short
    frames = []
    for clip in pixels:  # one at a time: as floats, large films take gigabytes
        resized = F.interpolate(clip / 255, (height, width), mode="bilinear")  # (T, 3, H, W)
        frames.append(omnimae.normalize(resized))
    frames = torch.cat(frames)  # (clips T, 3, H, W)

    excess = max(height, width) - size
    centre = math.ceil(excess / 2)
    offsets = (0, centre, excess) if num_crops == 3 else (centre,)
    long_side = 3 if width >= height else 2
    crops = [frames.narrow(long_side, offset, size) for offset in offsets]
    views = torch.stack(crops).unflatten(1, pixels.shape[:2])  # (crops, clips, T, 3, S, S)
    return views.permute(1, 0, 3, 2, 4, 5).flatten(0, 1)  # (clips x crops, 3, T, S, S)


# ------------------------------------------------------------------------------------------------
# Labels and pictures of single files


def classify_files(model: omnimae.Classifier, args, device, autocast) -> None:
    """Prints the five best labels of each file."""
    names = class_names(model, args.labels)
    for path, pixels in read_files(files_of(args.files), model.cfg, CLIPS):
        probabilities = predict(model, pixels.to(device), CROPS, autocast)[0].softmax(0)
        best = probabilities.topk(min(5, len(names)))
        print(path)
        for value, index in zip(best.values.tolist(), best.indices.tolist()):
            print(f"  {value:7.2%}  {names[index]}")


def reconstruct_files(model: omnimae.OmniMAE, args, device, autocast) -> None:
    """Draws original, visible patches and reconstruction of each file, as a PNG under --out. The
    pictures keep the folders of their files, so that two files with the same name do not clash."""
    paths = files_of(args.files)
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    for path, pixels in read_files(paths, model.cfg, num_clips=1):
        x = to_views(pixels.to(device), model.cfg.image_size, num_crops=1)
        N, ratio = model.cfg.masking("videos" if is_video(path) else "images")
        if args.mask_ratio is not None:
            ratio = args.mask_ratio
        mask = omnimae.random_mask(1, N, ratio, torch.Generator().manual_seed(0))
        with autocast:
            picture = omnimae.draw_reconstruction(model, x[0], mask[0].to(device))
        target = Path(args.out) / (os.path.relpath(os.path.abspath(path), common) + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
        print(target)


def read_files(paths: list[str], cfg, num_clips: int):
    """Yields the path and the pixels of each file. Names unreadable files, and raises a UserError
    for them after all others."""
    num_unreadable = 0
    for path in paths:
        try:
            pixels = read_pixels(path, cfg, num_clips)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            num_unreadable += 1
            continue
        yield path, pixels
    if num_unreadable:
        raise UserError(f"{num_unreadable} of {len(paths)} files could not be read, see above")


def files_of(names: list[str]) -> list[str]:
    """Files, and for folders the images and videos in them, recursively."""
    suffixes = train.SUFFIXES["images"] + train.SUFFIXES["videos"]
    paths = []
    for name in names:
        if not os.path.isdir(name):
            paths.append(name)
            continue
        found = []
        for folder, folders, files in os.walk(name):
            folders[:] = sorted(x for x in folders if not x.startswith("."))
            for file in sorted(files):
                if file.lower().endswith(suffixes) and not file.startswith("."):
                    found.append(os.path.join(folder, file))
        if not found:
            raise UserError(f"{name}: no images or videos in this folder")
        paths += found
    return paths


def class_names(model: omnimae.Classifier, path: str | None) -> list[str]:
    """Names from --labels or the checkpoint; for IN1k torchvision's; otherwise numbers."""
    names = train.read_classes(path) if path else model.classes
    num = model.head.out_features
    if num == 1000 and (not names or names[0] == "n01440764"):
        return ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]  # sorted by wnid
    if names and len(names) != num:
        raise UserError(f"{path or 'the checkpoint'} names {len(names)} classes, not {num}")
    return names or [f"class {i}" for i in range(num)]


# ------------------------------------------------------------------------------------------------
# Labelled files, and which of them are held out


def list_labelled(root: str, kind: str, split: str, classes: list | None = None) -> train.Listing:
    """Lists the "train" or "val" split, or "all" files of a data set that has no splits.

    Labels index `classes`, by default the data set's own. Without a val split, every 10th file of a
    class is held out, but never its only file. UserError for files without labels, for a class that
    is not among `classes`, and, if these are the data set's own, for fewer than two.
    """
    has_split = train.validation_split(root, kind) is not None
    if has_split and split == "all":
        raise UserError(f"{root} has a validation split, which is evaluated without --all")
    paths, labels, names = train.list_media(root, kind, split if has_split else "train")
    if labels is None:
        folder = os.path.dirname(paths[0])
        raise UserError(f"{folder}: {kind} without labels; expected <class>/<file> in it")

    if not has_split and split != "all":
        num_files = Counter(labels)  # of each class
        num_seen = Counter()
        chosen = []
        for path, label in zip(paths, labels):
            is_held_out = num_seen[label] % HELD_OUT == 0 and num_files[label] > 1
            num_seen[label] += 1
            if is_held_out == (split == "val"):
                chosen.append((path, label))
        paths = [path for path, _ in chosen]
        labels = [label for _, label in chosen]
    if not paths:
        raise UserError(f"{root}: no {kind} to hold out: each class has one file only")

    if classes is None:
        classes = names
        if len(set(labels)) < 2:
            raise UserError(f"{root}: {split} has only one class; expected 2 or more")
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise UserError(
            f"{root}: {split} has classes that the model does not know: {', '.join(unknown[:5])}"
        )
    return train.Listing(paths, [index[names[label]] for label in labels], classes)


def describe_split(root: str, kind: str, num_held_out: int, ranks: train.Ranks) -> None:
    """Says which files are held out, and how many."""
    name = train.validation_split(root, kind)
    if name is not None:
        ranks.say(f"validation files: all {num_held_out:,} of the split '{name}'")
    else:
        num = len(train.list_media(root, kind).paths)
        every = f"every {HELD_OUT}th file of a class (no val/)"
        ranks.say(f"validation files: {every}: {num_held_out:,} of {num:,}")


# ------------------------------------------------------------------------------------------------
# Options


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Evaluation's options."""
    usage = "%(prog)s --checkpoint NAME (--images|--videos DIR | FILE ...) [options]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=train.non_empty, required=True, help="released name, URL or path")
    add("--images", type=train.non_empty, help="folder of labelled images, or 'demo'")
    add("--videos", type=train.non_empty, help="folder of labelled videos, or 'demo'")
    add("--all", action="store_true", help="all files of a folder without val/, not every 10th")
    add("files", nargs="*", help="images, videos and folders of them, in any mix")
    add("--labels", type=train.non_empty, help="class names, as SSv2's labels.json")
    add("--mask-ratio", type=train.fraction, help="hidden part (default: the checkpoint's)")
    add("--out", default="reconstructions", help="folder for pictures (default: %(default)s)")
    train.add_shared_options(parser)
    args = parser.parse_args(argv)
    given = [bool(x) for x in (args.images, args.videos, args.files)]
    if sum(given) != 1:
        parser.error("expected one of --images DIR, --videos DIR, or files")
    if args.labels and not args.files:
        parser.error("--labels is for files")
    if args.all and args.files:
        parser.error("--all is for --images and --videos")
    return args


if __name__ == "__main__":
    train.run_script(main, parse_args)
