"""Pretrain OmniMAE on images and videos.

    torchrun train.py --model demo                                   minutes on a laptop's CPU
    torchrun --nproc_per_node=8 train.py --model vit_b --images IN1K --videos SSV2

The same command again goes on where a run stopped. The recipe is the released one for ViT-B
(paper, appendix): a step takes all its views from one kind of data; AdamW; warm-up and cosine.

Every random number is a function: of (seed, epoch, sample, view) for crops, flips, windows and
masks, of (seed, epoch) for the order. So nothing random is saved, and neither the number of
processes nor of workers nor accumulation changes what a step sees.
"""

import argparse
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

import omnimae

KINDS = ("images", "videos")
# options that may change when a run goes on
RESUMABLE = {
    "images", "videos", "out", "device", "dtype", "micro_batch", "compile", "checkpoint_activations",
    "workers", "log_every", "save_minutes", "benchmark", "json",
}  # fmt: skip


def seed_all(*key: int) -> None:
    """Seed PyTorch, so that what is drawn from now on depends on `key` alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would take longer than a crop
    if torch.cuda.is_initialized():  # not in the loader's workers
        torch.cuda.manual_seed(seed)


def learning_rate(step: float, total: int, peak: float, end=0.0, warmup=0.05) -> float:
    """Linear from 1e-6 to `peak` over the first `warmup` of the run, then a cosine to `end`."""
    done = step / total
    if done < warmup:
        return 1e-6 + (peak - 1e-6) * done / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


# ------------------------------------------------------------------------------------------------
# Data: which samples a step takes, and the views that are cut from them


@functools.lru_cache(maxsize=4)  # of the epoch: of its steps and of each kind's files
def shuffled(num: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(num)


class Steps:
    """The order of a run, for a DataLoader's `batch_sampler`: from step `start` on, this rank's
    micro-batches, each a list of (kind, epoch, index of the file, first view, number of views).

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
            (kind, epoch, int(order[at % num]), at // num * views, views)
            for at in range(before * files, (before + 1) * files)
        ]

    def __iter__(self) -> Iterator[list[tuple]]:
        for step in range(self.start, self.total):
            samples = self.samples(step)
            files = self.micro // samples[0][-1]  # of a micro-batch
            for i in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
                yield samples[i * files : (i + 1) * files]


class Views(Dataset):
    """Views of files: random crops and masks, or, for `held_out`, centre crops.

    A file that cannot be read is replaced by another of its data set, and reported.
    """

    def __init__(self, cfg, listings: dict, seed: int, mask_kind: str = "random", held_out=False):
        self.cfg, self.seed, self.mask_kind = cfg, seed, mask_kind
        # arrays: reference counts would make every worker copy a list of a million strings
        self.paths = {k: np.array([os.fsencode(p) for p in v]) for k, v in listings.items()}
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

    def find(self, sample: tuple) -> tuple[torch.Tensor, int, list[str]]:
        """The first that can be read of the sample's file and others drawn at random: pixels uint8,
        (3, H, W) or (T, 3, H, W); its index; and what is wrong with those before."""
        kind, epoch, index, first, _ = sample
        unreadable = []
        for attempt in range(20):
            seed_all(self.seed, epoch, index, KINDS.index(kind), first, attempt)
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
        media, _, unreadable = self.find(sample)
        grid, ratio = self.cfg.masking(kind)
        pixels, visible = [], []
        for view in range(first, first + views):
            seed_all(self.seed, epoch, index, KINDS.index(kind), view)
            pixels.append(self.crop[kind](media).movedim(-3, -1).contiguous())
            mask = omnimae.random_mask(1, grid, ratio, self.mask_kind)
            visible.append((~mask[0]).nonzero()[:, 0])
        return pixels, visible, unreadable


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pixels uint8 (B, 3, H, W) or (B, 3, T, H, W), visible (B, V), what could not be read."""
    pixels, visible, unreadable = (list(itertools.chain(*x)) for x in zip(*samples))
    return torch.stack(pixels).movedim(-1, 1), torch.stack(visible), unreadable


def ignore_signals(_worker: int) -> None:
    """In a loader's worker: a signal to the whole group is for the main process to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(dataset: Dataset, steps, workers: int, device: torch.device, collate) -> DataLoader:
    """One pool of workers for both kinds; `steps` says what each batch holds."""
    pin = device.type == "cuda"
    return DataLoader(dataset, batch_sampler=steps, num_workers=workers, collate_fn=collate, pin_memory=pin, worker_init_fn=ignore_signals)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# A run: its processes, its precision, its folder, and the parts of its loop


class Run:
    """A run among torchrun's processes: of pretraining, finetuning or evaluation. The first two
    `open` a folder for `last.pt`, `log.jsonl` and `args.json`, which rank 0 writes."""

    def __init__(self, args: argparse.Namespace):
        names = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")
        self.rank, self.world, self.local, near = (int(os.environ.get(*name)) for name in names)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device, self.local if device == "cuda" else None)
        if device == "cuda":
            if self.local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {self.local} on this machine has no GPU: PyTorch sees "
                    f"{torch.cuda.device_count()}; start as many processes, or give --device cpu"
                )
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # torchrun restarts processes on the same store: without a prefix they could find there the
            # addresses of those before. Several machines do not count restarts alike.
            store, _, _ = next(dist.rendezvous("env://"))
            if self.world == near:
                restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"restart {restarts}", store)
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        cores = len(os.sched_getaffinity(0)) // near
        self.workers = max(1, cores - 1) if args.workers is None else args.workers

        self.dtype = choose_dtype(args.dtype, self.device, args.model)
        self.autocast = torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16)

        self.seed = args.seed
        self.step = self.read = self.unreadable = 0  # saved with the model
        self.signalled = self.stop = self.due = False  # a signal came; all ranks stop; time to save
        self.lost, self.named, self.losses = 0, set(), []
        self.save_seconds, self.saved = args.save_minutes * 60, time.monotonic()
        self.begin_window()

    # Processes

    def sum(self, *values: float) -> list[float]:
        """The sums over all ranks, of numbers on the host: no GPU is waited for."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def parallel(self, model: torch.nn.Module, compress: bool = False) -> torch.nn.Module:
        """The model as all ranks train it together."""
        if self.world > 1:
            how = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
            model = DistributedDataParallel(model, **how)
            if compress:
                model.register_comm_hook(None, bf16_compress_hook)
        return model

    def begin(self, total: int, peak: float) -> None:
        """The loop of `total` steps begins, on devices of `peak` FLOP/s. From now on SIGINT and SIGTERM
        finish the step, save and exit."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "signalled", True))
        self.total, self.peak, self.first, self.began = total, peak, self.step, time.monotonic()
        self.begin_window()

    # The folder

    def open(self, args: argparse.Namespace, sizes: dict, model, optimizer) -> dict:
        """Make the folder this process's own, and go on from `last.pt`, if it is there, whose content
        it returns. It must be of a run on as many files and with the same options, except those in
        RESUMABLE."""
        self.out = Path(args.out)
        if self.out.is_file():
            raise ValueError(f"--out {self.out} is a file: expected a folder")
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / "args.json", "a")  # noqa: SIM115 (held until the process ends)
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"another run is writing to {self.out}: choose another --out"
                ) from None
        self.settings = {key: value for key, value in vars(args).items() if key not in RESUMABLE}
        self.settings |= {"files": sizes, "precision": str(self.dtype)}
        log, path = self.out / "log.jsonl", self.out / "last.pt"
        lines, file = [], {}
        if path.exists():
            file = omnimae.read_checkpoint(path)
            old = file.get("settings", {})
            for key in sorted(self.settings.keys() | old.keys()):
                if old.get(key) != self.settings.get(key):
                    raise ValueError(
                        f"{path} is of a run with {key} {old.get(key)}, this one has "
                        f"{self.settings.get(key)}: choose another --out, or the same to go on"
                    )
            model.load_state_dict(file["model"])
            optimizer.load_state_dict(file["optimizer"])
            self.scaler.load_state_dict(file["scaler"])
            self.step, self.read, self.unreadable = file["step"], file["read"], file["unreadable"]
            self.print(f"{self.out}: going on after step {self.step:,}")
            if self.rank == 0 and log.exists():  # what was logged later will be logged again
                lines = log.read_text().splitlines(keepends=True)
                lines = [x for x in lines if x[-1] == "\n" and json.loads(x)["step"] <= self.step]
        if self.rank == 0:
            replace_file(log, lambda output: output.write("".join(lines).encode()))
            self.lock.truncate(0)
            json.dump(vars(args), self.lock, indent=1)
            self.lock.flush()
        if self.sum(self.step)[0] != self.step * self.world:
            raise ValueError(f"not all machines see the same {path}: --out must be a shared folder")
        return file

    def save(self, model, optimizer, name: str = "last.pt", **more) -> None:
        """Atomically: whenever a run is killed, the old file or the new one is there, whole."""
        if self.rank == 0:
            if not all(weights.isfinite().all() for weights in model.parameters()):
                raise FloatingPointError(f"weights after step {self.step} are not finite")
            state = {
                "config": asdict(model.cfg), "model": model.state_dict(), "settings": self.settings,
                "optimizer": optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "step": self.step, "read": self.read, "unreadable": self.unreadable, **more,
            }  # fmt: skip
            replace_file(self.out / name, lambda file: torch.save(state, file))
        self.saved = time.monotonic()

    def log(self, **line) -> None:
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    # The loop's parts

    def begin_window(self) -> None:
        """Speed is measured from one logged step to the next."""
        self.window, self.waited, self.views, self.work = time.monotonic(), 0.0, 0, 0.0

    def report(self, epoch: int, kind: str, loss: float, lr: float) -> None:
        """Log the step, print it with the time left, and begin the next window."""
        seconds = time.monotonic() - self.window
        line = {
            "step": self.step, "epoch": epoch, "kind": kind, "loss": loss, "lr": lr,
            "unreadable": self.unreadable, "views_per_second": self.views / seconds,
            "data_wait": self.waited / seconds, "utilisation": self.work / seconds / self.peak,
            "memory_gb": memory_gb(self.device),
        }  # fmt: skip
        self.log(**line)
        pace = (time.monotonic() - self.began) / (self.step - self.first)
        left = timedelta(seconds=int(pace * (self.total - self.step)))
        self.print(
            f"step {self.step:6d}  epoch {epoch}  {kind}  loss {loss:.4f}  lr {lr:.1e}  "
            f"{line['views_per_second']:,.0f} views/s  data wait {line['data_wait']:.0%}  "
            f"utilisation {line['utilisation']:.0%}  {left} left"
            + (f"  {self.unreadable} unreadable" if self.unreadable else "")
        )
        self.begin_window()

    def update(self, loss_of, model, optimizer, batches: Iterator, accumulate: int) -> torch.Tensor:
        """One optimiser step over `accumulate` micro-batches. Their mean loss, on the device."""
        total = torch.zeros((), device=self.device)
        for micro in range(1, accumulate + 1):
            before = time.monotonic()
            *batch, broken = next(batches)
            self.waited += time.monotonic() - before
            self.lost += len(broken)
            for message in set(broken) - self.named:
                print(message, file=sys.stderr, flush=True)
            self.named.update(broken)
            batch = [tensor.to(self.device, non_blocking=True) for tensor in batch]
            seed_all(self.seed, self.step, self.rank, micro)  # drop path, MixUp
            last = micro == accumulate  # gradients go round the ranks with the last
            with nullcontext() if last or self.world == 1 else model.no_sync():
                with self.autocast:
                    loss = loss_of(*batch) / accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        self.step += 1
        return total

    def agree(self, loss: torch.Tensor, files: int, pause: bool) -> float | None:
        """After a step that read `files` files: sum flags and counts over the ranks, so that all log,
        save, stop or fail together. The losses are looked at only at a pause or before saving, because
        that waits for the device; then this step's mean loss is returned, else None."""
        self.losses.append(loss)
        due = self.rank == 0 and time.monotonic() - self.saved > self.save_seconds
        self.stop, self.due, lost = self.sum(self.signalled, due, self.lost)
        self.read, self.unreadable, self.lost = self.read + files, self.unreadable + int(lost), 0
        if not (pause or self.stop or self.due):
            return None
        losses = self.sum(*torch.stack(self.losses).tolist())
        for step, total in enumerate(losses, self.step + 1 - len(losses)):
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss of step {step} is {total}")
        self.losses.clear()
        if self.read >= 100 and self.unreadable > 0.1 * self.read:
            raise ValueError(
                f"{self.unreadable:,} of the {self.read:,} files read so far cannot be read, more "
                "than 10 %: see the messages above"
            )
        return losses[-1] / self.world


def replace_file(path: Path, write) -> None:
    """Write beside `path`, sync to the disk, rename over it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the file system said
        reason = error if isinstance(error, OSError) else error.__context__
        raise OSError(f"{path} cannot be written, and stays as it was: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def choose_dtype(name: str | None, device: torch.device, model: str) -> torch.dtype:
    """What matrix products are computed in: bfloat16, but float16 on GPUs without it."""
    if name == "float16" and device.type == "cpu":
        raise ValueError("--dtype float16 is for GPUs without bfloat16: give bfloat16 or float32")
    if name or model == "demo":  # matrices this small gain nothing
        return getattr(torch, name or "float32")
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def size_name(cfg: omnimae.OmniMAEConfig) -> str:
    """The name of a config's size, such as "vit_b"."""
    sizes = {(size.dim, size.image_size): name for name, size in omnimae.MODELS.items()}
    return sizes.get((cfg.dim, cfg.image_size), "other")


def demo_data(kind: str, run: Run) -> str:
    """Where the demo data set is; the first process writes it on first use."""
    root = Path("demo_data")
    if run.rank == 0 and not root.exists():
        print(f"writing the demo data set to {root}/, once, in under a minute", flush=True)
        omnimae.write_demo_data(root)
    run.sum(0)  # the others wait
    return str(root / kind)


# ------------------------------------------------------------------------------------------------
# What the hardware does


def count_flops(cfg: omnimae.OmniMAEConfig, kind: str, num_classes: int | None = None) -> int:
    """Floating-point operations of one view, forward and backward, pretraining or finetuning."""
    grid, ratio = cfg.masking(kind)
    frames, num = cfg.num_frames if kind == "videos" else 1, math.prod(grid)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.zeros(1, 3, frames, cfg.image_size, cfg.image_size)
        visible = torch.zeros(1, num - int(ratio * num), dtype=torch.int64)
        model = omnimae.Classifier(cfg, num_classes) if num_classes else omnimae.OmniMAE(cfg)
        out = model.to("meta")(x) if num_classes else model.to("meta")(x, visible)[0]
        out.sum().backward()
    return counter.get_total_flops()


def timed(step, run: Run, warmup: int = 3, window_seconds: float = 0.1) -> float:
    """Seconds that a step takes: the median of seven windows of a few steps."""

    def window(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return (time.perf_counter() - start) / steps

    window(warmup)
    steps = math.ceil(run.sum(window_seconds / window(1))[0] / run.world)  # alike on all ranks
    return statistics.median(window(steps) for _ in range(7))


def matmul_rate(run: Run, size: int = 1024) -> float:
    """FLOP/s of large matrix products on all devices: what utilisation is the share of."""
    size = 8192 if run.device.type == "cuda" else size
    a = torch.randn(size, size, device=run.device, dtype=run.dtype)
    return run.sum(2 * size**3 / timed(lambda: a @ a, run, window_seconds=0.02))[0]


def memory_gb(device: torch.device) -> float:
    """The most that was in use so far: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ------------------------------------------------------------------------------------------------
# Pretraining


def whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
    return int(text)


positive = functools.partial(whole, least=1)


def share(text: str) -> float:
    if not re.fullmatch(r"0?\.\d*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share between 0 and 1, as 0.9")
    return float(text)


def model_name(text: str) -> str:
    if text not in omnimae.MODELS:
        near = omnimae.did_you_mean(text, omnimae.MODELS)
        raise argparse.ArgumentTypeError(f"{text!r}: none of {', '.join(omnimae.MODELS)}{near}")
    return text


def option_group(parser: argparse.ArgumentParser, title: str):
    """A group of options, as the function that adds one."""
    options = parser.add_argument_group(title)

    def add(flag, help, **more):
        shown = " (default: %(default)s)" if more.get("default") is not None else ""
        name = {positive: "N", whole: "N", float: "X", share: "X"}.get(more.get("type"))
        if "choices" not in more and "action" not in more:
            more.setdefault("metavar", name)
        options.add_argument(flag, help=help + shown, **more)

    return add


# fmt: off
def device_options(add) -> None:
    add("--device", "(default: a GPU if there is one)", choices=["cuda", "cpu"])
    add("--dtype", "of autocast (default: bfloat16, on GPUs without it float16; demo model: float32)", choices=["float32", "bfloat16", "float16"])
    add("--workers", "loader processes a device (default: its share of the cores less one, at least 1)", type=whole)


def machine_options(parser: argparse.ArgumentParser) -> None:
    """What pretraining and finetuning have in common."""
    add = option_group(parser, "machine: speed and memory")
    device_options(add)
    add("--micro-batch", "views at once on a device (default: all of its share of the batch; in pretraining without --batch-size, demo model: 32, demo data: 16)", type=positive)
    add("--compile", "torch.compile the model", action="store_true")
    add("--checkpoint-activations", "compute activations twice: less memory", action="store_true")
    add("--compress-gradients", "send gradients as bfloat16", action="store_true")
    add("--log-every", "steps between log lines", type=positive, default=10)
    add("--save-minutes", "minutes between checkpoints", type=float, default=10.0)
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, completed by what goes with the model and the data."""
    parser = argparse.ArgumentParser(
        description="Pretrain OmniMAE on images and videos. Run the same command again to go on.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=27, width=100),
        usage="torchrun [--nproc_per_node N] %(prog)s [--model M] [--images DIR] [--videos DIR] ...",
    )

    # fmt: off
    add = option_group(parser, "model and data")
    add("--model", "the size", default="vit_b", type=model_name, choices=list(omnimae.MODELS))
    add("--images", "folder of images, or 'demo'", metavar="DIR")
    add("--videos", "folder of videos, or 'demo'; neither given: both are", metavar="DIR")
    add("--out", "the run's folder (default: runs/MODEL)", metavar="DIR")
    add("--init", "start from a pretraining checkpoint: path, URL or released name", metavar="NAME")
    add = option_group(parser, "recipe: the released one for ViT-B")
    add("--epochs", "each of as many views as there are files (default: 800, the released checkpoints 1600; demo model or data: 12)", type=positive)
    add("--batch-size", "views a step, over all processes (default: 2048; demo model or data: 64)", type=positive)
    add("--lr", "peak learning rate (default: 1.6e-3 * batch size / 2048; demo model: 6e-4)", type=float)
    add("--weight-decay", "not on biases and LayerNorm", type=float, default=0.05)
    add("--image-views", "views of an image in a step", type=positive, default=1)
    add("--video-views", "views of a video in a step, decoded once", type=positive, default=4)
    add("--image-mask-ratio", "share masked (default: 0.90; demo: 0.75)", type=share)
    add("--video-mask-ratio", "share masked (default: 0.95; demo: 0.90)", type=share)
    add("--mask", "how clips are masked", default="random", choices=["random", "tube"])
    add("--seed", "of everything random", type=whole, default=0)
    add = option_group(parser, "speed")
    add("--benchmark", "time steps (by default of one micro-batch of 32) instead of training", action="store_true")
    add("--json", "the same, with its figures also as a line of JSON", action="store_true")
    # fmt: on
    machine_options(parser)
    args = parser.parse_args(argv)
    if not (args.images or args.videos):
        args.images = args.videos = "demo"
    demo = "demo" in (args.model, args.images, args.videos)
    args.benchmark |= args.json
    if args.micro_batch is None and (args.benchmark or demo and args.batch_size is None):
        args.micro_batch = 32 if args.benchmark or args.model == "demo" else 16
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
        raise ValueError(f"--init {name} is of size {size_name(loaded.cfg)}: expected a {model}")
    return loaded.train()


def held_out_batches(cfg, sources: dict, seed: int, mask_kind: str) -> dict:
    """Centre crops and masks, the same all through a run: 32 images and 8 clips of the validation
    part, or of the training part where there is none."""
    batches = {}
    for kind, root in sources.items():
        own = omnimae.has_validation(root, kind)
        if not own:
            print(f"{root} has no validation part: its held-out loss is of files trained on")
        paths = omnimae.list_media(root, kind, "val" if own else "train").paths
        views = Views(cfg, {kind: paths}, seed, mask_kind, held_out=True)
        at = np.linspace(0, len(paths) - 1, min(len(paths), {"images": 32, "videos": 8}[kind]))
        batches[kind] = collate([views[kind, 0, int(i), 0, 1] for i in at])
        for message in batches[kind][-1]:
            print(message, file=sys.stderr)
    return batches


@torch.compiler.set_stance("force_eager")  # a few odd shapes are not worth compiling for
@torch.no_grad()
def show_held_out(model: omnimae.OmniMAE, held_out: dict, run: Run) -> None:
    """Held-out losses, and pictures of the same image and clip as ever."""
    shown = []
    for kind, (pixels, visible, _) in held_out.items():
        x = omnimae.normalize(pixels.to(run.device))
        with run.autocast:
            loss, _, mask = model(x, visible.to(run.device))
            picture = omnimae.draw_reconstruction(model, x[0], mask[0])
        patches, _ = omnimae.to_patches(x, model.cfg)
        target, _, _ = omnimae.normalize_patches(omnimae.denormalize(patches[mask][None]))
        loss, zero = loss.item(), target.square().mean().item()
        (run.out / "pictures").mkdir(exist_ok=True)
        picture.save(run.out / "pictures" / f"{kind}_{run.step:06d}.png")
        run.log(step=run.step, kind=kind, held_out_loss=loss, predict_zero_loss=zero)
        shown.append(f"{kind} {loss:.3f}, {loss / zero:.2f} of predicting zero")
    run.print(f"step {run.step:6d}  held out: {'; '.join(shown)}")


def benchmark(kind: str, steps: Steps, cfg, run: Run, dataset: Views, update) -> dict:
    """Time a step of the model alone on random pixels, of the loader alone, and of both together, as
    in training. The rate of matrix products is measured just before and after the model's."""
    steps.total = sys.maxsize  # however fast it is
    pixels, visible, _ = collate([dataset[sample] for sample in next(iter(steps))])
    batch = torch.randint_like(pixels, 256).to(run.device), visible.to(run.device), []
    flops, peak = count_flops(cfg, kind), matmul_rate(run, 2048)
    seconds = {"model": timed(lambda: update(itertools.repeat(batch), steps.accumulate), run)}
    peak = (peak + matmul_rate(run, 2048)) / 2
    loader = iter(make_loader(dataset, steps, run.workers, run.device, collate))
    ready = 2 * run.workers + 1  # batches that workers make ahead
    seconds["loader"] = timed(lambda: [next(loader) for _ in range(steps.accumulate)], run, ready)
    seconds["both"] = timed(lambda: update(loader, steps.accumulate), run)
    cores = max(1, run.workers) * run.world * seconds["loader"] / seconds["model"]
    memory = memory_gb(run.device)
    figures = {"flops_per_view": flops, "matmul_flops": peak, "memory_gb": memory, "cores": cores}
    for part, took in seconds.items():
        views = steps.batch / took
        shown = f"{kind:8}{part:8}{1000 * took:12,.1f}{views:12,.1f}"
        figures[part] = {"ms": 1000 * took, "views_per_second": views}
        if part != "loader":
            figures[part] |= {"flops": views * flops, "of_matmul": views * flops / peak}
            shown += f"{views * flops / 1e12:12.3f}{views * flops / peak:12.0%}"
        run.print(shown)
    run.print(
        f"        {flops / 1e9:.2f} GFLOP/view; matrix products {peak / 1e12:.3f} TFLOP/s; peak memory "
        f"{memory:.2f} GB; a loader that keeps up needs {cores:.2f} cores"
    )
    return figures


def main(args: argparse.Namespace) -> None:
    run = Run(args)

    # The data
    sources = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
    sources = {k: demo_data(k, run) if root == "demo" else root for k, root in sources.items()}
    listings = {kind: omnimae.list_media(root, kind).paths for kind, root in sources.items()}
    sizes = {kind: len(paths) for kind, paths in listings.items()}
    views = {"images": args.image_views, "videos": args.video_views}
    how = views, args.batch_size, args.epochs, args.seed, run.rank, run.world, args.micro_batch
    steps = Steps(sizes, *how)

    # The model
    ratios = {k: v for k, v in vars(args).items() if k.endswith("mask_ratio") and v}
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
        lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True,
    )  # fmt: skip
    if not args.benchmark:
        run.open(args, sizes, model, optimizer)
    if args.compile:
        model.compile(dynamic=False)  # once for images and once for clips
    parallel = run.parallel(model, args.compress_gradients)

    def loss_of(pixels, visible):
        return parallel(omnimae.normalize(pixels), visible)[0]

    update = functools.partial(run.update, loss_of, parallel, optimizer)
    dataset = Views(cfg, listings, args.seed, args.mask)
    if args.benchmark:
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
        report = {k: vars(args)[k] for k in ("model", "batch_size", "micro_batch", "compile")}
        report |= {"device": f"{run.world} x {run.device.type}", "dtype": str(run.dtype)}
        report |= {"workers": run.workers, "torch": torch.__version__}
        run.print(", ".join(f"{key} {value}" for key, value in report.items()))
        run.print(f"{'ms/step':>28}{'views/s':>12}{'TFLOP/s':>12}{'of matmul':>12}")
        for kind, size in sizes.items():
            report[kind] = benchmark(kind, Steps({kind: size}, *how), cfg, run, dataset, update)
        if args.json:
            run.print(json.dumps(report))
        return
    peak = matmul_rate(run)
    flops = {kind: count_flops(model.cfg, kind) for kind in sizes}
    run.print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {run.dtype}, "
        f"{run.world} x {run.device.type} at {peak / 1e12:.2f} TFLOP/s in matrix products, "
        f"{run.workers} loader workers\n{' and '.join(f'{n:,} {kind}' for kind, n in sizes.items())}: "
        f"{steps.total:,} steps of {args.batch_size} views in {args.epochs} epochs; see {run.out}/"
    )

    held_out = held_out_batches(cfg, sources, args.seed, args.mask) if run.rank == 0 else {}
    steps.start = run.step
    batches = iter(make_loader(dataset, steps, run.workers, run.device, collate))
    run.begin(steps.total, peak)
    while run.step < steps.total and not run.stop:
        epoch, kind, _ = steps.at(run.step)
        lr = learning_rate(run.step, steps.total, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = update(batches, steps.accumulate)
        run.views += args.batch_size
        run.work += args.batch_size * flops[kind]

        last = run.step == steps.total
        log_now = run.step == 1 or run.step % args.log_every == 0 or last
        look_now = run.step % max(1, steps.total // 10) == 0 or last
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
    else:
        run.print(f"all {steps.total:,} steps are done: {run.out}/last.pt is the model")


def run_script(main, parse_args) -> None:
    """What a user can cause ends in a sentence, not in a traceback."""
    try:
        main(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError, FloatingPointError) as error:
        hint = "; what was saved stays: try a lower --lr or --dtype float32"
        hint = hint if isinstance(error, FloatingPointError) else ""
        reason = str(error).rsplit("ValueError: ", 1)[-1].strip()  # a worker's comes as a traceback
        sys.exit(f"{Path(sys.argv[0]).name}: {reason}{hint}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:  # loader workers are deaf to the signal with which Python would end them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()


if __name__ == "__main__":
    run_script(main, parse_args)
