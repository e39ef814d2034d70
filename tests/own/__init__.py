"""Tasks, optimizers and data of one's own, each as a user would write it: `prepare` gives its run.

`docs/own.md` shows them; `tests/test_own.py` trains, kills, continues, evaluates and reports them.
"""
