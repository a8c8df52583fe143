import math

import pytest
import torch

from trivium.training.muon import Muon, orthogonalise

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(12, 12), (12, 12), (20, 12), (12, 20), (12, 20)]


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 20, 12), (4, 12, 20)])
@pytest.mark.parametrize(("amx", "bar"), [(False, 1e-10), (True, 0.05)])
def test_the_iteration_moves_the_singular_values_and_nothing_else(shape, amx, bar, monkeypatch):
    """`U p(p(...(S))) V^T` by a full decomposition in fp64, p being the published quintic; with AMX it is in bf16."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(stack / torch.linalg.matrix_norm(stack, keepdim=True), full_matrices=False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    error = orthogonalise(stack, COEFFICIENTS, 5, 1e-7) - u @ torch.diag_embed(s) @ vh
    assert error.abs().max() < bar
    assert amx == bool(error.abs().max() > 1e-4)


def test_it_is_torch_s_muon():
    """Same arguments, same gradients, three steps: the same way gone, to the bf16 in which torch iterates."""
    ours, theirs = parameters(0), parameters(0)
    start = [parameter.detach().clone() for parameter in ours]
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    for which, optimizer in ((ours, Muon(ours, **options)), (theirs, torch.optim.Muon(theirs, **options))):
        for step in range(3):
            for parameter, other in zip(which, parameters(step), strict=True):
                parameter.grad = other.grad
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert float(((a - b).norm() / (b - before).norm()).detach()) < 0.02


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_a_step_alone_equals_a_step_in_a_stack(adjust):
    """Who shares a matrix's shape cannot change its update."""
    together, alone = parameters(3), parameters(3)
    Muon(together, lr=0.1, weight_decay=0.0, adjust_lr_fn=adjust).step()
    for parameter in alone:
        Muon([parameter], lr=0.1, weight_decay=0.0, adjust_lr_fn=adjust).step()
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_state_is_torch_s():
    """A checkpoint of either is read by the other: one momentum buffer for each parameter."""
    made = parameters(4)
    ours = Muon(made, lr=0.1)
    ours.step()
    theirs = torch.optim.Muon(made, lr=0.1)
    theirs.load_state_dict(ours.state_dict())
    assert [set(state) for state in theirs.state.values()] == [{"momentum_buffer"}] * len(SHAPES)


def test_the_update_has_the_size_of_adamw_s():
    """RMS 0.2 * lr for a full-rank matrix, up to the iteration's tolerance (singular values of 0.7 to 1.2)."""
    matrix = torch.nn.Parameter(torch.zeros(40, 40))
    matrix.grad = torch.randn(40, 40, generator=torch.Generator().manual_seed(5))
    Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert 0.6 * 0.02 < float(matrix.detach().norm()) / math.sqrt(matrix.numel()) < 1.3 * 0.02


def test_a_parameter_without_gradient_stays():
    made = parameters(6)
    made[1].grad = None
    before = made[1].detach().clone()
    Muon(made, lr=0.1).step()
    assert torch.equal(made[1], before)
