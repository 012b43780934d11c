"""Qwen3 (Alibaba 2025): RoPE in every layer, without windows, and normalised queries and keys.

Scaled: base 1e6 at 32,768 to 120 at 128 (command_a.py says how).
"""

posenc = "rope(base=120)"
qk_norm = True
