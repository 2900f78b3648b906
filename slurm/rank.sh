#!/bin/bash
# One rank under srun: `rank.sh COMMAND...`. srun kills all other ranks once one of them exits with anything but 0
# (--kill-on-bad-exit) and returns the highest code. Ranks that end at the same time must not kill each other, and a
# permanent failure must take precedence over the rest, so codes are mapped in this order:
#   0         done; or saved, and rank 0 reports it
#   69, 75    a rank was lost; rank 0: the state is saved (mc2_hpc/training/stop.py)
#   128 + n   killed by signal n
#   200 + n   failed permanently with code n
trap : TERM USR1  # Slurm signals every process in a step; the trainer handles it, and this shell waits for the trainer
"$@"
code=$?
case $code in
  0 | 69) ;;
  75) if [ "$SLURM_PROCID" = 0 ]; then sleep 3; else code=0; fi ;;  # rank 0 exits last
  *) [ $code -ge 128 ] || code=$((code < 55 ? 200 + code : 255)) ;;
esac
exit $code
