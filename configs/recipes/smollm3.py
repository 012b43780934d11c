"""SmolLM3 (Hugging Face 2025): RoPE, and every fourth layer without positions; no windows.

Scaled: base 5e4 at 4,096 to 180 at 128 (command_a.py says how).
"""

posenc = ["rope(base=180)", "rope(base=180)", "rope(base=180)", "none"]
