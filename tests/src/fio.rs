//! fio in a guest of [`crate::linux_with_fio`].

use crate::Guest;

/// Writes at random and reads all back to verify it, in the background, lap after lap with other data each time, until it is
/// told to end or a lap fails. Each lap flushes now and then.
pub struct Laps(());

impl Laps {
    /// Bytes at the start of the disk that it writes.
    pub const AREA: u64 = 8 << 20;

    /// Begins on `device`, such as `/dev/vda`.
    pub fn start(guest: &mut Guest, device: &str) -> Self {
        let fio = format!(
            "fio --name=lap --filename={device} --ioengine=libaio --direct=1 --rw=randwrite --bs=8k --iodepth=16 \
             --size={} --fsync=100 --verify=crc32c --verify_fatal=1 --randseed=$lap --minimal",
            Self::AREA
        );
        guest.ok(&format!(
            "(lap=0; while [ ! -e /run/stop ]; do lap=$((lap + 1)); {fio} >/run/fio 2>&1 || break; echo $lap >/run/laps; done; \
             [ -e /run/stop ] && : >/run/good; : >/run/ended) >/dev/null 2>&1 &"
        ));
        Self(())
    }

    /// Ends with the lap that is under way; gives how many were good.
    ///
    /// # Panics
    /// If fio met an error or found something else than what it wrote.
    pub fn finish(self, guest: &mut Guest) -> u32 {
        let end = ": >/run/stop; while [ ! -e /run/ended ]; do sleep 0.1; done; [ -e /run/good ] && cat /run/laps";
        let (status, laps) = guest.run(end);
        if status != 0 {
            panic!("fio failed: {laps} {}", guest.ok("tail -n 20 /run/fio; dmesg | tail -n 20"));
        }
        laps.trim().parse().unwrap()
    }
}
