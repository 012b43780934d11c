"""gpt-oss (OpenAI 2025): RoPE, every other layer under a window of 128, and a learned sink in every head.

Scaled: the window, 1/32 of the 4,096 tokens of training there, to T/4, as four tokens would be too few; base 1.5e5 at
4,096 to 530 at 128 (command_a.py says how). YaRN by 32, which it has in all layers, is left out.

Read in openai/gpt-oss, gpt_oss/torch/model.py, whose initial_context_length is taken for the length of training.
"""

posenc = ["rope(window=32, base=530)", "rope(base=530)"]
sink_logit = True
