posenc = "alibi"
