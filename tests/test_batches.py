"""Batches: their order, the pictures that expressions share, and several processes that share them."""
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import model as m
import train
from short_runs import FAST, computed, inputs_of, read_log, run

ROOT = Path(__file__).parent.parent
DETR = data.PIXELS["detr"]

pytestmark = pytest.mark.usefixtures("cpu_with_dropout")


def shapes(count):
    """The first samples of `shapes`, of which three share each picture."""
    return data.load_samples("shapes", "train", limit=count)


def set_up(*flags, count=24):
    """Options, a new model in eval mode, and samples."""
    args = train.parse_args([*FAST, *flags])
    torch.manual_seed(0)
    return args, m.build_model(**train.model_arguments(args)).eval(), shapes(count)


# --- The order of an epoch ------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2, 3, 5])
def test_an_epoch_has_each_sample_once_and_k_of_a_picture_together(together):
    """Groups of up to K expressions of a picture follow each other, and no sample comes twice."""
    samples = shapes(60)
    batches = data.TrainingBatches(samples, 60, seed=0, together=together)
    batches.epoch = 1
    [order] = list(batches)
    assert sorted(order) == list(range(60))
    place = {index: position for position, index in enumerate(order)}
    near = 0
    for picture in data.by_picture(samples):
        positions = sorted(place[index] for index in picture)
        near += sum(b - a == 1 for a, b in zip(positions, positions[1:]))
    # A picture has three expressions: pairs of neighbours by K, and a few that meet by chance.
    least = {1: 0, 2: 20, 3: 40, 5: 40}[together]
    assert least <= near <= least + 8


def test_batches_depend_on_seed_and_epoch_and_may_begin_later():
    """The order is drawn from the seed and the epoch; `first` leaves out the first batches of it."""
    def drawn(seed, epoch, first=0):
        batches = data.TrainingBatches(shapes(60), 16, seed)
        batches.epoch = epoch
        batches.first = first
        assert len(batches) == 3
        return list(batches)

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2)
    assert drawn(0, 1) != drawn(1, 1)
    assert drawn(0, 1, first=2) == drawn(0, 1)[2:]


def test_processes_share_each_batch():
    """The parts of two processes make up the batch of one; in evaluation no sample comes twice."""
    samples = shapes(60)
    whole = list(data.TrainingBatches(samples, 16, 0))
    parts = [list(data.TrainingBatches(samples, 16, 0, rank=rank, processes=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*parts)] == whole

    seen = []
    for rank in range(3):
        for batch in data.evaluation_batches(samples, 16, rank, 3):
            seen += batch
    assert sorted(seen) == list(range(60))


# --- A picture that several expressions share -----------------------------------------------------


def test_a_batch_holds_a_picture_once_for_neighbours_in_evaluation():
    """Six expressions of two pictures are a batch of two pictures; `picture` says which is whose."""
    dataset = data.GroundingDataset(shapes(6), 64, data.Tokenizer(20), DETR)
    batch = data.collate(dataset.__getitems__([0, 1, 2, 3, 4, 5]), 0)
    assert len(batch["images"]) == len(batch["image_padding"]) == 2
    assert batch["picture"].tolist() == [0, 0, 0, 1, 1, 1]
    alone = [dataset[index] for index in range(6)]
    for row, item in zip(batch["picture"], alone):
        assert torch.equal(batch["images"][row], item.image)
    assert torch.allclose(batch["boxes"], torch.tensor([item.box for item in alone]))


def test_samples_of_a_picture_have_transforms_of_their_own_in_training():
    """With K = 1 two neighbours of the same picture are placed apart; with K > 1 they share it."""
    apart = data.GroundingDataset(shapes(3), 64, data.Tokenizer(20), DETR, train=True)
    batch = data.collate(apart.__getitems__([0, 1, 2]), 0)
    assert batch["picture"].tolist() == [0, 1, 2]
    together = data.GroundingDataset(shapes(3), 64, data.Tokenizer(20), DETR, train=True,
                                     shared=True)
    assert data.collate(together.__getitems__([0, 1, 2]), 0)["picture"].tolist() == [0, 0, 0]


def test_shared_transforms_suit_all_texts_and_keep_all_boxes():
    """No crop and no mirror image makes one of the texts false, and each box keeps its centre."""
    picture = Image.new("RGB", (100, 60))
    boxes = [(10, 20, 30, 40), (70, 5, 90, 25)]
    sizes = set()
    for seed in range(200):
        rng = random.Random(seed)
        changed, moved, texts = data.augment(picture, boxes, ["a cup", "a dog"], rng, True)
        assert texts == ["a cup", "a dog"]
        sizes.add(changed.size)
        for x1, y1, x2, y2 in moved:
            assert 0 < (x1 + x2) / 2 < changed.width
            assert 0 < (y1 + y2) / 2 < changed.height
    assert len(sizes) > 10
    for seed in range(50):
        changed, moved, texts = data.augment(picture, boxes, ["a cup", "top dog, number 3"],
                                             random.Random(seed), True)
        assert (changed.size, moved) == (picture.size, boxes)


@pytest.mark.parametrize("method", ["m2ist", "full", "lora", "hivg", "clip-lora"])
def test_a_shared_picture_gives_the_boxes_and_gradients_of_copies(method):
    """One picture for three texts is the same as three copies of it, in the loss and in all
    gradients. HiVG runs its layers below the first bridge once."""
    args, model, samples = set_up("--method", method, "--batch-size", "6", count=6)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.begin_stage(train.plan(args)[-1].stage)
    [batch] = list(train.make_loader(samples, model, args))
    found = {}
    for name in ("shared", "copies"):
        inputs = inputs_of(batch)
        if name == "copies":
            picture = inputs.pop("picture")
            for part in ("images", "image_padding"):
                inputs[part] = inputs[part][picture]
        model.train()
        model.zero_grad()
        grounding = model(**inputs, attention=True)
        parts = train.weighted_losses(grounding, batch["boxes"], args)
        sum(parts.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[name] = (grounding.boxes, gradients)
    assert torch.allclose(found["shared"][0], found["copies"][0], atol=1e-6)
    for name, gradient in found["copies"][1].items():
        assert torch.allclose(found["shared"][1][name], gradient, rtol=1e-4, atol=1e-6), name


def count_pictures(monkeypatch, module):
    """A list that fills with the number of pictures of each call of a module's forward."""
    counts = []
    real = module.forward

    def watched(x, *rest, **options):
        counts.append(len(x))
        return real(x, *rest, **options)

    monkeypatch.setattr(module, "forward", watched)
    return counts


def test_an_evaluation_encodes_each_picture_once(monkeypatch):
    """24 expressions of 8 pictures, in whatever order they come, are 8 pictures for the encoder; of
    HiVG's vision layers, those below the first bridge."""
    args, model, samples = set_up("--batch-size", "24")
    random.Random(0).shuffle(samples)
    counts = count_pictures(monkeypatch, model.vision.backbone)
    together = train.predict(model, train.make_loader(samples, model, args), args)
    assert counts == [8]
    one_by_one = train.predict(model, train.make_loader(samples, model, args, batch_size=1), args)
    assert torch.allclose(together.boxes, one_by_one.boxes, atol=1e-5)
    truths = [item.box for item in map(train.make_loader(samples, model, args).dataset.__getitem__,
                                       range(24))]
    assert torch.allclose(together.truths, torch.tensor(truths))    # in the order of the samples

    args, model, samples = set_up("--method", "hivg", "--batch-size", "24")
    below = count_pictures(monkeypatch, model.clip.vision.layers[0])
    bridge = count_pictures(monkeypatch, model.clip.vision.layers[1])
    train.predict(model, train.make_loader(samples, model, args), args)
    assert (below, bridge) == ([8], [24])


def test_k_expressions_per_image_are_trained_from_a_kth_of_the_pictures(monkeypatch, tmp_path):
    """An epoch has as many steps, and each step has fewer pictures than samples. In micro-batches
    each picture stays with its texts."""
    sizes = []
    real = m.DetrBert.forward

    def watched(model, images, image_padding, tokens, *rest, **options):
        if model.training:
            sizes.append((len(images), len(tokens)))
        return real(model, images, image_padding, tokens, *rest, **options)

    monkeypatch.setattr(m.DetrBert, "forward", watched)
    flags = ["--epochs", "1", "--limit", "60", "--batch-size", "15", "--expressions-per-image", "3"]
    run(tmp_path / "a", *flags)
    assert sizes == [(5, 15)] * 4
    sizes.clear()
    out = run(tmp_path / "b", *flags, "--micro-batch", "5")
    assert {texts for _, texts in sizes} == {5}
    assert {pictures for pictures, _ in sizes} == {2, 3}    # 3 + 2, 1 + 3 + 1 and 2 + 3
    assert read_log(out)[-1]["train_loss"] == pytest.approx(
        read_log(tmp_path / "a")[-1]["train_loss"], rel=0.02)    # dropout differs


def test_workers_live_on_and_see_the_epoch():
    """The transforms of each epoch are the same with workers, which are not started anew."""
    boxes = {}
    for workers in ("0", "2"):
        args, model, samples = set_up("--workers", workers)
        loader = train.make_loader(samples, model, args, train=True)
        assert loader.persistent_workers is (workers == "2")
        for epoch in (1, 2):
            train.set_epoch(loader, epoch)
            found = torch.cat([batch["boxes"] for batch in loader])
            boxes[workers, epoch] = found
    for epoch in (1, 2):
        assert torch.equal(boxes["0", epoch], boxes["2", epoch])
    assert not torch.equal(boxes["0", 1], boxes["0", 2])


# --- Several processes ----------------------------------------------------------------------------


def torchrun(processes, out, *flags):
    """A run of several processes without dropout -> what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
               "--standalone", str(ROOT / "train.py"), *FAST, "--out", str(out), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """2 × 4 samples a step give the weights and the log of 1 × 8; evaluation counts each of the 28
    samples of val once. The tiny size has no dropout."""
    flags = ["--epochs", "2", "--micro-batch", "2", "--log-every", "1"]
    printed = torchrun(2, tmp_path / "two", *flags)
    assert "2 processes share each batch, 4 samples for each" in printed
    finished = re.findall("^epoch 2 .* val_acc", printed, re.MULTILINE)
    assert len(finished) == 1    # the second process is silent
    torchrun(1, tmp_path / "one", *flags)
    one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        # Softmax does not change with a bias of the keys, so the gradient of this bias is rounding.
        if not name.endswith(".k.bias"):
            assert torch.allclose(value, two[name], atol=1e-4), name
    for line, other in zip(computed(tmp_path / "one"), computed(tmp_path / "two"), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            expected = value
            if isinstance(value, float):
                expected = pytest.approx(value, rel=1e-3, abs=1e-6)
            assert other[name] == expected, name


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    """15 samples are not two halves."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(train, "processes", lambda: 2)
    args = train.parse_args([*FAST, "--batch-size", "15"])
    with pytest.raises(data.InputError, match="--batch-size is 15, which 2 processes cannot share"):
        train.join_processes(args)
