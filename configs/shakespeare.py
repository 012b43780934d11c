"""nanoGPT's tiny Shakespeare at the size of its CPU example: byte by byte, 4 layers, 128 wide, contexts of 64."""

dataset = "shakespeare"
train_length = 64
n_layer = 4
n_head = 4
n_embd = 128
batch_size = 24
max_steps = 1000
eval_interval = 250
checkpoint_interval = 500
