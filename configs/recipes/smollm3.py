"""SmolLM3 (Hugging Face 2025): RoPE, and every fourth layer without positions; no windows.

Scaled: base 5e4 at 4,096 to 180 at 128 (command_a.py says how).

Read in transformers' configuration_smollm3.py, whose base of 2e6 comes with longer texts after the first training; base
and length of the first in stage1_8T.yaml, in a fork of huggingface/smollm.
"""

posenc = ["rope(base=180)", "rope(base=180)", "rope(base=180)", "none"]
