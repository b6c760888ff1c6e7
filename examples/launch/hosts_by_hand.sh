#!/usr/bin/env bash
# Hosts that no scheduler knows of: the same command on each, with its own number.
#
#     ./hosts_by_hand.sh 0 2      # on the first, which the others have to reach at port 12345
#     ./hosts_by_hand.sh 1 2      # on the second
#
# output has to be on a file system that all of them share. If one dies, the others end within
# distributed.timeout seconds; start all of them again.
set -euo pipefail
: "${COORDINATOR:?host:port of the first, e.g. COORDINATOR=10.0.0.1:12345}"

~/.venvs/droplora/bin/droplora train run.yaml \
  distributed.coordinator="$COORDINATOR" \
  distributed.num_processes="$2" \
  distributed.process_id="$1"
