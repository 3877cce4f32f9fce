"""Video generators, each a class and a command of its own."""
