"""A batch that follows the measured gradient noise.

`gradient_noise` is the estimate, `controller` decides from it, `course` is the plan as far as it is
decided. Pure functions of plain numbers, which know nothing of what measures.
"""
