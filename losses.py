"""Losses of both papers, each readable alone: this file imports nothing of the project.

    M²IST Eq. (6)     box_loss      smooth L1 and GIoU on the box

Boxes are (cx, cy, w, h) in [0, 1] of the padded square image. Everything is computed in float32, whatever precision
the model runs in: areas of small boxes are products of small numbers, and half precision rounds them to zero.
"""
import torch
import torch.nn.functional as F

EPS = 1e-7      # below the area of any real box (one pixel of a 640 px image has 2.4e-6), above a division by zero


def to_corners(boxes):
    """(..., 4) boxes as (cx, cy, w, h) -> (x1, y1, x2, y2), in the same unit; a negative width or height counts as 0."""
    cx, cy, w, h = boxes.unbind(-1)
    w, h = w.clamp(min=0), h.clamp(min=0)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)


def iou_and_giou(a, b):
    """IoU and generalised IoU of each pair of boxes.

    a, b: (..., 4) as (cx, cy, w, h). Returns two float32 tensors (...): IoU in [0, 1], GIoU in [-1, 1].
    Any box in [0, 1], one with no area too, gives finite values and finite gradients. Source: Rezatofighi et al., CVPR 2019.
    """
    a, b = to_corners(a.float()), to_corners(b.float())
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    iou = intersection / union.clamp(min=EPS)
    return iou, iou - (hull - union) / hull.clamp(min=EPS)


def box_loss(pred, target, l1=1.0, giou=1.0):
    """L = l1 * smooth-L1 + giou * (1 - GIoU), M²IST Eq. (6), whose λ is `giou`; HiVG Eq. (14) weighs both.

    pred, target: (B, 4) as (cx, cy, w, h) in [0, 1]. Returns a float32 scalar. The four coordinates are summed and
    the batch is averaged, as in the released code.
    """
    pred, target = pred.float(), target.float()
    # M²IST Eq. (6), first term. [D1] both papers write smooth L1; the released code of both has plain L1.
    smooth_l1 = F.smooth_l1_loss(pred, target, reduction="none").sum(-1).mean()
    # M²IST Eq. (6), second term. [D2] λ is never given; the released code adds the two with weight 1.
    return l1 * smooth_l1 + giou * (1 - iou_and_giou(pred, target)[1]).mean()
