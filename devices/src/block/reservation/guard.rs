//! Looks after the reservation of a running disk: every other second, and at once when a request met a conflict.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{error, warn};

use super::{Reservation, ReservationError, Standing};
use crate::block::shared::Disk;
use crate::{DeviceEvent, ThreadKind, ThreadSpawner};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(2);
/// The least time between two looks, however many requests meet conflicts.
const RECOVERY: Duration = Duration::from_millis(100);

/// What the disk, its workers and its handles share of its reservation.
///
/// The thread that looks does not own the reservation alone: it may hang in the LUN just when the reservation has to be kept, or given up,
/// by somebody who must not hang with it.
pub struct Guard {
    fenced: AtomicBool,
    /// Between two looks, if no request meets a conflict.
    interval: Duration,
    /// Until the device is dropped.
    reservation: Mutex<Option<Arc<Reservation>>>,
    /// While there is a thread that looks.
    pokes: Mutex<Option<SyncSender<()>>>,
}

/// The thread that looks.
pub struct GuardThread {
    thread: JoinHandle<()>,
    ended: Receiver<()>,
}

impl Guard {
    /// Looks after `reservation` once it was [started](Self::start).
    pub fn new(reservation: Reservation) -> Self {
        Self {
            fenced: AtomicBool::new(false),
            interval: INTERVAL,
            reservation: Mutex::new(Some(Arc::new(reservation))),
            pokes: Mutex::new(None),
        }
    }

    /// Looks this often.
    #[cfg(test)]
    pub fn every(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }

    /// Starts to look after the reservation of `disk`, if it has one.
    ///
    /// # Errors
    /// What the kernel answered when it refused a thread.
    pub fn start(disk: &Arc<Disk>, name: &str, spawner: &dyn ThreadSpawner) -> io::Result<Option<GuardThread>> {
        let Some(guard) = &disk.guard else { return Ok(None) };
        let Some(reservation) = lock(&guard.reservation).clone() else { return Ok(None) };
        let (pokes, poked) = mpsc::sync_channel(1);
        let (end, ended) = mpsc::channel();
        let parts = Parts { disk: Arc::clone(disk), reservation, interval: guard.interval, poked, end };
        let thread = spawner.spawn(ThreadKind::Reservation, name, Box::new(move || parts.run()))?;
        *lock(&guard.pokes) = Some(pokes);
        Ok(Some(GuardThread { thread, ended }))
    }

    /// Whether the LUN was lost: nothing is to be sent to it any more.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// A request met a conflict. Never waits.
    pub fn poke(&self) {
        if let Some(pokes) = &*lock(&self.pokes) {
            // A full channel means that it will look anyway.
            let _ = pokes.try_send(());
        }
    }

    /// Gives the reservation up, unless requests are in flight. Waits for the disk.
    ///
    /// # Errors
    /// [`ReservationError`] if the LUN stays reserved.
    pub fn release(&self, in_flight: u32) -> Result<(), ReservationError> {
        let Some(reservation) = lock(&self.reservation).clone() else { return Ok(()) };
        if in_flight > 0 { Err(reservation.keep(in_flight)) } else { reservation.release() }
    }

    /// The device goes: the thread ends, and releases what is not released yet, unless requests are in flight.
    pub fn leave(&self, in_flight: u32) {
        let reservation = lock(&self.reservation).take();
        if let Some(reservation) = &reservation
            && in_flight > 0
        {
            let error = reservation.keep(in_flight);
            warn!(%error, "a disk that hangs");
        }
        drop(reservation);
        drop(lock(&self.pokes).take());
    }
}

impl GuardThread {
    /// Waits until the thread has ended, at most until `end`.
    pub fn join(self, end: Instant) -> bool {
        let timeout = end.saturating_duration_since(Instant::now());
        let ended = matches!(self.ended.recv_timeout(timeout), Err(RecvTimeoutError::Disconnected));
        if ended {
            let _ = self.thread.join();
        }
        ended
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Parts {
    disk: Arc<Disk>,
    reservation: Arc<Reservation>,
    interval: Duration,
    poked: Receiver<()>,
    end: Sender<()>,
}

impl Parts {
    fn run(self) {
        let Self { disk, reservation, interval, poked, end } = self;
        let mut next = interval;
        while poked.recv_timeout(next) != Err(RecvTimeoutError::Disconnected) {
            match reservation.check() {
                Ok(Standing::Held) => {}
                Ok(Standing::Lost { holder }) => {
                    disk.reservation_lost(holder);
                    // There is nothing more to look at; the rest of the channel is waited for so that this one ends last.
                    while poked.recv().is_ok() {}
                    break;
                }
                Err(error) => {
                    if let Some(unsaid) = disk.log.allow() {
                        warn!(disk = disk.id, %error, unsaid, "cannot tell whether the disk is still reserved for this host");
                    }
                }
            }
            match rest(&poked) {
                Rested::Quietly => next = interval,
                Rested::Poked => next = Duration::ZERO,
                Rested::Left => break,
            }
        }
        // Releases it, if nobody did.
        drop(reservation);
        drop(disk);
        drop(end);
    }
}

enum Rested {
    Quietly,
    Poked,
    /// The device is gone.
    Left,
}

/// Lets [`RECOVERY`] pass.
fn rest(poked: &Receiver<()>) -> Rested {
    let end = Instant::now() + RECOVERY;
    let mut rested = Rested::Quietly;
    loop {
        match poked.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(()) => rested = Rested::Poked,
            Err(RecvTimeoutError::Timeout) => return rested,
            Err(RecvTimeoutError::Disconnected) => return Rested::Left,
        }
    }
}

impl Disk {
    /// Another host has taken the LUN: no request is taken off the rings any more.
    fn reservation_lost(&self, holder: Option<u64>) {
        if let Some(guard) = &self.guard {
            guard.fenced.store(true, Ordering::Release);
        }
        let taker = holder.map(|key| format!("{key:#x}"));
        error!(disk = self.id, holder = taker, "another host took the reservation: the disk is not written any more");
        self.notifier.notify(&self.id, DeviceEvent::ReservationLost { holder });
    }

    /// Whether the LUN was lost to another host.
    pub fn is_fenced(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_fenced)
    }

    /// A request met a reservation conflict.
    pub fn conflict(&self) {
        if let Some(guard) = &self.guard {
            guard.poke();
        }
    }
}
