# What every job of this folder needs before Python starts. Sourced by the batch script on the first node of the job;
# srun hands the environment on to all others. Copy it, make it your cluster's, and name the copy with
# `mc2 train ... --slurm env=FILE` or MC2_ENV=FILE.

# Modules and the virtual environment of this cluster, where `python` is not right as it is:
#   module load cuda
#   source /shared/mc2/.venv/bin/activate
export MC2_PYTHON=${MC2_PYTHON:-python}

# Torch would start a thread a core in every rank; the cores belong to the decoding processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Lines of a rank that is killed are in the log, not in its buffer.
export PYTHONUNBUFFERED=1

# Warnings only; INFO says which network NCCL took, the first question about a slow run.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# On nodes with several networks NCCL and gloo may meet on the wrong one; `ip addr` shows the name of the right one:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Starts of one job without a new checkpoint between them before it is given up (docs/slurm.md):
#   export MC2_MAX_STARTS=5
