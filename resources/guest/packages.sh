# shellcheck shell=bash
# Sourced by the scripts here: Debian packages that are unpacked, not installed.

say() { echo "guest: $*" >&2; }

die() {
    say "$*"
    exit 1
}

apt_update() {
    [[ $EUID -eq 0 ]] || die "apt knows no packages; run:  sudo apt-get update"
    apt-get -qq update >&2
}

# unpack FOLDER PACKAGE...: makes FOLDER anew with what is in the packages.
unpack() {
    local folder=$1 package
    shift
    say "unpacking Debian packages: $*"
    rm -rf "$folder" && mkdir -p "$folder"
    # as root, apt would like to fetch as a user that may not write here, and warns
    (cd "$folder" && { apt-get -qq -o APT::Sandbox::User=root download "$@" >&2 ||
        { apt_update && apt-get -qq -o APT::Sandbox::User=root download "$@" >&2; }; })
    for package in "$folder"/*.deb; do
        dpkg-deb -x "$package" "$folder"
        rm "$package"
    done
}

# archive TREE: TREE as a cpio archive; the same tree gives the same bytes.
archive() {
    find "$1" -exec touch -h -d @0 {} +
    # not compressed: unpacking costs a guest more time than reading costs a host
    (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet --reproducible -R 0:0 -H newc -o)
}
