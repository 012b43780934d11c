"""Gemma 4 (Google 2026): five layers of RoPE under a window of 512, and one over everything in which only the fastest
quarter of the pairs turns (p-RoPE).

Scaled: the window to T/4; base 1e4 at 512 to 110 at 32, and 1e6 at 32,768 to 120 at 128 (command_a.py says how). Six
layers of this width have as many parameters as the default model.

Read in transformers' configuration_gemma4.py. Its length of training was not found; 32,768 is reported of Gemma 3.
"""

n_layer = 6
n_embd = 104
posenc = [
    "rope(window=32, base=110)", "rope(window=32, base=110)", "rope(window=32, base=110)", "rope(window=32, base=110)",
    "rope(window=32, base=110)", "rope(fraction=0.25, base=120)",
]  # fmt: skip
qk_norm = True
