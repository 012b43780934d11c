"""Adding two numbers of up to 7 digits."""

dataset = "addition"
train_length = 24
n_layer = 3
n_head = 4
n_embd = 128
batch_size = 96
max_steps = 800
learning_rate = 3e-3
eval_interval = 100
