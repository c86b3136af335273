#!/usr/bin/env bash
# Ends the Ray of a cluster of machines of one's own, deploy/down.sh [deploy/cluster.yaml]: `ray down` ends that of the head, and leaves processes
# on the workers. Machines of a cloud are taken back by `ray down` alone.
set -euo pipefail
config=${1:-deploy/cluster.yaml}
ray down -y "$config"
read -r user key workers < <(python3 -c "
import sys, yaml
values = yaml.safe_load(open(sys.argv[1]))
print(values['auth']['ssh_user'], values['auth']['ssh_private_key'], *values['provider']['worker_ips'])" "$config")
for worker in $workers; do
  ssh -n -o StrictHostKeyChecking=no -i "${key/#\~/$HOME}" "$user@$worker" "bash -ic 'ray stop'"
done
