//! Load in a guest that goes on, lap after lap, while tests do things to it.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use crate::node::ECHO;
use crate::{Guest, PATIENCE};

/// A command that runs in the background of a guest, again and again with other data each time, until it is told to end or fails.
pub struct Laps(());

impl Laps {
    /// Bytes at the start of the disk that [`Laps::fio`] writes.
    pub const AREA: u64 = 8 << 20;

    /// fio writes at random on `device`, such as `/dev/vda`, and reads all back to verify it. Each lap flushes now and then.
    /// For guests of [`crate::linux_with_fio`].
    pub fn fio(guest: &mut Guest, device: &str) -> Self {
        let fio = format!(
            "fio --name=lap --filename={device} --ioengine=libaio --direct=1 --rw=randwrite --bs=8k --iodepth=16 \
             --size={} --fsync=100 --verify=crc32c --verify_fatal=1 --randseed=$lap --minimal",
            Self::AREA
        );
        Self::start(guest, &fio)
    }

    /// A guest of [`crate::Node`] sends its data over `streams` connections to another one at `to`, and compares what comes back.
    /// While that one is away, it tries again.
    pub fn echo(guest: &mut Guest, to: Ipv4Addr, streams: u32) -> Self {
        Self::start(
            guest,
            &format!(
                "{{ rm -f /run/bad; for stream in $(seq {streams}); do \
                 (socat -b65536 -t170 - TCP4:{to}:{ECHO},retry=300,interval=0.2 </tmp/data | sha256sum | \
                 cmp - /tmp/sum || : >/run/bad) & done; wait; [ ! -e /run/bad ]; }}"
            ),
        )
    }

    fn start(guest: &mut Guest, lap: &str) -> Self {
        // Renamed into place: who reads it finds a number at any time.
        guest.ok(&format!(
            "rm -f /run/stop /run/good /run/ended; echo 0 >/run/laps; \
             (lap=0; while [ ! -e /run/stop ]; do lap=$((lap + 1)); {lap} >/run/lap 2>&1 || break; \
             echo $lap >/run/laps.new && mv /run/laps.new /run/laps; done; \
             [ -e /run/stop ] && : >/run/good; : >/run/ended) >/dev/null 2>&1 &"
        ));
        Self(())
    }

    /// How many laps were good so far.
    ///
    /// # Panics
    /// If there was a bad one.
    pub fn count(&self, guest: &mut Guest) -> u32 {
        let (status, laps) = guest.run("[ ! -e /run/ended ] && cat /run/laps");
        Self::good(guest, status, &laps)
    }

    /// Waits until so many more laps were good.
    ///
    /// # Panics
    /// If there was a bad one, or it takes longer than [`crate::PATIENCE`].
    pub fn wait_for(&self, guest: &mut Guest, laps: u32) {
        let wanted = self.count(guest) + laps;
        let deadline = Instant::now() + PATIENCE;
        while self.count(guest) < wanted {
            if Instant::now() > deadline {
                panic!("the load stalls: {}", guest.ok("cat /run/laps /run/lap; netstat -tn; dmesg | tail -n 5"));
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Ends with the lap that is under way; gives how many were good.
    ///
    /// # Panics
    /// If a lap met an error or found something else than what it wrote or sent.
    pub fn finish(self, guest: &mut Guest) -> u32 {
        let end = ": >/run/stop; while [ ! -e /run/ended ]; do sleep 0.1; done; [ -e /run/good ] && cat /run/laps";
        let (status, laps) = guest.run(end);
        Self::good(guest, status, &laps)
    }

    fn good(guest: &mut Guest, status: i32, laps: &str) -> u32 {
        if status != 0 {
            panic!("a lap failed: {laps} {}", guest.ok("tail -n 20 /run/lap; dmesg | tail -n 20"));
        }
        laps.trim().parse().unwrap()
    }
}
