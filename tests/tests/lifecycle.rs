//! How guests begin, stand still, begin anew and end.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking, also in its helpers")]

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rackvisor_api::config::OnReboot;
use rackvisor_api::events::EventKind;
use rackvisor_api::state::{Action, VmState};
use rackvisor_tests::{
    Guest, PATIENCE, Rackvisor, Tap, Tiny, assert_nothing_more, assert_same_bytes, eventually, linux, linux_that_runs,
    needs_kvm, noise,
};

#[test]
fn a_guest_reboots_twenty_times_in_one_process_that_does_not_grow() {
    needs_kvm!();
    // The disk counts the boots: a line for each.
    let script = "set -e
        boots=$(dd if=/dev/vda bs=512 count=1 | grep -c x || true)
        echo boot $boots
        [ $boots = 20 ] && exit 0
        (yes x | head -n $((boots + 1))) | dd of=/dev/vda bs=512 count=1 conv=notrunc,sync,fsync
        reboot -f";
    let vmm = Rackvisor::start();
    let mut config = linux_that_runs(script, "hang");
    config.disks = vec![vmm.image("counter", &[0; 4096])];
    let mut guest = vmm.boot_with_console(&config);
    guest.read_until("boot 0\n");
    let census = vmm.census();
    for boot in 1..=20 {
        guest.read_until(&format!("boot {boot}\n"));
    }
    guest.read_until("@@RV-END status=0@@");
    let vm = vmm.client.describe().unwrap();
    assert_eq!((vm.state, vm.resets, vm.pid), (VmState::Running, 20, vmm.own_pid()));
    assert_nothing_more(vmm.pid(), &census);
    let resets =
        vmm.client.events(Some(0), false).unwrap().filter(|e| e.as_ref().unwrap().what == EventKind::GuestReset);
    assert_eq!(resets.count(), 20);
}

#[test]
fn a_guest_that_only_resets_keeps_nobody_from_ending_it() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    vmm.boot(&Tiny::reset().config(&vmm.path("")));
    let describe = || vmm.client.describe().unwrap();
    eventually("the guest resets itself", || (describe().resets > 5).then_some(()));
    let census = vmm.census();
    eventually("it goes on", || (describe().resets > 200).then_some(()));
    assert_nothing_more(vmm.pid(), &census);
    assert_eq!(vmm.client.act(Action::Shutdown).unwrap().state, VmState::Stopped);
}

#[test]
fn a_reset_by_request_starts_the_guest_anew_and_in_a_paused_vm_when_it_is_resumed() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut guest = vmm.boot_with_console(&Tiny::says(b"I begin.").config(&vmm.path("")));
    guest.read_until("I begin.");
    assert_eq!(vmm.client.act(Action::Reset).unwrap().resets, 1);
    guest.read_until("I begin.");
    vmm.client.act(Action::Pause).unwrap();
    let vm = vmm.client.act(Action::Reset).unwrap();
    assert_eq!((vm.state, vm.resets), (VmState::Paused, 2));
    vmm.client.act(Action::Resume).unwrap();
    guest.read_until("I begin.");
    vmm.client.act(Action::Shutdown).unwrap();
    assert_eq!(guest.read_to_end(), "I begin.".repeat(3));
}

#[test]
fn a_reboot_stops_the_vm_if_the_configuration_says_so() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = Tiny::reset().config(&vmm.path(""));
    config.on_reboot = OnReboot::Stop;
    vmm.boot(&config);
    let vm = vmm.wait_for(VmState::Stopped);
    assert!(vm.cause.unwrap().contains("reboot"));
}

#[test]
fn buttons_and_nmis_reach_the_guest_and_the_power_button_ends_it_cleanly() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    config.cpus.count = 2;
    config.disks = vec![vmm.image("data", &vec![0; 8 << 20])];
    let mut guest = vmm.boot_linux(&config);

    let nmis = |guest: &mut Guest| {
        let counts = guest.ok("grep NMI: /proc/interrupts | tr -s ' ' | cut -d ' ' -f 2,3");
        counts.split(' ').map(|count| count.parse().unwrap()).collect::<Vec<u64>>()
    };
    let before = nmis(&mut guest);
    vmm.client.act(Action::Nmi).unwrap();
    // The kernel says so on the console, in the midst of whatever else is written there: nothing may be, until it is done.
    for _vcpu in 0..2 {
        guest.read_until("Dazed and confused, but trying to continue");
    }
    let grown = nmis(&mut guest).iter().zip(&before).all(|(now, before)| now > before);
    assert!(grown, "each vCPU has had its NMI");

    guest.ok("mke2fs -q /dev/vda && mount -t ext4 /dev/vda /mnt && echo precious >/mnt/file");
    vmm.client.act(Action::PowerButton).unwrap();
    let vm = vmm.wait_for(VmState::Stopped);
    assert_eq!(vm.cause.as_deref(), Some("guest power-off"));
    guest.read_to_end();

    // What was not synced before the button was, by the guest's own shutdown.
    vmm.client.act(Action::Boot).unwrap();
    let mut guest = Guest::connect(&vmm.path("console.sock"));
    guest.wait_ready();
    assert_eq!(guest.ok("mount -t ext4 /dev/vda /mnt && cat /mnt/file"), "precious");
    assert_eq!(vmm.client.act(Action::Shutdown).unwrap().state, VmState::Stopped);
}

#[test]
fn a_guest_that_faults_for_good_is_crashed_with_its_cause_and_boots_again() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    let mut config = linux();
    // The panic ends in a triple fault.
    config.boot.as_mut().unwrap().cmdline += " reboot=t";
    let mut guest = vmm.boot_linux(&config);
    guest.send("echo c >/proc/sysrq-trigger");
    let vm = vmm.wait_for(VmState::Crashed);
    let cause = vm.cause.unwrap();
    assert!(cause.contains("triple fault"), "{cause}");
    assert!(guest.read_to_end().contains("Kernel panic"));
    let told = |e: &EventKind| matches!(e, EventKind::Crashed { cause: told } if *told == cause);
    assert!(vmm.client.events(Some(0), false).unwrap().any(|event| told(&event.unwrap().what)));
    assert_eq!(vmm.client.act(Action::Boot).unwrap().state, VmState::Running);
}

/// Puts the VM to sleep, sees that nothing moves, and wakes it.
fn pause_and_resume(vmm: &Rackvisor) {
    assert_eq!(vmm.client.act(Action::Pause).unwrap().state, VmState::Paused);
    let look = || {
        let metrics = vmm.client.metrics().unwrap();
        let still: Vec<_> =
            metrics.lines().filter(|line| line.starts_with("rackvisor_vcpu")).map(String::from).collect();
        let counters = (vmm.client.disk("copy").unwrap().counters, vmm.client.nic("net0").unwrap().counters.tx_frames);
        (still, counters, fs::read(vmm.path("copy")).unwrap())
    };
    assert!(look() == look(), "something moves in a paused VM");
    assert_eq!(vmm.client.act(Action::Resume).unwrap().state, VmState::Running);
}

#[test]
fn pauses_under_load_lose_nothing_on_disk_or_network() {
    needs_kvm!();
    let tap = Tap::new();
    let vmm = Rackvisor::start();
    let pattern = noise(6, 1 << 20);
    let (copies, laps) = (8, 24);
    let mut config = linux();
    config.boot.as_mut().unwrap().cmdline += &tap.cmdline();
    config.cpus.count = 2;
    config.nics = vec![tap.nic()];
    config.disks = vec![vmm.image("pattern", &pattern), vmm.image("copy", &vec![0; copies << 20])];
    let mut guest = vmm.boot_linux(&config);

    let listener = TcpListener::bind((tap.host(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // Each lap reads the pattern from the disk, writes it to the other and sends it.
    let lap = "dd if=/dev/vda iflag=direct bs=64k | tee /tmp/lap && \
        dd if=/tmp/lap of=/dev/vdb bs=1M seek=$((lap % 8)) oflag=direct conv=notrunc";
    guest.send(&format!(
        "(for lap in $(seq 0 {}); do {lap} || exit 1; done) 2>/tmp/err | nc {} {port}",
        laps - 1,
        tap.host()
    ));

    let received = AtomicUsize::new(0);
    let sent = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let (mut all, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
            loop {
                match stream.read(&mut buffer).unwrap() {
                    0 => return all,
                    length => all.extend(&buffer[..length]),
                }
                received.store(all.len(), Ordering::SeqCst);
            }
        });
        for part in 1..=10 {
            let mark = (laps << 20) / 12 * part;
            eventually("the guest sends", || (received.load(Ordering::SeqCst) >= mark).then_some(()));
            pause_and_resume(&vmm);
        }
        assert!(received.load(Ordering::SeqCst) < laps << 20, "the pauses came after the work");
        reader.join().unwrap()
    });
    assert_eq!(guest.result().0, 0);
    assert_eq!(guest.ok("cat /tmp/err | grep -v records || true"), "");
    assert_same_bytes(&sent, &pattern.repeat(laps), "what was sent");
    guest.ok("sync");
    assert_same_bytes(&fs::read(vmm.path("copy")).unwrap(), &pattern.repeat(copies), "what was written");
    // Time goes on too.
    guest.ok("sleep 1");
}

#[test]
fn sigterm_ends_a_paused_vm_as_well_and_a_process_without_a_vm() {
    needs_kvm!();
    let vmm = Rackvisor::start();
    vmm.boot(&Tiny::idle().config(&vmm.path("")));
    vmm.client.act(Action::Pause).unwrap();
    assert_eq!(vmm.terminate().0.code(), Some(0));
    assert_eq!(Rackvisor::start().terminate().0.code(), Some(0));
}
