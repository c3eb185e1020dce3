"""A GPU checked and timed stage by stage: `check_gpu.sh` runs these."""
