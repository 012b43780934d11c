posenc = "learned"
