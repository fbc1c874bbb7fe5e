"""Pretrain OmniMAE on images and videos. The same command again resumes a run.

    torchrun train.py --model demo                                   minutes on a laptop's CPU
    torchrun --nproc_per_node=8 train.py --model vit_b --images /data/in1k --videos /data/ssv2

Read from the top: the recipe, `main` with the training loop, then what `main` calls: the steps and
their views, validation, the model and the size of its micro-batches, the run's folder, the
processes, and the files of a data set. Last come the options and the demo data set.

A view's random numbers depend only on (seed, epoch, file, view), the order of files only on (seed,
epoch). So a step's files, crops and masks do not depend on the number of processes, workers or
micro-batches, nor on a restart. On CPUs, a resumed run of one or two processes ends with the same
weights, bit for bit, as one never stopped. (More processes may add up gradients in another order.)

finetune.py and eval.py import from here. Parameters that `main` leaves at their defaults are for
them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

import omnimae
from omnimae import UserError, read_classes

# The recipe: the released configuration for ViT-B, except where a line says otherwise. (The mask
# ratios, and the frames and seconds of a clip, belong to a model: see `OmniMAEConfig`.)
# An epoch has as many views as there are files: each image once; of the videos a random quarter,
# four views each. What does not fill a batch is left out.
EPOCHS = 800  # the released checkpoints took 1600 (paper)
BATCH_SIZE = 2048  # views in a step, over all processes
LEARNING_RATE = 1.6e-3  # peak, for 2048 views; in proportion for other batches (this project)
FIRST_LEARNING_RATE = 1e-6
WARMUP = 0.05  # fraction of the steps in which the learning rate grows, linearly; then a cosine
BETAS = (0.9, 0.95)  # AdamW's
WEIGHT_DECAY = 0.05  # on matrices only, not on biases and LayerNorms
VIDEO_VIEWS = 4  # of one decoded clip, each with its own crop and mask
IMAGE_CROP = (0.2, 1.0)  # fraction of the area
VIDEO_CROP = (0.08, 1.0)
IMAGE_FLIP = 0.5  # probability; videos are never flipped: SSv2's labels name directions

# The demo model and the demo data set (this project)
DEMO_EPOCHS = 12
DEMO_BATCH_SIZE = 64
DEMO_LEARNING_RATE = 6e-4  # peak, for 64 views; only of the demo model

# Views that a GPU takes at once, unless --micro-batch says so. ViT-B needs 7 GB for 256 images and
# 13 GB for 64 clips (H200); larger micro-batches are no faster. On a CPU 64 clips would need 22 GB.
MICRO_BATCH = {"images": 256, "videos": 64}
CPU_MICRO_BATCH = 16
DEMO_MICRO_BATCH = 64  # of the demo model, on any device

KINDS = ("images", "videos")

# ------------------------------------------------------------------------------------------------
# Pretraining


def main(args: argparse.Namespace) -> None:
    ranks = Ranks(args.device)  # this process's number, the number of processes, and the device
    out = Path(args.out)

    # By kind: the data set's folder, the files to train on, and those held out, if there are any.
    roots, paths, held_out = find_files(args, ranks)

    # The model. Every rank draws the same weights, from the same seed.
    torch.manual_seed(args.seed)
    if args.init:
        model = ranks.first_then_others(load_init, args)
    else:
        model = omnimae.OmniMAE(config_of(args))
    cfg = model.cfg
    parallel = prepare(model, args, ranks)  # wrapped in DDP if there are several ranks
    autocast, scaler = precision(args.dtype, ranks.device, cfg)

    # The optimizer. Only matrices decay, the mask token among them, not biases and LayerNorms.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    # The steps. Each takes a batch of one kind, of which each rank trains on its share. A share is
    # cut into micro-batches for the device, and these into pieces for the loader's workers: see
    # `Cut`, below.
    num_files = {kind: len(paths[kind]) for kind in paths}
    views_per_file = {kind: args.video_views if kind == "videos" else 1 for kind in paths}
    cuts = cut_batch(args, num_files, views_per_file, MICRO_BATCH, cfg, ranks)
    steps = Steps(num_files, views_per_file, args.batch_size, args.epochs, args.seed)

    # Continue from last.pt, if there is one of the same recipe. (The recipe is made before: with
    # --init, it fingerprints the model's weights, which `resume` replaces.)
    recipe = recipe_of(args, model, paths, roots)
    states = {"model": model, "optimizer": optimizer, "scaler": scaler}
    resumed = resume(out, recipe, states, steps.total, args.resume_anyway, ranks)
    first_step = resumed.get("step", 0)

    # The log prints the recipe, and begins to measure the speed.
    log = Log(out, recipe, args.batch_size, first_step, steps.total, ranks)
    sizes = describe_cuts(cuts, views_per_file)
    ranks.say(f"{steps.total:,} steps of {args.batch_size} views, {sizes} at a time")
    ranks.say(f"log, pictures and last.pt: {out}/")
    ranks.say(f"a killed run loses at most {args.save_minutes:g} minutes (--save-minutes)")

    # The loader. Its workers read at least two micro-batches ahead.
    dataset = Views(cfg, paths, args.seed)
    pieces = steps.pieces(first_step, cuts, ranks)
    read_ahead = 2 * max(cut.pieces_per_micro_batch for cut in cuts.values())
    loader = iter(make_loader(dataset, args, ranks, pieces, read_ahead))

    # About ten times a run, validate: on held-out files or, if there are none, on training files.
    val_dataset = Views(cfg, paths | held_out, args.seed, centre_crop=True)
    validate_every = math.ceil(steps.total / 10)
    saved_at = time.monotonic()

    # The loader goes through the same steps in the same order: its next pieces are this step's. So
    # a step must not be skipped: all later ones would get the data of the one before.
    for step in range(first_step, steps.total):
        kind = steps.at(step).kind
        cut = cuts[kind]
        lr = learning_rate(step, steps.total, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward. The gradients of the micro-batches add up. DDP averages them over
        # the ranks once a step, with the last micro-batch.
        mean_loss = torch.zeros((), device=ranks.device)
        for i in range(cut.micro_batches):
            # uint8 (B, 3, H, W) or (B, 3, T, H, W), and the indices of the visible patches (B, V)
            with log.waiting():
                pixels, visible = join_pieces(loader, cut.pieces_per_micro_batch, ranks.device)
            x = omnimae.normalize(pixels)
            is_last_micro_batch = i == cut.micro_batches - 1
            parallel.require_backward_grad_sync = is_last_micro_batch  # ignored without DDP
            with autocast:
                loss, _, _ = parallel(x, visible)
            scaler.scale(loss / cut.micro_batches).backward()
            mean_loss += loss.detach() / cut.micro_batches

        # The update. (To clip gradients: scaler.unscale_(optimizer), then clip_grad_norm_, here. A
        # new option belongs in `recipe_of`.)
        scaler.step(optimizer)  # without float16, just optimizer.step()
        scaler.update()
        optimizer.zero_grad()

        # The log. All ranks take part: the loss is averaged over them.
        done = step + 1  # steps completed: the "step" of the log, of pictures and of last.pt
        is_last = done == steps.total
        if done == 1 or done % args.log_every == 0 or is_last:
            log.report(done, kind, mean_loss, lr, scaler)

        # Rank 0 alone decides when to save. Meanwhile the others wait in their next step, for its
        # gradients. It saves before it validates: a crash in validation costs no step.
        if ranks.rank == 0:
            validate_now = done % validate_every == 0 or is_last
            minutes = (time.monotonic() - saved_at) / 60
            if validate_now or minutes > args.save_minutes:
                save(out / "last.pt", done, recipe, states)
                saved_at = time.monotonic()
            if validate_now:
                validate(model, val_dataset, held_out, out, done, log, autocast)
                log.begin_interval(done)  # validation does not count in views/s

    ranks.close()
    ranks.say(f"done: {out}/last.pt; reconstructions in {out}/pictures/. Next:")
    for kind in paths:
        options = ["--checkpoint", f"{out}/last.pt", f"--{kind}", getattr(args, kind)]
        ranks.say(f"torchrun finetune.py {shlex.join(options)}")


# ------------------------------------------------------------------------------------------------
# The steps: which kind and which files, when


class Step(NamedTuple):
    kind: str
    epoch: int
    files: np.ndarray  # indices of the batch's files, for all ranks


class Sample(NamedTuple):
    """What a worker reads: one file."""

    kind: str
    epoch: int
    index: int  # of the file
    views: int  # how many to crop from it


class Cut(NamedTuple):
    """How a rank's share of a step is cut into micro-batches, of as many views as its device holds,
    and a micro-batch into pieces, which the loader's workers read. Each piece takes a worker about
    the same time, so none holds up the others. With ViT-B on 8 GPUs and batches of 2048 views:

                  a share                  a micro-batch            a piece
        images    256 files, 256 views     256 files, 256 views     32 files, 32 views
        videos    64 files, 256 views      16 files, 64 views       1 file, 4 views
    """

    micro_batches: int  # in a share
    pieces_per_micro_batch: int
    files_per_piece: int


class Steps:
    """The steps of a run. Each takes one batch of views, all of images or all of videos. In an
    epoch a kind gets as many views as it has files (a quarter of the videos, with 4 views each),
    less what does not fill a batch."""

    def __init__(self, num_files: dict, views_per_file: dict, batch_size: int, epochs: int, seed):
        self.num_files = num_files  # by kind
        self.views_per_file = views_per_file  # by kind
        self.batch_size = batch_size
        self.seed = seed
        # The batch may be larger than the number of videos, which have several views each. Then an
        # epoch has one step.
        self.steps_of_kind = {kind: max(1, num // batch_size) for kind, num in num_files.items()}
        self.per_epoch = sum(self.steps_of_kind.values())
        self.total = epochs * self.per_epoch

    @functools.lru_cache(maxsize=2)  # the loader is a few steps ahead of the loop
    def of_epoch(self, epoch: int) -> list[Step]:
        """The steps of an epoch. Files and steps are shuffled: kinds take turns in random order,
        the same on every rank."""
        steps = []
        for kind, num in self.num_files.items():
            rng = np.random.default_rng((self.seed, epoch, 1 + KINDS.index(kind)))
            shuffled = rng.permutation(num)
            size = self.batch_size // self.views_per_file[kind]  # files in a step
            for i in range(self.steps_of_kind[kind]):
                steps.append(Step(kind, epoch, shuffled[i * size : (i + 1) * size]))
        rng = np.random.default_rng((self.seed, epoch, 0))
        return [steps[i] for i in rng.permutation(len(steps))]

    def at(self, step: int) -> Step:
        """What a step takes."""
        epoch, i = divmod(step, self.per_epoch)
        return self.of_epoch(epoch)[i]

    def pieces(self, first_step: int, cuts: dict[str, Cut], ranks: Ranks) -> Iterator[list[Sample]]:
        """What this rank's loader reads, a piece at a time: the rank's share of each step."""
        for step in range(first_step, self.total):
            kind, epoch, files = self.at(step)
            share = files.reshape(ranks.world, -1)[ranks.rank]  # instead of a DistributedSampler
            for piece in share.reshape(-1, cuts[kind].files_per_piece).tolist():
                yield [Sample(kind, epoch, index, self.views_per_file[kind]) for index in piece]


# ------------------------------------------------------------------------------------------------
# Views, the random crops of a file that a step trains on, and their loader


class Views(Dataset):
    """Views of files, each with a random mask: random crops, or centre crops for `validate`."""

    def __init__(self, cfg: omnimae.OmniMAEConfig, paths: dict, seed: int, centre_crop=False):
        self.cfg = cfg
        self.seed = seed
        # arrays: the reference counts of a list would make each worker copy its million strings
        self.paths = {kind: np.array([os.fsencode(x) for x in paths[kind]]) for kind in paths}

        size = cfg.image_size
        bicubic = v2.InterpolationMode.BICUBIC
        image_crop = v2.RandomResizedCrop(size, IMAGE_CROP, interpolation=bicubic)
        video_crop = v2.RandomResizedCrop(size, VIDEO_CROP)  # bilinear
        self.crops = {
            "images": v2.Compose([image_crop, v2.RandomHorizontalFlip(IMAGE_FLIP)]),
            "videos": video_crop,
        }
        if centre_crop:
            self.crops = dict.fromkeys(KINDS, v2.Compose([v2.Resize(size), v2.CenterCrop(size)]))

    def read(self, sample: Sample) -> tuple[Tensor, int]:
        """A file's pixels, uint8 (3, H, W) or (T, 3, H, W), and its index (for a label). Names an
        unreadable file, and reads a random one instead. UserError after twenty."""
        kind, epoch, wanted, _ = sample
        for attempt in range(20):
            # The fifth number is 0 for the choice of file and clip, and 1 + view for a view. The
            # sixth is the attempt.
            seed_all(self.seed, epoch, wanted, KINDS.index(kind), 0, attempt)
            index = wanted
            if attempt > 0:
                index = int(torch.randint(len(self.paths[kind]), ()))
            path = os.fsdecode(self.paths[kind][index])
            try:
                if kind == "images":
                    return omnimae.read_image(path), index
                start = torch.rand(1).tolist()
                clips = omnimae.read_clips(path, start, self.cfg.num_frames, self.cfg.clip_seconds)
                return clips[0], index
            except UserError as error:
                print(error, file=sys.stderr, flush=True)
        raise UserError(f"20 {kind} in a row could not be read: see the messages above")

    def __getitem__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (views, 3, [T,] H, W), and the indices of visible patches (views, V)."""
        media, _ = self.read(sample)
        N, ratio = self.cfg.masking(sample.kind)
        pixels = []
        visible = []
        for view in range(sample.views):
            seed_all(self.seed, sample.epoch, sample.index, KINDS.index(sample.kind), 1 + view)
            pixels.append(self.crops[sample.kind](media).movedim(-3, 0))  # (3, [T,] H, W)
            mask = omnimae.random_mask(1, N, ratio)  # (1, N)
            visible.append(omnimae.visible_indices(mask)[0])  # (V,)
        return torch.stack(pixels), torch.stack(visible)


def seed_all(*key: int) -> None:
    """Seeds PyTorch, so that what is drawn from here on depends on `key` only."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than a crop
    if torch.cuda.is_initialized():  # not in a worker
        torch.cuda.manual_seed(seed)


def make_loader(
    dataset, args, ranks: Ranks, batch_sampler, read_ahead: int, collate_fn=default_collate
) -> DataLoader:
    """Reads what `batch_sampler` lists, in its order, in worker processes. Each of them has at
    least two pieces under way, and all together at least `read_ahead`."""

    def ignore_interrupts(_):  # Ctrl-C reaches every process; the main one ends its workers
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    options = {}
    if args.workers:
        options["multiprocessing_context"] = "fork"
        options["persistent_workers"] = True
        options["prefetch_factor"] = max(2, math.ceil(read_ahead / args.workers))
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=args.workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=ranks.device.type == "cuda",
        **options,
    )


def join_pieces(loader: Iterator, num: int, device: torch.device) -> list[Tensor]:
    """A micro-batch, joined from the loader's next `num` pieces: what the dataset returns, here
    `Views`, as tensors (B, ...). They are joined on the device: copying from the loader's pinned
    memory does not wait."""
    parts = []
    for _ in range(num):
        piece = [x.to(device, non_blocking=True) for x in next(loader)]
        parts.append([x.flatten(0, 1) for x in piece])  # (files, views, ...) -> (files views, ...)
    return [torch.cat(tensors) for tensors in zip(*parts)]


# ------------------------------------------------------------------------------------------------
# The learning rate, and validation


def learning_rate(step: int, total: int, peak: float, end=0.0, warmup=WARMUP) -> float:
    """Grows linearly over the first `warmup` of the steps, then falls as a cosine to `end`."""
    progress = step / total
    if progress < warmup:
        return FIRST_LEARNING_RATE + (peak - FIRST_LEARNING_RATE) * progress / warmup
    cosine = math.cos(math.pi * (progress - warmup) / (1 - warmup))  # from 1 to -1
    return end + (peak - end) * 0.5 * (1 + cosine)


@torch.compiler.set_stance("force_eager")  # batches of other sizes are not worth compiling for
@torch.no_grad()
def validate(model: omnimae.OmniMAE, dataset: Views, held_out, out: Path, step, log: Log, autocast):
    """Logs the loss of up to 32 files of each kind, also as a fraction of the loss of predicting
    zero, and draws the first file. Files that cannot be read do not end the run."""
    for kind, paths in dataset.paths.items():
        indices = np.linspace(0, len(paths) - 1, min(32, len(paths))).astype(int).tolist()
        try:
            views = [dataset[Sample(kind, 0, index, 1)] for index in indices]  # always the same
            pixels, visible = [torch.cat(tensors).to(log.ranks.device) for tensors in zip(*views)]
            x = omnimae.normalize(pixels)
            with autocast:
                loss, _, mask = model(x, visible)
                picture = omnimae.draw_reconstruction(model, x[0], mask[0])
            (out / "pictures").mkdir(exist_ok=True)
            picture.save(out / "pictures" / f"{kind}_{step:06d}.png")
        except (UserError, OSError) as error:
            print(f"no validation on {kind}: {error}", file=sys.stderr, flush=True)
            continue

        patches, _ = omnimae.to_patches(x, model.cfg)  # (B, N, P)
        masked = omnimae.to_pixels(patches[mask][None])  # (1, B M, P)
        target, _, _ = omnimae.normalize_patches(masked)
        val_loss = loss.item()
        zero_loss = target.square().mean().item()

        label = f"{'val' if kind in held_out else 'train'} {kind}"
        ratio = val_loss / max(zero_loss, 1e-6)  # of flat pictures it is 0
        text = f"{label}  loss {val_loss:.3f}, {ratio:.2f} times that of predicting zero"
        log.say(text, step, label=label, val_loss=val_loss, zero_loss=zero_loss)


# ------------------------------------------------------------------------------------------------
# The model, its precision, and the sizes of micro-batches

MODEL_OPTIONS = ("image_mask_ratio", "video_mask_ratio", "clip_seconds")  # of `OmniMAEConfig`


def config_of(args: argparse.Namespace) -> omnimae.OmniMAEConfig:
    """The sizes of --model, with the options given."""
    given = {name: getattr(args, name) for name in MODEL_OPTIONS if getattr(args, name) is not None}
    return replace(omnimae.MODELS[args.model], **given)


def load_init(args: argparse.Namespace) -> omnimae.OmniMAE:
    """The model of --init, with the run's mask ratios. It keeps its own `clip_seconds`, unless
    others are given. UserError for a model of another size, or one without a decoder."""
    model = omnimae.load_checkpoint(args.init).train()
    cfg = replace(config_of(args), decoder_qkv_bias=model.cfg.decoder_qkv_bias)
    if args.clip_seconds is None:
        cfg = replace(cfg, clip_seconds=model.cfg.clip_seconds)

    options = {name: getattr(cfg, name) for name in MODEL_OPTIONS}  # these may differ
    if not isinstance(model, omnimae.OmniMAE) or replace(model.cfg, **options) != cfg:
        raise UserError(f"{args.init}: expected a pretraining checkpoint of the size of --model")
    model.cfg = cfg
    return model


def prepare(model: nn.Module, args: argparse.Namespace, ranks: Ranks) -> nn.Module:
    """Moves the model to the device. Returns the module to call in training: with several ranks it
    is wrapped in DDP, which averages their gradients."""
    model.to(ranks.device)
    if args.checkpoint_activations:  # compute a block's activations again in the backward pass
        for block in model.modules():
            if isinstance(block, omnimae.Block):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if args.compile:
        model.compile(dynamic=False)  # it compiles once for images and once for videos
    if ranks.world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # they are constant; as an argument it is deprecated
    return model


def precision(dtype: str | None, device: torch.device, cfg: omnimae.OmniMAEConfig) -> tuple:
    """Autocast and gradient scaler. The default is bfloat16, or float16 on GPUs without it; float32
    for the demo model, and on CPUs without bfloat16 instructions, on which it is slower."""
    # A private function, because the public one, torch.cpu.get_capabilities, is too new.
    is_slow = device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    if dtype is None:
        if is_slow or is_demo_size(cfg):
            dtype = "float32"
        elif device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            dtype = "float16"
        else:
            dtype = "bfloat16"
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == "float16")


def is_demo_size(cfg: omnimae.OmniMAEConfig) -> bool:
    """Whether a model is of the demo's kind, for laptops."""
    return cfg.dim < 256


def cut_batch(
    args, num_files: dict, views_per_file: dict, limits: dict, cfg, ranks: Ranks
) -> dict[str, Cut]:
    """How a rank's share of a step is cut into micro-batches, and these into pieces, by kind.

    A micro-batch has --micro-batch views if given, else the largest divisor of the share up to the
    limit. UserError for a batch that does not divide, or is larger than a data set.
    """
    check_batch(args, num_files, views_per_file, ranks.world)
    cuts = {}
    for kind in num_files:
        limit = limits[kind]
        if is_demo_size(cfg):
            limit = DEMO_MICRO_BATCH
        elif ranks.device.type == "cpu":
            limit = min(limit, CPU_MICRO_BATCH)
        views = views_per_file[kind]
        share = args.batch_size // ranks.world // views  # files of a rank in a step
        if args.micro_batch:
            files = args.micro_batch // views
        else:
            at_most = max(1, limit // views)
            files = max(num for num in range(1, at_most + 1) if share % num == 0)

        # Workers take turns, so one with much to read would hold up the others: 32 images or one
        # video take about 70 ms. The demo's files are so small that handing them over counts more.
        files_per_piece = math.gcd(32, files) if kind == "images" else 1
        if is_demo_size(cfg):
            files_per_piece = files
        cuts[kind] = Cut(
            micro_batches=share // files,
            pieces_per_micro_batch=files // files_per_piece,
            files_per_piece=files_per_piece,
        )
    return cuts


def describe_cuts(cuts: dict[str, Cut], views_per_file: dict[str, int]) -> str:
    """Says how many views a micro-batch has. (Views of a video are clips.)"""
    nouns = {"images": "images", "videos": "clips"}
    parts = []
    for kind, cut in cuts.items():
        files = cut.pieces_per_micro_batch * cut.files_per_piece
        parts.append(f"{files * views_per_file[kind]} {nouns[kind]}")
    return " or ".join(parts)


def check_batch(args, num_files: dict, views_per_file: dict, world: int) -> None:
    """UserError for a --batch-size that does not fit, which names the largest one that does."""
    unit = world  # what the batch must be a multiple of
    for views in views_per_file.values():
        if args.micro_batch and args.micro_batch % views:
            raise UserError(f"--micro-batch {args.micro_batch} must be a multiple of {views} views")
        unit = math.lcm(unit, world * (args.micro_batch or views))
    at_most = min(num_files[kind] * views_per_file[kind] for kind in num_files)
    if args.batch_size % unit == 0 and args.batch_size <= at_most:
        return

    found = " and ".join(f"{num:,} {kind}" for kind, num in num_files.items())
    largest = min(args.batch_size, at_most) // unit * unit
    raise UserError(
        f"--batch-size {args.batch_size} does not fit: expected a multiple of {unit} (processes x "
        f"views at once), and at most {at_most} for {found}; "
        + (f"the largest that fits is {largest}" if largest else "none fits")
    )


# ------------------------------------------------------------------------------------------------
# A run's folder: last.pt and log.jsonl, which rank 0 writes


def recipe_of(args: argparse.Namespace, model: omnimae.OmniMAE, paths: dict, roots: dict) -> dict:
    """What a resumed run must have in common with the one in its folder: the options that matter,
    the files, and the model that it starts from. (The constants at the top are not compared.)"""
    recipe = {name: getattr(args, name) for name in ("model", "epochs", "batch_size", "lr", "seed")}
    recipe |= {name: getattr(model.cfg, name) for name in MODEL_OPTIONS}
    recipe |= {"video_views": args.video_views, "init": fingerprint_of_start(args.init, model)}
    return recipe | {kind: fingerprint_of_files(paths[kind], roots[kind]) for kind in paths}


def fingerprint_of_start(name: str | None, model: nn.Module) -> str | None:
    """Tells checkpoints of one name apart, by their step and by a few of each tensor's weights."""
    if name is None:
        return None
    step = omnimae.read_checkpoint(name).get("step", "unknown")
    some = [x.detach().flatten()[:16].cpu().numpy().tobytes() for x in model.parameters()]
    return f"{name} (step {step}, {fingerprint(b''.join(some))})"


def fingerprint_of_files(paths: list[str], root: str) -> str:
    """Tells data sets apart by the names of their files."""
    prefix = os.path.join(Path(root), "")
    names = "\n".join(os.fspath(path).removeprefix(prefix) for path in paths)
    return f"{len(paths)} files ({fingerprint(os.fsencode(names))})"


def fingerprint(content: bytes) -> str:
    """Eight hex digits that differ where the content does."""
    return hashlib.sha256(content).hexdigest()[:8]


def resume(
    out: Path, recipe: dict, states: dict, total_steps: int, anyway: bool, ranks: Ranks
) -> dict:
    """Continues from the folder's last.pt, if there is one. Returns its "step" and "recipe" and, in
    finetuning, its "best" accuracy; {} for a new run.

    `states` are the model, the optimizer and the scaler, which take over what the file holds.
    UserError if the run in the folder had another recipe, unless `anyway`; or with it, if no step
    is left.
    """
    path = out / "last.pt"
    out.mkdir(parents=True, exist_ok=True)
    file = omnimae.read_checkpoint(path) if path.exists() else {}

    # If all ranks have the same step and recipe, each sum is this rank's value times the number of
    # ranks. (Two machines may have different files under one name.)
    step = file.get("step", 0)
    recipe_hash = int(fingerprint(repr(recipe).encode()), 16)
    if ranks.sum(step, recipe_hash) != [step * ranks.world, recipe_hash * ranks.world]:
        raise UserError(f"the machines disagree about {path}, the data's files or the recipe")
    if not file:
        return {}

    # The recipe must be the same, or what changes is named.
    old = file.get("recipe", {})
    changed = [name for name in {**old, **recipe} if old.get(name) != recipe.get(name)]
    changes = ", ".join(f"{name} {old.get(name)} -> {recipe.get(name)}" for name in changed)
    if changed and not anyway:
        raise UserError(
            f"{path} is of a run with another recipe: {changes}. Give another --out, or continue "
            "it with the new values: --resume-anyway"
        )

    if changed and step >= total_steps:
        raise UserError(f"{path} is at step {step}, and this run would end at step {total_steps}")

    # An optimizer's state also holds the old options (weight decay, betas): the new ones stay.
    optimizer = states["optimizer"]
    new_options = [dict(group) for group in optimizer.param_groups]
    with omnimae.naming_errors(path, "does not fit this run"):
        for name, state in states.items():
            if file[name]:  # empty: that of a scaler that was off
                state.load_state_dict(file[name])
    for group, options in zip(optimizer.param_groups, new_options):
        group.update({name: value for name, value in options.items() if name != "params"})

    ranks.say(f"resuming {out} after step {step}" + (f" with {changes}" if changed else ""))
    return {name: file[name] for name in ("step", "recipe", "best") if name in file}


def save(path: Path, step: int, recipe: dict, states: dict, **more) -> None:
    """Saves a checkpoint atomically: a killed run leaves the old file or the new one. UserError if
    a weight is not finite; OSError, with the old file in place, if the disk is full."""
    model = states["model"]
    if not all(weights.isfinite().all() for weights in model.parameters()):
        raise UserError(
            f"the weights of step {step} are not finite, and not saved: try a lower --lr"
        )

    content = {name: state.state_dict() for name, state in states.items()}
    content |= {"config": asdict(model.cfg), "recipe": recipe, "step": step, **more}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # On the way out PyTorch closes its archive, which raises again and hides the first error,
        # such as that of a full disk: find it.
        while error.__context__ is not None:
            error = error.__context__
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise error from None


class Log:
    """The lines that a run prints and those in log.jsonl, both from rank 0, with its speed."""

    def __init__(self, out: Path, recipe: dict, batch_size, first_step, total_steps, ranks: Ranks):
        self.path = out / "log.jsonl"
        self.batch_size = batch_size
        self.first_step = first_step
        self.total_steps = total_steps
        self.ranks = ranks
        self.began = time.monotonic()
        # Speed is measured from one line to the next.
        self.interval_began = time.monotonic()
        self.interval_step = first_step
        self.waited = 0.0  # for data, in seconds

        options = ", ".join(f"{name}={value}" for name, value in recipe.items())
        ranks.say(wrap(f"recipe: {options}"))
        self.write(first_step, recipe=recipe)

    def write(self, step: int, **line) -> None:
        """Adds a line to log.jsonl. After a resume, the steps since the last save appear twice."""
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None  # JSON has no NaN
        if self.ranks.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step} | line) + "\n")

    def say(self, text: str, step: int, **line) -> None:
        """Prints a step's text, and adds `line` to log.jsonl."""
        self.ranks.say(f"step {step:6d}  {text}")
        self.write(step, **line)

    def begin_interval(self, step: int) -> None:
        self.interval_began = time.monotonic()
        self.interval_step = step
        self.waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in its block as waiting for data."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def report(self, step: int, label: str, loss: Tensor, lr: float, scaler) -> None:
        """Logs a step: its loss over all ranks, and the speed since the last line. UserError if the
        loss is not finite, except in float16 while the scaler still skips such steps."""
        loss = self.ranks.sum(loss.item())[0] / self.ranks.world  # a GPU sync
        # A float16 gradient that overflows is skipped, and the scale halved. Under 1 it is lost.
        may_skip = scaler.is_enabled() and scaler.get_scale() >= 1
        if not math.isfinite(loss) and not may_skip:
            raise UserError(f"the loss of step {step} is {loss}: try a lower --lr")

        now = time.monotonic()
        seconds = now - self.interval_began
        views_per_second = (step - self.interval_step) * self.batch_size / seconds
        wait = self.waited / seconds
        # Unlike views/s, the time left includes validation.
        seconds_a_step = (now - self.began) / (step - self.first_step)
        left = time_left(seconds_a_step * (self.total_steps - step))
        self.say(
            f"{label}  loss {loss:.3f}  lr {lr:.1e}  {views_per_second:.0f} views/s  "
            f"wait {wait:.0%}  {left} left",
            step,
            label=label,
            loss=loss,
            lr=lr,
            views_per_second=views_per_second,
            wait=wait,
            gpu_memory_bytes=torch.cuda.max_memory_allocated(),
        )
        self.begin_interval(step)


def time_left(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.0f} h"


# ------------------------------------------------------------------------------------------------
# This process and the others


class Ranks:
    """This process among those that torchrun started. Without torchrun there is rank 0 only."""

    # What `sum` sums. gloo's thread lets go of it a little after `all_reduce` has returned. To do
    # so, it needs the GIL if no reference is left, in new versions of torch also if only Python's
    # is. If it waits for the GIL while the main thread holds it, and forks or joins gloo's thread
    # (as DDP does when it is freed), the process hangs. So neither the tensor nor a view of it,
    # which refers to the tensor from C++, is ever freed.
    numbers = torch.zeros(4, dtype=torch.float64)
    view_of_numbers = numbers[:]

    def __init__(self, device: str | None):
        check_launch()
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"no GPU for process {self.local_rank}, this machine has "
                    f"{torch.cuda.device_count()}: start one for each GPU, or give --device cpu"
                )
            torch.cuda.set_device(self.local_rank)
        if self.world > 1:
            join_group(self.rank, self.world, self.device)

    def say(self, text: str) -> None:
        """Prints on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Sums up to four numbers over all ranks, on the host: no GPU sync. A call waits until all
        ranks have made it."""
        self.numbers.zero_()
        self.numbers[: len(values)] = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(self.numbers)
        return self.numbers[: len(values)].tolist()

    def first_then_others(self, get, *args):
        """Calls `get` on the first rank of each machine, then on the others: it may write files."""
        if self.local_rank == 0:
            result = get(*args)
        self.wait()
        if self.local_rank != 0:
            result = get(*args)
        return result

    def wait(self) -> None:
        """Waits until all ranks are here."""
        self.sum(0)

    def close(self) -> None:
        """Waits for all ranks, rank 0 with its last save among them, and ends the process group."""
        self.wait()
        if self.world > 1:
            dist.destroy_process_group()


def join_group(rank: int, world: int, device: torch.device) -> None:
    """Joins the process group of torchrun's processes."""
    store, _, _ = next(dist.rendezvous("env://"))
    if world == int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
        # On one machine, torchrun restarts a run with the same store. A prefix of its own keeps it
        # from reading the addresses of the attempt before.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"restart {restarts}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def check_launch() -> None:
    """UserError if a cluster started several processes without torchrun: each would be a run of
    its own, in the same folder."""
    tasks = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE")
    if "SLURM_PROCID" in os.environ:  # srun; a shell of salloc has only the other
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS")
    if "RANK" not in os.environ and int(tasks or 1) > 1:
        raise UserError(
            f"this is one of {tasks} tasks that do not know of each other: start one torchrun on "
            "each machine, which starts the processes (Slurm: --ntasks-per-node=1, srun torchrun)"
        )


# ------------------------------------------------------------------------------------------------
# The files of a data set, as people download it


class Listing(NamedTuple):
    """Files, sorted by class. In a flat folder they have no labels and no classes."""

    paths: list[str]
    labels: list[int] | None
    classes: list[str] | None


# What the folder of a validation split may be called, the first that there is.
SPLIT_NAMES = ["val", "valid", "validation", "test"]

# What Pillow and FFmpeg read, as the end of a file name.
SUFFIXES = {
    "images": tuple(
        ".apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga "
        ".tif .tiff .webp".split()
    ),
    "videos": tuple(
        ".3g2 .3gp .asf .avi .divx .f4v .flv .m2ts .m4v .mkv .mov .mp4 .mpe .mpeg .mpg .mts .mxf "
        ".ogm .ogv .qt .ts .vob .webm .wmv".split()
    ),
}


def find_files(args: argparse.Namespace, ranks: Ranks) -> tuple[dict, dict, dict]:
    """By kind: the folder of the data set, its training files and, if it has a validation split,
    the files of that. Says what was found."""
    roots = {}
    paths = {}
    held_out = {}
    for kind in KINDS:
        name = getattr(args, kind)
        if not name:
            continue
        roots[kind] = data_root(name, kind, ranks)
        listing = list_media(roots[kind], kind)
        paths[kind] = listing.paths
        describe(listing, kind, roots[kind], ranks)
        if validation_split(roots[kind], kind) is not None:
            held_out[kind] = list_media(roots[kind], kind, "val").paths
            ranks.say(f"held out for validation: {len(held_out[kind]):,} {kind}")
    return roots, paths, held_out


def data_root(name: str, kind: str, ranks: Ranks) -> str:
    """A data set's folder; for "demo" the demo's, written on first use."""
    if name != "demo":
        return name
    ranks.first_then_others(write_demo_data, "demo_data")
    return f"demo_data/{kind}"


def list_media(root: str | os.PathLike, kind: str, split: str = "train") -> Listing:
    """Lists the "images" or "videos" of a data set's "train" or "val" split, in a fixed order.

    Layouts: ImageNet (train/<class>/*, val/<class>/*), SSv2 (labels/*.json and
    20bn-something-something-v2/*), any folder of class folders, a flat folder without labels. Class
    folders are numbered in order. UserError for anything else.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a folder of {kind}")
    val_split = validation_split(root, kind)
    if split == "val" and val_split is None:
        raise UserError(f"{root}: no validation split; expected a folder val/ in it")
    if is_ssv2(root, kind):
        return list_ssv2(root, "train" if split == "train" else val_split)
    if split == "val":
        return list_folder(root / val_split, kind)
    if (root / "train").is_dir():
        listing = list_folder(root / "train", kind)
        if listing.labels is None:
            check_train_is_no_class(root, kind)
        return listing
    return list_folder(root, kind, val_split)


def check_train_is_no_class(root: Path, kind: str) -> None:
    """UserError if train/ seems to be one class folder among others: a train on rails."""
    for name in sorted(os.listdir(root)):
        is_split = name in ("train", *SPLIT_NAMES)
        if not is_split and (root / name).is_dir() and media_in(root / name, kind):
            raise UserError(
                f"{root}: both train/ and {name}/ have {kind} in them: if train is a class, give "
                f"its folder another name, or put all class folders into {root}/train"
            )


def validation_split(root: str | os.PathLike, kind: str) -> str | None:
    """What a data set calls the files that it holds out, or None. Other names than val/ count only
    beside train/: without it, such a folder may be a class."""
    root = Path(root)
    if is_ssv2(root, kind):
        return "validation"
    names = SPLIT_NAMES if (root / "train").is_dir() else ["val"]
    return next((name for name in names if (root / name).is_dir()), None)


def is_ssv2(root: Path, kind: str) -> bool:
    """Whether a folder has SSv2's lists. UserError for those of its first release."""
    labels = root / "labels"
    if kind != "videos" or not labels.is_dir():
        return False
    other = sorted(path.name for path in labels.glob("*labels.json"))
    if other and not (labels / "labels.json").exists():
        raise UserError(
            f"{labels}: expected labels/labels.json, train.json and validation.json, as SSv2 is "
            f"released now; found {other[0]}. Give the three files these names"
        )
    return (labels / "labels.json").exists()


def list_ssv2(root: Path, split: str) -> Listing:
    """SSv2's files: "train" or "validation". They may have been converted, say to .mp4."""
    classes = read_classes(root / "labels" / "labels.json")
    index = {name: i for i, name in enumerate(classes)}  # names are templates without brackets
    folder = root / "20bn-something-something-v2"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected SSv2's videos in it")
    by_id = {Path(path).stem: path for path in media_in(folder, "videos")}

    path = root / "labels" / f"{split}.json"
    paths = []
    labels = []
    with omnimae.naming_errors(path):
        for sample in json.loads(path.read_bytes()):
            paths.append(by_id.get(sample["id"], f"{folder}/{sample['id']}.webm"))
            labels.append(index[sample["template"].replace("[", "").replace("]", "")])
        if not paths:
            raise UserError("no videos in it")
    return Listing(paths, labels, classes)


def list_folder(folder: Path, kind: str, val_split: str | None = None) -> Listing:
    """The files in a flat folder, or in its class folders, `val_split` not among them."""
    flat = media_in(folder, kind)
    classes = {}
    for name in sorted(os.listdir(folder)):
        if (folder / name).is_dir() and not name.startswith(".") and name != val_split:
            classes[name] = media_in(folder / name, kind)

    empty = [name for name, paths in classes.items() if not paths]
    if flat and len(empty) == len(classes):
        return Listing(flat, None, None)
    if flat or empty or not classes:
        skipped = count_skipped([str(folder), *(str(folder / name) for name in classes)], kind)
        raise UserError(
            f"{folder}: expected {kind} in it, or in every one of its class folders; found "
            f"{len(flat)} in it, and none in these folders: {', '.join(empty[:5]) or '-'}{skipped}"
        )
    paths = [path for name in classes for path in classes[name]]
    labels = [label for label, name in enumerate(classes) for _ in classes[name]]
    return Listing(paths, labels, list(classes))


def media_in(folder: Path, kind: str) -> list[str]:
    names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    return [os.path.join(folder, name) for name in names if name.lower().endswith(SUFFIXES[kind])]


def count_skipped(folders: list[str], kind: str) -> str:
    """Says what is skipped in some folders: files whose suffix is not of a kind, and sub-folders
    that are not among `folders` themselves."""
    skipped = Counter()
    for folder in folders:
        for entry in os.scandir(folder):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if not entry.is_dir() and suffix not in SUFFIXES[kind]:
                skipped[suffix or "no suffix"] += 1
            if entry.is_dir() and entry.path not in folders and entry.name not in SPLIT_NAMES:
                skipped["folders"] += 1
    if not skipped:
        return ""
    common = ", ".join(f"{what} {num:,}" for what, num in skipped.most_common(5))
    return f"; {skipped.total():,} skipped ({common})"


def describe(listing: Listing, kind: str, root: str, ranks: Ranks) -> None:
    """Says how many files of which classes were found in a folder, and how many were skipped."""
    if ranks.rank > 0:  # counting skipped files reads all folders again
        return
    text = f"{root}: {len(listing.paths):,} {kind}"
    if listing.classes:
        num = np.bincount(listing.labels, minlength=len(listing.classes))
        fewest = num.min()
        most = num.max()
        text += f" of {len(num):,} classes, {listing.classes[0]!r} to {listing.classes[-1]!r}, "
        text += f"{fewest:,} each" if fewest == most else f"{fewest:,} to {most:,} each"
    text += count_skipped(sorted({os.path.dirname(path) for path in listing.paths}), kind)
    ranks.say(wrap(text))


def wrap(text: str) -> str:
    """Breaks a text into lines of 80 columns, but not the names in it."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 80, subsequent_indent="  ", **options)


# ------------------------------------------------------------------------------------------------
# Options, and errors


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Pretraining's options, with the defaults of the recipe filled in."""
    usage = "torchrun %(prog)s [--model M] [--images DIR] [--videos DIR] [options]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(omnimae.MODELS), default="vit_b", help="default: vit_b")
    add("--images", type=non_empty, help="folder of images, or 'demo'")
    add("--videos", type=non_empty, help="folder of videos, or 'demo' (without either: both demo)")
    add("--out", type=non_empty, help="folder of the run (default: runs/MODEL)")
    add("--init", type=non_empty, help="pretraining checkpoint to start from: name, URL or path")
    add("--epochs", type=positive_int, help=f"default: {EPOCHS}; demo model or data {DEMO_EPOCHS}")
    add("--batch-size", type=positive_int, help=f"in views ({BATCH_SIZE}; demo {DEMO_BATCH_SIZE})")
    add("--lr", type=positive_float, help="peak (default: in proportion to the batch)")
    add("--video-views", type=positive_int, default=VIDEO_VIEWS, help="of a video (%(default)s)")
    add("--image-mask-ratio", type=fraction, help="default: 0.90; demo model 0.75")
    add("--video-mask-ratio", type=fraction, help="default: 0.95; demo model 0.90")
    add_shared_options(parser)
    add_training_options(parser)
    args = parser.parse_args(argv)

    if not (args.images or args.videos):
        args.images = args.videos = "demo"
    is_demo = "demo" in (args.model, args.images, args.videos)
    args.epochs = args.epochs or (DEMO_EPOCHS if is_demo else EPOCHS)
    args.batch_size = args.batch_size or (DEMO_BATCH_SIZE if is_demo else BATCH_SIZE)
    lr_of_a_view = LEARNING_RATE / BATCH_SIZE
    if args.model == "demo":
        lr_of_a_view = DEMO_LEARNING_RATE / DEMO_BATCH_SIZE
    args.lr = args.lr or lr_of_a_view * args.batch_size
    args.out = args.out or f"runs/{args.model}"
    return args


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of autocast (see README)")
    workers = default_workers()
    add("--workers", type=int_from_zero, default=workers, help="loader processes (%(default)s)")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=int_from_zero, default=0, help="seeds everything random (default: 0)")
    add("--micro-batch", type=positive_int, help="views at once per process (default: see README)")
    add("--clip-seconds", type=positive_float, help="length of a clip (default: the model's, 2.7)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more FLOPs")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--log-every", type=positive_int, default=10, help="steps between log lines (default: 10)")
    add("--save-minutes", type=float_from_zero, default=10, help="between saves (default: 10)")
    add("--resume-anyway", action="store_true", help="resume with another recipe than before")


def default_workers() -> int:
    """A process's CPU cores, less one for itself; at most 16. (README, Speed, says how many a GPU
    needs.)"""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS
        cores = os.cpu_count()
    cores = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, cores - 1))


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def int_from_zero(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return int(text)


def positive_float(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return float(text)


def float_from_zero(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more, and less than 1")
    return float(text)


def non_empty(text: str) -> str:
    if not text:  # such as "$DATA" where DATA is not set
        raise argparse.ArgumentTypeError("expected a name, got an empty one")
    return text


def run_script(main, parse_args) -> None:
    """Runs a script. Errors that its user can correct are printed as one line; others keep their
    traceback."""
    args = parse_args()
    script = sys.argv[0]
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no valid text
    try:
        main(args)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            is_run = hasattr(args, "resume_anyway")
            advice = "; the same command continues from the last save" if is_run else ""
            print(f"\n{script}: interrupted{advice}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = sentence_about(error, args)
        if sentence is None:
            raise
        sys.exit(f"{script}: {sentence}")


def sentence_about(error: Exception, args: argparse.Namespace) -> str | None:
    """What to tell a user about an error, or None if it is a mistake in the code."""
    message = f"{type(error).__name__}: {error}"
    if "shared memory(shm)" in message or "out of shared memory" in message:
        return (
            "no room in /dev/shm, through which the loader's processes hand over data: enlarge it "
            "(docker run --shm-size=8g), or load in the main process (--workers 0)"
        )
    lost_connection = isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError)
    if "DataLoader worker (pid" in message or lost_connection:
        return "a process of the loader was killed, perhaps for memory: try fewer --workers"
    if isinstance(error, UserError | OSError):
        if getattr(error, "filename", None) and error.strerror:
            return f"{error.filename}: {error.strerror}"
        last_line = str(error).strip().split("\n")[-1]  # a worker's error has its traceback before
        return last_line.removeprefix("omnimae.UserError: ")
    is_memory = isinstance(error, MemoryError | RuntimeError)
    if is_memory and any(x in message for x in ("MemoryError", "out of memory", "allocate memory")):
        if hasattr(args, "micro_batch"):
            return "out of memory: try a smaller --micro-batch"
        return "out of memory: try smaller videos, or fewer --workers"
    return None


# ------------------------------------------------------------------------------------------------
# The demo data set: small, but real files in the layouts of ImageNet and SSv2

HEIGHT = 72
WIDTH = 96
SHAPES = {  # a shape is where its function of x and y (right and down, about -1 to 1) is under 1
    "circle": lambda x, y: np.hypot(x, y) * 1.1,
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) * 3.2, np.maximum(abs(x), abs(y))),
    "diamond": lambda x, y: abs(x) + abs(y),
    "half": lambda x, y: np.maximum(np.hypot(x, y + 0.45), 1 - 2 * (y + 0.45)),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) * 4,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) * 1.25,
    "star": lambda x, y: np.hypot(x, y) / (0.65 + 0.35 * np.cos(5 * np.arctan2(x, -y))),
    "triangle": lambda x, y: np.maximum(y + 0.4, 1.5 * abs(x) - y) * 1.05,
}
MOTIONS = {  # what changes from the first frame to the last: x, y, size and angle
    "Growing [something]": (0, 0, 1, 0),
    "Moving [something] down": (0, 1, 0, 0),
    "Moving [something] to the left": (-1, 0, 0, 0),
    "Moving [something] to the right": (1, 0, 0, 0),
    "Moving [something] up": (0, -1, 0, 0),
    "Shrinking [something]": (0, 0, -1, 0),
    "Turning [something] clockwise": (0, 0, 0, 1),
    "Turning [something] counterclockwise": (0, 0, 0, -1),
}


def draw_shape(rng, shape: str, num_frames=1, motion=(0, 0, 0, 0), angle=0.0) -> np.ndarray:
    """One large shape, uint8 (T, 72, 96, 3). The background is brighter above, the shape below."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    y = y - HEIGHT // 2
    x = x - WIDTH // 2
    t = np.zeros((1, 1, 1))
    if num_frames > 1:
        t = np.linspace(-0.5, 0.5, num_frames)[:, None, None]  # (T, 1, 1)

    # Where the shape is, how large, and how far it is turned, in each frame (T, 1, 1).
    move_x, move_y, grow, turn = motion
    centre_x = rng.uniform(-14, 14) + 32 * move_x * t
    centre_y = rng.uniform(-8, 8) + 26 * move_y * t
    size = rng.uniform(20, 28) * np.exp(grow * t)
    angle = angle + 2.4 * turn * t
    u = (np.cos(angle) * (x - centre_x) + np.sin(angle) * (y - centre_y)) / size
    v = (np.cos(angle) * (y - centre_y) - np.sin(angle) * (x - centre_x)) / size
    inside = np.clip((1 - SHAPES[shape](u, v)) * size / 2 + 0.5, 0, 1)[..., None]  # a soft edge

    above = -y[..., None] / HEIGHT  # from -0.5 at the bottom to 0.5 at the top
    dark = rng.uniform(0, 60, 3)
    bright = rng.uniform(195, 255, 3)
    wall = dark + (bright - dark) * (above + 0.5)
    front = rng.permutation([30, 230, rng.uniform(30, 230)]) * (0.8 - above)
    return (wall + (front - wall) * inside).clip(0, 255).astype(np.uint8)


def write_demo_data(root, images=3200, videos=1600, val_images=400, val_videos=320) -> None:
    """Writes the demo data set to a new folder: the same files every time, complete or not at all.
    JPEGs in ImageNet's layout, whose classes are shapes; VP9 .webm in SSv2's, whose classes are
    motions."""
    if Path(root).exists():
        return
    print(f"writing the demo data set to {root}/, once, in under a minute", flush=True)
    shapes = list(SHAPES)
    motions = list(MOTIONS)
    work = Path(f"{root}.{uuid.uuid4().hex[:8]}.partial")
    clips = work / "videos" / "20bn-something-something-v2"
    labels = work / "videos" / "labels"
    clips.mkdir(parents=True)
    labels.mkdir()

    def write_image(split: str, i: int) -> None:
        shape = shapes[i % 8]
        rng = np.random.default_rng([0, split == "val", i])
        path = work / "images" / split / shape / f"{shape}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(draw_shape(rng, shape)[0]).save(path, quality=95)

    def write_video(i: int) -> None:
        rng = np.random.default_rng([1, i])
        shape = ("half", "star", "triangle", "square")[rng.integers(4)]  # whose rotation is visible
        num_frames = int(rng.integers(24, 49))
        motion = MOTIONS[motions[i % 8]]
        frames = draw_shape(rng, shape, num_frames, motion, angle=rng.uniform(0, 2 * np.pi))
        with av.open(clips / f"{i + 1}.webm", "w", options={"fflags": "bitexact"}) as file:
            options = {"deadline": "realtime", "cpu-used": "8"}
            stream = file.add_stream("libvpx-vp9", rate=12, options=options)
            stream.height = HEIGHT
            stream.width = WIDTH
            stream.pix_fmt = "yuv420p"
            stream.bit_rate = 500_000
            stream.codec_context.thread_count = 1
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode(None))

    samples = [{"id": str(i + 1), "template": motions[i % 8]} for i in range(videos + val_videos)]
    names = {motion.replace("[", "").replace("]", ""): str(i) for i, motion in enumerate(motions)}
    (labels / "labels.json").write_text(json.dumps(names))
    (labels / "train.json").write_text(json.dumps(samples[:videos]))
    (labels / "validation.json").write_text(json.dumps(samples[videos:]))
    with ThreadPoolExecutor() as pool:
        list(pool.map(write_video, range(videos + val_videos)))
        list(pool.map(write_image, ["train"] * images, range(images)))
        list(pool.map(write_image, ["val"] * val_images, range(val_images)))
    try:
        work.rename(root)
    except OSError:  # another process was faster, perhaps on another machine
        shutil.rmtree(work)


if __name__ == "__main__":
    run_script(main, parse_args)
