"""Data sets whose images stay encoded in files: found, read by position, decoded and cropped.

It knows record files and JPEG, and nothing of how its examples are used.
"""
