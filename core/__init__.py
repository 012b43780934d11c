"""What the commands share: encodings and attention, runs and settings. It knows neither the laboratory nor the hub."""
