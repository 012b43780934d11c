"""The use of each frequency of a rotation: norms of its pairs, what they add to the logits, and the loss without them.

After Barbero et al. 2024 ("Round and Round We Go! What makes rotary positional encodings useful?", sections 4 and 5).
RoPE turns dimensions in pairs. Frequencies descend with the pair m, so the first pairs turn fastest, and the *last* are
the slow ones.
"""

import contextlib
import math
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from core import report
from core.attention import ready
from core.errors import UserError
from lab.tables import pivot
from model import GPTConfig
from posenc import RoPE
from zoo.randomized import Randomized

# `frequencies` averages these for each pair of dimensions; tables and pictures call them so.
MEASURES = {
    "q_norm": "norm of the queries' pairs",
    "k_norm": "norm of the keys' pairs",
    "absolute": "mean absolute contribution to the logits",
    "signed": "mean contribution to the logits",
}


def rotation(model):
    """The RoPE that all layers share; UserError where they have none, or more than it."""
    inner = [encoding.inner if isinstance(encoding, Randomized) else encoding for encoding in model.posenc]
    ropes = [encoding for encoding in inner if isinstance(encoding, RoPE)]
    if len({id(encoding) for encoding in inner}) == 1 and ropes and not (ropes[0].writes_out or ropes[0].scales):
        return ropes[0]
    why = "does more than turn the pairs of all layers alike" if ropes else "has none"
    raise UserError(f"--frequencies looks at rotations: {model.config.posenc} {why}; name runs of rope or xpos")


def paired(x, dims):
    """x (..., D) -> (..., P, 2): the pairs (m, m + dims/2) that turn, then the other dimensions two by two, with a zero
    where one is left over."""
    turning, still = x[..., :dims].unflatten(-1, (2, -1)).mT, x[..., dims:]
    still = F.pad(still, (0, still.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return torch.cat((turning, still), dim=-2)


def contributions(q, k, dims):
    """q (B, H, T, D), k (B, H, S, D), rotated -> (B, H, T, S, P): what each pair adds to the logit q k / sqrt(D)."""
    (q0, q1), (k0, k1) = (paired(x, dims).unbind(-1) for x in (q * q.shape[-1] ** -0.5, k))
    return q0[:, :, :, None] * k0[:, :, None] + q1[:, :, :, None] * k1[:, :, None]


def wavelengths(model):
    """(P,) float64: the tokens in which each pair makes a turn, in a context of T; inf where it does not turn."""
    rope, T = rotation(model), model.config.train_length
    frequency = rope.frequency(T, torch.float64)[0].detach()
    still = (rope.head_dim - rope.dims + 1) // 2
    first, second = model.posenc[0].positions(torch.arange(2), T).tolist()  # `randomized` takes long steps
    return 2 * math.pi / (second - first) / F.pad(frequency, (0, still))


@torch.inference_mode()
def frequencies(model, windows, place, budget=1 << 21):
    """The use of each pair of dimensions, over the last T input tokens of windows (N, >= T + 1).

    Returns {"wavelength" (P,) in tokens, "turns" (P,) in T, "unfinished" (P,) bool: less than one turn in T,
    "q_norm" (n_layer, H, P), "k_norm" (n_layer, H_kv, P): mean 2-norm of a pair of every query or key,
    "absolute", "signed" (n_layer, H, P): mean of |c| and of c, what the pair adds to q k / sqrt(D), over all visible
    pairs of query and key}, tensors in float64. Softmax cancels what all keys of a query share, so a large "signed"
    need not move attention. Contributions are computed for about `budget` numbers at once. AssertionError where they
    do not add up to the logits that the model uses; UserError for encodings that are no rotation.
    """
    rope, config = rotation(model), model.config
    T, wavelength = config.train_length, wavelengths(model)
    heads = {name: config.kv_heads if name == "k_norm" else config.n_head for name in MEASURES}
    terms = torch.zeros(config.n_layer, dtype=torch.float64)  # pairs of query and key that a layer sees
    total = {
        name: torch.zeros(config.n_layer, count, len(wavelength), dtype=torch.float64) for name, count in heads.items()
    }

    def watch(layer, encoding, new, pairs):
        for name, x in zip(("q_norm", "k_norm"), (new.q, new.k), strict=True):
            total[name][layer] += paired(x.float(), rope.dims).norm(dim=-1).sum(dim=(0, 2)).cpu()
        # Exact sums: not rounded to TF32 or half precision, whatever the model computed q and k in.
        pairs = ready(pairs)
        terms[layer] = int(pairs.seen.sum())
        wide = torch.float32 if pairs.q.device.type == "mps" else torch.float64
        q, k, seen = pairs.q.to(wide), pairs.k.to(wide), pairs.seen
        few = max(1, budget // (k[..., 0].numel() * len(wavelength)))
        for rows in torch.arange(len(pairs.i)).split(few):
            part = contributions(q[:, :, rows], k, rope.dims)
            with torch.autocast(q.device.type, enabled=False):
                logits = encoding.logits(replace(pairs, q=q[:, :, rows], k=k, i=pairs.i[rows], seen=seen[rows]))
            torch.testing.assert_close(part.sum(-1), logits, rtol=0, atol=1e-5 * logits.abs().max().item())
            part = part * seen[rows, :, None]
            total["absolute"][layer] += part.abs().sum(dim=(0, 2, 3)).cpu()
            total["signed"][layer] += part.sum(dim=(0, 2, 3)).cpu()

    for tokens in tqdm(torch.as_tensor(windows).split(1), "frequencies", leave=False, disable=None):
        with place.autocast():
            model(tokens[:, -T - 1 : -1].to(place.device), last=1, watch=watch)
    counts = {name: torch.full_like(terms, T) if name.endswith("norm") else terms for name in MEASURES}
    means = {name: sums / (len(windows) * counts[name][:, None, None]) for name, sums in total.items()}
    return {"wavelength": wavelength, "turns": T / wavelength, "unfinished": wavelength > T, **means}


@contextlib.contextmanager
def silenced(model, pairs, frozen=False):
    """Within it, those pairs (indices as `paired` orders them) of every layer add nothing to products of queries and
    keys; `frozen` ones take part unrotated, as all beyond `fraction` do in p-RoPE."""
    rope = rotation(model)
    turn = rope.turn
    dimension = paired(torch.arange(1, rope.head_dim + 1), rope.dims)  # counted from 1: 0 stands for none
    chosen = torch.zeros(rope.head_dim + 1, dtype=torch.bool)
    chosen[dimension[torch.tensor(list(pairs), dtype=torch.int64)]] = True

    def changed(x, pos, length=0, **value):
        turned = turn(x, pos, length, **value)
        if value:  # Values that turn are no part of the products.
            return turned
        instead = turn(x, torch.zeros_like(pos), length) if frozen else x.new_zeros(())
        return torch.where(chosen[1:].to(x.device), instead, turned)

    rope.turn = changed
    try:
        yield model
    finally:
        rope.turn = turn


def cases(turns, share=0.25):
    """turns (P,) in T -> what `silencing` tries, {name: (pairs, frozen)}, the model as it is first."""
    count, size = len(turns), max(1, round(share * len(turns)))
    groups = {
        f"fastest {share:.0%}": range(size),
        f"slowest {share:.0%}": range(count - size, count),
        "less than a turn in T": (turns < 1).nonzero().flatten().tolist(),
    }
    tried = {"as trained": ((), False)}
    for group, pairs in groups.items():
        for how in ("silenced", "frozen") if pairs else ():
            tried[f"{group}, {how}: pairs {between(pairs)}"] = pairs, how == "frozen"
    for pairs in torch.arange(count).tensor_split(min(8, count)):
        tried[f"silenced: pairs {between(pairs.tolist())}"] = pairs.tolist(), False
    return tried


def between(pairs):
    """Ascending pairs as text: their first and last."""
    return f"{pairs[0]}–{pairs[-1]}" if len(pairs) > 1 else f"{pairs[0]}"


def silencing(model, loss, share=0.25):
    """The loss without some pairs. loss() is the record of core.measure.length_loss for the model as it then is ->

    {"lengths", "loss": {case: nats per token at every length}, "pairs": {case: list}}: with nothing changed; the
    fastest and slowest `share` of pairs, and those that never finish a turn in T, silenced and frozen (see `silenced`);
    and each eighth of the pairs silenced alone. Pairs that never turn count among the slowest."""
    tried, records = cases(model.config.train_length / wavelengths(model), share), {}
    for name, (pairs, frozen) in tried.items():
        with silenced(model, pairs, frozen):
            records[name] = loss()
    return {
        "lengths": records["as trained"]["lengths"],
        "loss": {name: record["loss"] for name, record in records.items()},
        "pairs": {name: list(pairs) for name, (pairs, _) in tried.items()},
    }


# Tables and pictures of several runs.


def look(opened, place):
    """opened: {name: (model at the place, windows for `frequencies`, loss for `silencing`)} -> ({name: all figures, as
    JSON has them}, lines of Markdown, a function that draws norms and contributions into a folder).

    Models with the same settings, seeds of one run say, are told together: means over them, with the standard deviation
    beside each. UserError, before anything is computed, where a run's encoding is no rotation.
    """
    for model, _, _ in opened.values():
        rotation(model)
    records, alike = {}, {}
    for name, (model, windows, loss) in opened.items():
        known = {"posenc": model.config.posenc, "train_length": model.config.train_length, "windows": len(windows)}
        records[name] = known | frequencies(model, windows, place) | {"silencing": silencing(model, loss)}
        settings = tuple(str(getattr(model.config, field.name)) for field in fields(GPTConfig))
        alike.setdefault((settings, len(windows), *records[name]["silencing"]["lengths"]), {})[name] = records[name]
    groups = alike.values()
    draw = lambda folder: [pictures(folder, group) for group in groups]  # noqa: E731
    return as_json(records), [line for group in groups for line in tables(group)], draw


def tables(group):
    """{name: figures} of runs alike -> lines of Markdown."""
    records = list(group.values())
    among = f", ± the standard deviation over {len(records)} runs" if len(records) > 1 else ""
    lines = [
        f"**{records[0]['posenc']}** ({', '.join(group)}), T = {records[0]['train_length']} tokens: means over "
        f"{records[0]['windows']} windows{among}. Frequencies descend: the last pairs are the slowest."
    ]
    return [*lines, "", *pair_table(records), "", *layer_table(records), "", *silencing_table(records), ""]


def pair_table(records):
    """Means over heads and layers, for every pair."""
    cells = []
    for m, turns in enumerate(records[0]["turns"].tolist()):
        wavelength = f"{records[0]['wavelength'][m]:,.{0 if turns < 1 else 1}f}" if turns else "never turns"
        labels = str(m), wavelength, f"{turns:.3g}"
        cells += [
            (labels, title, beside(record[name][..., m].mean() for record in records))
            for name, title in MEASURES.items()
        ]
    return pivot(["pair", "wavelength, tokens", "turns in T"], cells)


def layers(record):
    """What every layer is called: its number and, under a list over the layers, its member."""
    spec, numbers = record["posenc"], range(len(record["q_norm"]))
    return [str(n + 1) if isinstance(spec, str) else f"{n + 1}, {spec[n % len(spec)]}" for n in numbers]


def layer_table(records):
    """Means over heads, by layer and thirds of the pairs; and the largest pairs, with the runs that agree on each."""
    P = len(records[0]["turns"])
    thirds, cells = torch.arange(P).tensor_split(min(3, P)), []
    for name, title in MEASURES.items():
        for layer, called in enumerate(layers(records[0])):
            by_pair = torch.stack([record[name][layer].mean(0) for record in records])  # (runs, P)
            labels = title, called
            cells += [(labels, f"pairs {between(part.tolist())}", beside(by_pair[:, part].mean(1))) for part in thirds]
            cells.append((labels, "largest pairs", largest(by_pair.abs())))
    return pivot(["mean over heads", "layer"], cells)


def largest(by_pair, count=3):
    """(runs, P) -> the largest pairs on average, and of several runs how many have each among their own largest."""
    count = min(count, by_pair.shape[1])
    votes = torch.bincount(by_pair.topk(count).indices.flatten(), minlength=by_pair.shape[1]).tolist()
    agreed = [f" ({vote} of {len(by_pair)})" if len(by_pair) > 1 else "" for vote in votes]
    return ", ".join(f"{m}{agreed[m]}" for m in by_pair.mean(0).topk(count).indices.tolist())


def silencing_table(records):
    """Losses as trained, and by how much they change where pairs are silenced or frozen."""
    multiples = [length / records[0]["train_length"] for length in records[0]["silencing"]["lengths"]]
    losses = {  # case: (lengths, runs)
        name: torch.tensor([record["silencing"]["loss"][name] for record in records]).T
        for name in records[0]["silencing"]["loss"]
    }
    base, cells = losses["as trained"], []
    for name, loss in losses.items():
        of_lengths, form = (base, ".3f") if name == "as trained" else (loss - base, "+.3f")
        cells += [((name,), at, beside(nats, form)) for at, nats in zip(multiples, of_lengths, strict=True)]
    return pivot(["nats per token"], cells)


def beside(values, form=".3f"):
    """A number for each run -> their mean and, of several, the standard deviation beside it."""
    values = torch.tensor([float(value) for value in values])
    return f"{values.mean().item():{form}}" + (f" ± {values.std().item():.3f}" if len(values) > 1 else "")


def pictures(folder, group):
    """Heat maps over pairs, layers and heads (a row for every head) of what `frequencies` measured: means over runs
    alike. The dashed line stands where pairs stop finishing a turn in T."""
    name, first = next(iter(group.items()))
    slug = report.slug(name)
    P, turning = len(first["turns"]), int((first["turns"] >= 1).sum())
    of_pairs = {m + 0.5: str(m) for m in range(0, P, math.ceil(P / 16))}
    for name in ("q_norm", "k_norm", "absolute"):
        mean = torch.stack([record[name] for record in group.values()]).mean(0)  # (n_layer, heads, P)
        rows = F.pad(mean, (0, 0, 0, 1), value=math.nan)  # a gap after every layer
        tall = rows.shape[1]
        of_layers = {n * tall + (tall - 1) / 2: f"layer {called}" for n, called in enumerate(layers(first))}
        report.heat(
            Path(folder) / f"{slug}-{name}.png",
            rows.flatten(0, 1)[:-1].numpy(), "pair (right of the dashed line: less than one turn in T)",
            MEASURES[name], mark_x=turning if turning < P else None, colours="magma", ticks=(of_pairs, of_layers),
            span=(0, mean.quantile(0.98).item()),  # a few cells far above the others would leave them dark
        )  # fmt: skip


def as_json(figures):
    """Figures as JSON holds them, which knows no infinity: None stands for it."""
    if torch.is_tensor(figures):
        return as_json(figures.tolist())
    if isinstance(figures, dict):
        return {name: as_json(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [as_json(value) for value in figures]
    return None if figures == math.inf else figures
