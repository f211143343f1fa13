#!/bin/bash
# A slice of TPU VMs, all of its hosts with one command: NAME=... ZONE=... bash docs/launch/tpu_vm.sh
# v5p-256 is what Google calls the 128 chips of v5p:4x4x8, 4 on each of 32 hosts. The disk that all of them see is
# yours to mount (Filestore, for example), here under /shared, with a clone of this repository in it.
set -euo pipefail

gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type=v5p-256 --version=v2-alpha-tpuv5

everywhere() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

everywhere 'python3 -m venv ~/venv && ~/venv/bin/pip install --quiet -e "/shared/longctx[tpu]"'
everywhere 'cd /shared/longctx && ~/venv/bin/python -m longctx.train --config=experiments/hybrid_1b_1m.py:1m \
    --workdir=/shared/runs/hybrid_1b_1m --coordinator=auto'
