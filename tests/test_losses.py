"""losses.py against literal loops over the formulas of both papers."""
import math
from types import SimpleNamespace

import pytest
import torch

import losses


# --- Boxes ----------------------------------------------------------------------------------------


def corners(box):
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def literal_iou_and_giou(a, b):
    """The definition of Rezatofighi et al., in plain numbers."""
    ax1, ay1, ax2, ay2 = corners(a)
    bx1, by1, bx2, by2 = corners(b)

    overlap_width = max(0, min(ax2, bx2) - max(ax1, bx1))
    overlap_height = max(0, min(ay2, by2) - max(ay1, by1))
    intersection = overlap_width * overlap_height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))

    iou = intersection / union
    return iou, iou - (hull - union) / hull


def literal_box_loss(pred, target, l1, giou, beta):
    total = 0.0
    for p, t in zip(pred.tolist(), target.tolist()):
        for x, y in zip(p, t):
            d = abs(x - y)
            total += l1 * (d * d / (2 * beta) if d < beta else d - beta / 2)
        total += giou * (1 - literal_iou_and_giou(p, t)[1])
    return total / len(pred)


def random_boxes(count, seed):
    torch.manual_seed(seed)
    return torch.cat([torch.rand(count, 2), 0.05 + 0.55 * torch.rand(count, 2)], dim=1)


def test_iou_and_giou_follow_their_definition():
    """IoU and GIoU of 200 random pairs, of which some overlap, equal the definition."""
    a = random_boxes(200, seed=1)
    b = random_boxes(200, seed=2)
    iou, giou = losses.iou_and_giou(a, b)
    expected = [literal_iou_and_giou(p, t) for p, t in zip(a.tolist(), b.tolist())]
    torch.testing.assert_close(torch.stack([iou, giou], 1), torch.tensor(expected),
                               rtol=0, atol=1e-5)


def test_box_loss_is_m2ist_eq_6():
    """The box loss is the mean over the batch of l1 · smooth L1 + giou · (1 - GIoU). By default
    both weights are 1 and β is 0 [D1, D2]."""
    pred = random_boxes(50, seed=3)
    target = random_boxes(50, seed=4)
    plain = losses.box_loss(pred, target).item()
    assert plain == pytest.approx(literal_box_loss(pred, target, 1, 1, 0), rel=1e-5)
    weighted = losses.box_loss(pred, target, 2, 3, 0.1).item()
    assert weighted == pytest.approx(literal_box_loss(pred, target, 2, 3, 0.1), rel=1e-5)


def test_predictions_are_clamped_to_the_square_and_losses_are_not():
    """The part of a box outside of [0, 1] is cut off, and a box inside stays as it is. A loss takes
    the whole box, so that there is a gradient back into the square."""
    boxes = torch.tensor([[0.1, 0.5, 0.4, 0.2], [0.9, 1.0, 0.4, 0.2], [0.5, 0.5, 0.2, 0.4]])
    clamped = torch.tensor([[0.15, 0.5, 0.3, 0.2], [0.85, 0.95, 0.3, 0.1], [0.5, 0.5, 0.2, 0.4]])
    assert torch.allclose(losses.clamp_to_square(boxes), clamped)
    assert losses.box_loss(boxes[:1], clamped[:1]).item() > 0.3


def test_any_box_has_a_finite_loss_and_gradient():
    """Boxes without area have finite losses and gradients; a negative size counts as 0."""
    strange = torch.tensor([
        [0.5, 0.5, 0, 0], [0.2, 0.2, 0, 0], [0, 0, 1, 1], [1, 1, 0, 1], [0.5, 0.5, -0.1, -0.1],
        [0.5, 0.5, 1e-30, 1e-30]])
    for target in ([0.5, 0.5, 0.3, 0.3], [0.2, 0.2, 0, 0]):
        pred = strange.clone().requires_grad_()
        loss = losses.box_loss(pred, torch.tensor([target]).expand(6, 4))
        loss.backward()
        assert loss.isfinite()
        assert pred.grad.isfinite().all()
    assert torch.equal(losses.to_corners(strange[4]), torch.tensor([0.5, 0.5, 0.5, 0.5]))


# --- HiVG's contrastive constraint ----------------------------------------------------------------


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_contrastive_loss_is_hivg_eqs_9_to_11():
    """The contrastive loss is the mean of the text-to-image and the image-to-text loss."""
    torch.manual_seed(0)
    N = 5
    tau = 0.07
    text = torch.randn(N, 4)
    image = torch.randn(N, 4)
    t = text.tolist()
    v = image.tolist()

    t2i = 0.0
    i2t = 0.0
    for i in range(N):
        positive = math.exp(cosine(t[i], v[i]) / tau)
        images = sum(math.exp(cosine(t[i], v[j]) / tau) for j in range(N))
        texts = sum(math.exp(cosine(v[i], t[j]) / tau) for j in range(N))
        t2i += -math.log(positive / images) / N    # Eq. (9)
        i2t += -math.log(positive / texts) / N     # Eq. (10)
    expected = (t2i + i2t) / 2                     # Eq. (11)
    assert losses.contrastive_loss(text, image, tau).item() == pytest.approx(expected, rel=1e-4)


# --- HiVG's region-text constraint ----------------------------------------------------------------


def literal_focal_and_dice(scores, mask, padding):
    """The two losses of one image; padded tokens are left out of all sums."""
    real = [i for i in range(len(scores)) if not padding[i]]
    focal = 0.0
    overlap = 0.0
    predicted = 0.0
    wanted = 0.0
    for i in real:
        s = 1 / (1 + math.exp(-scores[i]))    # Eq. (12)
        if mask[i]:
            focal += -0.25 * (1 - s) ** 2 * math.log(s) / len(real)
            overlap += s
            wanted += 1
        else:
            focal += -0.75 * s ** 2 * math.log(1 - s) / len(real)
        predicted += s
    dice = 1 - (2 * overlap + 1) / (predicted + wanted + 1)
    return focal, dice


def test_region_text_loss_is_hivg_eqs_12_and_13():
    """The loss is λ_focal · focal + λ_dice · dice, the mean over the batch, with the weights 20 and
    2 of Table 8 by default."""
    torch.manual_seed(0)
    scores = 2 * torch.randn(3, 6)
    mask = torch.rand(3, 6) < 0.4
    padding = torch.arange(6) >= torch.tensor([[6], [4], [5]])

    focal = 0.0
    dice = 0.0
    for b in range(3):
        by_image = literal_focal_and_dice(scores[b].tolist(), mask[b].tolist(), padding[b].tolist())
        focal += by_image[0] / 3
        dice += by_image[1] / 3
    by_default = losses.region_text_loss(scores, mask, padding).item()
    assert by_default == pytest.approx(20 * focal + 2 * dice, rel=1e-4)    # Eq. (13)
    other = losses.region_text_loss(scores, mask, padding, focal=1, dice=5).item()
    assert other == pytest.approx(focal + 5 * dice, rel=1e-4)


def test_region_text_loss_is_finite_and_ignores_padding():
    """Scores of ±200 overflow the logarithm of a plain sigmoid. A padded token has no gradient, and
    neither its score nor its mask counts. An image that is all padding has no loss."""
    scores = torch.tensor([[200.0, -200.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [True, False, True]])
    padding = torch.tensor([[False, False, True], [True, True, True]])
    loss = losses.region_text_loss(scores, mask, padding)
    loss.backward()
    alone = losses.region_text_loss(scores[:1, :2], mask[:1, :2], padding[:1, :2])
    assert alone.isfinite()
    assert loss.item() == pytest.approx(alone.item() / 2, rel=1e-6)
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 0] != 0
    assert not scores.grad[padding].any()


def test_region_text_scores_are_those_of_hivg_eq_12():
    """A score is the dot product of the text at unit length and the MLP of the image token."""
    torch.manual_seed(0)
    region = losses.RegionText(dim=4, hidden=6)
    t = torch.randn(2, 4)
    v = torch.randn(2, 3, 4)
    scores = region(t, v)
    assert scores.shape == (2, 3)
    for b in range(2):
        for i in range(3):
            h = region.fc1(region.norm(v[b, i]))
            h = h / (1 + torch.exp(-1.702 * h))    # QuickGELU
            expected = (t[b] / t[b].norm() * region.fc2(h)).sum()
            assert scores[b, i].item() == pytest.approx(expected.item(), abs=1e-5)


def test_box_mask_is_the_cells_whose_centre_lies_in_the_box():
    """[D17]. A box without a centre of a cell gets the cell of its own centre, at the border of the
    grid, too."""
    side = 7
    torch.manual_seed(0)
    boxes = torch.rand(60, 4) ** torch.tensor([1, 1, 2, 2])    # many are small
    boxes = [*boxes.tolist(), [1.0, 1.0, 0.01, 0.01], [0.0, 0.0, 0.0, 0.0]]
    masks = losses.box_mask(torch.tensor(boxes), side)
    without_a_centre = 0
    for (cx, cy, w, h), mask in zip(boxes, masks):
        expected = set()
        for row in range(side):
            for column in range(side):
                inside_x = abs((column + 0.5) / side - cx) <= w / 2
                inside_y = abs((row + 0.5) / side - cy) <= h / 2
                if inside_x and inside_y:
                    expected.add(row * side + column)
        if not expected:
            without_a_centre += 1
            expected.add(min(int(cy * side), side - 1) * side + min(int(cx * side), side - 1))
        assert set(mask.nonzero()[:, 0].tolist()) == expected
    assert 5 < without_a_centre < 50


# --- Attention to the box -------------------------------------------------------------------------


def test_the_attention_loss_is_the_logarithm_of_the_share_in_the_box():
    """[D49], as a loop over samples and cells; the mean over the batch. It is finite where nothing
    attends to the box."""
    torch.manual_seed(0)
    attention = 0.8 * torch.rand(3, 9).softmax(-1)    # the rest is on the text
    attention[2, :4] = 0
    mask = torch.arange(9) < torch.tensor([[3], [5], [4]])
    attention.requires_grad_()
    expected = 0.0
    for b in range(3):
        share = sum(attention[b, i].item() for i in range(9) if mask[b, i])
        expected -= math.log(max(share, 1e-7)) / 3
    loss = losses.attention_loss(attention, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert attention.grad.isfinite().all()


# --- The sum --------------------------------------------------------------------------------------


def random_outputs(dtype=torch.float32):
    """What a grounding model returns for four texts, and the true boxes."""
    torch.manual_seed(0)
    outputs = SimpleNamespace(
        boxes=torch.rand(4, 4).to(dtype),
        text=torch.randn(4, 8).to(dtype),
        image=torch.randn(4, 8).to(dtype),
        temperature=torch.tensor(0.1),
        scores=torch.randn(4, 9).to(dtype),
        padding=torch.arange(9) >= torch.tensor([[9], [6], [9], [7]]),
        attention=torch.rand(4, 9).softmax(-1).to(dtype),
    )
    return outputs, torch.rand(4, 4).to(dtype)


WEIGHTS = dict(l1=2, giou=3, beta=0.1, contrast=0.5, focal=20, dice=4, attention=0.3)


def test_loss_terms_are_those_of_hivg_eqs_14_and_15():
    """Each term is there under its name, with its own weight."""
    outputs, boxes = random_outputs()
    terms = losses.loss_terms(outputs, boxes, **WEIGHTS)
    mask = losses.box_mask(boxes, 3)
    expected = {
        "l1": losses.box_loss(outputs.boxes, boxes, 2, 0, 0.1),
        "giou": losses.box_loss(outputs.boxes, boxes, 0, 3),
        "contrast": 0.5 * losses.contrastive_loss(outputs.text, outputs.image, 0.1),
        "region_text": losses.region_text_loss(outputs.scores, mask, outputs.padding, 20, 4),
        "attention": 0.3 * losses.attention_loss(outputs.attention, mask),
    }
    assert list(terms) == list(expected)
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name])


def test_a_term_whose_weight_is_0_is_not_computed():
    """Without the constraints M²IST's loss remains, which needs boxes alone. A region-text loss may
    have one of its two weights at 0."""
    outputs, boxes = random_outputs()
    terms = losses.loss_terms(SimpleNamespace(boxes=outputs.boxes), boxes, 2, 3)
    assert list(terms) == ["l1", "giou"]
    for weight in ("focal", "dice"):
        assert "region_text" in losses.loss_terms(outputs, boxes, 2, 3, **{weight: 1})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_losses_of_half_precision_are_computed_in_float32(dtype):
    """Each term is bitwise that of the same values in float32. A box of half a pixel, whose corners
    half precision cannot hold, has IoU 1 with itself."""
    outputs, boxes = random_outputs(dtype)
    terms = losses.loss_terms(outputs, boxes, **WEIGHTS)
    for name in ("boxes", "text", "image", "scores", "attention"):
        setattr(outputs, name, getattr(outputs, name).float())
    for name, term in losses.loss_terms(outputs, boxes.float(), **WEIGHTS).items():
        assert terms[name].dtype == torch.float32
        assert torch.equal(terms[name], term), name

    small = torch.tensor([[0.5, 0.5, 0.5 / 640, 0.5 / 640]], dtype=dtype)
    iou, _ = losses.iou_and_giou(small, small)
    assert iou.item() == pytest.approx(1, abs=1e-3)
