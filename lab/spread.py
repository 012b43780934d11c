"""What attention does inside: how widely it spreads as the context grows, and what each frequency of a rotation is for.

`attention` measures any encoding. `frequencies` and `silencing` take apart the products of queries and keys under RoPE,
after Barbero et al. 2024 ("Round and Round We Go! What makes rotary positional encodings useful?", sections 4 and 5).
Frequencies descend with the pair m, so the first pairs turn fastest, and the *last* are the slow ones.
"""

import contextlib
import math
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from core import report
from core.attention import ready, visible
from core.cache import Cache, pieces
from core.errors import UserError
from model import GPTConfig
from posenc import RoPE
from zoo.randomized import Randomized

# Of attention weights: what `attention` averages.
SPREAD = {
    "entropy": lambda weights, seen: torch.special.entr(weights).sum(-1),  # in nats
    # One key alone has an entropy of 0 out of 0, which counts as 0.
    "share": lambda weights, seen: torch.special.entr(weights).sum(-1) / seen.sum(-1).clamp(min=2).log(),
    "first": lambda weights, seen: weights[..., 0],
}
# Of pairs of dimensions: what `frequencies` averages, as tables and pictures call it.
MEASURES = {
    "q_norm": "norm of the queries' pairs",
    "k_norm": "norm of the keys' pairs",
    "absolute": "mean absolute contribution to the logits",
    "signed": "mean contribution to the logits",
}


# How widely attention spreads.


def weights(encoding, pairs):
    """The Pairs that a watch is given -> weights of attention (B, H, T, S), and which keys are seen (T, S)."""
    pairs = ready(pairs)
    wide = torch.promote_types(pairs.q.dtype, torch.float32)  # the fused kernel adds up half precision in float32
    pairs = replace(pairs, q=pairs.q.to(wide), k=pairs.k.to(wide))
    with torch.autocast(pairs.q.device.type, enabled=False):
        logits = encoding.logits(pairs)
        return logits.masked_fill(~pairs.seen, -math.inf).softmax(-1), pairs.seen


def spread(model, tokens, last, device):
    """tokens (B, L) -> (len(SPREAD), n_layer), sums over the last so many queries of every sequence and the heads."""
    total = torch.zeros(len(SPREAD), model.config.n_layer, dtype=torch.float64)

    def watch(layer, encoding, new, pairs):
        found = weights(encoding, pairs)
        total[:, layer] += torch.stack([measure(*found).sum().cpu().double() for measure in SPREAD.values()])

    cache, context, asked = Cache(total=tokens.shape[1]), *tokens.tensor_split([tokens.shape[1] - last], dim=1)
    with device.autocast():
        for part in pieces(context, cache):
            model(part, past=cache, last=1)
        for part in asked.split(32, dim=1):  # few queries, whose weights are held for all keys
            model(part, past=cache, last=1, watch=watch)
    return total


@torch.inference_mode()
def attention(model, windows, device, lengths, budget=1 << 12, T=0):
    """Where the last T/4 queries of L tokens look, for every length L that the encoding has positions for. T is the
    model's own unless given.

    windows (N, Lmax + 1) ids, as evaluate.long_windows gives them: the input is the L tokens before the last, as it is
    for evaluate.length_loss. They enter a cache in chunks, about `budget` tokens at once, so memory grows with L alone.
    Returns {"lengths", "entropy", "share", "first", "by_layer"}: for every length the mean over queries, heads and
    layers of the entropy of the weights (nats), of the entropy / ln(keys seen), and of the weight on the first token;
    "by_layer" has the same with a list over the layers for every length. ValueError for windows that are too short.
    """
    wanted = max(1, (T or model.config.train_length) // 4)
    reached = [length for length in lengths if length <= model.max_length]
    if reached and max(reached) >= windows.shape[1]:
        raise ValueError(f"windows of {windows.shape[1]} ids hold no {max(reached)} tokens and their last target")
    windows, by_layer = torch.as_tensor(windows), {name: [] for name in SPREAD}
    with report.progress(len(windows) * sum(reached), "attention", device) as bar:
        for length in reached:
            last, total = min(wanted, length), 0.0
            for rows in windows[:, -length - 1 : -1].split(max(1, budget // length)):
                total = total + spread(model, rows.to(device.device), last, device)
                bar.update(rows.numel())
            for name, sums in zip(SPREAD, total / (len(windows) * last * model.config.n_head), strict=True):
                by_layer[name].append(sums.tolist())
    means = {name: [sum(layers) / len(layers) for layers in found] for name, found in by_layer.items()}
    return {"lengths": reached, **means, "by_layer": by_layer}


# What the pairs of a rotation do.


def rotation(model):
    """The RoPE that all layers share; UserError where they have none, or more than it."""
    inner = [one.inner if isinstance(one, Randomized) else one for one in model.posenc]
    ropes = [one for one in inner if isinstance(one, RoPE)]
    if len({id(one) for one in inner}) == 1 and ropes and not ropes[0].writes_out:
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
    frequency, _ = rope.frequency(T, torch.float64)
    still = (rope.head_dim - rope.dims + 1) // 2
    first, second = model.posenc[0].positions(torch.arange(2), T).tolist()  # `randomized` takes long steps
    return 2 * math.pi / (second - first) / F.pad(frequency, (0, still))


@torch.inference_mode()
def frequencies(model, windows, device, budget=1 << 21):
    """What each pair of dimensions is used for, over the last T input tokens of windows (N, >= T + 1).

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
    total = {
        name: torch.zeros(config.n_layer, count, len(wavelength), dtype=torch.float64) for name, count in heads.items()
    }

    def watch(layer, encoding, new, pairs):
        for name, x in zip(("q_norm", "k_norm"), (new.q, new.k), strict=True):
            total[name][layer] += paired(x.float(), rope.dims).norm(dim=-1).sum(dim=(0, 2)).cpu()
        # Exact sums: not rounded to TF32 or half precision, whatever the model computed q and k in.
        pairs = ready(replace(pairs, seen=visible(pairs.i, pairs.j)))
        wide = torch.float32 if pairs.q.device.type == "mps" else torch.float64
        q, k, seen = pairs.q.to(wide), pairs.k.to(wide), pairs.seen
        few = max(1, budget // (k[..., 0].numel() * len(wavelength)))
        for rows in torch.arange(len(pairs.i)).split(few):
            part = contributions(q[:, :, rows], k, rope.dims)
            with torch.autocast(q.device.type, enabled=False):
                logits = encoding.logits(replace(pairs, q=q[:, :, rows], k=k, i=pairs.i[rows], seen=seen[rows]))
            slack = 1e-5 * logits.abs().max().item()
            torch.testing.assert_close(part.sum(-1), logits, rtol=0, atol=slack)
            part = part * seen[rows, :, None]
            total["absolute"][layer] += part.abs().sum(dim=(0, 2, 3)).cpu()
            total["signed"][layer] += part.sum(dim=(0, 2, 3)).cpu()

    for tokens in tqdm(torch.as_tensor(windows).split(1), "frequencies", leave=False, disable=None):
        with device.autocast():
            model(tokens[:, -T - 1 : -1].to(device.device), last=1, watch=watch)
    seen = {name: T if name.endswith("norm") else T * (T + 1) // 2 for name in MEASURES}
    means = {name: sums / (len(windows) * seen[name]) for name, sums in total.items()}
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

    def changed(x, pos, length=0):
        instead = turn(x, torch.zeros_like(pos), length) if frozen else x.new_zeros(())
        return torch.where(chosen[1:].to(x.device), instead, turn(x, pos, length))

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
    found = {"as trained": ((), False)}
    for what, pairs in groups.items():
        for how in ("silenced", "frozen") if pairs else ():
            found[f"{what}, {how}: pairs {between(pairs)}"] = pairs, how == "frozen"
    for pairs in torch.arange(count).tensor_split(min(8, count)):
        found[f"silenced: pairs {between(pairs.tolist())}"] = pairs.tolist(), False
    return found


def between(pairs):
    return f"{pairs[0]}–{pairs[-1]}" if len(pairs) > 1 else f"{pairs[0]}"


def silencing(model, loss, share=0.25):
    """What loss(), evaluate.length_loss's result for the model as it then is, becomes without some pairs ->

    {"lengths", "loss": {case: nats per token at every length}, "pairs": {case: list}}: with nothing changed; the
    fastest and slowest `share` of pairs, and those that never finish a turn in T, silenced and frozen (see `silenced`);
    and each eighth of the pairs silenced alone. What never turns counts among the slowest."""
    tried, found = cases(model.config.train_length / wavelengths(model), share), {}
    for name, (pairs, frozen) in tried.items():
        with silenced(model, pairs, frozen):
            found[name] = loss()
    return {
        "lengths": next(iter(found.values()))["lengths"],
        "loss": {name: result["loss"] for name, result in found.items()},
        "pairs": {name: list(pairs) for name, (pairs, _) in tried.items()},
    }


# Tables and pictures of several runs.


def report_frequencies(opened, device, folder):
    """opened: {name: (model on the device, windows for `frequencies`, loss for `silencing`)} -> (lines of Markdown,
    {name: all figures, for JSON}); writes a picture of norms and contributions into `folder`.

    Models with the same settings, seeds of one run say, are told together: means over them, with the standard deviation
    beside each. UserError, before anything is computed, where a run's encoding is no rotation.
    """
    for model, _, _ in opened.values():
        rotation(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    results, alike = {}, {}
    for name, (model, windows, loss) in opened.items():
        results[name] = {
            "posenc": model.config.posenc, "train_length": model.config.train_length, "windows": len(windows),
            **frequencies(model, windows, device), "silencing": silencing(model, loss),
        }  # fmt: skip
        settings = tuple(str(getattr(model.config, field.name)) for field in fields(GPTConfig))
        alike.setdefault((settings, len(windows), *results[name]["silencing"]["lengths"]), {})[name] = results[name]
    for group in alike.values():
        pictures(folder, group)
    lines = [line for group in alike.values() for line in tables(group)]
    return lines, {name: plain(found) for name, found in results.items()}


def tables(group):
    """{name: figures} of runs alike -> lines of Markdown."""
    runs = list(group.values())
    among = f", ± the standard deviation over {len(runs)} runs" if len(runs) > 1 else ""
    lines = [
        f"**{runs[0]['posenc']}** ({', '.join(group)}), T = {runs[0]['train_length']} tokens: means over "
        f"{runs[0]['windows']} windows{among}. Frequencies descend: the last pairs are the slowest."
    ]
    return [*lines, "", *pair_table(runs), "", *layer_table(runs), "", *silencing_table(runs), ""]


def pair_table(runs):
    """Means over heads and layers, for every pair."""
    rows = []
    for m, turns in enumerate(runs[0]["turns"].tolist()):
        cells = [beside(run[name][..., m].mean() for run in runs) for name in MEASURES]
        wavelength = f"{runs[0]['wavelength'][m]:,.{0 if turns < 1 else 1}f}" if turns else "never turns"
        rows.append([str(m), wavelength, f"{turns:.3g}", *cells])
    return report.markdown(["pair", "wavelength, tokens", "turns in T", *MEASURES.values()], rows)


def layer_table(runs):
    """Means over heads, by layer and thirds of the pairs; and the largest pairs, with the runs that agree on each."""
    P = len(runs[0]["turns"])
    thirds = torch.arange(P).tensor_split(min(3, P))
    spans = [f"pairs {between(part.tolist())}" for part in thirds]
    rows = []
    for name, what in MEASURES.items():
        for layer in range(len(runs[0][name])):
            by_pair = torch.stack([run[name][layer].mean(0) for run in runs])  # (runs, P)
            cells = [beside(by_pair[:, part].mean(1)) for part in thirds]
            rows.append([what, str(layer + 1), *cells, largest(by_pair.abs())])
    return report.markdown(["mean over heads", "layer", *spans, "largest pairs"], rows)


def largest(by_pair, count=3):
    """(runs, P) -> the largest pairs on average, and of several runs how many have each among their own largest."""
    count = min(count, by_pair.shape[1])
    votes = torch.bincount(by_pair.topk(count).indices.flatten(), minlength=by_pair.shape[1]).tolist()
    agreed = [f" ({vote} of {len(by_pair)})" if len(by_pair) > 1 else "" for vote in votes]
    return ", ".join(f"{m}{agreed[m]}" for m in by_pair.mean(0).topk(count).indices.tolist())


def silencing_table(runs):
    """Losses as trained, and what they change by where pairs are silenced or frozen."""
    T, found = runs[0]["train_length"], [run["silencing"] for run in runs]
    base = torch.tensor([run["loss"]["as trained"] for run in found])  # (runs, lengths)
    rows = [["as trained", *(beside(loss) for loss in base.T)]]
    for name in list(found[0]["loss"])[1:]:
        change = torch.tensor([run["loss"][name] for run in found]) - base
        rows.append([name, *(beside(loss, "+.3f") for loss in change.T)])
    return report.markdown(["nats per token", *(f"{length / T:g} T" for length in found[0]["lengths"])], rows)


def beside(values, form=".3f"):
    """One number for each run -> their mean and, of several, the standard deviation beside it."""
    values = torch.tensor([float(value) for value in values])
    return f"{values.mean().item():{form}}" + (f" ± {values.std().item():.3f}" if len(values) > 1 else "")


def pictures(folder, group):
    """Heat maps over pairs, layers and heads (a row for every head) of what `frequencies` found: means over runs alike.
    The dashed line stands where pairs stop finishing a turn in T."""
    name, first = next(iter(group.items()))
    slug = report.slug(name)
    P, turning = len(first["turns"]), int((first["turns"] >= 1).sum())
    of_pairs = {m + 0.5: str(m) for m in range(0, P, math.ceil(P / 16))}
    for name in ("q_norm", "k_norm", "absolute"):
        mean = torch.stack([run[name] for run in group.values()]).mean(0)  # (n_layer, heads, P)
        rows = F.pad(mean, (0, 0, 0, 1), value=math.nan)  # a gap after every layer
        layers, tall = rows.shape[:2]
        of_layers = {layer * tall + (tall - 1) / 2: f"layer {layer + 1}" for layer in range(layers)}
        report.heat(
            Path(folder) / f"{slug}-{name}.png",
            rows.flatten(0, 1)[:-1].numpy(), "pair (right of the dashed line: less than one turn in T)",
            MEASURES[name], mark_x=turning if turning < P else None, colours="magma", ticks=(of_pairs, of_layers),
            span=(0, mean.quantile(0.98).item()),  # a few cells far above the others would leave them dark
        )  # fmt: skip


def plain(found):
    """Figures as JSON holds them, which knows no infinity: None stands for it."""
    if torch.is_tensor(found):
        return plain(found.tolist())
    if isinstance(found, dict):
        return {name: plain(value) for name, value in found.items()}
    if isinstance(found, list):
        return [plain(value) for value in found]
    return None if found == math.inf else found
