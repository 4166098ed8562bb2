"""train.py and evaluate.py as a user meets them: whole runs, interruptions, bad input."""
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import evaluate
import losses
import model as m
import train
from test_data import as_refer, coco, pictures

ROOT = Path(__file__).parent.parent
FAST = ["--size", "tiny", "--weights", "random", "--limit", "60", "--batch-size", "16", "--epochs", "3", "--warmup", "0",
        "--device", "cpu"]


@pytest.fixture(autouse=True)
def cpu_with_dropout(monkeypatch):
    """On the CPU, whatever there is; with dropout, so that a random number drawn out of turn shows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for spec in m.SIZES["tiny"].values():
        monkeypatch.setitem(spec, "grounding", {**spec["grounding"], "dropout": 0.1})


def run(out, *flags):
    train.main([*FAST, "--out", str(out), *flags])
    return Path(out)


def final(out):
    return torch.load(out / "last.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_writes_what_it_should_and_evaluate_gives_the_same_number(tmp_path, capsys):
    out = run(tmp_path / "a")
    assert {p.name for p in out.iterdir()} == {"args.json", "log.jsonl", "last.pt", "best.safetensors", "val.png"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    best = max(entry["val_acc@0.5"] for entry in log)
    result = evaluate.main([str(out), "--json", str(tmp_path / "r.json"), "--figures", str(tmp_path / "figures")])
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert result["splits"]["val"]["acc@0.5"] == best and result["dataset"] == "shapes" and result["method"] == "m2ist"
    assert result["leaky_pretraining"] is False and set(result["splits"]) == {"val", "testA", "testB"}
    assert set(result["splits"]["val"]) == {"acc@0.5", "mean_iou", "expressions", "images", "seconds"}
    assert (result["splits"]["val"]["expressions"], result["splits"]["val"]["images"]) == (60, 20)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"val.png", "testA.png", "testB.png"}
    assert f"Acc@0.5 {best:.4f}" in capsys.readouterr().out
    one = evaluate.main([str(out / "best.safetensors"), "--split", "val", "--batch-size", "1"])
    assert one["splits"]["val"]["acc@0.5"] == best and list(one["splits"]) == ["val"]


def test_one_seed_gives_one_log_and_another_seed_another(tmp_path):
    a, b, c = run(tmp_path / "a"), run(tmp_path / "b"), run(tmp_path / "c", "--seed", "1")
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text() != (c / "log.jsonl").read_text()
    assert same(final(a), final(b)) and not same(final(a), final(c))


@pytest.mark.parametrize("writes", range(1, 11))
def test_a_run_that_dies_at_any_write_resumes_to_the_same_weights(tmp_path, monkeypatch, writes):
    """args.json, then for each epoch best.safetensors, log.jsonl and last.pt: dying before each of these writes."""
    whole = run(tmp_path / "whole")
    real, count = train.save_whole, [0]

    def dies(path, write):
        count[0] += 1
        if count[0] == writes:
            Path(f"{path}.1.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, write)
    monkeypatch.setattr(train, "save_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "dead")
    monkeypatch.setattr(train, "save_whole", real)
    flags = FAST if writes == 1 else []                 # before args.json nothing is known of the run but its folder
    train.main([*flags, "--out", str(tmp_path / "dead"), "--resume"])
    assert same(final(whole), final(tmp_path / "dead"))
    assert (whole / "log.jsonl").read_bytes() == (tmp_path / "dead" / "log.jsonl").read_bytes()
    assert same(evaluate.load_checkpoint(whole)[0].state_dict(), evaluate.load_checkpoint(tmp_path / "dead")[0].state_dict())


HIVG = ["--method", "hivg", "--epochs", "2", "--stages", "2", "--stage-epochs", "2", "--rank", "4"]


def up_and_down(ious):
    """An accuracy that depends on the model alone and is now higher, now lower than before."""
    return {"acc@0.5": ious.mean().item() * 1e4 % 1, "mean_iou": 0.0}


@pytest.mark.parametrize("epoch, file", [(2, "last.pt"), (3, "log.jsonl"), (4, "last.pt"), (5, "log.jsonl"), (6, "last.pt")])
def test_hivg_that_dies_at_a_write_resumes_into_the_right_stage(tmp_path, monkeypatch, hivg_run, epoch, file):
    """Before and after the ends of the warm-up (epoch 2) and of stage 1 (epoch 4)."""
    monkeypatch.setattr(train, "scores", up_and_down)
    real, count = train.save_whole, [0]

    def dies(path, write):
        count[0] += Path(path).name == file
        if count[0] == epoch:
            raise KeyboardInterrupt
        real(path, write)
    monkeypatch.setattr(train, "save_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "dead", *HIVG)
    monkeypatch.setattr(train, "save_whole", real)
    train.main(["--out", str(tmp_path / "dead"), "--resume", "--stages", "2"])          # a flag that the run has already
    assert same(final(hivg_run), final(tmp_path / "dead"))
    assert (hivg_run / "log.jsonl").read_bytes() == (tmp_path / "dead" / "log.jsonl").read_bytes()
    assert same(load_file(hivg_run / "best.safetensors"), load_file(tmp_path / "dead" / "best.safetensors"))


@pytest.fixture(scope="module")
def hivg_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for spec in m.SIZES["tiny"].values():
            patch.setitem(spec, "grounding", {**spec["grounding"], "dropout": 0.1})
        patch.setattr(train, "scores", up_and_down)
        return run(tmp_path_factory.mktemp("hivg") / "whole", *HIVG)


def test_a_run_of_hivg_logs_its_phases_and_its_checkpoint_has_no_pair(hivg_run):
    log = [json.loads(line) for line in (hivg_run / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["phase"]) for line in log] == [
        (1, "warm-up"), (2, "warm-up"), (3, "stage 1"), (4, "stage 1"), (5, "stage 2"), (6, "stage 2")]
    accuracies = [line["val_acc@0.5"] for line in log]
    assert accuracies != sorted(accuracies)                              # or the resumed runs would not meet a worse epoch
    for line, peak, step in zip(log, [1e-3, 1e-3, 8e-4, 8e-4, 6e-4, 6e-4], [2, 5] * 3):     # 3 steps an epoch, 6 a phase
        assert line["lr"] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * step / 6)))
    state = load_file(hivg_run / "best.safetensors")
    assert not any(name.endswith((".A", ".B")) for name in (*state, *final(hivg_run)))
    assert all(torch.equal(value, final(hivg_run)[name]) for name, value in state.items())       # the run ends with its best
    model, config = evaluate.load_checkpoint(hivg_run)
    plain = m.build_model("hivg", "tiny", "random")
    assert m.count_parameters(model) == m.count_parameters(plain) and set(model.state_dict()) == set(plain.state_dict())
    changed = {name for name, p in plain.named_parameters() if not p.requires_grad and not torch.equal(p, model.state_dict()[name])}
    stage = int(config["phase"][-1]) if config["phase"] != "warm-up" else 0
    assert changed == {f"clip.{tower}.layers.{layer}.{linear}.weight" for tower, layers in
                       (("vision", range(3 * stage)), ("text", range(3 if stage else 0))) for layer in layers
                       for linear in ("q", "k", "v", "out")}


def test_a_stage_that_ends_worse_keeps_the_weights_it_began_with_and_says_so(tmp_path, monkeypatch, capsys):
    values = iter([0.5, 0.6, 0.7, 0.4, 0.3, 0.2])
    monkeypatch.setattr(train, "scores", lambda ious: {"acc@0.5": next(values), "mean_iou": 0.0})
    states, real = [], train.end_phase

    def watched(model, phase, best, lines):
        real(model, phase, best, lines)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    monkeypatch.setattr(train, "end_phase", watched)
    run(tmp_path / "a", *HIVG)
    said = capsys.readouterr().out
    assert "stage 2 ends worse on val (0.3000) than it began (0.7000)" in said and "stage 1 ends worse" not in said
    best, config = evaluate.load_checkpoint(tmp_path / "a")
    assert config["epoch"] == 3 and config["phase"] == "stage 1"
    assert same(states[1], states[2]) and same(states[2], best.state_dict())
    assert not same(states[0], states[1])


@pytest.mark.parametrize("flags", [["--deep-to-shallow"], ["--stages", "1"], ["--stages", "4", "--stage-lr", "1e-3"], ["--rank", "2"],
                                   ["--bridge-layers"], ["--bridge-layers", "1", "6"], ["--vision-layers", "3", "6"],
                                   ["--text-layers", "3"], ["--contrast", "0"], ["--focal", "0", "--dice", "0"], ["--alpha", "64"]])
def test_every_switch_of_hivg_trains_and_makes_a_difference(tmp_path, hivg_run, flags):
    out = run(tmp_path / "a", *HIVG, *flags)
    assert not same(final(out), final(hivg_run)) and (out / "best.safetensors").exists()


@pytest.mark.parametrize("method", ["clip-frozen", "clip-lora"])
def test_plain_clip_trains_and_evaluates(tmp_path, method):
    out = run(tmp_path / "a", "--method", method, "--epochs", "1", *(["--stage-epochs", "1"] if method == "clip-lora" else []))
    result = evaluate.main([str(out), "--split", "val"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in log] == (["training"] if method == "clip-frozen" else ["warm-up", "stage 1"])
    assert result["splits"]["val"]["acc@0.5"] == max(line["val_acc@0.5"] for line in log) and result["method"] == method


def test_a_run_killed_by_sigkill_resumes_to_the_same_weights(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *FAST, "--epochs", "6", "--limit", "120"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len((tmp_path / "killed" / "log.jsonl").read_text().splitlines())
    assert 1 <= done < 6
    both = "import sys, train; [train.main([*sys.argv[3:], '--out', *rest]) for rest in ([sys.argv[1], '--resume'], [sys.argv[2]])]"
    subprocess.run([sys.executable, "-c", both, str(tmp_path / "killed"), str(tmp_path / "whole"), *command[2:]], check=True,
                   capture_output=True, cwd=ROOT)
    assert same(final(tmp_path / "killed"), final(tmp_path / "whole"))
    assert (tmp_path / "killed" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_micro_batches_add_up_to_the_batch(tmp_path, monkeypatch):
    spec = m.SIZES["tiny"]["detr"]
    monkeypatch.setitem(spec, "grounding", {**spec["grounding"], "dropout": 0.0})
    a, b = run(tmp_path / "a", "--epochs", "1"), run(tmp_path / "b", "--epochs", "1", "--micro-batch", "5")
    assert max((x - y).abs().max() for x, y in zip(final(a).values(), final(b).values())) < 1e-4


def test_rates_and_schedules_follow_the_recipe():
    args = train.parse_args(["--size", "base", "--dataset", "x.jsonl"])
    assert (args.epochs, args.batch_size, args.lr, args.lr_encoder, args.weight_decay) == (90, 64, 1e-4, 1e-5, 1e-4)
    factors = [train.rate_factor(args, epoch * 10, 10, 90) for epoch in (0, 59, 60, 89)]
    assert factors == [1, 1, 0.1, 0.1]
    plus = train.parse_args(["--size", "base", "--dataset", "refcoco+"])
    assert (plus.epochs, plus.lr_drop) == (180, 120)
    tiny = train.parse_args([])
    assert (tiny.method, tiny.dataset, tiny.size, tiny.weights) == ("m2ist", "shapes", "tiny", "shapes")
    assert tiny.epochs * (24_000 // tiny.batch_size) == 3000                         # the steps that its recipe states
    assert train.rate_factor(tiny, 0, 750, 4) == pytest.approx(1 / 200) and train.rate_factor(tiny, 2999, 750, 4) < 1e-5
    model = m.build_model("m2ist", "tiny", "random")
    groups = train.make_optimizer(model, args, train.plan(args)[0]).param_groups
    assert [g["lr"] for g in groups] == [1e-4, 1e-5]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.adapters.parameters()}


def test_phases_of_hivg_follow_section_4_1_and_table_8():
    base = train.parse_args(["--method", "hivg", "--size", "base", "--dataset", "x.jsonl"])
    assert [(p.name, p.stage, p.first, p.last, p.lr, p.lr_encoder) for p in train.plan(base)] == [
        ("warm-up", 0, 0, 50, 2.5e-4, 2.5e-4), ("stage 1", 1, 50, 70, 1e-4, 1e-4),
        ("stage 2", 2, 70, 90, 0.5e-4, 0.5e-4), ("stage 3", 3, 90, 110, 0.25e-4, 0.25e-4)]
    assert (base.batch_size, base.l1, base.giou, base.focal, base.dice, base.contrast, base.rank, base.alpha, base.weight_decay) == \
           (80, 2, 2, 20, 2, 1, 32, 16, 1e-4)
    large = train.parse_args(["--method", "hivg", "--size", "large", "--dataset", "x.jsonl"])
    assert [(p.last - p.first, p.lr) for p in train.plan(large)] == [(50, 2.5e-4), (15, 1e-4), (15, 0.75e-4), (15, 0.5e-4), (15, 0.25e-4)]
    assert large.batch_size == 32
    more = train.parse_args(["--method", "hivg", "--size", "base", "--dataset", "x.jsonl", "--stages", "4"])
    assert [p.lr for p in train.plan(more)] == [2.5e-4, 1e-4, 0.5e-4, 0.25e-4, 0.25e-4]
    # cosine to zero in every phase, from its own rate
    assert train.rate_factor(base, 0, 10, 20) == 1 and train.rate_factor(base, 100, 10, 20) == pytest.approx(0.5)
    lora = train.parse_args(["--method", "clip-lora", "--size", "base", "--dataset", "x.jsonl"])
    assert [(p.name, p.last) for p in train.plan(lora)] == [("warm-up", 50), ("stage 1", 110)] and lora.contrast == lora.focal == 0
    for method in ("hivg", "clip-lora", "clip-frozen"):                            # as long as each other, to be compared
        assert train.plan(train.parse_args(["--method", method]))[-1].last == 7


def test_accuracy_counts_an_iou_of_one_half_as_right():
    assert train.scores(torch.tensor([0.5, 0.49, 0.9, 0.0]))["acc@0.5"] == 0.5


def test_full_size_with_random_weights_on_the_cpu(tmp_path):
    """One's own pictures, 640 pixels, both encoders whole; and its checkpoint evaluates."""
    lines = []
    for i, (split, sample) in enumerate((s, x) for s in ("train", "val") for x in data.load_samples("shapes", s)[:2]):
        data.render(sample.image).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": sample.text, "box": sample.box, "split": split}))
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    train.main(["--method", "m2ist", "--dataset", str(tmp_path / "my.jsonl"), "--size", "base", "--weights", "random",
                "--batch-size", "2", "--limit", "2", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out")])
    result = evaluate.main([str(tmp_path / "out"), "--device", "cpu"])
    assert result["splits"]["val"]["expressions"] == 2
    assert (tmp_path / "out" / "best.safetensors").stat().st_size < 50e6              # 11.4M tuned parameters of 152M


def test_a_jsonl_without_val_keeps_the_last_epoch(tmp_path, capsys):
    data.render(0).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "text": "it", "box": [1, 2, 30, 40], "split": "train"})
    (tmp_path / "my.jsonl").write_text("\n".join([line] * 3))
    out = run(tmp_path / "out", "--dataset", str(tmp_path / "my.jsonl"), "--workers", "1")
    assert "no split 'val'" in capsys.readouterr().out and evaluate.read_config(out)[1]["epoch"] == 3
    assert list(evaluate.main([str(out)])["splits"]) == ["train"]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def test_checkpoint_holds_the_tuned_weights_alone_and_rebuilds_the_model(tmp_path):
    torch.manual_seed(1)
    model = m.build_model("m2ist", "tiny", "random", bottleneck=4)
    batch = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool), torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool)
    arguments = dict(method="m2ist", size="tiny", weights="random", bottleneck=4)
    train.save_checkpoint(tmp_path / "best.safetensors", model, {"model": arguments, "args": {}, "epoch": 1})
    assert set(load_file(tmp_path / "best.safetensors")) == {n for n, p in model.named_parameters() if p.requires_grad}
    again, config = evaluate.load_checkpoint(tmp_path)
    assert torch.equal(again(*batch).boxes, model.eval()(*batch).boxes) and config["model"] == arguments

    def fails(word, **changes):
        train.save_checkpoint(tmp_path / "x.safetensors", model, {"model": {**arguments, **changes}, "args": {}, "epoch": 1})
        with pytest.raises(m.InputError, match=word):
            evaluate.load_checkpoint(tmp_path / "x.safetensors")
    fails("another method or size", method="frozen")
    fails("another method or size", bottleneck=5)
    model.text.word.weight.data[7] += 1                                                 # other encoders than at training
    fails("other encoder weights")
    (tmp_path / "y.safetensors").write_bytes(b"no")
    save_file({"a": torch.zeros(1)}, tmp_path / "z.safetensors", metadata={"config": "{}"})
    for bad, word in (("y.safetensors", "not a checkpoint"), ("z.safetensors", "not a checkpoint"), ("gone", "no such checkpoint")):
        with pytest.raises(m.InputError, match=word):
            evaluate.load_checkpoint(tmp_path / bad)


# ---------------------------------------------------------------------------------------------------------------------
# The tiny encoders' pretraining

@pytest.mark.parametrize("family, method", [("detr", "frozen"), ("clip", "clip-frozen")])
def test_pretraining_is_cached_and_repeatable(tmp_path, family, method):
    for folder in ("a", "b"):
        train.pretrain_encoders(str(tmp_path / folder), 3, family)
    a, b = (m.build_model(method, "tiny", "shapes", cache=str(tmp_path / f), pretext_steps=3) for f in "ab")
    tuned = train.tuned_state(a)
    assert train.frozen_fingerprint(a, tuned) == train.frozen_fingerprint(b, tuned)
    assert train.frozen_fingerprint(a, tuned) != train.frozen_fingerprint(m.build_model(method, "tiny", "random"), tuned)
    path, = (tmp_path / "a").iterdir()
    before = path.stat().st_mtime_ns
    train.pretrain_encoders(str(tmp_path / "a"), 3, family)
    assert path.stat().st_mtime_ns == before


def test_pretext_says_what_covers_a_cell_and_sees_no_expression():
    task = train.PretextVision(torch.nn.Identity())
    for i in range(50):
        image, padding, owner, inside = task.item(task.keys[i])
        colour, shape, boxes = (target[0] for target in task.targets(owner[None], [inside]))
        _, things, _ = data.scene(task.keys[i])
        covered = colour < len(data.COLOURS)
        assert torch.equal(covered, owner >= 0) and [thing for thing, _ in inside] == things
        assert {(list(data.COLOURS)[c], data.SHAPES[s]) for c, s in zip(colour[covered], shape[covered])} == \
               {(t.colour, t.shape) for t in things}
        centres = torch.tensor([[(x + 0.5) / 8, (y + 0.5) / 8] for y in range(8) for x in range(8)])
        x1y1x2y2 = losses.to_corners(boxes)
        inside = ((centres >= x1y1x2y2[:, :2] - 1e-3) & (centres <= x1y1x2y2[:, 2:] + 1e-3)).all(1)
        assert inside[covered].all()
    first, scenes, *_ = data.SHAPES_SPLITS["train"]
    assert list(task.keys) == list(range(first, first + scenes))                        # and of the train split alone


def test_captions_say_what_a_thing_is_and_where():
    rng, thing = data.seeded(0), data.Thing("red", "circle", "small", 20, 100, 12)
    said = {train.caption(rng, thing, [0.1, 0.7, 0.2, 0.2]) for _ in range(100)}
    assert said == {" ".join(words) for size in ("small ", "little ", "") for words in
                    ([f"{size}red circle bottom left"], [f"{size}red circle a 6"])}
    assert train.caption(data.seeded(1), thing, [0.5, 0.5, 0.2, 0.2]).split()[-1] in ("circle", "5")
    tokenizer = data.Tokenizer("shapes", None, 20)
    assert all(tokenizer.wordpiece.unk_token_id not in tokenizer(text) for text in said)


def test_contrast_of_crops_is_of_the_cells_that_the_thing_of_a_caption_covers():
    torch.manual_seed(0)
    task = train.PretextClip(m.build_model("clip-frozen", "tiny", "random").clip)
    images, padding, owner, things = next(train.random_batches(task, 1, 4))
    tokens = task.encoder.vision(images, padding).x
    seen, pooled = [], []
    task.embed_texts = lambda texts: seen.append(texts) or torch.randn(len(texts), 64)
    task.encoder.vision.embed = lambda x: pooled.append(x) or torch.randn(len(x), 64)
    assert task(images, padding, owner, things).isfinite()
    crops, whole = seen
    assert len(set(crops)) == len(crops) == len(pooled[-1]) and len(whole) == 4
    assert all(any(crop in text for text in whole) for crop in crops)
    for text, row in zip(crops, pooled[-1]):
        means = [tokens[b, 1:][owner[b] == index].mean(0) for b in range(4) for index, (thing, _) in enumerate(things[b])
                 if f"{thing.colour} {thing.shape}" in text and text in whole[b]]
        assert means and min((row - mean).abs().max().item() for mean in means) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: exit status 2, one line, no traceback

@pytest.mark.parametrize("flags, words", [
    (["--method", "magic"], ("method", "magic", "full, frozen, adapter", "m2ist+lora, clip-frozen, clip-lora, hivg")), (["--dataset", "cocoref"], ("dataset", "cocoref", "shapes")),
    (["--size", "huge"], ("size", "tiny")), (["--weights", "some"], ("weights", "random")),
    (["--schedule", "linear"], ("schedule", "cosine")), (["--amp", "fp8"], ("amp", "bf16")),
    (["--dataset", "gone.jsonl"], ("gone.jsonl", "no such file")), (["--epochs", "0"], ("--epochs", "1 or more")),
    (["--max-tokens", "99"], ("max_tokens", "32")), (["--interaction-dim", "999"], ("interaction_dim", "999")),
    (["--device", "cuda:99"], ("--device", "cpu")), (["--device", "foo"], ("--device foo",)),
    (["--bottleneck", "0"], ("--bottleneck", "1 or more")), (["--lr", "-1"], ("--lr", "0 or more")), (["--max-tokens", "2"], ("3 or more",)),
    (["--out", __file__], ("test_train.py", "is a file")), (["--text-layers", "1"], ("text layers", "[1]")), (["--text-layers", "3", "9"], ("--text-layers 3 9", "1 .. 4")),
    (["--stages", "2"], ("--stages", "m2ist")), (["--method", "hivg", "--bottleneck", "4"], ("--bottleneck", "hivg")),
    (["--method", "hivg", "--stages", "7"], ("--stages is 7", "6 layers")), (["--method", "clip-frozen", "--focal", "1"], ("--focal", "clip-frozen")),
    (["--method", "hivg", "--vision-layers", "2", "2"], ("--vision-layers 2 2", "differ")),
    (["--method", "hivg", "--bridge-layers", "7"], ("--bridge-layers 7", "1 .. 6")), (["--size", "large"], ("size", "large", "base, tiny")),
    (["--method", "hivg", "--stage-lr", "-1"], ("--stage-lr is -1", "0 or more")), (["--method", "hivg", "--alpha", "0"], ("--alpha",)),
    (["--method", "hivg", "--stage-lr", "nan"], ("--stage-lr is nan",)), (["--scale", "0.5", "--method", "hivg"], ("--scale", "hivg")),
    (["--rank", "8"], ("--rank", "m2ist")), (["--method", "clip-frozen", "--deep-to-shallow"], ("--deep-to-shallow", "--stages")),
    (["--method", "hivg", "--text-layers", "1", "--bridge-layers"], ("--text-layers", "bridges")),
    (["--method", "hivg", "--rank", "0"], ("--rank", "1 or more")), (["--method", "hivg", "--stage-epochs", "0", "--epochs", "2"], ("--stage-epochs",))])
def test_bad_flags(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        train.run(lambda: run(tmp_path / "out", *flags))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.splitlines()[-1].startswith("error: ") and "Traceback" not in said
    assert all(word in said for word in words), said


def test_a_folder_that_holds_a_run_is_never_overwritten(tmp_path):
    out = run(tmp_path / "a", "--epochs", "1")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(m.InputError, match="--resume"):
        run(out)
    for flags, word in ((["--lr", "0.5"], "--lr is 0.5"), (["--method", "frozen"], "--method is frozen"),
                        (["--size", "base"], "--size is base")):
        with pytest.raises(m.InputError, match=word):
            train.main(["--out", str(out), "--resume", *flags])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_damaged_runs_and_other_encoders_are_named(tmp_path, monkeypatch):
    out = run(tmp_path / "a", "--epochs", "1")
    resume = ["--out", str(out), "--resume"]
    with monkeypatch.context() as patch:                   # as if another file stood behind --vision-weights by now
        patch.setattr(train, "frozen_fingerprint", lambda model, held: "another")
        with pytest.raises(m.InputError, match="other encoder weights"):
            train.main(resume)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    with pytest.raises(m.InputError, match="last.pt: damaged"):
        train.main(resume)
    (out / "args.json").write_text("{")
    with pytest.raises(m.InputError, match="args.json"):
        train.main(resume)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "box_loss", lambda pred, *_, **__: pred.sum() * float("nan"))
    with pytest.raises(m.InputError, match="epoch 1, step 1, samples"):
        run(tmp_path / "a")


def test_the_command_line_exits_with_2_and_evaluate_names_a_bad_checkpoint(tmp_path):
    for script, flags, word in (("train.py", ["--method", "magic"], "magic"),
                                ("evaluate.py", [str(tmp_path / "gone")], "no such checkpoint"),
                                ("evaluate.py", ["gone", "--json", __file__ + "/a.json"], "test_train.py"),
                                ("data.py", ["shapes", "--write", __file__], "is there already")):
        done = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and word in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags, word", [
    (["--split", "test"], "val, testA, testB"), (["--limit", "0"], "1 or more"), (["--batch-size", "0"], "1 or more"),
    (["--device", "foo"], "--device foo"), (["--json", __file__ + "/a.json"], "test_train.py"), (["--figures", __file__], "test_train.py"),
    (["--json", str(ROOT)], "--json"), (["--image", "a.png", "--text", "a", "--save", "b.xyz"], "--save"),
    (["--dataset", "gone.jsonl"], "gone.jsonl")])
def test_evaluate_names_what_is_wrong_with_its_flags(tmp_path, flags, word):
    out = run(tmp_path / "a", "--epochs", "1", "--limit", "16")
    with pytest.raises((m.InputError, OSError), match=word):               # run() makes one line of both
        evaluate.main([str(out), *flags])


def test_evaluate_on_another_dataset_does_not_look_in_the_training_folder(tmp_path):
    out = run(tmp_path / "a", "--epochs", "1", "--limit", "16")
    data.render(0).save(tmp_path / "a.png")
    (tmp_path / "my.jsonl").write_text(json.dumps({"image": "a.png", "text": "it", "box": [1, 2, 30, 40], "split": "val"}))
    assert evaluate.main([str(out), "--dataset", str(tmp_path / "my.jsonl")])["splits"]["val"]["expressions"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The documents

def test_every_flag_has_help_a_default_and_its_source():
    for action in train.build_parser()._actions[1:]:                       # the first is --help itself
        assert "default: " in action.help, action.dest
        assert re.search(r"Section|Table|released code|ours", action.help), action.dest


def test_deviations_are_registered_both_ways():
    code = "".join((ROOT / f).read_text() for f in ("losses.py", "hilora.py", "adapters.py", "model.py", "data.py", "train.py", "evaluate.py"))
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (D\d+) \|", readme, re.M)
    assert rows == [f"D{i}" for i in range(1, len(rows) + 1)]
    assert set(rows) == set(re.findall(r"\[(D\d+)\]", code))


def test_the_readme_has_the_commands_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    assert "python -m pytest -q tests" in readme and "python -m pytest -q tests" in ci
    assert "pip install -r requirements.txt && python train.py\n" in readme
    assert "python -m pytest" not in re.sub(r"python -m pytest -q tests", "", ci)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets that people have

def made_refcoco(root):
    as_refer(root)
    pictures(root / "images/train2014")
    return ["--dataset", "refcoco", "--root", str(root)]


def test_a_dataset_in_refer_format_trains_and_evaluates(tmp_path):
    out = run(tmp_path / "a", *made_refcoco(tmp_path / "data"), "--workers", "1", "--batch-size", "2")
    result = evaluate.main([str(out), "--device", "cpu"])
    assert {split: row["expressions"] for split, row in result["splits"].items()} == {"val": 1, "testA": 2}
    assert result["dataset"] == "refcoco" and json.loads((out / "args.json").read_text())["args"]["root"] == str(tmp_path / "data")


def test_mixed_datasets_train_and_are_evaluated_one_by_one(tmp_path):
    flags = made_refcoco(tmp_path / "data")
    as_refer(tmp_path / "data", "refcoco+", refs=[(70, "train", ["one", "two"]), (80, "val", ["three"])])
    with pytest.raises(m.InputError, match="no such split|choose one of"):
        evaluate.main([str(run(tmp_path / "b", *flags, "--epochs", "1")), "--split", "train2", "--device", "cpu"])
    flags[1] = "refcoco,refcoco+"
    out = run(tmp_path / "a", *flags, "--epochs", "1", "--workers", "0")
    result = evaluate.main([str(out), "--device", "cpu", "--figures", str(tmp_path / "figures")])
    assert list(result["splits"]) == ["val", "refcoco/val", "refcoco/testA", "refcoco+/val"] and result["splits"]["val"]["expressions"] == 2
    assert (tmp_path / "figures/refcoco+-val.png").exists()
    assert train.parse_args(["--dataset", "refcoco,a/refcoco+", "--size", "tiny"]).out == "runs/refcoco,refcoco+-m2ist-0"


def test_boxes_without_area_are_left_out_of_training_and_are_misses_in_evaluation(tmp_path, capsys):
    flags = made_refcoco(tmp_path / "data")
    path = tmp_path / "data/refcoco/instances.json"
    instances = json.loads(path.read_text())
    for annotation in (0, 3):                                          # two expressions of train, both of testA
        instances["annotations"][annotation]["bbox"][2] = 0
    path.write_text(json.dumps(instances))
    out = run(tmp_path / "a", *flags, "--epochs", "1", "--workers", "0")
    assert "1 expressions to train on (2 left out, without area)" in capsys.readouterr().out
    assert evaluate.main([str(out), "--split", "testA", "--device", "cpu"])["splits"]["testA"] == {
        "acc@0.5": 0.0, "mean_iou": 0.0, "expressions": 2, "images": 1, "seconds": pytest.approx(1, abs=60)}


def test_a_missing_picture_of_val_is_named_before_anything_is_trained(tmp_path):
    flags = made_refcoco(tmp_path / "data")
    (tmp_path / "data/images/train2014" / coco(8)).unlink()
    with pytest.raises(m.InputError, match=f"{coco(8)}: no such picture"):
        run(tmp_path / "a", *flags)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method, size, transforms, pixels", [
    ("m2ist", "base", {"mirror": True}, "detr"), ("hivg", "base", {"mirror": False}, "clip"), ("hivg", "large", {"mirror": False}, "clip"),
    ("m2ist", "tiny", None, "detr"), ("hivg", "tiny", None, "clip")])
def test_each_paper_gets_its_transforms_and_pixels(tmp_path, method, size, transforms, pixels):
    flags = ["--method", method, "--size", size, "--weights", "random", *made_refcoco(tmp_path)]
    for more, expected in (([], pixels), (["--pixels", "detr"], "detr")):
        args = train.parse_args([*flags, *more])
        samples = data.load_samples("refcoco", "train", tmp_path)
        dataset = train.make_loader(samples, args, True).dataset
        assert dataset.transforms == transforms and dataset.pixels == data.PIXELS[expected]
        assert train.make_loader(samples, args, False).dataset.transforms is None


def test_refcocog_takes_40_tokens_as_its_texts_are_longer():
    for dataset, tokens in (("refcoco", None), ("refcocog-umd", 40), ("refcocog-google", 40)):
        assert train.parse_args(["--dataset", dataset]).max_tokens == tokens
    assert train.parse_args(["--dataset", "refcocog-umd", "--method", "hivg"]).max_tokens is None
    assert train.parse_args(["--dataset", "refcocog-umd", "--max-tokens", "25"]).max_tokens == 25


def test_a_file_of_clip_takes_the_hubs_tokenizer(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "make_tokenizer", lambda *given: asked.append(given[1]) or data.Tokenizer("random", None, 20))
    (tmp_path / "clip.pth").write_bytes(b"")
    for weights in (str(tmp_path / "clip.pth"), str(tmp_path), "somebody/clip"):
        train.make_loader([], train.parse_args(["--method", "hivg", "--dataset", "refcoco", "--clip-weights", weights]), False)
    assert asked == ["openai/clip-vit-base-patch16", str(tmp_path), "somebody/clip"]
