"""The verbs of the command line, a file or package each. Nothing else knows of them."""
