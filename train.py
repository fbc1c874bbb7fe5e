"""Pretrain OmniMAE on images and videos. The same command again resumes a run.

    torchrun train.py --model demo                                   minutes on a laptop's CPU
    torchrun --nproc_per_node=8 train.py --model vit_b --images /data/in1k --videos /data/ssv2

Random numbers are a function of (seed, epoch, file, view), the order of files of (seed, epoch). So
a step's files, crops and masks depend neither on the number of processes, workers or micro-batches
nor on a restart: with 1 or 2 CPU processes, a resumed run ends with an unbroken run's bits.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import av
import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import omnimae

KINDS = ("images", "videos")
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # let a step finish, then save and end the run

# ------------------------------------------------------------------------------------------------
# The learning rate. (The README says where each value of the recipe comes from.)


def learning_rate(step: int, total: int, peak: float, end=0.0, warmup=0.05) -> float:
    """Linear from 1e-6 to `peak` over the first `warmup` of the steps, then a cosine to `end`."""
    done = step / total
    if done < warmup:
        return 1e-6 + (peak - 1e-6) * done / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


# ------------------------------------------------------------------------------------------------
# Data: which files a step takes, and the views that are cut from them

Sample = namedtuple("Sample", ["kind", "epoch", "index", "views"])  # views: how many of this file


class Steps:
    """The steps of a run. Each takes one batch of views, all of images or all of videos. In an
    epoch a kind gets as many views as it has files: a quarter of the videos, with 4 views each."""

    def __init__(self, num_files: dict, num_views: dict, args: argparse.Namespace, run: "Run"):
        self.num_files, self.num_views = num_files, num_views  # both by kind; views of one file
        self.batch, self.seed, self.rank = args.batch_size, args.seed, run.rank
        most = 16 if run.device.type == "cpu" and args.model != "demo" else 64  # views
        self.micro = args.micro_batch or min(max(1, self.batch // run.world), most)
        self.accumulate = self.batch // run.world // self.micro  # micro-batches of a rank in a step
        for kind, num in num_files.items():
            unit, views = f"--micro-batch {self.micro} x {run.world} processes", num_views[kind]
            if self.batch % (run.world * self.micro):
                raise ValueError(f"--batch-size {self.batch} must be a multiple of {unit}")
            if self.micro % views:
                raise ValueError(f"--micro-batch {self.micro} must be a multiple of {views} views")
            if num * views < self.batch:
                raise ValueError(f"--batch-size {self.batch} is too large for {num} {kind}")
        self.per_epoch = sum(max(1, num // self.batch) for num in num_files.values())
        self.total = args.epochs * self.per_epoch

    def of_epoch(self, epoch: int) -> list[list[Sample]]:
        """The samples of each step of an epoch, over all ranks: files and steps are shuffled."""
        steps = []
        for kind, num in self.num_files.items():
            rng = np.random.default_rng((self.seed, epoch, 1 + KINDS.index(kind)))
            files, views = rng.permutation(num).tolist(), self.num_views[kind]
            size = self.batch // views  # files in a step
            for start in range(0, size * max(1, num // self.batch), size):
                steps.append([Sample(kind, epoch, x, views) for x in files[start : start + size]])
        rng = np.random.default_rng((self.seed, epoch, 0))
        return [steps[i] for i in rng.permutation(len(steps))]

    def micro_batches(self, first_step: int) -> Iterator[list[Sample]]:
        """What this rank loads from `first_step` on, for a DataLoader's `batch_sampler`."""
        for epoch in range(first_step // self.per_epoch, self.total // self.per_epoch):
            for samples in self.of_epoch(epoch)[max(0, first_step - epoch * self.per_epoch) :]:
                size = self.micro // samples[0].views  # files in a micro-batch
                for i in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
                    yield samples[i * size : (i + 1) * size]


def seed_all(*key: int) -> None:
    """Seeds PyTorch, so that what is drawn from here on depends on `key` only."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than a crop
    if torch.cuda.is_initialized():  # not in a worker
        torch.cuda.manual_seed(seed)


class Views(Dataset):
    """Views of files, each with a random mask: random crops, or centre crops for `look`."""

    def __init__(self, cfg: omnimae.OmniMAEConfig, paths: dict, seed: int, centre_crop=False):
        self.cfg, self.seed, size = cfg, seed, cfg.image_size
        # arrays: the reference counts of a list would make each worker copy its million strings
        self.paths = {kind: np.array([os.fsencode(x) for x in paths[kind]]) for kind in paths}
        image = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
        video = v2.RandomResizedCrop(size, (0.08, 1.0))  # bilinear; no flip: directions matter
        self.crops = {"images": v2.Compose([image, v2.RandomHorizontalFlip(0.5)]), "videos": video}
        if centre_crop:
            self.crops = dict.fromkeys(KINDS, v2.Compose([v2.Resize(size), v2.CenterCrop(size)]))

    def read(self, sample: Sample) -> tuple[Tensor, int]:
        """A file's pixels, uint8 (3, H, W) or (T, 3, H, W), and its index (for a label). Names an
        unreadable file, and reads a random one instead. ValueError after twenty."""
        kind, epoch, index, _ = sample
        for attempt in range(20):  # fifth key: 0 here, 1 + view in __getitem__
            seed_all(self.seed, epoch, sample.index, KINDS.index(kind), 0, attempt)
            if attempt > 0:
                index = int(torch.randint(len(self.paths[kind]), ()))
            path = os.fsdecode(self.paths[kind][index])
            try:
                if kind == "images":
                    return omnimae.read_image(path), index
                starts = torch.rand(1).tolist()
                return omnimae.read_clips(path, starts, self.cfg.num_frames)[0], index
            except ValueError as error:
                print(error, file=sys.stderr, flush=True)
        raise ValueError(f"20 {kind} in a row could not be read: see the messages above")

    def __getitem__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (views, 3, [T,] H, W), and the indices of visible patches (views, V)."""
        pixels, visible = [], []
        media, _ = self.read(sample)
        for view in range(sample.views):
            seed_all(self.seed, sample.epoch, sample.index, KINDS.index(sample.kind), 1 + view)
            pixels.append(self.crops[sample.kind](media).movedim(-3, 0))  # (3, [T,] H, W)
            mask = omnimae.random_mask(1, *self.cfg.masking(sample.kind))
            visible.append((~mask[0]).nonzero()[:, 0])
        return torch.stack(pixels), torch.stack(visible)


def make_loader(dataset, run: "Run", **options) -> DataLoader:
    time.sleep(0.1)  # let gloo finish: a fork during a collective can deadlock (Python 3.11)
    return DataLoader(
        dataset, num_workers=run.workers, pin_memory=run.device.type == "cuda", **options,
        multiprocessing_context="fork" if run.workers else None, persistent_workers=run.workers > 0,
        worker_init_fn=lambda _: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# A run: its processes, its precision, its folder


class Run:
    """This process among torchrun's, and the run that they share: its step, and its folder with
    last.pt and log.jsonl, which rank 0 writes. Without torchrun there is rank 0 only."""

    def __init__(self, args: argparse.Namespace):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise ValueError(f"no GPU for process {self.local_rank}: give --device cpu")
            torch.cuda.set_device(self.local_rank)
        cores = len(os.sched_getaffinity(0)) // local_world
        self.workers = max(1, cores - 1) if args.workers is None else args.workers
        if self.world > 1:
            store, _, _ = next(dist.rendezvous("env://"))
            if self.world == local_world:  # one machine: a restart must not meet old addresses
                restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"restart {restarts}", store)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        self.out, self.step, self.first_step = Path(args.out), 0, 0
        self.stop, self.save_due, self.stopped_by = False, False, None  # stopped_by: a signal

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Sums numbers over all ranks, on the host: no GPU sync."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def first_rank_first(self, get, *args):
        """Calls `get` on the first rank of each machine, then on the others: it may write files."""
        result = get(*args) if self.local_rank == 0 else None
        self.sum_over_ranks(0)  # the others wait
        return result if self.local_rank == 0 else get(*args)

    def say(self, text: str, **line) -> None:
        """Prints on rank 0, and adds `line` to log.jsonl. Resumed steps are logged again."""
        if self.rank == 0:
            print(text, flush=True)
        if self.rank == 0 and line:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step} | line) + "\n")

    def resume(self, recipe: dict, **states) -> dict:
        """Continues from last.pt, if it exists (recipes must match), and returns its content.
        `states`: model, optimizer, scaler. From here on, signals let a step finish and save."""
        self.recipe, self.states, path, file = recipe, states, self.out / "last.pt", {}
        self.out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            file = omnimae.read_checkpoint(str(path))
            old = file.get("recipe", {})
            other = {key: old.get(key) for key in recipe if old.get(key) != recipe[key]}
            if other:
                raise ValueError(f"{path} is of a run with {other!s:.200}: give another --out")
            for key, state in states.items():
                state.load_state_dict(file[key] or state.state_dict())  # {}: the scaler was off
            self.step = self.first_step = file["step"]
            self.say(f"resuming {self.out} after step {self.step}")
        if self.sum_over_ranks(self.step)[0] != self.step * self.world:
            raise ValueError(f"not all machines see the same {path}: --out must be a shared folder")
        for number in SIGNALS:
            signal.signal(number, lambda which, _: setattr(self, "stopped_by", which))
        self.began = self.saved = time.monotonic()
        self.begin_interval()
        return file

    def save(self, name: str = "last.pt", **more) -> None:
        """Rank 0 saves a checkpoint atomically: a killed run leaves the old file or the new."""
        self.saved, model = time.monotonic(), self.states["model"]
        if not all(weights.isfinite().all() for weights in model.parameters()):
            raise FloatingPointError(f"the weights of step {self.step} are not finite; not saved")
        content = {key: state.state_dict() for key, state in self.states.items()} | more
        content |= {"config": asdict(model.cfg), "recipe": self.recipe, "step": self.step}
        with open(self.out / f"{name}.tmp", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.out / f"{name}.tmp", self.out / name)

    def begin_interval(self) -> None:  # speed is measured from one log line to the next
        self.interval_began, self.waited, self.views = time.monotonic(), 0.0, 0

    def next_batch(self, batches: Iterator) -> list[Tensor]:
        """A micro-batch, on the device."""
        self.waited -= time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic()
        return [tensor.to(self.device, non_blocking=True) for tensor in batch]

    def end_step(self, views: int, save_minutes: float) -> None:
        """Counts a step. All ranks then agree whether to stop and whether to save."""
        self.step, self.views = self.step + 1, self.views + views
        due = self.rank == 0 and time.monotonic() - self.saved > 60 * save_minutes
        signals, due = self.sum_over_ranks(self.stopped_by is not None, due)
        self.stop, self.save_due = signals > 0, due > 0
        self.stopped_by = self.stopped_by or (signal.SIGTERM if self.stop else None)  # another rank

    def report(self, label: str, loss: Tensor, lr: float, total: int) -> None:
        """Logs and prints the step just ended. FloatingPointError if its loss is not finite."""
        loss = self.sum_over_ranks(loss.item())[0] / self.world
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.step} is {loss}: try a lower --lr")
        elapsed = time.monotonic() - self.interval_began
        speed, wait = self.views / elapsed, self.waited / elapsed
        pace = (time.monotonic() - self.began) / (self.step - self.first_step)
        minutes = pace * (total - self.step) / 60
        left = f"{minutes / 60:.0f} h" if minutes > 60 else f"{minutes:.0f} min"
        self.say(
            f"step {self.step:6d}  {label}  loss {loss:.3f}  lr {lr:.1e}  {speed:.0f} views/s  "
            f"wait {wait:.0%}  {left} left",
            label=label, loss=loss, lr=lr, views_per_second=speed, wait=wait,
            gpu_memory_bytes=torch.cuda.max_memory_allocated(),
        )  # fmt: skip
        self.begin_interval()


def precision(args: argparse.Namespace, device: torch.device, cfg: omnimae.OmniMAEConfig) -> tuple:
    """Autocast and gradient scaler. The default is bfloat16, or float16 on GPUs without it; float32
    for the demo model, and on CPUs without AVX-512, on which bfloat16 is many times slower."""
    slow = device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    name = "float32" if slow or cfg.dim < 256 else "bfloat16"
    if name == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        name = "float16"
    name = args.dtype or name
    autocast = torch.autocast(device.type, getattr(torch, name), enabled=name != "float32")
    return autocast, torch.amp.GradScaler(device.type, enabled=name == "float16")


def prepare(model: nn.Module, args: argparse.Namespace, run: Run) -> nn.Module:
    """The model as all ranks train it together, on the device."""
    model.to(run.device)
    if args.checkpoint_activations:  # compute a block's activations again in the backward pass
        for block in (x for x in model.modules() if isinstance(x, omnimae.Block)):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if args.compile:
        model.compile(dynamic=False)  # once for images and once for videos
    if run.world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # they are constant; as an argument it is deprecated
    return model


def run_script(main, parse_args) -> None:
    """Prints a user's error in one line. `main` returns the signal that stopped it, or None: the
    script then ends by that signal, so that a shell's loop or && stops as well."""
    try:
        stopped_by = main(parse_args())
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1))  # wait for rank 0 to save
            dist.destroy_process_group()
    except (ValueError, OSError, FloatingPointError) as error:  # a worker's: drop its traceback
        sys.exit(f"{sys.argv[0]}: " + str(error).rsplit("ValueError: ", 1)[-1].strip())
    except (RuntimeError, MemoryError) as error:
        if not any(x in repr(error) for x in ("MemoryError", "out of memory", "allocate")):
            raise
        sys.exit(f"{sys.argv[0]}: out of memory: try a smaller --micro-batch")
    finally:  # workers ignore SIGTERM, so kill them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
        for worker in multiprocessing.active_children():
            worker.kill()
    if stopped_by:
        signal.signal(stopped_by, signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by)


# ------------------------------------------------------------------------------------------------
# Options


def parse_shared(parser: argparse.ArgumentParser, argv, training=True) -> argparse.Namespace:
    """Adds the options that the scripts share, and parses. Numbers are positive; some may be 0."""
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of autocast (see README)")
    add("--workers", type=int, help="loader processes (default: a process's CPU cores less one)")
    if training:
        add("--seed", type=int, default=0, help="seeds everything random (default: 0)")
        add("--micro-batch", type=int, help="views at once per process (64; 16 for a ViT on a CPU)")
        add("--checkpoint-activations", action="store_true", help="less memory, a third more FLOPs")
        add("--compile", action="store_true", help="torch.compile the model")
        add("--log-every", type=int, default=10, help="steps between log lines (default: 10)")
        add("--save-minutes", type=float, default=10.0, help="between saves (default: 10)")
    args = parser.parse_args(argv)
    may_be_0 = ("workers", "seed", "weight_decay", "drop_path", "save_minutes")
    for name, value in vars(args).items():
        fine = type(value) not in (int, float) or 0 < value < math.inf
        if value == "" or not (fine or value == 0 and name in may_be_0):
            parser.error(f"--{name.replace('_', '-')} must be a positive number or name: {value!r}")
    return args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    usage = "torchrun %(prog)s [--model M] [--images DIR] [--videos DIR] [options]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(omnimae.MODELS), default="vit_b", help="default: vit_b")
    add("--images", help="folder of images, or 'demo'")
    add("--videos", help="folder of videos, or 'demo'; without either, both are the demo set")
    add("--out", help="folder of the run (default: runs/MODEL)")
    add("--init", help="pretraining checkpoint to start from: released name, URL or path")
    add("--epochs", type=int, help="default: 800; demo model or data 12")
    add("--batch-size", type=int, help="views per step, over all processes (2048; demo 64)")
    add("--lr", type=float, help="peak (default: batch x 1.6e-3 / 2048; demo model 6e-4 / 64)")
    add("--video-views", type=int, default=4, help="views of a video in a step (default: 4)")
    add("--image-mask-ratio", type=float, help="default: 0.90; demo model 0.75")
    add("--video-mask-ratio", type=float, help="default: 0.95; demo model 0.90")
    args = parse_shared(parser, argv)
    if not (args.images or args.videos):
        args.images = args.videos = "demo"
    demo = "demo" in (args.model, args.images, args.videos)
    args.epochs = args.epochs or (12 if demo else 800)
    args.batch_size = args.batch_size or (64 if demo else 2048)
    lr_per_view = 6e-4 / 64 if args.model == "demo" else 1.6e-3 / 2048
    args.lr = args.lr or lr_per_view * args.batch_size
    args.out = args.out or f"runs/{args.model}"
    return args


# ------------------------------------------------------------------------------------------------
# Pretraining


@torch.compiler.set_stance("force_eager")  # a few odd shapes are not worth compiling for
@torch.no_grad()
def look(model: omnimae.OmniMAE, dataset: Views, splits: dict, run: Run, autocast) -> None:
    """Logs the loss of 32 files of each kind, beside that of predicting 0, and draws the first."""
    for kind, paths in dataset.paths.items():
        indices = np.linspace(0, len(paths) - 1, min(32, len(paths))).astype(int).tolist()
        samples = [dataset[Sample(kind, 0, index, 1)] for index in indices]  # always the same
        pixels, visible = (torch.cat(x).to(run.device) for x in zip(*samples))
        x = omnimae.normalize(pixels)
        with autocast:
            loss, _, mask = model(x, visible)
            picture = omnimae.draw_reconstruction(model, x[0], mask[0])
        masked = omnimae.to_patches(x, model.cfg)[0][mask]  # (B M, P)
        target, _, _ = omnimae.normalize_patches(omnimae.to_pixels(masked[None]))
        (run.out / "pictures").mkdir(exist_ok=True)
        picture.save(run.out / "pictures" / f"{kind}_{run.step:06d}.png")
        name, loss, zero = f"{splits[kind]} {kind}", loss.item(), target.square().mean().item()
        text = f"step {run.step:6d}  {name}  loss {loss:.3f}, {loss / zero:.2f} of predicting zero"
        run.say(text, label=name, look_loss=loss, zero_loss=zero)
    run.begin_interval()


def main(args: argparse.Namespace) -> int | None:
    run = Run(args)
    roots = {kind: data_root(vars(args)[kind], kind, run) for kind in KINDS if vars(args)[kind]}
    paths = {kind: omnimae.list_media(root, kind).paths for kind, root in roots.items()}
    num_files = {kind: len(paths[kind]) for kind in paths}
    steps = Steps(num_files, {"images": 1, "videos": args.video_views}, args, run)
    splits = {x: "val" if omnimae.has_validation(root, x) else "train" for x, root in roots.items()}
    look_at = {kind: omnimae.list_media(roots[kind], kind, splits[kind]).paths for kind in roots}

    cfg = omnimae.MODELS[args.model]
    ratios = {x: vars(args)[x] or getattr(cfg, x) for x in ("image_mask_ratio", "video_mask_ratio")}
    cfg = replace(cfg, **ratios)
    for kind in roots:
        omnimae.random_mask(1, *cfg.masking(kind))  # raises for a ratio that masks none or all
    torch.manual_seed(args.seed)
    if args.init:
        model = run.first_rank_first(omnimae.load_checkpoint, args.init).train()
        if not isinstance(model, omnimae.OmniMAE) or model.cfg.dim != cfg.dim:
            raise ValueError(f"{args.init}: expected a pretraining checkpoint of {args.model}")
        model.cfg = replace(model.cfg, **ratios)  # this run's ratios
    else:
        model = omnimae.OmniMAE(cfg)
    parallel = prepare(model, args, run)
    matrices = [x for x in model.parameters() if x.ndim > 1]  # and the mask token
    vectors = [x for x in model.parameters() if x.ndim == 1]  # biases and LayerNorm
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    autocast, scaler = precision(args, run.device, cfg)
    names = ("model", "epochs", "batch_size", "lr", "video_views", "init", "seed")
    recipe = {name: getattr(args, name) for name in names} | ratios | {"files": num_files}
    run.resume(recipe, model=model, optimizer=optimizer, scaler=scaler)
    run.say(f"pretraining {args.model} on {' and '.join(f'{num_files[x]:,} {x}' for x in roots)}")
    run.say(f"{steps.total:,} steps of {args.batch_size} views; log, pictures, last.pt: {run.out}/")
    dataset, looks = Views(cfg, paths, args.seed), Views(cfg, look_at, args.seed, centre_crop=True)
    batches = iter(make_loader(dataset, run, batch_sampler=steps.micro_batches(run.step)))

    while run.step < steps.total and not run.stop:
        lr = learning_rate(run.step, steps.total, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        mean_loss = torch.zeros((), device=run.device)
        for i in range(steps.accumulate):
            pixels, visible = (x.flatten(0, 1) for x in run.next_batch(batches))  # files, views
            parallel.require_backward_grad_sync = i == steps.accumulate - 1  # ranks average once
            with autocast:
                loss, _, _ = parallel(omnimae.normalize(pixels), visible)  # a mask, as indices
            scaler.scale(loss / steps.accumulate).backward()
            mean_loss += loss.detach() / steps.accumulate
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.end_step(args.batch_size, args.save_minutes)
        last = run.step == steps.total
        if run.step == 1 or run.step % args.log_every == 0 or last:
            run.report("images" if pixels.ndim == 4 else "videos", mean_loss, lr, steps.total)
        if run.rank == 0 and (run.step % math.ceil(steps.total / 10) == 0 or last):
            look(model, looks, splits, run, autocast)
        if run.rank == 0 and (run.stop or run.save_due or last):
            run.save()
    if run.step < steps.total:
        run.say(f"stopped and saved after step {run.step}; the same command resumes the run")
        return run.stopped_by
    run.say(f"done: {run.out}/last.pt; reconstructions in {run.out}/pictures/. Next:")
    for kind in roots:
        run.say(f"torchrun finetune.py --checkpoint {run.out}/last.pt --{kind} {vars(args)[kind]}")
    return run.stopped_by


# ------------------------------------------------------------------------------------------------
# The demo data set: small, but real files in the layouts of ImageNet and SSv2

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
    "Growing [something]": (0, 0, 1, 0), "Moving [something] down": (0, 1, 0, 0),
    "Moving [something] to the left": (-1, 0, 0, 0),
    "Moving [something] to the right": (1, 0, 0, 0), "Moving [something] up": (0, -1, 0, 0),
    "Shrinking [something]": (0, 0, -1, 0), "Turning [something] clockwise": (0, 0, 0, 1),
    "Turning [something] counterclockwise": (0, 0, 0, -1),
}  # fmt: skip


def draw_shape(rng, shape: str, num_frames=1, motion=(0, 0, 0, 0), angle=0.0) -> np.ndarray:
    """One large shape, uint8 (T, 72, 96, 3). The background is brighter above, the shape below."""
    y, x = np.mgrid[:72, :96] - np.array([36, 48])[:, None, None]
    t = np.linspace(-0.5, 0.5, num_frames)[:, None, None] * (num_frames > 1)  # (T, 1, 1)
    x0, y0 = rng.uniform(-14, 14) + 32 * motion[0] * t, rng.uniform(-8, 8) + 26 * motion[1] * t
    size, turn = rng.uniform(20, 28) * np.exp(motion[2] * t), angle + 2.4 * motion[3] * t
    u = (np.cos(turn) * (x - x0) + np.sin(turn) * (y - y0)) / size
    v = (np.cos(turn) * (y - y0) - np.sin(turn) * (x - x0)) / size
    inside = np.clip((1 - SHAPES[shape](u, v)) * size / 2 + 0.5, 0, 1)[..., None]  # soft edge
    above = -y[..., None] / 72  # from -0.5 at the bottom to 0.5 at the top
    dark, bright = rng.uniform(0, 60, 3), rng.uniform(195, 255, 3)
    wall = dark + (bright - dark) * (above + 0.5)
    front = rng.permutation([30, 230, rng.uniform(30, 230)]) * (0.8 - above)
    return (wall + (front - wall) * inside).clip(0, 255).astype(np.uint8)


def write_demo_data(root, images=3200, videos=1600, val_images=400, val_videos=320) -> None:
    """Writes the demo data set to a new folder: the same files every time, complete or not at all.
    JPEGs in ImageNet's layout, a class a shape; VP9 .webm in SSv2's layout, a class a motion."""
    if Path(root).exists():
        return
    print(f"writing the demo data set to {root}/, once, in under a minute", flush=True)
    shapes, motions, work = list(SHAPES), list(MOTIONS), Path(f"{root}.partial")
    clips, labels = work / "videos" / "20bn-something-something-v2", work / "videos" / "labels"

    def write_image(split, i):
        rng, shape = np.random.default_rng([0, split == "val", i]), shapes[i % 8]
        path = work / "images" / split / shape / f"{shape}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(draw_shape(rng, shape)[0]).save(path, quality=95)

    def write_video(i):
        rng = np.random.default_rng([1, i])
        shape = ("half", "star", "triangle", "square")[rng.integers(4)]  # whose rotation is visible
        num_frames, motion = int(rng.integers(24, 49)), MOTIONS[motions[i % 8]]
        frames = draw_shape(rng, shape, num_frames, motion, angle=rng.uniform(0, 2 * np.pi))
        with av.open(clips / f"{i + 1}.webm", "w", options={"fflags": "bitexact"}) as file:
            options = {"deadline": "realtime", "cpu-used": "8"}
            stream = file.add_stream("libvpx-vp9", rate=12, options=options)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.bit_rate, stream.codec_context.thread_count = 500_000, 1
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode(None))

    for folder in (clips, labels):
        folder.mkdir(parents=True, exist_ok=True)
    samples = [{"id": str(i + 1), "template": motions[i % 8]} for i in range(videos + val_videos)]
    names = {x.replace("[", "").replace("]", ""): str(i) for i, x in enumerate(motions)}
    lists = {"labels": names, "train": samples[:videos], "validation": samples[videos:]}
    for name, content in lists.items():
        (labels / f"{name}.json").write_text(json.dumps(content))
    with ThreadPoolExecutor() as pool:
        list(pool.map(write_video, range(videos + val_videos)))
        list(pool.map(write_image, ["train"] * images, range(images)))
        list(pool.map(write_image, ["val"] * val_images, range(val_images)))
    work.rename(root)


def data_root(name: str, kind: str, run: Run) -> str:
    """A data set's folder; for "demo" the demo's, written on first use."""
    if name == "demo":
        run.first_rank_first(write_demo_data, "demo_data")
    return f"demo_data/{kind}" if name == "demo" else name


if __name__ == "__main__":
    run_script(main, parse_args)
