"""Copying a word of up to 15 letters."""

dataset = "copy"
train_length = 32
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 64
max_steps = 800
eval_interval = 100
