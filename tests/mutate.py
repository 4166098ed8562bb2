"""Break the code in many small ways, one at a time, and see whether a test notices.

    python tests/mutate.py                      all mutants, one after the other
    python tests/mutate.py --only losses.py     those that have this text in any field
    python tests/mutate.py --jobs 2             two at a time
    python tests/mutate.py --check              only look whether the mutants fit the code

A mutant is a change that a slip of the pen could make: a sign, an index, a mask that is dropped.
First, all test files that are needed must pass in a copy of the repository. Then, for each mutant,
the old text is replaced by the new one in a copy, and the test files of the mutant run until the
first failure. A mutant without a failure SURVIVED: a test is missing.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900    # seconds for one call of pytest; a mutant may make a loop endless


class Mutant(NamedTuple):
    file: str     # of the code
    what: str     # what the mutant does
    old: str      # a text that the file has exactly once
    new: str      # what replaces it
    tests: str    # the tests/test_*.py that should notice


def mutants_of(file, tests, *rows):
    """Mutants of one file. A row is (what, old, new), and then its own tests where these are not
    those of most."""
    return [Mutant(file, *row[:3], row[3] if len(row) > 3 else tests) for row in rows]


LOSSES = mutants_of(
    "losses.py", "losses",
    ("GIoU rewards an empty hull", "iou - (hull - union)", "iou + (hull - union)"),
    ("no gradient passes GIoU's hull", "    giou = iou - (hull", "    hull = hull.detach()\n"
     "    giou = iou - (hull", "held"),
    ("the union counts the overlap twice", "union = area_a + area_b - intersection",
     "union = area_a + area_b"),
    ("β is not handed on", 'reduction="none", beta=beta', 'reduction="none", beta=1.0'),
    ("L1 is the mean of the coordinates", ".sum(-1).mean()\n    _,", ".mean(-1).mean()\n    _,"),
    ("the box loss lacks the 1 of 1 - GIoU", "(1 - giou_of_boxes).mean()", "(-giou_of_boxes).mean()"),
    ("L1 is computed in half precision", "    pred = pred.float()\n    target = target.float()\n",
     "", "losses"),
    ("predictions keep what is outside of the square", ".clamp(0, 1).unbind", ".unbind"),
    ("logits are multiplied by the temperature", "image.T / temperature", "image.T * temperature"),
    ("both contrastive losses are text to image", "cross_entropy(logits.T, target)",
     "cross_entropy(logits, target)"),
    ("image embeddings are not normalised", "image = F.normalize(image.float(), dim=-1)",
     "image = image.float()"),
    ("cells count by their corner", "device) + 0.5) / side", "device)) / side"),
    ("rows and columns of the mask are exchanged", "rows[:, :, None] & columns[:, None, :]",
     "columns[:, :, None] & rows[:, None, :]"),
    ("the text of Eq. (12) is not normalised", "t = F.normalize(t, dim=-1)[..., None]",
     "t = t[..., None]"),
    ("the LayerNorm of Eq. (12) is gone", "self.fc1(self.norm(v))", "self.fc1(v)"),
    ("α of the focal loss is exchanged", "torch.where(mask, 0.25, 0.75)",
     "torch.where(mask, 0.75, 0.25)"),
    ("the focal loss weighs what is right", "alpha * (1 - p_t) ** 2", "alpha * p_t ** 2"),
    ("no gradient passes the focal factor", "alpha * (1 - p_t) ** 2",
     "alpha * (1 - p_t.detach()) ** 2", "held"),
    ("padded tokens count", "real = (~padding).float()", "real = torch.ones_like(scores)"),
    ("focal and dice are swapped", "(focal * focal_loss + dice * dice_loss)",
     "(dice * focal_loss + focal * dice_loss)", "held"),
    ("the attention loss rewards looking past the box", "(attention.float() * mask)",
     "(attention.float() * ~mask)"))

ADAPTERS = mutants_of(
    "adapters.py", "adapters",
    ("VEA has no LayerNorm", "self.down(self.norm(x))", "self.down(x)"),
    ("s is missing in VEA", "out = self.scale * self.up(z)", "out = self.up(z)"),
    ("IEA has no ReLU", "z = F.relu(down(x))", "z = down(x)"),
    ("the shared channels come first", "torch.cat([own_up(z), shared]",
     "torch.cat([shared, own_up(z)]"),
    ("no gradient passes the shared projection", "self.shared_up(z) ",
     "self.shared_up(z.detach()) ", "held"),
    ("both linear layers of an inserted VEA start at 0", "        nn.init.zeros_(self.up.weight)\n",
     "        nn.init.zeros_(self.up.weight)\n        nn.init.zeros_(self.down.weight)\n", "held"),
    ("both linear layers of an inserted IEA start at 0", "        for up in (self.shared_up, ",
     "        for up in (self.vision_down, self.shared_up, ", "held"),
    ("inserted adapters start with noise", "                    adapter.zero_init()\n", "",
     "rows"),
    ("a side network reads the layer before", "read = ports[layer - 1]", "read = ports[layer - 2]"),
    ("a side network keeps its last layer alone", "s = s + sum(terms)", "s = sum(terms)"),
    ("no gradient passes from side networks to LoRA", "adapt(read[port])",
     "adapt(read[port].detach())", "held"),
    ("adapters are inserted a layer too early", "layers[layer - 1].plugs[port] =",
     "layers[layer - 2].plugs[port] =", "rows"),
    ("a sequential adapter reads the stream", "out + self.adapt(out)", "out + self.adapt(x)"),
    ("keys under padding are seen", "mask = ~padding[:, None, None, :]", "mask = None", "model"),
    ("attention has no dropout", "mask, dropout, causal)", "mask, 0.0, causal)", "model"),
    ("QuickGELU lacks its divisor", "F.silu(1.702 * x) / 1.702", "F.silu(1.702 * x)"),
    ("Eq. (3) has no residual", "calibrated.append(w * f + f)    # HiVG",
     "calibrated.append(w * f)    # HiVG"),
    ("a trimmed text takes the last weights", "w = w[:f.shape[1]]", "w = w[-f.shape[1]:]"),
    ("the bridge sees padded text", "self.v(text), self.heads, padding)",
     "self.v(text), self.heads, None)"),
    ("the bridge's query lacks the self-attention", "self.semantic(x + out,", "self.semantic(x,"),
    ("no gradient passes the bridge to its weights", "torch.cat(calibrated, dim=-1)",
     "torch.cat(calibrated, dim=-1).detach()", "held"),
    ("the mean of the text counts padding", "(text * real).sum(1, True) / real.sum(1, True)",
     "text.mean(1, True)"))

HILORA = mutants_of(
    "hilora.py", "hilora",
    ("LoRA is scaled by α alone", "self.scale = alpha / rank", "self.scale = alpha"),
    ("A and B both start at 0", "normal_(std=1 / math.sqrt(3 * k))", "zero_()", "held"),
    ("B does not start at 0", "new_zeros(linear.out_features", "new_ones(linear.out_features"),
    ("W is trained beside A and B", "        linear.requires_grad_(False)\n",
     "        linear.requires_grad_(True)\n"),
    ("LoRA is subtracted", "return h + self.scale * delta", "return h - self.scale * delta"),
    ("a stage lacks its shallow groups", "layer_group(number, len(layers), groups) > stage",
     "layer_group(number, len(layers), groups) != stage"),
    ("nothing is merged", "lora.weight.detach() if discard else lora.merged()",
     "lora.weight.detach()"),
    ("LoRA is merged without its scale", "+ self.scale * self.B.float()", "+ self.B.float()"),
    ("a merged linear layer loses its bias", "linear.bias = lora.bias", "linear.bias = None"))

MODEL = mutants_of(
    "model.py", "model",
    ("attention replaces the stream", "x = x + self.dropout(a)", "x = self.dropout(a)", "model"),
    ("positions are not added", "with_pos = h if position is None else h + position",
     "with_pos = h", "model"),
    ("positions are added to values", "self.k(with_pos), self.v(h), self.heads",
     "self.k(with_pos), self.v(with_pos), self.heads", "model"),
    ("a plug reads the output for the stream", "self.plugs[name](output, x, context)",
     "self.plugs[name](output, output, context)"),
    ("attention begins peaked at full size", "gain = 1 / math.sqrt(2) if packed_init else 1.0",
     "gain = 1.0", "model"),
    ("DETR's positions ignore padding", "real = ~padding\n", "real = torch.ones_like(padding)\n",
     "weights"),
    ("BERT lacks the embedding of its token type", " + self.token_type.weight[0]", "", "weights"),
    ("full trains layer1 of the ResNet", "in (self.conv1, self.layer1):", "in (self.conv1,):",
     "rows"),
    ("a folded batch norm loses its shift", '"bias", bias.data)', '"bias", 0 * bias.data)',
     "weights"),
    ("CLIP's positions come after the norm", "self.pre_norm(x + self.position)",
     "self.pre_norm(x) + self.position", "weights"),
    ("a patch with one padded pixel is masked", "(share == 1)", "(share > 0)"),
    ("released checkpoints have our rule of padding", "small.round().bool()",
     "(small == 1)", "model evaluate"),
    ("rows of a packed projection are k, q, v", 'zip("qkv", value.chunk(3))',
     'zip("kqv", value.chunk(3))', "weights"),
    ("PEFT's LoRA is merged without α / r", "+ 16 / 32 * B @ A", "+ B @ A", "weights"),
    ("random encoders differ from run to run", "        torch.manual_seed(0)\n",
     "        torch.seed()\n"),
    ("M²IST's positions move with the length of the text", "self.position[1 + self.max_tokens:]])",
     "self.position[1 + T:1 + T + V]])"),
    ("padded text is seen in M²IST's sequence", "[reg_padding, text.padding, vision.padding]",
     "[reg_padding, torch.zeros_like(text.padding), vision.padding]", "model rows"),
    ("HiVG's cells begin with [CLS]", "cells = slice(2, 1 + V)", "cells = slice(1, V)"),
    ("Eq. (12) takes the word before [EOS]", "vision.padding.shape[1] + (~text.padding).sum(1)",
     "vision.padding.shape[1] + (~text.padding).sum(1) - 1"),
    ("no gradient passes [EOS]", "self.region(t_eos,", "self.region(t_eos.detach(),", "held"),
    ("the last layer leaves out what HiVG reads", "num_queries=None if reads_regions else 1)",
     "num_queries=1)"),
    ("one's own images are normalised without --pixels", 'spec["pixels"] or spec["encoders"]',
     'spec["encoders"]', "held"),
    ("padding is black, not the mean colour", "x.masked_fill_(padding[:, None], 0)", "x"),
    ("texts get the images in order, not their own", "image_index is None else x[image_index]",
     "image_index is None else x[image_index.flip(0)]", "model data"),
    ("each text's image is encoded below the first bridge, too", "first = self.first_bridge()",
     "first = 0"),
    ("frozen encoders run with autograd",
     "torch.set_grad_enabled(trains_inside and torch.is_grad_enabled())",
     "torch.set_grad_enabled(torch.is_grad_enabled())", "rows"),
    ("LoRA has no gradient beside side networks", 'tuned or self.insertion != "side"',
     'self.insertion != "side"', "held"),
    ("frozen encoders leave eval mode", "self.vision.train(mode and self.tuned)",
     "self.vision.train(mode)"),
    ("no gradient passes the start of a side network", "return encoded.states[first - 2]",
     "return encoded.states[first - 2].detach()", "held"),
    ("bridges see the text layer after", "states[layer - 1] for layer in self.text_layers",
     "states[layer] for layer in self.text_layers"),
    ("levels are a layer too low", "vision.states[level - 1]", "vision.states[level - 2]"),
    ("no gradient passes the grounded levels", "vision.states[level - 1]",
     "vision.states[level - 1].detach()", "held"),
    ("the text tower has as many groups as the vision tower", "(list(text.layers), 1)]",
     '(list(text.layers), self.spec["stages"])]', "rows"),
    ("flags that a method does not use are taken", "        if name not in used:\n",
     "        if False:\n", "train"))

TRAIN = mutants_of(
    "train.py", "train",
    ("the cosine rises", "0.5 * (1 + math.cos(", "0.5 * (1 - math.cos("),
    ("the warm-up begins at 0", "(step + 1) / warmup", "step / warmup"),
    ("all stages have the first rate", "args.stage_lr[min(stage, len(args.stage_lr)) - 1]",
     "args.stage_lr[0]"),
    ("--epochs for --stage-epochs", "        epochs = args.stage_epochs\n",
     "        epochs = args.epochs\n", "held"),
    ("a row trains the stages that it leaves out", "(args.last_stage or stages) + 1", "stages + 1",
     "rows"),
    ("--lr and --lr-encoder are swapped in the stages", "lr, lr_encoder = args.lr, args.lr_encoder",
     "lr, lr_encoder = args.lr_encoder, args.lr", "held"),
    ("the grounding encoder has --lr-encoder", "lr=phase.lr, peak=phase.lr)",
     "lr=phase.lr_encoder, peak=phase.lr_encoder)", "held"),
    ("all processes draw the same dropout", "* 1_009 + rank())", "* 1_009)", "held"),
    ("all seeds draw the same new weights", "torch.manual_seed(in_range(args.seed)) ",
     "torch.manual_seed(0) ", "held"),
    ("a schedule begins with the run", "(epoch - 1 - phase.first) * steps", "(epoch - 1) * steps"),
    ("epochs after the first train in eval mode", "    model.train()\n    # Order", "    # Order",
     "train"),
    ("each epoch has the same transforms", "    loader.dataset.epoch.fill_(epoch)\n", "", "train"),
    ("a resumed epoch begins anew", "    loader.batch_sampler.first = state.step\n", "", "resume"),
    ("dropout depends on what was drawn before",
     "        torch.manual_seed(seed_of_step(args, epoch, state.step))\n", "", "resume"),
    ("gradients of the step before are kept",
     "    optimizer.zero_grad(set_to_none=True)\n    size", "    size"),
    ("each micro-batch counts as a batch", "scaler.scale(loss * share)", "scaler.scale(loss)"),
    ("gradients are never clipped", "    if args.clip_norm > 0:\n", "    if False:\n"),
    ("--focal and --dice are swapped", "focal=args.focal, dice=args.dice",
     "focal=args.dice, dice=args.focal", "held"),
    ("a loss that is not finite is trained", "if not math.isfinite(sum(metrics.values())):",
     "if False:"),
    ("means are over steps, not over samples", "[total + value * samples, count + samples]",
     "[total + value, count + 1]", "train"),
    ("the worst epoch is kept", 'line["val_acc@0.5"] >= state.best',
     'line["val_acc@0.5"] <= state.best'),
    ("a phase goes on with its last weights", "        load_tuned(model, read_state(best), best)\n",
     ""),
    ("a resumed run forgets the optimizer", "        optimizer.load_state_dict(state.optimizer)\n",
     "", "resume"),
    ("a run goes on with other encoders", "    if state.frozen != frozen:\n", "    if False:\n",
     "resume train"),
    ("a folder is not locked", "        lock_file(lock, out)\n", "", "resume"),
    ("flags may contradict the row", "        if given.get(name, value) != value:\n",
     "        if False:\n", "rows"))

EVALUATE = mutants_of(
    "evaluate.py", "evaluate",
    ("validation is in training mode", "    model.eval()\n    count", "    count", "evaluate train"),
    ("an IoU of one half is wrong", "(ious >= 0.5)", "(ious > 0.5)", "evaluate train"),
    ("accuracy takes boxes beyond the square", "losses.clamp_to_square(boxes), truths",
     "boxes, truths", "evaluate train"),
    ("HiVG flips images", 'flip=spec["encoders"] == "detr"', "flip=True", "evaluate train"),
    ("predictions have the boxes of the square",
     "data.from_square(box, sizes[sample.image], side)", "box.tolist()"),
    ("photos are not turned upright", "ground_texts(model, data.load_image(image, upright=True)",
     "ground_texts(model, data.load_image(image)"),
    ("a checkpoint takes any encoders", '    if frozen_fingerprint(model) != config["frozen"]:\n',
     "    if False:\n"),
    ("what a checkpoint lacks stays as it is", "misfits = sorted(tuned - set(state))",
     "misfits = []", "evaluate resume"))

DATA = mutants_of(
    "data.py", "data",
    ("every image lies at the top of its square", "slice(place.top, place.top + place.height)",
     "slice(0, place.height)"),
    ("a box does not move with its image", "left = place.left / size", "left = 0"),
    ("a box has the rounded ratio [D56]", "return Placement(w, h, left, top, scale)",
     "return Placement(w, h, left, top, w / width)"),
    ("boxes come back from the square unscaled",
     "y1 = (cy - h / 2 - place.top) / place.scale", "y1 = cy - h / 2 - place.top"),
    ("a flip keeps its box", "        boxes = transforms.horizontal_flip(boxes)\n", ""),
    ("a flip keeps its text", "texts = [SIDE_WORD.sub(opposite_side, text) for text in texts]",
     "texts = list(texts)"),
    ("texts with places are cropped", "not (found_in(PLACE_WORD, texts) or ", "not ("),
    ("all images are as large as the square", "fill = rng.choice(SCALES)", "fill = 1.0"),
    ("the last token of a text is padding", "positions >= lengths[:, None]",
     "positions >= lengths[:, None] - 1", "data"),
    ("transforms do not depend on the epoch", "seeded(self.seed, self.epoch.item(), indices[0])",
     "seeded(self.seed, indices[0])", "data"),
    ("groups of K expressions never change", "rng.sample(indices, len(indices))", "list(indices)",
     "held"),
    ("evaluation drops what fills no batch", "range(0, len(order), batch_size)]",
     "range(0, len(order) - batch_size + 1, batch_size)]", "train evaluate"),
    ("--draft leaves boxes in pixels of the stored image", "x = drafted.width / width", "x = 1.0"),
    ("boxes beside their image are trained", "for sample in with_area if sample not in outside]",
     "for sample in with_area]", "data train"))

MUTANTS = [*LOSSES, *ADAPTERS, *HILORA, *MODEL, *TRAIN, *EVALUATE, *DATA]


def misfit(mutant):
    """What is wrong with a mutant, or None."""
    times = (ROOT / mutant.file).read_text().count(mutant.old)
    if times != 1:
        return f"{mutant.file}: {mutant.what}: {mutant.old!r} occurs {times} times, not once"
    missing = [name for name in test_files(mutant.tests) if not (ROOT / name).exists()]
    return f"{mutant.file}: {mutant.what}: no {missing[0]}" if missing else None


def test_files(names):
    return [f"tests/test_{name}.py" for name in names.split()]


def run_tests(names, mutant=None):
    """Run test files in a copy of the repository until the first failure -> what failed, or None.
    The copy has the tracked and the new files, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in listed.splitlines():
            if (ROOT / name).is_file():
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)
        if mutant is not None:
            path = Path(folder, mutant.file)
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                 *test_files(names)], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return f"a limit of {LIMIT} seconds"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode != 0 and not failed:
        sys.exit(f"pytest did not run:\n{done.stdout}{done.stderr}")
    return failed[1] if failed else None


def try_mutant(mutant):
    """Run the tests of a mutant and print what came of it -> whether it survived."""
    noticed = run_tests(mutant.tests, mutant)
    verdict = f"caught    {{}}  [{noticed}]" if noticed else "SURVIVED  {}"
    print(verdict.format(f"{mutant.file}: {mutant.what}"), flush=True)
    return noticed is None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT",
                        help="only mutants that have this text in any field")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time")
    parser.add_argument("--check", action="store_true",
                        help="only look whether the mutants fit the code")
    asked = parser.parse_args()

    chosen = [mutant for mutant in MUTANTS if asked.only in "\n".join(mutant)]
    wrong = [misfit(mutant) for mutant in chosen if misfit(mutant)]
    if wrong or not chosen:
        sys.exit("\n".join(wrong) or f"no mutant has {asked.only!r}")
    print(f"{len(chosen)} mutants fit the code", flush=True)
    if asked.check:
        return
    for name in sorted({name for mutant in chosen for name in mutant.tests.split()}):
        failed = run_tests(name)
        if failed:
            sys.exit(f"{failed} fails without a mutant")
    with ThreadPoolExecutor(asked.jobs) as pool:
        survived = sum(pool.map(try_mutant, chosen))
    sys.exit(f"{survived} of {len(chosen)} mutants survived" if survived else 0)


if __name__ == "__main__":
    main()
