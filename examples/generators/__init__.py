<<<<<<< HEAD
"""Video generators, each a class and a command of its own."""
=======
"""Generators for collabvr.py: a class each, and a command each."""
>>>>>>> gpu
