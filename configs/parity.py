"""Whether the ones so far are odd in number, in words of up to 32 bits.

It takes an encoding that carries a state: python train.py configs/parity.py --posenc=path
"""

dataset = "parity"
train_length = 32
n_layer = 1
n_head = 4
n_embd = 128
batch_size = 128
max_steps = 1000
learning_rate = 3e-3
eval_interval = 100
