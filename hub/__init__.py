"""Published models: Hugging Face folders as runs of ours, and runs of ours as such folders."""
