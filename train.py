"""Pretrain OmniMAE on images and videos.

    torchrun train.py --model demo                                   minutes on a laptop's CPU
    torchrun --nproc_per_node=8 train.py --model vit_b --images IN1K --videos SSV2

The same command again goes on where a run stopped. The recipe is the released one for ViT-B, where
the README's table does not say otherwise: a step takes all its views from one kind of data; AdamW;
warm-up and cosine.

Every random number is a function: of (seed, epoch, sample, view) for crops, flips, windows and
masks, of (seed, epoch) for the order. So nothing random is saved, and neither the number of
processes nor of workers nor accumulation changes what a step sees.
"""

import argparse
import functools
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

import engine
import omnimae

KINDS = ("images", "videos")


def learning_rate(step: float, total: int, peak: float, end=0.0, warmup=0.05) -> float:
    """Linear from 1e-6 to `peak` over the first `warmup` of the run, then a cosine to `end`."""
    done = step / total
    if done < warmup:
        return 1e-6 + (peak - 1e-6) * done / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


# ------------------------------------------------------------------------------------------------
# Data: which samples a step takes, and the views that are cut from them


@functools.lru_cache(maxsize=4)  # of an epoch: the order of its steps, and of each kind's files
def shuffled(num: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(num)


class Steps:
    """The order of a run, for a DataLoader's `batch_sampler`: from step `start` on, this rank's
    micro-batches, each a list of (kind, epoch, index of the file, first view, number of views). The
    first view is 0, unless the files are so few that one comes up again within an epoch.

    An epoch has as many views as there are files: every image once, or, with 4 views of each, a
    quarter of the videos. A step is all images or all videos, in one random order that all ranks
    compute alike. A file is decoded once for all its views. ValueError for a batch that does not
    divide.
    """

    def __init__(self, sizes: dict, views: dict, batch, epochs, seed, rank=0, world=1, micro=None):
        self.sizes, self.views, self.batch, self.seed = sizes, views, batch, seed
        self.kinds = [kind for kind in sizes for _ in range(max(1, sizes[kind] // batch))]
        self.total, self.start = epochs * len(self.kinds), 0
        per_rank = batch // world
        micro = min(micro or per_rank, per_rank)
        for kind in sizes:
            if batch % world or per_rank % micro or micro % views[kind]:
                raise ValueError(
                    f"a batch of {batch} views does not divide into {world} processes x "
                    f"micro-batches of {micro} views x {views[kind]} views of one file ({kind}): "
                    "choose --batch-size and --micro-batch so that it does"
                )
        self.rank, self.world, self.micro, self.accumulate = rank, world, micro, per_rank // micro

    def at(self, step: int) -> tuple[int, str, int]:
        """A step's epoch, its kind, and how many steps of that kind the epoch had before."""
        epoch, i = divmod(step, len(self.kinds))
        order = shuffled(len(self.kinds), self.seed, epoch)
        kinds = [self.kinds[k] for k in order[: i + 1]]
        return epoch, kinds[i], kinds[:i].count(kinds[i])

    def samples(self, step: int) -> list[tuple]:
        """The samples of all ranks. A data set smaller than a step is taken several times over."""
        epoch, kind, before = self.at(step)
        num, views = self.sizes[kind], self.views[kind]
        order = shuffled(num, self.seed, epoch, 1 + KINDS.index(kind))
        files = self.batch // views
        return [
            (kind, epoch, int(order[place % num]), place // num * views, views)
            for place in range(before * files, (before + 1) * files)
        ]

    def __iter__(self) -> Iterator[list[tuple]]:
        for step in range(self.start, self.total):
            samples = self.samples(step)
            files = self.micro // self.views[samples[0][0]]  # of a micro-batch
            for i in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
                yield samples[i * files : (i + 1) * files]


class Views(Dataset):
    """Views of files: random crops and masks, or, for `held_out`, centre crops.

    A file that cannot be read is replaced by another of its data set, and reported.
    """

    def __init__(self, cfg, paths: dict, seed: int, mask_kind: str = "random", held_out=False):
        self.cfg, self.seed, self.mask_kind = cfg, seed, mask_kind
        # arrays: reference counts would make every worker copy a list of a million strings
        self.paths = {k: np.array([os.fsencode(p) for p in v]) for k, v in paths.items()}
        size = cfg.image_size
        crop = v2.RandomResizedCrop(size, (0.2, 1), interpolation=InterpolationMode.BICUBIC)
        self.crop = {
            "images": v2.Compose([crop, v2.RandomHorizontalFlip()]),
            "videos": v2.RandomResizedCrop(size, (0.08, 1)),  # no flip: left and right have meaning
        }
        if held_out:
            self.crop = dict.fromkeys(KINDS, v2.Compose([v2.Resize(size), v2.CenterCrop(size)]))

    def read(self, kind: str, index: int) -> torch.Tensor:
        path = os.fsdecode(self.paths[kind][index])
        if kind == "images":
            return omnimae.read_image(path)
        with omnimae.Video(path) as video:
            start = torch.rand(()).item() * max(video.duration - omnimae.CLIP_SECONDS, 0)
            return video.clip(start, omnimae.CLIP_SECONDS, self.cfg.num_frames)

    def read_or_replace(self, sample: tuple) -> tuple[torch.Tensor, int, list[str]]:
        """Pixels uint8, (3, H, W) or (T, 3, H, W), of the sample's file, or of one drawn at random
        if that cannot be read; the index of the file; and what is wrong with those tried before."""
        kind, epoch, index, first, _ = sample
        unreadable = []
        for attempt in range(20):
            engine.seed_all(self.seed, epoch, index, KINDS.index(kind), first, attempt)
            other = int(torch.randint(len(self.paths[kind]), ())) if attempt else index
            try:
                return self.read(kind, other), other, unreadable
            except ValueError as error:
                unreadable.append(str(error))
        raise ValueError(f"20 {kind} in a row cannot be read, the last: {unreadable[-1]}")

    def __getitem__(self, sample: tuple) -> tuple[list, list, list]:
        """One file's views: pixels uint8, (H, W, 3) or (T, H, W, 3); visible indices (V,); and
        what could not be read."""
        kind, epoch, index, first, views = sample
        media, _, unreadable = self.read_or_replace(sample)
        grid, ratio = self.cfg.masking(kind)
        pixels, visible = [], []
        for view in range(first, first + views):
            engine.seed_all(self.seed, epoch, index, KINDS.index(kind), view)
            # channels last, as in a patch: `patchify` copies that faster
            pixels.append(self.crop[kind](media).movedim(-3, -1).contiguous())
            mask = omnimae.random_mask(1, grid, ratio, self.mask_kind)
            visible.append((~mask[0]).nonzero()[:, 0])
        return pixels, visible, unreadable


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pixels uint8 (B, 3, H, W) or (B, 3, T, H, W), visible (B, V), what could not be read."""
    pixels, visible, unreadable = (list(itertools.chain(*x)) for x in zip(*samples))
    return torch.stack(pixels).movedim(-1, 1), torch.stack(visible), unreadable


# ------------------------------------------------------------------------------------------------
# Pretraining


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, completed by what goes with the model and the data."""
    parser = engine.option_parser(
        "Pretrain OmniMAE on images and videos. Run the same command again to go on.",
        "torchrun [--nproc_per_node N] %(prog)s [--model M] [--images DIR] [--videos DIR] ...",
    )

    # fmt: off
    add = engine.option_group(parser, "model and data")
    add("--model", "the size", default="vit_b", type=engine.model_name, choices=list(omnimae.MODELS))
    add("--images", "folder of images, or 'demo'", metavar="DIR")
    add("--videos", "folder of videos, or 'demo'; neither given: both are", metavar="DIR")
    add("--out", "the run's folder (default: runs/MODEL)", metavar="DIR")
    add("--init", "start from a pretraining checkpoint: path, URL or released name", metavar="NAME")
    add = engine.option_group(parser, "recipe (for ViT-B; the README says where each value is from)")
    add("--epochs", "each of as many views as there are files (default: 800, the released checkpoints 1600; demo model or data: 12)", type=engine.positive)
    add("--batch-size", "views a step, over all processes (default: 2048; demo model or data: 64)", type=engine.positive)
    add("--lr", "peak learning rate (default: 1.6e-3 * batch size / 2048; demo model: 6e-4)", type=engine.amount)
    add("--weight-decay", "not on biases and LayerNorm", type=engine.amount, default=0.05)
    add("--image-views", "views of an image in a step", type=engine.positive, default=1)
    add("--video-views", "views of a video in a step, decoded once", type=engine.positive, default=4)
    add("--image-mask-ratio", "share masked (default: 0.90; demo model: 0.75)", type=engine.share)
    add("--video-mask-ratio", "share masked (default: 0.95; demo model: 0.90)", type=engine.share)
    add("--mask", "how clips are masked", default="random", choices=["random", "tube"])
    add("--seed", "of everything random", type=engine.whole, default=0)
    add = engine.option_group(parser, "benchmark")
    add("--benchmark", "time steps (by default of one micro-batch of 32) instead of training", action="store_true")
    add("--json", "the same, with its figures also as a line of JSON", action="store_true")
    # fmt: on
    engine.machine_options(parser)
    args = parser.parse_args(argv)
    if not (args.images or args.videos):
        args.images = args.videos = "demo"
    demo = "demo" in (args.model, args.images, args.videos)
    args.benchmark |= args.json
    if args.micro_batch is None and args.benchmark:
        args.micro_batch = 32
    elif args.micro_batch is None and args.batch_size is None and demo:
        args.micro_batch = 32 if args.model == "demo" else 16
    if args.batch_size is None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        args.batch_size = args.micro_batch * world if args.benchmark else 64 if demo else 2048
    args.epochs = args.epochs or (12 if demo else 800)
    args.out = args.out or f"runs/{args.model}"
    if args.lr is None:
        args.lr = 6e-4 if args.model == "demo" else 1.6e-3 * args.batch_size / 2048
    return args


def start_from(name: str, model: str, cfg: omnimae.OmniMAEConfig) -> omnimae.OmniMAE:
    """A pretraining checkpoint of the same size, with `cfg`'s mask ratios."""
    loaded = omnimae.load_checkpoint(name)
    if not hasattr(loaded, "decoder"):
        raise ValueError(
            f"--init {name} is a finetuned checkpoint: expected a pretraining one, which has the "
            "decoder, such as vit_b_pretrain or what this script saves"
        )
    ratios = {"image_mask_ratio": cfg.image_mask_ratio, "video_mask_ratio": cfg.video_mask_ratio}
    loaded.cfg = replace(loaded.cfg, **ratios)
    if loaded.cfg != replace(cfg, decoder_qkv_bias=loaded.cfg.decoder_qkv_bias):
        raise ValueError(
            f"--init {name} is of size {engine.size_name(loaded.cfg)}: expected a {model}"
        )
    return loaded.train()


def held_out_batches(cfg, sources: dict, mask_kind: str, run: engine.Run) -> dict:
    """Centre crops and masks, the same all through a run: 32 images and 8 clips of the validation
    part, or of the training part where there is none."""
    batches = {}
    for kind, root in sources.items():
        own = omnimae.has_validation(root, kind)
        if not own:
            print(f"{root} has no validation part: its held-out loss is of files trained on")
        paths = omnimae.list_media(root, kind, "val" if own else "train").paths
        views = Views(cfg, {kind: paths}, run.seed, mask_kind, held_out=True)
        at = np.linspace(0, len(paths) - 1, min(len(paths), {"images": 32, "videos": 8}[kind]))
        batches[kind] = collate([views[kind, 0, int(i), 0, 1] for i in at])
        run.name(batches[kind][-1])
    return batches


@torch.compiler.set_stance("force_eager")  # a few odd shapes are not worth compiling for
@torch.no_grad()
def show_held_out(model: omnimae.OmniMAE, held_out: dict, run: engine.Run) -> None:
    """Held-out losses, and pictures always of the same image and clip."""
    shown = []
    for kind, (pixels, visible, _) in held_out.items():
        x = omnimae.normalize(pixels.to(run.device))
        with run.autocast:
            loss, _, mask = model(x, visible.to(run.device))
            picture = omnimae.draw_reconstruction(model, x[0], mask[0])
        patches, _ = omnimae.to_patches(x, model.cfg)
        masked = patches[mask][None]  # (1, B M, P)
        target, _, _ = omnimae.normalize_patches(omnimae.to_pixels(masked))
        loss, zero = loss.item(), target.square().mean().item()
        (run.out / "pictures").mkdir(exist_ok=True)
        picture.save(run.out / "pictures" / f"{kind}_{run.step:06d}.png")
        run.log(step=run.step, kind=kind, held_out_loss=loss, predict_zero_loss=zero)
        shown.append(f"{kind} {loss:.3f}, {loss / zero:.2f} of predicting zero")
    run.print(f"step {run.step:6d}  held out: {'; '.join(shown)}")


def main(args: argparse.Namespace) -> int | None:
    run = engine.Run(args)

    # The data
    sources = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
    sources = {
        k: engine.demo_data(k, run) if root == "demo" else root for k, root in sources.items()
    }
    paths = {kind: omnimae.list_media(root, kind).paths for kind, root in sources.items()}
    sizes = {kind: len(files) for kind, files in paths.items()}
    views = {"images": args.image_views, "videos": args.video_views}
    how = {"views": views, "batch": args.batch_size, "epochs": args.epochs, "seed": args.seed}
    how |= {"rank": run.rank, "world": run.world, "micro": args.micro_batch}
    steps = Steps(sizes, **how)

    # The model
    ratios = {k: v for k, v in vars(args).items() if k.endswith("mask_ratio") and v is not None}
    cfg = replace(omnimae.MODELS[args.model], **ratios)
    for kind in sources:  # a ratio that masks none, or all, ends here
        omnimae.random_mask(1, *cfg.masking(kind), args.mask)
    torch.manual_seed(args.seed)
    model = start_from(args.init, args.model, cfg) if args.init else omnimae.OmniMAE(cfg)
    model.to(run.device)
    model.encoder.blocks.checkpointing = args.checkpoint_activations
    model.decoder.blocks.checkpointing = args.checkpoint_activations
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]  # biases and LayerNorm: no decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True,  # lr: at every step
    )  # fmt: skip
    if not args.benchmark:
        run.open(args, sizes, model, optimizer)
    if args.compile:
        model.compile(dynamic=False)  # once for images and once for clips
    parallel = run.parallel(model, args.compress_gradients)

    def update(batches: Iterator) -> torch.Tensor:
        """One optimiser step over `steps.accumulate` micro-batches: their mean loss."""
        total = torch.zeros((), device=run.device)
        for pixels, visible in run.micro_batches(batches, steps.accumulate, parallel):
            with run.autocast:
                loss = parallel(omnimae.normalize(pixels), visible)[0] / steps.accumulate
            run.scaler.scale(loss).backward()
            total += loss.detach()
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        return total

    dataset = Views(cfg, paths, args.seed, args.mask)
    if args.benchmark:
        samplers = {kind: Steps({kind: size}, **how) for kind, size in sizes.items()}
        return engine.benchmark(args, run, cfg, samplers, dataset, collate, update)
    rate = engine.matmul_rate(run)
    flops = {kind: engine.count_flops(model.cfg, kind) for kind in sizes}
    run.print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {run.dtype}, "
        f"{run.world} x {run.device.type} at {rate / 1e12:.2f} TFLOP/s in matrix products, "
        f"loader workers: {run.workers}\n{' and '.join(f'{n:,} {kind}' for kind, n in sizes.items())}: "
        f"{steps.total:,} steps of {args.batch_size} views in {args.epochs} epochs; see {run.out}/"
    )

    held_out = held_out_batches(cfg, sources, args.mask, run) if run.rank == 0 else {}
    steps.start = run.step
    run.begin(steps.total, rate)  # before workers are forked, which inherit what a signal does
    loader = engine.make_loader(dataset, steps, run.workers, run.device, collate)
    batches = engine.start_workers(loader)
    while run.step < steps.total and not run.stop:
        epoch, kind, _ = steps.at(run.step)
        lr = learning_rate(run.step, steps.total, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = update(batches)
        run.step += 1
        run.views += args.batch_size
        run.work += args.batch_size * flops[kind]

        last = run.step == steps.total
        log_now = run.step == 1 or run.step % args.log_every == 0 or last
        look_now = run.step % math.ceil(steps.total / 10) == 0 or last
        mean = run.agree(loss, args.batch_size // views[kind], log_now or look_now)
        if log_now:
            run.report(epoch, kind, mean, lr)
        if look_now:
            if run.rank == 0:
                show_held_out(model, held_out, run)
            run.begin_window()
        if run.stop or run.due or last:
            run.save(model, optimizer)
    if run.step < steps.total:
        run.print(f"stopped and saved after step {run.step:,}; the same command goes on from there")
        return run.signalled
    run.print(f"all {steps.total:,} steps are done: {run.out}/last.pt is the model")
    return None


if __name__ == "__main__":
    engine.run_script(main, parse_args)
