"""Adding two numbers of up to 9 digits."""

dataset = "addition"
train_length = 32
n_layer = 3
n_head = 4
n_embd = 128
batch_size = 96
max_steps = 600
eval_interval = 100
