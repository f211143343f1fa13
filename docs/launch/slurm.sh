#!/bin/bash
# GPUs under SLURM: sbatch docs/launch/slurm.sh
#SBATCH --job-name=longctx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300   # five minutes before the end: the step in progress is finished and saved
#SBATCH --requeue           # the same command goes on from there
#SBATCH --output=%x-%j.log  # one log: only the first process writes, the others when they end with an error

# One process a node, with all of its GPUs: without this, jax gives each process of SLURM a single one.
export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))

# A workdir that all nodes see.
srun python -m longctx.train --config=experiments/quickstart.py --workdir="$SLURM_SUBMIT_DIR/runs/quickstart" \
    --coordinator=auto --config.mesh.data=2 --config.mesh.context=8
