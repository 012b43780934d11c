"""Recalling which digit followed each of up to 5 two-letter keys.

Until it looks keys up, a model gains more by guessing digits that were not yet asked for. Among two keys that helps
little, so the rows are short at first; even so the loss does not move for a thousand steps, and then falls.
"""

dataset = "recall"
train_length = 32
length_schedule = {0.0: 16, 0.5: 32}
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 64
max_steps = 3500
learning_rate = 2e-3
warmup = 0.1
eval_interval = 250
checkpoint_interval = 500
