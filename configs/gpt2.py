"""GPT-2 small's size (124M parameters with a tied head) and batch: 12 layers, 768 wide, 491,520 tokens a step."""

train_length = 1024
n_layer = 12
n_head = 12
n_embd = 768
tie_embeddings = True
tokenizer = "gpt2"
vocab_size = 50304  # 50257 and padding that is never drawn: multiples of 64 are faster
batch_size = 480
micro_batch_size = 15
max_steps = 19000  # 9.3 billion tokens
learning_rate = 2e-3
warmup = 0.01
eval_interval = 250
eval_tokens = 1048576
checkpoint_interval = 1000
