"""The virtual machine monitors that are compared: how each is told to run the same guest."""

import json
import os
import shutil
import stat
import subprocess

RAM_MIB = 512
MARKER = b"@@RV-INIT@@"
LOGIN = b"login:"
# What every machine is given. `quiet`: the cost of a serial port is not what is compared here.
CMDLINE = "console=ttyS0 quiet panic=-1"
MAC = "52:54:00:00:00:01"


class Guest:
    """A kernel, an initrd, perhaps a disk and a tap: the same for every machine."""

    def __init__(self, kernel, initrd, disk, mode, tap=None, cmdline="", ram_mib=RAM_MIB, memory=None, cpus=1, queues=1, pairs=1, firmware=None, tpm=None):
        # code and variables of the firmware that starts the disk, instead of kernel and initrd; and the socket of a swtpm
        self.firmware = firmware
        self.tpm = tpm
        self.kernel = kernel
        self.initrd = initrd
        # None where a NIC is what is measured, and only machines for that are run
        self.disk = disk
        self.tap = tap
        self.ram_mib = ram_mib
        self.cpus = cpus
        # of the disk; and pairs of queues of the NIC
        self.queues = queues
        self.pairs = pairs
        # Rackvisor's own memory settings, for benches/memory
        self.memory = memory or {}
        self.cmdline = " ".join(filter(None, [CMDLINE, f"rv.mode={mode}", cmdline]))


class Rackvisor:
    """As a host agent starts it: with its API socket, the serial port on standard output."""

    kernels = ("vmlinux", "vmlinuz")

    def __init__(self, program, name="rackvisor", nic=None):
        self.program = program
        self.name = name
        # further settings of the NIC
        self.nic = nic or {}

    def command(self, guest, folder):
        config = {
            "name": "bench",
            "cpus": {"count": guest.cpus},
            "memory": {"size": f"{guest.ram_mib}MiB", **guest.memory},
            "boot": {"kernel": guest.kernel, "initrd": guest.initrd, "cmdline": guest.cmdline},
            "serial": {"mode": "stdio"},
        }
        if guest.disk:
            config["disks"] = [{"id": "disk0", "path": guest.disk, "queues": guest.queues}]
        if guest.firmware:
            code, variables = guest.firmware
            config["boot"] = {"firmware": {"code": code, "vars": variables}}
            config["disks"][0]["boot_index"] = 1
        if guest.tpm:
            config["tpm"] = {"socket": guest.tpm}
        if guest.tap:
            config["nics"] = [{"id": "net0", "tap": guest.tap, "mac": MAC, "queues": guest.pairs, **self.nic}]
        path = write(folder, "rackvisor.json", config)
        return [self.program, "--log", "warn", "--api-socket", self.socket(folder), "--config", path, "--boot"]

    def knows(self, folder):
        """Whether the program has the settings of the NIC: a kernel that does not exist ends what it does with them."""
        guest = Guest("/nonexistent", "/nonexistent", None, "agent", tap="bench0")
        words = [self.program, "run", self.command(guest, folder)[-2]]
        said = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        return "unknown field" not in said.stderr

    @staticmethod
    def socket(folder):
        return os.path.join(folder, "api.sock")


class QemuMicrovm:
    """QEMU's machine type for fast boots, as it comes: SeaBIOS and ACPI."""

    name = "qemu-microvm"
    kernels = ("vmlinux", "vmlinuz")
    machine = "microvm,isa-serial=on"
    firmware = ()

    def __init__(self, program):
        self.program = program

    def command(self, guest, folder):
        del folder
        command = [self.program, "-M", self.machine, "-accel", "kvm", "-cpu", "host", "-smp", "1", *self.firmware]
        command += ["-m", f"{guest.ram_mib}M", "-no-user-config", "-nodefaults", "-no-reboot"]
        command += ["-display", "none", "-serial", "stdio", "-kernel", guest.kernel, "-initrd", guest.initrd]
        command += ["-append", guest.cmdline]
        command += ["-blockdev", f"driver=file,filename={guest.disk},node-name=disk0,aio=io_uring"]
        command += ["-device", "virtio-blk-device,drive=disk0", "-device", "virtio-rng-device"]
        if guest.tap:
            command += ["-netdev", f"tap,id=net0,ifname={guest.tap},script=no,downscript=no,vhost=off"]
            command += ["-device", f"virtio-net-device,netdev=net0,mac={MAC}"]
        return command


class QemuQ35:
    """QEMU's machine for datacenters. A disk is a block device and has a thread, io_uring, and the host's page cache passed
    by; a NIC has what QEMU gives it by itself, but for vhost."""

    kernels = ("vmlinux", "vmlinuz")

    def __init__(self, program, name="qemu-q35", vhost=False):
        self.program = program
        self.name = name
        self.vhost = vhost

    def command(self, guest, folder):
        del folder
        command = [self.program, "-M", "q35,accel=kvm", "-cpu", "host", "-smp", str(guest.cpus), "-m", f"{guest.ram_mib}M"]
        command += ["-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]
        command += ["-kernel", guest.kernel, "-initrd", guest.initrd, "-append", guest.cmdline]
        command += ["-name", "bench,debug-threads=on"]
        if guest.disk:
            disk = f"driver=host_device,filename={guest.disk},node-name=disk0,aio=io_uring,cache.direct=on"
            command += ["-object", "iothread,id=disk0", "-blockdev", disk]
            command += ["-device", f"virtio-blk-pci,drive=disk0,iothread=disk0,num-queues={guest.queues}"]
        if guest.tap:
            vhost = "on" if self.vhost else "off"
            command += ["-netdev", f"tap,id=net0,ifname={guest.tap},script=no,downscript=no,vhost={vhost},queues={guest.pairs}"]
            # a vector for each queue, one for commands and one for changes of the configuration
            pairs = f",mq=on,vectors={2 * guest.pairs + 2}" if guest.pairs > 1 else ""
            command += ["-device", f"virtio-net-pci,netdev=net0,mac={MAC}{pairs}"]
        return command


class QemuUefi:
    """QEMU's machine for datacenters with firmware in flash memory, and the devices that Rackvisor has."""

    name = "qemu-q35"

    def __init__(self, program):
        self.program = program

    def command(self, guest, folder):
        del folder
        code, variables = guest.firmware
        command = [self.program, "-M", "q35,accel=kvm", "-cpu", "host", "-smp", str(guest.cpus), "-m", f"{guest.ram_mib}M"]
        command += ["-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]
        command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"]
        command += ["-drive", f"if=pflash,unit=1,format=raw,file={variables}"]
        command += ["-blockdev", f"driver=file,filename={guest.disk},node-name=disk0,aio=io_uring"]
        command += ["-device", "virtio-blk-pci,drive=disk0,bootindex=1", "-device", "virtio-rng-pci"]
        if guest.tpm:
            command += ["-chardev", f"socket,id=tpm,path={guest.tpm}", "-tpmdev", "emulator,id=tpm,chardev=tpm"]
            command += ["-device", "tpm-crb,tpmdev=tpm"]
        return command


class QemuTuned(QemuMicrovm):
    """The fastest settings found for microvm with this kernel: qboot for SeaBIOS and no option ROMs. `pit=off`, `pic=off` and
    `rtc=off`, which the manual proposes too, cost Debian's kernel seconds here, and its serial port the interrupt."""

    name = "qemu-microvm-qboot"
    machine = "microvm,x-option-roms=off,isa-serial=on,pit=on,pic=on,rtc=on"
    firmware = ("-bios", "qboot.rom")


class QemuBare(QemuMicrovm):
    """The same without ACPI, which is faster with some kernels: devices are on the kernel's command line."""

    name = "qemu-microvm-noacpi"
    machine = "microvm,acpi=off,x-option-roms=off,isa-serial=on,pit=on,pic=on,rtc=on"


class Firecracker:
    """Given by FIRECRACKER=. It boots ELF kernels only, and has no entropy device unless asked."""

    name = "firecracker"
    kernels = ("vmlinux",)

    def __init__(self, program):
        self.program = program

    def command(self, guest, folder):
        config = {
            # as its own documentation advises
            "boot-source": {
                "kernel_image_path": guest.kernel,
                "initrd_path": guest.initrd,
                "boot_args": f"{guest.cmdline} reboot=k i8042.noaux i8042.nomux i8042.dumbkbd",
            },
            "drives": self.drives(guest.disk),
            "machine-config": {"vcpu_count": guest.cpus, "mem_size_mib": guest.ram_mib},
            "entropy": {},
        }
        if guest.tap:
            config["network-interfaces"] = [{"iface_id": "net0", "guest_mac": MAC, "host_dev_name": guest.tap}]
        path = write(folder, "firecracker.json", config)
        return [self.program, "--api-sock", os.path.join(folder, "firecracker.sock"), "--config-file", path]

    @staticmethod
    def drives(disk):
        if not disk:
            return []
        drive = {"drive_id": "disk0", "path_on_host": disk, "is_root_device": False, "is_read_only": False}
        return [{**drive, "io_engine": "Async" if stat.S_ISBLK(os.stat(disk).st_mode) else "Sync"}]


class CloudHypervisor:
    """Given by CLOUD_HYPERVISOR=."""

    name = "cloud-hypervisor"
    kernels = ("vmlinux", "vmlinuz")

    def __init__(self, program):
        self.program = program

    def command(self, guest, folder):
        command = [self.program, "--api-socket", f"path={os.path.join(folder, 'ch.sock')}"]
        command += ["--cpus", f"boot={guest.cpus}", "--memory", f"size={guest.ram_mib}M"]
        command += ["--kernel", guest.kernel, "--initramfs", guest.initrd, "--cmdline", guest.cmdline]
        command += ["--serial", "tty", "--console", "off"]
        if guest.disk:
            command += ["--disk", self.disk(guest)]
        if guest.tap:
            command += ["--net", f"tap={guest.tap},mac={MAC},num_queues={2 * guest.pairs}"]
        return command

    @staticmethod
    def disk(guest):
        device = stat.S_ISBLK(os.stat(guest.disk).st_mode)
        return f"path={guest.disk}" + (f",direct=on,num_queues={guest.queues}" if device else "")


def write(folder, name, config):
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    return path


def peers():
    """The machines beside Rackvisor: QEMU always, the others when their variables name a program."""
    return [QemuMicrovm(qemu()), QemuTuned(qemu()), QemuBare(qemu()), *others()]


def qemu():
    return shutil.which(os.environ.get("QEMU", "qemu-system-x86_64")) or "qemu-system-x86_64"


def others():
    """The machines whose variables name a program."""
    found = []
    for variable, kind in (("FIRECRACKER", Firecracker), ("CLOUD_HYPERVISOR", CloudHypervisor)):
        program = os.environ.get(variable)
        if program:
            found.append(kind(program))
    return found


def version(program):
    """The first line of what `program --version` says."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return (said.stdout or said.stderr).split("\n", 1)[0].strip() or "unknown version"
