posenc = "t5"
