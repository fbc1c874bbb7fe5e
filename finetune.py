"""Finetune a pretrained encoder to classify images or videos. The same command resumes a run.

    torchrun finetune.py --checkpoint runs/demo/last.pt --videos demo             minutes on a CPU
    torchrun --nproc_per_node=8 finetune.py --checkpoint vit_b_pretrain --images /data/in1k

The run's folder holds last.pt and best.pt, from the epoch with the best validation accuracy.
Random numbers depend on (seed, epoch, file) in the loader, and on (seed, step, rank, micro-batch)
in drop path, MixUp, CutMix and erasing's noise.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import omnimae
import train
from eval import accuracy, file_loader, list_labelled

BICUBIC, BILINEAR = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR
# The released configurations for ViT-B. `lr` is the peak learning rate for that batch size.
RECIPES = {
    "images": {  # ImageNet-1k
        "epochs": 100, "batch_size": 1024, "lr": 4e-3, "warmup": 0.05, "weight_decay": 1e-4,
        "layer_decay": 0.65, "drop_path": 0.1, "augment": "full",
    },
    "videos": {  # SSv2; released: 100 epochs, but a comment counts the 12.5% warm-up as 5
        "epochs": 40, "batch_size": 256, "lr": 1e-3, "warmup": 0.125, "weight_decay": 0.05,
        "layer_decay": 0.75, "drop_path": 0.1, "augment": "full",
    },
    "demo": {  # small models and small data: no layer decay, little regularisation
        "epochs": 4, "batch_size": 64, "lr": 1e-3, "warmup": 0.1, "weight_decay": 0.05,
        "layer_decay": 1.0, "drop_path": 0.0, "augment": "crop",
    },
}  # fmt: skip
# No recipe was released for ViT-L and ViT-H, whose released definitions have drop path 0.1. These
# values, and the 50 epochs in `fill_in`, are MAE's for ImageNet.
LARGER = {
    "vit_l": {"layer_decay": 0.75, "drop_path": 0.2},
    "vit_h": {"layer_decay": 0.75, "drop_path": 0.3},
}

# ------------------------------------------------------------------------------------------------
# Augmentation, the model, its parameter groups


def rand_augment(media: Tensor, num: int, magnitude: float) -> Tensor:
    """Applies each of `num` random operations with probability 0.5, the same to all frames of uint8
    (3, H, W) or (T, 3, H, W). Magnitudes, 0 to 10, have standard deviation 0.5. torchvision takes
    the index of a bin: of bins 0 to 100, bin 90 is magnitude 9."""
    for _ in range(num):
        drawn = torch.normal(magnitude, 0.5, ()).clamp(0, 10).item()
        operation = v2.RandAugment(1, round(10 * drawn), 101, interpolation=BILINEAR, fill=128)
        media = operation(media) if torch.rand(()) < 0.5 else media
    return media


class Labelled(train.Views):
    """One augmented view of each file, its label, and the box to erase."""

    def __init__(self, cfg, kind: str, listing: omnimae.Listing, seed: int, augment: str):
        super().__init__(cfg, {kind: listing.paths}, seed)
        self.labels, self.augment = torch.tensor(listing.labels), augment
        area = (0.08, 1.0) if augment == "full" else (0.5, 1.0)
        mode = BICUBIC if kind == "images" else BILINEAR
        crop = v2.RandomResizedCrop(cfg.image_size, area, interpolation=mode)
        flip = v2.RandomHorizontalFlip(0.5 if kind == "images" else 0.0)  # directions matter
        self.crop, self.erasing = v2.Compose([crop, flip]), v2.RandomErasing()

    def __getitem__(self, sample: train.Sample) -> tuple[Tensor, int, Tensor]:
        """uint8 (3, H, W) or (3, T, H, W), the label, and the box (top, left, height, width)."""
        media, index = self.read(sample)  # `read` seeds what follows
        pixels, box = self.crop(media), torch.zeros(4, dtype=torch.int64)
        if self.augment == "full":
            num, magnitude = (2, 9.0) if sample.kind == "images" else (4, 7.0)
            pixels = rand_augment(pixels, num, magnitude)
            if torch.rand(()) < 0.25:  # erase a box of 2 to 33% of the area
                drawn = self.erasing.make_params([pixels])
                if drawn["v"] is not None:  # None: no box of these proportions fitted
                    box = torch.tensor([drawn[side] for side in "ijhw"])
        return pixels.movedim(-3, 0), int(self.labels[index]), box


def erase(x: Tensor, boxes: Tensor) -> Tensor:
    """Erases boxes (B, 4) in ImageNet-normalised x, (B, 3, H, W) or (B, 3, T, H, W): black in
    images, standard normal noise in all frames of clips (uint8 views could not hold it)."""
    top, left, height, width = (side.view(-1, *[1] * (x.ndim - 1)) for side in boxes.T)
    row = torch.arange(x.shape[-2], device=x.device)[:, None]  # (H, 1)
    column = torch.arange(x.shape[-1], device=x.device)  # (W,)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    fill = omnimae.normalize(torch.zeros_like(x)) if x.ndim == 4 else torch.randn_like(x)
    return torch.where(inside, fill, x)


def build(args: argparse.Namespace, kind: str, start, classes: list[str]) -> omnimae.Classifier:
    """A classifier with a new head, on the encoder of `start`, or from scratch if that is None."""
    cfg = start.cfg if start else omnimae.MODELS[args.model]
    model = omnimae.Classifier(cfg, len(classes), args.drop_path)
    model.classes = classes
    init_head = nn.init.trunc_normal_ if kind == "images" else nn.init.normal_
    init_head(model.head.weight, std=2e-5 if kind == "images" else 0.01)
    if start:
        model.encoder.load_state_dict(start.encoder.state_dict())
    if isinstance(start, omnimae.Classifier):  # an OmniMAE's norm comes before pooling
        model.norm.load_state_dict(start.norm.state_dict())
    model.encoder.requires_grad_(not args.freeze)
    return model


def parameter_groups(model: omnimae.Classifier, layer_decay: float, weight_decay: float) -> list:
    """AdamW's groups. "scale" multiplies the learning rate: layer_decay ** (depth + 2 - layer). As
    released, the patch embedding is layer 0, block i is i + 1, norm and head are depth + 1, so the
    head itself has scale `layer_decay`. No weight decay on biases and LayerNorm."""
    depth, groups = len(model.encoder.blocks), {}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith("encoder."):
            layer = int(name.split(".")[2]) + 1 if ".blocks." in name else 0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "scale": layer_decay ** (depth + 2 - layer), "weight_decay": decay}
        if parameter.requires_grad:
            groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------
# Finetuning


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    usage = "torchrun %(prog)s --checkpoint NAME --images|--videos DIR [options]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="released name (vit_b_pretrain), URL, path, 'scratch'")
    add("--model", choices=list(omnimae.MODELS), help="size, only for --checkpoint scratch")
    add("--images", help="labelled images, or 'demo': the recipe for ImageNet-1k")
    add("--videos", help="labelled videos, or 'demo': the recipe for Something-Something v2")
    add("--out", help="folder of the run (default: runs/CHECKPOINT_images or _videos)")
    add("--epochs", type=int, help="defaults of these: see the README")
    add("--batch-size", type=int, help="over all processes")
    add("--lr", type=float, help="peak (default: in proportion to the batch size)")
    add("--weight-decay", type=float, help="not on biases and LayerNorm")
    add("--layer-decay", type=float, help="learning rate of a layer relative to the next one up")
    add("--drop-path", type=float, help="probability in the last block")
    add("--augment", choices=["full", "crop"], help="the full recipe, or only crop and flip")
    add("--freeze", action="store_true", help="train norm and head only")
    args = train.parse_shared(parser, argv)
    if bool(args.images) == bool(args.videos):
        parser.error("expected either --images DIR or --videos DIR")
    if (args.checkpoint == "scratch") != bool(args.model):
        parser.error("expected --model with --checkpoint scratch, and only then")
    name = Path(args.checkpoint).parent.name or args.checkpoint
    args.out = args.out or f"runs/{name}_{'images' if args.images else 'videos'}"
    return args


def fill_in(args: argparse.Namespace, kind: str) -> None:
    """Sets options not given, and `warmup`, from the recipe for this kind and size."""
    recipe = RECIPES[kind] | LARGER.get(args.model, {})
    if kind == "images" and args.model in LARGER:
        recipe["epochs"] = 50
    if "demo" in (args.model, args.images, args.videos):
        recipe = dict(RECIPES["demo"])
    if args.freeze:  # no drop path when the encoder is frozen
        recipe["drop_path"] = 0.0
    recipe["lr"] *= (args.batch_size or recipe["batch_size"]) / recipe["batch_size"]
    vars(args).update({x: recipe[x] for x in recipe if vars(args).get(x) is None})


def main(args: argparse.Namespace) -> int | None:
    run, kind, start = train.Run(args), "images" if args.images else "videos", None
    if args.checkpoint != "scratch":
        start = run.first_rank_first(omnimae.load_checkpoint, args.checkpoint)
        sizes = {cfg.dim: name for name, cfg in omnimae.MODELS.items()}
        args.model = sizes.get(start.cfg.dim, "other")
    fill_in(args, kind)
    root = train.data_root(args.images or args.videos, kind, run)
    listing = list_labelled(root, kind, "train")
    validation = list_labelled(root, kind, "val", listing.classes)
    num_files, classes = len(listing.paths), listing.classes
    steps = train.Steps({kind: num_files}, {kind: 1}, args, run)

    torch.manual_seed(args.seed)
    model = build(args, kind, start, classes)
    parallel = train.prepare(model, args, run)
    groups = parameter_groups(model, args.layer_decay, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    autocast, scaler = train.precision(args, run.device, model.cfg)
    mixup = v2.MixUp(alpha=0.8, num_classes=len(classes))
    cutmix = v2.CutMix(alpha=1.0, num_classes=len(classes))
    mix = v2.RandomChoice([mixup, cutmix])  # one of the two for each micro-batch
    names = ("checkpoint", "model", "freeze", "seed", *RECIPES[kind])
    recipe = {name: getattr(args, name) for name in names}
    recipe |= {"files": num_files, "classes": classes}
    best = run.resume(recipe, model=model, optimizer=optimizer, scaler=scaler).get("best", -1.0)
    run.say(f"finetuning {args.model} on {num_files:,} {kind} of {len(classes)} classes")
    run.say(f"{steps.total:,} steps of {args.batch_size}; log, last.pt and best.pt: {run.out}/")
    dataset = Labelled(model.cfg, kind, listing, args.seed, args.augment)
    batches = iter(train.make_loader(dataset, run, batch_sampler=steps.micro_batches(run.step)))
    val_loader = file_loader(validation, kind, model.cfg, 1, run)  # one clip and crop, for speed
    iter(val_loader)  # fork now, not during a collective

    while run.step < steps.total and not run.stop:
        epoch = run.step // steps.per_epoch
        lr = train.learning_rate(run.step, steps.total, args.lr, end=1e-6, warmup=args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        model.train()
        mean_loss = torch.zeros((), device=run.device)
        for i in range(steps.accumulate):
            pixels, labels, boxes = run.next_batch(batches)
            train.seed_all(args.seed, run.step, run.rank, i)  # drop path, MixUp, CutMix, noise
            x = omnimae.normalize(pixels)  # (B, 3, H, W) or (B, 3, T, H, W)
            if args.augment == "full":
                x = erase(x, boxes)
                x = tv_tensors.Video(x) if x.ndim == 5 else x  # else MixUp refuses clips
                x, labels = mix(x, labels)  # labels (B, classes)
            parallel.require_backward_grad_sync = i == steps.accumulate - 1  # ranks average once
            with autocast:
                logits = parallel(x.as_subclass(Tensor))  # (B, classes)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
            scaler.scale(loss / steps.accumulate).backward()
            mean_loss += loss.detach() / steps.accumulate
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.end_step(args.batch_size, args.save_minutes)
        epoch_ends = run.step % steps.per_epoch == 0
        if run.step == 1 or run.step % args.log_every == 0 or epoch_ends:
            run.report(f"epoch {epoch}", mean_loss, lr, steps.total)
        if epoch_ends:  # eval.py averages all the views
            top1, top5, unreadable = accuracy(model, val_loader, 1, run, autocast)
            text = f"step {run.step:6d}  validation: top-1 {top1:.2f}%, top-5 {top5:.2f}%"
            run.say(text, epoch=epoch, top1=top1, top5=top5, unreadable=unreadable)
            if top1 > best:
                best = top1
                if run.rank == 0:
                    run.save("best.pt", classes=classes, best=best)
            run.begin_interval()  # validation does not count in views/s
        if run.rank == 0 and (run.stop or run.save_due or epoch_ends):
            run.save(classes=classes, best=best)
    if run.step < steps.total:
        run.say(f"stopped and saved after step {run.step}; the same command resumes the run")
    else:
        run.say(f"done: {run.out}/best.pt has validation top-1 {best:.2f}%. Next:")
        run.say(f"torchrun eval.py --checkpoint {run.out}/best.pt --{kind} {vars(args)[kind]}")
    return run.stopped_by


if __name__ == "__main__":
    train.run_script(main, parse_args)
