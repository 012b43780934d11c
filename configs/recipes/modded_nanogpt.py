"""modded-nanogpt (2026): windows that grow by thirds of the run, and heads of which half the pairs turn.

Its windows grow from 128 to 640 tokens, and in every fourth layer from 384 to 1,408, in sequences of 2,048; here T is
128, and all of them a sixteenth. Base 1024 at 2,048 becomes 11 at 128 (command_a.py says how). It stretches its
frequencies by YaRN at each growth, which is left out here, as are its gates.
"""

posenc = [
    "rope(window=40, fraction=0.5, base=11)", "rope(window=40, fraction=0.5, base=11)",
    "rope(window=40, fraction=0.5, base=11)", "rope(window=88, fraction=0.5, base=11)",
]  # fmt: skip
window_schedule = {0.0: 0.25, 0.33: 0.6, 0.67: 1.0}
qk_norm = True
