"""Reading the bit that was written last, in up to 64 instructions."""

dataset = "flipflop"
train_length = 128
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 32
max_steps = 1000
learning_rate = 3e-3
eval_interval = 200
