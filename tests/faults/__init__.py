"""Training that is broken on purpose: the fault matrix, what each row did, and the tiny run that it is applied to.

The training tests and ``mc2 bench faults`` run the rows; ``benchmarks/soak.py`` injects random faults.
"""
