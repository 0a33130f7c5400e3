import pytest
import torch
import torch.nn.functional as F

from sailvl.train.loss import cross_entropy_sum


def inputs(rows=37, width=8, vocabulary=53, dtype=torch.float64, head_trains=True, hidden_trains=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_(hidden_trains)
    head = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_(head_trains)
    return hidden, head, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_gradients_equal_the_plain_formula(dtype, tolerance, chunk):
    hidden, head, targets = inputs(dtype=dtype)
    loss = cross_entropy_sum(hidden, head, targets, max_chunk_logits=chunk * 53)
    (loss / 7).backward()
    own = (loss.detach(), hidden.grad, head.grad)
    hidden.grad = head.grad = None
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (plain / 7).backward()
    for ours, theirs in zip(own, (plain.detach(), hidden.grad, head.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert loss.dtype == dtype


def test_numerical_gradient():
    hidden, head, targets = inputs(rows=5, width=3, vocabulary=7)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, targets, max_chunk_logits=14), (hidden, head))


def test_a_frozen_head_gets_no_gradient_and_none_is_computed(monkeypatch):
    hidden, head, targets = inputs(head_trains=False)
    sizes = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **kw: sizes.append(x.shape) or zeros_like(x, **kw))
    cross_entropy_sum(hidden, head, targets).backward()
    assert hidden.grad is not None and head.grad is None and head.shape not in sizes


def test_a_frozen_body_still_trains_the_head():
    hidden, head, targets = inputs(hidden_trains=False)
    cross_entropy_sum(hidden, head, targets).backward()
    assert hidden.grad is None and head.grad.abs().sum() > 0


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1e4, 0.0]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = cross_entropy_sum(hidden, head, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and torch.isfinite(hidden.grad).all()


def test_zero_rows_give_zero_with_zero_gradients():
    hidden, head, targets = inputs(rows=0)
    loss = cross_entropy_sum(hidden, head, targets)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 8) and not head.grad.any()


def test_bf16_multiplications_stay_close_and_give_gradients_in_the_inputs_dtype():
    hidden, head, targets = inputs(dtype=torch.float32, rows=64, width=32)
    exact = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    loss = cross_entropy_sum(hidden, head, targets, compute_dtype=torch.bfloat16)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == head.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)


def test_under_no_grad_only_the_value_is_made():
    hidden, head, targets = inputs()
    with torch.no_grad():
        loss = cross_entropy_sum(hidden, head, targets)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(F.cross_entropy(hidden @ head.T, targets, reduction="sum").item())


def test_a_second_derivative_is_refused_instead_of_wrong():
    hidden, head, targets = inputs()
    (grad,) = torch.autograd.grad(cross_entropy_sum(hidden, head, targets), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_rows_and_targets_must_match():
    hidden, head, targets = inputs()
    with pytest.raises(ValueError, match="37 hidden rows but 36 targets"):
        cross_entropy_sum(hidden, head, targets[1:])
