"""modded-nanogpt (2026): windows that grow by thirds of the run, and heads of which half the pairs turn.

Its windows grow from 128 to 640 tokens, and in two of its ten layers of attention from 384 to 1,408, in sequences of at
most 2,048; here T is 128, one layer of four has the wide one, and all are a sixteenth. Its frequencies fall from 1 to
1/1024 over the pairs that turn; 1024 at 2,048 becomes 11 at 128 (command_a.py says how), and with exponents over the
whole head, as `fraction` has them, that is a base of 11 squared. Left out are YaRN at each growth, a last and short
growth to 768 and 1,664, paired heads and gates.

Read in KellerJordan/modded-nanogpt, train_gpt.py at f411b3d.
"""

posenc = [
    "rope(window=40, fraction=0.5, base=121)", "rope(window=40, fraction=0.5, base=121)",
    "rope(window=40, fraction=0.5, base=121)", "rope(window=88, fraction=0.5, base=121)",
]  # fmt: skip
window_schedule = {0.0: 0.25, 0.33: 0.6, 0.67: 1.0}
qk_norm = True
