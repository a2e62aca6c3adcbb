#!/usr/bin/env bash
# What CI cannot check, on a machine with a GPU, a python3 with CuPy, pytest and hypothesis.
#
#   tools/gpu_check.sh [tests] [sanitizer] [bench] [targets] [prompts] [parity] [ncu]
#                                                      (default: all but parity and ncu)
#
# bench writes $OUT/bench.json, targets compares it with tools/targets.json. Each part fits into nine
# minutes. Logs lie under $OUT (default .gpu_check); the last lines are tables of parts and, if asked
# for, of targets; exit status 1 if anything failed or a target is missed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
out=${OUT:-.gpu_check}
mkdir -p "$out"
rows=()
status=0

run() { # run NAME SECONDS COMMAND...: a log, a time limit, a row of the table
    local name=$1 limit=$2 begin=$SECONDS log result
    shift 2
    log=$out/$name.log
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1
    result=$?
    case $result in 0) result=ok ;; 124 | 137) result="over $limit s" ;; *) result="failed ($result)" ;; esac
    [ "$result" = ok ] || { status=1; tail -n 60 "$log"; }
    rows+=("$(printf '%-26s %-12s %4d s  %s' "$name" "$result" $((SECONDS - begin)) \
        "$(grep -v '^ *$' "$log" | tail -n 1 | cut -c 1-90)")")
}

tests() { # compiling is most of the work: several processes share the GPU
    local parallel=() files
    mapfile -t files < <(grep -lE 'mark\.gpu|machine: Machine' tests/test_*.py)
    python3 -c "import xdist" 2>/dev/null && parallel=(-n 8)
    run tests 400 python3 -m pytest -q -m gpu -p no:cacheprovider "${parallel[@]}" "${files[@]}"
    [ ${#parallel[@]} -eq 0 ] || run measuring 200 python3 -m pytest -q -m "gpu and measures" \
        -p no:cacheprovider "${files[@]}"
}

sanitizer() { # --tool racecheck sees shared memory only; blocks are compared by the tests
    local tool type
    for tool in memcheck racecheck synccheck; do
        for type in int4 bf16; do
            run "$tool-$type" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                python3 tools/gpu_step.py "$type"
        done
    done
    run memcheck-cp_async 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python3 tools/gpu_step.py int4 80
}

bench() { run bench 520 python3 tools/targets.py measure "$out/bench.json" && cat "$out/bench.log"; }

targets() { run targets 20 python3 tools/targets.py check "$out/bench.json"; }

prompts() { run prompts 240 python3 -m minflash bench --quant bf16,int4,int8 \
    --shape smollm2-135m,llama-3.2-1b,llama-3.1-8b --prefill 32,512,2048 && cat "$out/prompts.log"; }

parity() {
    run parity 300 python3 tools/parity.py
    run greedy 200 python3 tools/greedy_check.py
}

ncu() { # one kernel per step: the count of launches as the profiler sees them
    run ncu 200 "$(type -P ncu)" --clock-control none --metrics gpu__time_duration.sum \
        python3 tools/gpu_step.py int4
}

[ $# -gt 0 ] || set -- tests sanitizer bench targets prompts
for part in "$@"; do
    case $part in
    tests | sanitizer | bench | targets | prompts | parity | ncu) "$part" ;;
    *) echo "no part $part: tests, sanitizer, bench, targets, prompts, parity, ncu" && exit 2 ;;
    esac
done

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null
git log -1 --format='commit %h%n' 2>/dev/null
printf '%s\n' "${rows[@]}"
[[ " $* " != *" targets "* ]] || cat "$out/targets.log"
exit "$status"
