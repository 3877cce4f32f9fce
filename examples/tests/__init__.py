"""Tests of the examples, a file for each of them."""
