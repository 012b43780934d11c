"""Gemma 3 (Google 2025): five layers of RoPE under a window of 1,024, and one with a larger base over everything.

Scaled: the window to T/4; base 1e4 at 1,024 to 35 at 32, and 1e6 at 32,768 to 120 at 128 (command_a.py says how). Six
layers of this width have as many parameters as the default model.

Left out: at the end of training, the larger models divide positions by 8 in the layers over everything.

Read in transformers' configuration_gemma3.py and convert_gemma3_weights.py, where the 1B has a window of 512. That they
train on 32,768 tokens is as reported of the technical report.
"""

n_layer = 6
n_embd = 104
posenc = [
    "rope(window=32, base=35)", "rope(window=32, base=35)", "rope(window=32, base=35)", "rope(window=32, base=35)",
    "rope(window=32, base=35)", "rope(base=120)",
]  # fmt: skip
qk_norm = True
