posenc = "none"
