"""Finetune a pretrained encoder to classify images or videos.

    torchrun finetune.py --checkpoint runs/demo/last.pt --videos demo             minutes on a CPU
    torchrun --nproc_per_node=8 finetune.py --checkpoint vit_b_pretrain --images IN1K
    torchrun --nproc_per_node=8 finetune.py --checkpoint vit_b_pretrain --videos SSV2

The same command again goes on where a run stopped. The recipes are the released ones for ViT-B,
one for images and one for videos. The run's folder holds `best.pt`, of the epoch with the best
validation accuracy, beside `last.pt`.

As in pretraining, every random number is a function: of (seed, epoch, sample) for windows, crops,
RandAugment and erased boxes, of (seed, step, rank, micro-batch) for drop path, MixUp and noise.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

import engine
import omnimae
import train
from eval import accuracy, file_loader, list_labelled

# The released configurations, for ViT-B. A rate goes with its batch size.
RECIPES = {
    "images": {  # ImageNet-1k
        "epochs": 100, "batch_size": 1024, "lr": 4e-3, "warmup": 0.05, "weight_decay": 1e-4,
        "layer_decay": 0.65, "drop_path": 0.1, "augment": "full",
    },
    "videos": {  # Something-Something v2
        # the configuration says 100 epochs; its warm-up of 12.5 % is noted there as 5, so 40
        "epochs": 40, "batch_size": 256, "lr": 1e-3, "warmup": 0.125, "weight_decay": 0.05,
        "layer_decay": 0.75, "drop_path": 0.1, "augment": "full",
    },
}  # fmt: skip
# For the larger models none was released: what follows is MAE's on ImageNet (its FINETUNE.md; its
# paper has drop path 0.1 and 0.2), the rest as for ViT-B.
LARGER = {
    "vit_l": {"epochs": 50, "layer_decay": 0.75, "drop_path": 0.2},
    "vit_h": {"epochs": 50, "layer_decay": 0.75, "drop_path": 0.3},
}
DEMO = {  # small models and small data: full rates in all layers, little regularisation
    "epochs": 4, "batch_size": 64, "lr": 1e-3, "warmup": 0.1, "weight_decay": 0.05,
    "layer_decay": 1.0, "drop_path": 0.0, "augment": "crop",
}  # fmt: skip
LABEL_SMOOTHING = 0.1
ERASING = 0.25  # of the samples; a box of 2 to 33 % of the area
MIXUP, CUTMIX = 0.8, 1.0  # of the beta distributions; every micro-batch gets one or the other

# ------------------------------------------------------------------------------------------------
# Augmentation


def rand_augment(media: torch.Tensor, num: int, magnitude: float) -> torch.Tensor:
    """`num` operations drawn at random, each applied with probability 0.5, alike to all frames.

    uint8 (3, H, W) or (T, 3, H, W). Magnitudes are of 10, drawn with deviation 0.5, where torchvision
    counts bins from 0: with 101 of them, bin 90 of 100 is magnitude 9 of 10. (Of its
    default 31 bins, 9 would be a weak setting.)
    """
    for _ in range(num):
        drawn = torch.normal(magnitude, 0.5, ()).clamp(0, 10).item()
        if torch.rand(()) < 0.5:
            media = v2.RandAugment(1, round(10 * drawn), 101, InterpolationMode.BILINEAR)(media)
    return media


class Labelled(train.Views):
    """One view of each file, its label, and the box that is to be erased."""

    def __init__(self, cfg: omnimae.OmniMAEConfig, kind: str, listing, seed: int, augment: str):
        super().__init__(cfg, {kind: listing.paths}, seed)
        self.labels, self.augment = np.array(listing.labels), augment
        area = (0.08, 1.0) if augment == "full" else (0.5, 1.0)
        mode = InterpolationMode.BICUBIC if kind == "images" else InterpolationMode.BILINEAR
        crop = v2.RandomResizedCrop(cfg.image_size, area, interpolation=mode)
        flip = 0.5 if kind == "images" else 0.0  # in clips, left and right have meaning
        self.crop[kind] = v2.Compose([crop, v2.RandomHorizontalFlip(flip)])
        self.erasing = v2.RandomErasing()

    def __getitem__(self, sample: tuple) -> tuple[torch.Tensor, int, torch.Tensor, list[str]]:
        """Pixels uint8 (3, H, W) or (T, 3, H, W), the label, the box (top, left, height, width;
        zeros for none), what is unreadable."""
        media, index, unreadable = self.read_or_replace(sample)
        pixels, box = self.crop[sample[0]](media), torch.zeros(4, dtype=torch.int64)
        if self.augment == "full":
            pixels = rand_augment(pixels, *((2, 9.0) if sample[0] == "images" else (4, 7.0)))
            if torch.rand(()) < ERASING:
                drawn = self.erasing.make_params([pixels])
                if drawn["v"] is not None:  # None: no box of its proportions fitted
                    box = torch.tensor([drawn[side] for side in "ijhw"])
        return pixels, int(self.labels[index]), box, unreadable


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Pixels uint8 (B, 3, H, W) or (B, 3, T, H, W), labels (B,), boxes (B, 4), messages."""
    pixels, labels, boxes, unreadable = zip(*samples)
    messages = [message for some in unreadable for message in some]
    return torch.stack(pixels).movedim(-3, 1), torch.tensor(labels), torch.stack(boxes), messages


def erase(x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Normalised (B, 3, H, W) or (B, 3, T, H, W): an image's box becomes black; a clip's, through
    all its frames, noise of mean 0 and variance 1. Bytes cannot hold that, so it is drawn here and
    not in the loader."""
    top, left, height, width = (side.view(-1, *[1] * (x.ndim - 1)) for side in boxes.T)
    row = torch.arange(x.shape[-2], device=x.device)[:, None]  # (H, 1)
    column = torch.arange(x.shape[-1], device=x.device)  # (W,)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    fill = omnimae.normalize(torch.zeros_like(x)) if x.ndim == 4 else torch.randn_like(x)
    return torch.where(inside, fill, x)


# ------------------------------------------------------------------------------------------------
# The model and its parameters


def build(args: argparse.Namespace, kind: str, cfg, classes: list[str], start) -> torch.nn.Module:
    """A classifier with a new head, on the encoder of `start`, if any."""
    model = omnimae.Classifier(cfg, len(classes), args.drop_path, classes)
    if kind == "videos":  # the classifier's own initialisation is that of the images' recipe
        torch.nn.init.normal_(model.head.weight, std=0.01)
    if start:
        model.encoder.load_state_dict(start.encoder.state_dict())
    if isinstance(start, omnimae.Classifier):  # a pretraining model's norm was not after pooling
        model.norm.load_state_dict(start.norm.state_dict())
    model.encoder.requires_grad_(not args.freeze)
    model.encoder.blocks.checkpointing = args.checkpoint_activations
    return model


def parameter_groups(model: omnimae.Classifier, layer_decay: float, weight_decay: float) -> list:
    """For AdamW, with the "scale" of each group's rate: layer_decay ** (depth + 2 - layer).

    As released: the patch embedding is layer 0, block i is i + 1, norm and head are depth + 1, so
    that the head itself runs at `layer_decay` times the rate. No weight decay on biases and norms.
    """
    depth = len(model.encoder.blocks)
    groups = {}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith("encoder."):
            layer = int(name.split(".")[2]) + 1 if ".blocks." in name else 0
        if parameter.requires_grad:
            groups.setdefault((layer, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": layer_decay ** (depth + 2 - layer),
            "weight_decay": weight_decay if matrices else 0.0,
        }
        for (layer, matrices), parameters in groups.items()
    ]


# ------------------------------------------------------------------------------------------------
# Finetuning


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; what is not given is filled in when the checkpoint's size is known."""

    def shown(key):
        values = [f"{RECIPES[kind][key]} {kind}" for kind in train.KINDS]
        values += [f"{larger[key]} {size}" for size, larger in LARGER.items() if key in larger]
        return f"(default: {', '.join([*values, f'{DEMO[key]} demo'])})"

    parser = engine.option_parser(
        "Finetune a pretrained encoder. Run the same command again to go on.",
        "torchrun [--nproc_per_node N] %(prog)s --checkpoint NAME (--images DIR | --videos DIR) ...",
    )
    # fmt: off
    add = engine.option_group(parser, "model and data")
    add("--checkpoint", f"path, URL, 'scratch', or one of {', '.join(omnimae.CHECKPOINTS)}", required=True, metavar="NAME")
    add("--model", "the size, for --checkpoint scratch only", type=engine.model_name, choices=list(omnimae.MODELS))
    add("--images", "labelled images, or 'demo': the recipe of ImageNet-1k; demo model or data have their own", metavar="DIR")
    add("--videos", "labelled videos, or 'demo': the recipe of Something-Something v2; the demo's likewise", metavar="DIR")
    add("--out", "the run's folder (default: runs/MODEL_images or runs/MODEL_videos)", metavar="DIR")
    add = engine.option_group(parser, "recipe (defaults: the released ones for ViT-B; vit_l's and vit_h's own are MAE's on ImageNet)")
    add("--epochs", shown("epochs"), type=engine.positive)
    add("--batch-size", "over all processes " + shown("batch_size"), type=engine.positive)
    add("--lr", f"peak learning rate, by default in proportion to the batch size {shown('lr')}", type=engine.amount)
    add("--weight-decay", "not on biases and LayerNorm " + shown("weight_decay"), type=engine.amount)
    add("--layer-decay", "of the rate, from layer to layer " + shown("layer_decay"), type=engine.amount)
    add("--drop-path", "share of samples that skip a branch of the last block " + shown("drop_path"), type=engine.share)
    add("--augment", "full: crop of 8 to 100 %% of the area, flip (images), RandAugment, erasing, MixUp or CutMix; crop: of 50 to 100 %%, flip (images) " + shown("augment"), choices=["full", "crop"])
    add("--freeze", "train norm and head only, by default without drop path", action="store_true")
    add("--seed", "of everything random", type=engine.whole, default=0)
    # fmt: on
    engine.machine_options(parser)
    args = parser.parse_args(argv)
    if bool(args.images) == bool(args.videos):
        parser.error("expected one of --images DIR and --videos DIR")
    if (args.checkpoint == "scratch") != bool(args.model):
        parser.error("expected --model with --checkpoint scratch; other checkpoints say their size")
    return args


def fill_in(args: argparse.Namespace, kind: str) -> None:
    """What was not given, from the recipe, and its `warmup`, which is not an option; the rate in
    proportion to the batch size."""
    recipe = RECIPES[kind] | LARGER.get(args.model, {})
    if "demo" in (args.model, getattr(args, kind)):
        recipe = DEMO
    if args.freeze:  # what drops out of fixed features is only noise
        recipe = recipe | {"drop_path": 0.0}
    lr = recipe["lr"] * (args.batch_size or recipe["batch_size"]) / recipe["batch_size"]
    for key, value in (recipe | {"lr": lr, "out": f"runs/{args.model}_{kind}"}).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)


def main(args: argparse.Namespace) -> int | None:
    kind = "images" if args.images else "videos"
    start = None if args.checkpoint == "scratch" else omnimae.load_checkpoint(args.checkpoint)
    args.model = engine.size_name(start.cfg) if start else args.model
    fill_in(args, kind)
    run = engine.Run(args)

    # The data
    root = getattr(args, kind)
    root = engine.demo_data(kind, run) if root == "demo" else root
    listing = list_labelled(root, kind, "train")
    validation = list_labelled(root, kind, "val", listing.classes)
    num, classes = len(listing.paths), listing.classes
    if len(classes) < 2:
        raise ValueError(f"{root} has {kind} of one class, {classes[0]!r}: expected at least two")
    split = {"rank": run.rank, "world": run.world, "micro": args.micro_batch}
    steps = train.Steps({kind: num}, {kind: 1}, args.batch_size, args.epochs, args.seed, **split)
    epoch_steps = steps.total // args.epochs

    # The model
    torch.manual_seed(args.seed)
    cfg = start.cfg if start else omnimae.MODELS[args.model]
    model = build(args, kind, cfg, classes, start).to(run.device)
    groups = parameter_groups(model, args.layer_decay, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)  # lr: every step
    saved = run.open(args, {kind: num, "classes": len(classes)}, model, optimizer)
    if saved.get("classes", classes) != classes:
        raise ValueError(f"{run.out} is of a run on other classes: choose another --out")
    best = saved.get("best", -1.0)
    if args.compile:
        model.compile(dynamic=False)
    parallel = run.parallel(model, args.compress_gradients)
    mix = v2.RandomChoice([
        v2.MixUp(alpha=MIXUP, num_classes=len(classes)),
        v2.CutMix(alpha=CUTMIX, num_classes=len(classes)),
    ])  # fmt: skip

    rate = engine.matmul_rate(run)
    flops = engine.count_flops(cfg, kind, len(classes)) / (3 if args.freeze else 1)  # forward only
    run.print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {run.dtype}, "
        f"{run.world} x {run.device.type}\n{num:,} {kind} of {len(classes)} classes: "
        f"{steps.total:,} steps of {args.batch_size} in {args.epochs} epochs; see {run.out}/"
    )
    if not omnimae.has_validation(root, kind):
        run.print(
            f"{root} has no validation part: every tenth file is kept for it, "
            f"{len(validation.paths):,} in all"
        )
    if args.augment == "full" and steps.micro == 1:
        run.print(
            "MixUp and CutMix do nothing: in micro-batches of 1 they have no other to mix with"
        )

    steps.start = run.step
    dataset = Labelled(cfg, kind, listing, args.seed, args.augment)
    run.begin(steps.total, rate)  # before workers are forked, which inherit what a signal does
    loader = engine.make_loader(dataset, steps, run.workers, run.device, collate)
    batches = engine.start_workers(loader)
    val_loader = file_loader(kind, validation, cfg, 1, run)  # one view of each, for speed
    while run.step < steps.total and not run.stop:
        epoch = run.step // epoch_steps
        lr = train.learning_rate(run.step, steps.total, args.lr, end=1e-6, warmup=args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        model.train()
        total = torch.zeros((), device=run.device)
        for pixels, labels, boxes in run.micro_batches(batches, steps.accumulate, parallel):
            x = omnimae.normalize(pixels)  # (B, 3, H, W) or (B, 3, T, H, W)
            if args.augment == "full":
                x = erase(x, boxes)
                x = tv_tensors.Video(x) if x.ndim == 5 else x  # so that MixUp and CutMix take clips
                x, labels = mix(x, labels)  # labels (B, classes)
            with run.autocast:
                logits = parallel(x.as_subclass(torch.Tensor))  # (B, classes)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
                loss = loss / steps.accumulate
            run.scaler.scale(loss).backward()
            total += loss.detach()
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        run.step += 1
        run.views += args.batch_size
        run.work += args.batch_size * flops

        epoch_ends = run.step % epoch_steps == 0
        log_now = run.step == 1 or run.step % args.log_every == 0 or epoch_ends
        mean = run.agree(total, args.batch_size, log_now)
        if log_now:
            run.report(epoch, kind, mean, lr)
        if epoch_ends:  # eval.py has the whole protocol
            top1, top5, unreadable, _, _ = accuracy(
                model, validation.labels, val_loader, run, micro_batch=steps.micro
            )
            run.log(step=run.step, epoch=epoch, top1=top1, top5=top5, val_unreadable=unreadable)
            run.print(f"step {run.step:6d}  validation: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
            if top1 > best:
                best = top1
                run.save(model, optimizer, "best.pt", classes=classes, best=best)
            run.begin_window()
        if run.stop or run.due or epoch_ends:
            run.save(model, optimizer, classes=classes, best=best)
    if run.step < steps.total:
        run.print(f"stopped and saved after step {run.step:,}; the same command goes on from there")
        return run.signalled
    run.print(f"all {steps.total:,} steps are done: {run.out}/best.pt has top-1 {best:.2f} %")
    return None


if __name__ == "__main__":
    engine.run_script(main, parse_args)
