# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # shares its variables with run
# Sourced by run: one attempt at running the command in a lab.
#
# The host and the lab talk through the folder $share, which the lab sees as /run/lab. Output arrives in two plain
# files that `tail` passes on: nothing can be lost when QEMU ends, and no byte is interpreted.

readonly BOOT_LIMIT=150     # seconds until the command must have started
heartbeat_limit=${LAB_HANG_AFTER:-90} # seconds without the lab's heartbeat, which comes every 2

qemu_pid='' tail_pids=()

fill_share() {
    rm -rf "$share"
    mkdir -p "$share"
    echo "$lab/guest/start" >"$share/start"
    echo "$PWD" >"$share/cwd"
    echo "$out" >"$share/out"
    printf '%s\0' "${command[@]}" >"$share/command"
    write_environment >"$share/environment"
    : >"$share/stdout"
    : >"$share/stderr"
    if ((interactive)); then stty size >"$share/interactive"; fi
    if [[ -e $work/stdin ]]; then ln "$work/stdin" "$share/stdin"; fi
    if [[ -n $san ]]; then echo "$san" >"$share/san"; fi
    if [[ -n $sdn ]]; then echo "$sdn" >"$share/sdn"; fi
}

write_environment() {
    local name
    while read -r name; do
        if passes "$name"; then printf '%s=%s\0' "$name" "${!name}"; fi
    done < <(compgen -e)
}

# One processor more than the command gets: guest/start leaves the first one idle, and tells why.
start_qemu() {
    local args=() extra=()
    read -ra extra <<<"${LAB_QEMU_ARGS:-}"
    # shellcheck disable=SC2054 # the commas are QEMU's
    args=(
        -M q35 -accel tcg,thread=multi -cpu EPYC,+svm,+npt,-xsaves -smp "$((cpus + 1))" -m "$memory"
        -nodefaults -no-user-config -display none -no-reboot
        -kernel "$kernel_image" -initrd "$initrd_image"
        -append "console=ttyS0 panic=-1 oops=panic quiet mitigations=off apparmor=0 tsc=reliable irqaffinity=1-$cpus ${LAB_KERNEL_ARGS:-}"
        -serial "file:$console"
        -virtfs "local,path=/,mount_tag=host,security_model=none,multidevs=remap,readonly=on"
        -virtfs "local,path=$share,mount_tag=lab,security_model=none"
        -virtfs "local,path=${out//,/,,},mount_tag=out,security_model=none"
    )
    if ((interactive)); then
        # shellcheck disable=SC2054
        args+=(-chardev stdio,id=terminal,signal=off -device virtio-serial-pci
            -device virtconsole,chardev=terminal)
        LD_PRELOAD=$qemu_preload setpriv --pdeathsig KILL "$qemu" "${args[@]}" "${extra[@]}" <&0 2>"$work/qemu.log" &
    else
        LD_PRELOAD=$qemu_preload setpriv --pdeathsig KILL "$qemu" "${args[@]}" "${extra[@]}" </dev/null >"$work/qemu.log" 2>&1 &
    fi
    qemu_pid=$!
}

# tail ends by itself soon after QEMU has.
pass_output() {
    tail_pids=()
    if ((interactive)); then return; fi
    tail -q -s 0.1 --pid "$qemu_pid" -c +1 -f "$share/stdout" 2>/dev/null &
    tail_pids+=($!)
    tail -q -s 0.1 --pid "$qemu_pid" -c +1 -f "$share/stderr" >&2 2>/dev/null &
    tail_pids+=($!)
}

pause() { read -rt 0.1 <&"$never" || true; }

stop_qemu() {
    [[ -n $qemu_pid ]] || return 0
    kill -KILL "$qemu_pid" 2>/dev/null || true
    wait "$qemu_pid" 2>/dev/null || true
    qemu_pid=''
    wait "${tail_pids[@]}" 2>/dev/null || true
}

# Watches the lab until it ends. Sets verdict (ended, timeout or failed) and status or reason.
watch_lab() {
    local began=$SECONDS seen=$SECONDS beat='' now=''
    while :; do
        if [[ -e $share/status ]]; then
            read -r status <"$share/status"
            verdict=ended
            return
        fi
        verdict=failed
        if [[ -e $share/failure ]]; then
            read -r reason <"$share/failure"
            return
        fi
        if ! kill -0 "$qemu_pid" 2>/dev/null; then
            [[ -e $share/status ]] && continue
            reason='it ended without the status of the command (a panic of its kernel, or QEMU died)'
            return
        fi
        if [[ -e $share/heartbeat ]]; then read -r now <"$share/heartbeat" || true; fi
        # empty: just being written anew
        if [[ -n $now && $now != "$beat" ]]; then
            beat=$now
            seen=$SECONDS
        fi
        if ((SECONDS - began >= timeout)); then
            verdict=timeout
            list_processes
            return
        fi
        if [[ -z $beat ]] && ((SECONDS - began >= 60)); then
            reason='it did not boot within 60 s'
            return
        fi
        if [[ ! -e $share/started ]] && ((SECONDS - began >= BOOT_LIMIT)); then
            reason="it was not ready after $BOOT_LIMIT s"
            return
        fi
        if ((SECONDS - seen >= heartbeat_limit)); then
            reason="its kernel hangs: no sign of life for $heartbeat_limit s"
            return
        fi
        pause
    done
}

# Asks the lab what it is doing; it may be past answering.
list_processes() {
    local end=$((SECONDS + 4))
    : >"$share/list-processes"
    until [[ -e $share/processes ]] || ((SECONDS >= end)); do pause; done
}

run_once() {
    console=$work/console.log
    : >"$console"
    fill_share
    start_qemu
    pass_output
    watch_lab
    stop_qemu
    # what TCG lacks of an EPYC is no news
    sed -i "/TCG doesn't support requested feature/d" "$work/qemu.log"
    # of qemu-mends.c
    sed -n 's/^lab: //p' "$work/qemu.log" | while read -r line; do say "$line"; done
}

# What the lab's kernel, its set-up and QEMU said last.
show_logs() {
    local file
    for file in "$console" "$share/setup.log" "$work/qemu.log" "$share/processes"; do
        [[ -s $file ]] || continue
        cp "$file" "$out/lab-$(basename "$file")" 2>/dev/null || true
        say "the end of $(basename "$file"):"
        tail -n 40 "$file" | tr -d '\r' | sed 's/^/lab|   /' >&2
    done
}
