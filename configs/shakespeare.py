"""nanoGPT's tiny Shakespeare in three minutes of two CPU cores, byte by byte, below what it reports for an A100."""

dataset = "shakespeare"
train_length = 256
length_schedule = {0.0: 64, 0.4: 128, 0.8: 256}
n_layer = 4
n_head = 5
n_embd = 160
batch_size = 8
max_steps = 1900
learning_rate = 5e-3
decay = 0.8
eval_interval = 190
checkpoint_interval = 190
