"""Speed and memory: one file and one command for each question."""
