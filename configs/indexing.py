"""Finding letters by their distance from other letters, in words of up to 44: from content to a place, and back.

In the paper pope learns it and rope does not: python train.py configs/indexing.py --posenc=pope
"""

dataset = "indexing"
train_length = 64
n_layer = 3
n_head = 4
n_embd = 128
batch_size = 64
max_steps = 1500
learning_rate = 3e-3
eval_interval = 250
