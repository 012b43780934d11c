"""Under which of five cups a ball is, after up to 32 swaps. The rows are short at first.

It takes an encoding that carries a state: python train.py configs/s5.py --posenc=path
"""

dataset = "s5"
train_length = 32
length_schedule = {0.0: 8, 0.4: 16, 0.7: 32}
n_layer = 1
n_head = 4
n_embd = 128
batch_size = 128
max_steps = 1500
learning_rate = 3e-3
eval_interval = 100
