"""The language of the `posenc` flag: `rope`, `rope(base=500000)`, or a list of such values, cycled over the layers.

A value is parsed and never evaluated, built into one encoding for every layer, and laid over another: by `init_from`,
or at test time by the `--posenc` of the commands that read a finished run.
"""

import ast
import warnings

from core.encoding import ENCODINGS
from core.errors import brief, nearest, require

LONGEST, MOST = 100_000, 1000  # characters of a value of the flag, members of a list over the layers


def parse(spec):
    """'rope(base=5e5)' -> (RoPE, {'base': 5e5}). Arguments are literals, never evaluated; ValueError says what is off.

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
    ENCODINGS[name].checked(arguments)
    return ENCODINGS[name], arguments


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
    """A value of the flag -> [(class, arguments)], as `parse` reads them: one, or those of a list over the layers."""
    listed = [spec] if isinstance(spec, str) else spec
    require(listed, "posenc is an empty list; name at least one encoding")
    require(len(listed) <= MOST, f"posenc lists {len(listed)} encodings; it takes at most {MOST}")
    return [parse(text) for text in listed]


def every():
    """Values of the flag to train, test and show: all encodings, in the form that has positions without end, and their
    variants."""
    specs = (spec for name, cls in ENCODINGS.items() for spec in (cls.unbounded or name, *cls.variants, *cls.stretches))
    return list(dict.fromkeys(specs))


def derives(spec, base):
    """Whether a value of the flag names the encodings of another, whatever their arguments, or such as derive from them
    (rerope from rope): those may take over its weights and arguments. What they have inside derives likewise."""

    def inside(cls, arguments):
        return [cls.checked(arguments)[key] for key in cls.nested]

    def own(new, old):
        return issubclass(new[0], old[0]) and all(map(derives, inside(*new), inside(*old)))

    new, old = members(spec), members(base)
    return len(new) == len(old) and all(map(own, new, old))


def build(spec, n_layer, **sizes):
    """One encoding for every layer from `spec`, a string or a list of strings that is cycled over the layers."""
    parsed = members(spec)
    latest, layers = {}, []
    for layer in range(max(n_layer, len(parsed))):  # members beyond the last layer are built too, to check them
        cls, arguments = parsed[layer % len(parsed)]
        key = (cls, repr(arguments))
        if key not in latest or not latest[key].shared:
            try:
                latest[key] = cls(**sizes, layer=layer, **arguments)
            except (RuntimeError, MemoryError) as error:  # a table that is larger than memory, say
                raise ValueError(f"{cls.name} cannot be built: {brief(str(error).partition(chr(10))[0])}") from error
        if len(parsed) > 1 and latest[key].embeds:
            raise ValueError(f"{cls.name} acts before the first layer, so it cannot stand in a list over the layers")
        layers.append(latest[key])
    return layers[:n_layer]


def merge(spec, override):
    """`override` laid over `spec`: arguments given again for an encoding, or one that derives from it, replace its own,
    the others stay. Another form, such as another scaling of rope, begins with its own defaults. In a list over the
    layers that is done for the members of that encoding, where there are any."""
    for value in (spec, override):
        members(value)  # a mistake in either is said before they are taken apart
    if not isinstance(override, str):
        return [merge(member, member) for member in override]
    if not isinstance(spec, str):
        ours = [derives(override, member) for member in spec]
        return [merge(m, override) if own else m for m, own in zip(spec, ours, strict=True)] if any(ours) else override
    (_, old), (new, given) = parse(spec), parse(override)
    if not derives(override, spec):
        return override
    for key, forms in new.forms.items():
        before = old.get(key, new.arguments[key][0])
        if given.get(key, before) != before:
            old = {name: value for name, value in old.items() if not any(name in read for read in forms.values())}
    within = {key: merge(old[key], given[key]) for key in new.nested if key in old and key in given}
    arguments = ", ".join(f"{key}={value!r}" for key, value in (old | given | within).items())
    return f"{new.name}({arguments})" if arguments else new.name


def title(override, merged):
    """The name of a row with `override` laid over a run, which makes it `merged`: as it was typed where that says all
    that is in force, or else all of it."""

    def whole(spec):
        return [(cls, cls.checked(arguments)) for cls, arguments in members(spec)]

    return str(override if override and whole(override) == whole(merged) else merged)
