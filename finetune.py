"""Finetune a pretrained encoder to classify images or videos. The same command resumes a run.

    torchrun finetune.py --checkpoint runs/demo/last.pt --videos demo           # minutes on a CPU
    torchrun --nproc_per_node=8 finetune.py --checkpoint vit_b_pretrain --images /data/in1k

The run's folder holds last.pt, and best.pt from the epoch with the best validation accuracy.
Random numbers depend on (seed, epoch, file) in the loader, and on (seed, step, rank, micro-batch)
in drop path, MixUp, CutMix and the noise that erasing fills in.
"""

import argparse
import shlex
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import omnimae
import train
from eval import accuracy, describe_split, file_loader, list_labelled

# The recipes: the released configurations for ViT-B. `lr` is the peak learning rate for
# `batch_size`, in proportion for other sizes. `augment`: "full", or "crop" for crop and flip only.
RECIPES = {
    "images": {  # ImageNet-1k
        "epochs": 100,
        "batch_size": 1024,
        "lr": 4e-3,
        "warmup": 0.05,  # fraction of the steps
        "weight_decay": 1e-4,  # not on biases and LayerNorms
        "layer_decay": 0.65,
        "drop_path": 0.1,
        "augment": "full",
    },
    "videos": {  # SSv2
        "epochs": 40,  # the config says 100, but also that 12.5%, the warm-up, are 5 epochs
        "batch_size": 256,
        "lr": 1e-3,
        "warmup": 0.125,
        "weight_decay": 0.05,
        "layer_decay": 0.75,
        "drop_path": 0.1,
        "augment": "full",
    },
    "demo": {  # small models and small data (this project)
        "epochs": 4,
        "batch_size": 64,
        "lr": 1e-3,
        "warmup": 0.1,
        "weight_decay": 0.05,
        "layer_decay": 1.0,
        "drop_path": 0.0,
        "augment": "crop",
    },
}
# No recipe was released for ViT-L and ViT-H. These values are MAE's for ImageNet, here for videos
# as well. All others are ViT-B's. (The released definitions of both models have drop path 0.1.)
LARGER_RECIPES = {
    "vit_l": {"layer_decay": 0.75, "drop_path": 0.2},
    "vit_h": {"layer_decay": 0.75, "drop_path": 0.3},
}
LARGER_IMAGE_EPOCHS = 50

CROP = {"full": (0.08, 1.0), "crop": (0.5, 1.0)}  # fraction of the area, by `augment`
FLIP = {"images": 0.5, "videos": 0.0}  # probability; SSv2's labels name directions
BETAS = (0.9, 0.999)  # AdamW's
LAST_LEARNING_RATE = 1e-6  # the cosine ends here
LABEL_SMOOTHING = 0.1
MIXUP_ALPHA = 0.8
CUTMIX_ALPHA = 1.0
RAND_AUGMENT = {"images": (2, 9.0), "videos": (4, 7.0)}  # operations; magnitude from 0 to 10
ERASE_PROBABILITY = 0.25
HEAD_STD = {"images": 2e-5, "videos": 0.01}  # of a new head's weights
MICRO_BATCH = {"images": 32, "videos": 8}  # on a GPU, as released; MixUp mixes within one

# ------------------------------------------------------------------------------------------------
# Finetuning


def main(args: argparse.Namespace) -> None:
    ranks = train.Ranks(args.device)
    out = Path(args.out)
    kind = "images" if args.images else "videos"

    # The checkpoint to start from. Its size, the kind and the options make the recipe.
    start = None  # from scratch
    if args.checkpoint != "scratch":
        start = ranks.first_then_others(omnimae.load_checkpoint, args.checkpoint)
        sizes = {cfg.dim: name for name, cfg in omnimae.MODELS.items()}
        args.model = sizes.get(start.cfg.dim, "other")
    cfg = start.cfg if start else omnimae.MODELS[args.model]
    if args.clip_seconds:
        cfg = replace(cfg, clip_seconds=args.clip_seconds)
    fill_in(args, kind)

    # The files to train on, and those held out.
    root = train.data_root(args.images or args.videos, kind, ranks)
    listing = list_labelled(root, kind, "train")
    classes = listing.classes
    validation = list_labelled(root, kind, "val", classes)
    train.describe(listing, kind, root, ranks)
    describe_split(root, kind, len(validation.paths), ranks)

    # The model. Every rank draws the same weights, from the same seed.
    torch.manual_seed(args.seed)
    model = build(cfg, kind, start, len(classes), args.drop_path, args.freeze)
    parallel = train.prepare(model, args, ranks)
    autocast, scaler = train.precision(args.dtype, ranks.device, cfg)
    groups = parameter_groups(model, args.layer_decay, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    mixup = v2.MixUp(alpha=MIXUP_ALPHA, num_classes=len(classes))
    cutmix = v2.CutMix(alpha=CUTMIX_ALPHA, num_classes=len(classes))
    mix = v2.RandomChoice([mixup, cutmix])  # one of the two for each micro-batch

    # The steps, as in train.py (see `train.Cut`), with one kind, and one view of each file.
    num_files = {kind: len(listing.paths)}
    views_per_file = {kind: 1}
    cuts = train.cut_batch(args, num_files, views_per_file, MICRO_BATCH, cfg, ranks)
    steps = train.Steps(num_files, views_per_file, args.batch_size, args.epochs, args.seed)
    cut = cuts[kind]

    # Continue where last.pt ends, if there is one.
    recipe = {name: getattr(args, name) for name in ("model", "freeze", "seed", *RECIPES[kind])}
    recipe["clip_seconds"] = cfg.clip_seconds
    recipe["checkpoint"] = "scratch"
    if start:
        recipe["checkpoint"] = train.fingerprint_of_start(args.checkpoint, start)
    recipe[kind] = train.fingerprint_of_files(listing.paths, root)
    recipe["validation"] = train.fingerprint_of_files(validation.paths, root)
    recipe["classes"] = f"{len(classes)} ({train.fingerprint(repr(classes).encode())})"
    states = {"model": model, "optimizer": optimizer, "scaler": scaler}
    resumed = train.resume(out, recipe, states, steps.total, args.resume_anyway, ranks)
    first_step = resumed.get("step", 0)
    best = resumed.get("best", -1.0)  # top-1 on the held-out files, in %
    if resumed.get("recipe", recipe).get("validation") != recipe["validation"]:
        best = -1.0  # the old one is of other files

    log = train.Log(out, recipe, args.batch_size, first_step, steps.total, ranks)
    sizes = train.describe_cuts(cuts, views_per_file)
    ranks.say(f"{steps.total:,} steps of {args.batch_size} views, {sizes} at a time")
    ranks.say(f"log, best.pt and last.pt: {out}/")
    ranks.say(f"a killed run loses at most {args.save_minutes:g} minutes (--save-minutes)")
    dataset = Labelled(cfg, kind, listing, args.seed, args.augment)
    pieces = steps.pieces(first_step, cuts, ranks)
    read_ahead = 2 * cut.pieces_per_micro_batch
    loader = iter(train.make_loader(dataset, args, ranks, pieces, read_ahead))
    val_loader = file_loader(validation, kind, cfg, 1, args, ranks)  # one clip and crop, for speed
    saved_at = time.monotonic()

    # At an epoch's end, last.pt is saved before validation. A run that resumes there repeats this
    # epoch without steps, to validate it.
    first_epoch = max(0, first_step - 1) // steps.per_epoch
    for epoch in range(first_epoch, args.epochs):
        model.train()
        begin = max(first_step, epoch * steps.per_epoch)
        end = (epoch + 1) * steps.per_epoch
        for step in range(begin, end):
            lr = train.learning_rate(step, steps.total, args.lr, LAST_LEARNING_RATE, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]  # layer decay

            # Forward and backward. The gradients of the micro-batches add up. DDP averages them
            # over the ranks once a step, with the last one.
            mean_loss = torch.zeros((), device=ranks.device)
            for i in range(cut.micro_batches):
                with log.waiting():
                    num = cut.pieces_per_micro_batch
                    pixels, labels, boxes = train.join_pieces(loader, num, ranks.device)
                train.seed_all(args.seed, step, ranks.rank, i)  # drop path, MixUp, noise
                x = omnimae.normalize(pixels)  # (B, 3, H, W) or (B, 3, T, H, W)
                if args.augment == "full":
                    x = erase(x, boxes)
                    if x.ndim == 5:
                        x = tv_tensors.Video(x)  # MixUp refuses clips as plain tensors
                    x, labels = mix(x, labels)  # labels (B, classes)
                    x = x.as_subclass(Tensor)
                parallel.require_backward_grad_sync = i == cut.micro_batches - 1
                with autocast:
                    logits = parallel(x)  # (B, classes)
                    loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
                scaler.scale(loss / cut.micro_batches).backward()
                mean_loss += loss.detach() / cut.micro_batches

            # The update.
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            # The log and last.pt.
            done = step + 1  # steps completed
            if done == 1 or done % args.log_every == 0 or done == end:
                log.report(done, f"epoch {epoch}", mean_loss, lr, scaler)
            # Save before validating, so that a crash there costs no step.
            save_now = done == end or time.monotonic() - saved_at > 60 * args.save_minutes
            if save_now and ranks.rank == 0:
                train.save(out / "last.pt", done, recipe, states, classes=classes, best=best)
                saved_at = time.monotonic()

        # Validate on one view of each held-out file. (Of a video, eval.py averages 15.)
        top1, top5, unreadable = accuracy(model, val_loader, 1, ranks, autocast)
        result = {"top1": top1, "top5": top5, "unreadable": unreadable}
        log.say(f"validation: top-1 {top1:.2f}%, top-5 {top5:.2f}%", end, epoch=epoch, **result)
        if top1 > best:
            best = top1
            if ranks.rank == 0:
                train.save(
                    out / "best.pt", end, recipe, {"model": model}, classes=classes, best=best
                )
        log.begin_interval(end)  # validation does not count in views/s

    ranks.close()
    ranks.say(f"done: {out}/best.pt has validation top-1 {best:.2f}%. Next:")
    options = ["--checkpoint", f"{out}/best.pt", f"--{kind}", getattr(args, kind)]
    ranks.say(f"torchrun eval.py {shlex.join(options)}")


def fill_in(args: argparse.Namespace, kind: str) -> None:
    """Sets options not given, and `warmup`, from the recipe for this kind and size."""
    defaults = RECIPES[kind] | LARGER_RECIPES.get(args.model, {})
    if kind == "images" and args.model in LARGER_RECIPES:
        defaults["epochs"] = LARGER_IMAGE_EPOCHS
    if "demo" in (args.model, args.images, args.videos):
        defaults = dict(RECIPES["demo"])
    if args.freeze:  # no drop path when the encoder is frozen
        defaults["drop_path"] = 0.0
    defaults["lr"] *= (args.batch_size or defaults["batch_size"]) / defaults["batch_size"]
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


# ------------------------------------------------------------------------------------------------
# The model and its parameter groups


def build(
    cfg: omnimae.OmniMAEConfig, kind: str, start, num_classes: int, drop_path: float, freeze: bool
) -> omnimae.Classifier:
    """A classifier with a new head, on the encoder of `start`, or from scratch if that is None."""
    model = omnimae.Classifier(cfg, num_classes, drop_path)
    init_head = nn.init.trunc_normal_ if kind == "images" else nn.init.normal_
    init_head(model.head.weight, std=HEAD_STD[kind])
    if start:
        model.encoder.load_state_dict(start.encoder.state_dict())
    if isinstance(start, omnimae.Classifier):  # not an OmniMAE's norm: it comes before pooling
        model.norm.load_state_dict(start.norm.state_dict())
    model.encoder.requires_grad_(not freeze)
    return model


def parameter_groups(model: omnimae.Classifier, layer_decay: float, weight_decay: float) -> list:
    """AdamW's groups. "scale" multiplies the learning rate: layer_decay ** (depth + 2 - layer). As
    released, the patch embedding is layer 0, block i is i + 1, norm and head are depth + 1, so the
    head itself has scale `layer_decay`. No weight decay on biases and LayerNorms."""
    depth = len(model.encoder.blocks)
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1  # encoder.blocks.0.norm1.weight: 0 + 1
        elif name.startswith("encoder."):
            layer = 0
        else:
            layer = depth + 1
        is_matrix = parameter.ndim > 1
        if (layer, is_matrix) not in groups:
            groups[layer, is_matrix] = {
                "params": [],
                "scale": layer_decay ** (depth + 2 - layer),
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
        groups[layer, is_matrix]["params"].append(parameter)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------
# Augmentation


class Labelled(train.Views):
    """One augmented view of each file, its label, and the box to erase."""

    def __init__(self, cfg, kind: str, listing: train.Listing, seed: int, augment: str):
        super().__init__(cfg, {kind: listing.paths}, seed)
        self.labels = torch.tensor(listing.labels)
        self.augment = augment
        mode = v2.InterpolationMode.BICUBIC if kind == "images" else v2.InterpolationMode.BILINEAR
        crop = v2.RandomResizedCrop(cfg.image_size, CROP[augment], interpolation=mode)
        flip = v2.RandomHorizontalFlip(FLIP[kind])
        self.crops = {kind: v2.Compose([crop, flip])}
        self.erasing = v2.RandomErasing()

    def __getitem__(self, sample: train.Sample) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (1, 3, H, W) or (1, 3, T, H, W), the label (1), and the box (1, 4): top, left,
        height, width. The first dimension is that of views, as in `Views`."""
        media, index = self.read(sample)  # `read` seeds what follows
        pixels = self.crops[sample.kind](media)
        box = torch.zeros(4, dtype=torch.int64)
        if self.augment == "full":
            pixels = rand_augment(pixels, *RAND_AUGMENT[sample.kind])
            if torch.rand(()) < ERASE_PROBABILITY:  # a box of 2 to 33% of the area
                drawn = self.erasing.make_params([pixels])
                if drawn["v"] is not None:  # None: no box of these proportions fitted
                    box = torch.tensor([drawn[name] for name in ("i", "j", "h", "w")])
        return pixels.movedim(-3, 0)[None], self.labels[index][None], box[None]


def rand_augment(media: Tensor, num: int, magnitude: float) -> Tensor:
    """Applies each of `num` random operations with probability 0.5, the same to all frames of uint8
    (3, H, W) or (T, 3, H, W). Magnitudes, 0 to 10, have standard deviation 0.5. torchvision takes
    the index of a bin: of bins 0 to 100, bin 90 is magnitude 9."""
    bilinear = v2.InterpolationMode.BILINEAR
    for _ in range(num):
        drawn = torch.normal(magnitude, 0.5, ()).clamp(0, 10).item()
        operation = v2.RandAugment(1, round(10 * drawn), 101, interpolation=bilinear, fill=128)
        if torch.rand(()) < 0.5:
            media = operation(media)
    return media


def erase(x: Tensor, boxes: Tensor) -> Tensor:
    """Erases boxes (B, 4) in ImageNet-normalised x, (B, 3, H, W) or (B, 3, T, H, W): black in
    images, new standard normal noise in each frame of clips (uint8 could not hold it)."""
    top, left, height, width = (side.view(-1, *[1] * (x.ndim - 1)) for side in boxes.T)
    row = torch.arange(x.shape[-2], device=x.device)[:, None]  # (H, 1)
    column = torch.arange(x.shape[-1], device=x.device)  # (W,)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    fill = omnimae.normalize(torch.zeros_like(x)) if x.ndim == 4 else torch.randn_like(x)
    return torch.where(inside, fill, x)


# ------------------------------------------------------------------------------------------------
# Options


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Finetuning's options. Those of the recipe stay None until `fill_in`."""
    usage = "torchrun %(prog)s --checkpoint NAME --images|--videos DIR [options]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=train.non_empty, required=True, help="name, URL, path or 'scratch'")
    add("--model", choices=list(omnimae.MODELS), help="size, only for --checkpoint scratch")
    add("--images", type=train.non_empty, help="labelled images, or 'demo' (recipe: ImageNet-1k)")
    add("--videos", type=train.non_empty, help="labelled videos, or 'demo' (recipe: SSv2)")
    add("--out", type=train.non_empty, help="folder (runs/CHECKPOINT_images or _videos)")
    add("--epochs", type=train.positive_int, help="default of this and the next: see RECIPES")
    add("--batch-size", type=train.positive_int, help="over all processes")
    add("--lr", type=train.positive_float, help="peak (default: in proportion to the batch size)")
    add("--weight-decay", type=train.float_from_zero, help="not on biases and LayerNorms")
    add("--layer-decay", type=train.positive_float, help="factor of the rate, for each layer")
    add("--drop-path", type=train.fraction, help="probability in the last block")
    add("--augment", choices=["full", "crop"], help="the full recipe, or only crop and flip")
    add("--freeze", action="store_true", help="train norm and head only")
    train.add_shared_options(parser)
    train.add_training_options(parser)
    args = parser.parse_args(argv)
    if bool(args.images) == bool(args.videos):
        parser.error("expected exactly one of --images DIR and --videos DIR")
    if (args.checkpoint == "scratch") != bool(args.model):
        parser.error("expected --model with --checkpoint scratch, and only then")
    start_name = Path(args.checkpoint).parent.name or args.checkpoint
    args.out = args.out or f"runs/{start_name}_{'images' if args.images else 'videos'}"
    return args


if __name__ == "__main__":
    train.run_script(main, parse_args)
