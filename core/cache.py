"""The past of a call of the model (a cache of keys, fixed slots, a memory of hidden states), and its geometry."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.additions import BY_POSITION, factor
from core.attention import visible
from core.encoding import ALL, Pairs, Sight
from core.errors import require

WHOLE, PIECE = 1 << 14, 512  # tokens that enter an empty cache at once, and one that holds some


class Past:
    """The past of a call: nothing here, keys and values in a Cache, hidden states in a Memory.

    A call asks `end` where its tokens end, announces them to `advance`, and then in every layer uses `extend`, `last`,
    `recent` and `append`; or it tells a past that no layer uses to be `idle`.

    window: queries see keys at a distance below it, besides the first `sinks` tokens; None or 0 means all keys.
    log_n: queries with n > T keys in sight, T the training length, are multiplied by ln n / ln T, which keeps attention
    from spreading (Su 2021, kexue.fm/archives/8823). total: the number of tokens that will ever enter, for encodings
    that scale with the context; by default those that have entered so far.

    Layers that were trained with a Sight of their own have a past of their own, see `of`.
    """

    fixed = False  # tensors keep their shapes and places, whatever enters

    def __init__(self, window=None, sinks=0, log_n=False, total=0):
        self.window, self.sinks, self.log_n, self.total = window, sinks, log_n, total
        self.next = 0  # the position of the next token
        self.narrow = {}  # Sight -> the past of the layers that have it

    def of(self, sight):
        """The past of layers with that Sight: this one or, where they were trained to see less than it lets them, one
        that is bounded by their own span and has no sinks."""
        if not sight.span or (self.window and self.window < sight.span):
            return self
        if sight not in self.narrow:
            self.narrow[sight] = self.bounded(sight.span)
        return self.narrow[sight]

    def bounded(self, span):
        """A past of this kind, empty, of which queries see the last `span` tokens."""
        return type(self)(span, 0, self.log_n, self.total)

    def end(self, count, pos=None):
        """The position after the coming `count` tokens, or after those at positions pos (T,)."""
        return self.next + count if pos is None else int(pos[-1]) + 1

    def advance(self, pos, end):
        """Record positions (T,) of the call's tokens, and `end`, the one after them. Returns those of all keys (S,)."""
        self.next = end
        return pos

    def idle(self):
        """Called after `advance` where no layer uses this past, but only those that it has made for some."""

    def extend(self, layer, x):
        """The input of a layer, x (B, T, C) -> (B, M, C), after its input for the tokens before, if they are kept."""
        return x

    def last(self, layer):
        """{name: (B, H, 1, any)} of the token before those just announced, or {} where it is not kept."""
        return {}

    def recent(self, layer, count, **new):
        """new: name -> (B, H, T, any) of the tokens just announced. Returns name -> (B, H, count, any) of those before
        them, zeros where there are none, and keeps the latest for the next call."""
        return {name: x.new_zeros(*x.shape[:2], count, x.shape[3]) for name, x in new.items()}

    def append(self, layer, **new):
        """new: name -> (B, H, T, any) of the tokens just announced. Returns name -> (B, H, S, any) of all keys."""
        return new


class Cache(Past):
    """Keys, values and what else an encoding keeps for every token and layer, preallocated and doubled when full, with
    the position of every kept token.

    A window bounds it: tokens that no later query can see are dropped, so memory and time per token stay constant.
    """

    def __init__(self, window=None, sinks=0, log_n=False, total=0):
        super().__init__(window, sinks, log_n, total)
        self.length = 0  # tokens held
        self.new = 0  # those of them that the present call brought
        self.layers = {}  # layer -> {name: (B, H, capacity, any)}
        self.tails = {}  # layer -> {name: (B, H, count, any)}, what `recent` keeps
        self.pos = None  # (length,)

    def advance(self, pos, end):
        if self.window and self.length > 2 * (self.window + self.sinks):
            self.drop(self.length - self.window - self.sinks)
        self.pos = pos if self.pos is None else torch.cat((self.pos, pos))
        self.length, self.new, self.next = len(self.pos), len(pos), end
        return self.pos

    def idle(self):
        self.pos, self.length = self.pos[-1:], 1  # Else it would grow, while the others are bounded.

    def last(self, layer):
        index = self.length - self.new
        return {name: x[:, :, index - 1 : index] for name, x in self.layers.get(layer, {}).items() if index}

    def recent(self, layer, count, **new):
        tails = self.tails.setdefault(layer, {})
        for name, zeros in super().recent(layer, count, **new).items():
            tails.setdefault(name, zeros)
        before = {name: tails[name].clone() for name in new}
        for name, x in new.items():
            tails[name].copy_(torch.cat((before[name], x), dim=2)[:, :, -count:])
        return before

    def append(self, layer, **new):
        held = self.layers.setdefault(layer, {})
        for name, x in new.items():
            old = held.get(name)
            if old is None or old.shape[2] < self.length:
                room = min(2 * self.length, max(self.length, self.total)) if self.total else 2 * self.length
                held[name] = x.new_empty(*x.shape[:2], max(64, room), x.shape[3])
                if old is not None:
                    held[name][:, :, : old.shape[2]] = old
            held[name][:, :, self.length - self.new : self.length] = x
        return {name: x[:, :, : self.length] for name, x in held.items()}

    def drop(self, count):
        """Forget the `count` oldest tokens after the sinks."""
        for held in self.layers.values():
            for x in held.values():
                x[:, :, self.sinks : self.length - count] = x[:, :, self.sinks + count : self.length].clone()
        self.pos = torch.cat((self.pos[: self.sinks], self.pos[self.sinks + count :]))
        self.length -= count


class Slots(Cache):
    """A cache whose tensors keep their shapes and places from token to token, as a compiled model and a CUDA graph need
    it: room for `total` tokens from the start, also under a window, whose mask hides those before it. It begins with
    what `cache` holds, takes one token at a time, whose position has to be given, and keeps no state of an encoding's
    (ValueError). Unused slots come after the query, so that the causal mask hides them."""

    fixed = True

    def __init__(self, cache):
        super().__init__(cache.window, cache.sinks, cache.log_n, cache.total)
        self.length, self.pos = cache.total, torch.arange(cache.total, device=cache.pos.device)
        self.narrow = {sight: Slots(part) for sight, part in cache.narrow.items()}
        self.slot = None  # (1,) the slot of the present call's token
        self.tails = cache.tails
        for tails in self.tails.values():
            for tail in tails.values():
                torch._dynamo.mark_static_address(tail)
        for layer, held in cache.layers.items():
            require(held.keys() == {"k", "v"}, f"fixed slots hold keys and values, not {', '.join(held)}")
            self.layers[layer] = {name: x.new_zeros(*x.shape[:2], cache.total, x.shape[3]) for name, x in held.items()}
            for name, x in self.layers[layer].items():
                x[:, :, cache.pos] = held[name][:, :, : cache.length]
                torch._dynamo.mark_static_address(x)

    def end(self, count, pos=None):
        require(count == 1 and pos is not None, "fixed slots take one token at a time, with its position")
        return self.total  # reading pos would make the CPU wait for the GPU

    def advance(self, pos, end):
        self.slot = pos
        return self.pos

    def idle(self):
        pass

    def append(self, layer, **new):
        for name, x in new.items():
            self.layers[layer][name].index_copy_(2, self.slot, x)
        return dict(self.layers[layer])


class Memory(Past):
    """Transformer-XL's recurrence (Dai et al. 2019, section 3.2): what entered every layer for the last segment,
    without its gradient. It stands before the next segment's tokens, so that keys and values reach back over it."""

    def __init__(self, *bounds):
        super().__init__(*bounds)
        self.pos, self.layers = None, {}  # positions (M,), layer -> (B, M, C)

    def advance(self, pos, end):
        before, self.pos, self.next = self.pos, pos, end
        return pos if before is None else torch.cat((before, pos))

    def extend(self, layer, x):
        before, self.layers[layer] = self.layers.get(layer), x.detach()
        return x if before is None else torch.cat((before, x), dim=1)


def pieces(tokens, cache, bounded=False):
    """tokens (B, T) in the parts in which they best enter a cache: many where it is empty and nothing is bounded, as
    fused attention then needs no mask; and few, whose masks (T, S) are small, where not. bounded: whether the model has
    layers that see less than all."""
    first = PIECE if cache.length or cache.window or bounded else max(PIECE, WHOLE // len(tokens))
    parts = tokens[:, :first], *tokens[:, first:].split(PIECE, dim=1)
    return [part for part in parts if part.shape[1]]


@dataclass
class Call:
    """The geometry of one call of the model, which all its layers of one Sight share: where tokens stand, and which see
    which."""

    past: Past
    pos: Tensor  # (T,) indices of this call's tokens
    k_pos: Tensor  # (S,) indices of the keys, whose last are this call's, but in `Slots`
    seen: Tensor | None  # (T, S) bool; None: what `bounds` leave of every key up to the query's own; T is 1 or S
    bounds: Sight  # what hides keys where `seen` is None
    band: Tensor | None  # (T, S) bool: the keys of the window alone, where there are sinks besides
    near: Tensor | None  # (T,) the queries' indices as if the sinks lay just before the window
    length: int  # tokens in the whole context, those to come included
    reach: int  # the most tokens that one query can see
    sight: Sight  # what the layers were trained to see
    watch: Callable | None  # see GPT.forward

    @classmethod
    def each(cls, past, sights, tokens, pos=None, watch=None):
        """[Call], one for each Sight, that read tokens (B, T) after `past`, which takes in their positions."""
        T, end, consecutive = tokens.shape[1], past.end(tokens.shape[1], pos), pos is None
        if consecutive:
            pos = torch.arange(end - T, end, device=tokens.device)
        pasts = [past.of(sight) for sight in sights]
        keys = {id(own): own.advance(pos, end) for own in (past, *past.narrow.values())}
        if not any(own is past for own in pasts):
            past.idle()
        return [
            cls.of(own, sight, pos, keys[id(own)], end, consecutive, watch)
            for own, sight in zip(pasts, sights, strict=True)
        ]

    @classmethod
    def of(cls, past, sight, pos, k_pos, end, consecutive, watch):
        """The Call of layers with that Sight over their `past`, whose keys have indices k_pos (S,). `end` is the index
        after the call's last token; `consecutive`: whether the indices of its tokens follow one another."""
        T, length, window, sinks = len(pos), max(end, past.total), past.window or None, past.sinks
        reach = min(length, window + sinks) if window else length
        chunk = sight.chunk if end > sight.chunk else 0
        if window and end <= window and not chunk:  # It hides nothing, so it is none, and needs no mask.
            window = None
        # One query over a whole cache needs no mask at all. Tokens without a past need none either where their indices
        # follow one another: attention draws its triangle, and the bounds in it, itself.
        alone = consecutive and T == len(k_pos) == end and not (window and sinks)
        unmasked = alone or (T == 1 and not window and not past.fixed)
        seen = None if unmasked else visible(pos, k_pos, window, sinks, chunk)
        bounds = Sight(window or 0, chunk) if alone else ALL
        band = near = None
        if window and sinks:
            band, near = visible(pos, k_pos, window, 0, chunk), pos.clamp(max=reach - 1)
        return cls(past, pos, k_pos, seen, bounds, band, near, length, reach, sight, watch)

    def temper(self, q, kind, trained, learned=None, x=None):
        """The temper of that kind for queries q (B, H, T, D), which broadcasts over them, or None; core/additions.py
        says what it takes. The past may ask for su where there is none."""
        kind = "su" if kind == "none" and self.past.log_n else kind
        if kind == "none" or (kind in BY_POSITION and self.sight.span):
            return None
        chunk, wide = self.sight.chunk, torch.promote_types(q.dtype, torch.float32)
        before = self.pos - self.k_pos[0]  # a memory begins later than the text
        n = (torch.minimum(self.pos % chunk, before) if chunk else before).clamp(max=self.reach - 1) + 1
        return factor(kind, n.to(wide), self.pos.to(wide), trained, learned, x).to(q.dtype)

    def parts(self, encoding, layer, qkv, x, temper=None, sink=None):
        """Queries (B, H, T, D), and keys and values (B, H_kv, M, D) of the M tokens that entered the layer as
        x (B, M, C) -> [Pairs] over all keys of the past, rotated, as `attend` takes them.

        There are two where a window has sinks: relative encodings meet those as if they lay just before the window
        (Xiao et al. 2023, StreamingLLM). At their true distance they would be farther than training showed.
        """
        if self.band is not None:
            encoding.check_sinks()
        (q, k, v), T = qkv, len(self.pos)
        i, j = (encoding.positions(pos, self.length) for pos in (self.pos, self.k_pos))
        state = self.state(encoding, layer, x) if encoding.has_state else {}
        own = {name: x[:, :, -T:] for name, x in state.items()} | encoding.asks(x[:, -T:])
        # Over a memory, k has the keys of all tokens already; a cache adds those of the tokens before.
        new = Pairs(q, k, v, i, i if k.shape[2] == T else j, None, state, own, self.reach, temper)
        if encoding.rotate_once:
            q, k = tempered(encoding, new)
        v = encoding.turn_values(v, new.j) if encoding.turns_values else v
        kept = self.past.append(layer, k=k, v=v, **state)
        k, v = kept.pop("k"), kept.pop("v")
        held = Pairs(q, k, v, i, j, self.seen, kept, own, self.reach, temper, sink, self.bounds)
        pairs = held if encoding.rotate_once else rotated(encoding, held)
        if self.watch is not None:
            self.watch(layer, encoding, new, pairs)
        if self.near is None or not encoding.relative or encoding.positionless:
            return [pairs]
        return [replace(pairs, seen=self.band), self.sinks(encoding, new, held)]

    def state(self, encoding, layer, x):
        """What the encoding keeps for the tokens that entered the layer as x (B, M, C)."""
        last = self.past.last(layer)
        if encoding.recalls:
            last = last | self.past.recent(layer, encoding.recalls, x=x[:, None])
        return encoding.state(x, last)

    def sinks(self, encoding, new, held):
        """The Pairs of the queries and the sinks alone, with the queries at `near`. Keys `held` were rotated
        once and stay as they are, or they are rotated here."""
        first = held.rows(0, len(self.pos), slice(self.past.sinks))
        near = replace(new if encoding.rotate_once else first, i=encoding.positions(self.near, self.length))
        q, k = tempered(encoding, near)
        k = first.k if encoding.rotate_once else k
        return replace(first, q=q, k=k, i=near.i, seen=(self.seen & ~self.band)[:, : self.past.sinks])


def tempered(encoding, pairs):
    """The Pairs' q and k as the encoding rotates them, the queries times their temper."""
    q, k = encoding.rotate(pairs)
    return q if pairs.temper is None else q * pairs.temper, k


def rotated(encoding, pairs):
    q, k = tempered(encoding, pairs)
    return replace(pairs, q=q, k=k)
