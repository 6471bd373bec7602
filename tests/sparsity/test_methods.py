"""Sparsity patterns, and methods that choose the kept weights, on single matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmprune.checkpoint.result.verify import SparseClaim
from llmprune.checkpoint.result.verify_worker import counts
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.masked_least_squares import output_energy, solve_on_support
from llmprune.recipe.sparsity import Sparsity
from llmprune.sparsity.method import SparsityMethod
from llmprune.sparsity.methods.alps import Alps
from llmprune.sparsity.methods.magnitude import Magnitude
from llmprune.sparsity.methods.sparsegpt import SparseGPT
from llmprune.sparsity.methods.wanda import Wanda
from llmprune.sparsity.pattern import Pattern

METHODS = SparsityMethod.kinds()
PATTERNS = ("2:4", "1:4", "4:8", 0.5, 0.7)


def problem(outputs: int = 24, inputs: int = 64, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Weights [O, I], and the Gram matrix [I, I] of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    mixing_II = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator) ** 2
    input_TI = torch.randn(tokens, inputs, generator=generator) @ mixing_II
    return torch.randn(outputs, inputs, generator=generator), input_TI.T @ input_TI


def error(weight_OI: Tensor, wanted_OI: Tensor, gram_II: Tensor) -> float:
    """Relative error of the outputs of the matrix."""
    return float((output_energy(weight_OI - wanted_OI, gram_II).sum() / output_energy(wanted_OI, gram_II).sum()).sqrt())


@pytest.mark.parametrize(("text", "kept", "of"), [("2:4", 2, 4), (" 4:8 ", 4, 8), ("1:16", 1, 16)])
def test_a_pattern_says_how_many_stay(text: str, kept: int, of: int) -> None:
    """N:M keeps N of every M."""
    pattern = Pattern.parse(text)
    assert (pattern.kept, pattern.of, str(pattern)) == (kept, of, text.strip())
    assert pattern.removed == 1 - kept / of


@pytest.mark.parametrize("value", ["4:2", "2:2", "0:4", "2-4", "half", 0, 1, 1.5, -0.5, 124, True, [2, 4]])
def test_what_is_no_pattern_is_refused(value: object) -> None:
    """N above M, all or nothing, other texts and other types raise an error that explains patterns."""
    with pytest.raises(ValueError, match="pattern"):
        Sparsity.model_validate({"pattern": value})


@pytest.mark.parametrize("value", PATTERNS)
def test_a_mask_keeps_the_highest_of_each_group(value: str | float) -> None:
    """Every group, or every output, keeps exactly the number of the pattern, and the highest scores."""
    pattern = Pattern.parse(value)
    scores_OI = torch.rand(16, 64, generator=torch.Generator().manual_seed(1))
    group = pattern.of or 64
    mask_GM = pattern.mask(scores_OI).view(-1, group)
    scores_GM = scores_OI.view(-1, group)
    assert (mask_GM.sum(1) == (pattern.kept if pattern.of else pattern.kept_inputs(64))).all()
    least_kept = scores_GM.masked_fill(~mask_GM, 2).amin(1)
    assert (scores_GM.masked_fill(mask_GM, -1).amax(1) <= least_kept).all()


def test_equal_scores_do_not_break_the_pattern() -> None:
    """Of four equal scores, zeros too, exactly two are kept."""
    scores_OI = torch.tensor([[0.0, 0, 0, 0, 1, 1, 1, 1], [1, 2, 2, 2, 0, 0, 3, 0]])
    mask_OI = Pattern(2, 4).mask(scores_OI)
    assert (mask_OI.view(-1, 4).sum(1) == 2).all()
    assert mask_OI[1, 6]


def test_shapes_that_hardware_refuses() -> None:
    """2:4 requires multiples of 32 × 64, any N:M whole groups of inputs, a share of weights no shape."""
    assert Pattern.parse("2:4").refusal(64, 128) is None
    assert "multiples of 32" in str(Pattern.parse("2:4").refusal(48, 128))
    assert "not a multiple of 8" in str(Pattern.parse("4:8").refusal(64, 100))
    assert Pattern.parse("4:8").refusal(7, 8) is None
    assert Pattern.parse(0.5).refusal(3, 5) is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", PATTERNS)
def test_every_method_keeps_the_pattern(method: type[SparsityMethod], value: str | float) -> None:
    """Weights outside the mask are zero, and the mask has the pattern; a share is met within a hundredth."""
    weight_OI, gram_II = problem()
    pattern = Pattern.parse(value)
    sparse_OI, mask_OI = method().prune(weight_OI, gram_II, pattern=pattern)
    assert mask_OI.dtype == torch.bool
    assert not sparse_OI[~mask_OI].any()
    if pattern.of:
        assert (mask_OI.view(-1, pattern.of).sum(1) == pattern.kept).all()
    else:
        assert float(mask_OI.float().mean()) == pytest.approx(1 - pattern.removed, abs=2e-2)


@pytest.mark.parametrize("value", PATTERNS)
def test_methods_that_read_more_moments_lose_less(value: str | float) -> None:
    """Magnitude loses more than Wanda, Wanda more than SparseGPT, and that more than ALPS."""
    weight_OI, gram_II = problem()
    pattern = Pattern.parse(value)
    methods = (Magnitude(), Wanda(), SparseGPT(), Alps())
    errors = [error(one.prune(weight_OI, gram_II, pattern=pattern)[0], weight_OI, gram_II) for one in methods]
    assert errors == sorted(errors, reverse=True)


def test_wanda_scores_by_its_formula() -> None:
    """|w| times the norm of the input, from the whole Gram matrix or from its diagonal alone."""
    weight_OI, gram_II = problem()
    sparse_OI, mask_OI = Wanda().prune(weight_OI, gram_II.diagonal(), pattern=Pattern(2, 4))
    assert torch.equal(mask_OI, Pattern(2, 4).mask(weight_OI.abs() * gram_II.diagonal().sqrt()))
    assert torch.equal(sparse_OI, weight_OI * mask_OI)
    assert torch.equal(Wanda().prune(weight_OI, gram_II, pattern=Pattern(2, 4))[1], mask_OI)


def test_sparsegpt_without_correlations_is_magnitude() -> None:
    """Uncorrelated inputs cannot compensate for each other: the largest weights are kept unchanged."""
    weight_OI, _ = problem()
    sparse_OI, mask_OI = SparseGPT().prune(weight_OI, torch.eye(64) * 7, pattern=Pattern(2, 4))
    assert torch.equal(mask_OI, Pattern(2, 4).mask(weight_OI.abs()))
    assert torch.allclose(sparse_OI, weight_OI * mask_OI)


def test_sparsegpt_repairs_as_the_exact_solution_does() -> None:
    """After one weight is pruned, the others are the least-squares solution without it."""
    weight_OI, gram_II = problem(outputs=1, inputs=8, tokens=4000)
    sparse_OI, mask_OI = SparseGPT(damping=1e-9).prune(weight_OI, gram_II, pattern=Pattern(7, 8))
    pruned = int((~mask_OI[0]).nonzero())
    keep = list(range(pruned + 1, 8))  # earlier weights do not change any more
    wanted = torch.linalg.solve(gram_II[keep][:, keep], gram_II[keep][:, [pruned]]) * weight_OI[0, pruned]
    assert torch.allclose(sparse_OI[0, keep] - weight_OI[0, keep], wanted[:, 0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", [SparseGPT(), Alps()])
def test_a_gram_matrix_that_is_not_finite_is_refused(method: SparsityMethod) -> None:
    """NaN raises an error instead of giving a mask without meaning."""
    weight_OI, gram_II = problem()
    gram_II[3, 3] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        method.prune(weight_OI, gram_II, pattern=Pattern(2, 4))


def test_refit_on_the_support_ends_at_least_squares() -> None:
    """Every step lowers the error, and many steps reach the solution of each output's normal equations."""
    weight_OI, gram_II = problem()
    gram_II.diagonal().add_(0.01 * gram_II.diagonal().mean())
    start_OI, mask_OI = Wanda().prune(weight_OI, gram_II, pattern=Pattern(2, 4))
    errors = []
    for steps in (0, 1, 2, 4, 8, 200):
        found_OI, error_O = solve_on_support(start_OI, mask_OI, gram_II=gram_II, wanted_OI=weight_OI, steps=steps)
        assert not found_OI[~mask_OI].any()
        assert torch.allclose(error_O, output_energy(found_OI - weight_OI, gram_II), rtol=1e-3)
        errors.append(error(found_OI, weight_OI, gram_II))
    assert errors == sorted(errors, reverse=True)
    for row, mask_I in enumerate(mask_OI):
        exact = torch.linalg.solve(gram_II[mask_I][:, mask_I], gram_II[mask_I] @ weight_OI[row])
        assert torch.allclose(found_OI[row, mask_I], exact, rtol=1e-2, atol=1e-2)


def test_rounds_go_from_few_weights_to_all() -> None:
    """Each round prunes more than the one before, and the last one as much as the recipe says."""
    steps = Sparsity(pattern=0.6, rounds=4).steps()
    assert [step.removed for step in steps] == sorted({step.removed for step in steps})
    assert steps[-1] == Pattern.parse(0.6)
    assert [str(step) for step in Sparsity(pattern="2:8", rounds=3).steps()] == ["4:8", "3:8", "2:8"]
    assert [str(step) for step in Sparsity(pattern="2:4", rounds=2).steps()] == ["3:4", "2:4"]
    with pytest.raises(ValueError, match="at most 2 rounds"):
        Sparsity(pattern="2:4", rounds=3)


def test_a_file_that_breaks_the_pattern_is_found() -> None:
    """One weight too many in one group of a saved matrix is counted in both layouts, and refused."""
    weight_OI = Wanda().prune(*problem(), pattern=Pattern(2, 4))[0]
    claim = SparseClaim((("a", False), ("b", True)), 2 * weight_OI.numel(), 2, 4)

    def counted(weight: Tensor, *, transposed: bool = False, pattern: list[int] | None) -> list[int]:
        holder = nn.Module()
        holder.register_module("saved", nn.Linear(1, 1))
        holder.get_submodule("saved").weight = nn.Parameter(weight)
        return counts(holder, "saved", transposed=transposed, pattern=pattern)

    whole = [
        counted(weight_OI, pattern=[2, 4]),
        counted(weight_OI.T.contiguous(), transposed=True, pattern=[2, 4]),
    ]
    assert claim.problem(whole) is None
    assert whole[0] == whole[1] == [weight_OI.numel() // 2, weight_OI.numel() // 4, 0]
    weight_OI[0, (weight_OI[0] == 0).nonzero()[0]] = 1.0
    broken = [counted(weight_OI, pattern=[2, 4]), whole[1]]
    assert "1 matrices break the pattern 2:4: a (1 groups)" in str(claim.problem(broken))
    share = SparseClaim((("a", False),), weight_OI.numel(), zeros=weight_OI.numel() // 2)
    assert "asks for" in str(share.problem([counted(weight_OI, pattern=None)]))
