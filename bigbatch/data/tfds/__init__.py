"""What tensorflow-datasets has prepared, read without TensorFlow, and prepared with it if asked.

It knows its directories and metadata, and nothing of how its examples are used.
"""
