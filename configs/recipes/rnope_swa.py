"""RNoPE-SWA (Yang et al. 2025): three layers of RoPE under a window, then one without positions over everything.

The window is a quarter of T = 128, the share of most models since; there it is 4,096 tokens. The base is left at 1e4,
the one in these recipes that is not scaled.

The paper (arXiv 2501.18795) could not be read: window, base and pattern are as reported in summaries of it.
"""

posenc = ["rope(window=32)", "rope(window=32)", "rope(window=32)", "none"]
