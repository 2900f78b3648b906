# The environment that every job in this folder needs before Python starts. The batch script sources it on the job's first
# node, and srun passes the environment on to all others. Copy it, adapt it to your cluster, and name the copy with
# `mc2 train ... --slurm env=FILE` or MC2_ENV=FILE.

# The cluster's modules and virtual environment, if the default `python` is not the right one:
#   module load cuda
#   source /shared/mc2/.venv/bin/activate
export MC2_PYTHON=${MC2_PYTHON:-python}

# Torch would start one thread per core in every rank, but the cores are needed by the decoding processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Without buffering, the last lines of a killed rank reach the log.
export PYTHONUNBUFFERED=1

# Warnings only; INFO shows which network NCCL uses, the first thing to check in a slow run.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# On nodes with several networks NCCL and gloo may choose the wrong one; `ip addr` shows the name of the right one:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# How many times a job may start without a new checkpoint before it gives up (docs/slurm.md):
#   export MC2_MAX_STARTS=5
