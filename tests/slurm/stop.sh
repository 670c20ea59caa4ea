#!/usr/bin/env bash
# Stop the cluster that `start.sh DIR` started: its jobs, then its daemons, by their recorded process ids and nothing else.
set -uo pipefail
dir=$(realpath -m "${1:?usage: stop.sh DIR}")
export PATH=/usr/sbin:/usr/bin:/sbin:/bin SLURM_CONF=$dir/etc/slurm.conf

started() { awk '{sub(/^.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$1/stat" 2>/dev/null; }
ours() { # the process id of NAME, if that process still is the one that was started
    local pid start
    read -r pid start 2>/dev/null <"$dir/run/$1.pid" || return 1
    [ -n "$start" ] && [ "$(started "$pid")" = "$start" ] && echo "$pid"
}
stop() {
    local pid n
    if pid=$(ours "$1"); then
        kill "$pid"
        for ((n = 0; n < 150; n++)); do ours "$1" >/dev/null || break; sleep 0.2; done
        if ours "$1" >/dev/null; then kill -9 "$pid"; fi
    fi
    rm -f "$dir/run/$1.pid"
}

if ours slurmctld >/dev/null; then # end the jobs first, so that no job outlives its node
    timeout 60 scancel --user=root --full
    for ((n = 0; n < 80; n++)); do [ -z "$(timeout 5 squeue -h -o %A)" ] && break || sleep 0.5; done
fi
for node in "$dir"/run/slurmd-*.pid; do
    if [ -e "$node" ]; then stop "$(basename "$node" .pid)"; fi
done
for name in slurmctld slurmdbd mariadbd munged; do stop $name; done
if [ "$(readlink /etc/slurm/slurm.conf)" = "$dir/etc/slurm.conf" ]; then rm -f /etc/slurm/slurm.conf; fi
