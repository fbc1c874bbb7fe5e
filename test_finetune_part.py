"""The tests of finetuning and evaluation."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import finetune
import omnimae
import train
from omnimae import MODELS, Classifier
from test_omnimae import (  # noqa: F401
    HERE,
    TINY,
    assert_same_bits,
    demo,
    log,
    pretrain,
    released,
    released_shapes,
    released_state,
    weights,
    write_numbered,
)

# ------------------------------------------------------------------------------------------------
# Finetuning


@pytest.fixture
def finetuning(demo, tmp_path):  # noqa: F811
    """Run finetune.py in this process: from scratch, 6 steps of images in two epochs."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*options, start=("scratch", "--model", "demo"), out="run", data=None):
        arguments = [
            "--checkpoint", *start, *(data or ("--images", demo / "images")), "--batch-size", 16,
            "--epochs", 2, "--workers", 0, "--log-every", 1, "--device", "cpu", "--out", tmp_path / out,
            *options,
        ]  # fmt: skip
        finetune.main(finetune.parse_args([str(argument) for argument in arguments]))
        return tmp_path / out

    yield run
    for number, handler in handlers:
        signal.signal(number, handler)


def test_layer_decay_and_weight_decay_by_hand():
    with torch.device("meta"):
        model = Classifier(MODELS["vit_b"], 1000)
    groups = finetune.parameter_groups(model, layer_decay=0.65, weight_decay=1e-4)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale, decay = {}, {}
    for group in groups:
        for parameter in group["params"]:
            scale[names[parameter]] = group["scale"]
            decay[names[parameter]] = group["weight_decay"]
    assert len(scale) == len(names)
    for name, power in (
        ("head.weight", 1), ("head.bias", 1), ("norm.weight", 1), ("encoder.blocks.11.mlp.fc2.bias", 2),
        ("encoder.blocks.0.attn.qkv.weight", 13), ("encoder.patch_embed.weight", 14),
    ):  # fmt: skip
        assert scale[name] == pytest.approx(0.65**power)
    assert decay["head.weight"] == decay["encoder.blocks.3.attn.qkv.weight"] == 1e-4
    assert decay["head.bias"] == decay["encoder.blocks.3.norm1.weight"] == 0
    assert {name for name in decay if decay[name]} == {
        name for name, parameter in model.named_parameters() if parameter.ndim == 2
    }


@pytest.mark.parametrize(
    ("options", "rates"),
    [  # of the head at the start, after half of the warm-up, at the peak, at the end
        (("--images", "x"), (1e-6, (1e-6 + 4e-3) / 2, 4e-3, 1e-6)),
        (("--videos", "x"), (1e-6, (1e-6 + 1e-3) / 2, 1e-3, 1e-6)),
    ],
)
def test_the_schedules_by_hand(options, rates):
    args = finetune.parse_args(["--checkpoint", "vit_b_pretrain", *options])
    args.model = "vit_b"
    finetune.fill_in(args, "images" if args.images else "videos")
    steps = (0, 1000 * args.warmup / 2, 1000 * args.warmup, 1000)
    got = [train.learning_rate(step, 1000, args.lr, end=1e-6, warmup=args.warmup) for step in steps]
    assert got == pytest.approx(rates, rel=1e-6)
    assert args.warmup == (0.05 if args.images else 0.125)
    assert args.layer_decay == (0.65 if args.images else 0.75)


def test_recipes_go_with_the_size_and_the_batch():
    def recipe(model, *options):
        args = finetune.parse_args(["--checkpoint", "x", *options])
        args.model = model
        finetune.fill_in(args, "images" if args.images else "videos")
        return args

    assert recipe("vit_b", "--images", "x", "--batch-size", "256").lr == pytest.approx(1e-3)
    large = recipe("vit_l", "--videos", "x")
    assert (large.epochs, large.layer_decay, large.drop_path, large.lr) == (50, 0.75, 0.2, 1e-3)
    assert recipe("vit_h", "--images", "x", "--drop-path", "0.4").drop_path == 0.4
    assert recipe("vit_b", "--images", "demo").batch_size == 64
    assert recipe("vit_b", "--images", "x", "--freeze").drop_path == 0


def test_rand_augment_is_one_draw_for_all_frames():
    frame = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        clip = finetune.rand_augment(frame.expand(4, -1, -1, -1), 4, 7.0, 0.0, 0.5)
        assert clip.shape == (4, 3, 32, 32) and clip.dtype == torch.uint8
        assert all(torch.equal(other, clip[0]) for other in clip)
        torch.manual_seed(seed)
        assert torch.equal(finetune.rand_augment(frame, 4, 7.0, 0.0, 0.5), clip[0])
        changed += not torch.equal(clip[0], frame)
    assert changed > 10


def test_erasing_blackens_images_and_fills_clips_with_noise():
    torch.manual_seed(0)
    boxes = torch.tensor([[4, 8, 20, 16], [0, 0, 0, 0]])
    image = finetune.erase(torch.ones(2, 3, 32, 32), boxes)
    black = -omnimae.MEAN / omnimae.STD
    torch.testing.assert_close(
        image[0, :, 4:24, 8:24], black[:, None, None].expand(-1, 20, 16), atol=1e-6, rtol=0
    )
    assert (image[0] == 1).sum() == 3 * (32 * 32 - 20 * 16) and (image[1] == 1).all()
    clip = finetune.erase(torch.ones(2, 3, 4, 32, 32), boxes)
    noise = clip[0, :, :, 4:24, 8:24]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(noise[:, 0], noise[:, 1])  # a value of its own for each pixel and frame
    assert (clip[0] == 1).sum() == 3 * 4 * (32 * 32 - 20 * 16) and (clip[1] == 1).all()


@pytest.mark.parametrize("kind", train.KINDS)
def test_augmented_samples_follow_from_seed_epoch_and_sample(demo, kind):  # noqa: F811
    listing = evaluation.list_labelled(demo / kind, kind, "train")
    files = finetune.Labelled(MODELS["demo"], kind, listing, 0, "full")
    samples = [(kind, 0, i, 0, 1) for i in range(16)]
    one = finetune.collate([files[sample] for sample in samples])
    torch.manual_seed(5)
    other = finetune.collate([files[sample] for sample in reversed(samples)])
    shape = (3, 64, 64) if kind == "images" else (3, 8, 64, 64)
    assert one[0].shape == (16, *shape) and one[0].dtype == torch.uint8
    for a, b in zip(one[:3], other[:3]):
        assert torch.equal(a, b.flip(0))
    assert one[1].tolist() == listing.labels[:16]
    assert 0 < (one[2].sum(1) > 0).sum() < 16  # some are erased
    assert not torch.equal(finetune.collate([files[kind, 1, 0, 0, 1]])[0][0], one[0][0])


def test_a_replaced_file_has_its_own_label(demo, tmp_path):  # noqa: F811
    shutil.copytree(demo / "images", tmp_path / "data")
    listing = evaluation.list_labelled(tmp_path / "data", "images", "train")
    for path in listing.paths[:40]:
        Path(path).write_bytes(b"")
    files = finetune.Labelled(MODELS["demo"], "images", listing, 0, "crop")
    labels = [files["images", 0, i, 0, 1][1] for i in range(8)]
    assert set(labels) <= set(listing.labels[40:]) and labels != listing.labels[:8]


@pytest.mark.parametrize("kind", train.KINDS)
def test_a_finetuned_run_stopped_or_killed_goes_on_to_the_same_bits(
    finetuning,
    demo,  # noqa: F811
    monkeypatch,
    kind,
):
    data = (f"--{kind}", demo / kind)
    options = ("--augment", "full", "--drop-path", 0.3, "--micro-batch", 8)  # all that is random
    whole = finetuning(*options, data=data, out="whole")
    update = train.Run.update

    def stopped(run, *args):
        loss = update(run, *args)
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    def killed(run, *args):
        loss = update(run, *args)
        if run.step == (5 if kind == "images" else 3):
            raise ZeroDivisionError
        return loss

    monkeypatch.setattr(train.Run, "update", stopped)
    part = finetuning(*options, data=data, out="part")
    assert omnimae.read_checkpoint(part / "last.pt")["step"] == 1
    monkeypatch.setattr(train.Run, "update", killed)
    with pytest.raises(ZeroDivisionError):
        finetuning(*options, data=data, out="part")
    assert not (part / "last.pt.tmp").exists()
    monkeypatch.undo()
    finetuning(*options, "--workers", 2, data=data, out="part")
    assert_same_bits(whole, part)
    for field in ("top1", "top5"):
        assert log(whole, field) == log(part, field) and len(log(part, field)) == 2
    files = {path.name for path in part.iterdir()}
    assert files == {"last.pt", "best.pt", "log.jsonl", "args.json"}


def test_a_run_saves_classes_and_the_best_epoch(finetuning):
    out = finetuning("--lr", 1e-3)
    model = omnimae.load_checkpoint(out / "best.pt")
    assert isinstance(model, Classifier) and model.classes == list(omnimae.SHAPES)
    best = omnimae.read_checkpoint(out / "best.pt")
    assert best["best"] == max(log(out, "top1"))


def test_finetuning_starts_from_the_encoder(pretrain, finetuning, demo):  # noqa: F811
    first = pretrain(out="first")
    still = ("--lr", 0.0, "--epochs", 1)  # a rate so small that weights stay
    second = finetuning(*still, start=(first / "last.pt",), out="second")
    for key, value in weights(second).items():
        if key.startswith("encoder."):
            torch.testing.assert_close(value, weights(first)[key], atol=1e-4, rtol=0)
    assert abs(weights(second)["norm.weight"] - 1).max() < 1e-4  # not the pretraining model's
    assert weights(second)["head.weight"].abs().max() < 1e-3
    tuned = finetuning("--freeze", "--lr", 0.1, start=(first / "last.pt",), out="tuned")
    for key, value in weights(tuned).items():
        same = torch.equal(value, weights(first).get(key, value + 1))
        assert same == key.startswith("encoder."), key
    videos = ("--videos", demo / "videos")
    third = finetuning(*still, start=(tuned / "best.pt",), data=videos, out="third")
    tuned_best = omnimae.read_checkpoint(tuned / "best.pt")["model"]
    torch.testing.assert_close(
        weights(third)["norm.weight"], tuned_best["norm.weight"], atol=1e-4, rtol=0
    )
    assert weights(third)["head.weight"].std() == pytest.approx(0.01, rel=0.2)
    assert omnimae.load_checkpoint(third / "last.pt").classes[0] == "Growing something"


@pytest.mark.parametrize(
    "options", [("--checkpoint-activations",), ("--dtype", "bfloat16"), ("--micro-batch", 4)]
)
def test_options_of_finetuning_run(finetuning, options):
    assert log(finetuning(*options, "--epochs", 1))[0] == pytest.approx(math.log(8), abs=0.05)


# ------------------------------------------------------------------------------------------------
# Evaluation


def run_eval(*options) -> None:
    options = ["--device", "cpu", "--workers", 0, *options]
    evaluation.main(evaluation.parse_args([str(option) for option in options]))


def plain_image(path: Path) -> torch.Tensor:
    """The protocol of images in PIL and torch alone: (3, 224, 224)."""
    image = PIL.Image.open(path).convert("RGB")
    width, height = image.size
    if width < height:
        image = image.resize((224, int(224 * height / width)), PIL.Image.BICUBIC)
    else:
        image = image.resize((int(224 * width / height), 224), PIL.Image.BICUBIC)
    width, height = image.size
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    image = image.crop((left, top, left + 224, top + 224))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture(scope="module")
def released_vit_b(tmp_path_factory) -> Path:
    """torch.hub's folder, with released-layout ViT-B files of reproducible weights."""
    hub = tmp_path_factory.mktemp("hub")
    (hub / "checkpoints").mkdir()
    for name, num_classes in (("vit_b_in1k", 1000), ("vit_b_ssv2", 174)):
        path = hub / "checkpoints" / omnimae.CHECKPOINTS[name].rsplit("/", 1)[-1]
        torch.save(released_state(released_shapes(MODELS["vit_b"], num_classes)), path)
    return hub


@pytest.fixture
def hub(released_vit_b, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(released_vit_b))


def test_a_released_in1k_checkpoint_is_evaluated_exactly(hub, tmp_path, capsys):
    rng, paths = np.random.default_rng(0), []
    for i in range(1000):  # as many folders as classes; but for four, of an unreadable file each
        folder = tmp_path / "in1k" / "val" / f"n{i:08d}"
        folder.mkdir(parents=True)
        (folder / "image.JPEG").touch()
    for i, (height, width) in enumerate(((301, 225), (224, 500), (97, 133), (640, 223))):
        paths.append(tmp_path / "in1k" / "val" / f"n{i:08d}" / "image.JPEG")
        coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
        PIL.Image.fromarray(coarse).resize((width, height)).save(paths[-1])
    x = torch.stack([plain_image(path) for path in paths])
    for path, plain in zip(paths, x):  # bit for bit before the model
        pixels = evaluation.read_views(str(path), "images", MODELS["vit_b"], 1)
        assert torch.equal(evaluation.crop_views(pixels, 224, 1)[0], plain)
    logits = omnimae.load_checkpoint("vit_b_in1k")(x)
    run_eval(
        "--checkpoint", "vit_b_in1k", "--images", tmp_path / "in1k", "--dtype", "float32",
        "--predictions", tmp_path / "p.csv",
    )  # fmt: skip
    top5 = logits.topk(5).indices.tolist()
    right1 = sum(row[0] == i for i, row in enumerate(top5)) / 10
    right5 = sum(i in row for i, row in enumerate(top5)) / 10
    shown = capsys.readouterr().out
    assert f"top-1 {right1:.2f} % (published: 83.0 %)" in shown
    assert f"top-5 {right5:.2f} %, 996 unreadable counted as wrong" in shown
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1000 and rows[10]["best_1"] == "unreadable"
    for i, row in enumerate(rows[:4]):
        assert (row["path"], row["label"]) == (str(paths[i]), f"n{i:08d}")
        assert [row[f"best_{k}"] for k in range(1, 6)] == [f"n{c:08d}" for c in top5[i]]
        expected = logits[i].softmax(0).topk(5).values.tolist()
        assert [float(row[f"probability_{k}"]) for k in range(1, 6)] == pytest.approx(
            expected, rel=1e-4
        )

    run_eval("--checkpoint", "vit_b_in1k", paths[0], "--dtype", "float32")
    names = evaluation.ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    assert names[top5[0][0]] in capsys.readouterr().out.splitlines()[1]


def test_a_released_ssv2_checkpoint_evaluates_and_predicts(hub, tmp_path, capsys):
    names = [f"Doing {i}" for i in range(174)]
    root = tmp_path / "ssv2"
    (root / "20bn-something-something-v2").mkdir(parents=True)
    (root / "labels").mkdir()
    samples = [{"id": "7", "template": "Doing [3]"}, {"id": "8", "template": "Doing [5]"}]
    (root / "labels/labels.json").write_text(
        json.dumps({name: str(i) for i, name in enumerate(names)})
    )
    (root / "labels/validation.json").write_text(json.dumps(samples))
    path = write_numbered(root / "20bn-something-something-v2" / "7.webm")
    options = ("--checkpoint", "vit_b_ssv2", "--dtype", "float32", "--views", "1x1")
    run_eval(*options, "--videos", root)
    shown = capsys.readouterr()
    assert "2 videos, 1 views of each" in shown.out and "(published: 69.5 %)" in shown.out
    assert "1 unreadable counted as wrong" in shown.out and "8.webm: cannot be read" in shown.err
    run_eval(*options, "--labels", root / "labels/labels.json", path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path) and len(lines) == 6 and "Doing " in lines[1]
    run_eval(*options, path)
    assert "class " in capsys.readouterr().out


def plain_views(path: Path, size: int, num_frames: int) -> list[torch.Tensor]:
    """The 15 views of a clip, written down plainly: (3, T, S, S) each."""
    with av.open(str(path)) as container:
        frames = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    duration, views = frames[-1][0], []
    for i in range(5):
        start = i * max(duration - 2.7, 0) / 5
        inside = [pixels for time, pixels in frames if start <= time < start + 2.7]
        kept = [inside[int(at)] for at in np.linspace(0, len(inside) - 1, num_frames)]
        x = torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2) / 255
        height, width = x.shape[2:]
        if width < height:
            shape = (math.floor(height * size / width), size)
        else:
            shape = (size, math.floor(width * size / height))
        x = F.interpolate(x, shape, mode="bilinear", align_corners=False, antialias=False)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        long = max(shape)
        for at in (0, math.ceil((long - size) / 2), long - size):
            crop = x[..., at : at + size] if width >= height else x[..., at : at + size, :]
            views.append(crop.transpose(0, 1))
    return views


@pytest.mark.parametrize(("width", "height"), [(90, 52), (50, 70), (64, 64)])
def test_the_views_of_a_clip_are_the_protocols(tmp_path, width, height):
    noise = np.random.default_rng(0).integers(0, 256, (44, height, width, 3), dtype=np.uint8)
    omnimae.write_clip(tmp_path / "clip.webm", noise)
    clips = evaluation.read_views(str(tmp_path / "clip.webm"), "videos", MODELS["demo"], 5)
    views = evaluation.crop_views(clips, 64, 3)
    plain = torch.stack(plain_views(tmp_path / "clip.webm", 64, 8))
    assert views.shape == (15, 3, 8, 64, 64)
    assert torch.equal(views, plain)
    assert torch.equal(evaluation.crop_views(clips, 64, 1), plain[1::3])  # the centre


def test_logits_are_averaged_over_views(released, tmp_path, capsys):  # noqa: F811
    torch.save(released(6), tmp_path / "tiny.torch")
    model = omnimae.load_checkpoint(tmp_path / "tiny.torch")
    path = write_numbered(tmp_path / "clip.webm")
    run_eval("--checkpoint", tmp_path / "tiny.torch", path, "--dtype", "float32")
    probability = model(torch.stack(plain_views(path, 32, 4))).mean(0).softmax(0)
    shown = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in shown] == [f"{p:.2%}" for p in probability.topk(5).values]


def test_each_file_counts_once_on_any_number_of_processes(demo, finetuning, tmp_path):  # noqa: F811
    out = finetuning("--lr", 3e-3, "--epochs", 4)
    shutil.copytree(demo / "images", tmp_path / "data")
    files = sorted((tmp_path / "data/val").rglob("*.JPEG"))
    for path in files[1:6:2]:
        path.unlink()  # leaves 13
    files[0].write_bytes(b"broken")
    shown = []
    for processes in (1, 2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
        if processes > 1:
            command += ["--master_port", 29500 + os.getpid() % 1000]
        table = tmp_path / f"{processes}.csv"
        command += [
            HERE / "eval.py", "--checkpoint", out / "best.pt", "--images", tmp_path / "data", "--device",
            "cpu", "--workers", 1, "--batch-size", 3, "--predictions", table,
        ]  # fmt: skip
        done = subprocess.run(
            [str(word) for word in command], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("cannot be read") == 1
        shown.append(done.stdout)
        rows = list(csv.DictReader(table.read_text().splitlines()))
        assert len({row["path"] for row in rows}) == len(rows) == 13
        right = sum(row["label"] == row["best_1"] for row in rows)
        assert f"13 images, 1 views of each\ntop-1 {100 * right / 13:.2f} %" in done.stdout
    assert shown[0] == shown[1] == shown[2] and "1 unreadable counted as wrong" in shown[0]


def test_pictures_and_films_of_reconstructions(released, demo, tmp_path, capsys):  # noqa: F811
    torch.save(released(), tmp_path / "tiny.torch")
    clip = demo / "videos" / "20bn-something-something-v2" / "1.webm"
    image = next((demo / "images" / "val").rglob("*.JPEG"))
    options = ("--checkpoint", tmp_path / "tiny.torch", image, clip)
    run_eval(*options, "--out", tmp_path / "one")
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    assert {path.name for path in one.iterdir()} == {
        f"{image.name}.png",
        "1.webm.png",
        "1.webm.mp4",
    }
    assert PIL.Image.open(one / f"{image.name}.png").size == (3 * 34 + 2, 34 + 2)
    assert PIL.Image.open(one / "1.webm.png").size == (4 * 34 + 2, 3 * 34 + 2)
    film = omnimae.read_clip(one / "1.webm.mp4", 0, 10, 4)
    picture = np.array(PIL.Image.open(one / "1.webm.png"))
    assert film.shape == (4, 3, 3 * 34 + 2, 36)
    assert np.abs(film[2].permute(1, 2, 0).numpy() - picture[:, 68:104].astype(float)).mean() < 12
    run_eval(*options, "--out", two)
    run_eval(*options, "--out", three, "--seed", 1, "--mask-ratio", 0.5)
    for name in (f"{image.name}.png", "1.webm.png"):
        pictures = [np.array(PIL.Image.open(folder / name)) for folder in (one, two, three)]
        assert np.array_equal(pictures[0], pictures[1])
        assert not np.array_equal(pictures[0], pictures[2])
    assert str(one / "1.webm.mp4") in capsys.readouterr().out


def test_a_folder_of_class_folders_lends_every_tenth_file(demo, finetuning, tmp_path):  # noqa: F811
    clips = sorted((demo / "videos" / "20bn-something-something-v2").iterdir())
    for i, clip in enumerate(clips[:24]):
        (tmp_path / "mine" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / "mine" / "ab"[i % 2])
    parts = [
        evaluation.list_labelled(tmp_path / "mine", "videos", split) for split in ("train", "val")
    ]
    assert [len(part.paths) for part in parts] == [20, 4]
    assert not set(parts[0].paths) & set(parts[1].paths)
    assert parts[1].labels == [0, 0, 1, 1] and parts[1].classes == ["a", "b"]
    assert all(Path(path).parent.name == "ab"[label] for path, label in zip(*parts[1][:2]))
    out = finetuning("--epochs", 1, data=("--videos", tmp_path / "mine"))
    assert omnimae.load_checkpoint(out / "best.pt").classes == ["a", "b"]


def test_one_model_takes_images_and_videos(finetuning, demo, capsys):  # noqa: F811
    out = finetuning("--epochs", 1)
    clip = demo / "videos" / "20bn-something-something-v2" / "1.webm"
    run_eval("--checkpoint", out / "best.pt", clip, next((demo / "images" / "val").rglob("*.JPEG")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-12] == str(clip) and all("%" in line for line in lines[-11:-6])


def test_a_users_mistake_in_finetuning_or_evaluation_is_one_sentence(
    pretrain,  # noqa: F811
    finetuning,
    released,  # noqa: F811
    demo,  # noqa: F811
    tmp_path,
    capsys,
):
    pretrained, tuned = pretrain(out="pre") / "last.pt", finetuning("--epochs", 1) / "best.pt"
    image = next((demo / "images" / "val").rglob("*.JPEG"))
    images, videos = demo / "images", demo / "videos"
    torch.save(released(10), tmp_path / "ten.torch")
    (tmp_path / "empty").mkdir()
    labels = videos / "labels" / "labels.json"
    for part, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            shutil.copy(image, tmp_path / "mine" / part / name)
    for options, words in (
        (("--checkpoint", pretrained, "--images", images), "is a pretraining checkpoint.*expected a finetuned one, such as vit_b_in1k"),
        (("--checkpoint", tuned, "--mask-ratio", 0.5, image), "finetuned checkpoint, which has no decoder.*such as vit_b_pretrain"),
        (("--checkpoint", tuned, "--videos", videos), "lacks 'circle'.*expected the same classes in both, or a checkpoint"),
        (("--checkpoint", tmp_path / "ten.torch", "--images", images), "ten.torch has 10 classes, .*images has 8: expected a checkpoint"),
        (("--checkpoint", tmp_path / "ten.torch", "--labels", labels, image), "labels.json has 8 classes, the checkpoint has 10"),
        (("--checkpoint", tuned, "--labels", image, image), "expected JSON like SSv2's"),
        (("--checkpoint", tuned, "--images", tmp_path / "empty"), "empty: no images found"),
        (("--checkpoint", tuned, "--images", image.parent), "have no labels: expected <class>/<file>"),
        (("--checkpoint", tuned, tmp_path / "gone.mp4"), "gone.mp4: cannot be read"),
        (("--checkpoint", tuned, tmp_path), "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            run_eval(*options)
        assert "\n" not in str(error.value)
    for data, words in (
        (
            ("--images", tmp_path / "mine"),
            r"its val part lacks 'b' \(1 such\), compared with the 2 classes",
        ),
        (("--videos", tmp_path / "empty"), "empty: no videos found"),
        (("--images", tmp_path / "mine" / "train"), "'a' has one file in all"),
    ):
        with pytest.raises(ValueError, match=words):
            finetuning(data=data, out="bad")
    assert not (tmp_path / "bad").exists()
    for module, options, words in (
        (evaluation, ("--checkpoint", tuned), "expected one of these: --images DIR, --videos DIR, files"),
        (evaluation, ("--checkpoint", tuned, image, "--views", "5x2"), "invalid clips_x_crops value: '5x2'"),
        (finetune, ("--checkpoint", "scratch", "--images", images), "expected --model with"),
        (finetune, ("--checkpoint", tuned), "expected one of --images DIR and --videos DIR"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            module.parse_args([str(option) for option in options])
        assert words in capsys.readouterr().err
    for script in ("eval.py", "finetune.py"):
        command = [sys.executable, HERE / script, "--checkpoint", "vit_b_x", "--images", "gone"]
        done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"{script}: vit_b_x: no such file, and not a released")
        assert done.stderr.count("\n") == 1
