"""HSTU over jagged histories: input encoders, layers, heads and losses; embeddings come in as an argument."""
