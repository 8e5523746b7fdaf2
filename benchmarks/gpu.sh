#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most eight minutes: tests, benchmark, profiles, training runs.
#
#   OUT=folder benchmarks/gpu.sh        results in $OUT, by default ./gpu_results; PYTHON names the interpreter
#
# Each part has a time limit and a log; one that fails does not stop the others. summary.json says how each ended
# and how long it took; the exit status is the number of parts that failed. The package need not be installed.
set -uo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-gpu_results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 125
python=${PYTHON:-python3}
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
cd "$here" || exit 125

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0
rows=()

# part NAME SECONDS COMMAND...: runs a command with a limit, its output in NAME.log
part() {
  local name=$1 limit=$2 status begun took
  shift 2
  echo "== $name (at most $limit s)"
  begun=$(date +%s%N)
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  took=$((($(date +%s%N) - begun) / 1000000))
  rows+=("{\"part\": \"$name\", \"status\": $status, \"milliseconds\": $took}")
  if [ "$status" -ne 0 ]; then
    failed=$((failed + 1))
    tail -n 15 "$out/$name.log"
  fi
  echo "   status $status after $((took / 1000)) s"
}

part device 30 "$python" - "$out/device.json" <<'PY'
import json, platform, sys
import torch, warp as wp
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
p = torch.cuda.get_device_properties(0)
found = {
    "device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
    "memory": p.total_memory, "torch": torch.__version__, "cuda": torch.version.cuda, "warp": wp.__version__,
    "python": platform.python_version(), "warp devices": [str(d) for d in wp.get_devices()],
}
json.dump(found, open(sys.argv[1], "w"), indent=1)
print(found)
PY

train=("$python" -m warp_sims train cartpole --device cuda --epochs 12 --log-every 4 --no-progress)
# only files that have such tests: others may need packages that are not there
mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
part tests 150 "$python" -m pytest -m gpu -q -n 8 -p no:cacheprovider --junit-xml="$out/tests.xml" "${files[@]}"
bench=("$python" -m warp_sims bench --device cuda --batch 8 4096 --contestants warp-sims jax torch)
part bench 120 "${bench[@]}" --rounds 5 --time-limit 2 --no-memory --json "$out/bench.json"
for system in cartpole guidance quantum; do
  part "profile_$system" 30 "$python" -m warp_sims profile "$system" --device cuda --json "$out/profile_$system.json"
done
part train_eager 40 "${train[@]}" --out "$scratch/eager"
part train_graph 40 "${train[@]}" --graph --out "$scratch/graph"

part compare 10 "$python" - "$scratch" "$out/train.json" <<'PY'
import csv, json, sys
from pathlib import Path
runs = {n: list(csv.DictReader(open(Path(sys.argv[1]) / n / "log.csv"))) for n in ("eager", "graph")}
# the first rows hold compilation and capture
seconds = {n: float(r[-1]["seconds"]) - float(r[1]["seconds"]) for n, r in runs.items()}
same = [[row[c] for c in row if c != "seconds"] for row in runs["eager"]] == [
    [row[c] for c in row if c != "seconds"] for row in runs["graph"]
]
updates = 32 * (int(runs["eager"][-1]["epoch"]) - int(runs["eager"][1]["epoch"]))
found = {"seconds": seconds, "updates": updates, "same numbers": same, "logs": runs}
json.dump(found, open(sys.argv[2], "w"), indent=1)
print({n: f"{1e3 * s / updates:.3f} ms an update, evaluation included" for n, s in seconds.items()}, same)
sys.exit(0 if same else "the graph gave other numbers than the updates without it")
PY

(
  IFS=,
  printf '[%s]\n' "${rows[*]}"
) >"$out/summary.json"
echo "$failed of ${#rows[@]} parts failed; results in $out"
exit "$failed"
