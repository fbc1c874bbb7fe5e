"""Pretrain OmniMAE on images and videos. finetune.py and eval.py share the parts before `main`.

    torchrun train.py --model demo                                   minutes on a laptop's CPU
    torchrun --nproc_per_node=8 train.py --model vit_b --images IN1K --videos SSV2

The same command again resumes a run. Every random number is a function: of (seed, epoch, file,
view) for windows, crops, flips and masks, of (seed, epoch) for the order. So a resumed run ends
with the same bits on a CPU, and processes, workers and accumulation change nothing in a step.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

# ------------------------------------------------------------------------------------------------
# The recipe: the released configuration for ViT-B. The README says where each value comes from.

KINDS = ("images", "videos")
RECIPE = {"epochs": 800, "batch_size": 2048, "lr": 1.6e-3}  # lr: the peak, for that batch size
DEMO = {"epochs": 12, "batch_size": 64, "lr": 6e-4}


def learning_rate(step: int, total: int, peak: float, end=0.0, warmup=0.05) -> float:
    """Linear from 1e-6 to `peak` over the first `warmup` of the steps, then a cosine to `end`."""
    done = step / total
    if done < warmup:
        return 1e-6 + (peak - 1e-6) * done / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def random_crops(size: int) -> dict:
    """The crops of pretraining. Videos are not flipped: left and right have a meaning."""
    image = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    video = v2.RandomResizedCrop(size, (0.08, 1.0))  # bilinear
    return {"images": v2.Compose([image, v2.RandomHorizontalFlip(0.5)]), "videos": video}


# ------------------------------------------------------------------------------------------------
# Data: which files a step takes, and the views that are cut from them


# a file, and how many views of it a step takes
Sample = namedtuple("Sample", ["kind", "epoch", "index", "views"])


@functools.lru_cache(maxsize=4)
def permutation(num: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(num)


class Steps:
    """The order of a run, for a DataLoader's `batch_sampler`: this rank's micro-batches from step
    `start` on. `files` and `views` (of a file) are numbers for each kind.

    A step takes all its views from one kind of data. An epoch's steps come in one random order. They
    have as many views as there are files: every image once; with 4 views each, every 4th video."""

    def __init__(self, files: dict, views: dict, args: argparse.Namespace, run: "Run"):
        self.files, self.views, self.batch, self.seed = files, views, args.batch_size, args.seed
        self.rank, self.start, share = run.rank, 0, args.batch_size // run.world
        self.micro = args.micro_batch or min(share, 64 if run.device.type == "cuda" else 16)
        self.accumulate = share // self.micro  # micro-batches of a rank in a step
        for kind, num in files.items():
            if self.batch % (run.world * self.micro) or self.micro % views[kind]:
                raise ValueError(
                    f"--batch-size {self.batch} does not divide into {run.world} processes x "
                    f"--micro-batch {self.micro}, in whole {kind} of {views[kind]} views"
                )
            if num * views[kind] < self.batch:
                raise ValueError(
                    f"{num} {kind}: give a --batch-size of at most {num * views[kind]}"
                )
        # an epoch's steps: each takes one block of the shuffled files
        blocks = {kind: max(1, num // self.batch) for kind, num in files.items()}
        self.blocks = [(kind, block) for kind in files for block in range(blocks[kind])]
        self.total = args.epochs * len(self.blocks)

    def locate(self, step: int) -> tuple[int, str, int]:
        """A step's epoch, its kind, and its block of files."""
        epoch, i = divmod(step, len(self.blocks))
        return epoch, *self.blocks[permutation(len(self.blocks), self.seed, epoch)[i]]

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in range(self.start, self.total):
            epoch, kind, block = self.locate(step)
            order = permutation(self.files[kind], self.seed, epoch, 1 + KINDS.index(kind))
            num = self.micro // self.views[kind]  # files in a micro-batch
            begin = block * self.batch // self.views[kind] + self.rank * self.accumulate * num
            for i in range(begin, begin + self.accumulate * num, num):
                files = order[i : i + num].tolist()
                yield [Sample(kind, epoch, index, self.views[kind]) for index in files]


def seed_all(*key: int) -> None:
    """Seeds PyTorch, so that what is drawn from here on depends on `key` only."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than a crop
    if torch.cuda.is_initialized():  # not in a worker
        torch.cuda.manual_seed(seed)


class Views(Dataset):
    """Views of files: crops and random masks. `crops` has a transform for each kind."""

    def __init__(self, cfg: omnimae.OmniMAEConfig, paths: dict, seed: int, crops: dict):
        self.cfg, self.seed, self.crops = cfg, seed, crops
        # arrays: the reference counts of a list would make each worker copy its million strings
        self.paths = {kind: np.array([os.fsencode(x) for x in paths[kind]]) for kind in paths}

    def read(self, sample: Sample) -> tuple[Tensor, int]:
        """Pixels of a file, uint8 (3, H, W) or (T, 3, H, W), and its index. A file that cannot be
        read is named and replaced by a random one; ValueError after twenty."""
        kind, epoch, index, _ = sample
        for attempt in range(20):
            seed_all(self.seed, epoch, sample.index, KINDS.index(kind), 0, attempt)
            if attempt > 0:
                index = int(torch.randint(len(self.paths[kind]), ()))
            path, start = os.fsdecode(self.paths[kind][index]), torch.rand(()).item()
            try:
                if kind == "images":
                    return omnimae.read_image(path), index
                return omnimae.read_clips(path, [start], self.cfg.num_frames)[0], index
            except ValueError as error:
                print(error, file=sys.stderr, flush=True)
        raise ValueError(f"20 {kind} in a row cannot be read: see the messages above")

    def __getitem__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Views of a file, uint8 (views, 3, H, W) or (views, 3, T, H, W), and the indices of their
        visible patches (views, V)."""
        pixels, visible = [], []
        media, _ = self.read(sample)
        for view in range(sample.views):
            seed_all(self.seed, sample.epoch, sample.index, KINDS.index(sample.kind), 1 + view)
            pixels.append(self.crops[sample.kind](media).movedim(-3, 0))
            mask = omnimae.random_mask(1, *self.cfg.masking(sample.kind))
            visible.append((~mask[0]).nonzero()[:, 0])
        return torch.stack(pixels), torch.stack(visible)


def make_loader(dataset: Dataset, run: "Run", **options) -> DataLoader:
    def ignore_signals(_worker):  # torchrun and Ctrl-C send them to workers as well
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    time.sleep(0.1)  # forking workers during a gloo collective can deadlock (Python 3.11)
    return DataLoader(
        dataset, num_workers=run.workers, persistent_workers=run.workers > 0,
        pin_memory=run.device.type == "cuda", worker_init_fn=ignore_signals, **options,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# A run: its processes, its precision, its folder


class Run:
    """This process among torchrun's (without torchrun rank 0 of 1), and the run that they share: its
    step, and its folder with last.pt and log.jsonl, which rank 0 writes."""

    def __init__(self, args: argparse.Namespace):
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        numbers = [int(os.environ.get(name, default)) for name, default in names.items()]
        self.rank, self.world, self.local_rank, local_world = numbers
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"no GPU for process {self.local_rank}: start fewer, or --device cpu"
                )
            torch.cuda.set_device(self.local_rank)
        cores = len(os.sched_getaffinity(0)) // local_world
        self.workers = max(1, cores - 1) if args.workers is None else args.workers
        if self.world > 1:
            store, _, _ = next(dist.rendezvous("env://"))
            if self.world == local_world:  # keep addresses apart from those before a restart
                restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"restart {restarts}", store)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        self.out, self.step, self.first_step = Path(args.out), 0, 0
        self.stop = self.save_due = False  # the same on all ranks
        self.signal = None  # the number of the signal that came

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Sums numbers over all ranks, on the host: no GPU sync."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    @contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """What is downloaded or written once on a machine: the other ranks wait for the first."""
        if self.local_rank > 0:
            self.sum_over_ranks(0)
        yield
        if self.local_rank == 0:
            self.sum_over_ranks(0)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def log(self, **line) -> None:
        """Adds a line to log.jsonl. A resumed run may log a step twice: the last line counts."""
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step} | line) + "\n")

    def resume(self, recipe: dict, **states) -> dict:
        """Continues from last.pt, if there is one with the same `recipe`, and returns its content.
        `states` are the model, optimizer and scaler. From here on, signals finish a step and save."""
        self.recipe, self.states = recipe, states
        path, file = self.out / "last.pt", {}
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            file = omnimae.read_checkpoint(str(path))
            for key, value in recipe.items():
                if (old := file.get("recipe", {}).get(key)) != value:
                    message = f"{path} is of a run with {key} {old}, not {value}"
                    raise ValueError(f"{message}: give the same to resume, or another --out")
            for key, state in states.items():
                state.load_state_dict(file[key])
            self.step = self.first_step = file["step"]
            self.say(f"resuming {self.out} after step {self.step}")
        if self.sum_over_ranks(self.step)[0] != self.step * self.world:
            raise ValueError(f"not all machines see the same {path}: --out must be a shared folder")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: setattr(self, "signal", number))
        self.began = self.saved = time.monotonic()
        self.begin_interval()
        return file

    def save(self, name: str = "last.pt", **more) -> None:
        """Writes a checkpoint atomically: a killed run leaves the old file or the new one."""
        self.saved, model = time.monotonic(), self.states["model"]
        if self.rank > 0:
            return
        if not all(weights.isfinite().all() for weights in model.parameters()):
            raise FloatingPointError(f"the weights of step {self.step} are not finite; not saved")
        content = {key: state.state_dict() for key, state in self.states.items()} | more
        content |= {"config": asdict(model.cfg), "recipe": self.recipe, "step": self.step}
        with open(self.out / f"{name}.tmp", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.out / f"{name}.tmp", self.out / name)

    def begin_interval(self) -> None:
        """Speed is measured from one log line to the next."""
        self.interval_began, self.waited, self.views = time.monotonic(), 0.0, 0

    def next_batch(self, batches: Iterator) -> list[Tensor]:
        """A micro-batch, on the device."""
        before = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - before
        return [tensor.to(self.device, non_blocking=True) for tensor in batch]

    def end_step(self, views: int, save_minutes: float) -> None:
        """Counts a step. All ranks then agree whether to stop and whether to save."""
        self.step += 1
        self.views += views
        due = self.rank == 0 and time.monotonic() - self.saved > 60 * save_minutes
        signals, due = self.sum_over_ranks(self.signal is not None, due)
        self.stop, self.save_due = signals > 0, due > 0

    def report(self, label: str, loss: Tensor, lr: float, total: int, **more) -> None:
        """Logs and prints the step just ended. FloatingPointError if its loss is not finite."""
        loss = self.sum_over_ranks(loss.item())[0] / self.world
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.step} is {loss}: try a lower --lr")
        seconds = time.monotonic() - self.interval_began
        speed, wait = self.views / seconds, self.waited / seconds
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = torch.cuda.max_memory_allocated() or rss  # the first is 0 without a GPU
        self.log(**more, loss=loss, lr=lr, views_per_second=speed, wait=wait, memory_bytes=memory)
        pace = (time.monotonic() - self.began) / (self.step - self.first_step)
        minutes, seconds = divmod(int(pace * (total - self.step)), 60)
        self.say(
            f"step {self.step:6d}  {label}  loss {loss:.3f}  lr {lr:.1e}  {speed:,.0f} views/s  "
            f"wait {wait:.0%}  {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        )
        self.begin_interval()


def precision(args: argparse.Namespace, device: torch.device, cfg: omnimae.OmniMAEConfig) -> tuple:
    """Autocast and gradient scaler: bfloat16, or float16 on GPUs without it; demo model float32."""
    name = args.dtype or ("float32" if cfg.dim < 256 else "bfloat16")
    if not args.dtype and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        name = "float16"
    if name == "float16" and device.type == "cpu":
        raise ValueError("--dtype float16 needs a GPU: give bfloat16 or float32")
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
    if run.world == 1:
        return model
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parallel.broadcast_buffers = False  # position tables: constants
    return parallel


def run_script(main, parse_args) -> None:
    """Prints a user's error in one line. `main` returns the signal that stopped it, or None: the
    script then ends by that signal, so that a shell's loop or && stops as well."""
    name = Path(sys.argv[0]).name
    try:
        stopped_by = main(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError, FloatingPointError) as error:
        message = str(error).rsplit("ValueError: ", 1)[-1].strip()  # a worker's has its traceback
        sys.exit(f"{name}: {message}")
    except (RuntimeError, MemoryError) as error:
        if "out of memory" not in str(error) and "allocate" not in str(error):
            raise
        sys.exit(f"{name}: out of memory: try a smaller --micro-batch, or --checkpoint-activations")
    finally:  # workers ignore SIGTERM, so kill them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
        for worker in multiprocessing.active_children():
            worker.kill()
    if stopped_by:
        signal.signal(stopped_by, signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by)


# ------------------------------------------------------------------------------------------------
# Options


def add_machine_options(parser: argparse.ArgumentParser, training: bool = True) -> None:
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of autocast (see README)")
    add("--workers", type=int, help="loader processes (default: cores of each process less one)")
    if training:
        add("--seed", type=int, default=0, help="seeds everything random (default: 0)")
        add("--micro-batch", type=int, help="views at once (default: 64 on a GPU, 16 on a CPU)")
        add("--checkpoint-activations", action="store_true", help="less memory, a third more FLOPs")
        add("--compile", action="store_true", help="torch.compile the model")
        add("--log-every", type=int, default=10, help="steps between log lines (default: 10)")
        add("--save-minutes", type=float, default=10.0, help="between checkpoints (default: 10)")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parses the options. Numbers must be positive, except some that may be 0."""
    args = parser.parse_args(argv)
    may_be_0 = ("workers", "seed", "weight_decay", "drop_path", "save_minutes")
    for name, value in vars(args).items():
        positive = type(value) not in (int, float) or 0 < value < math.inf
        if value == "" or not (positive or value == 0 and name in may_be_0):
            parser.error(f"--{name.replace('_', '-')}: got {value!r}, expected a positive number")
    return args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="torchrun %(prog)s [--model M] [--images DIR] [--videos DIR] [options]",
        description="Pretrain OmniMAE on images and videos. The same command resumes a run.",
    )
    add = parser.add_argument
    add("--model", choices=list(omnimae.MODELS), default="vit_b", help="default: vit_b")
    add("--images", help="folder of images, or 'demo'")
    add("--videos", help="folder of videos, or 'demo'; without either, both are the demo set")
    add("--out", help="folder of the run (default: runs/MODEL)")
    add("--init", help="pretraining checkpoint to start from: released name, URL or path")
    add("--epochs", type=int, help="passes over the data (default: 800; demo 12)")
    add("--batch-size", type=int, help="views a step, over all ranks (default: 2048; demo 64)")
    add("--lr", type=float, help="peak, default in proportion to the batch (1.6e-3; demo 6e-4)")
    add("--video-views", type=int, default=4, help="views of a video in a step (default: 4)")
    add("--image-mask-ratio", type=float, help="default: 0.90; demo model 0.75")
    add("--video-mask-ratio", type=float, help="default: 0.95; demo model 0.90")
    add_machine_options(parser)
    args = parse(parser, argv)
    if not (args.images or args.videos):
        args.images = args.videos = "demo"
    recipe = DEMO if "demo" in (args.model, args.images, args.videos) else RECIPE
    args.epochs = args.epochs or recipe["epochs"]
    args.batch_size = args.batch_size or recipe["batch_size"]
    recipe = DEMO if args.model == "demo" else RECIPE
    args.lr = args.lr or recipe["lr"] * args.batch_size / recipe["batch_size"]
    args.out = args.out or f"runs/{args.model}"
    return args


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
    "Moving [something] to the left": (-1, 0, 0, 0), "Moving [something] to the right": (1, 0, 0, 0),
    "Moving [something] up": (0, -1, 0, 0), "Shrinking [something]": (0, 0, -1, 0),
    "Turning [something] clockwise": (0, 0, 0, 1),
    "Turning [something] counterclockwise": (0, 0, 0, -1),
}  # fmt: skip


def draw_shape(rng, shape: str, num_frames=1, motion=(0, 0, 0, 0), angle=0.0) -> np.ndarray:
    """One large shape before a wall, uint8 (T, 72, 96, 3). Light is from above in every file: a
    masked autoencoder first learns what differs most between files, and that should be the shape."""
    y, x = np.mgrid[:72, :96] - np.array([36, 48])[:, None, None]
    t = np.linspace(-0.5, 0.5, num_frames)[:, None, None] * (num_frames > 1)  # (T, 1, 1)
    x0 = rng.uniform(-14, 14) + 32 * motion[0] * t
    y0 = rng.uniform(-8, 8) + 26 * motion[1] * t
    size, turn = rng.uniform(20, 28) * np.exp(motion[2] * t), angle + 2.4 * motion[3] * t
    u = (np.cos(turn) * (x - x0) + np.sin(turn) * (y - y0)) / size
    v = (np.cos(turn) * (y - y0) - np.sin(turn) * (x - x0)) / size
    inside = np.clip((1 - SHAPES[shape](u, v)) * size / 2 + 0.5, 0, 1)[..., None]  # soft edge
    above = -y[..., None] / 72  # from -0.5 at the bottom to 0.5 at the top
    dark, bright = rng.uniform(0, 60, 3), rng.uniform(195, 255, 3)
    wall = dark + (bright - dark) * (above + 0.5)
    front = rng.permutation([30, 230, rng.uniform(30, 230)]) * (0.8 - above)
    return (wall + (front - wall) * inside).clip(0, 255).astype(np.uint8)


def write_clip(path: Path, frames: np.ndarray, fps: int = 12) -> None:
    """Writes frames (T, H, W, 3) uint8 as a VP9 .webm file."""
    with av.open(str(path), "w", container_options={"fflags": "bitexact"}) as container:
        options = {"deadline": "realtime", "cpu-used": "8"}
        stream = container.add_stream("libvpx-vp9", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate, stream.codec_context.thread_count = 500_000, 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_demo_data(root, images=3200, videos=1600, val_images=400, val_videos=320) -> None:
    """Writes the demo data set to a new folder: the same files every time, complete or not at all.

    root/images has JPEGs in ImageNet's layout, by shape. root/videos has VP9 .webm files of 2 to
    4 s in SSv2's layout, by motion, which the frame in the middle does not tell.
    """
    root, shapes, motions = Path(root), list(SHAPES), list(MOTIONS)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        work = Path(folder, "complete")
        clips, labels = work / "videos" / "20bn-something-something-v2", work / "videos" / "labels"

        def write_image(split, i):
            rng, shape = np.random.default_rng([0, split == "val", i]), shapes[i % 8]
            path = work / "images" / split / shape / f"{shape}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(draw_shape(rng, shape)[0]).save(path, quality=95)

        def write_video(i):
            rng = np.random.default_rng([1, i])
            shape = ("half", "star", "triangle", "square")[rng.integers(4)]  # whose turning shows
            num_frames, motion = int(rng.integers(24, 49)), MOTIONS[motions[i % 8]]
            frames = draw_shape(rng, shape, num_frames, motion, angle=rng.uniform(0, 2 * np.pi))
            write_clip(clips / f"{i + 1}.webm", frames)

        clips.mkdir(parents=True)
        labels.mkdir()
        samples = [
            {"id": f"{i + 1}", "template": motions[i % 8]} for i in range(videos + val_videos)
        ]
        names = {x.replace("[", "").replace("]", ""): str(i) for i, x in enumerate(motions)}
        (labels / "labels.json").write_text(json.dumps(names))
        (labels / "train.json").write_text(json.dumps(samples[:videos]))
        (labels / "validation.json").write_text(json.dumps(samples[videos:]))
        with ThreadPoolExecutor() as pool:
            list(pool.map(write_video, range(videos + val_videos)))
            list(pool.map(write_image, ["train"] * images, range(images)))
            list(pool.map(write_image, ["val"] * val_images, range(val_images)))
        work.rename(root)


def data_root(name: str, kind: str, run: Run) -> str:
    """A data set's folder; for "demo" the demo's, which is written on first use."""
    with run.first_rank_first():
        if name == "demo" and not Path("demo_data").exists():
            print("writing the demo data set to demo_data/, once, in under a minute", flush=True)
            write_demo_data("demo_data")
    return f"demo_data/{kind}" if name == "demo" else name


# ------------------------------------------------------------------------------------------------
# Pretraining


@torch.compiler.set_stance("force_eager")  # a few odd shapes are not worth compiling for
@torch.no_grad()
def look(model: omnimae.OmniMAE, held_out: Views, run: Run, autocast) -> None:
    """Logs the loss of 32 images and 8 clips, beside that of predicting zero everywhere, and draws
    the first of each: always the same views."""
    shown = []
    for kind, paths in held_out.paths.items():
        num = min(len(paths), {"images": 32, "videos": 8}[kind])
        indices = np.linspace(0, len(paths) - 1, num).astype(int).tolist()
        views = [held_out[Sample(kind, 0, index, 1)] for index in indices]
        pixels, visible = (torch.cat(x).to(run.device) for x in zip(*views))
        x = omnimae.normalize(pixels)
        with autocast:
            loss, _, mask = model(x, visible)
            picture = omnimae.draw_reconstruction(model, x[0], mask[0])
        masked = omnimae.to_patches(x, model.cfg)[0][mask]  # (B M, P)
        target, _, _ = omnimae.normalize_patches(omnimae.to_pixels(masked[None]))
        loss, zero = loss.item(), target.square().mean().item()
        (run.out / "pictures").mkdir(exist_ok=True)
        picture.save(run.out / "pictures" / f"{kind}_{run.step:06d}.png")
        run.log(kind=kind, held_out_loss=loss, predict_zero_loss=zero)
        shown.append(f"{kind} {loss:.3f} ({loss / zero:.2f} of predicting zero)")
    run.say(f"step {run.step:6d}  held-out loss: {', '.join(shown)}")


def main(args: argparse.Namespace) -> int | None:
    run = Run(args)

    # The data
    roots = {kind: data_root(vars(args)[kind], kind, run) for kind in KINDS if vars(args)[kind]}
    paths = {kind: omnimae.list_media(root, kind).paths for kind, root in roots.items()}
    held_out = dict(paths)  # the training files, where there is no validation split
    for kind, root in roots.items():
        if omnimae.has_validation(root, kind):
            held_out[kind] = omnimae.list_media(root, kind, "val").paths
    files = {kind: len(paths[kind]) for kind in paths}
    steps = Steps(files, {"images": 1, "videos": args.video_views}, args, run)

    # The model
    ratios = {x: vars(args)[x] for x in ("image_mask_ratio", "video_mask_ratio") if vars(args)[x]}
    cfg = replace(omnimae.MODELS[args.model], **ratios)
    torch.manual_seed(args.seed)
    with run.first_rank_first():
        model = omnimae.load_checkpoint(args.init).train() if args.init else omnimae.OmniMAE(cfg)
    if not isinstance(model, omnimae.OmniMAE) or model.cfg.dim != cfg.dim:
        raise ValueError(f"--init {args.init}: expected a pretraining checkpoint of {args.model}")
    model.cfg = replace(cfg, decoder_qkv_bias=model.cfg.decoder_qkv_bias)
    parallel = prepare(model, args, run)
    matrices = [x for x in model.parameters() if x.ndim > 1]
    vectors = [x for x in model.parameters() if x.ndim == 1]  # biases and LayerNorm
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    autocast, scaler = precision(args, run.device, cfg)

    names = ("model", "epochs", "batch_size", "lr", "video_views", "init", "seed")
    recipe = {name: vars(args)[name] for name in names} | ratios | files
    run.resume(recipe, model=model, optimizer=optimizer, scaler=scaler)
    run.say(
        f"pretraining {args.model} on {' and '.join(f'{files[kind]:,} {kind}' for kind in files)}: "
        f"{steps.total:,} steps\nof {args.batch_size} views in {args.epochs} epochs, on {run.world} x "
        f"{run.device.type}; log, pictures and checkpoint in {run.out}/"
    )
    centre = v2.Compose([v2.Resize(cfg.image_size), v2.CenterCrop(cfg.image_size)])
    held_out = Views(cfg, held_out, args.seed, dict.fromkeys(KINDS, centre))
    dataset = Views(cfg, paths, args.seed, random_crops(cfg.image_size))
    steps.start = run.step
    batches = iter(make_loader(dataset, run, batch_sampler=steps))

    while run.step < steps.total and not run.stop:
        epoch, kind, _ = steps.locate(run.step)  # all images or all videos
        lr = learning_rate(run.step, steps.total, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        mean_loss = torch.zeros((), device=run.device)
        for i in range(steps.accumulate):
            # (B, 3, H, W) or (B, 3, T, H, W); (B, V)
            pixels, visible = (x.flatten(0, 1) for x in run.next_batch(batches))
            last_micro_batch = i == steps.accumulate - 1
            parallel.require_backward_grad_sync = last_micro_batch  # ranks average once a step
            with autocast:
                loss, _, _ = parallel(omnimae.normalize(pixels), visible)
            scaler.scale(loss / steps.accumulate).backward()
            mean_loss += loss.detach() / steps.accumulate
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        run.end_step(args.batch_size, args.save_minutes)
        last = run.step == steps.total
        if run.step == 1 or run.step % args.log_every == 0 or last:
            run.report(kind, mean_loss, lr, steps.total, epoch=epoch, kind=kind)
        if run.step % math.ceil(steps.total / 10) == 0 or last:
            if run.rank == 0:
                look(model, held_out, run, autocast)
            run.begin_interval()
        if run.stop or run.save_due or last:
            run.save()
    if run.step < steps.total:
        run.say(f"stopped and saved after step {run.step}; the same command resumes the run")
        return run.signal
    run.say(
        f"done: {run.out}/last.pt is the model, {run.out}/pictures/ has reconstructions. Next:\n"
        f"torchrun finetune.py --checkpoint {run.out}/last.pt --images {args.images or 'DIR'}"
    )
    return None


if __name__ == "__main__":
    run_script(main, parse_args)
