"""Rope's settings, as config.json has them and as `posenc` has them. Pure functions; a key of config.json that asks for
what our rope does not compute is a ValueError that names the key."""

import math

import posenc
from core.errors import brief, require

ORIGINAL = "original_max_position_embeddings"
LARGEST = 1 << 24  # of the sizes in config.json: positions beyond it are no whole numbers in float32


def unsupported(key, value):
    """Raise the ValueError for a key of config.json."""
    raise ValueError(f"{key}={brief(repr(value))} is not supported")


def first(key, *values):
    """The first of the values of a key that is there: a number of 0 or more, below 1e30. ValueError names the key."""
    value = next(value for value in values if value is not None)
    require(type(value) in (int, float) and 0 <= value < 1e30, f"{key}={brief(repr(value))} is no number of 0 or more")
    return value


# their rope_type -> our scaling, and the keys that go with it in both
SCALINGS = {
    "default": ("none", ()),
    "linear": ("linear", ("factor",)),
    "dynamic": ("dynamic", ("factor",)),
    "yarn": ("yarn", ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor")),
    "llama3": ("llama3", ("factor", "low_freq_factor", "high_freq_factor")),
    "longrope": ("longrope", ("factor", "short_factor", "long_factor", "attention_factor")),
    "proportional": ("linear", ("factor",)),  # Their own name for a share of the pairs.
}
FROM_ORIGINAL = ("yarn", "llama3", "longrope")  # relative to ORIGINAL


def rope_parameters(cfg):
    """config.json -> (rope_type, the other parameters), from `rope_scaling` of older files, else `rope_parameters`."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(cfg.get(key) or {}, dict):
            unsupported(key, cfg[key])
    stated = cfg.get("rope_scaling") or cfg.get("rope_parameters") or {}
    parameters = {key: value for key, value in stated.items() if value is not None}
    older, newer = (parameters.pop(key, None) for key in ("type", "rope_type"))
    kind = newer or older or "default"
    if kind not in list(SCALINGS):
        unsupported("rope_type", kind)
    parameters.pop("finetuned", None)  # YaRN's authors wrote it, and it says nothing.
    return kind, parameters


def rotated_part(turned, kind, head_dim, usual_share):
    """The share of each head that their rotation turns -> our arguments of rope."""
    if kind == "proportional":
        return {"fraction": turned}
    if turned != 1 and usual_share == 1:  # Such families have the share in that kind alone.
        unsupported("partial_rotary_factor", turned)
    dims = int(head_dim * turned)
    if dims == 0:  # which to our rope means all of them
        return {"fraction": 0.0}
    return {} if dims == head_dim else {"dims": dims}


def read_rope(cfg, base="rope_theta", share="partial_rotary_factor", usual_share=1.0):
    """config.json -> our `posenc` and `original_length`. `base` and `share` are the keys that older files have for
    these, beside `rope_scaling`."""
    kind, parameters = rope_parameters(cfg)
    scaling, keys = SCALINGS[kind]
    head_dim, longest = cfg["hidden_size"] // cfg["num_attention_heads"], cfg["max_position_embeddings"]
    if cfg.get("head_dim") not in (None, head_dim):
        unsupported("head_dim", cfg["head_dim"])
    inside = parameters.pop(ORIGINAL, None)
    original = first(ORIGINAL, cfg.get(ORIGINAL), inside, longest) if kind in FROM_ORIGINAL else longest
    fits = 1 <= original <= LARGEST and original == int(original)
    require(fits, f"{ORIGINAL} must be a whole number in 1 ... {LARGEST}, not {original}")
    arguments = {"base": float(first("rope_theta", parameters.pop("rope_theta", None), cfg.get(base), 10000.0))}
    turned = first("partial_rotary_factor", parameters.pop("partial_rotary_factor", None), cfg.get(share), usual_share)
    arguments |= rotated_part(float(turned), kind, head_dim, usual_share)
    if kind in ("yarn", "longrope"):
        parameters.setdefault("factor", longest / original)
    if kind == "yarn":
        over, under = (first(key, parameters.pop(key, 0)) for key in ("mscale", "mscale_all_dim"))
        require(first("factor", parameters["factor"]) >= 1, f"factor must be at least 1, not {parameters['factor']}")
        if over and under:
            over, under = (0.1 * scale * math.log(parameters["factor"]) + 1 for scale in (over, under))
            parameters.setdefault("attention_factor", over / under)
    for key in sorted(parameters.keys() - set(keys)):
        unsupported(f"rope_scaling: {key}", parameters[key])
    complete = "factor" in parameters or kind in ("default", "proportional")
    require(complete, f"rope_scaling of type {kind} lacks factor")
    if scaling != "none" and (scaling, parameters.get("factor", 1)) != ("linear", 1):
        arguments |= {"scaling": scaling} | parameters
    text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return {"posenc": f"rope({text})", "original_length": int(original) if original != longest else 0}


def write_rope(config, base="rope_theta", share="partial_rotary_factor", usual_share=1.0):
    """A Config -> their keys, the inverse of `read_rope`, in the older form that all versions of transformers read; {}
    for an encoding that is no rope. Arguments that have no place in it are left out."""
    cls, arguments, _ = posenc.parse(config.posenc) if isinstance(config.posenc, str) else (None, {}, {})
    if cls is not posenc.RoPE:
        return {}
    arguments = cls.checked(arguments)
    scaling, T, head_dim = arguments["scaling"], config.sizes["train_length"], config.sizes["head_dim"]
    kind = next(kind for kind, (ours, _) in SCALINGS.items() if ours == scaling)
    cfg = {base: arguments["base"]}
    if usual_share != 1:
        dims = arguments["dims"] or head_dim
        exact = int(head_dim * (dims / head_dim)) == dims  # as they compute it
        cfg[share] = dims / head_dim if exact else math.nextafter(dims / head_dim, 1)
    parameters = {key: arguments[key] for key in SCALINGS[kind][1] if arguments[key] or key == "truncate"}
    if arguments["fraction"] != 1:
        kind, factor = "proportional", {"factor": arguments["factor"]} if parameters else {}
        parameters = {"partial_rotary_factor": arguments["fraction"]} | factor
    # With an original length, some versions of transformers take the factor to be the quotient of the lengths.
    if kind == "llama3" or (kind in FROM_ORIGINAL and config.train_length == T * arguments["factor"]):
        cfg[ORIGINAL] = parameters[ORIGINAL] = T
    elif kind in ("dynamic", *FROM_ORIGINAL):
        cfg["max_position_embeddings"] = T
    return cfg if kind == "default" else cfg | {"rope_scaling": {"rope_type": kind} | parameters}
