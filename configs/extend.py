"""Stretch the context of a finished rope run to four times its length, in a short fine-tune.

python train.py configs/rope.py
python train.py configs/extend.py --posenc='rope(scaling="yarn", factor=4)'
python compare.py rope 'rope(scaling="yarn", factor=4)' --common=configs/extend.py --out_dir=out/stretched
"""

init_from = "out/rope"
train_length = 512
length_schedule = {0.0: 256, 0.5: 512}  # at the same number of tokens in a step
batch_size = 8
max_steps = 100
learning_rate = 1e-3
warmup = 0.1
eval_interval = 100
