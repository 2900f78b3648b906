#!/bin/bash
# One rank under srun: `rank.sh COMMAND...`. srun kills all other ranks once one of them exits with anything but 0
# (--kill-on-bad-exit) and answers with the highest code. Ranks that end at the same moment must not kill each other,
# and what is no use to repeat must outvote the rest, so codes leave in this order:
#   0         done; or saved, where rank 0 says so
#   69, 75    a rank was lost; rank 0: the state is saved (mc2_hpc/training/stop.py)
#   128 + n   killed by signal n
#   200 + n   failed for good with code n
trap : TERM USR1  # Slurm signals every process of a step; the trainer is the one to act, and this shell waits for it
"$@"
code=$?
case $code in
  0 | 69) ;;
  75) if [ "$SLURM_PROCID" = 0 ]; then sleep 3; else code=0; fi ;;  # the others leave before rank 0 does
  *) [ $code -ge 128 ] || code=$((code < 55 ? 200 + code : 255)) ;;
esac
exit $code
