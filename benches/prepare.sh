# shellcheck shell=bash
# Sourced by the benchmarks: what all of them need before they measure.

project=$(realpath "$benches/..")

# Options of the laboratory, where it is used.
lab_options=()

# Sets rackvisor and guest: the release build, or RACKVISOR_BENCH_BIN, and the folder of the test guest. Arguments are for the
# guest's build.
prepare() {
    rackvisor=${RACKVISOR_BENCH_BIN:-}
    if [[ ! $rackvisor ]]; then
        cargo build --release --quiet --manifest-path "$project/Cargo.toml" -p rackvisor
        rackvisor=${CARGO_TARGET_DIR:-$project/target}/release/rackvisor
    fi
    [[ -x $rackvisor ]] || { echo "bench: there is no $rackvisor" >&2 && exit 1; }
    guest=$("$project/resources/guest/build" "$@")
}

# Runs a script of harness/ as root where there is a KVM that runs stock kernels: here, or in the laboratory.
measure() {
    local script=$1 model
    shift
    model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
    export RACKVISOR_BENCH_HOST="${model:-unknown CPU}, $(nproc) CPUs, load $(cut -d ' ' -f 1 /proc/loadavg)"
    local command=(env PYTHONDONTWRITEBYTECODE=1 python3 "$benches/harness/$script" --rackvisor "$rackvisor" --guest "$guest" "$@")
    if [[ $EUID -eq 0 ]] && "$rackvisor" doctor >/dev/null 2>&1; then
        "${command[@]}"
    else
        # The lab's interpreter drops the translated code of a former guest when its memory is written: 100 ms for 2 MiB,
        # to whoever gets that memory next. Clearing what is freed brings that forward, out of what is measured.
        LAB_KERNEL_ARGS="init_on_free=1 ${LAB_KERNEL_ARGS:-}" "$project/tests/lab/run" \
            --timeout "${BENCH_TIMEOUT:-1800}" "${lab_options[@]}" -- "${command[@]}"
    fi
}
