"""Inkling (Thinking Machines 2026): relative logits from content and no rotation, five layers under a window of 512 and one
over everything; keys and values mixed with the three tokens before.

Scaled: the window to T/4, as the extents, which are the window, and twice that over everything. The queries and keys are
normalised, and their product divided by D: qk_scale = 1/sqrt(26). A temper sharpens the layers over everything. Its
convolutions on the outputs of blocks and its experts are left out. Six layers of this width have about as many
parameters as the default model.
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
