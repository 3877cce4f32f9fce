"""The maze world: the whole method on a laptop, without a key, a GPU or a network."""
