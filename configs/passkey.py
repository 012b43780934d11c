"""Finding a pass key in up to four other sentences."""

dataset = "passkey"
train_length = 128
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 32
max_steps = 400
learning_rate = 3e-3
eval_interval = 100
