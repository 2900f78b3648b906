"""Training that breaks on purpose: the fault matrix, what each row did, and the tiny run that all of it happens to.

The tests of training and ``mc2 bench faults`` run the rows; ``benchmarks/soak.py`` strikes at random.
"""
