"""The default text, and recall and pass keys in every second row: what one model predicts, and what it finds."""

dataset = ["python", "python", "recall", "passkey"]
max_steps = 1000
eval_interval = 200
