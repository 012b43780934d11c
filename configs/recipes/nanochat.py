"""nanochat (Karpathy 2025): three layers under a window of T/4 and one that sees everything, RoPE in all of them.

Scaled: base 1e5 at 2,048 to 1100 at 128 (command_a.py says how). Queries and keys are normalised and multiplied by 1.2
each, logits by 1.44. There the last layer sees everything wherever the pattern ends.

Read in karpathy/nanochat, nanochat/gpt.py at 92d63d4.
"""

posenc = [
    "rope(window=32, base=1100)", "rope(window=32, base=1100)", "rope(window=32, base=1100)", "rope(base=1100)",
]  # fmt: skip
qk_norm = True
qk_scale = 1.44
