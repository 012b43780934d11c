"""modded-nanogpt (2026): windows that grow by thirds of the run, and heads of which half the pairs turn.

Its windows grow from 128 to 640 tokens, and in two of its ten layers of attention from 384 to 1,408, in sequences of at
most 2,048; here T is 128, one layer of four has the wide one, and all are a sixteenth. Its frequencies fall from 1 to
1/1024 over the pairs that turn, so `dims` is half a head, not `fraction`, which would keep the fast half alone. Base
1024 at 2,048 becomes 11 at 128 (command_a.py says how). Left out are YaRN at each growth, a last and short growth to
768 and 1,664, paired heads and gates.

Read in KellerJordan/modded-nanogpt, train_gpt.py at f411b3d.
"""

posenc = [
    "rope(window=40, dims=16, base=11)", "rope(window=40, dims=16, base=11)",
    "rope(window=40, dims=16, base=11)", "rope(window=88, dims=16, base=11)",
]  # fmt: skip
window_schedule = {0.0: 0.25, 0.33: 0.6, 0.67: 1.0}
qk_norm = True
