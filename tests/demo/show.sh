# shellcheck shell=bash
# Sourced by run and steps: how the demo looks.
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
    bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'
else
    bold='' dim='' plain=''
fi

headline() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }

note() { printf '   %s\n' "$*"; }

indent() { sed -u 's/^/   /'; }

# took BEGAN [WHAT]: the time since BEGAN, a value of EPOCHREALTIME.
took() {
    local us=$((${EPOCHREALTIME/./} - ${1/./}))
    printf '   %s%s %d.%03d s%s\n' "$dim" "${2:-took}" $((us / 1000000)) $((us / 1000 % 1000)) "$plain"
}

# Prints the command, runs it, prints its time; its status is the command's. One argument is a line for the shell.
show() {
    local began status=0
    printf ' %s$ %s%s\n' "$bold" "${*/#"${programs:-/nowhere}/"/}" "$plain"
    if (($# == 1)); then set -- bash -o pipefail -c "$1"; fi
    began=$EPOCHREALTIME
    "$@" 2>&1 | indent || status=${PIPESTATUS[0]}
    took "$began"
    return "$status"
}
