"""Every encoding against its formula, written out in plain loops, and the rules that hold for all of them."""

import math
import re
from pathlib import Path

import pytest
import torch
from hooks import rotate
from tiny import bound, sums

import posenc
from model import GPT, Cache, GPTConfig
from posenc import ENCODINGS, Encoding
from zoo import content, randomized

SIZES = dict(n_embd=32, n_head=4, n_kv_head=2, head_dim=8, train_length=16)


def make(spec, **sizes):
    return posenc.build(spec, 1, **(SIZES | sizes))[0]


def test_sinusoidal_is_the_papers_formula():
    pos = [0, 1, 15, 16, 500]
    pe = make("sinusoidal").embed(torch.tensor(pos))
    rounding = bound(torch.float32, 2, scale=500)  # the largest angle: a frequency, and its product with a position
    for row, p in enumerate(pos):
        for i in range(16):
            angle = p / 10000 ** (2 * i / 32)
            assert pe[row, 2 * i].item() == pytest.approx(math.sin(angle), abs=rounding)
            assert pe[row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=rounding)


def test_rope_turns_each_pair_by_its_angle():
    q, k = torch.randn(1, 4, 3, 8, dtype=torch.float64), torch.randn(1, 2, 3, 8, dtype=torch.float64)
    pos = torch.tensor([0, 7, 1000])
    rounding = bound(torch.float64, 2, scale=1000 * q.abs().max().item())  # of the largest angle
    turned, _ = rotate(make("rope(base=500)"), q, k, pos, pos, 16)
    for t, p in enumerate(pos.tolist()):
        for m in range(4):
            turn = complex(math.cos(p * 500 ** (-2 * m / 8)), math.sin(p * 500 ** (-2 * m / 8)))
            expected = complex(q[0, 1, t, m], q[0, 1, t, m + 4]) * turn
            assert turned[0, 1, t, m].item() == pytest.approx(expected.real, abs=rounding)
            assert turned[0, 1, t, m + 4].item() == pytest.approx(expected.imag, abs=rounding)


def test_p_rope_leaves_the_lowest_frequencies_unturned():
    k = torch.randn(1, 2, 3, 8)
    pos = torch.tensor([3, 40, 41])
    _, half = rotate(make("rope(fraction=0.5)"), k, k, pos, pos, 16)
    _, full = rotate(make("rope"), k, k, pos, pos, 16)
    high, low = [0, 1, 4, 5], [2, 3, 6, 7]  # pairs are (m, m + D/2), the highest frequency first
    assert torch.equal(half[..., high], full[..., high])
    assert torch.equal(half[..., low], k[..., low])
    assert torch.equal(rotate(make("rope(fraction=0.0)"), k, k, pos, pos, 16)[1], k)


def test_rope_computes_angles_in_float32_when_the_model_is_in_bfloat16():
    k = torch.randn(1, 2, 2, 8, dtype=torch.bfloat16)
    pos = torch.tensor([1000, 1001])  # bfloat16 cannot tell these apart
    _, turned = rotate(make("rope"), k, k, pos, pos, 16)
    _, exact = rotate(make("rope"), k.double(), k.double(), pos, pos, 16)
    assert turned.dtype == torch.bfloat16
    assert (turned.double() - exact).abs().max() < bound(torch.bfloat16, 1, scale=exact.abs().max().item())
    same = rotate(make("rope"), k[:, :, :1].expand_as(k), k[:, :, :1].expand_as(k), pos, pos, 16)[1]
    assert not torch.equal(same[:, :, 0], same[:, :, 1])


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (8, [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]),  # the paper, section 3
        (12, [2.0**-h for h in range(1, 9)] + [0.70710678, 0.35355339, 0.17677670, 0.08838835]),  # the authors' code
        (1, [0.00390625]),
    ],
)
def test_alibi_slopes(heads, slopes):
    encoding = make("alibi", n_head=heads, n_kv_head=heads)
    bias = encoding.bias(torch.tensor([5, 9]), torch.tensor([0, 5]))  # distances 5 and 0, 9 and 4
    for head, slope in enumerate(slopes):
        assert bias[head].flatten().tolist() == pytest.approx(
            [-5 * slope, 0, -9 * slope, -4 * slope], rel=bound(torch.float32, 2)
        )


def test_t5_buckets_are_the_published_ones():
    encoding = make("t5")
    n = torch.tensor([0, 1, 15, 16, 17, 112, 113, 128, 100000])
    assert encoding.bucket(n).tolist() == [0, 1, 15, 16, 16, 30, 31, 31, 31]
    for distance in range(1000):  # the formula, in exact integers where it has a border: n/16 >= 8^(b/16)
        if distance < 16:
            expected = distance
        else:
            expected = min(31, 16 + max(b for b in range(64) if distance**16 >= 16**16 * 8**b))
        assert encoding.bucket(torch.tensor(distance)).item() == expected


def test_t5_reads_one_scalar_for_each_head_and_bucket():
    encoding = make("t5")
    torch.nn.init.normal_(encoding.weight)
    bias = encoding.bias(torch.tensor([200, 3]), torch.tensor([0, 3]))
    for head in range(4):
        assert bias[head, 0, 0] == encoding.weight[31, head]
        assert bias[head, 1, 1] == encoding.weight[0, head]


def test_learned_past_its_table():
    pos = torch.tensor([0, 15, 16, 40])
    clamped = make('learned(overflow="clamp")')
    torch.nn.init.normal_(clamped.weight)
    assert torch.equal(clamped.embed(pos), clamped.weight[[0, 15, 15, 15]])
    stretched = make('learned(overflow="interpolate", factor=4)')
    torch.nn.init.normal_(stretched.weight)
    assert stretched.max_length == 64
    between = 0.75 * stretched.weight[0] + 0.25 * stretched.weight[1]
    assert torch.allclose(stretched.embed(torch.tensor([1]))[0], between)
    assert torch.allclose(stretched.embed(torch.tensor([60, 63])), stretched.weight[[15, 15]])


def model_of(spec, n_layer=2):
    """A model in float64 whose every parameter matters."""
    settings = dict(vocab_size=50, n_embd=32, train_length=64, zero_init=False)
    model = GPT(GPTConfig(posenc=spec, n_layer=n_layer, **settings)).double().eval()
    torch.manual_seed(7)
    for parameter in model.posenc.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("spec", posenc.every())
def test_relative_is_what_the_class_says(spec):
    """For one length of the whole context, which some encodings scale with."""
    if "randomized" in spec:
        assert not model_of(spec).posenc[0].relative  # its strides differ from length to length
        return
    if "interpolate" in spec:
        pytest.skip("has no positions beyond a thousand")
    model, tokens = model_of(spec), torch.randint(50, (1, 64))
    here, there = (model(tokens, pos=torch.arange(64) + start, past=Cache(total=1070)) for start in (0, 1003))
    change = (here - there).abs().max().item()
    rounding = bound(torch.float64, sums(model.config, 64), scale=1003 + 64)  # the largest angle
    assert change < rounding if model.posenc[0].relative else change > 1e-3


@pytest.mark.parametrize("spec", [spec for spec in posenc.every() if spec != "none"])
def test_position_matters(spec):
    """Swapping two tokens changes what comes later; without an encoding, one layer of attention does not see it, nor do
    two feed-forward layers around it. Nor does one layer with repo, whose places say what a token is alone."""
    model, tokens = model_of(spec, n_layer=2 if spec in ("ffn", "repo") else 1), torch.randint(50, (1, 8))
    swapped = tokens.clone()
    tokens[0, 5:7], swapped[0, 5:7] = torch.tensor([1, 2]), torch.tensor([2, 1])
    before, after = (model(x, past=Cache(total=1024)) for x in (tokens, swapped))
    assert (before - after)[0, -1].abs().max() > 1e-6


def test_none_alone_is_blind_in_one_layer_and_not_in_two():
    tokens = torch.randint(50, (1, 8))
    tokens[0, 1], tokens[0, 2] = 1, 2
    swapped = tokens.clone()
    swapped[0, 1], swapped[0, 2] = 2, 1
    change = {}
    for layers in (1, 2):
        model = GPT(GPTConfig(posenc="none", vocab_size=50, n_layer=layers, n_embd=32, zero_init=False)).double()
        change[layers] = (model(tokens) - model(swapped))[0, -1].abs().max().item()
    assert change[1] < bound(torch.float64, sums(model.config, 8), scale=4)  # the size of its logits
    assert change[2] > 1e-6


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_class_documents_itself(name):
    cls = ENCODINGS[name]
    assert cls.__doc__
    assert cls.name == name


def test_list_is_cycled_and_shared_tables_stay_one():
    layers = posenc.build(["t5", "t5", "none"], 6, **SIZES)
    assert [layer.name for layer in layers] == ["t5", "t5", "none"] * 2
    assert layers[0] is layers[1] is layers[3]


def test_arguments_are_literals_and_never_evaluated(tmp_path):
    trap = tmp_path / "ran"
    for spec in (
        f"rope(base=open({str(trap)!r}, 'w'))",
        "rope(base=1+1)",
        "rope(1000.0)",
        "rope(**{})",
        "rope(base={[1]: 2})",
        "rope(base=2.0, base=3.0)",
        "rope(base=1e999)",
        "a.b",
        "rope;1",
        "",
    ):
        with pytest.raises(ValueError, match=r"rope|name"):
            make(spec)
    assert not trap.exists()
    assert make("rope(base=500_000)").base == 500000


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rop", "did you mean 'rope'"),
        ("rope(bas=3)", "did you mean 'base'"),
        ("none(base=3)", "takes no arguments"),
        ("rope(base='x')", "expected float"),
        ("rope(fraction=2)", "0 ... 1"),
        ("learned(overflow='crash')", "'error', 'clamp', 'interpolate'"),
        ("t5(buckets=7)", "multiple of 2"),
        ("xpos(gamma=0)", "above 0"),
        ("xpos(dims=4)", "no argument 'dims'"),
        ("rerope(scaling='dynamic')", "unnecessary"),
        ("rope(scaling='longrope')", "short_factor=[...] with 4 numbers"),
        ("rope(dims=10)", "1 ... 8"),
        ("rope(dims=3)", "even"),
        ("rope(factor=4)", "does nothing without a scaling"),
        ("randomized(inner=randomized)", "another"),
        ("randomized(inner=rop)", "did you mean 'rope'"),
        ("randomized(length=3)", "at least 16"),
        ("fire(c=0)", "above 0"),
        ("shaw(clip=0)", "at least 1"),
        ("repo(base=1)", "above 1"),
        ("selective_rope(taps=0)", "1 ... 64"),
        ("selective_rope(rank=33)", "1 ... 32"),
        ("path(rank=0)", "1 ... 10^4"),
        ("alibi(slopes='mine')", "'authors', 'paper'"),
        ("alibi(heads=0.1)", "a share that gives 1 ... 4 heads"),
        ("alibi(heads=1.5)", "a share that gives 1 ... 4 heads"),
        ("pope(base=1)", "above 1"),
        ("pope(start='here')", "'zero', 'uniform'"),
        ("inkling(extent=-3)", "at least 1"),
        ("scale_invariant(tau=0)", "above 0"),
        ([], "empty"),
        (["rope", "learned"], "would do nothing"),
    ],
)
def test_mistakes_say_what_is_allowed(spec, said):
    with pytest.raises(ValueError, match=r"\w") as caught:
        make(spec)
    assert said in str(caught.value)


def test_merge_lays_arguments_over_those_of_the_same_encoding():
    assert posenc.merge("rope(base=500.0)", "rope(fraction=0.5)") == "rope(base=500.0, fraction=0.5)"
    assert posenc.merge("rope(base=500.0)", "alibi") == "alibi"
    assert posenc.merge("rope", "rope") == "rope"
    assert posenc.merge(["rope", "none"], "rope(base=5.0)") == ["rope(base=5.0)", "none"]
    assert posenc.merge(["rope", "none"], "alibi") == "alibi"
    assert posenc.merge("rope", ["rope", "none"]) == ["rope", "none"]


def test_a_list_or_a_derived_encoding_takes_over_arguments():
    assert posenc.merge(["rope(base=500.0)", "none"], "rerope(window=9)") == ["rerope(base=500.0, window=9)", "none"]
    assert posenc.merge("rope(base=500.0)", "self_extend") == "self_extend(base=500.0)"
    assert posenc.derives("rerope", "rope")
    assert not posenc.derives("rope", "rerope")
    with pytest.raises(ValueError, match="did you mean 'rope'"):
        posenc.merge("rope", ["rop"])


def test_randomized_takes_every_hook_from_its_inner_encoding():
    own = {"setup", "init_parameter", "redraw", "positions", "require", "once", "once_per_weights", "checked", "train"}
    own |= {"check_sinks"}  # reads a flag
    hooks = {name for name, value in vars(Encoding).items() if callable(value) and not name.startswith("_")}
    assert hooks - own == set(randomized.DELEGATED) & hooks
    flags = {name for name in vars(content.Shaw) if name in ("embeds", "biases", "writes_out")}
    assert flags < set(randomized.DELEGATED)


@pytest.mark.parametrize("spec", ["transformer_xl", "recurrent", "randomized(inner=transformer_xl)"])
def test_tables_follow_the_weights_whatever_changes_them(spec):
    """torch's fused optimisers change parameters without telling their version."""
    model, tokens = model_of(spec).train(), torch.randint(50, (1, 64))

    def evaluated():
        with torch.inference_mode():
            return model.eval()(tokens)

    before = evaluated()
    optimizer = torch.optim.AdamW(model.posenc.parameters(), lr=0.1, fused=True)
    model.train()(tokens).sum().backward()
    optimizer.step()
    after = evaluated()
    fresh = model_of(spec)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after, fresh(tokens))
    assert not torch.equal(after, before)
    model.load_state_dict(model_of(spec).state_dict())
    assert torch.allclose(evaluated(), before)


@pytest.mark.parametrize("spec", posenc.every())
def test_distances_stay_apart_in_a_model_in_bfloat16(spec):
    """Positions 1000 and 1001 are the same number there."""
    encoding = make(spec, train_length=64)
    for name, parameter in encoding.named_parameters():
        with torch.no_grad():
            encoding.init_parameter(name, parameter, torch.Generator().manual_seed(1))
    n = torch.arange(60, 64)
    expected = [encoding.bias(n + 1000, n)] if encoding.biases else []
    expected += [encoding.embed(n)] if encoding.embeds else []
    encoding.to(torch.bfloat16)
    found = [encoding.bias(n + 1000, n)] if encoding.biases else []
    found += [encoding.embed(n)] if encoding.embeds else []
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_the_class_in_the_readme_is_a_new_flag():
    source = re.search(
        r"```python\n(import torch.*?)```",
        (Path(posenc.__file__).parent / "README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )[1]
    exec(source, {})
    try:
        test_relative_is_what_the_class_says("slope")
        test_position_matters("slope")
        assert make("slope").distance_bias(torch.arange(5)).shape == (4, 5)
    finally:
        del ENCODINGS["slope"]


def test_the_readme_says_of_every_encoding_whether_it_is_alive():
    readme = (Path(posenc.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")[2:-1] for line in readme[readme.index("| where it acts") :].split("\n\n")[0].splitlines()[2:]
    ]
    said = {
        name: standing
        for row in rows
        for cell, standing in zip(row, ("alive", "control", "history"), strict=True)
        for name in re.findall(r"`(\w+)", cell)
        if name in ENCODINGS
    }
    assert said == {name: cls.standing for name, cls in ENCODINGS.items()}
