"""Finding the numbers of four keys among up to fourteen, one after the other."""

dataset = "multiquery"
train_length = 128
length_schedule = {0.0: 64, 0.5: 128}
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 32
max_steps = 1500
learning_rate = 3e-3
eval_interval = 250
