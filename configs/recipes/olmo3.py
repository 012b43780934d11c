r"""OLMo 3 (Ai2 2025): three layers of RoPE under a window of 4,096 and one of RoPE over everything, which alone is
stretched afterwards: --posenc='["", "", "", "rope(scaling=\"yarn\", factor=4)"]'.

Scaled: the window to T/4; base 5e5 at 8,192 to 570 at 128 (command_a.py says how).
"""

posenc = ["rope(window=32, base=570)", "rope(window=32, base=570)", "rope(window=32, base=570)", "rope(base=570)"]
qk_norm = True
