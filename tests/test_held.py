"""What a rewrite could lose without a word: gradients, starts that are not dead, numbers that the
other tests have equal and that must not be mixed up, seeds, and single settings."""
import argparse
import math

import pytest
import torch

import data
import evaluate
import model as m
import train
from test_rows import batch, built, disturb, options_of

FAST = ["--size", "tiny", "--weights", "random", "--limit", "8", "--batch-size", "4",
        "--warmup", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors here are so small that two threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tuned(model):
    """{name: parameter} of all that is tuned."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_up(*flags):
    """Options and a new model."""
    args = train.parse_args([*FAST, *flags])
    torch.manual_seed(args.seed)
    return args, m.build_model(**train.model_arguments(args))


def two_steps(model, args, phase):
    """Two steps with the peak rates of a phase, on `shapes`."""
    samples = data.load_samples("shapes", "train", limit=2 * args.batch_size)
    optimizer = train.make_optimizer(model, args, phase)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model.train()
    for step in evaluate.make_loader(samples, model, args, train=True):
        train.train_step(model, step, optimizer, scaler, args)


# --- Gradients ------------------------------------------------------------------------------------

EPS = 1e-7    # how far a weight is moved; in float64 the slope then has seven digits


@pytest.mark.parametrize("row, flags, terms, part", [
    ("m2ist/I/m2ist", [], 3, ""),    # L1, GIoU, and the attention loss
    ("m2ist/X/d", ["--side-start", "paired"], 3, ""),    # side networks read what LoRA changes
    ("m2ist/VII/a", [], 3, ""),             # adapters inside the layers
    ("m2ist/I/full", [], 3, ""),
    ("hivg/3/4", [], 5, ""),                # contrast and region-text, too, in the last stage
    ("hivg/4/2", [], 5, ".plugs."),         # bridges without cross-attention
    ("hivg/10/1", [], 5, ".plugs.")])       # bridges whose weights depend on the text
def test_the_gradient_of_every_tuned_tensor_is_the_slope_of_the_whole_loss(monkeypatch, row, flags,
                                                                          terms, part):
    """The gradient of each tensor p, times a random direction d, is (L(p + eps d) - L(p - eps d)) /
    2 eps. So no way from a tuned tensor to a term of the loss is cut off."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)    # the losses use float()
    args, model = built(row, "--attention-loss", "0.3", *flags)
    disturb(model)    # B, up-projections and the bridges' weights start at 0
    model.double().train()
    inputs, _ = batch()
    images, image_padding, tokens, token_padding = [part[:2] for part in inputs]
    g = torch.Generator().manual_seed(2)
    centres = 0.1 + 0.8 * torch.rand(2, 2, generator=g)
    sizes = 0.1 + 0.4 * torch.rand(2, 2, generator=g)
    boxes = torch.cat([centres, sizes], dim=1).double()

    def loss():
        found = model(images.double(), image_padding, tokens, token_padding, attention=True)
        by_name = train.weighted_losses(found, boxes, args)
        assert len(by_name) == terms
        return sum(by_name.values())

    parameters = {name: p for name, p in tuned(model).items() if part in name}
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True,
                                    materialize_grads=True)
    wrong = []
    for (name, p), gradient in zip(parameters.items(), gradients):
        direction = torch.randn(p.shape, generator=g).double()
        with torch.no_grad():
            p += EPS * direction
            above = loss()
            p -= 2 * EPS * direction
            below = loss()
            p += EPS * direction
        slope = (above - below) / (2 * EPS)
        if abs((gradient * direction).sum() - slope) > 1e-4 * gradient.norm() + 1e-7:
            wrong.append(name)
    assert wrong == []


# --- Dead starts ----------------------------------------------------------------------------------


def test_all_that_is_tuned_learns_from_the_second_step_on_and_nothing_else_changes():
    """In no row, in its last stage, a tuned tensor stays as it starts: after one step each has a
    gradient. (In the first step LoRA and inserted adapters have none, but for what is 0.) What is
    frozen stays as it is, bit for bit."""
    rows = {}
    for row in train.ROWS:
        args = train.parse_args(["--row", row, "--batch-size", "4", "--device", "cpu"])
        rows.setdefault(str(options_of(args)), args)    # rows that are the same run count once
    wrong = []
    for args in rows.values():
        torch.manual_seed(0)
        model = m.build_model(**train.model_arguments(args))
        phase = train.plan(args)[-1]
        model.begin_stage(phase.stage)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        two_steps(model, args, phase)
        learns = tuned(model)
        for name, value in model.state_dict().items():
            if name not in learns and not torch.equal(value, before[name]):
                wrong.append((args.row, name))
        for name, p in learns.items():
            # A bias of the keys adds the same to all scores of a query, and softmax takes it out:
            # its gradient is 0 but for rounding, of 2e-9 at most. All others are at least 5e-7.
            if name.endswith("k.bias"):
                continue
            if p.grad is None or p.grad.square().mean().sqrt() < 3e-8:
                wrong.append((args.row, name))
    assert wrong == []


# --- Rates, epochs and weights that differ --------------------------------------------------------


@pytest.mark.parametrize("method", ["m2ist+lora", "full", "hivg"])
def test_the_grounding_encoder_has_lr_and_all_else_has_lr_encoder(method):
    """The two rates of a phase, and AdamW's own betas and eps in both groups."""
    args, model = set_up("--method", method, "--lr", "3e-3", "--lr-encoder", "2e-4")
    optimizer = train.make_optimizer(model, args, train.plan(args)[0])
    rates = {}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        for p in group["params"]:
            assert group["peak"] == group["lr"]    # the schedule multiplies the peak
            rates[p] = group["lr"]
    for name, p in tuned(model).items():
        assert rates[p] == (3e-3 if name.startswith("grounding.") else 2e-4), name


@pytest.mark.parametrize("lr, lr_encoder, moves", [
    ("1e-3", "0", "grounding"), ("0", "1e-3", "adapters")])
def test_a_rate_of_0_keeps_its_part_still(tmp_path, lr, lr_encoder, moves):
    """In a whole run, --lr moves the grounding encoder alone, and --lr-encoder moves M³ISA's
    adapters alone."""
    flags = [*FAST, "--epochs", "1", "--lr", lr, "--lr-encoder", lr_encoder]
    _, begun = set_up(*flags)
    train.main([*flags, "--out", str(tmp_path / "run")])
    ended = torch.load(tmp_path / "run/last.pt")["model"]
    for name, p in tuned(begun).items():
        if not name.endswith("k.bias"):
            assert torch.equal(p, ended[name]) != name.startswith(moves), name


@pytest.mark.parametrize("flags, phases", [
    ("--epochs 4", [(0, 0, 4, 3e-3, 2e-4)]),
    ("--method m2ist+lora --epochs 6 --stages 2", [(1, 0, 3, 3e-3, 2e-4), (2, 3, 6, 3e-3, 2e-4)]),
    ("--method hivg --epochs 5 --stage-epochs 2 --stage-lr 4e-4 5e-5", [
        (0, 0, 5, 3e-3, 2e-4), (1, 5, 7, 4e-4, 4e-4), (2, 7, 9, 5e-5, 5e-5),
        (3, 9, 11, 5e-5, 5e-5)])])
def test_a_plan_with_unequal_numbers(flags, phases):
    """(stage, epochs before, epochs at its end, rate, rate of the encoders) of each phase, where
    --epochs is not --stage-epochs and --lr is not --lr-encoder."""
    args = train.parse_args([*FAST, "--lr", "3e-3", "--lr-encoder", "2e-4", *flags.split()])
    found = [(p.stage, p.first, p.last, p.lr, p.lr_encoder) for p in train.plan(args)]
    assert found == phases


WEIGHTS = dict(l1=2, giou=3, contrast=5, focal=7, dice=11, beta=0, attention_loss=13)


@pytest.mark.parametrize("changed, value", [
    ("beta", 0), ("beta", 1), ("l1", 0), ("giou", 0), ("contrast", 0), ("focal", 0), ("dice", 0),
    ("attention_loss", 0)])
def test_each_weight_of_the_loss_changes_its_own_term_alone(changed, value):
    """The terms of the loss by weights that all differ, in numbers that a hand can compute."""
    weights = {**WEIGHTS, changed: value}
    # The prediction is the upper half of the true box, which is the left half of a grid of 4 x 4.
    found = m.Grounding(
        boxes=torch.tensor([[0.25, 0.25, 0.5, 0.5]] * 2), attention=torch.full((2, 16), 1 / 20),
        scores=torch.zeros(2, 16), padding=torch.zeros(2, 16, dtype=torch.bool),
        text=torch.eye(2), image=torch.eye(2), temperature=torch.tensor(0.5))
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0]] * 2)
    terms = train.weighted_losses(found, boxes, argparse.Namespace(**weights))

    l1 = 0.25 + 0.5                        # cy is wrong by 0.25 and h by 0.5
    if weights["beta"] == 1:
        l1 = 0.25 ** 2 / 2 + 0.5 ** 2 / 2
    focal = (0.25 + 0.75) / 2 * 0.5 ** 2 * math.log(2)    # every score says 1/2
    dice = 1 - (2 * 4 + 1) / (8 + 8 + 1)
    expected = {
        "l1": weights["l1"] * l1,
        "giou": weights["giou"] * 0.5,
        "contrast": weights["contrast"] * math.log(1 + math.exp(-2)),
        "region_text": weights["focal"] * focal + weights["dice"] * dice,
        "attention": weights["attention_loss"] * -math.log(8 / 20)}
    assert set(terms) <= set(expected)
    for name in expected:                  # a term whose weight is 0 may be missing
        assert float(terms.get(name, 0)) == pytest.approx(expected[name], rel=1e-5), name


# --- Seeds ----------------------------------------------------------------------------------------


def test_another_seed_draws_other_new_weights(tmp_path):
    """With rates of 0 a run ends with the weights that it drew. Those of seed 0 and of seed 1 have
    no matrix in common."""
    drawn = []
    for seed in ("0", "1"):
        train.main([*FAST, "--epochs", "1", "--lr", "0", "--lr-encoder", "0", "--seed", seed,
                    "--out", str(tmp_path / seed)])
        drawn.append(torch.load(tmp_path / seed / "last.pt")["model"])
    for name, value in drawn[0].items():
        if value.dim() > 1:
            assert not torch.equal(value, drawn[1][name]), name


def test_the_seed_of_a_step_differs_between_seeds_epochs_steps_and_processes(monkeypatch):
    """No two steps of these runs draw the same dropout."""
    seeds = set()
    for rank in range(3):
        monkeypatch.setattr(train, "rank", lambda: rank)
        for seed in range(3):
            for epoch in (1, 2, 3):
                for step in range(3):
                    seeds.add(train.seed_of_step(argparse.Namespace(seed=seed), epoch, step))
    assert len(seeds) == 3 ** 4


# --- Single settings ------------------------------------------------------------------------------


def neighbours(samples, epoch):
    """{image: pairs of its expressions that follow each other in an epoch}, two of an image
    together."""
    batches = data.TrainingBatches(samples, len(samples), seed=0, together=2)
    batches.epoch = epoch
    [order] = list(batches)
    pairs = {sample.image: set() for sample in samples}
    for a, b in zip(order, order[1:]):
        if samples[a].image == samples[b].image:
            pairs[samples[a].image].add(frozenset((a, b)))
    return pairs


def test_the_expressions_that_share_an_image_change_from_epoch_to_epoch():
    """With K = 2, two of the three expressions of an image are together. In another epoch they are
    another two, for two images of three on average."""
    samples = data.load_samples("shapes", "train", limit=60)
    first, second = neighbours(samples, 1), neighbours(samples, 2)
    changed = [image for image in first if not first[image] & second[image]]
    assert len(changed) >= 5


@pytest.mark.parametrize("method, pixels", [("m2ist", "clip"), ("hivg", "detr")])
def test_an_image_of_ones_own_has_the_pixels_of_a_loaders(method, pixels):
    """An image of evaluate.locate reaches the encoder as one of a loader does, normalised by
    --pixels, and not by the other of the two."""
    args, model = set_up("--method", method, "--pixels", pixels)
    sample = data.load_samples("shapes", "val", limit=1)[0]
    stem = model.vision.backbone if method == "m2ist" else model.clip.vision.patches
    seen = []
    stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    evaluate.predict(model, evaluate.make_loader([sample], model, args), args)
    evaluate.locate(model, data.load_image(sample.image), [sample.text])
    raw, padding, _ = data.letterbox(sample.image, 64)
    expected = m.normalise(raw[None], padding[None], m.PIXELS[pixels])
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], expected)
