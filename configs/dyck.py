"""Which bracket closes the innermost that is open, at most four deep, in up to 64 brackets."""

dataset = "dyck"
train_length = 64
n_layer = 2
n_head = 4
n_embd = 128
batch_size = 64
max_steps = 1000
learning_rate = 3e-3
eval_interval = 200
