"""The losses of both papers. This file imports torch alone, so it can be copied into any project.

    M²IST Eq. (6)          box_loss             smooth L1 and GIoU between two boxes
    HiVG Eq. (14)          box_loss             the same two terms, each with its own weight
    HiVG Eqs. (9)-(11)     contrastive_loss     texts and images of a batch are matched, as in CLIP
    HiVG Eqs. (12)-(13)    RegionText, box_mask, region_text_loss
                                                image tokens in the box are matched to the text
    HiVG Eq. (15)          loss_parts, total_loss
                                                the terms of the three losses, and their sum
    ours, at size tiny     attention_loss       [REG] looks into the box

Symbols (paper = here):
    b (M²IST), B̂ (HiVG) = pred        b̂ (M²IST), B (HiVG) = target        λ_l1 = l1
    λ (M²IST), λ_giou (HiVG) = giou    τ = temperature
    t_i, v_i = rows of text, image (Eqs. 9, 10)     s_i = s     m_d = mask
    λ_focal = focal     λ_dice = dice

Shapes: B samples of a batch, N image tokens, C channels. (N in Eqs. (9), (10) is B here.)

A box is (cx, cy, w, h) in [0, 1] of the padded square image. All losses are computed in float32,
whatever precision the model runs in: the area of a small box is a product of two small numbers, and
half precision rounds this product to zero.

Where this file differs from a paper or its released code ("code"):

[D1] the first term of the box loss
    paper   smooth L1, in M²IST Eq. (6) and in HiVG Eq. (14); no β is given
    code    plain L1, in both repositories, which is smooth L1 with β = 0
    here    β = 0 by default; `beta` sets it
    why     the papers' figures were made with plain L1; with β = 1 and coordinates in [0, 1] the
            term is about a hundredth of the loss: four errors of 0.05 give 0.005 in place of 0.2

[D2] the weight λ of GIoU in M²IST Eq. (6)
    paper   the value of λ is not given
    code    1
    here    1 by default; `giou` sets it
    why     no better value is known

[D17] the box mask of HiVG Eq. (13)
    paper   the mask is downsampled to the grid of tokens by "nearest"
    code    a token is positive if the pixel at its cell's corner lies in the box; a small box may
            have no positive token
    here    a token is positive if its cell's centre is in the box; a box without any centre gets
            the one cell that holds the centre of the box
    why     every target needs at least one positive token

[D18] padding in the region-text loss
    paper   tokens outside the box are negatives
    code    padded tokens are negatives too
    here    padded tokens count for nothing
    why     padding shows no object, so it is no evidence against the text

[D19] the normalization in HiVG Eq. (12)
    paper   the similarity is computed "after applying normalization and an MLP projection"
    code    t has unit length; v passes a LayerNorm
    here    as the code
    why     if both had unit length, the scores would lie in [-1, 1], and σ could not come near
            0 or 1

[D26] the number of losses in HiVG Eq. (15)
    paper   three: box, contrastive and region-text
    code    these three, and the loss of a segmentation head
    here    three
    why     the paper first

[D49] [REG]'s attention
    paper   nothing says where [REG] must look
    code    the same
    here    the same at full size. At size tiny, -log of the share of [REG]'s attention that lies
            in the box is one more loss, with weight 0.3; --attention-loss sets the weight
    why     with the box loss alone a run on `shapes` predicts the mean box for hundreds of steps,
            and how many there are differs from seed to seed, so that nothing could be compared
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# The smallest divisor. It is far below the area of any real box: one pixel of a 640 px image has
# the area 2.4e-6.
EPS = 1e-7


# --- Boxes: M²IST Eq. (6), HiVG Eq. (14) ----------------------------------------------------------


def to_corners(boxes):
    """Turn (cx, cy, w, h) into (x1, y1, x2, y2), in the same unit.

    boxes: (..., 4). Returns (..., 4). A negative width or height counts as 0.
    """
    cx, cy, w, h = boxes.unbind(-1)
    w = w.clamp(min=0)
    h = h.clamp(min=0)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)


def iou_and_giou(a, b):
    """IoU and generalised IoU of pairs of boxes (Rezatofighi et al., CVPR 2019).

    a, b: (..., 4) as (cx, cy, w, h). Returns two float32 tensors (...): IoU in [0, 1] and GIoU in
    [-1, 1]. Values and gradients are finite for all boxes in [0, 1], also for boxes without area.
    """
    a = to_corners(a.float())
    b = to_corners(b.float())
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)

    # Intersection and union.
    # Width and height of the overlap, (..., 2); negative where the boxes are apart.
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    iou = intersection / union.clamp(min=EPS)

    # The hull is the smallest box that holds both. GIoU subtracts the share of the hull outside the
    # union, so that two boxes that do not overlap have a gradient towards each other.
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    giou = iou - (hull - union) / hull.clamp(min=EPS)
    return iou, giou


def clamp_to_square(boxes):
    """Cut off what lies outside of the square [0, 1] x [0, 1]. For predictions alone: a box loss
    needs the gradient of the part outside.

    boxes: (..., 4) as (cx, cy, w, h). Returns (..., 4) as (cx, cy, w, h).
    """
    x1, y1, x2, y2 = to_corners(boxes).clamp(0, 1).unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def box_terms(pred, target, beta=0.0):
    """The two terms of M²IST Eq. (6): smooth L1, and 1 - GIoU.

    pred, target: (B, 4) as (cx, cy, w, h) in [0, 1]. beta: β of smooth L1, see box_loss. Returns
    two float32 scalars. The four coordinates are summed and the batch is averaged, as in the
    released code of both papers.
    """
    pred = pred.float()
    target = target.float()

    # [D1] Both papers write smooth L1 without a β; the released code has plain L1.
    smooth_l1 = F.smooth_l1_loss(pred, target, reduction="none", beta=beta).sum(-1).mean()
    _, giou_of_pairs = iou_and_giou(pred, target)    # (B,)
    return smooth_l1, (1 - giou_of_pairs).mean()


def box_loss(pred, target, l1=1.0, giou=1.0, beta=0.0):
    """L of M²IST Eq. (6), and L_BOX of HiVG Eq. (14): l1 · smooth L1 + giou · (1 - GIoU).

    pred, target: (B, 4) as (cx, cy, w, h) in [0, 1]. beta: β of smooth L1. An error below β costs
    error² / 2β, a larger one costs error - β / 2; with β = 0 this is plain L1. Returns a float32
    scalar.
    """
    smooth_l1, one_minus_giou = box_terms(pred, target, beta)
    # [D2] M²IST does not give λ, which is `giou` here; its released code adds the two terms with
    # weight 1.
    return l1 * smooth_l1 + giou * one_minus_giou    # M²IST Eq. (6), HiVG Eq. (14)


# --- The contrastive constraint: HiVG Eqs. (9)-(11) -----------------------------------------------


def contrastive_loss(text, image, temperature):
    """L_CLC of HiVG Eq. (11): in a batch, each text must pick its image, and each image its text.

    text, image: (B, C) embeddings; row i of both belongs to pair i. They are normalised here.
    temperature: τ, taken from CLIP (0.01 after CLIP's pretraining). Returns a float32 scalar. As in
    the paper, all other pairs are negatives. An image that occurs twice in the batch is then a
    negative of its own second text.
    """
    text = F.normalize(text.float(), dim=-1)
    image = F.normalize(image.float(), dim=-1)

    # Cosine similarities over τ, (B, B): row i is text i, column j is image j.
    logits = text @ image.T / temperature
    pair = torch.arange(len(logits), device=logits.device)    # the right column of row i is i
    t2i = F.cross_entropy(logits, pair)      # HiVG Eq. (9)
    i2t = F.cross_entropy(logits.T, pair)    # HiVG Eq. (10)
    return (t2i + i2t) / 2                   # HiVG Eq. (11)


# --- The region-text constraint: HiVG Eqs. (12)-(13) ----------------------------------------------


def box_mask(boxes, side):
    """m_d of HiVG Eq. (13): which cells of a grid lie in the box.

    boxes: (B, 4) as (cx, cy, w, h). side: cells along each side of the image, H / P in the paper.
    Returns (B, side * side) bool, one row of the grid after the other.
    """
    boxes = boxes.float()
    x1, y1, x2, y2 = to_corners(boxes).unbind(-1)    # (B,) each

    # [D17] A cell is in the box if the cell's centre is. The released code looks at the cell's
    # corner.
    centres = (torch.arange(side, device=boxes.device) + 0.5) / side         # (side,)
    columns = (centres >= x1[:, None]) & (centres <= x2[:, None])            # (B, side)
    rows = (centres >= y1[:, None]) & (centres <= y2[:, None])               # (B, side)
    mask = (rows[:, :, None] & columns[:, None, :]).flatten(1)               # (B, side * side)

    # A small box may lie between the centres. It takes the cell that holds the centre of the box.
    cell = (boxes[:, :2] * side).long().clamp(0, side - 1)                   # (B, 2): column, row
    nearest = F.one_hot(cell[:, 1] * side + cell[:, 0], side * side).bool()  # (B, side * side)
    return torch.where(mask.any(1, keepdim=True), mask, nearest)


class RegionText(nn.Module):
    """<t_eos, MLP(v_i)> of HiVG Eq. (12): a score for how well each image token matches the text.

    dim: the width C of the grounding encoder. hidden: the width inside the MLP.
    """

    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, t, v):
        """Return the scores before the sigmoid of Eq. (12), (B, N).

        t: (B, C), the [EOS] token. v: (B, N, C), the image tokens. Both are outputs of the
        grounding encoder.
        """
        # [D19] The normalization of the paper is a LayerNorm of v and the unit length of t.
        h = self.fc1(self.norm(v))                     # (B, N, hidden)
        h = h * torch.sigmoid(1.702 * h)               # QuickGELU, the activation of CLIP
        t = F.normalize(t, dim=-1)[..., None]          # (B, C, 1)
        scores = self.fc2(h) @ t                       # HiVG Eq. (12), <t_eos, MLP(v_i)>; (B, N, 1)
        return scores[..., 0]                          # (B, N)


def region_text_loss(scores, mask, padding, focal=20.0, dice=2.0):
    """L_RTCC of HiVG Eq. (13): image tokens in the box must match the text, the others must not.

    scores: (B, N) from RegionText, before the sigmoid of Eq. (12), because the cross-entropy is
    stable for large scores only if it applies the sigmoid itself. mask: (B, N) bool, from box_mask.
    padding: (B, N) bool, True where a token is padding. focal, dice: λ_focal and λ_dice. Returns a
    float32 scalar.

    The focal loss has α = 0.25 and γ = 2 (Lin et al., ICCV 2017) and is averaged over the tokens of
    an image. The dice loss is that of the released code, which adds 1 to the numerator and to the
    denominator. (Milletari et al., 3DV 2016, square the terms of the denominator and add nothing.)
    """
    scores = scores.float()
    target = mask.float()
    # [D18] Padded tokens get the weight 0 in every sum below. In the released code they are
    # negatives.
    real = (~padding).float()
    s = scores.sigmoid()    # HiVG Eq. (12)

    # Focal loss: a cross-entropy in which tokens that are already right weigh little.
    right = torch.where(mask, s, 1 - s)                     # the probability of the right answer
    alpha = torch.where(mask, 0.25, 0.75)
    cross_entropy = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    by_token = alpha * (1 - right) ** 2 * cross_entropy     # (B, N)
    tokens = real.sum(1).clamp(min=1)                       # a picture may be all padding
    focal_loss = (by_token * real).sum(1) / tokens          # (B,)

    # Dice loss: one minus the overlap of the predicted region with the true one.
    overlap = (s * target * real).sum(1)
    size = (s * real).sum(1) + (target * real).sum(1)
    dice_loss = 1 - (2 * overlap + 1) / (size + 1)          # (B,)

    return (focal * focal_loss + dice * dice_loss).mean()    # HiVG Eq. (13)


# --- Attention in the box: ours -------------------------------------------------------------------


def attention_loss(attention, mask):
    """-log of the share of [REG]'s attention that lies in the box, the mean over the batch [D49].

    attention: (B, N), how [REG] looks at the image tokens. A row sums to 1 at most, as [REG] looks
    at the text, too. mask: (B, N) bool, from box_mask. Returns a float32 scalar.
    """
    share = (attention.float() * mask).sum(1)
    return -share.clamp(min=EPS).log().mean()


# --- The sum: HiVG Eq. (15) -----------------------------------------------------------------------


def loss_parts(found, boxes, l1, giou, contrast=0.0, focal=0.0, dice=0.0, beta=0.0,
               attention=0.0):
    """The terms of HiVG Eq. (15), each with its weight: {"l1", "giou", "contrast", "region_text"},
    and "attention", which is ours. With the coefficients from `contrast` on at 0 the first two
    remain, which are M²IST's loss, Eq. (6).

    found: what a grounding model returns. `.boxes` is always needed, `.text`, `.image` and
    `.temperature` for the contrastive loss, `.scores` and `.padding` for the region-text loss,
    `.attention` for the attention loss.
    boxes: (B, 4), the true boxes. HiVG's Table 8 has l1 = 2, giou = 2, focal = 20, dice = 2, and
    Eq. (15) has contrast = 1. A loss whose coefficient is 0 is not computed. beta: β of smooth L1.
    """
    smooth_l1, one_minus_giou = box_terms(found.boxes, boxes, beta)
    parts = {"l1": l1 * smooth_l1, "giou": giou * one_minus_giou}    # HiVG Eq. (14)

    if contrast:
        parts["contrast"] = contrast * contrastive_loss(found.text, found.image, found.temperature)

    if focal or dice:
        side = math.isqrt(found.scores.shape[1])    # the image tokens form a square grid
        mask = box_mask(boxes, side)
        parts["region_text"] = region_text_loss(found.scores, mask, found.padding, focal, dice)

    if attention:
        side = math.isqrt(found.attention.shape[1])
        mask = box_mask(boxes, side)
        parts["attention"] = attention * attention_loss(found.attention, mask)    # [D49]

    return parts


def total_loss(found, boxes, l1, giou, contrast=0.0, focal=0.0, dice=0.0, beta=0.0,
               attention=0.0):
    """L_total of HiVG Eq. (15), and with the coefficients from `contrast` on at 0 M²IST's loss,
    Eq. (6): the sum of loss_parts, which says what the arguments are. Returns a float32 scalar."""
    # [D26] The paper sums three losses; the released code adds that of a segmentation head.
    parts = loss_parts(found, boxes, l1, giou, contrast, focal, dice, beta, attention)
    return sum(parts.values())    # HiVG Eq. (15)
