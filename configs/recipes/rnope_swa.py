"""RNoPE-SWA (Yang et al. 2025): three layers of RoPE under a window, then one without positions over everything.

Windows there are 4,096 tokens of 8,192 and more; here a quarter of T = 128, the share of most models since.
"""

posenc = ["rope(window=32)", "rope(window=32)", "rope(window=32)", "none"]
