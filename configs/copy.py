"""Copying a word of up to 31 letters."""

dataset = "copy"
train_length = 64
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 64
max_steps = 600
eval_interval = 100
