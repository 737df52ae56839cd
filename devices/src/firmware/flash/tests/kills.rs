//! Firmware that is killed at any moment, and what it finds in its file then.
//!
//! The process that is killed is this test program anew, with the one test that plays the firmware. It keeps a log of variables, as
//! edk2 does: a record counts once its state says so, and when one half of the log is full, the other one is erased, gets the last
//! record, and becomes the active one.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::*;
use crate::firmware::{FileStore, FirmwareImages};

const CODE: u64 = 0x1e_0000;
const VARS: u64 = 0x2_0000;
/// Where the files of the firmware are, for the process that is killed.
const FOLDER: &str = "RACKVISOR_FLASH_FOLDER";
/// How often it is killed; more by this variable.
const KILLS: usize = 25;
const MORE: &str = "RACKVISOR_KILLS";

const HALF: usize = 8 * BLOCK;
/// State, number, content: more than fits evenly into a block.
const RECORD: usize = 1 + 4 + 250;
const RECORDS: usize = (HALF - 1) / RECORD;
/// States of a record, each of which clears bits of the one before.
const VALID: u8 = 0x3f;
const DELETED: u8 = 0x3c;
/// States of a half.
const ACTIVE: u8 = 0xfe;
const RETIRED: u8 = 0xfc;

fn content(number: u32) -> Vec<u8> {
    (0..250_u32).map(|at| (number.wrapping_mul(0x9e37_79b9) >> (at % 24)) as u8 ^ at as u8).collect()
}

fn place(half: usize, slot: usize) -> usize {
    half * HALF + 1 + slot * RECORD
}

/// What the log says: the active half, the slots and numbers of the records that count in it, and its first free slot.
struct Log {
    half: usize,
    valid: Vec<(usize, u32)>,
    free: usize,
}

impl Log {
    /// The slot and number of the newest record.
    fn newest(&self) -> Option<(usize, u32)> {
        self.valid.iter().max_by_key(|(_, number)| *number).copied()
    }
}

/// Reads the log. `None` if there is none yet.
fn read_log(vars: &[u8]) -> Option<Log> {
    // Both, where one was about to be retired: then the other one is as good.
    let half = [0, 1].into_iter().rfind(|half| vars[half * HALF] == ACTIVE)?;
    let (mut valid, mut free) = (Vec::new(), 0);
    for slot in 0..RECORDS {
        let record = &vars[place(half, slot)..][..RECORD];
        if record.iter().any(|byte| *byte != 0xff) {
            free = slot + 1;
        }
        if matches!(record[0], VALID | DELETED) {
            let number = u32::from_le_bytes(record[1..5].try_into().unwrap());
            assert_eq!(record[5..], content(number), "record {number} says that it is whole");
            valid.push((slot, number));
        } else {
            assert_eq!(record[0], 0xff, "no state that was never written");
        }
    }
    Some(Log { half, valid, free })
}

/// The firmware.
struct Firmware(Flash);

impl Firmware {
    fn command(&self, offset: usize, bytes: &[u8]) {
        bytes.iter().for_each(|byte| assert_eq!(self.0.write(offset as u64, &[*byte]), None));
    }

    /// Programs as edk2 does: a block at a time, and back to the array after each.
    fn program(&self, range: Range<usize>, bytes: &[u8]) {
        for (at, byte) in range.clone().zip(bytes) {
            self.command(at, &[0x10, *byte]);
            if (at + 1) % BLOCK == 0 || at + 1 == range.end {
                self.command(at, &[0xff]);
            }
        }
    }

    fn add(&self, half: usize, slot: usize, number: u32) {
        let at = place(half, slot);
        self.program(at + 1..at + RECORD, &[&number.to_le_bytes()[..], &content(number)].concat());
        self.program(at..at + 1, &[VALID]);
    }
}

/// Plays the firmware on the files in `folder`, and prints the number of each record that it takes for stored.
fn play(folder: &Path) {
    let images = FirmwareImages::open(&folder.join("code"), &folder.join("vars")).unwrap();
    let mut vars = vec![0; VARS as usize];
    images.vars.as_volatile_slice().read_slice(&mut vars, 0).unwrap();
    let store = Box::new(FileStore(Arc::clone(&images.vars_file)));
    let mapping = Box::new(Arc::<Mapping>::default());
    let firmware = Firmware(Flash::new(images.vars, mapping, store, &PlainThreads, Arc::<Events>::default()).unwrap());
    let log = read_log(&vars).unwrap_or_else(|| {
        firmware.program(0..1, &[ACTIVE]);
        Log { half: 0, valid: Vec::new(), free: 0 }
    });
    let (mut half, mut slot, mut former) = (log.half, log.free, log.newest().map(|(slot, _)| slot));
    let mut number = log.newest().map_or(0, |(_, last)| last + 1);
    loop {
        if slot == RECORDS {
            let other = 1 - half;
            for block in (other * HALF..(other + 1) * HALF).step_by(BLOCK) {
                firmware.command(block, &[0x20, 0xd0]);
            }
            firmware.add(other, 0, number);
            firmware.program(other * HALF..other * HALF + 1, &[ACTIVE]);
            firmware.program(half * HALF..half * HALF + 1, &[RETIRED]);
            (half, slot) = (other, 0);
        } else {
            firmware.add(half, slot, number);
            if let Some(former) = former {
                firmware.program(place(half, former)..place(half, former) + 1, &[DELETED]);
            }
        }
        println!("stored {number}");
        (former, slot, number) = (Some(slot), slot + 1, number + 1);
    }
}

#[test]
#[ignore = "plays the firmware for the test below, which kills it"]
fn firmware_until_it_is_killed() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        play(Path::new(&folder));
    }
}

#[test]
fn firmware_that_is_killed_at_any_moment_finds_all_that_it_took_for_stored_and_nothing_torn() {
    let folder = tempfile::tempdir().unwrap();
    File::create(folder.path().join("code")).unwrap().set_len(CODE).unwrap();
    std::fs::write(folder.path().join("vars"), [0xff; VARS as usize]).unwrap();
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    eprintln!("seed {seed}");
    let mut random = seed | 1;
    let kills = std::env::var(MORE).map_or(KILLS, |kills| kills.parse().unwrap());
    let (mut last, mut halves) = (None, [0; 2]);
    for kill in 0..kills {
        let mut firmware = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "firmware::flash::tests::kills::firmware_until_it_is_killed", "--ignored", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(firmware.stdout.take().unwrap()).lines().map_while(Result::ok);
        let told = |line: String| line.strip_prefix("stored ").map(|number| number.parse::<u32>().unwrap());
        last = lines.by_ref().find_map(told).or(last);
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_micros(random % 60_000));
        firmware.kill().unwrap();
        firmware.wait().unwrap();
        last = lines.filter_map(told).last().or(last);

        let log = read_log(&std::fs::read(folder.path().join("vars")).unwrap()).expect("there is a log");
        let ((_, newest), told) = (log.newest().unwrap(), last.unwrap());
        assert!((told..=told + 1).contains(&newest), "kill {kill}: {told} was stored, {newest} is the newest");
        halves[log.half] += 1;
    }
    eprintln!("{} records, killed in halves {halves:?}", last.unwrap() + 1);
    assert!(last.unwrap() as usize > kills);
}
