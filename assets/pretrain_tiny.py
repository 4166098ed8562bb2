"""Pretrain the tiny encoders that are shipped beside this file.

    python assets/pretrain_tiny.py                    both, into assets/
    python assets/pretrain_tiny.py detr --out DIR     DETR and BERT's small counterparts alone

The tiny encoders are to `shapes` what DETR, BERT and CLIP are to RefCOCO: weights that were
pretrained on other tasks, and are then frozen. No pretext task sees an expression together with its
picture or box:

    PretextVision    what covers each cell of a picture: colour, shape and box of the object
    PretextText      the words of a text, some of which are masked
    PretextClip      contrast of pictures with captions that say what an object is and where

On an AMD EPYC server with torch 2.15, DETR and BERT's counterparts take 1.5 minutes with two
threads. CLIP's take 20 minutes with one (OMP_NUM_THREADS=1). The last losses are 0.17 (vision), 0.09
(text) and 0.60 (clip). The shipped files are the reference: another kind of processor, or another
number of threads, sums floats in another order and makes weights that differ in their last bits.
"""
import argparse
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))    # the project's modules are one folder up

import data    # noqa: E402
import losses    # noqa: E402
import model    # noqa: E402

STEPS = {"detr": 800, "clip": 4800}    # optimizer steps of each pretext task
BATCH = 64
LR = 2e-3


# ---------------------------------------------------------------------------------------------
# Scenes as batches

class SceneBatch(NamedTuple):
    """Pictures of `shapes` with what is in them."""
    images: Tensor     # (B, 3, S, S)
    padding: Tensor    # (B, S, S)
    owner: Tensor      # (B, Nv)  index of the object that covers a cell, -1 where none does
    things: list       # for each picture [(Thing, its box as in a batch), ...]


def scene_item(encoders, number):
    """The scene with this number -> image, padding, owner, things, as in SceneBatch."""
    spec = model.SIZES["tiny"][encoders]
    size = spec["image_size"]
    side = size // spec["stride"]    # cells in a row of the encoder's grid
    picture = data.render(number)
    image, padding, place = data.letterbox(picture, size, data.seeded(0, number),
                                           data.PIXELS[encoders])
    things = []
    owner = torch.full((side, side), -1)
    for index, thing in enumerate(data.scene(number).things):
        box = data.to_square(thing.box, picture.size, place, size)
        things.append((thing, box))
        cx, cy, w, h = box
        # The cells whose centre lies in the box.
        columns = slice(round((cx - w / 2) * side), round((cx + w / 2) * side))
        rows = slice(round((cy - h / 2) * side), round((cy + h / 2) * side))
        owner[rows, columns] = index
    return image, padding, owner.flatten(), things


def random_scenes(encoders):
    """A random batch of scenes of data.PRETEXT, whose first number is 0."""
    numbers = torch.randint(data.PRETEXT.scenes, (BATCH,))
    items = [scene_item(encoders, number) for number in numbers.tolist()]
    images, padding, owner, things = zip(*items)
    return SceneBatch(torch.stack(images), torch.stack(padding), torch.stack(owner), list(things))


# ---------------------------------------------------------------------------------------------
# The pretext tasks: modules whose forward draws a batch and returns its loss

class PretextVision(nn.Module):
    """Say for each cell of a picture the colour and the shape of the object that covers it (cross
    entropy), and its box (L1).

    The head is random and frozen, so that the encoder itself must encode these attributes in its
    tokens, where a later reader finds them."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.colours = [*data.COLOURS, None]    # None: no object covers the cell
        self.parts = [len(self.colours), len(data.SHAPES), 4]
        dim = model.SIZES["tiny"]["detr"]["vision"]["dim"]
        self.head = nn.Linear(dim, sum(self.parts)).requires_grad_(False)

    def targets(self, owner, things):
        """Colour (B, Nv), shape (B, Nv) and box (B, Nv, 4) of each cell; shape and box are 0 where
        no object covers the cell."""
        batch = []
        for inside, mine in zip(things, owner):
            rows = []
            for thing, box in inside:
                colour = self.colours.index(thing.colour)
                rows.append([colour, data.SHAPES.index(thing.shape), *box])
            rows.append([self.colours.index(None), 0, 0, 0, 0, 0])    # the last row: index -1
            # In float64, as when the shipped files were made: their last bits depend on it.
            table = torch.tensor(rows, dtype=torch.float64)
            batch.append(table[mine])                                 # (Nv, 6)
        cells = torch.stack(batch)                                    # (B, Nv, 6)
        return cells[..., 0].long(), cells[..., 1].long(), cells[..., 2:]

    def forward(self):
        batch = random_scenes("detr")
        colour, shape, boxes = self.targets(batch.owner, batch.things)
        tokens = self.encoder(batch.images, batch.padding).x
        colour_scores, shape_scores, box_values = self.head(tokens).split(self.parts, dim=-1)
        covered = batch.owner >= 0
        scaled_boxes = 6 * (boxes[covered] - 0.5)    # about unit variance
        return (F.cross_entropy(colour_scores.flatten(0, 1), colour.flatten())
                + F.cross_entropy(shape_scores[covered], shape[covered])
                + F.l1_loss(box_values[covered], scaled_boxes))


class PretextText(nn.Module):
    """Say the words of a text about a scene of data.PRETEXT, of which 15% are masked, as for BERT.
    The pictures of the texts are not used."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.tokenizer = data.Tokenizer(model.SIZES["tiny"]["detr"]["max_tokens"])
        self.head = nn.Linear(encoder.word.embedding_dim, encoder.word.num_embeddings)
        self.samples = data.shapes_samples(data.PRETEXT)

    def random_texts(self):
        """Tokens (B, T) of random texts, padded."""
        chosen = torch.randint(len(self.samples), (BATCH,)).tolist()
        texts = [torch.tensor(self.tokenizer(self.samples[i].text)) for i in chosen]
        return pad_sequence(texts, batch_first=True, padding_value=self.tokenizer.pad)

    def forward(self):
        tokens = self.random_texts()
        real = tokens != self.tokenizer.pad
        hidden = (torch.rand(tokens.shape) < 0.15) & real
        out = self.head(self.encoder(tokens.masked_fill(hidden, self.tokenizer.mask), ~real).x)
        # The loss is over all words, masked or not: each token must keep its own word.
        return F.cross_entropy(out[real], tokens[real])


def caption(rng, thing, box):
    """An object and its place, in words or as on a map: "red circle top left", "blue square c 5".
    box: (cx, cy, w, h) in [0, 1]."""
    cx, cy = box[:2]
    size = rng.choice(data.SIZE_WORDS[thing.size]) if rng.random() < 0.7 else ""
    if rng.random() < 0.5:
        place = ["abcdefgh"[int(8 * cx)], str(1 + int(8 * cy))]
    else:
        place = [side_word(cy, "top", "bottom"), side_word(cx, "left", "right")]
    words = [size, thing.colour, thing.shape, *place]
    return " ".join(word for word in words if word)


def side_word(v, low, high):
    """The word for a coordinate in [0, 1]; none in the middle."""
    if v < 0.38:
        return low
    if v > 0.62:
        return high
    return ""


class PretextClip(nn.Module):
    """Contrast with captions, HiVG Eqs. (9)-(11): whole pictures with the captions of all their
    objects, by [CLS] as in CLIP, which alone is slow; and single objects with their caption. The
    feature of an object is the mean of the tokens that it covers, so that a picture is encoded once
    for all of its objects."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.tokenizer = data.Tokenizer(model.SIZES["tiny"]["clip"]["max_tokens"])
        self.rng = data.seeded("captions", 0)

    def embed_texts(self, texts):
        tokens = [torch.tensor(self.tokenizer(text)) for text in texts]
        tokens = pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.pad)
        return self.encoder.text(tokens, tokens == self.tokenizer.pad).embedding

    def random_captions(self, things):
        """The caption of each whole picture, and {caption of an object: (picture, its index)}. Of
        two objects with the same caption the last one counts."""
        whole = []
        objects = {}
        for picture, inside in enumerate(things):
            captions = [caption(self.rng, thing, box) for thing, box in inside]
            whole.append(", ".join(self.rng.sample(captions, len(captions))))
            for index, text in enumerate(captions):
                objects[text] = (picture, index)
        return whole, objects

    def forward(self):
        return self.loss(random_scenes("clip"))

    def loss(self, batch):
        encoded = self.encoder.vision(batch.images, batch.padding)
        whole, objects = self.random_captions(batch.things)
        picture, index = torch.tensor(list(objects.values())).T                   # (objects,)
        cells = (batch.owner[picture] == index[:, None]).float()                  # (objects, Nv)
        patches = encoded.x[picture, 1:]                                          # without [CLS]
        pooled = (patches * cells[..., None]).sum(1) / cells.sum(1, keepdim=True)
        temperature = (-self.encoder.logit_scale).exp()
        of_objects = losses.contrastive_loss(
            self.embed_texts(list(objects)), self.encoder.vision.embed(pooled), temperature)
        of_pictures = losses.contrastive_loss(
            self.embed_texts(whole), encoded.embedding, temperature)
        return of_objects + of_pictures


# ---------------------------------------------------------------------------------------------
# The loop

TASKS = {"vision": PretextVision, "text": PretextText, "clip": PretextClip}


def pretrain(name, encoder, steps):
    """Pretrain one encoder in place, on the CPU."""
    torch.manual_seed(0)
    task = TASKS[name](encoder.train())
    optimizer = torch.optim.AdamW(task.parameters(), LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    bar = tqdm(range(steps), f"pretraining the tiny {name} encoder")
    for _ in bar:
        loss = task()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain_encoders(encoders, steps):
    """The state dict of the tiny encoders after their pretraining. "detr" stands for the
    counterparts of DETR and BERT, "clip" for those of CLIP."""
    method = {"detr": "m2ist", "clip": "hivg"}[encoders]
    modules = model.build_encoders(model.architecture(method, "tiny"))
    for name, encoder in modules.items():
        pretrain(name, encoder, steps)
    return nn.ModuleDict(modules).state_dict()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", metavar="ENCODERS",
                        help="detr, clip, or both (default: both)")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR",
                        help="folder for the files (default: that of this script)")
    parser.add_argument("--steps", type=int, metavar="N",
                        help="optimizer steps of each task (default: 800 for detr, 4800 for clip)")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    asked = parser.parse_args(argv)
    if asked.steps is not None and asked.steps < 1:
        raise data.InputError(f"--steps is {asked.steps}; it must be 1 or more")
    paths = {}
    for encoders in asked.encoders or STEPS:
        data.one_of("encoders", encoders, STEPS)
        path = asked.out / f"tiny-{encoders}.safetensors"
        if path.exists() and not asked.force:
            raise data.InputError(f"{path} is there already: give another folder by --out, or "
                                  f"--force to overwrite it")
        paths[encoders] = path

    asked.out.mkdir(parents=True, exist_ok=True)
    for encoders, path in paths.items():
        steps = STEPS[encoders] if asked.steps is None else asked.steps
        state = pretrain_encoders(encoders, steps)
        data.write_atomically(path, functools.partial(save_file, state))
        print(path)


if __name__ == "__main__":
    data.run_command(main)
