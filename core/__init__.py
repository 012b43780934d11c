"""The parts that all commands share: encodings and attention, runs and settings.

model.py and posenc.py lie between them: encoding, attention and cache below the model, settings and runs above it.
Nothing here knows the laboratory or the hub.
"""
