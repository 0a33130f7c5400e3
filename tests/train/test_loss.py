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
    loss, _ = cross_entropy_sum(hidden, head, targets, max_chunk_logits=chunk * 53)
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
    assert torch.autograd.gradcheck(
        lambda h, w: cross_entropy_sum(h, w, targets, max_chunk_logits=14)[0], (hidden, head)
    )


def test_a_frozen_head_gets_no_gradient_and_none_is_computed(monkeypatch):
    hidden, head, targets = inputs(head_trains=False)
    sizes = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **kw: sizes.append(x.shape) or zeros_like(x, **kw))
    cross_entropy_sum(hidden, head, targets)[0].backward()
    assert hidden.grad is not None and head.grad is None and head.shape not in sizes


def test_a_frozen_body_still_trains_the_head():
    hidden, head, targets = inputs(hidden_trains=False)
    cross_entropy_sum(hidden, head, targets)[0].backward()
    assert hidden.grad is None and head.grad.abs().sum() > 0


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1e4, 0.0]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss, _ = cross_entropy_sum(hidden, head, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and torch.isfinite(hidden.grad).all()


def test_zero_rows_give_zero_with_zero_gradients():
    hidden, head, targets = inputs(rows=0)
    loss, _ = cross_entropy_sum(hidden, head, targets)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 8) and not head.grad.any()


def test_bf16_multiplications_stay_close_and_give_gradients_in_the_inputs_dtype():
    hidden, head, targets = inputs(dtype=torch.float32, rows=64, width=32)
    exact = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    loss, _ = cross_entropy_sum(hidden, head, targets, compute_dtype=torch.bfloat16)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == head.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)


def test_under_no_grad_only_the_value_is_made():
    hidden, head, targets = inputs()
    with torch.no_grad():
        loss, _ = cross_entropy_sum(hidden, head, targets)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(F.cross_entropy(hidden @ head.T, targets, reduction="sum").item())


def test_a_second_derivative_is_refused_instead_of_wrong():
    hidden, head, targets = inputs()
    (grad,) = torch.autograd.grad(cross_entropy_sum(hidden, head, targets)[0], hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_rows_and_targets_must_match():
    hidden, head, targets = inputs()
    with pytest.raises(ValueError, match="37 hidden rows but 36 targets"):
        cross_entropy_sum(hidden, head, targets[1:])


# ---- weights and the penalty on the normalizer ----------------------------------------------------------------------


def weights(rows=37, dtype=torch.float32):
    return torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2


def plain(hidden, head, targets, weights_R, z):
    """(objective, cross-entropy) by the formula."""
    logits = hidden @ head.T
    losses = F.cross_entropy(logits, targets, reduction="none")
    weights_R = torch.ones_like(losses) if weights_R is None else weights_R.to(losses)
    return (weights_R * (losses + z * logits.logsumexp(1) ** 2)).sum(), (weights_R * losses).sum()


@pytest.mark.parametrize("z", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("given", [None, weights()])
@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_weights_and_penalty_equal_the_formula(chunk, given, z):
    hidden, head, targets = inputs()
    objective, cross_entropy = cross_entropy_sum(
        hidden, head, targets, weights_R=given, z_loss=z, max_chunk_logits=chunk * 53
    )
    (objective / 7).backward()
    own = (objective.detach(), cross_entropy, hidden.grad, head.grad)
    hidden.grad = head.grad = None
    expected = plain(hidden, head, targets, given, z)
    (expected[0] / 7).backward()
    for ours, theirs in zip(own, (expected[0], expected[1], hidden.grad, head.grad), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)
    assert not cross_entropy.requires_grad


def test_numerical_gradient_with_weights_and_penalty():
    hidden, head, targets = inputs(rows=5, width=3, vocabulary=7)

    def objective(h, w):
        return cross_entropy_sum(h, w, targets, weights_R=weights(5), z_loss=0.2, max_chunk_logits=14)[0]

    assert torch.autograd.gradcheck(objective, (hidden, head))


def test_the_penalty_alone_has_its_closed_form_gradient():
    """d/dh of z lse(hW)^2 is 2 z lse softmax W; weight 1 and two columns, so that it can be written out."""
    hidden = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    with_z, _ = cross_entropy_sum(hidden, head, torch.tensor([0]), z_loss=0.5)
    without, cross_entropy = cross_entropy_sum(hidden, head, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(with_z - without, hidden)
    log_sum = torch.tensor([2.0, -2.0], dtype=torch.float64).logsumexp(0)
    assert (with_z - without).item() == pytest.approx(0.5 * log_sum.item() ** 2, rel=1e-12)
    assert gradient.item() == pytest.approx(log_sum.item() * torch.tanh(torch.tensor(2.0, dtype=torch.float64)).item())
    assert without.item() == cross_entropy.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_weights_and_penalty_the_bits_are_those_of_the_bare_arithmetic(dtype):
    hidden, head, targets = inputs(dtype=torch.float32)
    objective, cross_entropy = cross_entropy_sum(hidden, head, targets, compute_dtype=dtype, max_chunk_logits=530)
    objective.backward()
    total, grad_head = torch.zeros(()), torch.zeros_like(head)
    grad_hidden, low = torch.empty_like(hidden), head.detach().to(dtype)
    for begin in range(0, 37, 10):
        rows, wanted = slice(begin, begin + 10), targets[begin : begin + 10, None]
        some = hidden.detach()[rows].to(dtype)
        logits = (some @ low.T).float()
        log_sum = logits.logsumexp(1, keepdim=True)
        total += (log_sum - logits.gather(1, wanted)).sum()
        gradient = (logits - log_sum).exp().scatter_add(1, wanted, -torch.ones_like(log_sum)).to(dtype)
        grad_hidden[rows] = gradient @ low
        grad_head += gradient.T @ some
    assert torch.equal(objective.detach(), total) and torch.equal(cross_entropy, total)
    assert torch.equal(hidden.grad, grad_hidden) and torch.equal(head.grad, grad_head)
    of_ones = cross_entropy_sum(
        hidden, head, targets, weights_R=torch.ones(37), compute_dtype=dtype, max_chunk_logits=530
    )
    assert torch.equal(of_ones[0], objective)


def test_weights_are_linear_and_a_row_of_weight_zero_is_not_there():
    hidden, head, targets = inputs()
    given = weights(dtype=torch.float64)
    given[5:20] = 0
    kept = torch.cat((torch.arange(5), torch.arange(20, 37)))
    whole, _ = cross_entropy_sum(hidden, head, targets, weights_R=given, z_loss=0.1)
    part, _ = cross_entropy_sum(hidden[kept], head, targets[kept], weights_R=given[kept], z_loss=0.1)
    twice, _ = cross_entropy_sum(hidden, head, targets, weights_R=2 * given, z_loss=0.1)
    assert whole.item() == pytest.approx(part.item(), rel=1e-13)
    assert twice.item() == pytest.approx(2 * whole.item(), rel=1e-13)


def test_zero_rows_with_weights_and_penalty():
    hidden, head, targets = inputs(rows=0)
    objective, cross_entropy = cross_entropy_sum(hidden, head, targets, weights_R=weights(0), z_loss=0.1)
    objective.backward()
    assert objective.item() == cross_entropy.item() == 0 and not head.grad.any()


def test_weights_must_match_the_rows():
    hidden, head, targets = inputs()
    with pytest.raises(ValueError, match="37 targets but 36 weights"):
        cross_entropy_sum(hidden, head, targets, weights_R=weights(36))
