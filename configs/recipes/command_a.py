"""Command A (Cohere 2025): RoPE under windows of 4,096, every fourth layer without positions; blocks in parallel.

Scaled: the window to T/4. base 5e4 at a window of 4,096 to 20 at 32, by the bound base > 0.0424 L^1.628 (Xu et al.
2024), relative to which the bases of these recipes stay where their models have them.

Read in transformers' configuration_cohere2.py and modeling_cohere2.py: window, pattern, blocks and norm. The base is as
reported: it stands in the model's config.json, which could not be read.
"""

posenc = ["rope(window=32, base=20)", "rope(window=32, base=20)", "rope(window=32, base=20)", "none"]
parallel_residual = True
norm = "layernorm"
