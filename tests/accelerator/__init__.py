"""What only an accelerator can tell, as one command; see README.md beside this file."""
