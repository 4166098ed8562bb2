"""train.py: options and presets, the optimizer, the loop step by step, phases, whole runs, several
processes. Interruptions are in test_resume.py."""
import argparse
import functools
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import load_file

import data
import evaluate
import hilora
import losses
import model as m
import train
from data import InputError, run_command
from short_runs import (FAST, HIVG, SPEED, add_dropout, computed, inputs_of, last_weights, read_log,
                        run, same, write_refcoco)

ROOT = Path(__file__).parent.parent
BASE = ["--size", "base", "--dataset", "x.jsonl"]

pytestmark = pytest.mark.usefixtures("cpu")


# --- Flags ----------------------------------------------------------------------------------------


def test_every_flag_is_explained_and_every_name_in_a_preset_is_an_option():
    """A misspelt name in a preset or a row would do nothing."""
    names = {"last_stage", "title", *m.OPTIONS}    # rows alone set some options
    for action in train.build_parser()._actions:
        assert action.help, action.dest
        names.add(action.dest)
    for table in (train.PRESETS, train.BY_DATASET, train.ROWS, {"common": train.COMMON}):
        for key, values in table.items():
            tiny = values.get("tiny", {})
            assert set(values) - {"tiny"} | set(tiny) <= names, key
    for row in train.ROWS:
        for size in ("base", "tiny"):
            train.parse_args(["--row", row, "--size", size, "--dataset", "x.jsonl"])


def help_of(capsys, *flags):
    """What --help prints with these flags, on one line."""
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--help"])
    assert stop.value.code in (None, 0)
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flags, defaults", [
    ("--device cuda:99", {"method": "m2ist", "bottleneck": "32", "device": "cuda:99"}),
    ("--method hivg", {"rank": "32", "limit": "12000", "focal": "20.0", "bottleneck": "None"}),
    ("--dataset refcoco+", {"epochs": "180", "batch-size": "64", "size": "base"}),
    ("--row m2ist/II/32 --size base", {"bottleneck": "32", "row": "m2ist/II/32"}),
])
def test_help_shows_the_defaults_of_the_command_line_at_hand(capsys, flags, defaults):
    """They depend on method, size, dataset and row. The device need not be there."""
    text = help_of(capsys, *flags.split())
    for name, value in defaults.items():
        assert re.search(rf" --{name} [^-][^()]*(\([^)]*\))*[^()]*\(default: {value}\)", text), name


def test_rows_are_listed_with_what_they_change(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--row", "list"])
    assert stop.value.code in (None, 0)
    _, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.partition(" ")[2].strip() for line in lines}
    assert list(rows) == list(train.ROWS)
    assert rows["m2ist/V/b"] == "attention_port none, ffn_port lea"
    assert rows["hivg/3/4"] == "nothing: the default itself"


ON_CLIP = {"clip-frozen", "clip-lora", "hivg"}
ON_DETR = set(m.METHODS) - ON_CLIP
SIDE = {"m2ist", "m2ist+lora"}
WITH_ADAPTERS = {"adapter", "adaptformer", "cm-adapter", "mrs-adapter", *SIDE}
WITH_LORA = {"lora", "m2ist+lora", "clip-lora", "hivg"}


@pytest.mark.parametrize("flags, methods", [
    (["--ffn-port iea", "--image-size 96"], ON_DETR),
    (["--vision-layers 1", "--bridge-layers 1", "--contrast 1"], ON_CLIP),
    (["--insertion parallel", "--bottleneck 4", "--interaction-dim 4", "--scale 2"], WITH_ADAPTERS),
    (["--residual", "--side-start paired"], SIDE),
    (["--text-layers 1 2"], {*WITH_ADAPTERS, "hivg"}),
    (["--stages 1", "--rank 8", "--alpha 8", "--stage-epochs 1", "--stage-lr 1e-3"], WITH_LORA),
    (["--focal 1", "--dice 1"], {"hivg"}),
])
def test_a_flag_is_for_the_methods_that_use_it(flags, methods):
    """For others it is refused, where it would do nothing."""
    for flag, method in itertools.product(flags, m.METHODS):
        argv = ["--method", method, *flag.split()]
        if method in methods:
            train.parse_args(argv)
        else:
            name = flag.split()[0]
            message = f"{name} is not for --method {re.escape(method)} "
            with pytest.raises((InputError, m.ModelError), match=message):
                train.parse_args(argv)


BAD = """
--method magic : --method : magic : m2ist
--dataset cocoref : cocoref : shapes
--size huge : --size : huge
--size large : --size for m2ist : large : base, tiny
--weights pretrained : --weights for size tiny : shapes, random
--schedule constant : --schedule : cosine
--amp fp8 : --amp : bf16
--ffn-port nosuch : --ffn-port : iea
--insertion above : --insertion : sequential
--pixels bert : --pixels : clip
--epochs 0 : --epochs : 1 or more
--limit 0 : --limit : 1 or more
--workers -1 : --workers : 0 or more
--lr -1 : --lr : 0 or more
--lr inf : --lr : 0 or more
--lr-encoder nan : --lr-encoder : 0 or more
--max-tokens 99 : --max-tokens is 99 : 32 positions
--image-size 100 : --image-size is 100 : multiple of 8
--interaction-dim 999 : interaction_dim : 999
--text-layers 1 : text layers : [1]
--text-layers 3 9 : --text-layers 3 9 : 1 .. 4
--method hivg --stage-lr 1e-3 -1 : --stage-lr : 0 or more
--method hivg --alpha 0 : --alpha
--method hivg --vision-layers 2 2 : --vision-layers 2 2 : differ
--method hivg --bridge-layers 7 : --bridge-layers 7 : 1 .. 6
--method hivg --stages 7 : --stages is 7 : 6 layers
--method hivg --stage-epochs 0 --epochs 2 : --stages 3 : --stage-epochs
--method hivg --text-layers 1 --bridge-layers : --text-layers is not for --method hivg as it is here
--method lora --epochs 1 --stages 2 : --stages 2 : --epochs
--row hivg/5/2 --stages 1 : the last stage is 2 : --stages is 1
--row hivg/4/7 --bridge-layers 1 2 : 2 bridges need as many text layers, not 3
--row m2ist/V/z : m2ist/V/z : --row list
--row hivg/3/1 --size large : hivg/3/1 : base and tiny
--row m2ist/V/b --method hivg : --row m2ist/V/b has method m2ist : leave out --method
--row m2ist/V/b --ffn-port vea : --row m2ist/V/b has ffn_port lea : leave out --ffn-port
--dataset gone.jsonl : gone.jsonl : no such file
--device cuda:99 : --device cuda:99 : --device cpu
--device foo : --device foo : --device cpu
--last-stage 1 : unrecognized arguments: --last-stage
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_flags_give_one_line_and_begin_no_run(tmp_path, capsys, line):
    """Each line of BAD is a command line, and words of its message."""
    flags, *words = line.split(" : ")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: run(tmp_path / "out", *flags.split()))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    message = said.splitlines()[-1]
    assert "error: " in message and "Traceback" not in said
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, folder", [
    ("--seed 3 --workers 2 --save-minutes 5", "shapes-m2ist-3"),
    ("--stages 0 --epochs 9 --method hivg", "shapes-hivg-0-epochs=9-stages=0"),
    ("--method hivg --bridge-layers --stage-lr 1e-3 1e-4",
     "shapes-hivg-0-bridge_layers=none-stage_lr=0.001+0.0001"),
    ("--row m2ist/V/b --beta 1", "shapes-m2ist-V-b-0-beta=1.0"),
    ("--size base --vision-weights weights/detr.pth --root data",
     "shapes-m2ist-0-size=base-vision_weights=detr.pth"),
    ("--dataset refcoco,a/refcoco+ --size tiny", "refcoco,refcoco+-m2ist-0-size=tiny"),
])
def test_runs_that_differ_have_folders_that_differ(flags, folder):
    """A folder is named by dataset, method or row, seed, and every flag that changes what the run
    computes, whatever the order of the flags."""
    assert train.parse_args(flags.split()).out == f"runs/{folder}"


@pytest.mark.parametrize("flags, title", [
    ("--beta 1", "m2ist"),
    ("--row m2ist/V/b --seed 1 --micro-batch 8 --amp bf16", "m2ist/V/b"),
    ("--row m2ist/V/b --text-layers 1 2 --beta 1",
     "m2ist/V/b changed (beta 1.0, text_layers [1, 2])"),
])
def test_a_row_that_is_changed_by_flags_says_so(flags, title):
    """A figure of another run must not stand under the name of a row."""
    assert train.parse_args(flags.split()).title == title


def test_a_new_method_is_a_row(monkeypatch, tmp_path):
    """A row in METHODS is all that --method needs."""
    row = dict(encoders="detr", insertion="parallel", ffn_port="vea")
    monkeypatch.setitem(m.METHODS, "mine", row)
    out = run(tmp_path / "a", "--method", "mine", "--epochs", "1")
    assert {name.split(".")[0] for name in last_weights(out)} == {"adapters", "grounding"}


# --- Presets, phases and schedules ----------------------------------------------------------------


def values(flags, *names):
    args = train.parse_args(flags)
    return tuple(getattr(args, name) for name in names)


def test_the_preset_of_m2ist_is_that_of_section_iv_b():
    """90 epochs in batches of 64, rates of 1e-4 and 1e-5 [D12], a tenth after 60 epochs."""
    assert values(BASE, "method", "epochs", "batch_size", "lr", "lr_encoder", "weight_decay",
                  "warmup", "l1", "giou", "attention_loss", "max_tokens", "image_size") == (
        "m2ist", 90, 64, 1e-4, 1e-5, 1e-4, 0, 1, 1, 0, 20, 640)
    args = train.parse_args(BASE)
    steps = (0, 599, 600, 899)    # ten steps an epoch
    assert [train.rate_factor(args, step, 10, 90) for step in steps] == [1, 1, 0.1, 0.1]
    warm = train.parse_args([*BASE, "--warmup", "10"])
    assert [train.rate_factor(warm, step, 10, 90) for step in (4, 9, 600)] == [0.5, 1, 0.1]


def test_the_default_run_is_m2ist_on_shapes():
    """`python train.py` alone: 1,500 steps, a warm-up of 100, a rate that falls to zero."""
    assert values([], "method", "dataset", "size", "weights", "workers", "out", "epochs",
                  "batch_size", "weight_decay", "attention_loss", "lr", "device") == (
        "m2ist", "shapes", "tiny", "shapes", 0, "runs/shapes-m2ist-0", 2, 32, 0.1, 0.3, 1e-3, "cpu")
    assert values(BASE, "weights", "workers") == ("pretrained", evaluate.default_workers())
    assert values(["--method", "full"], "lr", "lr_encoder") == (1e-3, 1e-4)
    args = train.parse_args([])
    for step, factor in ((0, 1 / 100), (750, 1 / 2), (1499, 1 / 1500)):
        assert train.rate_factor(args, step, 750, 2) == pytest.approx(factor)
    cosine = train.parse_args(["--schedule", "cosine", "--warmup", "0"])
    for step in (0, 100, 2000):    # 1/2 (1 + cos(pi t / T)), 3,000 steps
        expected = (1 + math.cos(math.pi * step / 3000)) / 2
        assert train.rate_factor(cosine, step, 750, 4) == pytest.approx(expected)


@pytest.mark.parametrize("dataset, method, expected", [
    ("refcoco", "m2ist", (90, 60, 20)),
    ("refcoco+", "m2ist", (180, 120, 20)),
    ("refcocog-umd", "m2ist", (90, 60, 40)),
    ("refcocog-google", "m2ist", (90, 60, 40)),
    ("refcoco,refcoco+,refcocog-umd", "m2ist", (180, 120, 40)),
    ("refcocog-umd,refcoco", "m2ist", (90, 60, 40)),
    ("refcocog-umd", "hivg", (50, 60, 77)),
])
def test_datasets_have_epochs_and_tokens_of_their_own(dataset, method, expected):
    """Joined datasets take the longest training of the parts, and the most tokens. Flags win."""
    flags = ["--dataset", dataset, "--method", method]
    names = ("epochs", "lr_drop", "max_tokens")
    assert values(flags, *names) == expected
    assert values([*flags, "--epochs", "3", "--max-tokens", "25"], *names) == (3, expected[1], 25)


def phases(*flags):
    """(name, stage, epochs before, epochs at its end, both rates) of each phase."""
    return [tuple(phase) for phase in train.plan(train.parse_args(["--method", *flags]))]


def test_phases_of_hivg_follow_section_4_1_and_table_8():
    """A warm-up of 50 epochs, then three stages of 20, or for HiVG-L four of 15."""
    assert phases("hivg", *BASE) == [
        ("warm-up", 0, 0, 50, 2.5e-4, 2.5e-4), ("stage 1", 1, 50, 70, 1e-4, 1e-4),
        ("stage 2", 2, 70, 90, 0.5e-4, 0.5e-4), ("stage 3", 3, 90, 110, 0.25e-4, 0.25e-4)]
    assert phases("hivg", *BASE, "--size", "large") == [
        ("warm-up", 0, 0, 50, 2.5e-4, 2.5e-4), ("stage 1", 1, 50, 65, 1e-4, 1e-4),
        ("stage 2", 2, 65, 80, 0.75e-4, 0.75e-4), ("stage 3", 3, 80, 95, 0.5e-4, 0.5e-4),
        ("stage 4", 4, 95, 110, 0.25e-4, 0.25e-4)]
    names = ("batch_size", "l1", "giou", "contrast", "focal", "dice", "rank", "alpha", "schedule",
             "weight_decay")
    assert values(["--method", "hivg", *BASE], *names) == (
        80, 2, 2, 1, 20, 2, 32, 16, "cosine", 1e-4)
    assert values(["--method", "hivg", *BASE, "--size", "large"], *names)[0] == 32


def test_the_runs_of_fig_4_d_are_as_long_on_the_box_loss():
    """[D35] What differs between them is the model alone."""
    assert [phase[:4] for phase in phases("clip-lora", *BASE)] == [
        ("warm-up", 0, 0, 50), ("stage 1", 1, 50, 110)]
    assert values(["--method", "clip-lora", *BASE], "contrast", "focal", "dice") == (0, 0, 0)
    assert {phases(method)[-1][3] for method in ON_CLIP} == {5}


@pytest.mark.parametrize("method, size, augmented, flip", [
    ("m2ist", "base", True, True), ("hivg", "large", True, False), ("m2ist", "tiny", False, True)])
def test_each_paper_gets_its_transforms(tmp_path, method, size, augmented, flip):
    """HiVG flips nothing; the tiny size is not augmented; evaluation transforms nothing."""
    root = write_refcoco(tmp_path)
    args = train.parse_args([*root, "--method", method, "--size", size, "--weights", "random"])
    with torch.device("meta"):
        model = m.build_model(**train.model_arguments(args))
    samples = data.load_samples("refcoco", "train", tmp_path)
    dataset = train.make_loader(samples, model, args, train=True).dataset
    assert (dataset.train, dataset.augmented, dataset.flip) == (True, augmented, flip)
    assert dataset.size == m.SIZES[m.METHODS[method]["encoders"], size]["image_size"]
    evaluated = train.make_loader(samples, model, args).dataset
    assert (evaluated.train, evaluated.augmented) == (False, False)


# --- A step ---------------------------------------------------------------------------------------


def set_up(count, *flags):
    """Options, a new model without dropout, and a loader of the first samples at epoch 1."""
    args = train.parse_args([*FAST, *flags])
    torch.manual_seed(0)
    model = m.build_model(**train.model_arguments(args))
    loader = train.make_loader(data.load_samples("shapes", "train", limit=count), model, args, True)
    loader.batch_sampler.epoch = 1
    loader.dataset.epoch.fill_(1)
    return args, model, loader


def take_step(model, args, batch, phase=0):
    """One optimizer step -> its metrics."""
    optimizer = train.make_optimizer(model, args, train.plan(args)[phase])
    scaler = torch.amp.GradScaler("cpu", enabled=args.amp == "fp16")
    metrics, stopping = train.train_step(model.train(), batch, optimizer, scaler, args)
    assert not stopping
    return metrics


def one_epoch(model, loader, args, out, epoch=0, number=0):
    """Train an epoch of a phase -> state, optimizer, scaler."""
    args.out = str(out)
    state = train.State(epoch=epoch)
    phase = train.plan(args)[number]
    optimizer = train.make_optimizer(model, args, phase)
    scaler = torch.amp.GradScaler("cpu", enabled=args.amp == "fp16")
    with train.tqdm(disable=True) as bar:
        train.train_epoch(model, loader, optimizer, scaler, phase, state, args, bar)
    return state, optimizer, scaler


def expected_loss(model, batch, args):
    outputs = model(**inputs_of(batch), attention=True)
    return sum(train.weighted_losses(outputs, batch["boxes"], args).values())


def test_the_log_has_means_over_the_samples_whatever_the_micro_batches(monkeypatch, tmp_path):
    """The loss of a micro-batch counts by its share, and an IoU of one half is right."""
    args, model, loader = set_up(10, "--batch-size", "10", "--micro-batch", "4")
    expected = expected_loss(model, next(iter(loader)), args).item()
    monkeypatch.setattr(train, "measured_ious",
                        lambda boxes, truths: torch.tensor([0.5, 0.49, 0.8, 0.0])[:len(boxes)])
    state, _, _ = one_epoch(model, loader, args, tmp_path)
    [line] = state.log
    assert line["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert line["l1"] + line["giou"] + line["attention"] == pytest.approx(expected, rel=1e-5)
    # Micro-batches of 4, 4 and 2 samples have 2, 2 and 1 with an IoU of 0.5 or more.
    assert line["train_acc@0.5"] == pytest.approx(5 / 10)


def test_a_step_has_the_gradient_of_its_own_batch_alone(tmp_path):
    """At a rate of 0, the gradients after an epoch are those of its last batch, in micro-batches
    too. The norm of all gradients is logged."""
    args, model, loader = set_up(16, "--micro-batch", "3", "--lr", "0", "--lr-encoder", "0")
    _, last = list(loader)
    expected_loss(model, last, args).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    norm = math.sqrt(sum(grad.double().square().sum() for grad in expected.values()))
    state, _, _ = one_epoch(model, loader, args, tmp_path)
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-6), name
    assert take_step(model, args, last)["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert 0.1 < state.log[0]["grad_norm"] != pytest.approx(norm, rel=1e-3)    # a mean of two


def test_clip_norm_scales_all_gradients_down():
    """The norm in the log is that before."""
    norms = []
    for clip in ("0", "0.01"):
        args, model, loader = set_up(8, "--clip-norm", clip)
        logged = take_step(model, args, next(iter(loader)))["grad_norm"]
        squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
        norms.append((logged, math.sqrt(sum(squares))))
    (logged, whole), (logged_again, clipped) = norms
    assert logged == logged_again == pytest.approx(whole, rel=1e-5)
    assert whole > 0.1 and clipped == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_takes_its_share_of_every_tuned_weight_at_the_rate_of_its_group():
    """AdamW: beside the step of the gradient, a weight p loses rate · decay · p. Nothing else is
    changed."""
    after = {}
    for decay in ("0", "0.5"):
        args, model, loader = set_up(8, "--weight-decay", decay, "--lr=1e-2", "--lr-encoder=2e-2")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        take_step(model, args, next(iter(loader)))
        after[decay] = dict(model.named_parameters())
    rates = {"grounding": 1e-2, "adapters": 2e-2, "vision": 0, "text": 0}
    assert {name.split(".")[0] for name in before} == set(rates)
    for name, p in before.items():
        lost = after["0"][name] - after["0.5"][name]
        assert torch.allclose(lost, rates[name.split(".")[0]] * 0.5 * p, atol=1e-6), name


def test_the_rates_of_a_step_are_those_of_its_place_in_its_phase(tmp_path, monkeypatch):
    """In the second epoch of stage 1, which began after 2 epochs, the first step is step 3 of 6."""
    args, model, loader = set_up(28, *HIVG)
    asked = []

    def watched(args, step, steps, epochs):
        asked.append((step, steps, epochs))
        return 0.5

    monkeypatch.setattr(train, "rate_factor", watched)
    state, optimizer, _ = one_epoch(model, loader, args, tmp_path, epoch=3, number=1)
    assert asked == [(3, 3, 2), (4, 3, 2), (5, 3, 2)]
    assert [group["lr"] for group in optimizer.param_groups] == [7.5e-4, 7.5e-4]    # half of 1.5e-3
    assert (state.log[-1]["lr"], state.log[-1]["epoch"]) == (7.5e-4, 4)


def break_gradients(model, when):
    """From now on a gradient of the model is infinite in each backward pass of which `when` says
    so. when: a function of the number of the pass, from 1."""
    passes = itertools.count(1)

    def hook(gradient):
        return gradient * float("inf") if when(next(passes)) else gradient

    next(p for p in model.parameters() if p.requires_grad).register_hook(hook)


def test_fp16_scales_the_loss_and_skips_steps_that_overflow(tmp_path):
    """A skipped step changes no weight and is counted; the norm in the log is that of the others,
    with the scale taken out."""
    args, model, loader = set_up(24, "--amp", "fp16", "--attention-loss", "0", "--micro-batch", "8")
    flowing = []
    model.grounding.head[-1].bias.register_hook(lambda gradient: flowing.append(gradient.clone()))
    break_gradients(model, when=lambda number: number != 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, optimizer, scaler = one_epoch(model, loader, args, tmp_path)
    assert state.log[0]["skipped_steps"] == 2
    assert 0 < state.log[0]["grad_norm"] < 100
    assert scaler.get_scale() == 2 ** 16 / 4    # halved by each overflow
    assert {int(moments["step"]) for moments in optimizer.state.values()} == {1}
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    gradient = model.grounding.head[-1].bias.grad    # of the third step, at half of the scale
    assert torch.allclose(flowing[2] / 2 ** 15, gradient, rtol=1e-3)


@pytest.mark.parametrize("method", ["full", "hivg"])
@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_linear_layers_work_in_the_precision_of_amp(monkeypatch, method, amp, dtype):
    """In training and in evaluation; boxes, loss and weights stay float32."""
    seen = set()
    real = nn.Linear.forward

    def watched(linear, x):
        out = real(linear, x)
        seen.add((torch.is_grad_enabled(), out.dtype))
        return out

    monkeypatch.setattr(nn.Linear, "forward", watched)
    args, model, loader = set_up(8, "--method", method, "--amp", amp)
    assert 0 < take_step(model, args, next(iter(loader)))["train_loss"] < 20
    train.predict(model, loader, args)
    assert seen == {(True, dtype), (False, dtype)}
    with train.autocast(args):
        outputs = model.train()(**inputs_of(next(iter(loader))), attention=True)
        terms = train.weighted_losses(outputs, torch.rand(8, 4), args)
    assert outputs.boxes.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_compiled_model_has_one_graph_a_phase_for_all_lengths_of_texts(tmp_path, monkeypatch):
    """Texts are padded to --max-tokens: else each length would be compiled again, until the compiler
    gives up at its limit."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    size = m.SIZES["detr", "tiny"]
    monkeypatch.setitem(size, "grounding", {**size["grounding"], "layers": 1})    # sooner compiled
    args, model, loader = set_up(48, "--method", "lora", "--stages", "2", "--epochs", "2",
                                 "--compile", "--batch-size", "2", "--out", str(tmp_path))
    batches = [batch for batch, _ in zip(loader, range(5))]
    assert {batch["tokens"].shape[1] for batch in batches} == {args.max_tokens}
    longest = {(~batch["token_padding"]).sum(1).max().item() for batch in batches}
    assert len(longest) > 1 and max(longest) < args.max_tokens
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for phase in train.plan(args):
        optimizer = train.begin_phase(model, phase, train.State(epoch=phase.first), args)
        for batch in batches:
            train.train_step(model, batch, optimizer, scaler, args)
        train.save_checkpoint(tmp_path / "best.safetensors", model, {})    # for the next phase
    torch.compiler.reset()
    assert len(graphs) == len(train.plan(args)) == 2


def test_flags_that_would_be_ignored_are_refused(tmp_path):
    """Weights of encoders that the run does not load, and --json without --cost."""
    for flags, name in ((["--vision-weights", "x.pth"], "vision-weights"),
                        (["--method", "hivg", "--clip-weights", "x"], "clip-weights"),
                        (["--json", "x.json"], "json")):
        with pytest.raises(InputError, match=f"--{name}.*leave"):
            train.parse_args(flags)


# --- What stops a run -----------------------------------------------------------------------------


def test_gradients_and_losses_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    """The message names epoch, step, samples and what to try. No weight, no checkpoint and no log
    has seen them, and the run goes on from there once the reason is gone."""
    real = train.build_model

    def broken(**options):
        model = real(**options)
        break_gradients(model, when=lambda number: number == 6)    # the last step of epoch 2
        return model

    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", broken)
        with pytest.raises(InputError, match=r"grad_norm is (inf|nan) at epoch 2, step 3, samples "
                                             r"\[.*--lr, .*--clip-norm 1, .*last.pt holds what"):
            run(tmp_path / "a")
    assert [line["epoch"] for line in read_log(tmp_path / "a")] == [1]
    assert all(value.isfinite().all() for value in last_weights(tmp_path / "a").values())
    train.main(["--out", str(tmp_path / "a"), "--resume"])
    assert [line["epoch"] for line in read_log(tmp_path / "a")] == [1, 2, 3]

    monkeypatch.setattr(losses, "box_terms",
                        lambda pred, *_, **__: {"l1": pred.sum() * float("nan"), "giou": pred.sum()})
    with pytest.raises(InputError, match=r"train_loss is nan at epoch 1, step 1, .* --amp off$"):
        run(tmp_path / "b")
    assert not (tmp_path / "b" / "last.pt").exists()


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """last.pt stays as it was, and the message names the weight."""
    args, model, _ = set_up(8)
    optimizer = train.make_optimizer(model, args, train.plan(args)[0])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model.grounding.reg.data[0, 3] = float("nan")
    with pytest.raises(InputError, match="grounding.reg is not finite after epoch 5: .*--lr"):
        train.save_last(tmp_path, train.State(epoch=5), model, optimizer, scaler)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_one_line(tmp_path):
    """A model of a terabyte, a GPU that is full, and an array that numpy cannot have: the line has
    the peak and what to try. Other errors stay as they are."""
    with pytest.raises(InputError, match=r"^out of memory; the peak was \d+\.\d GiB .*you tried to "
                                         r"allocate.*: try --micro-batch 4, or --amp bf16$"):
        run(tmp_path / "a", "--bottleneck", "1000000000")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()):
        with pytest.raises(InputError, match="out of memory; .*: try another device"):
            with train.memory_explained("cpu", "--micro-batch", 1):
                raise error
    with pytest.raises(RuntimeError, match="illegal memory access"):
        with train.memory_explained("cpu", "--micro-batch", 8):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


# --- Whole runs -----------------------------------------------------------------------------------


def test_a_run_writes_what_its_docstring_says(m2ist_run):
    """Each epoch, and each --log-every steps, is a line of the log, of means over its steps."""
    assert {path.name for path in m2ist_run.iterdir()} == {
        "args.json", "lock", "log.jsonl", "best.safetensors", "last.pt", "val.png"}
    log = read_log(m2ist_run)
    assert [(line["epoch"], line.get("step")) for line in log] == [
        (1, 2), (1, None), (2, 2), (2, None), (3, 2), (3, None)]
    within, whole = log[:2]
    shared = {"epoch", "phase", "lr", "lr_encoder", "train_loss", "l1", "giou", "attention",
              "train_acc@0.5", "grad_norm", *SPEED}
    assert set(within) == {*shared, "step"}
    assert set(whole) == {*shared, "val_acc@0.5", "val_mean_iou", "leaky_pretraining"}
    for line, samples in ((within, 16), (whole, 24)):
        assert line["samples_per_second"] == pytest.approx(samples / line["seconds"])
    assert within["peak_bytes"] > 2 ** 20
    written = json.loads((m2ist_run / "args.json").read_text())
    args = train.parse_args([*FAST, "--out", str(m2ist_run), "--log-every", "2"])
    assert written["args"] == vars(args)
    assert torch.__version__.startswith(written["environment"]["torch"])
    assert written["environment"]["device"] == "cpu"


def test_a_seed_is_all_that_is_random_in_a_run(tmp_path, monkeypatch, m2ist_run):
    """Any whole number is a seed: those of torch have 64 bits."""
    add_dropout(monkeypatch)
    again = run(tmp_path / "a", "--log-every", "2")
    assert computed(again) == computed(m2ist_run)
    assert same(last_weights(again), last_weights(m2ist_run))
    for seed in ("12345678901234567890", "-3"):
        other = run(tmp_path / seed, "--epochs", "1", "--seed", seed)
        assert read_log(other)[0]["train_loss"] != computed(m2ist_run)[1]["train_loss"]


def test_training_is_in_training_mode_and_evaluation_is_not(monkeypatch, tmp_path):
    """Three steps, then val in micro-batches without gradients, in each of two epochs; val.png and
    the splits of --test come at the end."""
    calls = []
    real = m.DetrBert.forward

    def watched(model, images, image_padding, tokens, *inputs, **options):
        calls.append((model.training, torch.is_grad_enabled(), len(tokens)))
        return real(model, images, image_padding, tokens, *inputs, **options)

    monkeypatch.setattr(m.DetrBert, "forward", watched)
    out = run(tmp_path / "a", "--epochs", "2", "--micro-batch", "4", "--test")
    epoch = 6 * [(True, True, 4)] + 7 * [(False, False, 4)]
    assert calls[:26] == epoch + epoch
    assert {call[:2] for call in calls[26:]} == {(False, False)}
    found = json.loads((out / "test.json").read_text())
    expected = evaluate.main([str(out), "--split", "testA", "--split", "testB"])["splits"]
    for split, row in expected.items():
        assert found.pop(split)["mean_iou"] == pytest.approx(row["mean_iou"], rel=1e-5)
    assert found == {}


def test_each_epoch_has_an_order_and_transforms_of_its_own(monkeypatch, tmp_path):
    """They depend on the seed and the number of the epoch alone. val is read as it is."""
    passes = []

    class Watched(torch.utils.data.DataLoader):
        def __iter__(self):
            batches = list(super().__iter__())
            order = torch.cat([batch["index"] for batch in batches]).tolist()
            boxes = torch.cat([batch["boxes"] for batch in batches]).tolist()
            passes.append((self.dataset.train, order, dict(zip(order, boxes))))
            return iter(batches)

    monkeypatch.setattr(evaluate, "DataLoader", Watched)
    run(tmp_path / "a", "--epochs", "2")
    run(tmp_path / "b", "--epochs", "2", "--lr", "1e-4")
    run(tmp_path / "c", "--epochs", "2", "--seed", "1")
    assert passes[4:8] == passes[:4]
    in_training = [found[1:] for found in (*passes[:4], *passes[8:]) if found[0]]
    assert len(in_training) == 4
    for (order, boxes), (other, moved) in itertools.combinations(in_training, 2):
        assert len(set(order)) == len(order) == 24 and order != other
        shared = boxes.keys() & moved.keys()
        assert sum(boxes[index] != moved[index] for index in shared) > len(shared) / 2
    assert passes[1] == passes[3] == passes[9] and len(passes[1][1]) == 28


def test_a_run_prints_its_options_what_it_trains_and_no_bars_into_a_file(tmp_path, capsys):
    """Texts that are cut are told before training."""
    run(tmp_path / "a", *HIVG, "--epochs", "1", "--stage-epochs", "1", "--log-every", "2",
        "--max-tokens", "9")
    said = capsys.readouterr()
    assert said.err == ""
    text = " ".join(said.out.split())
    assert text.startswith("method hivg, dataset shapes") and "stages 2" in text
    assert re.search(r"\d+ of 56 expressions are cut at 9 tokens, such as .*; --max-tokens", text)
    # Stage 2 of 2 has LoRA of rank 4 on four linear layers of each of six vision layers.
    lora = 4 * 4 * (64 + 64)
    assert f"{6 * lora:,} LoRA on q/k/v/out of vision layers 1 2 3 4 5 6" in text
    starts = [line.split("  ")[:3] for line in said.out.splitlines() if line.startswith("epoch ")]
    assert starts == [[f"epoch {epoch}", f"phase {phase}", third]
                      for epoch, phase in ((1, "warm-up"), (2, "stage 1"), (3, "stage 2"))
                      for third in ("step 2", starts[2 * epoch - 1][2])]


def test_refcoco_trains_at_size_base_and_is_evaluated(tmp_path):
    """As its authors ship it, with augmentation and both encoders whole, in small images."""
    flags = write_refcoco(tmp_path)
    out = run(tmp_path / "a", *flags, "--size", "base", "--image-size", "64", "--batch-size", "2",
              "--epochs", "1", "--workers", "1")
    result = evaluate.main([str(out), "--device", "cpu"])
    assert {split: row["expressions"] for split, row in result["splits"].items()} == {
        "val": 1, "testA": 1}
    assert result["dataset"] == "refcoco"
    assert (out / "best.safetensors").stat().st_size < 50e6    # 11.4M tuned parameters of 152M


def test_a_file_without_val_keeps_the_last_epoch(tmp_path, capsys):
    """No epoch is then known to be the best."""
    Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "text": "it", "box": [1, 2, 30, 40], "split": "train"})
    (tmp_path / "my.jsonl").write_text(f"{line}\n{line}\n{line}\n")
    out = run(tmp_path / "out", "--dataset", str(tmp_path / "my.jsonl"), "--workers", "0")
    assert "no split 'val'" in capsys.readouterr().out
    assert "val_acc@0.5" not in read_log(out)[-1]
    assert evaluate.load_checkpoint(out)[1]["epoch"] == 3


# --- Stages of HiVG -------------------------------------------------------------------------------


def test_a_run_of_hivg_merges_its_stages_into_the_layers_that_they_train(hivg_run):
    """A warm-up without LoRA, then the stages, each with rates that fall from its own peak to zero.
    The run ends with its best weights, and without factors."""
    log = [line for line in read_log(hivg_run) if "step" not in line]
    assert [line["phase"] for line in log] == 2 * ["warm-up"] + 2 * ["stage 1"] + 2 * ["stage 2"]
    for line, peak, step in zip(log, (2e-3, 2e-3, 1.5e-3, 1.5e-3, 1e-3, 1e-3), (2, 5, 2, 5, 2, 5)):
        assert line["lr"] == pytest.approx(peak * (1 - step / 6))    # of its last step, from 0
    accuracies = [line["val_acc@0.5"] for line in log]
    assert accuracies != sorted(accuracies)    # else test_resume.py would prove less

    loaded, config = evaluate.load_checkpoint(hivg_run)
    plain = m.build_model("hivg", "tiny", "random")
    assert set(loaded.state_dict()) == set(plain.state_dict())
    changed = {name for name, p in plain.named_parameters()
               if not p.requires_grad and not torch.equal(p, loaded.state_dict()[name])}
    # Six vision layers in two groups; the text tower is one group.
    vision, text = {"warm-up": (0, 0), "stage 1": (3, 3), "stage 2": (6, 3)}[config["phase"]]
    expected = set()
    for tower, layers in (("vision", vision), ("text", text)):
        for layer, name in itertools.product(range(layers), ("q", "k", "v", "out")):
            expected.add(f"clip.{tower}.layers.{layer}.{name}.weight")
    assert changed == expected


def test_a_stage_that_ends_worse_is_undone_and_says_so(tmp_path, monkeypatch, capsys):
    """[D33] Stage 1 is worse on val than the warm-up was, so stage 2 starts from the best weights
    of the warm-up, and its own best are worse, too."""
    accuracies = iter([0.6, 0.7, 0.5, 0.4, 0.3, 0.2])    # the best is epoch 2, in the warm-up
    monkeypatch.setattr(train, "scores", lambda ious: {"acc@0.5": next(accuracies)})
    starts = []
    real = train.begin_phase

    def watched(model, *rest):
        optimizer = real(model, *rest)
        starts.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return optimizer

    monkeypatch.setattr(train, "begin_phase", watched)
    out = run(tmp_path / "a", *HIVG)
    said = capsys.readouterr().out
    assert "stage 1 ends worse on val (0.5000 at best) than it began (0.7000)" in said
    assert "stage 2 ends worse on val (0.3000 at best) than it began (0.7000)" in said
    assert "warm-up ends worse" not in said
    best = dict(evaluate.load_checkpoint(out)[0].named_parameters())
    for start, same_as_best in zip(starts, (False, True, True)):
        shared = {name: p for name, p in start.items() if name in best}
        assert same(shared, {name: best[name] for name in shared}) is same_as_best


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, stage", [(["--bottleneck", "4"], 0), (HIVG, 1)])
def test_a_checkpoint_holds_what_was_tuned_and_rebuilds_the_model(tmp_path, flags, stage):
    """Within a stage the factors are merged. The frozen encoders come from where they came from in
    training."""
    args, model, loader = set_up(8, *flags)
    frozen = train.frozen_fingerprint(model)
    model.begin_stage(stage)
    lora = hilora.lora_modules(model)
    for module in lora.values():
        nn.init.normal_(module.B)
    path = tmp_path / "best.safetensors"
    train.save_checkpoint(path, model, {"model": train.model_arguments(args), "frozen": frozen,
                                        "args": vars(args), "epoch": 1})
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    names = {name.removesuffix(".A") + ".weight" if name.endswith(".A") else name
             for name in tuned if not name.endswith(".B")}
    assert set(load_file(path)) == names
    assert bool(lora) is (stage > 0)

    loaded, _ = evaluate.load_checkpoint(tmp_path)
    assert not loaded.training and not hilora.lora_modules(loaded)
    inputs = inputs_of(next(iter(loader)))
    with torch.no_grad():
        boxes = model.eval()(**inputs).boxes
        assert torch.allclose(loaded(**inputs).boxes, boxes, atol=1e-5)
        if lora:
            hilora.merge(model, discard=True)
            assert not torch.allclose(model(**inputs).boxes, boxes, atol=1e-3)


# --- Several processes ----------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# The second of two processes hears SIGTERM in step 2 of the first epoch.
STOPPED = """
import os, signal, sys, train
real = train.seed_of_step
def watched(args, epoch, step):
    if (epoch, step, os.environ["RANK"]) == (1, 1, "1"):
        os.kill(os.getpid(), signal.SIGTERM)
    return real(args, epoch, step)
train.seed_of_step = watched
train.main()
"""


def two_processes(*command):
    """Run a command in two processes, as torchrun does -> their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in ("0", "1"):
        environment = {**ENVIRONMENT, "TORCHELASTIC_RUN_ID": "x", "RANK": rank, "LOCAL_RANK": rank,
                       "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return [process.wait(timeout=300) for process in started]


def assert_same_but_for_rounding(a, b):
    """Sums of floats depend on how a batch is divided."""
    for line, other in zip(computed(a), computed(b), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-3, abs=1e-6)
            assert other[name] == value, name
    ours, theirs = last_weights(a), last_weights(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Softmax does not change with a bias of the keys, so the gradient of this bias is rounding.
        if not name.endswith(".k.bias"):
            assert torch.allclose(value, theirs[name], atol=1e-4), name


def test_two_processes_train_stop_and_resume_as_one(tmp_path):
    """2 × 4 samples a step are 1 × 8. Where one process is stopped, both end after the step with
    one last.pt, from which two processes or one go on. Evaluation counts each sample once."""
    flags = [*FAST, "--epochs", "2", "--micro-batch", "3", "--log-every", "1"]
    whole, stopped, alone = (tmp_path / name for name in ("whole", "stopped", "alone"))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", str(ROOT / "train.py"), *flags, "--out",
                           str(whole)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "2 processes share each batch, 4 samples for each" in done.stdout
    assert len(re.findall("^epoch 2 .* val_acc", done.stdout, re.MULTILINE)) == 1    # one is silent

    assert two_processes("-c", STOPPED, *flags, "--out", str(stopped)) == [143, 143]
    last = torch.load(stopped / "last.pt", weights_only=True)
    assert (last["epoch"], last["step"]) == (0, 2)
    shutil.copytree(stopped, alone)

    assert two_processes("train.py", "--out", str(stopped), "--resume") == [0, 0]
    assert computed(stopped) == computed(whole)
    assert same(last_weights(stopped), last_weights(whole))
    train.main(["--out", str(alone), "--resume"])
    assert_same_but_for_rounding(alone, whole)
    assert_same_but_for_rounding(run(tmp_path / "one", *flags), whole)


def test_processes_share_what_they_can_and_save_the_device_that_was_asked(monkeypatch, tmp_path):
    """`cuda` stays `cuda` in args.json, whichever GPU a process has. 15 samples are not two halves,
    and one sample is none."""
    called = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(train.dist, "init_process_group", called.append)
    monkeypatch.setattr(train, "processes", lambda: 2)
    args = argparse.Namespace(device="cuda", batch_size=16)
    train.join_processes(args)
    assert called == [3, "nccl"] and args.device == "cuda"

    with pytest.raises(InputError, match="--batch-size is 15, which 2 processes cannot share"):
        train.join_processes(argparse.Namespace(device="cpu", batch_size=15))
    assert called[-1] == "gloo"
    samples = data.load_samples("shapes", "train", limit=1)
    with pytest.raises(InputError, match="1 samples cannot be shared by 2 processes"):
        data.TrainingBatches(samples, 8, seed=0, rank=1, processes=2)
