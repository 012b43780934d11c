"""Sorting up to 15 digits."""

dataset = "sort"
train_length = 32
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 128
max_steps = 1000
learning_rate = 3e-3
eval_interval = 200
