"""Pretrain the tiny encoders that are shipped beside this file.

    python assets/pretrain_tiny.py                    both, into assets/
    python assets/pretrain_tiny.py detr --out DIR     DETR and BERT's small counterparts alone

The tiny encoders are to `shapes` what DETR, BERT and CLIP are to RefCOCO: weights that were
pretrained on other tasks, and are then frozen. The scenes are in no split of `shapes`, and no task
sees an expression together with its image or bounding box:

    vision_loss    what covers each cell of an image: colour, shape and bounding box of the object
    text_loss      the words of an expression, some of which are masked
    clip_loss      which caption, of what objects are and where, belongs to which image and object

On an AMD EPYC server with torch 2.15, DETR and BERT's counterparts take 1.5 minutes with two
threads. CLIP's take 20 minutes with one (OMP_NUM_THREADS=1). The last losses are 0.17 (vision),
0.09 (text) and 0.60 (clip). The shipped files are the reference. They were made before boxes were
scaled by the unrounded ratio [D56]. Another processor, number of threads or version of PyTorch
rounds differently, too, and the differences grow from step to step.
"""
import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]    # the project's modules are one folder up

import data    # noqa: E402
import losses    # noqa: E402
import make_shapes    # noqa: E402
import model    # noqa: E402
from evaluate import at_least    # noqa: E402

BATCH = 64
LR = 2e-3
COLOURS = [*make_shapes.COLOURS, None]                # None: no object covers the cell
PARTS = [len(COLOURS), len(make_shapes.SHAPES), 4]    # outputs of vision_loss's head; 4: the box
SCENES = make_shapes.PRETEXT.scenes                   # their numbers begin with 0

scene = functools.cache(make_shapes.scene)    # each scene is used many times


def random_scenes(spec, pixels):
    """Return a random batch of scenes: the normalised images (B, 3, S, S); their padding (B, S, S);
    the index of the object that covers a cell, or -1, as `owner` (B, Nv); and for each image
    [(object, its bounding box as [cx, cy, w, h] in [0, 1]), ...]."""
    size = spec["image_size"]
    side = size // spec["stride"]    # cells in a row of the encoder's grid
    owner = torch.full((BATCH, side, side), -1)
    images, paddings, objects = [], [], []
    for row, number in enumerate(torch.randint(SCENES, (BATCH,)).tolist()):
        height, in_scene, _ = scene(number)
        drawn = [[obj.colour, obj.shape, obj.x, obj.y, obj.r] for obj in in_scene]
        image = data.draw_scene(number, height, drawn)
        image, padding, place = data.letterbox(image, size, data.seeded(0, number))
        images.append(image)
        paddings.append(padding)
        objects.append([])
        for index, (_, _, x, y, r) in enumerate(drawn):
            cx, cy, w, h = box = data.to_square((x - r, y - r, x + r, y + r), place, size)
            objects[-1].append((in_scene[index], box))
            # The cells whose centre lies in the box.
            columns = slice(round((cx - w / 2) * side), round((cx + w / 2) * side))
            rows = slice(round((cy - h / 2) * side), round((cy + h / 2) * side))
            owner[row, rows, columns] = index
    padding = torch.stack(paddings)
    images = model.normalise(torch.stack(images), padding, pixels)
    return images, padding, owner.flatten(1), objects


def tokens_of(texts, tokenizer):
    """Return the tokens (B, T) of texts, and where they are padding."""
    tokens = [torch.tensor(tokenizer(text)) for text in texts]
    tokens = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad)
    return tokens, tokens == tokenizer.pad


def vision_loss(encoder, head, spec):
    """Say for each cell of an image the colour and the shape of the object that covers it (cross
    entropy), and its bounding box (L1)."""
    images, padding, owner, objects = random_scenes(spec, model.PIXELS["detr"])
    cells = []
    for in_image, owner_of_cell in zip(objects, owner):
        rows = [[COLOURS.index(obj.colour), make_shapes.SHAPES.index(obj.shape), *box]
                for obj, box in in_image]
        rows.append([COLOURS.index(None), 0, 0, 0, 0, 0])    # the last row: index -1
        cells.append(torch.tensor(rows)[owner_of_cell])                    # (Nv, 6)
    colour, shape, boxes = torch.stack(cells).split([1, 1, 4], dim=-1)     # (B, Nv, ...)

    outputs = head(encoder(images, padding).x).split(PARTS, dim=-1)
    covered = owner >= 0
    scaled_boxes = 6 * (boxes[covered] - 0.5)    # about unit variance
    return (F.cross_entropy(outputs[0].flatten(0, 1), colour.flatten().long())
            + F.cross_entropy(outputs[1][covered], shape[covered].flatten().long())
            + F.l1_loss(outputs[2][covered], scaled_boxes))


def text_loss(encoder, head, tokenizer, expressions):
    """Say the words of a text, of which 15% are masked, as for BERT."""
    chosen = torch.randint(len(expressions), (BATCH,)).tolist()
    tokens, padding = tokens_of([expressions[i] for i in chosen], tokenizer)
    hidden = (torch.rand(tokens.shape) < 0.15) & ~padding
    scores = head(encoder(tokens.masked_fill(hidden, tokenizer.mask), padding).x)
    # The loss is over all words, masked or not: each token must keep its own word.
    return F.cross_entropy(scores[~padding], tokens[~padding])


def caption(rng, obj, box):
    """Say what an object is, and where: "red circle top left", or as on a map: "square c 5"."""
    cx, cy = box[:2]
    size = rng.choice(make_shapes.SIZE_WORDS[obj.size]) if rng.random() < 0.7 else ""
    if rng.random() < 0.5:
        place = ["abcdefgh"[int(8 * cx)], str(1 + int(8 * cy))]
    else:    # there is no word for the middle
        place = ["top" if cy < 0.38 else "bottom" if cy > 0.62 else "",
                 "left" if cx < 0.38 else "right" if cx > 0.62 else ""]
    return " ".join(word for word in [size, obj.colour, obj.shape, *place] if word)


def clip_loss(clip, tokenizer, rng, spec):
    """Tell which captions belong to which image, by [CLS] as in CLIP. That alone is learnt slowly,
    so tell also which caption belongs to which object. The feature of an object is the mean of the
    tokens that it covers. An image is thus encoded once for all of its objects."""
    images, padding, owner, objects = random_scenes(spec, model.PIXELS["clip"])
    encoded = clip.vision(images, padding)
    of_images = []
    of_objects = {}    # {caption: (image, index)}; of two objects with one caption, the last one
    for image, in_image in enumerate(objects):
        captions = [caption(rng, obj, box) for obj, box in in_image]
        of_images.append(", ".join(rng.sample(captions, len(captions))))
        of_objects.update((text, (image, index)) for index, text in enumerate(captions))

    image, index = torch.tensor(list(of_objects.values())).T       # (objects,)
    cells = (owner[image] == index[:, None]).float()               # (objects, Nv)
    patches = encoded.x[image, 1:]                                 # without [CLS]
    pooled = (patches * cells[..., None]).sum(1) / cells.sum(1, keepdim=True)
    text_of_objects = clip.text(*tokens_of(of_objects, tokenizer)).embedding
    text_of_images = clip.text(*tokens_of(of_images, tokenizer)).embedding
    temperature = (-clip.logit_scale).exp()
    objects_loss = losses.contrastive_loss(text_of_objects, clip.vision.embed(pooled), temperature)
    return objects_loss + losses.contrastive_loss(text_of_images, encoded.embedding, temperature)


def pretrain(name, module, steps, next_loss):
    """Train a module in place, on the CPU. next_loss() draws a batch and returns its loss."""
    module.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    bar = tqdm(range(steps), f"pretraining the tiny {name} encoder")
    for _ in bar:
        loss = next_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain_detr(steps):
    """Return the counterparts of DETR and BERT after their pretraining."""
    torch.manual_seed(0)
    built = model.build_model("frozen", "tiny", "random")
    vision, text, spec = built.vision, built.text, built.spec

    torch.manual_seed(0)
    # This head is random and frozen, so that the encoder itself must encode colour, shape and box
    # in its tokens, where a later reader finds them.
    head = nn.Linear(spec["vision"]["dim"], sum(PARTS)).requires_grad_(False)
    pretrain("vision", vision, steps, lambda: vision_loss(vision, head, spec))

    torch.manual_seed(0)
    words = nn.Linear(spec["text"]["dim"], spec["text"]["vocabulary"])
    tokenizer = data.Tokenizer(spec["max_tokens"])
    expressions = []
    for number in range(SCENES):
        expressions += [expression for expression, _ in scene(number).expressions]
    pretrain("text", nn.ModuleList([text, words]), steps,
             lambda: text_loss(text, words, tokenizer, expressions))
    return nn.ModuleDict({"vision": vision, "text": text})


def pretrain_clip(steps):
    """Return the counterpart of CLIP after its pretraining."""
    torch.manual_seed(0)
    built = model.build_model("clip-frozen", "tiny", "random")
    tokenizer = data.Tokenizer(built.spec["max_tokens"])
    rng = data.seeded("captions", 0)
    torch.manual_seed(0)
    pretrain("clip", built.clip, steps, lambda: clip_loss(built.clip, tokenizer, rng, built.spec))
    return nn.ModuleDict({"clip": built.clip})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("encoders", nargs="?", choices=["detr", "clip"], help="default: both")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the files")
    parser.add_argument("--steps", type=at_least(1), metavar="N",
                        help="of each task (default: 800 for detr, 4800 for clip)")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    asked = parser.parse_args(argv)

    names = [asked.encoders] if asked.encoders else ["detr", "clip"]
    paths = {name: asked.out / f"tiny-{name}.safetensors" for name in names}
    for path in paths.values():
        if path.exists() and not asked.force:
            raise data.InputError(f"{path} is there already: give another folder by --out, or "
                                  f"--force to overwrite it")
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        if name == "detr":
            encoders = pretrain_detr(asked.steps or 800)
        else:
            encoders = pretrain_clip(asked.steps or 4800)
        data.write_atomically(path, functools.partial(save_file, encoders.state_dict()))
        print(path)


if __name__ == "__main__":
    data.run_command(main)
