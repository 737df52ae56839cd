//! A backend in memory that can be told to fail, to hold requests back, and to do less than it was asked for.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::config::tests::geometry;
use super::super::device::Seat;
use super::super::reservation::Guard;
use super::*;
use crate::block::{BlockBackend, BlockSource, Completion, Event, Geometry, Operation, Request, Signal};

/// A request as the backend got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Which backend, of the queues that share the disk.
    backend: usize,
    pub id: u16,
    pub operation: Operation,
    pub offset: u64,
    pub length: u64,
    buffers: Vec<(usize, usize)>,
}

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    /// What the next requests end with, if not with success.
    results: VecDeque<Result<u64, i32>>,
    held: bool,
    backends: usize,
    pending: Vec<Seen>,
    seen: Vec<Seen>,
}

/// The controls of a [`MemoryBackend`].
#[derive(Clone)]
pub struct MemoryDisk {
    inner: Arc<Mutex<Inner>>,
    changed: Arc<EventFd>,
    geometry: Geometry,
}

impl MemoryDisk {
    pub fn new(bytes: usize) -> Self {
        Self::with_geometry(bytes, |geometry| geometry)
    }

    /// A disk of another shape.
    pub fn with_geometry(bytes: usize, shape: impl FnOnce(Geometry) -> Geometry) -> Self {
        let inner = Inner { bytes: vec![0; bytes], ..Inner::default() };
        let geometry = shape(Geometry { capacity: bytes as u64, ..geometry() });
        Self { inner: Arc::new(Mutex::new(inner)), changed: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()), geometry }
    }

    /// The next requests end like this: `Ok` bytes (done or not), or an errno.
    pub fn results(&self, results: &[Result<u64, i32>]) {
        self.inner.lock().unwrap().results.extend(results);
    }

    /// Requests stay in flight until they are let go.
    pub fn hold(&self, held: bool) {
        self.inner.lock().unwrap().held = held;
        self.changed.write(1).unwrap();
    }

    pub fn pending(&self) -> usize {
        self.inner.lock().unwrap().pending.len()
    }

    /// All requests so far: operation, offset, length.
    pub fn seen(&self) -> Vec<(Operation, u64, u64)> {
        self.inner.lock().unwrap().seen.iter().map(|seen| (seen.operation, seen.offset, seen.length)).collect()
    }

    /// What it holds.
    pub fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        self.inner.lock().unwrap().bytes[offset as usize..][..length].to_vec()
    }

    /// Makes all of it the same.
    pub fn fill(&self, byte: u8) {
        self.inner.lock().unwrap().bytes.fill(byte);
    }

    /// A device on this disk.
    pub fn device(&self, options: &BlockOptions, notifier: Arc<RecordedNotifier>) -> VirtioBlock {
        let backend = |_: &_| Ok(Box::new(MemoryBackend::new(self)) as Box<dyn BlockBackend>);
        VirtioBlock::with_backends(options, Arc::new(self.clone()), &backend, &PlainThreads, notifier).unwrap()
    }

    /// A device on this disk behind a reservation, with a driver.
    pub fn guarded(&self, guard: Guard) -> Bench {
        let options = BlockOptions::new("root", "");
        let notifier = Arc::new(RecordedNotifier::default());
        let backend = |_: &_| Ok(Box::new(MemoryBackend::new(self)) as Box<dyn BlockBackend>);
        let seat = Seat { wwid: None, guard: Some(guard) };
        let source = Arc::new(self.clone());
        let device = VirtioBlock::assemble(&options, seat, source, &backend, &PlainThreads, notifier.clone());
        Bench::new(device.unwrap(), notifier)
    }

    /// The same with a driver.
    pub fn bench(&self, options: BlockOptions) -> Bench {
        let notifier = Arc::new(RecordedNotifier::default());
        Bench::new(self.device(&options, Arc::clone(&notifier)), notifier)
    }
}

impl BlockSource for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capacity(&self) -> io::Result<u64> {
        Ok(self.inner.lock().unwrap().bytes.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

struct MemoryBackend {
    disk: MemoryDisk,
    number: usize,
    watches: [Option<EventFd>; 2],
}

impl MemoryBackend {
    fn new(disk: &MemoryDisk) -> Self {
        let mut inner = disk.inner.lock().unwrap();
        inner.backends += 1;
        Self { disk: disk.clone(), number: inner.backends, watches: [None, None] }
    }

    fn take_done(&self, events: &mut Vec<Event>) {
        let inner = &mut *self.disk.inner.lock().unwrap();
        if inner.held {
            return;
        }
        let pending = std::mem::take(&mut inner.pending).into_iter();
        let (own, others): (Vec<_>, Vec<_>) = pending.partition(|seen| seen.backend == self.number);
        inner.pending = others;
        for request in own {
            let result = inner.results.pop_front().unwrap_or(Ok(request.length));
            if result == Ok(request.length) {
                perform(&mut inner.bytes, &request);
            }
            events.push(Event::Done(Completion { id: request.id, result }));
        }
    }
}

fn perform(bytes: &mut [u8], request: &Seen) {
    let place = request.offset as usize..(request.offset + request.length) as usize;
    let mut place = &mut bytes[place];
    for &(base, length) in &request.buffers {
        let (now, later) = place.split_at_mut(length);
        // SAFETY: the buffers of a request are valid while it is pending.
        unsafe {
            match request.operation {
                Operation::Read => std::ptr::copy(now.as_ptr(), base as *mut u8, length),
                _ => std::ptr::copy(base as *const u8, now.as_mut_ptr(), length),
            }
        }
        place = later;
    }
    if matches!(request.operation, Operation::WriteZeroes { .. }) {
        place.fill(0);
    }
}

impl BlockBackend for MemoryBackend {
    fn watch(&mut self, signal: Signal, event: Option<EventFd>) -> io::Result<()> {
        self.watches[signal as usize] = event;
        Ok(())
    }

    unsafe fn submit(&mut self, request: Request<'_>) {
        let Request { id, operation, offset, length, buffers } = request;
        let buffers: Vec<_> = buffers.iter().map(|b| (b.iov_base as usize, b.iov_len)).collect();
        let seen = Seen { backend: self.number, id, operation, offset, length, buffers };
        let mut inner = self.disk.inner.lock().unwrap();
        inner.seen.push(seen.clone());
        inner.pending.push(seen);
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        self.take_done(events);
        let timeout = if events.is_empty() { timeout } else { Some(Duration::ZERO) };
        let fd = |event: &EventFd| libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let none = libc::pollfd { fd: -1, events: 0, revents: 0 };
        let [kick, command] = &self.watches;
        let mut polled = [kick.as_ref().map_or(none, fd), command.as_ref().map_or(none, fd), fd(&self.disk.changed)];
        let timeout = timeout.map_or(-1, |timeout| timeout.as_millis() as i32);
        // SAFETY: three pollfds.
        unsafe { libc::poll(polled.as_mut_ptr(), 3, timeout) };
        for (position, signal) in [Signal::Kick, Signal::Command].into_iter().enumerate() {
            if polled[position].revents != 0 {
                let _ = self.watches[position].as_ref().unwrap().read();
                events.push(Event::Signal(signal));
            }
        }
        if polled[2].revents != 0 {
            let _ = self.disk.changed.read();
            self.take_done(events);
        }
        Ok(())
    }
}

impl Drop for MemoryBackend {
    fn drop(&mut self) {
        while self.disk.pending() > 0 {
            let mut events = Vec::new();
            self.wait(None, &mut events).unwrap();
        }
    }
}
