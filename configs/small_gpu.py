"""About 30M parameters for one GPU and half an hour: 8 layers, 512 wide, the shipped 4,096-token vocabulary."""

train_length = 512
n_layer = 8
n_head = 8
n_embd = 512
tokenizer = "bpe"
batch_size = 64
max_steps = 3000
learning_rate = 3e-3
eval_interval = 250
eval_tokens = 262144
checkpoint_interval = 500
