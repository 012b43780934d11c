posenc = "rope"
