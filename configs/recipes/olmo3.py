r"""OLMo 3 (Ai2 2025): three layers of RoPE under a window of 4,096 and one of RoPE over everything, which alone is
stretched afterwards: --posenc='["", "", "", "rope(scaling=\"yarn\", factor=8)"]'.

Scaled: the window to T/4; base 5e5 at 8,192 to 570 at 128 (command_a.py says how). There, queries and keys are
normalised over all heads at once, here in each.

Read in transformers' configuration_olmo3.py and modeling_olmo3.py; length and factor, which leads to 65,536, in
allenai/OLMo-core, src/scripts/official/OLMo3.
"""

posenc = ["rope(window=32, base=570)", "rope(window=32, base=570)", "rope(window=32, base=570)", "rope(base=570)"]
qk_norm = True
