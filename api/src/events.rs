//! What happened to the VM: a bounded log that many can follow.
//!
//! [`EventLog::publish`] may be called from any thread and never waits for a reader: the log keeps the last
//! [`CAPACITY`] events, and a subscriber that is slower than that is told with a `lagged` event how many it missed.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use tokio::sync::watch;
use utoipa::ToSchema;

use crate::config::{Link, ReservationKey, WatchdogAction};
use crate::state::VmState;

/// How many events the log keeps.
pub const CAPACITY: usize = 1024;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Rises by one with each event of the process, from 1.
    pub id: u64,
    /// When, in RFC 3339.
    pub time: Timestamp,
    /// The name of the VM.
    pub vm: String,
    /// What.
    #[serde(flatten)]
    pub what: EventKind,
}

/// What happened: `kind`, and `data` where there is more to say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "data")]
pub enum EventKind {
    /// The VM went from one state to another.
    StateChanged {
        /// The state before.
        from: VmState,
        /// The state now.
        to: VmState,
        /// Why: the request, or what the guest did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cause: Option<String>,
    },
    /// The guest asked for a reset, or was reset by request.
    GuestReset,
    /// The guest powered off.
    GuestShutdown,
    /// The guest or the VMM failed.
    Crashed {
        /// Why.
        cause: String,
    },
    /// The guest said that it panicked. It may go on, to write a dump.
    GuestPanicked(GuestPanic),
    /// The guest did not reset its watchdog in time.
    WatchdogExpired {
        /// What is done about it.
        action: WatchdogAction,
    },
    /// A device had an error that the guest was told of, or broke.
    DeviceError {
        /// The id of the device.
        device: String,
        /// What went wrong.
        detail: String,
    },
    /// What a device needs of the host, and had lost, works again.
    DeviceRestored {
        /// The id of the device.
        device: String,
        /// What works again.
        detail: String,
    },
    /// The host reported an I/O error on a disk.
    DiskError {
        /// The id of the disk.
        device: String,
        /// `read`, `write`, `flush`, `discard` or `write_zeroes`.
        operation: String,
        /// The first sector of the request, in units of 512 bytes.
        sector: u64,
        /// Its length in bytes.
        bytes: u64,
        /// The host's errno.
        errno: i32,
        /// What that means.
        detail: String,
        /// What became of the request.
        action: ErrorAction,
    },
    /// A request to a disk is outstanding for longer than its `stall_after`.
    DiskStalled {
        /// The id of the disk.
        device: String,
        /// How many requests are outstanding.
        requests: u32,
        /// Milliseconds that the oldest has been.
        oldest_ms: u64,
    },
    /// No request to the disk is outstanding for that long any more.
    DiskRecovered {
        /// The id of the disk.
        device: String,
        /// Milliseconds since the `disk-stalled` event.
        stalled_ms: u64,
    },
    /// A disk has another size.
    DiskResized {
        /// The id of the disk.
        device: String,
        /// The size in bytes now.
        capacity: u64,
    },
    /// A cable was plugged or unplugged.
    LinkChanged {
        /// The id of the NIC.
        device: String,
        /// The state of the cable now.
        link: Link,
    },
    /// Another host took a LUN from this one: it is not written any more, and the VM ends.
    ReservationLost {
        /// The id of the disk.
        device: String,
        /// The key of the host that has it now, if one has.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        holder: Option<ReservationKey>,
    },
    /// This subscriber was too slow: events are missing before the next one.
    Lagged {
        /// How many.
        missed: u64,
    },
    /// A kind that this build does not know (a client talking to a newer server).
    #[serde(untagged)]
    Other {
        /// The kind.
        kind: String,
        /// Its data.
        #[serde(default)]
        data: serde_json::Value,
    },
}

/// What a guest said when it panicked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestPanic {
    /// How it said so.
    pub source: PanicSource,
    /// What it said: five numbers with Hyper-V, of which the first is Windows' bug check code.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parameters: Vec<String>,
    /// Whether a kernel that writes a dump takes over, as the guest says.
    #[serde(default)]
    pub dumping: bool,
}

/// How a guest says that it panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PanicSource {
    /// By the crash registers of Hyper-V (`cpus.hyperv.crash`).
    Hyperv,
    /// By the pvpanic device.
    Pvpanic,
}

/// What became of a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorAction {
    /// The guest was told.
    Reported,
    /// It is kept, and the VM stands still until it is resumed.
    Stopped,
}

impl EventKind {
    /// The kebab-case name: the `event:` field of the stream.
    pub fn name(&self) -> &str {
        match self {
            Self::StateChanged { .. } => "state-changed",
            Self::GuestReset => "guest-reset",
            Self::GuestShutdown => "guest-shutdown",
            Self::Crashed { .. } => "crashed",
            Self::GuestPanicked(_) => "guest-panicked",
            Self::WatchdogExpired { .. } => "watchdog-expired",
            Self::DeviceError { .. } => "device-error",
            Self::DeviceRestored { .. } => "device-restored",
            Self::DiskError { .. } => "disk-error",
            Self::DiskStalled { .. } => "disk-stalled",
            Self::DiskRecovered { .. } => "disk-recovered",
            Self::DiskResized { .. } => "disk-resized",
            Self::LinkChanged { .. } => "link-changed",
            Self::ReservationLost { .. } => "reservation-lost",
            Self::Lagged { .. } => "lagged",
            Self::Other { kind, .. } => kind,
        }
    }
}

/// A point in time; RFC 3339 in UTC with milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ToSchema)]
#[schema(value_type = String, format = DateTime, examples("2026-11-21T10:08:52.123Z"))]
pub struct Timestamp(pub SystemTime);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_rfc3339_millis(self.0).fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_rfc3339(&text).map(Self).map_err(D::Error::custom)
    }
}

/// The log. Share it by [`Arc`].
#[derive(Debug)]
pub struct EventLog {
    ring: Mutex<Ring>,
    /// The id of the newest event; waking up followers is all it is for.
    newest: watch::Sender<u64>,
}

#[derive(Debug)]
struct Ring {
    events: VecDeque<Arc<Event>>,
    newest: u64,
    capacity: usize,
}

impl Ring {
    /// The id of the oldest event that is kept, or of the next one if there is none.
    fn oldest(&self) -> u64 {
        self.events.front().map_or(self.newest.saturating_add(1), |event| event.id)
    }

    fn get(&self, id: u64) -> Option<Arc<Event>> {
        let offset = id.checked_sub(self.oldest())?;
        self.events.get(usize::try_from(offset).ok()?).cloned()
    }
}

impl Default for EventLog {
    fn default() -> Self {
        Self::with_capacity(CAPACITY)
    }
}

impl EventLog {
    /// An empty log that keeps [`CAPACITY`] events.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// An empty log that keeps `capacity` events, at least one.
    pub fn with_capacity(capacity: usize) -> Self {
        let ring = Ring { events: VecDeque::new(), newest: 0, capacity: capacity.max(1) };
        Self { ring: Mutex::new(ring), newest: watch::Sender::new(0) }
    }

    /// Adds an event and returns its id. Callable from any thread; waits for no reader.
    pub fn publish(&self, vm: &str, what: EventKind) -> u64 {
        let time = Timestamp(SystemTime::now());
        let mut ring = self.lock();
        let id = ring.newest.saturating_add(1);
        ring.newest = id;
        if ring.events.len() >= ring.capacity {
            ring.events.pop_front();
        }
        ring.events.push_back(Arc::new(Event { id, time, vm: vm.to_owned(), what }));
        drop(ring);
        // `max`, because two publishers may come here in the other order.
        self.newest.send_modify(|newest| *newest = id.max(*newest));
        id
    }

    /// The id of the newest event, 0 if there was none.
    pub fn newest(&self) -> u64 {
        self.lock().newest
    }

    /// Follows the log with the events after `id`; 0 begins with the oldest that is kept.
    ///
    /// An `id` that was never given out belongs to an earlier process: the log is followed from its beginning.
    pub fn follow_after(self: &Arc<Self>, id: u64) -> Subscription {
        let id = if id > self.newest() { 0 } else { id };
        Subscription { next: id.saturating_add(1), watch: self.newest.subscribe(), log: Arc::clone(self) }
    }

    /// Follows the log with the events from now on.
    pub fn follow(self: &Arc<Self>) -> Subscription {
        self.follow_after(self.newest())
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        // The ring is whole at every point where a thread could die.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One reader of the log.
#[derive(Debug)]
pub struct Subscription {
    log: Arc<EventLog>,
    watch: watch::Receiver<u64>,
    next: u64,
}

impl Subscription {
    /// The next event that is there already.
    pub fn try_next(&mut self) -> Option<Arc<Event>> {
        let ring = self.log.lock();
        let oldest = ring.oldest();
        if self.next < oldest {
            // From the very beginning nothing is missed as long as event 1 is there.
            let missed = oldest - self.next;
            let vm = ring.events.front().map(|event| event.vm.clone()).unwrap_or_default();
            drop(ring);
            self.next = oldest;
            // Carries the id of the last event that is missing, so a reconnect with it goes on after the gap.
            return Some(Arc::new(Event {
                id: oldest.saturating_sub(1),
                time: Timestamp(SystemTime::now()),
                vm,
                what: EventKind::Lagged { missed },
            }));
        }
        let event = ring.get(self.next)?;
        self.next = event.id.saturating_add(1);
        Some(event)
    }

    /// The next event, waiting for it. Needs no particular runtime.
    pub async fn next(&mut self) -> Arc<Event> {
        loop {
            self.watch.borrow_and_update();
            if let Some(event) = self.try_next() {
                return event;
            }
            // Cannot fail: the log, which this subscription holds, owns the sender.
            if self.watch.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(subscription: &mut Subscription) -> Vec<u64> {
        std::iter::from_fn(|| subscription.try_next()).map(|event| event.id).collect()
    }

    #[test]
    fn a_follower_gets_what_comes_after_its_id_and_nothing_twice() {
        let log = EventLog::new();
        for _ in 0..3 {
            log.publish("vm", EventKind::GuestReset);
        }
        assert_eq!(ids(&mut log.follow_after(0)), [1, 2, 3]);
        assert_eq!(ids(&mut log.follow_after(2)), [3]);
        let mut live = log.follow();
        assert!(ids(&mut live).is_empty());
        log.publish("vm", EventKind::GuestShutdown);
        assert_eq!(ids(&mut live), [4]);
        assert!(ids(&mut live).is_empty());
    }

    #[test]
    fn an_id_of_an_earlier_process_starts_from_the_beginning() {
        let log = EventLog::new();
        log.publish("vm", EventKind::GuestReset);
        assert_eq!(ids(&mut log.follow_after(99)), [1]);
        assert_eq!(ids(&mut log.follow_after(u64::MAX)), [1]);
    }

    #[test]
    fn a_slow_follower_is_told_how_much_it_missed_and_the_log_does_not_grow() {
        let log = Arc::new(EventLog::with_capacity(4));
        let mut slow = log.follow();
        for _ in 0..10 {
            log.publish("vm", EventKind::GuestReset);
        }
        assert_eq!(log.lock().events.len(), 4);
        let lagged = slow.try_next().unwrap();
        assert_eq!((lagged.id, &lagged.what), (6, &EventKind::Lagged { missed: 6 }));
        assert_eq!(ids(&mut slow), [7, 8, 9, 10]);
    }

    #[test]
    fn a_waiting_follower_wakes_up_when_another_thread_publishes() {
        let log = EventLog::new();
        let mut follower = log.follow();
        let publisher = std::thread::spawn({
            let log = Arc::clone(&log);
            move || log.publish("vm", EventKind::GuestShutdown)
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let event = runtime.block_on(follower.next());
        assert_eq!((event.id, publisher.join().unwrap()), (1, 1));
    }

    #[test]
    fn every_kind_survives_json_under_its_name_and_a_new_kind_is_readable() {
        let kinds = [
            EventKind::StateChanged { from: VmState::Running, to: VmState::Stopped, cause: None },
            EventKind::GuestReset,
            EventKind::GuestShutdown,
            EventKind::Crashed { cause: "triple fault".into() },
            EventKind::GuestPanicked(GuestPanic {
                source: PanicSource::Hyperv,
                parameters: vec!["0x7e".into()],
                dumping: false,
            }),
            EventKind::WatchdogExpired { action: WatchdogAction::Nmi },
            EventKind::DeviceError { device: "root".into(), detail: "EIO".into() },
            EventKind::DeviceRestored { device: "net0".into(), detail: "tap0".into() },
            EventKind::DiskError {
                device: "root".into(),
                operation: "write".into(),
                sector: 2048,
                bytes: 4096,
                errno: 28,
                detail: "No space left on device".into(),
                action: ErrorAction::Stopped,
            },
            EventKind::DiskStalled { device: "root".into(), requests: 3, oldest_ms: 41_000 },
            EventKind::DiskRecovered { device: "root".into(), stalled_ms: 11_000 },
            EventKind::DiskResized { device: "root".into(), capacity: 1 << 40 },
            EventKind::LinkChanged { device: "net0".into(), link: Link::Down },
            EventKind::ReservationLost { device: "root".into(), holder: "0x1a2b".parse().ok() },
            EventKind::ReservationLost { device: "root".into(), holder: None },
            EventKind::Lagged { missed: 3 },
            EventKind::Other { kind: "from-the-future".into(), data: serde_json::json!({"a": 1}) },
        ];
        for what in kinds {
            let time = Timestamp(SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1_795_000_000_123));
            let event = Event { id: 7, time, vm: "db01".into(), what };
            let value = serde_json::to_value(&event).unwrap();
            assert_eq!(value["kind"], event.what.name());
            assert_eq!(serde_json::from_value::<Event>(value).unwrap(), event);
        }
    }
}
