"""The language of the `posenc` flag: `rope`, `rope(base=500000)`, or a list of such values, cycled over the layers.

A value is parsed and never evaluated, built into one encoding for every layer, and laid over another: by `init_from`,
or at test time by the `--posenc` of the commands that read a finished run.
"""

import ast
import warnings

from core.additions import BY_POSITION, TEMPERS
from core.encoding import ENCODINGS, Sight
from core.errors import brief, nearest, require

LONGEST, MOST = 100_000, 1000  # characters of a value of the flag, members of a list over the layers
LAYER = (*Sight._fields, "temper")  # what a member of the flag may say of its layer


def parse(spec):
    """'rope(base=5e5, window=32)' -> (RoPE, {'base': 5e5}, {'window': 32}): the class, its arguments, and those of its
    layer, which are in LAYER. All are literals, never evaluated; ValueError says what is off.

    A name or a call as an argument, such as randomized(inner=rope(base=5e5)), stays a string for the encoding to parse.
    """
    wrong = f"posenc {brief(repr(spec))} is not a name or name(argument=value, ...)"
    require(isinstance(spec, str) and len(spec) <= LONGEST, wrong)
    try:
        name, keywords = call_in(spec)
        arguments = {keyword.arg: literal(keyword.value) for keyword in keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # the last two for thousands of brackets
        raise ValueError(wrong) from None
    if name not in ENCODINGS:
        raise ValueError(f"no positional encoding is called '{brief(name)}'; {nearest(name, ENCODINGS)}")
    require(len(arguments) == len(keywords), f"posenc {brief(repr(spec))} gives an argument twice")
    cls = ENCODINGS[name]
    # rerope's window is its own, and no trained one.
    layer = {key: arguments.pop(key) for key in LAYER if key in arguments and key not in cls.arguments}
    check_layer(layer, brief(spec))
    cls.checked(arguments)
    return cls, arguments, layer


def check_layer(layer, spec):
    """ValueError for what a member says of its layer, by the names in LAYER, where that is no bound or no temper."""
    for key in layer.keys() & set(Sight._fields):
        whole = type(layer[key]) is int and 0 <= layer[key] <= 10**8
        require(whole, f"{spec}: {key} must be a number of tokens, or 0 for all")
    temper, everywhere = layer.get("temper", "none"), not any(layer.get(key) for key in Sight._fields)
    require(temper in TEMPERS, f"{spec}: temper must be one of {', '.join(TEMPERS)}")
    require(everywhere or temper not in BY_POSITION, f"{spec}: {temper} acts on layers without window or chunk alone")


def written(cls, arguments, layer=None):
    """What `parse` takes apart, as text again. A bound of 0 is none, and is left out."""
    bounds = {key: value for key, value in (layer or {}).items() if value}
    listed = ", ".join(f"{key}={value!r}" for key, value in (arguments | bounds).items())
    return f"{cls.name}({listed})" if listed else cls.name


def call_in(spec):
    """The name and the keywords (ast.keyword) of a call with keywords alone, or of a name."""
    with warnings.catch_warnings(action="ignore"):  # Python's, of a number before a word: it is refused in one line
        node = ast.parse(spec.strip(), mode="eval").body
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    require(isinstance(call.func, ast.Name) and not call.args and all(key.arg for key in call.keywords), "no such call")
    return call.func.id, call.keywords


def literal(node):
    """The value of a parsed literal; of a name or a call, its text."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Call) else ast.literal_eval(node)


def members(spec):
    """A value of the flag -> [(class, arguments, layer)], as `parse` reads them: one, or those of a list over the
    layers."""
    listed = [spec] if isinstance(spec, str) else spec
    require(listed, "posenc is an empty list; name at least one encoding")
    require(len(listed) <= MOST, f"posenc lists {len(listed)} encodings; it takes at most {MOST}")
    return [parse(text) for text in listed]


def sights(spec, n_layer):
    """The Sight of every layer under a value of the flag."""
    each = [Sight(*(layer.get(key, 0) for key in Sight._fields)) for _, _, layer in members(spec)]
    return [each[layer % len(each)] for layer in range(n_layer)]


def tempers(spec, n_layer, usual):
    """The temper of every layer under a value of the flag: its member's, or else the `usual` one."""
    each = [layer.get("temper", usual) for _, _, layer in members(spec)]
    return [each[layer % len(each)] for layer in range(n_layer)]


def every():
    """Values of the flag to train, test and show: all encodings, in the form that has positions without end, and their
    variants."""
    specs = (spec for name, cls in ENCODINGS.items() for spec in (cls.unbounded or name, *cls.variants, *cls.stretches))
    return list(dict.fromkeys(specs))


def derives(spec, base):
    """Whether a value of the flag names the encodings of another, whatever their arguments, or such as derive from them
    (rerope from rope): those may take over its weights and arguments. What they have inside derives likewise."""

    def inside(cls, arguments, _):
        return [cls.checked(arguments)[key] for key in cls.nested]

    def own(new, old):
        return issubclass(new[0], old[0]) and all(map(derives, inside(*new), inside(*old)))

    new, old = members(spec), members(base)
    old = old * len(new) if len(old) == 1 else old  # A list may give each layer what all of them had.
    return len(new) == len(old) and all(map(own, new, old))


def build(spec, n_layer, **sizes):
    """One encoding for every layer from `spec`, a string or a list of strings that is cycled over the layers. What a
    member says of its layer leaves the encoding as it is: members that differ in that alone share an instance."""
    parsed = [member[:2] for member in members(spec)]
    unused = brief(", ".join(spec[n_layer:])) if len(parsed) > max(1, n_layer) else ""
    require(not unused, f"posenc has {len(parsed)} members for n_layer={n_layer} layers: {unused} would do nothing")
    latest, layers = {}, []
    for layer in range(n_layer):
        cls, arguments = parsed[layer % len(parsed)]
        key = (cls, repr(arguments))
        if key not in latest or not latest[key].shared:
            try:
                latest[key] = cls(**sizes, layer=layer, **arguments)
            except (RuntimeError, MemoryError) as error:  # a table that is larger than memory, say
                raise ValueError(f"{cls.name} cannot be built: {brief(str(error).partition(chr(10))[0])}") from error
        if latest[key].embeds and any(member != parsed[0] for member in parsed):
            raise ValueError(f"{cls.name} acts before the first layer, so it cannot stand in a list over the layers")
        layers.append(latest[key])
    return layers


def check(spec, n_layer, temper, sink_logit=False, **sizes):
    """ValueError for a value of the flag that `build` refuses, without building every layer, for a usual `temper` that
    would act on none of them, and for a learned sink where there is no softmax."""
    for encoding in build(spec, min(n_layer, len(members(spec))), **sizes):
        softmax = not (sink_logit and encoding.weighs)
        require(softmax, f"sink_logit is a term of a softmax, and the weights of {encoding.name} are none")
    acts = temper not in BY_POSITION or not all(sight.span for sight in sights(spec, n_layer))
    require(acts, f"temper={temper} acts on layers without window or chunk alone, and there are none")


def merge(spec, override):
    """`override` laid over `spec`: arguments given again for an encoding, or one that derives from it, replace its own,
    the others stay. Another form, such as another scaling of rope, begins with its own defaults. In a list over the
    layers that is done for the members of that encoding, where there are any. A list is laid over one of the same
    length member by member, and "" leaves one as it is."""
    for value in (spec, override if isinstance(override, str) else [text for text in override if text != ""] or spec):
        members(value)  # a mistake in either is said before they are taken apart
    if not isinstance(override, str):
        same = not isinstance(spec, str) and len(spec) == len(override)  # then it is laid over it member by member
        pairs = zip(spec, override, strict=True) if same else [(member, member) for member in override]
        return [merge(old, new) if new else old for old, new in pairs]
    if not isinstance(spec, str):
        ours = [derives(override, member) for member in spec]
        return [merge(m, override) if own else m for m, own in zip(spec, ours, strict=True)] if any(ours) else override
    (_, old, bounds), (new, given, layer) = parse(spec), parse(override)
    if not derives(override, spec):
        return override
    for key, forms in new.forms.items():
        before = old.get(key, new.arguments[key][0])
        if given.get(key, before) != before:
            old = {name: value for name, value in old.items() if not any(name in read for read in forms.values())}
    within = {key: merge(old[key], given[key]) for key in new.nested if key in old and key in given}
    for key, value in bounds.items():
        free = not value or key not in new.arguments
        require(free, f"{new.name} has a {key} of its own, and cannot be laid over {brief(spec)}")
    return written(new, old | given | within, bounds | layer)


def title(override, merged):
    """The name of a row with `override` laid over a run, which makes it `merged`: as it was typed where that says all
    that is in force, or else all of it."""

    def whole(spec):
        return [(cls, cls.checked(arguments), layer) for cls, arguments, layer in members(spec)]

    complete = all([override] if isinstance(override, str) else override)  # An empty member leaves the run's own.
    return str(override if complete and whole(override) == whole(merged) else merged)
