"""Finding the five variables that hold a number, among up to nineteen."""

dataset = "variables"
train_length = 128
length_schedule = {0.0: 64, 0.5: 128}
n_layer = 3
n_head = 4
n_embd = 128
batch_size = 32
max_steps = 1200
learning_rate = 3e-3
eval_interval = 200
