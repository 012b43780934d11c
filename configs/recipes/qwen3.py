"""Qwen3 (Alibaba 2025): RoPE in every layer, without windows, and normalised queries and keys.

Scaled: base 1e6 at 32,768 to 120 at 128 (command_a.py says how).

Read in transformers' configuration_qwen3.py and modeling_qwen3.py. The base, and that it comes with the last stage of
training alone, are as reported of the technical report; the stages before have 4,096 tokens.
"""

posenc = "rope(base=120)"
qk_norm = True
