"""iRoPE (Llama 4, Meta 2025): RoPE inside chunks of 8,192, every fourth layer without positions and with a temper.

Scaled: the chunk to T/4; base 5e5 at 8,192 to 60 at 32 (command_a.py says how). Llama 4 Scout normalises queries and
keys of the RoPE layers after the rotation, which is the same as before it, as a rotation keeps lengths; here all layers
do. Llama 4 with 128 experts does not.

Read in transformers' configuration_llama4.py and modeling_llama4.py.
"""

posenc = ["rope(chunk=32, base=60)", "rope(chunk=32, base=60)", "rope(chunk=32, base=60)", 'none(temper="llama4")']
qk_norm = True
