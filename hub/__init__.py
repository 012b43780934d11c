"""Published models in and out: hf:NAME becomes a run, and a run becomes a Hugging Face folder."""
