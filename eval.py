"""Evaluate a finetuned model, label files, or look at reconstructions.

    torchrun --nproc_per_node=8 eval.py --checkpoint vit_b_in1k --images IN1K     top-1 and top-5
    torchrun --nproc_per_node=8 eval.py --checkpoint vit_b_ssv2 --videos SSV2
    python eval.py --checkpoint vit_b_in1k dog.jpg cat.jpg                        five best labels
    python eval.py --checkpoint vit_b_pretrain dog.jpg clip.mp4                   reconstructions

The protocols are the released ones. An image is one view: the short side resized to 224, the centre
cropped. A video is 15 views, 5 clips in time x 3 crops in space, whose logits are averaged.
"""

import argparse
import csv
import math
import os
import re
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_pil_image

import engine
import omnimae

PUBLISHED = {  # top-1 of the released checkpoints, % (github.com/facebookresearch/omnivore)
    "vit_b_in1k": 83.0, "vit_l_in1k": 85.1, "vit_h_in1k": 86.5,
    "vit_b_ssv2": 69.5, "vit_l_ssv2": 74.2, "vit_h_ssv2": 75.3,
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Data: labelled files, and the views of a file


def list_labelled(
    root: str, kind: str, split: str, classes: list[str] | None = None
) -> omnimae.Listing:
    """The "train" or "val" part of a data set; its classes must be `classes`, where given.

    A data set without a validation part lends every tenth file of each class to be it.
    """
    own = omnimae.has_validation(root, kind)
    paths, labels, names = omnimae.list_media(root, kind, split if own else "train")
    if labels is None:
        raise ValueError(f"{root}: its {split} {kind} have no labels: expected <class>/<file>")
    if not own:
        place = np.arange(len(labels)) - np.searchsorted(labels, labels)  # in its class
        chosen = np.flatnonzero((place % 10 == 0) == (split == "val"))
        paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
        if alone := set(range(len(names))) - set(labels):
            raise ValueError(
                f"{root} has no validation part and lends every tenth file, but class "
                f"{names[min(alone)]!r} has one file in all: expected at least two"
            )
    classes = classes or names
    missing, unknown = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
    if missing or unknown:
        raise ValueError(
            f"{root}: its {split} part lacks {missing[:3] or 'none'} of the {len(classes)} classes "
            f"trained on, and has {unknown[:3] or 'none'} besides: expected the same classes "
            "(in evaluation: or a checkpoint that was finetuned on this data set)"
        )
    number = [classes.index(name) for name in names]
    return omnimae.Listing(paths, [number[label] for label in labels], classes)


def read_pixels(path: str, kind: str, cfg: omnimae.OmniMAEConfig, num_clips: int) -> torch.Tensor:
    """uint8. An image (3, S, S): the short side resized to S by PIL, bicubic with antialiasing,
    and the centre cropped. A video (clips, T, 3, H, W): clips of 2.7 s, that start at 0, 1 / n,
    ..., (n - 1) / n of the last possible start."""
    if kind == "images":
        image = to_pil_image(omnimae.read_image(path))
        image = resize(image, cfg.image_size, InterpolationMode.BICUBIC)
        return pil_to_tensor(center_crop(image, cfg.image_size))
    with omnimae.Video(path) as video:
        last = max(video.duration - omnimae.CLIP_SECONDS, 0)
        starts = [i * last / num_clips for i in range(num_clips)]
        clips = [video.clip(at, omnimae.CLIP_SECONDS, cfg.num_frames) for at in starts]
        return torch.stack(clips)


def crop_views(pixels: torch.Tensor, size: int, num_crops: int) -> torch.Tensor:
    """What `read_pixels` gives, on the device -> normalised, (1, 3, S, S) or (views, 3, T, S, S).

    A clip's short side is resized, bilinear without antialiasing; of the long one come the start,
    the centre and the end, or the centre alone.
    """
    if pixels.ndim == 3:
        return omnimae.normalize(pixels[None])
    height, width = pixels.shape[-2:]
    short = min(height, width)
    height, width = height * size // short, width * size // short  # rounded down
    frames = F.interpolate(pixels.flatten(0, 1) / 255, (height, width), mode="bilinear")
    frames = omnimae.normalize(frames)  # (clips T, 3, H, W)
    over = max(height, width) - size
    centre = math.ceil(over / 2)
    offsets = (0, centre, over) if num_crops == 3 else (centre,)
    crops = [frames.narrow(3 if width >= height else 2, at, size) for at in offsets]
    views = torch.stack(crops).unflatten(1, pixels.shape[:2])  # (crops, clips, T, 3, S, S)
    return views.permute(1, 0, 3, 2, 4, 5).flatten(0, 1)  # (views, 3, T, S, S)


class Files(Dataset):
    """Of each file its index, its pixels, and, where it cannot be read, why."""

    def __init__(self, paths: list[str], *how):
        self.paths, self.how = np.array([os.fsencode(path) for path in paths]), how

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str | None]:
        try:
            return index, read_pixels(os.fsdecode(self.paths[index]), *self.how), None
        except ValueError as error:
            return index, None, str(error)


def file_loader(
    kind: str, listing: omnimae.Listing, cfg, num_clips: int, run: engine.Run
) -> DataLoader:
    """A loader of this rank's share of the files: one at a time, because a clip in its own size can be
    large."""
    files = Files(listing.paths, kind, cfg, num_clips)
    mine = [[i] for i in range(run.rank, len(listing.paths), run.world)]
    loader = engine.make_loader(files, mine, run.workers, run.device, itemgetter(0))
    engine.start_workers(loader)  # they stay, for every time that it is gone through
    return loader


# ------------------------------------------------------------------------------------------------
# Accuracy


@torch.compiler.set_stance("force_eager")  # its batch sizes are not worth compiling for
@torch.no_grad()
def accuracy(
    model: omnimae.Classifier,
    labels: list[int],
    loader: DataLoader,
    run: engine.Run,
    num_crops: int = 1,
    micro_batch: int = 64,
) -> tuple[float, float, int, torch.Tensor, torch.Tensor]:
    """Top-1 and top-5 in %; how many files could not be read, which count as wrong; the five best
    classes of each file, or as many as there are, and their probabilities, (files, 5), on all ranks.
    The loader is a `file_loader`. Logits of a video's views are averaged. `micro_batch` views at most
    go through the model at once, or those of one file.
    """
    best = torch.zeros(len(labels), min(5, model.head.out_features), dtype=torch.int64)
    probability = torch.zeros(best.shape)
    index, x = [], []
    model.eval()
    for i, pixels, error in loader:
        if error:
            run.name([error])
        else:
            index.append(i)
            x.append(crop_views(pixels.to(run.device), model.cfg.image_size, num_crops))
        full = index and len(x[0]) * (len(x) + 1) > micro_batch  # one more file would be too many
        last = i == loader.batch_sampler[-1][0]  # of this rank's, readable or not
        if index and (full or last):
            with run.autocast:
                logits = model(torch.cat(x)).float()  # (files views, classes)
            logits = logits.unflatten(0, (len(index), -1)).mean(1)  # (files, classes)
            values, order = logits.softmax(1).topk(best.shape[1])
            best[index], probability[index] = order.cpu(), values.cpu()
            index, x = [], []
    if run.world > 1:
        dist.all_reduce(best)  # the other ranks' rows are zeros
        dist.all_reduce(probability)
    readable = probability[:, :1] != 0  # (files, 1)
    right = (best == torch.tensor(labels)[:, None]) & readable  # (files, 5)
    top1, top5 = (100 * hit.double().mean().item() for hit in (right[:, 0], right.any(1)))
    return top1, top5, int((~readable).sum()), best, probability


def evaluate(model: omnimae.Classifier, args: argparse.Namespace, run: engine.Run) -> None:
    """Print the accuracy on a data set's validation part."""
    kind = "images" if args.images else "videos"
    root = getattr(args, kind)
    root = engine.demo_data(kind, run) if root == "demo" else root
    listing = list_labelled(root, kind, "val", model.classes)
    if len(listing.classes) != model.head.out_features:
        raise ValueError(
            f"{args.checkpoint} has {model.head.out_features} classes, {root} has "
            f"{len(listing.classes)}: expected a checkpoint finetuned with --{kind} {root}"
        )
    num_clips, num_crops = args.views if kind == "videos" else (1, 1)
    loader = file_loader(kind, listing, model.cfg, num_clips, run)
    top1, top5, unreadable, best, probability = accuracy(
        model, listing.labels, loader, run, num_crops, args.micro_batch
    )
    published, num_views = PUBLISHED.get(args.checkpoint), num_clips * num_crops
    each = "1 view of each" if num_views == 1 else f"{num_views} views of each"
    if not omnimae.has_validation(root, kind):
        each += "; every tenth file, as it has no validation part"
    run.print(
        f"{args.checkpoint} on {root}: {len(listing.paths):,} {kind}, {each}\n"
        f"top-1 {top1:.2f} %{f' (published: {published} %)' if published else ''}\n"
        f"top-5 {top5:.2f} %{f', {unreadable} unreadable counted as wrong' if unreadable else ''}"
    )
    if args.predictions and run.rank == 0:
        with open(args.predictions, "w", newline="", errors="surrogateescape") as file:
            writer, ranks = csv.writer(file), range(1, best.shape[1] + 1)
            heads = [f"{what}_{i}" for what in ("best", "probability") for i in ranks]
            writer.writerow(["path", "label", *heads])
            rows = zip(listing.paths, listing.labels, best.tolist(), probability.tolist())
            for path, label, order, values in rows:
                names = [listing.classes[i] if values[0] else "unreadable" for i in order]
                writer.writerow([path, listing.classes[label], *names, *values])


# ------------------------------------------------------------------------------------------------
# Single files: labels, or reconstructions


def kind_of(path: str) -> str:
    return "videos" if path.lower().endswith(omnimae.SUFFIXES["videos"]) else "images"


def class_names(model: omnimae.Classifier, path: str | None) -> list[str]:
    """From a labels.json, from torchvision for IN1k, from the checkpoint; else indices."""
    num = model.head.out_features
    if path:
        names = omnimae.read_classes(path)
        if len(names) != num:
            raise ValueError(
                f"{path} has {len(names)} classes, the checkpoint has {num}: expected the labels "
                "of the data set that it was finetuned on"
            )
        return names
    if num == 1000 and (model.classes is None or model.classes[0] == "n01440764"):
        return ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]  # in the order of the wnids
    return model.classes or [f"class {i}" for i in range(num)]


@torch.no_grad()
def predict(model: omnimae.Classifier, args: argparse.Namespace, run: engine.Run) -> None:
    """Print the five best labels of each file."""
    names = class_names(model, args.labels)
    for path in args.files:
        pixels = read_pixels(path, kind_of(path), model.cfg, args.views[0]).to(run.device)
        with run.autocast:
            logits = model(crop_views(pixels, model.cfg.image_size, args.views[1]))
        values, order = logits.float().mean(0).softmax(0).topk(min(5, len(names)))
        print(path)
        for value, index in zip(values.tolist(), order.tolist()):
            print(f"  {value:7.2%}  {names[index]}")


@torch.no_grad()
def reconstruct(model: omnimae.OmniMAE, args: argparse.Namespace, run: engine.Run) -> None:
    """Draw of each file the original, what the encoder sees, and the reconstruction."""
    cfg, out, names = model.cfg, Path(args.out or "reconstructions"), set()
    for number, path in enumerate(args.files):
        kind = kind_of(path)
        x = crop_views(read_pixels(path, kind, cfg, 1).to(run.device), cfg.image_size, 1)
        grid, ratio = cfg.masking(kind)
        generator = torch.Generator().manual_seed(args.seed)
        ratio = ratio if args.mask_ratio is None else args.mask_ratio
        mask = omnimae.random_mask(1, grid, ratio, generator=generator)
        with run.autocast:
            picture = omnimae.draw_reconstruction(model, x[0], mask[0].to(run.device))
        out.mkdir(parents=True, exist_ok=True)
        name = out / f"{Path(path).name}.png"
        while name in names:  # of a file in another folder
            name = out / f"{number}_{name.name}"
        names.add(name)
        picture.save(name)
        print(name)
        if kind == "videos":  # a frame's three panels are a column of the picture, borders 2 wide
            wide, pixels = cfg.image_size + 2, np.asarray(picture)
            frames = [pixels[:, t * wide : (t + 1) * wide + 2] for t in range(cfg.num_frames)]
            rate = round(cfg.num_frames / omnimae.CLIP_SECONDS)
            omnimae.write_clip(name.with_suffix(".mp4"), np.stack(frames), rate)
            print(name.with_suffix(".mp4"))


def clips_x_crops(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d?x[13]", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected CLIPSxCROPS, 1 to 99 clips, 1 or 3 crops, as 5x3"
        )
    num_clips, num_crops = map(int, text.split("x"))
    return num_clips, num_crops


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options: a data set or files, and what fits the kind of checkpoint."""
    parser = engine.option_parser(
        "The accuracy of a finetuned checkpoint on a data set's validation part; or its five best "
        "labels of files; or a pretraining checkpoint's reconstructions of files, as pictures.",
        "%(prog)s --checkpoint NAME (--images DIR | --videos DIR | FILE [FILE ...]) ...",
    )
    # fmt: off
    add = engine.option_group(parser, "model and data (a data set or files)")
    add("--checkpoint", f"path, URL, or one of {', '.join(omnimae.CHECKPOINTS)}", required=True, metavar="NAME")
    add("--images", "folder of images, or 'demo'", metavar="DIR")
    add("--videos", "folder of videos, or 'demo'", metavar="DIR")
    add("files", "images and videos in any mix", nargs="*", metavar="FILE")
    add = engine.option_group(parser, "accuracy and labels")
    add("--views", "of a video: clips x crops, 1 or 3 crops (default: 5x3)", type=clips_x_crops, metavar="CLIPSxCROPS")
    add("--predictions", "write each file's label and five best to this .csv", metavar="FILE")
    add("--labels", "class names, as SSv2's labels.json (default: IN1k's or the checkpoint's)", metavar="FILE")
    add = engine.option_group(parser, "reconstructions")
    add("--mask-ratio", "share masked (default: the checkpoint's)", type=engine.share)
    add("--seed", "of the mask (default: 0)", type=engine.whole)
    add("--out", "folder for the pictures (default: reconstructions)", metavar="DIR")
    add = engine.option_group(parser, "machine")
    engine.device_options(add)
    add("--micro-batch", "views at once on a device, at least one file's", type=engine.positive, default=64)
    # fmt: on
    args = parser.parse_args(argv)
    if bool(args.images) + bool(args.videos) + bool(args.files) != 1:
        parser.error("expected one of these: --images DIR, --videos DIR, files")
    if folders := [path for path in args.files if Path(path).is_dir()]:
        parser.error(f"{folders[0]} is a folder: expected files, or --images or --videos before it")
    if args.views and args.images:
        parser.error("--views is for videos: an image is one view")
    if args.predictions and args.files:
        parser.error("--predictions is for a data set: expected --images DIR or --videos DIR")
    if args.predictions:
        table = Path(args.predictions)
        if table.is_dir():
            parser.error(f"--predictions {table} is a folder: expected a file")
        if not os.access(table if table.exists() else table.parent, os.W_OK):
            parser.error(
                f"--predictions {table} cannot be written: no such folder, or not permitted"
            )
    if args.out and Path(args.out).is_file():
        parser.error(f"--out {args.out} is a file: expected a folder")
    if args.labels and not args.files:
        parser.error("--labels is for files: a data set has labels of its own")
    return args


def main(args: argparse.Namespace) -> None:
    model = omnimae.load_checkpoint(args.checkpoint)
    args.model, args.save_minutes = engine.size_name(model.cfg), math.inf  # what a Run asks for
    pretrained = isinstance(model, omnimae.OmniMAE)
    if pretrained and not args.files:
        raise ValueError(
            f"{args.checkpoint} is a pretraining checkpoint, which has no classes: expected a "
            "finetuned one, such as vit_b_in1k, vit_b_ssv2 or what finetune.py makes of this one"
        )
    for option in ("views", "labels") if pretrained else ("mask_ratio", "seed", "out"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"{args.checkpoint} is a {'pretraining' if pretrained else 'finetuned'} checkpoint, "
                f"which makes {'no labels' if pretrained else 'no reconstructions'}: expected one "
                f"that does, or no --{option.replace('_', '-')}"
            )
    args.views, args.seed = args.views or (5, 3), args.seed or 0
    run = engine.Run(args)
    model.to(run.device)
    if not args.files:
        evaluate(model, args, run)
    elif run.rank == 0:
        (reconstruct if pretrained else predict)(model, args, run)


if __name__ == "__main__":
    engine.run_script(main, parse_args)
