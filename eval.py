"""Evaluate a finetuned model, label files, or look at reconstructions.

    torchrun --nproc_per_node=8 eval.py --checkpoint vit_b_in1k --images IN1K     top-1 and top-5
    torchrun --nproc_per_node=8 eval.py --checkpoint vit_b_ssv2 --videos SSV2
    python eval.py --checkpoint vit_b_in1k dog.jpg cat.jpg                        five best labels
    python eval.py --checkpoint vit_b_pretrain dog.jpg clip.mp4                   reconstructions

The protocols are the released ones. An image is one view: the short side resized to 224, the centre
cropped. A video is 15 views, 5 clips in time x 3 crops in space, whose logits are averaged.
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
from torch.utils.data import DataLoader, Dataset
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_pil_image

import omnimae
import train

CLIPS, CROPS = 5, 3  # views of a video
PUBLISHED = {  # top-1 of the released checkpoints in %, as their authors give it
    "vit_b_in1k": 83.0, "vit_l_in1k": 85.1, "vit_h_in1k": 86.5,
    "vit_b_ssv2": 69.5, "vit_l_ssv2": 74.2, "vit_h_ssv2": 75.3,
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Data: labelled files, and the views of a file


def list_labelled(root: str, kind: str, split: str, classes=None) -> omnimae.Listing:
    """The "train" or "val" split, with labels that count in `classes` (default: the data set's own).

    Without a val split, every 10th file of a class is held out. ValueError for other classes.
    """
    has_val = omnimae.has_validation(root, kind)
    paths, labels, names = omnimae.list_media(root, kind, split if has_val else "train")
    if labels is None:
        raise ValueError(f"{root}: {kind} without labels; expected <class>/<file>")
    if not has_val:
        place = np.arange(len(labels)) - np.searchsorted(labels, labels)  # in its class
        chosen = np.flatnonzero((place % 10 == 0) == (split == "val")).tolist()
        paths, labels = [paths[i] for i in chosen], [labels[i] for i in chosen]
    classes = classes or names
    if set(names) != set(classes) or len(set(labels)) < 2:
        raise ValueError(
            f"{root}: expected at least two classes, each with {split} files, and the same as those "
            f"trained on; got {len(set(labels))} for {len(classes)}"
        )
    index = [classes.index(name) for name in names]
    return omnimae.Listing(paths, [index[label] for label in labels], classes)


def read_pixels(path: str, cfg: omnimae.OmniMAEConfig, kind: str, num_clips: int) -> Tensor:
    """An image, uint8 (3, S, S), resized by PIL: bicubic with antialiasing. Or a video's clips,
    uint8 (clips, T, 3, H, W), in their own size."""
    if kind == "images":
        image = to_pil_image(omnimae.read_image(path))
        image = resize(image, cfg.image_size, InterpolationMode.BICUBIC)
        return pil_to_tensor(center_crop(image, cfg.image_size))
    starts = [Fraction(i, num_clips) for i in range(num_clips)]
    return omnimae.read_clips(path, starts, cfg.num_frames)


def crop_clips(clips: Tensor, size: int, num_crops: int) -> Tensor:
    """uint8 (clips, T, 3, H, W) -> normalised views (clips x crops, 3, T, S, S).

    The short side is resized, bilinear without antialiasing. The crops are the start, the centre and
    the end of the long side, or the centre only.
    """
    height, width = clips.shape[-2:]
    short = min(height, width)
    height, width = height * size // short, width * size // short  # rounded down
    frames = F.interpolate(clips.flatten(0, 1) / 255, (height, width), mode="bilinear")
    frames = omnimae.normalize(frames)  # (clips T, 3, H, W)
    over = max(height, width) - size
    centre = math.ceil(over / 2)
    offsets = (0, centre, over) if num_crops == 3 else (centre,)
    crops = [frames.narrow(3 if width >= height else 2, offset, size) for offset in offsets]
    views = torch.stack(crops).unflatten(1, clips.shape[:2])  # (crops, clips, T, 3, S, S)
    return views.permute(1, 0, 3, 2, 4, 5).flatten(0, 1)  # (clips x crops, 3, T, S, S)


class Files(Dataset):
    """Pixels and label of each file. A file that cannot be read is named; it is black, label -1."""

    def __init__(self, listing: omnimae.Listing, cfg: omnimae.OmniMAEConfig, kind: str, clips: int):
        self.listing, self.cfg, self.kind, self.clips = listing, cfg, kind, clips

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            pixels = read_pixels(self.listing.paths[index], self.cfg, self.kind, self.clips)
            return pixels, self.listing.labels[index]
        except ValueError as error:
            print(error, file=sys.stderr, flush=True)
            size, T = self.cfg.image_size, self.cfg.num_frames
            shape = (3, size, size) if self.kind == "images" else (self.clips, T, 3, size, size)
            return torch.zeros(shape, dtype=torch.uint8), -1


def file_loader(listing, cfg, kind: str, num_clips: int, run: train.Run) -> DataLoader:
    """This rank's share of the files. A clip in its own size can be large: one video a batch."""
    share = slice(run.rank, None, run.world)  # a DistributedSampler would count some files twice
    files = omnimae.Listing(listing.paths[share], listing.labels[share], listing.classes)
    dataset = Files(files, cfg, kind, num_clips)
    return train.make_loader(dataset, run, batch_size=64 if kind == "images" else 1)


# ------------------------------------------------------------------------------------------------
# Accuracy


@torch.compiler.set_stance("force_eager")  # these batch sizes are not worth compiling for
@torch.no_grad()
def predict(model: omnimae.Classifier, pixels: Tensor, num_crops: int, autocast) -> Tensor:
    """Images uint8 (B, 3, S, S), or one video's clips (1, clips, T, 3, H, W) -> logits (B, classes),
    which are averaged over a video's views."""
    is_image = pixels.ndim == 4
    size = model.cfg.image_size
    views = omnimae.normalize(pixels) if is_image else crop_clips(pixels[0], size, num_crops)
    with autocast:
        logits = model(views).float()
    return logits if is_image else logits.mean(0, keepdim=True)


def accuracy(model, loader: DataLoader, num_crops: int, run: train.Run, autocast) -> list[float]:
    """Top-1 and top-5 in % over all ranks' files, and how many could not be read: they are wrong."""
    model.eval()
    counts = torch.zeros(4)  # right, right among five, unreadable, files
    for pixels, labels in loader:
        logits = predict(model, pixels.to(run.device), num_crops, autocast).cpu()
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        counts += torch.tensor([
            right[:, 0].sum(), right.any(1).sum(), (labels < 0).sum(), len(labels)
        ])  # fmt: skip
    top1, top5, unreadable, num = run.sum_over_ranks(*counts.tolist())
    return [100 * top1 / num, 100 * top5 / num, int(unreadable)]


def evaluate(model: omnimae.Classifier, args: argparse.Namespace, run: train.Run, autocast) -> None:
    """Prints the accuracy on a data set's validation split."""
    kind = "images" if args.images else "videos"
    root = train.data_root(args.images or args.videos, kind, run)
    listing = list_labelled(root, kind, "val", model.classes)
    if len(listing.classes) != model.head.out_features:
        raise ValueError(
            f"{args.checkpoint} has {model.head.out_features} classes, {root} "
            f"{len(listing.classes)}: expected a checkpoint that was finetuned on this data set"
        )
    loader = file_loader(listing, model.cfg, kind, CLIPS, run)
    top1, top5, unreadable = accuracy(model, loader, CROPS, run, autocast)
    published = PUBLISHED.get(args.checkpoint)
    views = "1 view" if kind == "images" else f"{CLIPS} x {CROPS} views"
    run.say(
        f"{args.checkpoint} on {len(listing.paths):,} {kind} of {root}, {views} each"
        f"{f', {unreadable} of them unreadable (counted as wrong)' if unreadable else ''}\n"
        f"top-1 {top1:.2f} %{f' (published: {published} %)' if published else ''}\n"
        f"top-5 {top5:.2f} %"
    )


# ------------------------------------------------------------------------------------------------
# Single files: labels, or reconstructions


def kind_of(path: str) -> str:
    return "videos" if path.lower().endswith(omnimae.SUFFIXES["videos"]) else "images"


def class_names(model: omnimae.Classifier, path: str | None) -> list[str]:
    """From a labels.json, from the checkpoint, from torchvision for IN1k; else numbers."""
    num = model.head.out_features
    names = omnimae.read_classes(path) if path else model.classes
    if names is None and num == 1000 or names and names[0] == "n01440764":
        names = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]  # in the order of the wnids
    names = names or [f"class {i}" for i in range(num)]
    if len(names) != num:
        raise ValueError(
            f"{path} has {len(names)} classes, the checkpoint {num}: expected the same"
        )
    return names


def label(model: omnimae.Classifier, args: argparse.Namespace, run: train.Run, autocast) -> None:
    """Prints the five best labels of each file."""
    names = class_names(model, args.labels)
    for path in args.files:
        pixels = read_pixels(path, model.cfg, kind_of(path), CLIPS)[None].to(run.device)
        probabilities = predict(model, pixels, CROPS, autocast)[0].softmax(0)
        values, indices = probabilities.topk(min(5, len(names)))
        print(path)
        for value, index in zip(values.tolist(), indices.tolist()):
            print(f"  {value:7.2%}  {names[index]}")


def reconstruct(model: omnimae.OmniMAE, args: argparse.Namespace, run: train.Run, autocast) -> None:
    """Draws original, visible patches and reconstruction of each file."""
    for path in args.files:
        kind, size = kind_of(path), model.cfg.image_size
        pixels = read_pixels(path, model.cfg, kind, 1).to(run.device)
        x = omnimae.normalize(pixels[None]) if kind == "images" else crop_clips(pixels, size, 1)
        num, ratio = model.cfg.masking(kind)
        generator = torch.Generator().manual_seed(0)
        mask = omnimae.random_mask(1, num, args.mask_ratio or ratio, generator)
        with autocast:
            picture = omnimae.draw_reconstruction(model, x[0], mask[0].to(run.device))
        run.out.mkdir(parents=True, exist_ok=True)
        picture.save(run.out / f"{Path(path).name}.png")
        print(run.out / f"{Path(path).name}.png")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --checkpoint NAME (--images DIR | --videos DIR | FILE ...) [options]",
        description="The accuracy of a finetuned checkpoint on a data set's validation split, or its "
        "five best labels of files; or a pretraining checkpoint's reconstructions of files.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="released name (vit_b_in1k, ...), URL or path")
    add("--images", help="folder of images, or 'demo'")
    add("--videos", help="folder of videos, or 'demo'")
    add("files", nargs="*", help="images and videos in any mix")
    add("--labels", help="class names for files, as SSv2's labels.json")
    add("--mask-ratio", type=float, help="of reconstructions (default: the checkpoint's)")
    add("--out", default="reconstructions", help="folder for pictures (default: reconstructions)")
    train.add_machine_options(parser, training=False)
    args = train.parse(parser, argv)
    if bool(args.images) + bool(args.videos) + bool(args.files) != 1:
        parser.error("expected one of --images DIR, --videos DIR, or files")
    if folders := [path for path in args.files if Path(path).is_dir()]:
        parser.error(f"{folders[0]} is a folder: expected files, or --images or --videos before it")
    return args


def main(args: argparse.Namespace) -> None:
    run = train.Run(args)
    with run.first_rank_first():
        model = omnimae.load_checkpoint(args.checkpoint).to(run.device)
    pretrained = isinstance(model, omnimae.OmniMAE)
    if pretrained and (args.labels or not args.files):
        raise ValueError(
            f"{args.checkpoint} is a pretraining checkpoint, which has no classes: expected a "
            "finetuned one, or files to reconstruct"
        )
    if not pretrained and args.mask_ratio:
        raise ValueError(
            f"{args.checkpoint} is a finetuned checkpoint: --mask-ratio has no meaning"
        )
    autocast, _ = train.precision(args, run.device, model.cfg)
    if not args.files:
        evaluate(model, args, run, autocast)
    elif run.rank == 0:
        (reconstruct if pretrained else label)(model, args, run, autocast)


if __name__ == "__main__":
    train.run_script(main, parse_args)
