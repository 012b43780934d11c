"""Our Muon against torch's, and which parameters decay."""

import copy
import math

import pytest
import torch
from tiny import bound

from core import optimizers, runs
from core.place import Place
from core.settings import Config


def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 20, 20), (8, 64, 64)):
        x = torch.randn(shape, dtype=torch.float64)
        y = optimizers.orthogonalise(x)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        inside = u.mT @ y @ v.mT
        values = inside.diagonal(dim1=1, dim2=2)
        # 5 steps of 3 products, on which small values grow.
        rounding = bound(torch.float64, 5 * 3 * max(shape), scale=3.4445**5)
        assert (inside - torch.diag_embed(values)).abs().max() < rounding
        small = s < s.norm(dim=1, keepdim=True) / 700
        assert 0.67 < values[~small].min() <= values.max() < 1.21
        assert ((values[small] > 0) & (values[small] < 0.7)).all()
        assert small.any() == (shape == (8, 64, 64))


def test_muon_is_torchs_muon():
    torch.manual_seed(0)
    start = [torch.randn(16, 40), torch.randn(40, 16), torch.randn(16, 40)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    one = optimizers.Muon(ours, 0.02, 0.1, 0.95, torch.bfloat16)
    two = torch.optim.Muon(theirs, 0.02, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        one.step()
        two.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        # 5 steps of 3 products round independently, and the norm of independent errors grows as their number's root.
        assert (mine - other).norm() < bound(torch.bfloat16, math.sqrt(5 * 3)) * (other - before).norm()


def test_momentum_survives_a_checkpoint():
    weights = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    whole = optimizers.Muon(weights, 0.1, 0.0, 0.9)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    whole.step()
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    again = optimizers.Muon(copies, 0.1, 0.0, 0.9)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    for weight, twin in zip(weights, copies, strict=True):
        twin.grad = weight.grad
    whole.step()
    again.step()
    assert all(torch.equal(weight, twin) for weight, twin in zip(weights, copies, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_blocks_matrices_decay(optimizer):
    config = Config(posenc="t5", vocab_size=20, n_layer=1, n_embd=32, bias=True, norm_affine=True, optimizer=optimizer)
    model = runs.build(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for one in optimizers.make(model, config, Place(torch.device("cpu"), torch.float32)):
        for group in one.param_groups:
            for parameter in group["params"]:
                seen.append(names[id(parameter)])
                matrix = seen[-1].startswith("blocks.") and parameter.dim() == 2
                assert (group["weight_decay"] > 0) == matrix
    assert sorted(seen) == sorted(names.values())
