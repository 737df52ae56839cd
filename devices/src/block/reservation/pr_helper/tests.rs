//! Helpers of all kinds in front of the LUN of the other tests.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use vmm_sys_util::tempdir::TempDir;

use super::super::keys::{Holder, Kind};
use super::super::tests::Lun;
use super::super::{Reservation, ReservationOptions, Standing};
use super::*;
use crate::block::{BlockFile, OpenMode};

const KEY: u64 = 0xa;
const OTHER: u64 = 0xb;

type Answers = Box<dyn FnMut(&[u8], &[u8]) -> Option<Vec<u8>> + Send>;

/// Listens on a socket, and answers each command with what `answers` makes of it and its parameters: bytes as they go out, or nothing
/// and the end of the connection.
struct Double {
    folder: TempDir,
    connections: Arc<AtomicUsize>,
}

impl Double {
    fn new(mut answers: Answers) -> Self {
        let folder = TempDir::new().unwrap();
        let listener = UnixListener::bind(folder.as_path().join("socket")).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        // It ends with the test program.
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                count.fetch_add(1, Ordering::SeqCst);
                let _ = serve(stream, &mut answers);
            }
        });
        Self { folder, connections }
    }

    /// One that does what it is asked to, over one of two paths of `host` after the other.
    fn of(lun: &Lun, host: u8) -> Self {
        let paths = [0, 1].map(|number| lun.over_path(host, number));
        let mut turn = 0;
        Self::new(Box::new(move |command, parameters| {
            turn += 1;
            Some(execute(&paths[turn % 2], command, parameters))
        }))
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// The disk as a VMM with this helper has it.
    fn disk(&self, paths: usize) -> Helper {
        let path = self.folder.as_path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let mode = OpenMode { read_only: false, direct: Some(false), block_size: None, wwid: None };
        let file = BlockFile::open(&path, &mode).unwrap();
        let helper = Helper::new(Arc::clone(file.file()), &self.folder.as_path().join("socket"));
        Helper { paths, ..helper }
    }
}

fn serve(mut stream: UnixStream, answers: &mut Answers) -> io::Result<()> {
    stream.write_all(&[0, 0, 0, 5])?;
    let mut wanted = [0; 4];
    stream.read_exact(&mut wanted)?;
    assert_eq!(wanted, [0; 4], "no feature is asked for");
    loop {
        let mut command = [0; REQUEST];
        let (length, lun) = stream.recv_with_fd(&mut command)?;
        if length == 0 {
            return Ok(());
        }
        let lun: Option<File> = lun;
        assert!(length == REQUEST && lun.is_some(), "a whole command and the descriptor of the LUN");
        let mut parameters = vec![0; if command[0] == 0x5f { usize::from(command[8]) } else { 0 }];
        stream.read_exact(&mut parameters)?;
        match answers(&command, &parameters) {
            Some(answer) => stream.write_all(&answer)?,
            None => return Ok(()),
        }
    }
}

fn answer(status: u32, read: &[u8]) -> Vec<u8> {
    let size = u32::try_from(read.len()).unwrap();
    [&status.to_be_bytes()[..], &size.to_be_bytes(), &[0; SENSE], read].concat()
}

fn unit_attention() -> Vec<u8> {
    let mut answer = answer(2, &[]);
    answer[8..12].copy_from_slice(&[0x72, 6, 0x2a, 3]);
    answer
}

fn execute(lun: &impl Target, command: &[u8], parameters: &[u8]) -> Vec<u8> {
    let key = |at: usize| u64::from_be_bytes(parameters[at..at + 8].try_into().unwrap());
    let done = match command[..2] {
        [0x5e, 0] => {
            let keys: Vec<u8> = lun.read().unwrap().keys.iter().flat_map(|key| key.to_be_bytes()).collect();
            return answer(0, &[&[0; 4], &u32::try_from(keys.len()).unwrap().to_be_bytes(), &keys[..]].concat());
        }
        [0x5e, 1] => {
            let Some(Holder { key, kind }) = lun.read().unwrap().holder else { return answer(0, &[0; 8]) };
            assert_eq!(kind, Kind::OURS);
            let mut read = [0; 24];
            read[7] = 16;
            read[8..16].copy_from_slice(&key.to_be_bytes());
            read[21] = Kind::OURS_IN_SCSI;
            return answer(0, &read);
        }
        [0x5f, 0] if key(8) == 0 => lun.unregister(key(0)),
        [0x5f, 1] => lun.reserve(key(0)),
        [0x5f, 2] => lun.release(key(0)),
        [0x5f, 3] => lun.clear(key(0)),
        [0x5f, 5] => lun.preempt(key(0), key(8)),
        [0x5f, 6] => lun.register(key(8)),
        _ => panic!("no such command: {command:x?}"),
    };
    match done {
        Ok(()) => answer(0, &[]),
        Err(Refusal::Conflict) => answer(0x18, &[]),
        Err(refusal) => panic!("{refusal}"),
    }
}

fn options(key: u64, preempt: bool) -> ReservationOptions {
    ReservationOptions { key: NonZeroU64::new(key).unwrap(), preempt, helper: None }
}

#[test]
fn hosts_fight_for_a_lun_over_helpers_that_reach_one_path_at_a_time() {
    let lun = Lun::default();
    let [one, two] = [1, 2].map(|host| Double::of(&lun, host));
    let acquire = |helper: &Double, key, preempt| {
        Reservation::acquire_on(Box::new(helper.disk(2)), Path::new("/dev/lun"), &options(key, preempt))
    };
    let first = acquire(&one, KEY, false).unwrap();
    assert_eq!(lun.keys(), [KEY, KEY], "each path has it");
    assert_eq!(first.check().unwrap(), Standing::Held);
    let refused = acquire(&two, OTHER, false).unwrap_err().to_string();
    assert!(refused.contains("reserved by another host (key 0xa)"), "{refused}");
    assert_eq!(lun.keys(), [KEY, KEY]);
    let second = acquire(&two, OTHER, true).unwrap();
    assert_eq!(lun.keys(), [OTHER, OTHER]);
    assert_eq!(first.check().unwrap(), Standing::Lost { holder: Some(OTHER) });
    drop(first);
    assert_eq!(second.check().unwrap(), Standing::Held, "what was lost is not released for the other");
    assert_eq!((one.connections(), two.connections()), (1, 2), "one for each VM");
    second.release().unwrap();
    assert!(lun.keys().is_empty());
}

#[test]
fn a_path_that_the_helper_does_not_reach_is_told_and_no_key_is_left_behind() {
    let lun = Lun::default();
    let helper = Double::of(&lun, 1);
    let disk = helper.disk(3);
    let refused = disk.register(KEY).unwrap_err().to_string();
    assert!(refused.contains("it reached 2 of 3 paths"), "{refused}");
    assert!(lun.keys().is_empty());
}

#[test]
fn what_is_left_of_paths_that_there_are_no_more_does_not_stand_for_those_that_there_are() {
    let lun = Lun::default();
    for gone in [7, 8] {
        lun.over_path(1, gone).register(KEY).unwrap();
    }
    let helper = Double::of(&lun, 1);
    helper.disk(2).register(KEY).unwrap();
    assert_eq!(lun.keys(), [KEY; 4]);
    for path in [0, 1] {
        lun.over_path(1, path).unregister(KEY).unwrap();
    }
}

#[test]
fn an_answer_that_is_none_is_an_error_that_names_the_socket() {
    let wrong = [
        (answer(0x100, &[]), "status 0x100"),
        (answer(0, &[0; 9000]), "9000 bytes where 8192 were asked for"),
        ([0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff].iter().copied().chain([0; SENSE]).collect(), "4294967295 bytes"),
        (answer(0, &[0; 7]), "its answer ends after 7 bytes"),
        (answer(0, &[&[0; 4][..], &[0, 0, 0, 9]].concat()), "contradicts itself"),
        (answer(0x42, &[]), "SCSI status 0x42"),
    ];
    for (wrong, said) in wrong {
        let helper = Double::new(Box::new(move |_, _| Some(wrong.clone())));
        let error = helper.disk(1).read().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    let hangs_up = Double::new(Box::new(|_, _| None));
    let error = hangs_up.disk(1).read().unwrap_err().to_string();
    assert!(error.contains("/socket: it closed the connection"), "{error}");
    let attentive = Double::new(Box::new(|_, _| Some(unit_attention())));
    let error = attentive.disk(1).reserve(KEY).unwrap_err().to_string();
    assert!(error.contains("keeps failing: it needs CAP_SYS_RAWIO"), "{error}");
    std::fs::remove_file(attentive.folder.as_path().join("socket")).unwrap();
    let error = attentive.disk(1).reserve(KEY).unwrap_err().to_string();
    assert!(error.contains("start qemu-pr-helper there"), "{error}");
}

#[test]
fn a_helper_that_was_started_again_is_connected_to_again() {
    let mut left = VecDeque::from([Some(answer(0, &[])), None, Some(answer(0, &[])), Some(unit_attention())]);
    let helper = Double::new(Box::new(move |_, _| left.pop_front().unwrap_or(Some(answer(0, &[])))));
    let disk = helper.disk(1);
    for _ in 0..3 {
        disk.release(KEY).unwrap();
    }
    assert_eq!(helper.connections(), 2);
}

#[test]
fn a_helper_that_hangs_has_one_command_and_goes_on_after_its_answer() {
    let (go, gone) = std::sync::mpsc::channel();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let helper = Double::new(Box::new(move |_, _| {
        if count.fetch_add(1, Ordering::SeqCst) == 0 {
            gone.recv().unwrap();
            return Some(answer(0x18, &[]));
        }
        Some(answer(0, &[]))
    }));
    let disk = Helper { timeout: Duration::from_millis(50), ..helper.disk(1) };
    for _ in 0..3 {
        let error = disk.reserve(KEY).unwrap_err();
        assert!(matches!(&error, Refusal::Helper { error: HelperError::Silent(_), .. }), "{error}");
    }
    assert_eq!((asked.load(Ordering::SeqCst), helper.connections()), (1, 1));
    go.send(()).unwrap();
    let disk = Helper { timeout: TIMEOUT, ..disk };
    disk.reserve(KEY).unwrap();
    assert_eq!((asked.load(Ordering::SeqCst), helper.connections()), (2, 1), "the conflict was the first one's answer");
}
