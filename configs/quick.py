"""For comparisons: twelve encodings with three seeds each in less than an hour of two CPU cores."""

max_steps = 400
eval_interval = 400
