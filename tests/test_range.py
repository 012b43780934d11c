"""What every encoding holds: far positions in half precision and beyond float32's whole numbers, and odd values of the
flag."""

import contextlib

import pytest
import torch
from tiny import bound

import posenc
from core import specs
from core.place import Place
from model import GPT, Cache, GPTConfig

CPU = torch.device("cpu")
# No table of 2^24 rows fits, and beside the 2^24th power of a distance no logit counts.
UNFIT = ("recurrent", "transformer_xl", 'dape(form="power")')
# Forms that no test trains, beside all others.
SPECS = [*posenc.every(), 'dape(form="power")', "rerope(leak=8)", "randomized(inner=xpos)"]
LONGROPE = f'rope(scaling="longrope", short_factor={[1] * 8}, long_factor={[2] * 8}, attention_factor=1.9)'


def logits(spec, T, calls, dtype=torch.float32, place=None):
    """Those of a model for tokens at the positions of each call, which enter a cache one after another."""
    settings = dict(vocab_size=50, n_layer=1, n_embd=64, n_head=4, train_length=T, zero_init=False)
    model = GPT(GPTConfig(posenc=spec, **settings), 1).eval()
    calls = [pos[pos < model.max_length] for pos in calls]
    calls = [pos for pos in calls if len(pos)]
    cache = Cache(total=int(calls[-1][-1]) + 1)
    if place is None:
        model.to(dtype)
    else:
        place.prepare(model)
    with torch.no_grad(), place.autocast() if place else contextlib.nullcontext():
        read = [model(7 * torch.arange(len(pos))[None] % 50, past=cache, pos=pos) for pos in calls]
    return torch.cat(read, dim=1).double()


@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_holds_64_training_lengths(spec):
    """Both ways that commands have: autocast over prepared weights, and a model that is half precision itself. The
    first call reaches over 16,384 tokens, as a text does that is read at once."""
    T = 16 if spec == "recurrent" else 512  # recurrent's table takes as many steps as there are positions
    last = 64 * T
    calls = torch.linspace(0, min(last, 1 << 14) - 9, 24).long(), torch.arange(last - 8, last)
    exact = logits(spec, T, calls)
    for dtype in (torch.float16, torch.bfloat16):
        # Every layer rounds eight times: q k v, logits, weights, y, and once each product after them.
        rounding = bound(dtype, 2 * 8 + 1, scale=exact.std().item())
        for place in (None, Place(CPU, dtype)):
            half = logits(spec, T, calls, dtype, place)
            assert (half - exact).abs().max() < rounding, (dtype, place)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in UNFIT])
@pytest.mark.parametrize("start", [1 << 24, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_positions_past_float32s_whole_numbers_are_exact_or_refused(spec, start):
    """They differ from float64 by what float32 rounds an angle of 2^15 by."""
    calls = torch.arange(4), start // 2 + torch.arange(4), torch.arange(start - 16, start + 8)
    found, exact = (logits(spec, 64, calls, dtype) for dtype in (torch.float32, torch.float64))
    # An angle below 2^15, and the turns of what is above it, are rounded once each.
    assert (found - exact).abs().max() < bound(torch.float32, 2, scale=2**15 * exact.std().item())


def test_a_table_that_is_too_long_is_refused():
    model = GPT(GPTConfig(posenc="recurrent", vocab_size=50, n_layer=1, n_embd=8, n_head=1), 1)
    with pytest.raises(ValueError, match=r"recurrent has 1048576 positions.*--crop"):
        model(torch.zeros(1, 1, dtype=torch.long), pos=torch.tensor([1 << 24]))


def test_angles_below_2_to_15_are_the_plain_product_on_every_device(monkeypatch):
    """A model that is compiled, or on a GPU, looks at no position."""
    pos = torch.cat((torch.arange(300), torch.arange((1 << 15) - 300, 1 << 15)))

    def frequency(dtype):
        return posenc.frequencies(64, 1e4, dtype)

    plain = pos[:, None].float() * frequency(torch.float32)
    assert torch.equal(posenc.angles(pos, torch.float32, frequency), plain)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(posenc.angles(pos, torch.float32, frequency), plain)


@pytest.mark.parametrize(
    ("trained", "laid_over", "merged", "title"),
    [
        ('rope(scaling="yarn", factor=4)', 'rope(scaling="none")', "rope(scaling='none')", 'rope(scaling="none")'),
        ('rope(scaling="yarn", factor=4)', "rope", "rope(scaling='yarn', factor=4)", ...),
        ('rope(scaling="yarn", factor=4)', "rope(factor=2)", "rope(scaling='yarn', factor=2)", ...),
        ('rope(scaling="yarn", factor=4)', 'rope(scaling="yarn")', "rope(scaling='yarn', factor=4)", ...),
        ('rope(scaling="yarn", factor=4)', "alibi", "alibi", ...),
        (LONGROPE, 'rope(scaling="yarn")', "rope(scaling='yarn')", 'rope(scaling="yarn")'),
        ('rope(base=500.0, scaling="yarn", beta_fast=8, truncate=False)', 'rope(scaling="linear", factor=2)',
         "rope(base=500.0, scaling='linear', factor=2)", ...),
        ("rope(base=500.0)", "rope", "rope(base=500.0)", ...),
        ("rope(base=10000.0)", "rope", "rope(base=10000.0)", "rope"),
        ('rope(scaling="yarn", factor=4)', "rerope", "rerope(scaling='yarn', factor=4)", ...),
        ('rope(scaling="dynamic", factor=1)', 'rerope(scaling="none", window=9)',
         "rerope(scaling='none', window=9)", 'rerope(scaling="none", window=9)'),
        ('learned(overflow="interpolate", factor=4)', 'learned(overflow="clamp")', "learned(overflow='clamp')",
         'learned(overflow="clamp")'),
        ("randomized(inner=rope(base=5.0), length=999)", 'randomized(inner=rope(scaling="yarn"))',
         '''randomized(inner="rope(base=5.0, scaling='yarn')", length=999)''', ...),
        ("randomized(inner=t5)", "randomized(inner=rope)", "randomized(inner=rope)", ...),
        (['rope(scaling="yarn", factor=4)', "none"], 'rope(scaling="none")', ["rope(scaling='none')", "none"], ...),
        (["rope(base=5.0)", "none"], "alibi", "alibi", ...),
        ("rope(base=5.0)", "", "rope(base=5.0)", ...),
    ],
)  # fmt: skip
def test_another_scaling_begins_with_its_defaults_and_a_row_says_all_that_is_in_force(
    trained, laid_over, merged, title
):
    found = specs.merge(trained, laid_over) if laid_over else trained
    assert found == merged
    specs.build(found, 2, n_embd=32, n_head=2, n_kv_head=2, head_dim=16, train_length=64)
    assert specs.title(laid_over, found) == str(merged if title is ... else title)


def test_every_form_names_arguments_that_there_are():
    for cls in posenc.ENCODINGS.values():
        for key, forms in cls.forms.items():
            assert forms.keys() <= set(cls.arguments[key]), cls
            assert {name for read in forms.values() for name in read} <= cls.arguments.keys(), cls
        assert set(cls.nested) <= cls.arguments.keys()


DIGITS = "9" * 400


@pytest.mark.parametrize(
    "spec",
    [
        "randomized(inner=" * 5000, "randomized(inner=" * 5000 + "rope" + ")" * 5000, "(" * 100_000, "[" * 100_000,
        "rope(base=" + "-" * 50_000 + "1)", f"rope(base={'1+' * 20_000}1)", f"rope(base={'[' * 150}{']' * 150})",
        "x" * 100_000, f"rope({'x' * 90_000}=1)", f"rope(base='{'x' * 90_000}')", f"rope(scaling='{'x' * 90_000}')",
        f"rope(dims={DIGITS})", f"rope(base={DIGITS})", f"rope(dims={DIGITS * 20})", "rope(base=1if 2else 3)",
        f'rope(scaling="longrope", short_factor=[{DIGITS}, 1], long_factor=[1, 1])', "t5(buckets=999999999998)",
        "shaw(clip=999999999999)", f"rerope(window={2**63})", f"randomized(length={2**39})",
        "xpos(scale_base=1e-300)", "rope(base=nan)", "rope\0", ["rope"] * 1_000_000, ["(" * 100_000], [["rope"]], [1],
    ],
    ids=lambda spec: str(spec[:40]) if isinstance(spec, str) else "list",
)  # fmt: skip
def test_odd_values_of_the_flag_are_one_short_line(spec, capsys):
    with pytest.raises(ValueError, match=r"\w") as refused:
        GPTConfig(posenc=spec)
    said = [str(refused.value)]
    for pair in ((spec, "rope"), ("rope", spec)):
        with contextlib.suppress(ValueError):  # of what only a model is too small for
            said.append(str(specs.merge(*pair)))
    assert all(len(line) < 1000 and "\n" not in line for line in said)
    assert capsys.readouterr().err == ""
