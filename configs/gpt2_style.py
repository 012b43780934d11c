"""GPT-2's own habits in place of today's: LayerNorm, GELU, biases, a tied head, AdamW on a cosine."""

norm = "layernorm"
norm_affine = True
embed_norm = False
activation = "gelu"
bias = True
init_std = 0.02
zero_init = False
tie_embeddings = True
optimizer = "adamw"
learning_rate = 1e-3
schedule = "cosine"
final_lr = 0.1
