"""What every encoding goes through in a run: steps in bfloat16, an exact resume, two processes, torch.compile."""

import shutil

import pytest
import small
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from test_train import metrics, same, state
from tiny import bound, command, step_sums, sums
from torch.nn.parallel import DistributedDataParallel

import posenc
from core import log
from model import GPT, GPTConfig
from posenc import ENCODINGS

# What is trained: all of them and their variants; values that stretch a finished run are for test time.
TRAINED = [spec for name, cls in ENCODINGS.items() for spec in (name, *cls.variants)]
# Schedules over the layers, and what today's models add to attention, one of each kind.
SCHEDULES = {
    "windows": {"posenc": ["rope(window=5)", "none"], "temper": "ssmax"},
    "chunks": {"posenc": ["rope(chunk=6)", "alibi(temper='none')"], "temper": "llama4", "sink_logit": True},
    "gates": {"posenc": "fox(window=9)", "temper": "adaptive", "gate": "elementwise", "qk_norm": True},
    "growing": {"posenc": ["rope(values=True, window=8)", "rope"], "window_schedule": {0.0: 0.25, 0.7: 1.0}},
    "convolutions": {"posenc": "rope", "short_conv": True, "learn_qk_scale": True, "gate": "softplus"},
}
SCHEDULES |= {f"recipes/{name}": settings for name, settings in small.RECIPES.items()}  # inkling is an encoding too
ALL = [*TRAINED, *SCHEDULES]
# One of each kind is tested always, all others with the slow tests: nothing, an addition to the embeddings, biases, a
# rotation, logits, a memory, a schedule.
FEW = ("none", "learned", "alibi", "t5", "rope", "fox", "transformer_xl", "windows")
T = 16


def model_of(spec, n_layer=2):
    """A model with that encoding, or one of the SCHEDULES, whose every parameter matters."""
    settings = SCHEDULES.get(spec, {"posenc": spec, "n_layer": n_layer})
    settings = {key: value for key, value in settings.items() if key != "window_schedule"}  # It is not the model's.
    sizes = {"vocab_size": 50, "n_layer": 2, "n_embd": 32, "train_length": T}
    model = GPT(GPTConfig(**(sizes | settings), zero_init=False))
    torch.manual_seed(7)
    added = [p for name, p in model.blocks.named_parameters() if not name.endswith(("weight", "bias"))]
    for parameter in (*model.posenc.parameters(), *added):
        torch.nn.init.normal_(parameter)
    model.redraw(T, seed=3)
    return model


def nearly(found, expected):
    """Whether the gradients of two ways differ by rounding alone. Its scale is the model's largest gradient: where
    terms cancel (a softmax knows no constant, so that fire's last bias gets none), what is added is larger than what
    comes out."""
    terms = step_sums(model_of("none").config, tokens=4 * T)
    rounding = bound(torch.float32, terms, scale=max(x.abs().max().item() for x in expected.values()))
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=0, atol=rounding) for name in expected
    )


def gradients(model, loss):
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "spec", [spec if spec in FEW else pytest.param(spec, marks=pytest.mark.slow) for spec in (*ENCODINGS, *SCHEDULES)]
)
def test_it_learns_in_bfloat16_and_resumes_exactly(spec, corpus, tmp_path, call_script, monkeypatch):
    """30 steps, and the last 15 of them once more from the checkpoint between, end in the same bits."""
    monkeypatch.setattr(log.Log, "draw", lambda log: None)
    settings = SCHEDULES.get(spec, {"posenc": spec}) | dict(
        max_steps=30, checkpoint_interval=15, eval_interval=30, dtype="bfloat16", length_targets=0
    )
    out, again = tmp_path / "run", tmp_path / "again"
    done = call_script("train.py", *command(corpus, out, **settings)[2:])
    assert done.returncode == 0, done.stderr
    loss = metrics(out, "loss")
    assert loss[30] < loss[1] - 1
    shutil.copytree(out, again)
    (again / "ckpt_prev.pt").replace(again / "ckpt.pt")
    assert state(again)["step"] == 15
    call_script("train.py", *command(corpus, again, **settings)[2:])
    assert same(state(again), state(out) | {"config": state(again)["config"]})
    assert metrics(again, "loss") == loss


def half_of(spec, rank):
    """The gradients of a batch of which this process computes its half. What holds the group of processes is gone when
    it returns: a wrapper that outlives its group can wait for it forever."""
    tokens = torch.randint(50, (4, T + 1), generator=torch.Generator().manual_seed(5))[2 * rank : 2 * rank + 2]
    model = model_of(spec)
    forward = DistributedDataParallel(model)
    return gradients(model, forward(tokens[:, :-1], tokens[:, 1:]).mean())


def one_of_two(rank, results):
    """A process that computes its half of a batch with every encoding in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}/meeting", rank=rank, world_size=2)
    for index, spec in enumerate(ALL):
        found = half_of(spec, rank)
        if rank == 0:
            torch.save(found, results / f"{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_compute_the_gradients_of_one(tmp_path):
    tiny.prepare_server()
    multiprocessing.start_processes(one_of_two, (tmp_path,), nprocs=2, start_method=tiny.METHOD)
    tokens = torch.randint(50, (4, T + 1), generator=torch.Generator().manual_seed(5))
    for index, spec in enumerate(ALL):
        model = model_of(spec)
        expected = gradients(model, model(tokens[:, :-1], tokens[:, 1:]).mean())
        assert nearly(torch.load(tmp_path / f"{index}.pt"), expected), spec


@pytest.mark.parametrize(
    "spec",  # transformer_xl takes as long as all the others of the few
    [spec if spec in set(FEW) - {"transformer_xl"} else pytest.param(spec, marks=pytest.mark.slow) for spec in ALL],
)
def test_compiled_it_computes_the_same(spec):
    """Traced and differentiated by torch.compile; the generated code itself is torch's to test."""
    tokens = torch.randint(50, (2, T + 1))
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = model_of(spec, n_layer=1)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        loss = forward(tokens[:, :-1], tokens[:, 1:]).mean()
        found.append((loss.item(), gradients(model, loss)))
    assert found[0][0] == pytest.approx(found[1][0], rel=bound(torch.float32, sums(model.config, T)))
    assert nearly(found[1][1], found[0][1])


@pytest.mark.parametrize(
    "spec", [spec for spec in posenc.every() if posenc.parse(spec)[0].relative and "dynamic" not in spec]
)
def test_segments_over_a_memory_equal_the_whole_in_one_layer(spec):
    """With more layers they do not: the memory's own context is a segment shorter. (dynamic turns by other angles at
    other lengths.)"""
    config = GPTConfig(posenc=spec, vocab_size=50, n_layer=1, n_embd=32, train_length=T, zero_init=False)
    model, tokens = GPT(config).double().eval(), torch.randint(50, (2, 2 * T + 1))
    for parameter in model.posenc.parameters():
        torch.nn.init.normal_(parameter)
    x, y = tokens[:, :-1], tokens[:, 1:]
    exact = bound(torch.float64, sums(config, 2 * T), scale=64)  # logits of attention that count are below 64
    assert torch.allclose(model(x, y, segments=2), model(x, y), rtol=0, atol=exact)
    assert not torch.allclose(model(x[:, T:], y[:, T:]), model(x, y)[:, T:], rtol=0, atol=1e-3)


def test_no_gradient_flows_into_the_memory():
    model, tokens = model_of("transformer_xl"), torch.arange(2 * T + 1)[None]
    model(tokens[:, :-1], tokens[:, 1:], segments=2)[:, T:].sum().backward()
    gradient = model.token.weight.grad.abs().sum(-1)
    assert gradient[:T].sum() == 0
    assert gradient[T : 2 * T].min() > 0


def test_segments_train_resume_and_are_refused_for_absolute_positions(corpus, tmp_path, call_script):
    settings = dict(posenc="transformer_xl", segments=2, max_steps=20, checkpoint_interval=10)
    out, again = tmp_path / "run", tmp_path / "again"
    assert call_script("train.py", *command(corpus, out, **settings)[2:]).returncode == 0
    assert metrics(out, "loss")[20] < metrics(out, "loss")[1] - 0.5
    shutil.copytree(out, again)
    (again / "ckpt_prev.pt").replace(again / "ckpt.pt")
    call_script("train.py", *command(corpus, again, **settings)[2:])
    assert same(state(again)["model"], state(out)["model"])
    for spec in ("sinusoidal", "path"):
        done = call_script("train.py", *command(corpus, tmp_path / "no", **(settings | {"posenc": spec}))[2:])
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"needs relative positions, token by token: {spec}" in done.stderr
