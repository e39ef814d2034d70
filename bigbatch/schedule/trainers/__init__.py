"""Schedules as other trainers write them down: a module for each format, read, checked and written.

A format is text on one side and a policy or a plan on the other. It knows no device and no trainer
of ours, and imports nothing of the trainer whose format it is.
"""
