"""Inkling (Thinking Machines 2026): relative logits from content and no rotation, five layers under a window of 512 and
one over everything; keys and values mixed with those of the three tokens before.

Scaled: the window to T/4, and the extents with it: the window's own, and twice that over everything. Queries and keys
are normalised and their product is divided by D, so qk_scale is 1/sqrt(26). The temper of the layers over everything
begins at T, in the released model at 128,000 tokens. Its convolutions behind the blocks and its experts are left out.
Six layers of this width have about as many parameters as the default model.
"""

n_layer = 6
n_embd = 104
posenc = [
    "inkling(window=32, extent=32)", "inkling(window=32, extent=32)", "inkling(window=32, extent=32)",
    "inkling(window=32, extent=32)", "inkling(window=32, extent=32)", "inkling(extent=64)",
]  # fmt: skip
temper = "inkling"
qk_norm = True
qk_scale = 0.196
short_conv = True
