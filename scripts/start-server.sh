#!/usr/bin/env bash
# Starts `zimage serve` with the given flags in the background, where it outlives the terminal, and waits until it is up.
# Its output goes to logs/server.log, its process id to logs/server.pid. Stop it with scripts/stop-server.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # paths in the flags are those of the caller's folder

pid_file=$root/logs/server.pid log_file=$root/logs/server.log
zimage=$root/.venv/bin/zimage
[ -x "$zimage" ] || zimage=$(command -v zimage) || { echo "zimage is not installed: run 'make install' first" >&2; exit 1; }
mkdir -p "$root/logs"
if [ -f "$pid_file" ] && ps -p "$(cat "$pid_file")" -o args= | grep -q "zimage serve"; then
  echo "the server runs already (process $(cat "$pid_file")); stop it with scripts/stop-server.sh" >&2
  exit 1
fi

detach=$(command -v setsid || true) # macOS has none, where nohup alone does
$detach nohup "$zimage" serve "$@" >"$log_file" 2>&1 </dev/null &
pid=$!
echo "$pid" >"$pid_file"
echo "starting (process $pid); follow it with: tail -f $log_file"
for _ in $(seq "${ZIMAGE_START_TIMEOUT_S:-1800}"); do
  if ! kill -0 "$pid" 2>/dev/null; then
    rm -f "$pid_file"
    echo "the server ended; the end of $log_file:" >&2
    tail -n 5 "$log_file" >&2
    exit 1
  fi
  if grep -q '^Ready' "$log_file"; then
    grep '^Ready' "$log_file"
    exit 0
  fi
  sleep 1
done
echo "the server is still loading; follow it with: tail -f $log_file"
