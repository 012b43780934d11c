"""Recalling which digit followed each of up to 5 two-letter keys."""

dataset = "recall"
train_length = 32
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 64
max_steps = 2000
learning_rate = 3e-3
eval_interval = 200
checkpoint_interval = 500
