//! Consoles with real descriptors: files, pseudo-terminals, sockets with several clients.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use super::*;
use crate::PlainThreads;

/// Long enough for any machine; only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::SeqCst);
        let path = std::env::temp_dir().join(format!("rackvisor-console-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// An input sink with room for `limit` bytes at a time.
#[derive(Default)]
struct Typed {
    bytes: Mutex<Vec<u8>>,
    limit: AtomicUsize,
}

impl Typed {
    fn with_room(limit: usize) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::default(), limit: AtomicUsize::new(limit) })
    }

    fn await_bytes(&self, wanted: &[u8]) {
        let deadline = deadline();
        while *self.bytes.lock().unwrap() != wanted {
            assert!(Instant::now() < deadline, "got {:?}", String::from_utf8_lossy(&self.bytes.lock().unwrap()));
            std::thread::yield_now();
        }
    }
}

impl InputSink for Typed {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut kept = self.bytes.lock().unwrap();
        let taken = bytes.len().min(self.limit.load(Ordering::SeqCst).saturating_sub(kept.len()));
        kept.extend_from_slice(&bytes[..taken]);
        taken
    }
}

fn socket_console(folder: &Folder) -> (Console, PathBuf) {
    let path = folder.path("console.sock");
    (Console::new(ConsoleMode::Socket(path.clone()), &PlainThreads).unwrap(), path)
}

fn join(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

/// Reads exactly as many bytes as `wanted` has and compares.
fn expect(reader: &mut impl Read, wanted: &[u8]) {
    let mut got = vec![0; wanted.len()];
    reader.read_exact(&mut got).unwrap();
    assert!(got == wanted, "got {:?}", String::from_utf8_lossy(&got));
}

fn count_threads() -> usize {
    let comm = |entry: io::Result<fs::DirEntry>| fs::read_to_string(entry.unwrap().path().join("comm"));
    fs::read_dir("/proc/self/task").unwrap().filter_map(|entry| comm(entry).ok()).filter(|c| c == "quietcon\n").count()
}

/// Names its threads so that a test can find them, and how much time they have used.
struct Named(&'static str);

impl ThreadSpawner for Named {
    fn spawn(&self, _kind: ThreadKind, _name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(self.0.to_owned()).spawn(body)
    }
}

fn thread_file(name: &str, file: &str) -> String {
    for entry in fs::read_dir("/proc/self/task").unwrap() {
        let path = entry.unwrap().path();
        if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name) {
            return fs::read_to_string(path.join(file)).unwrap();
        }
    }
    panic!("no thread {name}");
}

/// How often the thread of this name went to sleep.
fn sleeps_of(name: &str) -> u64 {
    let status = thread_file(name, "status");
    let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Processor time of the thread of this name, in ticks of 10 ms.
fn work_of(name: &str) -> u64 {
    let stat = thread_file(name, "stat");
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

/// Nothing happens: the thread of this name may neither spin nor poll.
fn assert_asleep(name: &str) {
    std::thread::sleep(Duration::from_millis(50));
    let before = (work_of(name), sleeps_of(name));
    std::thread::sleep(Duration::from_millis(300));
    assert!(work_of(name) - before.0 < 10, "{name} spins");
    assert!(sleeps_of(name) - before.1 < 10, "{name} polls");
}

#[test]
fn off_keeps_the_backlog_without_a_thread() {
    let console = Console::new(ConsoleMode::Off, &Named("offcon")).unwrap();
    assert!(console.thread.is_none());
    console.output().append(b"last words");
    assert_eq!(console.recent(5), b"words");
    assert!(console.flush(Instant::now()));
    assert!(console.shutdown(Instant::now()));
}

#[test]
fn a_file_is_appended_to_and_holds_everything_after_shutdown() {
    let folder = Folder::new();
    let path = folder.path("console.log");
    for _ in 0..2 {
        let console = Console::new(ConsoleMode::File(path.clone()), &PlainThreads).unwrap();
        let output = console.output();
        for number in 0..10_000 {
            output.append(format!("line {number}\n").as_bytes());
        }
        assert!(console.shutdown(deadline()));
    }
    let once: String = (0..10_000).map(|number| format!("line {number}\n")).collect();
    assert_eq!(fs::read_to_string(&path).unwrap(), once.clone() + &once);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_file_that_cannot_be_opened_is_an_error_that_names_it() {
    let error = Console::new(ConsoleMode::File("/nonexistent/console.log".into()), &PlainThreads).err().unwrap();
    assert!(error.to_string().contains("/nonexistent/console.log"), "{error}");
}

#[test]
fn a_full_disk_loses_no_output_while_the_backlog_lasts_and_does_not_spin() {
    // A write to /dev/full always fails with ENOSPC.
    let console = Console::new(ConsoleMode::File("/dev/full".into()), &Named("fullcon")).unwrap();
    console.output().append(b"kept");
    assert!(!console.flush(Instant::now() + Duration::from_millis(50)));
    assert_asleep("fullcon");
    assert_eq!(console.recent(10), b"kept");
}

#[test]
fn every_client_gets_the_backlog_first_then_all_output_and_each_may_type() {
    let folder = Folder::new();
    let (console, path) = socket_console(&folder);
    let typed = Typed::with_room(1000);
    console.set_input(Arc::clone(&typed) as _);
    let output = console.output();
    output.append(b"boot ");
    let mut early = join(&path);
    expect(&mut early, b"boot ");
    output.append(b"login: ");
    let mut late = join(&path);
    expect(&mut late, b"boot login: ");
    expect(&mut early, b"login: ");
    early.write_all(b"ro").unwrap();
    typed.await_bytes(b"ro");
    late.write_all(b"ot").unwrap();
    typed.await_bytes(b"root");
    output.append(b"root");
    expect(&mut early, b"root");
    expect(&mut late, b"root");
    drop(early);
    output.append(b"!");
    expect(&mut late, b"!");
    assert!(console.shutdown(deadline()));
    assert_eq!(late.read(&mut [0; 10]).unwrap(), 0, "the client sees the end");
}

#[test]
fn a_slow_client_is_told_what_it_lost_and_goes_on_with_the_newest_output() {
    let folder = Folder::new();
    let (console, path) = socket_console(&folder);
    let (mut slow, mut quick) = (join(&path), join(&path));
    let output = console.output();
    let line = [b'.'; 99];
    let lines = 4 * BACKLOG_LIMIT / 100;
    let mut sent = Vec::new();
    for number in 0..lines {
        output.append(&line);
        output.append(b"\n");
        sent.extend_from_slice(&line);
        sent.push(b'\n');
        if number % 1000 == 0 {
            // The quick one keeps up.
            let mut got = vec![0; sent.len()];
            quick.read_exact(&mut got).unwrap();
            assert!(got == sent);
            sent.clear();
        }
    }
    output.append(b"END");
    let mut got = Vec::new();
    let mut buffer = [0; 65536];
    while !got.ends_with(b"END") {
        let length = slow.read(&mut buffer).unwrap();
        got.extend_from_slice(&buffer[..length]);
    }
    let text = String::from_utf8(got).unwrap();
    // It may be overtaken more than once: every byte is either there or counted.
    let mut seen = 0;
    let mut lost = 0;
    for part in text.split("\r\n[rackvisor: ") {
        match part.split_once(" bytes of console output lost]\r\n") {
            Some((count, after)) => {
                lost += count.parse::<usize>().unwrap();
                seen += after.len();
            }
            None => seen += part.len(),
        }
    }
    assert!(lost > 0);
    assert_eq!(seen + lost, lines * 100 + 3);
}

#[test]
fn a_client_that_never_reads_holds_up_neither_the_guest_nor_others_and_does_not_make_the_thread_spin() {
    let folder = Folder::new();
    let path = folder.path("console.sock");
    let console = Console::new(ConsoleMode::Socket(path.clone()), &Named("slowcon")).unwrap();
    let (_stuck, mut reader) = (join(&path), join(&path));
    let output = console.output();
    let block = [b'x'; 1000];
    for _ in 0..1000 {
        output.append(&block);
        expect(&mut reader, &block);
    }
    assert!(!console.flush(Instant::now() + Duration::from_millis(50)), "the stuck one has not got everything");
    assert_asleep("slowcon");
    let start = Instant::now();
    console.shutdown(Instant::now());
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn the_thread_sleeps_while_nothing_happens_and_wakes_rarely_for_byte_by_byte_output() {
    let folder = Folder::new();
    let (name, path) = ("idlecon", folder.path("console.sock"));
    let console = Console::new(ConsoleMode::Socket(path.clone()), &Named(name)).unwrap();
    let mut client = join(&path);
    console.output().append(b"x");
    expect(&mut client, b"x");
    assert_asleep(name);
    let before = sleeps_of(name);
    let output = console.output();
    for _ in 0..100_000 {
        output.append(b"y");
    }
    expect(&mut client, &vec![b'y'; 100_000]);
    assert!(sleeps_of(name) - before < 10_000, "one wake-up for many bytes");
}

#[test]
fn the_seventeenth_client_is_told_why_it_may_not_join_and_a_place_that_gets_free_is_given_again() {
    let folder = Folder::new();
    let (console, path) = socket_console(&folder);
    console.output().append(b"hi");
    let mut clients: Vec<UnixStream> = (0..CLIENT_LIMIT).map(|_| join(&path)).collect();
    clients.iter_mut().for_each(|client| expect(client, b"hi"));
    let mut refused = String::new();
    join(&path).read_to_string(&mut refused).unwrap();
    assert_eq!(refused, "[rackvisor: too many clients of this console]\r\n");
    clients.pop();
    let deadline = deadline();
    loop {
        let mut first = [0; 2];
        join(&path).read_exact(&mut first).unwrap();
        if &first == b"hi" {
            break;
        }
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn what_a_client_typed_before_it_left_reaches_a_guest_that_reads_late() {
    let folder = Folder::new();
    let (console, path) = socket_console(&folder);
    let typed = Typed::with_room(0);
    console.set_input(Arc::clone(&typed) as _);
    let message: Vec<u8> = (0..50_000u32).map(|i| b'a' + (i % 26) as u8).collect();
    let mut client = join(&path);
    client.write_all(&message).unwrap();
    drop(client);
    typed.limit.store(usize::MAX, Ordering::SeqCst);
    console.output().wake_input();
    typed.await_bytes(&message);
}

#[test]
fn a_guest_that_reads_slowly_makes_its_clients_wait_and_loses_nothing() {
    let folder = Folder::new();
    let (console, path) = socket_console(&folder);
    let typed = Typed::with_room(10);
    console.set_input(Arc::clone(&typed) as _);
    let message: Vec<u8> = (0..3000u32).map(|i| i as u8).collect();
    join(&path).write_all(&message).unwrap();
    for room in (10..=3000).step_by(10) {
        typed.limit.store(room, Ordering::SeqCst);
        console.output().wake_input();
        typed.await_bytes(&message[..room]);
    }
}

#[test]
fn a_client_that_closes_its_writing_half_still_gets_output() {
    let folder = Folder::new();
    let (console, path) = socket_console(&folder);
    let typed = Typed::with_room(100);
    console.set_input(Arc::clone(&typed) as _);
    let mut client = join(&path);
    client.write_all(b"once").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    typed.await_bytes(b"once");
    console.output().append(b"still here");
    expect(&mut client, b"still here");
}

#[test]
fn a_socket_file_is_private_replaced_when_dead_refused_when_alive_and_removed_at_the_end() {
    let folder = Folder::new();
    let path = folder.path("console.sock");
    drop(UnixListener::bind(&path).unwrap());
    let console = Console::new(ConsoleMode::Socket(path.clone()), &PlainThreads).unwrap();
    let data = fs::symlink_metadata(&path).unwrap();
    assert!(data.file_type().is_socket());
    assert_eq!(data.permissions().mode() & 0o777, 0o600);
    let second = Console::new(ConsoleMode::Socket(path.clone()), &PlainThreads).err().unwrap();
    assert!(matches!(second, ConsoleError::InUse { .. }), "{second}");
    join(&path);
    console.shutdown(deadline());
    assert!(!path.exists());
    fs::write(&path, "precious").unwrap();
    let refused = Console::new(ConsoleMode::Socket(path.clone()), &PlainThreads).err().unwrap();
    assert!(matches!(refused, ConsoleError::NotASocket { .. }), "{refused}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let long = Console::new(ConsoleMode::Socket(folder.path(&"x".repeat(200))), &PlainThreads).err().unwrap();
    assert!(matches!(long, ConsoleError::Socket { .. }), "{long}");
}

#[test]
fn a_socket_file_that_somebody_else_put_in_the_place_of_ours_stays() {
    let folder = Folder::new();
    let (console, path) = socket_console(&folder);
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(console);
    assert!(path.exists());
}

fn open_slave(path: &Path) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path).unwrap()
}

#[test]
fn who_opens_the_pty_gets_the_backlog_first_and_so_does_the_next_one() {
    let console = Console::new(ConsoleMode::Pty, &Named("ptycon")).unwrap();
    let path = console.pty_path().unwrap().to_owned();
    let typed = Typed::with_room(100);
    console.set_input(Arc::clone(&typed) as _);
    let output = console.output();
    output.append(b"boot\r\n");
    assert!(console.flush(deadline()), "nobody is there: nothing to wait for");
    let mut first = open_slave(&path);
    expect(&mut first, b"boot\r\n");
    first.write_all(b"a\x03\r").unwrap();
    typed.await_bytes(b"a\x03\r");
    output.append(b"more");
    expect(&mut first, b"more");
    drop(first);
    // A master without a slave is always "hung up".
    assert_asleep("ptycon");
    output.append(b"!");
    let mut second = open_slave(&path);
    expect(&mut second, b"boot\r\nmore!");
    second.write_all(b"b").unwrap();
    typed.await_bytes(b"a\x03\rb");
}

#[test]
fn a_pty_whose_user_stopped_reading_holds_nobody_up() {
    let console = Console::new(ConsoleMode::Pty, &PlainThreads).unwrap();
    let mut slave = open_slave(console.pty_path().unwrap());
    let output = console.output();
    output.append(b"go");
    expect(&mut slave, b"go");
    let block = [b'z'; 4096];
    for _ in 0..1000 {
        output.append(&block);
    }
    output.append(b"END");
    let mut got = Vec::new();
    let mut buffer = [0; 4096];
    while !got.ends_with(b"END") {
        let length = slave.read(&mut buffer).unwrap();
        got.extend_from_slice(&buffer[..length]);
    }
    let text = String::from_utf8_lossy(&got);
    let lost: usize =
        text.split("[rackvisor: ").skip(1).map(|part| part.split_once(' ').unwrap().0.parse::<usize>().unwrap()).sum();
    assert_eq!(text.matches('z').count() + lost, 1000 * 4096);
}

#[test]
fn dropping_a_console_leaves_no_thread_and_no_descriptor() {
    let folder = Folder::new();
    let sink = Typed::with_room(1);
    for round in 0..20 {
        let mode = match round % 3 {
            0 => ConsoleMode::Socket(folder.path("console.sock")),
            1 => ConsoleMode::Pty,
            _ => ConsoleMode::File(folder.path("log")),
        };
        let console = Console::new(mode, &Named("quietcon")).unwrap();
        console.set_input(Arc::clone(&sink) as _);
        console.output().append(b"x");
    }
    assert_eq!(count_threads(), 0);
    assert_eq!(Arc::strong_count(&sink), 1, "nobody holds the sink");
}

#[test]
fn output_after_the_console_ended_is_harmless() {
    let folder = Folder::new();
    let (console, _) = socket_console(&folder);
    let output = console.output();
    drop(console);
    output.append(b"late");
    output.wake_input();
}

/// A console on two descriptors in place of standard input and output.
fn stdio_console(input: impl AsFd, output: impl AsFd, escape: Option<EscapeHook>, name: &'static str) -> Console {
    let setup = |source| ConsoleError::Setup { what: "test", source };
    let open = |server: &mut Server| server.open_stdio(input, output, escape).map(|()| Opened::default());
    Console::start(true, &Named(name), |server| open(server).map_err(setup)).unwrap()
}

#[test]
fn pipes_in_place_of_a_terminal_carry_every_byte_and_their_end_ends_nothing() {
    let (input, mut keys) = io::pipe().unwrap();
    let (mut screen, output) = io::pipe().unwrap();
    let left = Arc::new(AtomicUsize::new(0));
    let hook = {
        let left = Arc::clone(&left);
        Box::new(move || {
            left.fetch_add(1, Ordering::SeqCst);
        })
    };
    let console = stdio_console(&input, &output, Some(hook), "pipecon");
    let typed = Typed::with_room(1 << 20);
    console.set_input(Arc::clone(&typed) as _);
    keys.write_all(b"a\x01xb").unwrap();
    typed.await_bytes(b"a\x01xb");
    assert_eq!(left.load(Ordering::SeqCst), 0, "no terminal, no escape sequence");
    drop(keys);
    console.output().append(b"still here");
    expect(&mut screen, b"still here");
    assert_asleep("pipecon");
    console.output().append(&[b'.'; 200_000]);
    assert!(!console.flush(Instant::now() + Duration::from_millis(50)), "the pipe is full");
    assert_asleep("pipecon");
    drop((screen, output));
    console.output().append(b"nobody reads");
    assert!(console.flush(deadline()), "a reader that is gone is not waited for");
    assert_asleep("pipecon");
    assert_eq!(console.recent(13), b".nobody reads");
}

#[test]
fn dev_null_and_regular_files_serve_as_standard_input_and_output() {
    let folder = Folder::new();
    let (script, log) = (folder.path("script"), folder.path("log"));
    fs::write(&script, "run me\n").unwrap();
    let mut output = File::create(&log).unwrap();
    output.write_all(b"before\n").unwrap();
    let console = stdio_console(File::open(&script).unwrap(), &output, None, "filecon");
    let typed = Typed::with_room(100);
    console.set_input(Arc::clone(&typed) as _);
    typed.await_bytes(b"run me\n");
    console.output().append(b"output\n");
    assert!(console.flush(deadline()));
    assert_asleep("filecon");
    assert_eq!(fs::read_to_string(&log).unwrap(), "before\noutput\n", "written where the shell left off");
    let null = File::open("/dev/null").unwrap();
    let console = stdio_console(&null, File::create("/dev/null").unwrap(), None, "nullcon");
    console.output().append(b"x");
    assert!(console.flush(deadline()));
    assert_asleep("nullcon");
}

#[test]
fn at_a_terminal_control_a_x_leaves_even_when_the_guest_does_not_read() {
    let (mut user, path) = sys::open_pty().unwrap();
    let slave = open_slave(&path);
    let left = Arc::new(AtomicUsize::new(0));
    let hook = {
        let left = Arc::clone(&left);
        Box::new(move || {
            left.fetch_add(1, Ordering::SeqCst);
        })
    };
    let console = stdio_console(&slave, &slave, Some(hook), "ttycon");
    let typed = Typed::with_room(3);
    console.set_input(Arc::clone(&typed) as _);
    console.output().append(b"login: ");
    // The master of the double does not wait.
    let mut seen = Vec::new();
    let deadline = deadline();
    while seen.len() < 7 && Instant::now() < deadline {
        let mut buffer = [0; 16];
        let length = user.read(&mut buffer).unwrap_or(0);
        seen.extend_from_slice(&buffer[..length]);
    }
    assert_eq!(seen, b"login: ");
    user.write_all(b"ab\x01\x01more than there is room for").unwrap();
    typed.await_bytes(b"ab\x01");
    assert_asleep("ttycon");
    user.write_all(b"\x01x").unwrap();
    while left.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

#[test]
fn standard_input_that_is_no_terminal_is_not_put_into_raw_mode() {
    if !io::IsTerminal::is_terminal(&io::stdin()) {
        assert!(RawTerminal::new().unwrap().is_none());
    }
    restore_terminal();
}
