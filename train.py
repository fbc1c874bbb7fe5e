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
import json
import math
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import write_png
from torchvision.transforms import InterpolationMode, v2

import omnimae

PEAK_RATE = 1.6e-3  # for 2048 views a step; the default goes with the batch
KINDS = ("images", "videos")
# options under which a run may go on with other values
FREE = {
    "images", "videos", "out", "device", "dtype", "micro_batch", "compile", "checkpoint_activations",
    "workers", "log_every", "save_minutes",
}  # fmt: skip
# what `--model demo`, or no data given, takes instead of the recipe: steps of seconds on a CPU
DEMO = {"batch_size": 64, "micro_batch": 32, "epochs": 10, "lr": 2e-3}


def seed_all(*key: int) -> None:
    """Make every random number that follows a function of `key` alone."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def learning_rate(
    step: int, total: int, peak: float, start: float = 1e-6, end: float = 0.0, warmup: float = 0.05
) -> float:
    """Linear from `start` to `peak` over the first `warmup` of the run, then a cosine to `end`."""
    done = step / total
    if done < warmup:
        return start + (peak - start) * done / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


# ------------------------------------------------------------------------------------------------
# Data: which samples a step takes, and the views that are cut from them


class Steps:
    """The order of a run, for a DataLoader's `batch_sampler`: from step `start` on, this rank's
    micro-batches, each a list of (kind, epoch, index of the file, first view, number of views).

    An epoch counts every file once; a step is all images or all videos, in one random order that
    all ranks compute alike. A file gives several views, so that many times fewer are decoded.
    """

    def __init__(self, sizes: dict, views: dict, batch: int, epochs: int, seed: int):
        self.sizes, self.views, self.batch, self.seed = sizes, views, batch, seed
        self.kinds = [kind for kind in sizes for _ in range(max(1, sizes[kind] // batch))]
        self.total, self.start = epochs * len(self.kinds), 0
        self.split(0, 1, None)

    def split(self, rank: int, world: int, micro: int | None) -> None:
        """Take rank's share of every step, `micro` views at a time. ValueError if it does not divide."""
        share = self.batch // world
        micro = min(micro or share, share)
        for kind in self.sizes:
            if self.batch % world or share % micro or micro % self.views[kind]:
                raise ValueError(
                    f"a batch of {self.batch} views does not divide into {world} processes x "
                    f"micro-batches of {micro} views x {self.views[kind]} views of one file ({kind}): "
                    "choose --batch-size and --micro-batch so that it does"
                )
        self.rank, self.world, self.micro, self.accumulate = rank, world, micro, share // micro

    def at(self, step: int) -> tuple[int, str, int]:
        """A step's epoch, its kind, and how many steps of that kind the epoch had before."""
        epoch, i = divmod(step, len(self.kinds))
        order = np.random.default_rng([self.seed, epoch]).permutation(self.kinds)
        return epoch, str(order[i]), int((order[:i] == order[i]).sum())

    def samples(self, step: int) -> list[tuple]:
        """The samples of all ranks. A data set smaller than a step is taken several times over."""
        epoch, kind, before = self.at(step)
        num, views = self.sizes[kind], self.views[kind]
        order = np.random.default_rng([self.seed, epoch, KINDS.index(kind)]).permutation(num)
        files = self.batch // views
        return [
            (kind, epoch, int(order[at % num]), at // num * views, views)
            for at in range(before * files, (before + 1) * files)
        ]

    def __iter__(self) -> Iterator[list[tuple]]:
        for step in range(self.start, self.total):
            samples = self.samples(step)
            share, views = len(samples) // self.world, samples[0][-1]
            mine = samples[self.rank * share : (self.rank + 1) * share]
            for i in range(0, share, self.micro // views):
                yield mine[i : i + self.micro // views]


class Views(Dataset):
    """Views of files: random crops and masks, or, for `held_out`, centre crops.

    A file that cannot be read is replaced by another of its data set, and reported.
    """

    def __init__(self, cfg, listings: dict, seed: int, mask_kind: str = "random", held_out=False):
        self.cfg, self.seed, self.mask_kind = cfg, seed, mask_kind
        # arrays, because lists of a million strings are copied, bit by bit, into every worker
        self.paths = {kind: np.array([os.fsencode(p) for p in paths]) for kind, paths in listings.items()}
        size = cfg.image_size
        self.crop = {
            "images": v2.Compose([
                v2.RandomResizedCrop(size, (0.2, 1), interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
            ]),
            "videos": v2.RandomResizedCrop(size, (0.08, 1)),  # no flip: left and right have meaning
        }  # fmt: skip
        if held_out:
            self.crop = dict.fromkeys(KINDS, v2.Compose([v2.Resize(size), v2.CenterCrop(size)]))

    def read(self, kind: str, index: int) -> torch.Tensor:
        path = os.fsdecode(self.paths[kind][index])
        if kind == "images":
            return omnimae.read_image(path)
        with omnimae.Video(path) as video:
            start = torch.rand(()).item() * max(video.duration - omnimae.CLIP_SECONDS, 0)
            return video.clip(start, omnimae.CLIP_SECONDS, self.cfg.num_frames)

    def __getitem__(self, sample: tuple) -> tuple[list, list, list]:
        """One file's views: pixels uint8, (H, W, 3) or (T, H, W, 3); visible indices (V,); and the
        paths that could not be read."""
        kind, epoch, index, first, views = sample
        which = KINDS.index(kind)
        unreadable = []
        for attempt in range(20):
            seed_all(self.seed, epoch, index, which, first, attempt)
            other = int(torch.randint(len(self.paths[kind]), ())) if attempt else index
            try:
                media = self.read(kind, other)  # (3, H, W) or (T, 3, H, W)
                break
            except ValueError as error:
                unreadable.append(str(error))
        else:
            raise ValueError(f"20 {kind} in a row cannot be read, the last: {unreadable[-1]}")
        t, h, w = self.cfg.grid
        grid = (1 if kind == "images" else t, h, w)
        ratio = self.cfg.image_mask_ratio if kind == "images" else self.cfg.video_mask_ratio
        pixels, visible = [], []
        for view in range(first, first + views):
            seed_all(self.seed, epoch, index, which, view)
            pixels.append(self.crop[kind](media).movedim(-3, -1).contiguous())
            visible.append((~omnimae.random_mask(1, grid, ratio, self.mask_kind)[0]).nonzero()[:, 0])
        return pixels, visible, unreadable


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pixels uint8 (B, 3, H, W) or (B, 3, T, H, W), visible (B, V), unreadable paths."""
    pixels, visible, unreadable = ([x for group in groups for x in group] for groups in zip(*samples))
    return torch.stack(pixels).movedim(-1, 1), torch.stack(visible), unreadable


def make_loader(dataset: Dataset, steps, workers: int, device: torch.device, collate) -> DataLoader:
    """One pool of workers for both kinds; `steps` says what each batch holds."""

    def deaf(_):  # a signal to the whole group is for the main process to answer
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    pin = device.type == "cuda"
    return DataLoader(dataset, batch_sampler=steps, num_workers=workers, collate_fn=collate, pin_memory=pin, worker_init_fn=deaf)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# A run: its processes, its folder, its checkpoint


class Processes:
    """This process among those of torchrun: rank, world, device, and what all must agree on."""

    def __init__(self, device: str | None):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device, self.local if device == "cuda" else None)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        self.stop = 0

    def catch_signals(self) -> None:
        """From now on SIGINT and SIGTERM finish the step, save and exit."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: setattr(self, "stop", number))

    def sum(self, *values: float) -> list[float]:
        """The sums over all ranks, without waiting for a GPU."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def workers(self, wanted: int | None) -> int:
        """Loader workers: one per core of this process's share, less the one that it runs on."""
        cores = len(os.sched_getaffinity(0)) // self.local_world
        return wanted if wanted is not None else max(1, cores - 1)

    def mean(self, value: torch.Tensor) -> float:
        """The mean over all ranks; waits for the GPU."""
        return self.sum(value.item())[0] / self.world


class Run:
    """A run's folder: `last.pt`, `log.jsonl`, `args.json`. Only rank 0 writes."""

    def __init__(self, args: argparse.Namespace, rank: int):
        self.out, self.writes = Path(args.out), rank == 0
        if self.writes:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / "args.json", "a")  # locked while the process lives
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{args.out}: another run is writing there; choose another --out") from None
            self.lock.truncate(0)
            json.dump(vars(args), self.lock, indent=1)
            self.lock.flush()
            for leftover in self.out.glob("*.tmp"):
                leftover.unlink()

    def load(self, settings: dict) -> dict | None:
        """The checkpoint to go on from, if there is one; its settings must be these."""
        path = self.out / "last.pt"
        if not path.exists():
            (self.out / "log.jsonl").unlink(missing_ok=True) if self.writes else None
            return None
        file = omnimae.read_checkpoint(path)
        old = file.get("settings", {})
        for key in sorted(settings.keys() | old.keys()):
            if old.get(key) != settings.get(key):
                raise ValueError(
                    f"{path} is of a run with {key} = {old.get(key)}, now it is {settings.get(key)}: "
                    "give --out another folder, or the same settings to go on"
                )
        if self.writes and (self.out / "log.jsonl").exists():  # forget what came after it
            lines = (self.out / "log.jsonl").read_text().splitlines(keepends=True)
            keep = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= file["step"]]
            replace_file(self.out / "log.jsonl", lambda file: file.write("".join(keep).encode()))
        return file

    def save(self, name: str, state: dict) -> None:
        """Atomically: a run killed at any moment leaves the old file or the new one."""
        if self.writes:
            replace_file(self.out / name, lambda file: torch.save(state, file))

    def log(self, **line) -> None:
        if self.writes:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def print(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)


def replace_file(path: Path, write) -> None:
    """Write beside `path`, sync to the disk, rename over it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


# ------------------------------------------------------------------------------------------------
# What the hardware does


def count_flops(cfg: omnimae.OmniMAEConfig, kind: str) -> int:
    """Floating-point operations of one view, forward and backward."""
    shape = (1, 3, cfg.image_size, cfg.image_size)
    if kind == "videos":
        shape = (1, 3, cfg.num_frames, *shape[2:])
    grid = cfg.grid if kind == "videos" else (1, *cfg.grid[1:])
    ratio = cfg.video_mask_ratio if kind == "videos" else cfg.image_mask_ratio
    num = math.prod(grid)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        visible = torch.zeros(1, num - int(ratio * num), dtype=torch.int64)
        omnimae.OmniMAE(cfg).to("meta")(torch.zeros(shape), visible)[0].backward()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the median of a few: what the device can do at most."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(times)[len(times) // 2]


# ------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pretrain OmniMAE on images and videos. Defaults are the paper's recipe; with "
        "--model demo, or no data given, small ones instead: "
        + ", ".join(f"{key} {value}" for key, value in DEMO.items()),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )

    def add(group, flag, default=None, help="", **more):
        shown = f" (default: {default})" if default not in (None, False) else ""
        group.add_argument(flag, default=default, help=help + shown, **more)

    data = parser.add_argument_group("model and data")
    add(data, "--model", "vit_b", "the size", choices=list(omnimae.MODELS))
    add(data, "--images", None, "folder of images, or 'demo'", metavar="DIR")
    add(data, "--videos", None, "folder of videos, or 'demo'; neither given: both are", metavar="DIR")
    add(data, "--out", None, "the run's folder (default: runs/MODEL)", metavar="DIR")
    add(data, "--init", None, "start from this pretraining checkpoint: a path or released name")
    recipe = parser.add_argument_group("recipe")
    add(recipe, "--epochs", 800, "the released checkpoints: 1600", type=int)
    add(recipe, "--batch-size", 2048, "views a step, over all processes", type=int)
    add(recipe, "--lr", None, f"peak learning rate (default: {PEAK_RATE} * batch size / 2048)", type=float)
    add(recipe, "--weight-decay", 0.05, "not on biases and LayerNorm", type=float)
    add(recipe, "--image-views", 1, "views of an image in a step", type=int)
    add(recipe, "--video-views", 4, "views of a video in a step, decoded once", type=int)
    add(recipe, "--image-mask-ratio", None, "share masked (default: the model's, 0.90)", type=float)
    add(recipe, "--video-mask-ratio", None, "share masked (default: the model's, 0.95)", type=float)
    add(recipe, "--mask", "random", "how clips are masked", choices=["random", "tube"])
    add(recipe, "--seed", 0, "of everything random", type=int)
    machine = parser.add_argument_group("machine: changes speed and memory, not what is learnt")
    add(machine, "--device", None, "default: a GPU if there is one", choices=["cuda", "cpu"])
    add(machine, "--dtype", None, "autocast (default: bfloat16 where the device has it; demo: float32)",
        choices=["float32", "bfloat16", "float16"])  # fmt: skip
    add(machine, "--micro-batch", None, "views at once on a device (default: all of its share)", type=int)
    add(machine, "--compile", False, "torch.compile the model", action="store_true")
    add(machine, "--checkpoint-activations", False, "compute activations again: less memory", action="store_true")  # fmt: skip
    add(machine, "--compress-gradients", False, "send bfloat16 between devices", action="store_true")
    add(machine, "--workers", None, "loader processes a device (default: its share of the cores)", type=int)
    add(machine, "--log-every", 10, "steps", type=int)
    add(machine, "--save-minutes", 10.0, "between checkpoints", type=float)
    args, _ = parser.parse_known_args(argv)
    if args.model == "demo" or not (args.images or args.videos):
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if not (args.images or args.videos):
        args.images = args.videos = "demo"
    args.out = args.out or f"runs/{args.model}"
    args.lr = args.lr or PEAK_RATE * args.batch_size / 2048
    return args


def demo_data(kind: str, processes: Processes) -> str:
    """Where the demo data set is; the first process on each node writes it on first use."""
    root = Path("demo_data")
    if not root.exists() and processes.local == 0:
        print(f"writing the demo data set to {root}/, once, under a minute", flush=True)
        omnimae.write_demo_data(root)
    processes.sum(0)  # the others wait
    return str(root / kind)


def choose_dtype(name: str | None, device: torch.device, model: str) -> torch.dtype:
    if name:
        return getattr(torch, name)
    if model == "demo":
        return torch.float32  # matrices this small gain nothing
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def held_out_batches(cfg, sources: dict, seed: int) -> dict:
    """Fixed centre crops and masks: 32 images, 8 clips, from the validation part where there is one."""
    batches = {}
    for kind, root in sources.items():
        try:
            paths = omnimae.list_media(root, kind, "val").paths
        except (ValueError, OSError):
            paths = omnimae.list_media(root, kind).paths
        views = Views(cfg, {kind: paths}, seed, held_out=True)
        num = min(len(paths), 32 if kind == "images" else 8)
        at = np.linspace(0, len(paths) - 1, num).astype(int)
        batches[kind] = collate([views[kind, 0, int(i), 0, 1] for i in at])
    return batches


@torch.no_grad()
def look(model: omnimae.OmniMAE, held_out: dict, run: Run, step: int, autocast) -> None:
    """Held-out losses, and pictures of the same image and clip as ever."""
    shown = []
    for kind, (pixels, visible, _) in held_out.items():
        x = omnimae.normalize(pixels.to(model.norm.weight.device))
        visible = visible.to(x.device)
        with autocast:
            loss, _, mask = model(x, visible)
            patches, _ = omnimae.to_patches(x, model.cfg)
            target, _, _ = omnimae.normalize_patches(omnimae.target_pixels(patches[mask][None]))
            zero = target.square().mean()
            picture = omnimae.draw_reconstruction(model, x[0], mask[0])
        (run.out / "pictures").mkdir(exist_ok=True)
        write_png(picture, str(run.out / "pictures" / f"{kind}_{step:06d}.png"))
        run.log(step=step, kind=kind, held_out_loss=loss.item(), predict_zero_loss=zero.item())
        shown.append(f"{kind} {loss.item():.3f} ({loss.item() / zero.item():.2f} of predicting zero)")
    run.print(f"step {step:6d}  held out: {', '.join(shown)}")


def check_finite(step: int, loss: float | torch.Tensor, arrived: torch.cuda.Event | None = None):
    if arrived:
        arrived.synchronize()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of step {step} is {float(loss)}, so the run ends here; last.pt is of an earlier, "
            "good step: try a lower --lr or --dtype float32"
        )


def memory_gb(device: torch.device) -> float:
    """The most that was in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def start_from(name: str, model: str, cfg: omnimae.OmniMAEConfig) -> omnimae.OmniMAE:
    """A pretraining checkpoint of the same sizes, with `cfg`'s mask ratios."""
    loaded = omnimae.load_checkpoint(name)
    if not isinstance(loaded, omnimae.OmniMAE):
        raise ValueError(
            f"--init {name}: is a finetuned checkpoint; expected a pretraining one, which has the "
            f"decoder, like {model}_pretrain"
        )
    same = replace(cfg, decoder_qkv_bias=loaded.cfg.decoder_qkv_bias)
    ratios = {"image_mask_ratio": cfg.image_mask_ratio, "video_mask_ratio": cfg.video_mask_ratio}
    if replace(loaded.cfg, **ratios) != same:
        raise ValueError(f"--init {name}: is not a {model}: its sizes are {loaded.cfg}")
    start = omnimae.OmniMAE(same)
    start.load_state_dict(loaded.state_dict())
    return start


def main(args: argparse.Namespace) -> None:
    processes = Processes(args.device)
    device, rank, world = processes.device, processes.rank, processes.world
    run = Run(args, rank)

    # The model
    cfg = omnimae.MODELS[args.model]
    cfg = replace(
        cfg,
        image_mask_ratio=args.image_mask_ratio or cfg.image_mask_ratio,
        video_mask_ratio=args.video_mask_ratio or cfg.video_mask_ratio,
    )
    torch.manual_seed(args.seed)
    model = start_from(args.init, args.model, cfg) if args.init else omnimae.OmniMAE(cfg)
    model.to(device)
    for module in model.modules():
        if isinstance(module, omnimae.Blocks):
            module.checkpointing = args.checkpoint_activations
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]  # and LayerNorm's
    optimizer = torch.optim.AdamW(
        [{"params": weights}, {"params": biases, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True,
    )  # fmt: skip
    dtype = choose_dtype(args.dtype, device, args.model)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # The data
    sources = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
    for kind in sources:
        if sources[kind] == "demo":
            sources[kind] = demo_data(kind, processes)
    listings = {kind: omnimae.list_media(root, kind).paths for kind, root in sources.items()}
    views = {"images": args.image_views, "videos": args.video_views}
    sizes = {kind: len(paths) for kind, paths in listings.items()}
    steps = Steps(sizes, views, args.batch_size, args.epochs, args.seed)
    steps.split(rank, world, args.micro_batch)
    held_out = held_out_batches(cfg, sources, args.seed) if rank == 0 else {}

    # Where the run was, if this command ran before
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings |= {"files": sizes, "precision": str(dtype)}
    read, unreadable = 0, 0
    if file := run.load(settings):
        model.load_state_dict(file["model"])
        optimizer.load_state_dict(file["optimizer"])
        scaler.load_state_dict(file["scaler"])
        steps.start, read, unreadable = file["step"], file["read"], file["unreadable"]
        run.print(f"{args.out}: going on after step {steps.start:,} of {steps.total:,}")

    def save(step: int) -> None:
        run.save("last.pt", {
            "config": asdict(cfg), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "settings": settings, "step": step, "read": read,
            "unreadable": unreadable,
        })  # fmt: skip

    dataset = Views(cfg, listings, args.seed, args.mask)
    loader = make_loader(dataset, steps, processes.workers(args.workers), device, collate)
    trained = model
    if args.compile:
        model.compile(dynamic=False)  # once for images and once for clips
    if world > 1:
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if args.compress_gradients:
            trained.register_comm_hook(None, bf16_compress_hook)

    rate = matmul_rate(device, dtype)
    flops = {kind: count_flops(cfg, kind) for kind in listings}
    found = " and ".join(f"{num:,} {kind}" for kind, num in sizes.items())
    run.print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {dtype}, "
        f"{world} x {device.type} at {rate / 1e12:.2f} TFLOP/s in matrix products\n"
        f"{found}: {steps.total:,} steps of {args.batch_size} views in {args.epochs} epochs, "
        f"{loader.num_workers} loader workers; see {args.out}/"
    )

    processes.catch_signals()
    batches, pending, named = iter(loader), deque(), set()
    began = logged = saved = time.monotonic()
    waited, work, seen = 0.0, 0.0, 0
    for step in range(steps.start, steps.total):
        epoch, kind, _ = steps.at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps.total, args.lr)
        loss, lost = 0.0, 0
        for micro in range(1, steps.accumulate + 1):
            before = time.monotonic()
            pixels, visible, broken = next(batches)
            waited += time.monotonic() - before
            x = omnimae.normalize(pixels.to(device, non_blocking=True))
            visible = visible.to(device, non_blocking=True)
            alone = world > 1 and micro < steps.accumulate  # gradients are summed with the last
            with trained.no_sync() if alone else nullcontext():
                with autocast:
                    part = trained(x, visible)[0] / steps.accumulate
                scaler.scale(part).backward()
            loss = loss + part.detach()
            lost += len(broken)
            for message in set(broken) - named:
                print(message, file=sys.stderr, flush=True)
            named.update(broken)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen += args.batch_size
        work += args.batch_size * flops[kind]

        # What all ranks must agree on: numbers of the host, so nothing waits for the GPU here
        done = step + 1
        due = rank == 0 and time.monotonic() - saved > args.save_minutes * 60
        stop, due, lost = processes.sum(processes.stop, due, lost)
        read, unreadable = read + args.batch_size // views[kind], unreadable + int(lost)
        last = done == steps.total
        log_now = step == 0 or done % args.log_every == 0 or last
        look_now = done % max(1, steps.total // 10) == 0 or last
        if not (stop or due or log_now or look_now):
            # The loss of the step before is there by now, so this does not stall the device; and it
            # keeps the host from running ahead, so that waiting for data means what it says.
            arrived = torch.cuda.Event() if device.type == "cuda" else None
            pending.append((done, loss.to("cpu", non_blocking=True), arrived))
            if arrived:
                arrived.record()
            while len(pending) > (device.type == "cuda"):
                check_finite(*pending.popleft())
            continue

        pending.clear()
        mean = processes.mean(loss)
        check_finite(done, mean)
        if read >= 100 and unreadable > 0.1 * read:
            raise ValueError(f"{unreadable:,} of the {read:,} files read so far cannot be read: more than 10 %")
        if log_now:
            now = time.monotonic()
            line = {
                "step": done,
                "epoch": epoch,
                "kind": kind,
                "loss": mean,
                "lr": optimizer.param_groups[0]["lr"],
                "unreadable": unreadable,
                "views_per_second": seen / (now - logged),
                "data_wait": waited / (now - logged),
                "utilisation": work / (now - logged) / (rate * world),
                "memory_gb": memory_gb(device),
            }
            run.log(**line)
            left = (now - began) / (done - steps.start) * (steps.total - done)
            run.print(
                f"step {done:6d}  epoch {epoch:3d}  {kind}  loss {mean:.4f}  lr {line['lr']:.1e}  "
                f"{line['views_per_second']:6,.0f} views/s  data wait {line['data_wait']:3.0%}  "
                f"use {line['utilisation']:3.0%}  {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left"
                + (f"  {unreadable} unreadable" if unreadable else "")
            )
            logged, waited, work, seen = now, 0.0, 0.0, 0
        if look_now and rank == 0:
            look(model, held_out, run, done, autocast)
        if stop or due or last:
            save(done)
            saved = time.monotonic()
        if stop and not last:
            run.print(f"stopped and saved after step {done:,}; the same command goes on from there")
            break
    else:
        run.print(f"{args.out}: all {steps.total:,} steps are done; {args.out}/last.pt is the model")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
