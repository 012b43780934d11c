"""Speed and memory, measured: one file and one command for each question.

    python -m lab.bench                            every encoding in training and in decoding, at T and at 16 T
    python -m lab.bench.before FOLDER              the same figures at an earlier commit and at this one, by turns
    python -m lab.bench.growth PREFIX              how time and memory grow with each size of a model, with pictures
    python -m lab.bench.generation PREFIX          a token of a text of 32 T, by what the layers see, with pictures
    python -m lab.bench.race NANOGPT               training against nanoGPT
    python -m lab.bench.decode NANOGPT             decoding against nanoGPT, and against transformers if installed
    python -m lab.bench.published FOLDER           a published model here and in transformers
    python -m lab.bench.gpu                        one NVIDIA GPU, beside what the machine itself could do

Whatever is compared takes turns, round after round, and each figure is the median of its rounds: machines drift, ratios
within one run hold. Each command prints its table, and `--table=FILE` writes it into a Markdown file with what made it.
"""
