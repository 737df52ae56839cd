//! The console's thread: all I/O with those who read and type.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backlog::Shared;
use super::endpoint::{Endpoint, Health, Kind, Stream};
use super::escape::Escape;
use super::pty::SlaveWatch;
use super::{CLIENT_LIMIT, ConsoleError, ConsoleMode, EscapeHook, InputSink, socket, sys};
use crate::throttle::Throttle;

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const WATCH: u64 = 2;
const FIRST_ENDPOINT: u64 = 3;

/// After new output the thread sleeps this long before it looks again, so that a guest that prints byte by byte costs one
/// wake-up per interval and not one per byte.
const HOLD_OFF: Duration = Duration::from_millis(2);
/// Input that waits while the sink is full. Only a terminal's is read beyond one buffer, because the escape sequence must
/// always work.
const INPUT_LIMIT: usize = 64 << 10;
const BUFFER: usize = 4096;
/// A named pipe without a reader is an error at once, not a wait.
const LOG_FLAGS: i32 = libc::O_NONBLOCK | libc::O_NOCTTY;

#[derive(Default)]
struct ControlState {
    stop: bool,
    exited: bool,
    waiting: usize,
    /// All readers had everything up to here at some time.
    flushed: u64,
}

/// What the owner of the console tells its thread.
#[derive(Default)]
pub(super) struct Control {
    state: Mutex<ControlState>,
    changed: Condvar,
    input: Mutex<Option<Arc<dyn InputSink>>>,
}

impl Control {
    pub(super) fn set_input(&self, sink: Option<Arc<dyn InputSink>>) {
        *self.input.lock().unwrap_or_else(PoisonError::into_inner) = sink;
    }

    fn lock(&self) -> MutexGuard<'_, ControlState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, at most until `deadline`.
    fn wait(&self, deadline: Instant, done: impl Fn(&ControlState) -> bool) -> bool {
        let mut state = self.lock();
        state.waiting += 1;
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state =
                self.changed.wait_timeout(state, left).map_or_else(|error| error.into_inner().0, |(state, _)| state);
        }
        state.waiting -= 1;
        done(&state)
    }

    pub(super) fn flush(&self, shared: &Shared, deadline: Instant) -> bool {
        let target = shared.backlog().end();
        shared.wake();
        self.wait(deadline, |state| state.exited || state.flushed >= target)
    }

    pub(super) fn stop(&self, shared: &Shared, deadline: Instant) -> bool {
        self.lock().stop = true;
        shared.wake();
        self.wait(deadline, |state| state.exited)
    }
}

/// What the console keeps of an opened mode.
#[derive(Default)]
pub(super) struct Opened {
    pub(super) pty_path: Option<PathBuf>,
    pub(super) socket: Option<socket::SocketFile>,
}

/// The thread's state.
pub(super) struct Server {
    shared: Arc<Shared>,
    control: Arc<Control>,
    epoll: Epoll,
    endpoints: Vec<Option<Endpoint>>,
    listener: Option<UnixListener>,
    slave: Option<SlaveWatch>,
    slave_open: bool,
    escape: Option<(Escape, EscapeHook)>,
    /// Typed, but not taken by the sink yet.
    input: Vec<u8>,
    input_log: Throttle,
    hold_off: Option<Instant>,
}

impl Server {
    pub(super) fn new(shared: Arc<Shared>, control: Arc<Control>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, shared.event.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        Ok(Self {
            shared,
            control,
            epoll,
            endpoints: Vec::new(),
            listener: None,
            slave: None,
            slave_open: false,
            escape: None,
            input: Vec::new(),
            input_log: Throttle::new(),
            hold_off: None,
        })
    }

    pub(super) fn open(&mut self, mode: ConsoleMode) -> Result<Opened, ConsoleError> {
        let setup = |what| move |source| ConsoleError::Setup { what, source };
        let mut opened = Opened::default();
        match mode {
            ConsoleMode::Off => {}
            ConsoleMode::Stdio { escape } => {
                let opened = self.open_stdio(io::stdin(), io::stdout(), escape);
                opened.map_err(setup("standard input and output"))?;
            }
            ConsoleMode::File(path) => {
                let options =
                    std::fs::File::options().create(true).append(true).mode(0o600).custom_flags(LOG_FLAGS).open(&path);
                let file = options.map_err(|source| ConsoleError::File { path, source })?;
                self.add(Endpoint::new(Kind::LogFile, Stream::File(file), 0));
            }
            ConsoleMode::Pty => {
                let (master, path) = sys::open_pty().map_err(setup("pseudo-terminal"))?;
                let watch = SlaveWatch::new(&path).map_err(setup("inotify watch"))?;
                self.watch(watch.fd(), WATCH).map_err(setup("epoll"))?;
                self.slave = Some(watch);
                self.add(Endpoint::new(Kind::Pty, Stream::File(master), 0));
                opened.pty_path = Some(path);
            }
            ConsoleMode::Socket(path) => {
                let (listener, file) = socket::bind(&path)?;
                self.watch(listener.as_raw_fd(), LISTENER).map_err(setup("epoll"))?;
                self.listener = Some(listener);
                opened.socket = Some(file);
            }
        }
        Ok(opened)
    }

    /// Serves `input` and `output`: standard input and output, but for tests.
    pub(super) fn open_stdio(
        &mut self,
        input: impl AsFd,
        output: impl AsFd,
        escape: Option<EscapeHook>,
    ) -> io::Result<()> {
        let terminal = input.as_fd().is_terminal();
        self.escape = escape.filter(|_| terminal).map(|hook| (Escape::default(), hook));
        let (input, output) = (Stream::inherited(input, false)?, Stream::inherited(output, true)?);
        self.add(Endpoint::new(Kind::Stdin { terminal }, input, 0));
        self.add(Endpoint::new(Kind::Stdout, output, 0));
        Ok(())
    }

    fn watch(&self, fd: i32, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
    }

    fn add(&mut self, endpoint: Endpoint) {
        match self.endpoints.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(endpoint),
            None => self.endpoints.push(Some(endpoint)),
        }
    }

    /// The thread's body: returns when the console ends.
    pub(super) fn run(mut self) {
        let mut events = [EpollEvent::default(); 32];
        self.pump(Instant::now());
        while !self.control.lock().stop {
            let count = match self.epoll.wait(self.timeout(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => {
                    tracing::error!(%error, "the console cannot wait for events and ends; the VM goes on without it");
                    break;
                }
            };
            for event in events.iter().take(count) {
                self.handle(event.data(), event.event_set());
            }
            self.turn(Instant::now());
        }
        let mut state = self.control.lock();
        state.exited = true;
        self.control.changed.notify_all();
    }

    /// Milliseconds to sleep, -1 for ever.
    fn timeout(&self) -> i32 {
        let blocked = !self.input.is_empty();
        if self.endpoints.iter().flatten().any(|endpoint| endpoint.ready_to_read() && !blocked) {
            return 0;
        }
        let retry = self.endpoints.iter().flatten().filter_map(Endpoint::retry_at).min();
        let Some(at) = self.hold_off.into_iter().chain(retry).min() else { return -1 };
        let left = at.saturating_duration_since(Instant::now());
        // Rounded up, so as not to wake just before the time.
        i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
    }

    fn handle(&mut self, token: u64, events: EventSet) {
        match token {
            WAKE => {
                let _ = self.shared.event.read();
                self.hold_off.get_or_insert_with(|| Instant::now() + HOLD_OFF);
            }
            LISTENER => self.accept(),
            WATCH => self.slave_changed(),
            _ => self.endpoint_event(token, events),
        }
    }

    fn endpoint_event(&mut self, token: u64, events: EventSet) {
        let Some(index) = token.checked_sub(FIRST_ENDPOINT).and_then(|index| usize::try_from(index).ok()) else {
            return;
        };
        let Some(endpoint) = self.endpoints.get_mut(index).and_then(Option::as_mut) else { return };
        if events.contains(EventSet::OUT) {
            endpoint.writable();
        }
        let hang_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match endpoint.kind {
            Kind::Pty if hang_up => self.slave_closed(),
            Kind::Stdout if hang_up => endpoint.writes = false,
            _ if hang_up => {
                // What the other end typed before it went is still there to be read.
                endpoint.hung_up = true;
                endpoint.writes = false;
            }
            _ => {}
        }
        if events.contains(EventSet::IN) {
            self.read(index);
        }
    }

    /// What is to be done after any event, or in time.
    fn turn(&mut self, now: Instant) {
        if self.hold_off.is_some_and(|until| now >= until) {
            self.hold_off = None;
            self.shared.listen();
        }
        if self.shared.input_room.swap(false, Ordering::SeqCst) {
            self.deliver();
        }
        for index in 0..self.endpoints.len() {
            let ready = self.endpoints.get(index).and_then(Option::as_ref).is_some_and(Endpoint::ready_to_read);
            if ready && self.input.is_empty() {
                self.read(index);
            }
        }
        self.pump(now);
    }

    /// Brings every reader up to date, forgets those that are gone, and asks for the events that are needed now.
    fn pump(&mut self, now: Instant) {
        let mut scratch = [0; BUFFER];
        let mut flushed = u64::MAX;
        let blocked = !self.input.is_empty();
        let mut slave_gone = false;
        for (slot, token) in self.endpoints.iter_mut().zip(FIRST_ENDPOINT..) {
            let Some(endpoint) = slot else { continue };
            let present = endpoint.kind != Kind::Pty || self.slave_open;
            if present && endpoint.pump(&self.shared, &mut scratch, now) == Health::Gone {
                slave_gone |= endpoint.kind == Kind::Pty;
                endpoint.writes &= endpoint.kind == Kind::Pty;
                endpoint.hung_up |= endpoint.kind == Kind::Client;
            }
            let armed = endpoint.arm(&self.epoll, token, blocked, present);
            if armed.is_err() || !(endpoint.reads || endpoint.writes) {
                let _ = endpoint.arm(&self.epoll, token, blocked, false);
                *slot = None;
            } else if present {
                flushed = flushed.min(endpoint.progress());
            }
        }
        if slave_gone {
            self.slave_closed();
        }
        let mut state = self.control.lock();
        let end = self.shared.backlog().end();
        state.flushed = state.flushed.max(flushed.min(end));
        if state.waiting > 0 {
            self.control.changed.notify_all();
        }
    }

    fn read(&mut self, index: usize) {
        let Some(endpoint) = self.endpoints.get_mut(index).and_then(Option::as_mut) else { return };
        let terminal = matches!(endpoint.kind, Kind::Stdin { terminal: true });
        if !endpoint.reads || !(terminal || self.input.is_empty()) {
            return;
        }
        let mut buffer = [0; BUFFER];
        let Some(length) = endpoint.read(&mut buffer) else { return };
        if length == 0 && endpoint.kind == Kind::Pty {
            self.slave_closed();
            return;
        }
        let typed = buffer.get(..length).unwrap_or_default();
        let before = self.input.len();
        match &mut self.escape {
            Some((escape, hook)) if terminal => {
                if escape.filter(typed, &mut self.input) {
                    hook();
                }
            }
            _ => self.input.extend_from_slice(typed),
        }
        if self.input.len() > INPUT_LIMIT {
            self.input.truncate(before.max(INPUT_LIMIT));
            if let Some(held_back) = self.input_log.pass() {
                tracing::warn!(
                    held_back,
                    "the guest does not read its console: what is typed beyond {INPUT_LIMIT} bytes is dropped"
                );
            }
        }
        self.deliver();
    }

    /// Hands the sink what it has room for.
    fn deliver(&mut self) {
        if self.input.is_empty() {
            return;
        }
        let sink = self.control.input.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(sink) = sink else { return };
        let taken = sink.push(&self.input).min(self.input.len());
        self.input.drain(..taken);
        if self.input.is_empty() {
            self.input = Vec::new();
        }
    }

    fn accept(&mut self) {
        while let Some(Ok((client, _))) = self.listener.as_ref().map(UnixListener::accept) {
            let mut full = self.endpoints.iter().flatten().count() >= CLIENT_LIMIT;
            if full {
                // One that has gone, but whose typing the guest has not taken, makes room first.
                let gone = self.endpoints.iter_mut().find(|slot| slot.as_ref().is_some_and(|e| e.hung_up));
                full = gone.is_none_or(|slot| slot.take().is_none());
            }
            let client = OwnedFd::from(client);
            if full {
                let _ = sys::send(client.as_fd(), b"[rackvisor: too many clients of this console]\r\n");
                continue;
            }
            let start = self.shared.backlog().start();
            self.add(Endpoint::new(Kind::Client, Stream::Socket(client), start));
        }
    }

    fn pty(&mut self) -> Option<&mut Endpoint> {
        self.endpoints.iter_mut().flatten().find(|endpoint| endpoint.kind == Kind::Pty)
    }

    fn slave_changed(&mut self) {
        let Some((renewed, open)) = self.slave.as_mut().map(SlaveWatch::update) else { return };
        if (renewed || !open) && self.slave_open {
            self.detach();
        }
        if renewed {
            let start = self.shared.backlog().start();
            if let Some(pty) = self.pty() {
                pty.restart(start);
                pty.reads = true;
            }
        }
        self.slave_open = open;
    }

    /// Nobody has the slave open: the master sleeps until somebody does, who then gets the backlog from its start.
    fn slave_closed(&mut self) {
        if let Some(slave) = &mut self.slave {
            slave.closed();
        }
        self.detach();
    }

    fn detach(&mut self) {
        self.slave_open = false;
        if let Some(pty) = self.pty() {
            // Reading an absent slave fails, which is not for ever.
            pty.reads = true;
            if let Some(master) = pty.file() {
                sys::discard_output(master.as_fd());
            }
        }
    }
}
