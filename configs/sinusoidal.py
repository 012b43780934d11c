posenc = "sinusoidal"
