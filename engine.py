"""What the scripts share, and what is not the method: random numbers and the loader; a run among
torchrun's processes, its folder and the parts of its loop; what the hardware does; options.

The loops themselves are in `main` of train.py and finetune.py.
"""

import argparse
import fcntl
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import omnimae

# options that may change when a run goes on; the precision that comes of the first two may not
RESUMABLE = {
    "device", "dtype", "images", "videos", "out", "micro_batch", "compile", "checkpoint_activations",
    "workers", "log_every", "save_minutes",
}  # fmt: skip


def seed_all(*key: int) -> None:
    """Seed PyTorch, so that what is drawn from now on depends on `key` alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would take longer than a crop
    if torch.cuda.is_initialized():  # not in the loader's workers
        torch.cuda.manual_seed(seed)


def ignore_signals(_worker: int) -> None:
    """In a loader's worker: a signal to the whole group is for the main process to answer. If that
    ends while it takes a tensor, a thread here would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


def make_loader(
    dataset: Dataset, batches, workers: int, device: torch.device, collate
) -> DataLoader:
    """A loader of the batches that the sampler `batches` lists, be they of images or of videos."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
        collate_fn=collate, pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
    )  # fmt: skip


def start_workers(loader: DataLoader) -> Iterator:
    """A loader's batches. Its workers are started here, once, and after a rest: a process that Python
    3.11 forks hangs if gloo's thread is just taking the interpreter's lock, as after a collective."""
    time.sleep(0.1)
    return iter(loader)


# ------------------------------------------------------------------------------------------------
# A run: its processes, its precision, its folder, and the parts of its loop


class Run:
    """A run among torchrun's processes: of pretraining, finetuning or evaluation. The first two
    `open` a folder for `last.pt`, `log.jsonl` and `args.json`, which rank 0 writes."""

    def __init__(self, args: argparse.Namespace):
        names = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")
        self.rank, self.world, self.local, local_world = (int(os.environ.get(*x)) for x in names)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device, self.local if device == "cuda" else None)
        if device == "cuda":
            if self.local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {self.local} on this machine has no GPU: PyTorch sees "
                    f"{torch.cuda.device_count()}; start no more processes than GPUs, or give --device cpu"
                )
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # torchrun restarts processes on the same store: without a prefix they could find there the
            # addresses of those before. Several machines do not count restarts alike.
            store, _, _ = next(dist.rendezvous("env://"))
            if self.world == local_world:
                restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"restart {restarts}", store)
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        cores = len(os.sched_getaffinity(0)) // local_world
        self.workers = max(1, cores - 1) if args.workers is None else args.workers

        self.dtype = choose_dtype(args.dtype, self.device, args.model)
        self.autocast = torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(device, enabled=self.dtype == torch.float16)

        self.seed = args.seed
        self.step = 0  # this and the next two are saved with the model
        self.tried = self.unreadable = 0  # files, over all ranks
        self.unreadable_here = 0  # on this rank, since the ranks last agreed
        self.signalled = None  # the number of the signal that came
        self.stop = self.due = False  # all ranks stop; it is time to save
        self.named = set()  # messages about files, which are printed once
        self.losses = []  # not looked at yet
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
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
            model.broadcast_buffers = False  # they are constants
            if compress:
                model.register_comm_hook(None, bf16_compress_hook)
        return model

    def begin(self, total: int, rate: float) -> None:
        """The loop of `total` steps begins, on devices of `rate` FLOP/s. From now on SIGINT and SIGTERM
        finish the step, save and exit."""
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, lambda number, _: setattr(self, "signalled", number))
        self.total, self.rate, self.first, self.began = total, rate, self.step, time.monotonic()
        self.begin_window()

    # The folder

    def open(self, args: argparse.Namespace, data: dict, model, optimizer) -> dict:
        """Make the folder this process's own, and go on from `last.pt`: returns its content, or {} if
        there is none. It must be of a run with the same sizes of the model, counts of the data,
        precision, and options except those in RESUMABLE."""
        self.out = Path(args.out)
        if self.out.is_file():
            raise ValueError(f"--out {self.out} is a file: expected a folder")
        if self.rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                self.lock = open(self.out / "args.json", "a")  # noqa: SIM115 (held until the process ends)
            except OSError as error:
                raise OSError(f"--out {self.out} cannot be made or written: {error}") from error
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(
                    f"another run is writing to {self.out}: choose another --out"
                ) from None
            except OSError:
                pass  # a file system without locks
        self.settings = {key: value for key, value in vars(args).items() if key not in RESUMABLE}
        self.settings |= {"data": data, "precision": str(self.dtype)} | asdict(model.cfg)
        log, path = self.out / "log.jsonl", self.out / "last.pt"
        lines, file = [], {}
        if path.exists():
            file = omnimae.read_checkpoint(path)
            old = file.get("settings", {})
            for key in ["model", *sorted(self.settings.keys() | old.keys())]:  # which says most
                if old.get(key) != self.settings.get(key):
                    raise ValueError(
                        f"{path} is of a run with {key} {old.get(key)}, this one has "
                        f"{self.settings.get(key)}: choose another --out, or the same to go on"
                    )
            model.load_state_dict(file["model"])
            optimizer.load_state_dict(file["optimizer"])
            self.scaler.load_state_dict(file["scaler"])
            self.step, self.tried, self.unreadable = file["step"], file["tried"], file["unreadable"]
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
                "step": self.step, "tried": self.tried, "unreadable": self.unreadable, **more,
            }  # fmt: skip
            replace_file(self.out / name, lambda file: torch.save(state, file))
        self.saved = time.monotonic()

    def log(self, **line) -> None:
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def print(self, text: str) -> None:
        if self.rank == 0:
            self.write(text, sys.stdout)

    def name(self, messages: list[str]) -> None:
        """Print what is wrong with files, on any rank, once."""
        for message in set(messages) - self.named:
            self.write(message, sys.stderr)
        self.named.update(messages)

    def write(self, text: str, file: TextIO) -> None:
        """If the reader has gone, as tee has after Ctrl-C, the run stops and saves as at a signal."""
        try:
            print(text, file=file, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
            self.signalled = self.signalled or signal.SIGPIPE

    # The loop's parts

    def begin_window(self) -> None:
        """Speed is measured from one logged step to the next."""
        self.window_began, self.waited, self.views, self.work = time.monotonic(), 0.0, 0, 0.0

    def report(self, epoch: int, kind: str, loss: float, lr: float) -> None:
        """Log the step, print it with the time left, and begin the next window."""
        seconds = time.monotonic() - self.window_began
        line = {
            "step": self.step, "epoch": epoch, "kind": kind, "loss": loss, "lr": lr,
            "unreadable": self.unreadable, "views_per_second": self.views / seconds,
            "data_wait": self.waited / seconds, "utilisation": self.work / seconds / self.rate,
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

    def micro_batches(self, batches: Iterator, accumulate: int, model) -> Iterator[list]:
        """The tensors of a step's micro-batches, on the device. Gradients are averaged over the ranks
        during the last one's backward pass."""
        for micro in range(1, accumulate + 1):
            before = time.monotonic()
            *batch, messages = next(batches)
            self.waited += time.monotonic() - before
            self.unreadable_here += len(messages)
            self.name(messages)
            seed_all(self.seed, self.step, self.rank, micro)  # drop path, MixUp
            with nullcontext() if micro == accumulate or self.world == 1 else model.no_sync():
                yield [tensor.to(self.device, non_blocking=True) for tensor in batch]

    def agree(self, loss: torch.Tensor, files: int, want_loss: bool) -> float | None:
        """After a step that took `files` files: sum flags and counts over the ranks, so that all log,
        save, stop or fail together. The losses are looked at only when one is wanted or before saving,
        because that waits for the device; then this step's mean loss is returned, else None."""
        self.losses.append(loss)
        due = self.rank == 0 and time.monotonic() - self.saved > self.save_seconds
        self.stop, self.due, unreadable = self.sum(bool(self.signalled), due, self.unreadable_here)
        self.tried += files + int(unreadable)  # for each of these, another was tried
        self.unreadable += int(unreadable)
        self.unreadable_here = 0
        if not (want_loss or self.stop or self.due):
            return None
        losses = self.sum(*torch.stack(self.losses).tolist())
        for step, total in enumerate(losses, self.step + 1 - len(losses)):
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss of step {step} is {total}")
        self.losses.clear()
        if self.tried >= 100 and self.unreadable > 0.1 * self.tried:
            raise ValueError(
                f"{self.unreadable:,} of the {self.tried:,} files tried so far cannot be read, more "
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
    """The name of a config's size, such as "vit_b", whatever its mask ratios; else "other"."""

    def size(cfg):
        return replace(cfg, decoder_qkv_bias=False, image_mask_ratio=0, video_mask_ratio=0)

    names = {size(other): name for name, other in omnimae.MODELS.items()}
    return names.get(size(cfg), "other")


def demo_data(kind: str, run: Run) -> str:
    """Where the demo data set is; the first process writes it on first use."""
    root = Path("demo_data")
    if run.rank == 0 and not root.exists():
        print(f"writing the demo data set to {root}/, once, in under a minute", flush=True)
        try:
            omnimae.write_demo_data(root)
        except OSError:
            if not root.exists():  # no other run wrote it meanwhile
                raise
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


def time_parts(steps, run: Run, dataset: Dataset, collate, update) -> tuple[dict, float]:
    """Seconds of a step of the model alone on random pixels, of the loader alone, and of both
    together, as in training; and the rate of matrix products, just before and after the model's."""
    steps.total = sys.maxsize  # however fast it is
    pixels, visible, _ = collate([dataset[sample] for sample in next(iter(steps))])
    batch = torch.randint_like(pixels, 256).to(run.device), visible.to(run.device), []
    before = matmul_rate(run, 2048)
    model = timed(lambda: update(itertools.repeat(batch)), run)
    rate = (before + matmul_rate(run, 2048)) / 2
    loader = start_workers(make_loader(dataset, steps, run.workers, run.device, collate))
    ready = 2 * run.workers + 1  # batches that workers make ahead
    alone = timed(lambda: [next(loader) for _ in range(steps.accumulate)], run, ready)
    both = timed(lambda: update(loader), run)
    return {"model": model, "loader": alone, "both": both}, rate


def benchmark(args, run: Run, cfg, samplers: dict, dataset: Dataset, collate, update) -> None:
    """Time steps of each kind in `samplers` and print a table; with --json also a line of JSON."""
    report = {key: vars(args)[key] for key in ("model", "batch_size", "compile")}
    report["micro_batch"] = next(iter(samplers.values())).micro
    report |= {"device": f"{run.world} x {run.device.type}", "dtype": str(run.dtype)}
    report |= {"workers": run.workers, "torch": torch.__version__}
    run.print(", ".join(f"{key} {value}" for key, value in report.items()))
    run.print(f"{'ms/step':>28}{'views/s':>12}{'TFLOP/s':>12}{'of matmul':>12}")
    for kind, steps in samplers.items():
        seconds, rate = time_parts(steps, run, dataset, collate, update)
        flops, memory = count_flops(cfg, kind), memory_gb(run.device)
        cores = max(1, run.workers) * run.world * seconds["loader"] / seconds["model"]
        figures = {
            "flops_per_view": flops,
            "matmul_flops_per_second": rate,
            "memory_gb": memory,
            "cores": cores,
        }
        for part, took in seconds.items():
            views = args.batch_size / took
            shown = f"{kind:8}{part:8}{1000 * took:12,.1f}{views:12,.1f}"
            figures[part] = {"ms": 1000 * took, "views_per_second": views}
            if part != "loader":
                figures[part] |= {
                    "flops_per_second": views * flops,
                    "of_matmul": views * flops / rate,
                }
                shown += f"{views * flops / 1e12:12.3f}{views * flops / rate:12.0%}"
            run.print(shown)
        run.print(
            f"        {flops / 1e9:.2f} GFLOP/view; matrix products {rate / 1e12:.3f} TFLOP/s; peak "
            f"memory {memory:.2f} GB; a loader that keeps up needs {cores:.2f} cores"
        )
        report[kind] = figures
    if args.json:
        run.print(json.dumps(report))


# ------------------------------------------------------------------------------------------------
# Options, and how a script ends


def number(of: type, least: int, below: int) -> Callable[[str], float]:
    """An option's type: whole numbers, or any, from `least` to less than `below`."""

    def parse(text: str) -> float:
        try:
            value = of(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            what = f"{'whole ' if of is int else ''}number, {least} or more, less than {below:,}"
            raise argparse.ArgumentTypeError(f"{text!r}: expected a {what}")
        return value

    return parse


whole, positive = number(int, 0, 2**32), number(int, 1, 10**6)
amount, share = number(float, 0, 10**6), number(float, 0, 1)


def given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError(
            "'', perhaps of an unset variable: expected a name or path"
        )
    return text


def model_name(text: str) -> str:
    if text not in omnimae.MODELS:
        near = omnimae.did_you_mean(text, omnimae.MODELS)
        raise argparse.ArgumentTypeError(f"{text!r}: none of {', '.join(omnimae.MODELS)}{near}")
    return text


def option_parser(description: str, usage: str) -> argparse.ArgumentParser:
    def form(prog):
        return argparse.HelpFormatter(prog, max_help_position=27, width=100)

    return argparse.ArgumentParser(
        description=description, usage=usage, formatter_class=form, allow_abbrev=False
    )


def option_group(parser: argparse.ArgumentParser, title: str):
    """A group of options, as the function that adds one."""
    options = parser.add_argument_group(title)

    def add(flag, help, **more):
        shown = " (default: %(default)s)" if more.get("default") is not None else ""
        name = "X" if more.get("type") in (amount, share) else "N"
        if "choices" not in more and "action" not in more:
            more = {"metavar": name, "type": given} | more
        options.add_argument(flag, help=help + shown, **more)

    return add


# fmt: off
def device_options(add) -> None:
    add("--device", "(default: a GPU if there is one)", choices=["cuda", "cpu"])
    add("--dtype", "of autocast (default: bfloat16, on GPUs without it float16; demo model: float32)", choices=["float32", "bfloat16", "float16"])
    add("--workers", "loader processes a device, in finetuning as many again for validation (default: its share of the cores less one, at least 1)", type=whole)


def machine_options(parser: argparse.ArgumentParser) -> None:
    """What pretraining and finetuning have in common."""
    add = option_group(parser, "machine (speed and memory)")
    device_options(add)
    add("--micro-batch", "views at once on a device (default: all of its share of the batch; in pretraining without --batch-size, demo model: 32, demo data: 16)", type=positive)
    add("--compile", "torch.compile the model", action="store_true")
    add("--checkpoint-activations", "compute activations twice: less memory", action="store_true")
    add("--compress-gradients", "send gradients as bfloat16", action="store_true")
    add("--log-every", "steps between log lines", type=positive, default=10)
    add("--save-minutes", "minutes between checkpoints", type=amount, default=10.0)
# fmt: on


NO_MEMORY = "(out of|allocate) memory|ALLOC_FAILED"  # in what PyTorch says


def run_script(main, parse_args) -> None:
    """What a user can cause ends in a sentence, not in a traceback. `main` returns the signal that
    stopped it, if any: the script then ends by it, so that a shell's loop or && ends, too."""
    name, stopped_by = Path(sys.argv[0]).name, None
    try:
        stopped_by = main(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()
    except BrokenPipeError:  # as of `| head`
        stopped_by = signal.SIGPIPE
    except (ValueError, OSError, FloatingPointError) as error:
        hint = "; what was saved stays: try a lower --lr or --dtype float32, with another --out"
        hint = hint if isinstance(error, FloatingPointError) else ""
        reason = str(error).rsplit("ValueError: ", 1)[-1].strip()  # a worker's comes as a traceback
        if isinstance(error, OSError) and error.filename:  # the system's own words
            reason = f"{error.filename} cannot be read or written: {error.strerror}"
        sys.exit(f"{name}: {reason}{hint}")
    except (RuntimeError, MemoryError) as error:
        if re.search("DataLoader worker|shared memory", str(error)):
            sys.exit(
                f"{name}: a loader's process was ended, as when memory or /dev/shm is full: try fewer "
                "--workers"
            )
        if "closed by peer" in str(error):
            sys.exit(f"{name}: another process has ended: its message says why")
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        sys.exit(
            f"{name}: out of memory: try a smaller --micro-batch, then, in training, "
            "--checkpoint-activations"
        )
    except KeyboardInterrupt:
        stopped_by = signal.SIGINT
    finally:  # loader workers are deaf to the signal with which Python would end them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would raise for a killed worker
        for worker in multiprocessing.active_children():
            worker.kill()
    if stopped_by:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        signal.signal(stopped_by, signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by)
