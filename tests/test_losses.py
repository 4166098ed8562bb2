"""losses.py against literal loops over the formulas."""
import random

import pytest
import torch

import losses


def corners(box):
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def giou_by_hand(a, b):
    ax1, ay1, ax2, ay2 = corners(a)
    bx1, by1, bx2, by2 = corners(b)
    inter = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return inter / union, inter / union - (hull - union) / hull


def random_boxes(n, seed=0):
    rng = random.Random(seed)
    return [[rng.random(), rng.random(), rng.uniform(0.05, 0.6), rng.uniform(0.05, 0.6)] for _ in range(n)]


def test_iou_and_giou_are_those_of_the_definition():
    a, b = random_boxes(200, 1), random_boxes(200, 2)
    iou, giou = losses.iou_and_giou(torch.tensor(a), torch.tensor(b))
    for i in range(200):
        by_hand = giou_by_hand(a[i], b[i])
        assert iou[i].item() == pytest.approx(by_hand[0], abs=1e-5)
        assert giou[i].item() == pytest.approx(by_hand[1], abs=1e-5)


@pytest.mark.parametrize("l1, giou", [(1, 1), (2, 2), (1, 0), (0, 1)])
def test_box_loss_is_m2ist_eq_6(l1, giou):
    pred, target = random_boxes(50, 3), random_boxes(50, 4)
    total = 0.0
    for p, t in zip(pred, target):
        for x, y in zip(p, t):
            d = abs(x - y)
            total += l1 * (0.5 * d * d if d < 1 else d - 0.5)
        total += giou * (1 - giou_by_hand(p, t)[1])
    assert losses.box_loss(torch.tensor(pred), torch.tensor(target), l1, giou).item() == pytest.approx(total / 50, rel=1e-5)


def test_a_perfect_box_costs_nothing_and_half_overlap_counts_as_right():
    box = torch.tensor([[0.5, 0.5, 0.4, 0.2]])
    assert losses.box_loss(box, box).item() == pytest.approx(0, abs=1e-6)
    half = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    assert losses.iou_and_giou(box, half)[0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("pred", [[0.5, 0.5, 0, 0], [0.2, 0.2, 0, 0], [0, 0, 1, 1], [1, 1, 0, 1], [0.5, 0.5, -0.1, -0.1],
                                  [0.5, 0.5, 1e-30, 1e-30]])
@pytest.mark.parametrize("target", [[0.5, 0.5, 0.3, 0.3], [0.2, 0.2, 0, 0]])
def test_any_box_has_a_finite_loss_and_gradient(pred, target):
    pred = torch.tensor([pred], dtype=torch.float32, requires_grad=True)
    loss = losses.box_loss(pred, torch.tensor([target], dtype=torch.float32))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(pred.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """A box of 2 x 2 pixels of 640 has an area of 1e-5; in float16 its products underflow."""
    box = torch.tensor([[0.5, 0.5, 2 / 640, 2 / 640]], dtype=dtype)
    iou, giou = losses.iou_and_giou(box, box)
    assert iou.dtype == giou.dtype == losses.box_loss(box, box).dtype == torch.float32
    assert iou.item() == pytest.approx(1, abs=1e-3)
