import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_layerprune import losses


@pytest.fixture
def problem():
    torch.manual_seed(0)
    n, h, v = 37, 16, 91
    student = torch.randn(n, h, requires_grad=True)
    teacher, labels = torch.randn(n, h), torch.randint(v, (n,))
    return student, nn.Linear(h, v, bias=False), teacher, nn.Linear(h, v, bias=False), labels


def dense_kl(student, student_head, teacher, teacher_head, temperature=1.0, beta=0.0):
    p = F.log_softmax(teacher_head(teacher) / temperature, -1).detach()
    q = F.log_softmax(student_head(student) / temperature, -1)
    if beta in (0, 1):
        return ((p.exp() * (p - q)) if beta == 0 else (q.exp() * (q - p))).sum(-1) * temperature**2
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1) * temperature**2


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [91 * 5, 10**9])
def test_the_divergence_equals_the_plain_formula_with_gradients(problem, temperature, chunk, beta, monkeypatch):
    monkeypatch.setitem(losses.MAX_LOGITS_PER_CHUNK, "cpu", chunk)
    monkeypatch.setattr(losses, "MIN_ROWS_PER_CHUNK", 1)
    student, student_head, teacher, teacher_head, _ = problem
    results = []
    for function in (losses.divergence, dense_kl):
        student.grad = student_head.weight.grad = None
        value = function(student, student_head, teacher, teacher_head, temperature, beta)
        value.sum().backward()
        results.append((value.detach().sum(), student.grad.clone(), student_head.weight.grad.clone()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert teacher_head.weight.grad is None


@pytest.mark.parametrize("vocabulary", [33_000, 151_936])
def test_kl_is_exact_over_a_large_vocabulary(vocabulary):
    torch.manual_seed(0)
    teacher, head = torch.randn(12, 32), nn.Linear(32, vocabulary, bias=False)
    nn.init.normal_(head.weight, std=0.3)
    exact_head = nn.Linear(32, vocabulary, bias=False, dtype=torch.float64)
    exact_head.weight = nn.Parameter(head.weight.double())
    for distance in (0.0, 0.03, 0.3):
        student = teacher + distance * torch.randn_like(teacher)
        exact = dense_kl(student.double(), exact_head, teacher.double(), exact_head).detach()
        (found,) = losses.token_statistics([student], head, torch.zeros(12, dtype=torch.long), teacher, head)
        torch.testing.assert_close(found["kl"].double(), exact, rtol=1e-5, atol=5e-6)
        total = losses.divergence(student, head, teacher, head).double()
        torch.testing.assert_close(total, exact.sum(), rtol=1e-5, atol=5e-5)


def test_the_divergence_scales_its_gradients_and_leaves_a_frozen_head_alone(problem):
    student, student_head, teacher, teacher_head, _ = problem
    (0.25 * losses.divergence(student, student_head, teacher, teacher_head)).backward()
    quarter, student.grad = student.grad.clone(), None
    student_head.weight.grad = None
    student_head.weight.requires_grad_(False)
    losses.divergence(student, student_head, teacher, teacher_head).backward()
    torch.testing.assert_close(4 * quarter, student.grad)
    assert student_head.weight.grad is None


def test_the_divergence_under_autocast_is_close(problem):
    student, student_head, teacher, teacher_head, _ = problem
    exact = dense_kl(student, student_head, teacher, teacher_head).sum()
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.divergence(student, student_head, teacher, teacher_head)
    value.backward()
    assert value.item() == pytest.approx(exact.item(), rel=0.02)
    assert student.grad.dtype == torch.float32


def test_hidden_state_distances():
    teacher = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    student = torch.tensor([[3.0, 2.0], [1.0, 1.0]])
    assert losses.hidden_state_mse(student, teacher).tolist() == [2.0, 1.0]
    assert losses.relative_hidden_state_mse(student, teacher)[0].item() == pytest.approx(2 / 12.5)
    assert losses.relative_hidden_state_mse(teacher[:1], teacher[:1]).item() == 0
    assert losses.relative_hidden_state_mse(torch.zeros(1, 2), teacher[:1]).item() == 1


def test_next_token_loss_equals_cross_entropy_with_gradients(problem, monkeypatch):
    monkeypatch.setitem(losses.MAX_LOGITS_PER_CHUNK, "cpu", 91 * 5)
    monkeypatch.setattr(losses, "MIN_ROWS_PER_CHUNK", 1)
    student, head, _, _, labels = problem
    losses.next_token_loss(student, head, labels).sum().backward()
    ours, student.grad = (student.grad.clone(), head.weight.grad.clone()), None
    head.weight.grad = None
    F.cross_entropy(head(student), labels, reduction="sum").backward()
    torch.testing.assert_close(ours, (student.grad, head.weight.grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 91 * 5, 10**9])
def test_token_statistics_equal_the_plain_formulas(problem, monkeypatch, chunk):
    monkeypatch.setitem(losses.MAX_LOGITS_PER_CHUNK, "cpu", chunk)
    monkeypatch.setattr(losses, "MIN_ROWS_PER_CHUNK", 1)
    student, head, teacher, teacher_head, labels = problem
    student = student.detach()
    first, second = losses.token_statistics(
        [student, teacher], head, labels, teacher, teacher_head, with_agreement=True
    )
    torch.testing.assert_close(first["nll"], F.cross_entropy(head(student), labels, reduction="none"))
    torch.testing.assert_close(first["kl"], dense_kl(student, head, teacher, teacher_head), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second["kl"], dense_kl(teacher, head, teacher, teacher_head), rtol=1e-4, atol=1e-5)
    assert torch.equal(first["agreement"], head(student).argmax(-1) == teacher_head(teacher).argmax(-1))
    (alone,) = losses.token_statistics([student], head, labels)
    assert alone.keys() == {"nll"} and torch.equal(alone["nll"], first["nll"])


def test_perplexity_of_any_loss_is_a_float():
    assert losses.perplexity_of(2.0) == math.exp(2) and losses.perplexity_of(1e6) == math.inf
    assert math.isnan(losses.perplexity_of(math.nan))
