"""What a run must do at each step, seen from within: modes, precision, order, decay and dropout."""
import copy
import itertools
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image, ImageEnhance

import data
import evaluate
import losses
import model as m
import train
from short_runs import FAST, inputs_of, read_log, run, write_refcoco


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


pytestmark = pytest.mark.usefixtures("no_gpu")


def set_dropout(monkeypatch, part, rate):
    """Give one part of the tiny models dropout: "vision", "text" or "grounding"."""
    for spec in m.SIZES["tiny"].values():
        if "dropout" in spec[part]:
            monkeypatch.setitem(spec, part, {**spec[part], "dropout": rate})


def set_up(*flags):
    """Options, a new model and the first 24 samples of `shapes`."""
    args = train.parse_args([*FAST, *flags])
    torch.manual_seed(0)
    model = m.build_model(**train.model_arguments(args))
    return args, model, data.load_samples("shapes", "train", limit=24)


def first_batch(model, args, samples):
    """The first batch of epoch 1."""
    loader = train.make_loader(samples, model, args, train=True)
    train.set_epoch(loader, 1)
    return next(iter(loader))


def take_step(model, args, batch):
    """One optimizer step on a batch -> what train_step says of it."""
    optimizer = train.make_optimizer(model, args, train.plan(args)[0])
    scaler = torch.amp.GradScaler("cpu", enabled=args.amp == "fp16")
    model.train()
    values, updated = train.train_step(model, batch, optimizer, scaler, args)
    assert updated
    return values


# --- Training mode and evaluation mode ------------------------------------------------------------


def test_predictions_are_made_in_eval_mode(monkeypatch):
    """With a dropout of 0.5, predictions in training mode would be far off."""
    set_dropout(monkeypatch, "grounding", 0.5)
    args, model, samples = set_up("--batch-size", "24")
    loader = train.make_loader(samples, model, args)
    [batch] = list(loader)
    inputs = inputs_of(batch)
    with torch.no_grad():
        without_dropout = model.eval()(**inputs).boxes
        with_dropout = model.train()(**inputs).boxes
    assert (with_dropout - without_dropout).abs().max() > 0.01

    model.train()
    predictions = train.predict(model, loader, args)
    assert torch.equal(predictions.boxes, without_dropout)
    expected, _ = losses.iou_and_giou(losses.clamp_to_square(without_dropout), batch["boxes"])
    model.train()
    validated = train.validate(model, loader, args)
    assert validated["val_mean_iou"] == pytest.approx(expected.mean().item(), rel=1e-6)


def test_the_mean_iou_of_the_log_is_that_of_the_checkpoint(monkeypatch, tmp_path):
    """evaluate.py gives the mean IoU that training logged. Dropout would give another one, even
    where the accuracy of both is 0."""
    set_dropout(monkeypatch, "grounding", 0.5)
    out = run(tmp_path / "a", "--epochs", "2")
    model, config = evaluate.load_checkpoint(out)
    logged = config["val_mean_iou"]
    result = evaluate.main([str(out), "--split", "val"])
    assert result["splits"]["val"]["mean_iou"] == pytest.approx(logged, abs=1e-6)

    args = train.parse_args(FAST)
    samples = data.load_samples("shapes", "val", limit=60)
    [batch] = list(train.make_loader(samples, model, args, batch_size=60))
    with torch.no_grad():
        dropped = model.train()(**inputs_of(batch)).boxes
    assert abs(train.measured_ious(dropped, batch["boxes"]).mean().item() - logged) > 1e-3


def test_each_epoch_trains_in_training_mode_and_validates_without_gradients(monkeypatch, tmp_path):
    """Three steps, then four batches of val, in each of two epochs; val.png comes at the end."""
    calls = []
    real = m.DetrBert.forward

    def watched(model, *inputs, **options):
        calls.append((model.training, torch.is_grad_enabled()))
        return real(model, *inputs, **options)

    monkeypatch.setattr(m.DetrBert, "forward", watched)
    run(tmp_path / "a", "--epochs", "2")
    epoch = 3 * [(True, True)] + 4 * [(False, False)]
    assert calls[:14] == epoch + epoch
    assert set(calls[14:]) == {(False, False)}


@pytest.mark.parametrize("method, lives", [("full", True), ("m2ist", False), ("lora", False)])
def test_dropout_of_the_encoders_is_live_if_they_are_trained_in_full(monkeypatch, method, lives):
    """[D7] After model.train(), two passes of DETR and of BERT differ with `full` alone."""
    for part in ("vision", "text"):
        set_dropout(monkeypatch, part, 0.3)
    args, model, samples = set_up("--method", method)
    batch = first_batch(model, args, samples)
    take_step(model, args, batch)    # leaves the model in training mode
    assert model.training
    for encode, inputs in ((model.encode_image, ("images", "image_padding")),
                           (model.encode_text, ("tokens", "token_padding"))):
        first = encode(*[batch[name] for name in inputs]).x
        second = encode(*[batch[name] for name in inputs]).x
        assert torch.equal(first, second) is not lives


# --- Order and transforms -------------------------------------------------------------------------


class WatchedLoader(torch.utils.data.DataLoader):
    """A DataLoader that keeps what it has read: passes holds, for each pass over any loader,
    whether it was for training, the indices of its samples in order, and {index: true box}."""

    passes = []

    def __iter__(self):
        batches = list(super().__iter__())
        order = torch.cat([batch["index"] for batch in batches]).tolist()
        boxes = torch.cat([batch["boxes"] for batch in batches]).tolist()
        self.passes.append((self.dataset.train, order, dict(zip(order, boxes))))
        return iter(batches)


def passes_of_a_run(monkeypatch, out, *flags):
    """(the passes over the training data of a run, those over val)"""
    monkeypatch.setattr(WatchedLoader, "passes", [])
    monkeypatch.setattr(train, "DataLoader", WatchedLoader)
    run(out, *flags)
    passes = WatchedLoader.passes[:-1]    # the last one is for val.png
    in_training = [found[1:] for found in passes if found[0]]
    on_val = [found[1:] for found in passes if not found[0]]
    return in_training, on_val


def moved(boxes, others):
    """The share of the samples in both dictionaries whose box is at another place."""
    shared = boxes.keys() & others.keys()
    assert len(shared) >= 20
    return sum(boxes[index] != others[index] for index in shared) / len(shared)


def test_each_epoch_of_a_run_has_an_order_and_transforms_of_its_own(monkeypatch, tmp_path):
    """Training is shuffled and moved anew in each epoch; val is read as it is."""
    in_training, on_val = passes_of_a_run(monkeypatch, tmp_path / "a")
    assert len(in_training) == len(on_val) == 3
    for order, _ in in_training:
        assert len(order) == len(set(order)) == 24    # three whole batches of 28 samples
        assert order != sorted(order)
    for (order, boxes), (other_order, other_boxes) in itertools.combinations(in_training, 2):
        assert order != other_order
        assert set(order) != set(other_order)    # other samples are left out
        assert moved(boxes, other_boxes) > 0.5
    for order, boxes in on_val:
        assert order == list(range(28))
        assert boxes == on_val[0][1]


def test_an_epoch_depends_on_its_seed_and_its_number_alone(monkeypatch, tmp_path):
    """Epoch 2 of a run is the same in another run of the same seed, and what set_epoch(2) gives."""
    first, _ = passes_of_a_run(monkeypatch, tmp_path / "a", "--epochs", "2")
    again, _ = passes_of_a_run(monkeypatch, tmp_path / "b", "--epochs", "2", "--lr", "1e-4")
    other, _ = passes_of_a_run(monkeypatch, tmp_path / "c", "--epochs", "2", "--seed", "1")
    assert again == first
    for (order, boxes), (other_order, other_boxes) in zip(first, other):
        assert order != other_order
        assert moved(boxes, other_boxes) > 0.5

    args, model, _ = set_up()
    samples = data.load_samples("shapes", "train", limit=28)
    loader = train.make_loader(samples, model, args, train=True)
    train.set_epoch(loader, 2)
    list(loader)
    assert WatchedLoader.passes[-1][1:] == first[1]


def test_the_augmentation_of_a_picture_differs_between_epochs(tmp_path):
    """At full size colours, crops, mirror images and scales are drawn from seed and epoch too."""
    flags = ["--method", "m2ist", "--size", "base", "--weights", "random",
             *write_refcoco(tmp_path)]
    args = train.parse_args([*flags, "--workers", "0"])
    with torch.device("meta"):
        model = m.build_model(**train.model_arguments(args))
    samples = data.load_samples("refcoco", "train", tmp_path)
    loader = train.make_loader(samples, model, args, train=True)

    def picture(seed, epoch):
        loader.dataset.seed = seed
        train.set_epoch(loader, epoch)
        return loader.dataset[0].image

    assert torch.equal(picture(0, 1), picture(0, 1))
    assert not torch.equal(picture(0, 1), picture(0, 2))
    assert not torch.equal(picture(0, 1), picture(1, 1))

    in_evaluation = train.make_loader(samples, model, args)
    assert torch.equal(in_evaluation.dataset[0].image, in_evaluation.dataset[0].image)


def test_colours_change_in_any_order(monkeypatch):
    """Brightness, contrast and saturation are changed in each of their six orders."""
    orders = set()
    order = []

    def watched(name):
        real = getattr(ImageEnhance, name)

        def enhancer(picture):
            order.append(name)
            return real(picture)

        return enhancer

    for name in ("Brightness", "Contrast", "Color"):
        monkeypatch.setattr(ImageEnhance, name, watched(name))
    picture = Image.new("RGB", (30, 20))
    for seed in range(100):
        order.clear()
        data.augment(picture, [(1, 2, 9, 9)], ["left"], random.Random(seed), False)
        orders.add(tuple(order))
    assert orders == {(), *itertools.permutations(("Brightness", "Contrast", "Color"))}


def test_a_picture_is_smoothed_where_it_is_scaled_down():
    """A chessboard with squares of one pixel becomes grey, and not black or white."""
    chessboard = np.indices((80, 80)).sum(0) % 2 * 255
    picture = Image.fromarray(np.uint8(chessboard)).convert("RGB")
    plain = data.Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image, _, _ = data.letterbox(picture, 40, pixels=plain)
    assert (image - 0.5).abs().max() < 0.1


# --- Mixed precision ------------------------------------------------------------------------------


def dtypes_of_linears(monkeypatch):
    """A dictionary that fills with the dtypes that the linears of all models put out:
    {whether gradients are recorded: {dtype, ...}}."""
    seen = {}
    real = nn.Linear.forward

    def watched(linear, x):
        out = real(linear, x)
        seen.setdefault(torch.is_grad_enabled(), set()).add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", watched)
    return seen


@pytest.mark.parametrize("method", ["full", "hivg"])
@pytest.mark.parametrize("amp, dtype", [
    ("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_all_linears_of_a_run_work_in_the_precision_of_amp(monkeypatch, tmp_path, method, amp,
                                                           dtype):
    """In training and in validation; the weights and what is saved stay float32."""
    seen = dtypes_of_linears(monkeypatch)
    flags = ["--method", method, "--limit", "16", "--epochs", "1", "--amp", amp]
    if method == "hivg":
        flags += ["--stages", "1", "--stage-epochs", "1"]
    out = run(tmp_path / "a", *flags)
    assert seen == {True: {dtype}, False: {dtype}}
    saved = torch.load(out / "last.pt", weights_only=True)
    assert {value.dtype for value in saved["model"].values()} == {torch.float32}
    for line in read_log(out):
        assert 0 < line["train_loss"] < 20


def test_the_loss_is_float32_whatever_the_precision(monkeypatch):
    """Boxes leave the model in float32, and all terms of HiVG's loss are float32."""
    args, model, samples = set_up("--method", "hivg", "--amp", "bf16")
    batch = first_batch(model, args, samples)
    model.train()
    with train.autocast(args):
        found = model(**inputs_of(batch), attention=train.reads_attention(args))
        within = train.weighted_losses(found, batch["boxes"], args)
    outside = train.weighted_losses(found, batch["boxes"], args)
    assert found.boxes.dtype == torch.float32
    assert set(outside) == {"l1", "giou", "contrast", "region_text", "attention"}
    for parts in (within, outside):
        assert {part.dtype for part in parts.values()} == {torch.float32}


@pytest.mark.parametrize("amp, scale", [("off", 1), ("bf16", 1), ("fp16", 2 ** 16)])
def test_fp16_scales_the_loss_and_unscales_the_gradients(amp, scale):
    """Gradients flow times 65536, where small ones do not underflow, and are divided by it before
    the step."""
    # The attention loss has gradients that overflow at the first scale.
    args, model, samples = set_up("--amp", amp, "--attention-loss", "0")
    batch = first_batch(model, args, samples)
    exact = copy.deepcopy(model)
    flowing = []
    weight = model.grounding.head[-1].weight

    def keep(gradient):
        flowing.append(gradient.clone())

    weight.register_hook(keep)
    values = take_step(model, args, batch)

    found = exact.train()(**inputs_of(batch), attention=True)
    sum(train.weighted_losses(found, batch["boxes"], args).values()).backward()
    expected = exact.grounding.head[-1].weight.grad
    size = expected.abs().max()
    assert (flowing[0] / scale - expected).abs().max() < 0.05 * size
    assert (weight.grad - expected).abs().max() < 0.05 * size
    norm = torch.stack([p.grad.norm() for p in exact.parameters() if p.grad is not None]).norm()
    assert values["grad_norm"] == pytest.approx(norm.item(), rel=0.05)


# --- The optimizer --------------------------------------------------------------------------------


def test_weight_decay_takes_its_share_of_every_tuned_weight():
    """AdamW: beside the step of the gradient, a weight p loses rate · decay · p, in both groups."""
    weights = {}
    for decay in ("0", "0.5"):
        args, model, samples = set_up("--weight-decay", decay, "--lr", "1e-2", "--lr-encoder",
                                      "2e-2")
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        take_step(model, args, first_batch(model, args, samples))
        weights[decay] = {name: p.detach() for name, p in model.named_parameters()}

    rates = {"grounding": 1e-2, "adapters": 2e-2}
    groups = set()
    for name, p in start.items():
        group = name.split(".")[0]
        lost = weights["0"][name] - weights["0.5"][name]
        rate = rates.get(group, 0)    # encoders are frozen and lose nothing
        assert torch.allclose(lost, rate * 0.5 * p, atol=1e-6), name
        groups.add(group)
    assert groups == {"grounding", "adapters", "vision", "text"}


# --- Memory on a CPU ------------------------------------------------------------------------------

ASK_GLIBC = """
import ctypes, torch, train
{keep}
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Mallinfo(ctypes.Structure):    # from glibc's malloc.h
    _fields_ = [(name, ctypes.c_int) for name in names]
mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = Mallinfo
mapped = mallinfo().hblks
tensors = [torch.ones(5_000_000) for _ in range(4)]    # 20 MB each
own = mallinfo().hblks - mapped
heap = mallinfo().arena
del tensors
print(own, heap - mallinfo().arena)
"""


def told_by_glibc(keep):
    """How many of four tensors of 20 MB have a mapping of their own, which ends with the tensor, and
    by how many bytes the heap shrinks when they are freed."""
    done = subprocess.run([sys.executable, "-c", ASK_GLIBC.format(keep=keep)], check=True, text=True,
                          capture_output=True, cwd=ROOT)
    own, shrunk = done.stdout.split()
    return int(own), int(shrunk)


