"""Nested plain values become typed values; `assemble` makes of them what training takes.

It knows all that has a name in a config file, and nothing of the commands.
"""
