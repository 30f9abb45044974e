#!/usr/bin/env bash
# Stops the server that scripts/start-server.sh started: running pictures may finish first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pid_file=logs/server.pid
# after a reboot the number may be another process's
if [ ! -f "$pid_file" ] || ! ps -p "$(cat "$pid_file")" -o args= | grep -q "zimage serve"; then
  rm -f "$pid_file"
  echo "no server is running"
  exit 0
fi
pid=$(cat "$pid_file")
kill "$pid"
for _ in $(seq 120); do
  if ! kill -0 "$pid" 2>/dev/null; then
    rm -f "$pid_file"
    echo "stopped"
    exit 0
  fi
  sleep 1
done
echo "process $pid does not stop; end it with: kill -9 $pid" >&2
exit 1
