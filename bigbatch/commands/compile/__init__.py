"""Programs for devices that are described and not there: a run compiled for a pod by its compilers.

It knows how to describe devices and how to read what a compiler says of a program. What is compiled
is `training.programs`', as for devices that are there.
"""
