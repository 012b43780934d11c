"""Recalling which digit followed each of up to 10 two-letter keys."""

dataset = "recall"
train_length = 64
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 64
max_steps = 600
eval_interval = 100
