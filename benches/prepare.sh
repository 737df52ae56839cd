# shellcheck shell=bash
# Sourced by the benchmarks: what all of them need before they measure.

project=$(realpath "$benches/..")

# Options of the laboratory, where it is used.
lab_options=()

# Sets rackvisor: RACKVISOR_BENCH_BIN, or what the command given as arguments builds below the target folder as its first argument.
build_rackvisor() {
    rackvisor=${RACKVISOR_BENCH_BIN:-}
    if [[ ! $rackvisor ]]; then
        "${@:2}" >&2
        rackvisor=${CARGO_TARGET_DIR:-$project/target}/$1/rackvisor
    fi
    [[ -x $rackvisor ]] || { echo "bench: there is no $rackvisor" >&2 && exit 1; }
}

# Sets rackvisor, and guest: the release build, and the folder of the test guest. Arguments are for the guest's build.
prepare() {
    build_rackvisor release cargo build --release --quiet --manifest-path "$project/Cargo.toml" -p rackvisor
    guest=$("$project/resources/guest/build" "$@")
}

# Runs a script of harness/ as root where there is a KVM that runs stock kernels: here, or in the laboratory.
measure() {
    set_command "$@" --guest "$guest"
    if [[ $EUID -eq 0 ]] && "$rackvisor" doctor >/dev/null 2>&1; then
        "${command[@]}"
    else
        in_laboratory
    fi
}

# As measure, where any KVM will do: for guests that are no kernels.
measure_without_guest() {
    set_command "$@"
    if [[ $EUID -eq 0 && -w /dev/kvm ]]; then "${command[@]}"; else in_laboratory; fi
}

# Sets command: what runs the script with its options.
set_command() {
    local script=$1 model
    shift
    model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
    export RACKVISOR_BENCH_HOST="${model:-unknown CPU}, $(nproc) CPUs, load $(cut -d ' ' -f 1 /proc/loadavg)"
    command=(env PYTHONDONTWRITEBYTECODE=1 python3 "$benches/harness/$script" --rackvisor "$rackvisor" "$@")
}

in_laboratory() {
    # The lab's interpreter drops the translated code of a former guest when its memory is written: 100 ms for 2 MiB,
    # to whoever gets that memory next. Clearing what is freed brings that forward, out of what is measured.
    LAB_KERNEL_ARGS="init_on_free=1 ${LAB_KERNEL_ARGS:-}" "$project/tests/lab/run" \
        --timeout "${BENCH_TIMEOUT:-1800}" "${lab_options[@]}" -- "${command[@]}"
}
