# shellcheck shell=bash
# shellcheck disable=SC2154 # lab and work are run's
# Sourced by run: the lab's kernel and initrd, and what is loaded into its QEMU.

# Sets kernel_version to the newest installed stock (not cloud, not rt) kernel.
find_kernel() {
    local path
    kernel_version=${LAB_KERNEL:-}
    if [[ -z $kernel_version ]]; then
        path=$(find /boot -maxdepth 1 -name 'vmlinuz-*-amd64' ! -name '*-cloud-amd64' ! -name '*-rt-amd64' |
            sort -V | tail -n 1)
        kernel_version=${path#/boot/vmlinuz-}
    fi
    if [[ -z $kernel_version || ! -r /boot/vmlinuz-$kernel_version ]]; then
        die "no readable kernel /boot/vmlinuz-${kernel_version:-*-amd64}; linux-image-amd64 brings one"
    fi
    [[ -d /lib/modules/$kernel_version ]] ||
        die "/lib/modules/$kernel_version is missing; reinstall the linux-image package"
}

# Sets kernel_image, initrd_image and qemu_preload to cached files, made now if they are not there.
prepare_images() {
    local cache key
    cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/rackvisor-lab
    mkdir -p "$cache"
    key=$(cat "$lab/guest/init" "$lab/host/image.sh" "$lab/host/qemu-mends.c" <(stat -c '%Y %s' "/boot/vmlinuz-$kernel_version" \
        "/lib/modules/$kernel_version/modules.dep" "$(busybox_path)") | sha256sum | cut -c 1-16)
    kernel_image=$cache/vmlinux-$kernel_version-$key
    initrd_image=$cache/initrd-$kernel_version-$key
    qemu_preload=$cache/qemu-mends-$key.so
    [[ -s $kernel_image && -s $initrd_image && -s $qemu_preload ]] && return
    find "$cache" -maxdepth 1 -type f -mtime +7 -delete
    make_kernel >"$kernel_image.$$"
    mv "$kernel_image.$$" "$kernel_image"
    make_initrd "$initrd_image.$$"
    mv "$initrd_image.$$" "$initrd_image"
    gcc -shared -fPIC -O2 -o "$qemu_preload.$$" "$lab/host/qemu-mends.c"
    mv "$qemu_preload.$$" "$qemu_preload"
}

# The uncompressed ELF kernel out of the bzImage: TCG would take seconds to unpack it at each boot.
# A kernel that is not xz-compressed is used as it is.
make_kernel() {
    local image=/boot/vmlinuz-$kernel_version setup start length
    setup=$(od -An -tu1 -j $((0x1f1)) -N 1 "$image")
    start=$(((setup + 1) * 512 + $(od -An -tu4 -j $((0x248)) -N 4 "$image")))
    length=$(od -An -tu4 -j $((0x24c)) -N 4 "$image")
    if [[ $(od -An -tx1 -j "$start" -N 6 "$image") == ' fd 37 7a 58 5a 00' ]]; then
        # the last four bytes are the unpacked size, not xz's
        dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip="$start" count=$((length - 4)) status=none | xz -dc
    else
        cat "$image"
    fi
}

make_initrd() {
    local tree module
    tree=$(mktemp -d "$work/initrd.XXXXXX")
    mkdir -p "$tree"/{bin,dev,proc,modules,host,upper,new}
    cp "$(busybox_path)" "$tree/bin/busybox"
    cp "$lab/guest/init" "$tree/init"
    chmod 755 "$tree/init" "$tree/bin/busybox"
    for module in virtio_pci 9pnet_virtio 9p overlay; do
        modprobe -S "$kernel_version" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/modules"
    [[ -s $work/modules ]] || die "modprobe found no 9p and virtio modules of $kernel_version"
    while read -r module; do
        unpacked_module "$module" >"$tree/modules/$(basename "${module%.ko*}").ko"
        echo "$(basename "${module%.ko*}").ko"
    done <"$work/modules" >"$tree/modules/order"
    (cd "$tree" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$1"
    rm -rf "$tree"
}

unpacked_module() {
    case $1 in
    *.xz) xz -dc "$1" ;;
    *.zst) zstd -qdc "$1" ;;
    *.gz) gzip -dc "$1" ;;
    *) cat "$1" ;;
    esac
}

busybox_path() {
    local path
    for path in /bin/busybox /usr/bin/busybox; do
        [[ -x $path ]] && echo "$path" && return
    done
    die 'busybox is missing; the package busybox-static brings it'
}
