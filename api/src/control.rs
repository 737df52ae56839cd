//! The seam between those who ask (HTTP threads, an embedding program) and the VM's control thread.
//!
//! The asker makes a [`Reply`] with its receiving end, and hands it with a [`Request`] to [`Control::submit`], which
//! only queues. The control thread answers by [`Reply::send`]; a reply that is dropped answers by itself, with
//! `no-answer`, so nobody waits for ever for a controller that died.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::ToSchema;

use crate::config::{DiskConfig, DiskGroup, DiskGroupPatch, DiskPatch, Link, NicConfig, NicPatch, VmConfig, VmPatch};
use crate::descriptors::Descriptors;
use crate::events::{EventLog, GuestPanic};
use crate::problem::{Code, Problem};
use crate::state::{Action, RequestKind, VmState};

/// What a client wants.
#[derive(Debug)]
pub enum Request {
    /// Describe the VM. Answer: [`Response::Vm`].
    Describe,
    /// Give the VM this (valid) configuration, with the descriptors that were passed for its NICs. Answer:
    /// [`Response::VmCreated`] if there was none, else [`Response::Vm`].
    Define(Box<VmConfig>, Descriptors),
    /// Change the VM as a whole. Answer: [`Response::Vm`].
    PatchVm(Box<VmPatch>),
    /// Drop the configuration. Answer: [`Response::Deleted`].
    Forget,
    /// Act on the guest. Answer, when the action has taken effect: [`Response::Vm`].
    Act(Action),
    /// Answer: [`Response::Disks`], in configuration order.
    ListDisks,
    /// Answer: [`Response::Disk`].
    GetDisk(String),
    /// Add or replace a disk, checked by itself but not against the VM ([`VmConfig::with_disk`]). Answer:
    /// [`Response::DiskCreated`] or [`Response::Disk`].
    PutDisk(Box<DiskConfig>),
    /// Change a disk. Answer: [`Response::Disk`].
    PatchDisk(String, Box<DiskPatch>),
    /// Remove a disk. Answer: [`Response::Deleted`].
    DeleteDisk(String),
    /// Answer: [`Response::DiskGroups`], in configuration order.
    ListDiskGroups,
    /// Answer: [`Response::DiskGroup`].
    GetDiskGroup(String),
    /// Change a group of disks. Answer: [`Response::DiskGroup`].
    PatchDiskGroup(String, Box<DiskGroupPatch>),
    /// Answer: [`Response::Nics`], in configuration order.
    ListNics,
    /// Answer: [`Response::Nic`].
    GetNic(String),
    /// Add or replace a NIC, checked by itself but not against the VM ([`VmConfig::with_nic`]), with the descriptors that
    /// were passed for it. Answer: [`Response::NicCreated`] or [`Response::Nic`].
    PutNic(Box<NicConfig>, Descriptors),
    /// Change a NIC. Answer: [`Response::Nic`].
    PatchNic(String, Box<NicPatch>),
    /// Tell the network where a NIC is. Answer: [`Response::Nic`].
    AnnounceNic(String),
    /// Remove a NIC. Answer: [`Response::Deleted`].
    DeleteNic(String),
}

impl Request {
    /// The row of the state table that decides this request.
    pub fn kind(&self) -> RequestKind {
        match self {
            Self::Describe
            | Self::ListDisks
            | Self::GetDisk(_)
            | Self::ListDiskGroups
            | Self::GetDiskGroup(_)
            | Self::ListNics
            | Self::GetNic(_) => RequestKind::Query,
            Self::Define(..) => RequestKind::Define,
            Self::Forget => RequestKind::Forget,
            Self::Act(action) => RequestKind::Act(*action),
            Self::PutDisk(_) | Self::DeleteDisk(_) | Self::PutNic(..) | Self::DeleteNic(_) => RequestKind::EditDevices,
            Self::PatchVm(_)
            | Self::PatchDisk(..)
            | Self::PatchDiskGroup(..)
            | Self::PatchNic(..)
            | Self::AnnounceNic(_) => RequestKind::PatchDevice,
        }
    }
}

/// What the controller answers when a request succeeded.
#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// The VM as it is now.
    Vm(Box<VmInfo>),
    /// The VM, which did not exist before.
    VmCreated(Box<VmInfo>),
    /// All disks.
    Disks(Vec<DiskInfo>),
    /// One disk as it is now.
    Disk(Box<DiskInfo>),
    /// One disk, which did not exist before.
    DiskCreated(Box<DiskInfo>),
    /// All groups of disks.
    DiskGroups(Vec<DiskGroup>),
    /// One group of disks as it is now.
    DiskGroup(Box<DiskGroup>),
    /// All NICs.
    Nics(Vec<NicInfo>),
    /// One NIC as it is now.
    Nic(Box<NicInfo>),
    /// One NIC, which did not exist before.
    NicCreated(Box<NicInfo>),
    /// It is gone.
    Deleted,
}

/// The description of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// The state.
    pub state: VmState,
    /// Why the VM is in this state, where that is not by request: the cause of a crash, `guest power-off`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What a request that takes longer waits for: `pause: still busy: 3 requests, oldest 41000 ms on root`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<String>,
    /// Milliseconds since the guest was booted (resets do not count), while it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime_ms: Option<u64>,
    /// How often the guest was reset since it was booted, by itself or by request.
    #[serde(default)]
    pub resets: u64,
    /// What the guest said when it panicked, since it was booted or reset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_panic: Option<GuestPanic>,
    /// Seconds that the guest's real-time clock is beyond UTC, with what the guest itself set, since it was booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_offset: Option<i64>,
    /// Bytes that the balloon has taken from the guest, as its driver says, while the guest exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<u64>,
    /// vCPUs that exist now.
    pub vcpus: u16,
    /// The pseudo-terminal of the serial console, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub serial_path: Option<PathBuf>,
    /// The process id of the VMM, as it has it for itself: 1 in a jail (the jailer notes the one on the host).
    pub pid: u32,
    /// The version of the VMM.
    pub version: String,
    /// The configuration, with all defaults filled in.
    pub config: VmConfig,
}

/// How a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// There is no guest: the device is configuration only.
    Configured,
    /// The guest's driver has not started it (yet).
    Idle,
    /// In use by the guest's driver.
    Active,
    /// In use by the guest's driver, and standing still with the VM.
    Paused,
    /// Broken until the guest's driver resets it (DEVICE_NEEDS_RESET).
    NeedsReset,
}

/// The description of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskInfo {
    /// How the device is.
    pub state: DeviceState,
    /// Where the guest finds it, such as `0000:00:01.0`.
    pub pci: String,
    /// The size in bytes, once the disk is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u64>,
    /// Bytes of a logical block, once the disk is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_block_size: Option<u32>,
    /// Bytes of a physical block, once the disk is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_block_size: Option<u32>,
    /// Where the first physical block begins, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_offset: Option<u32>,
    /// The smallest request that the disk likes, in bytes; 0 where it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_io: Option<u32>,
    /// The request size that the disk likes best, in bytes; 0 where it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opt_io: Option<u32>,
    /// Whether seeks are slow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotational: Option<bool>,
    /// The most bytes that are discarded at once, once the disk is open; 0 where it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard_max: Option<u64>,
    /// The most bytes that are zeroed at once, once the disk is open; 0 where it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_zeroes_max: Option<u64>,
    /// The world-wide identifier of the LUN, once the disk is open and if the host knows one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wwid: Option<String>,
    /// The serial number that the guest reads, once the disk is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Requests that are outstanding now.
    #[serde(default)]
    pub in_flight: u32,
    /// Milliseconds that the oldest of them has been.
    #[serde(default)]
    pub oldest_request_ms: u64,
    /// Whether that is longer than `stall_after`.
    #[serde(default)]
    pub stalled: bool,
    /// Failed requests that are kept until the VM is resumed (`on_error`).
    #[serde(default)]
    pub held: u32,
    /// What it did since the VM was booted.
    pub counters: DiskCounters,
    /// The configuration, with all defaults filled in.
    pub config: DiskConfig,
}

/// What a disk did since the VM was booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskCounters {
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Discards and write-zeroes completed.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// The description of a NIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NicInfo {
    /// How the device is.
    pub state: DeviceState,
    /// Where the guest finds it, such as `0000:00:02.0`.
    pub pci: String,
    /// Whether the cable is plugged in.
    pub link: Link,
    /// The name of its tap; of one that came as descriptors, the name that it had when they were taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// What it did since the VM was booted.
    pub counters: NicCounters,
    /// The configuration, with all defaults filled in.
    pub config: NicConfig,
}

/// What a NIC did since the VM was booted. `rx` is towards the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NicCounters {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Bytes given to the guest.
    pub rx_bytes: u64,
    /// Frames for the guest that were dropped.
    pub rx_dropped: u64,
    /// Frames taken from the guest.
    pub tx_frames: u64,
    /// Bytes taken from the guest.
    pub tx_bytes: u64,
    /// Frames from the guest that were dropped.
    pub tx_dropped: u64,
    /// Frames or rings that could not be handled.
    pub errors: u64,
}

/// What the server needs of a VM. Implemented by the handle of the control thread.
pub trait Control: Send + Sync + 'static {
    /// Queues a request; must not block. The answer comes through `reply`, from any thread.
    fn submit(&self, request: Request, reply: Reply);

    /// All metrics as OpenMetrics text, ending in `# EOF`. Called on the API thread: reads counters, waits for nobody.
    fn metrics(&self) -> String;

    /// The part of the tree of `GET /v1/inspect` at `path`, names joined by `/`; empty: all of it; `None`: there is nothing.
    /// Called on the API thread: waits for nobody.
    fn inspect(&self, path: &str) -> Option<serde_json::Value>;

    /// The log behind `GET /v1/events`.
    fn events(&self) -> Arc<EventLog>;
}

/// What a request comes to.
pub type Outcome = Result<Response, Problem>;

/// The one place an answer goes to.
#[derive(Debug)]
pub struct Reply(Option<Sender>);

#[derive(Debug)]
enum Sender {
    Future(oneshot::Sender<Outcome>),
    Thread(mpsc::SyncSender<Outcome>),
}

impl Reply {
    /// A reply to be awaited in a tokio runtime.
    pub fn to_future() -> (Self, FutureAnswer) {
        let (sender, receiver) = oneshot::channel();
        (Self(Some(Sender::Future(sender))), FutureAnswer(receiver))
    }

    /// A reply to be waited for by a thread.
    pub fn to_thread() -> (Self, ThreadAnswer) {
        let (sender, receiver) = mpsc::sync_channel(1);
        (Self(Some(Sender::Thread(sender))), ThreadAnswer(receiver))
    }

    /// Answers. Never blocks; nothing happens if nobody waits any more.
    pub fn send(mut self, outcome: Outcome) {
        self.deliver(outcome);
    }

    fn deliver(&mut self, outcome: Outcome) {
        // Either failure means that the asker has gone, which is its right.
        match self.0.take() {
            Some(Sender::Future(sender)) => drop(sender.send(outcome)),
            Some(Sender::Thread(sender)) => drop(sender.try_send(outcome)),
            None => {}
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.deliver(Err(no_answer()));
        }
    }
}

/// The receiving end of [`Reply::to_future`].
#[derive(Debug)]
pub struct FutureAnswer(oneshot::Receiver<Outcome>);

impl FutureAnswer {
    /// Waits for the answer, at most as long as `deadline`. Needs a tokio runtime with time.
    ///
    /// # Errors
    /// The controller's problem, `no-answer`, or `control-timeout`.
    pub async fn wait(self, deadline: Duration) -> Outcome {
        match tokio::time::timeout(deadline, self.0).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(no_answer()),
            Err(_) => Err(timed_out(deadline)),
        }
    }
}

/// The receiving end of [`Reply::to_thread`].
#[derive(Debug)]
pub struct ThreadAnswer(mpsc::Receiver<Outcome>);

impl ThreadAnswer {
    /// Waits for the answer, at most as long as `deadline`.
    ///
    /// # Errors
    /// The controller's problem, `no-answer`, or `control-timeout`.
    pub fn wait(self, deadline: Duration) -> Outcome {
        match self.0.recv_timeout(deadline) {
            Ok(outcome) => outcome,
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(no_answer()),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(timed_out(deadline)),
        }
    }
}

fn no_answer() -> Problem {
    Problem::new(
        Code::NoAnswer,
        "the controller dropped the request without an answer",
        "GET /v1/vm tells whether it took effect; the log of the VMM says why",
    )
}

fn timed_out(deadline: Duration) -> Problem {
    Problem::new(
        Code::ControlTimeout,
        format!("no answer within {} s; the request may still take effect", deadline.as_secs()),
        "GET /v1/vm tells whether it did; if that hangs too, the log of the VMM says what it waits for",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_reply_answers_that_there_is_no_answer() {
        let (reply, answer) = Reply::to_thread();
        drop(reply);
        assert_eq!(answer.wait(Duration::from_secs(60)).unwrap_err().code, Code::NoAnswer);
    }

    #[test]
    fn an_answer_reaches_the_thread_that_waits_and_a_late_one_harms_nobody() {
        let (reply, answer) = Reply::to_thread();
        reply.send(Ok(Response::Deleted));
        assert_eq!(answer.wait(Duration::from_secs(60)), Ok(Response::Deleted));

        let (reply, answer) = Reply::to_thread();
        assert_eq!(answer.wait(Duration::ZERO).unwrap_err().code, Code::ControlTimeout);
        reply.send(Ok(Response::Deleted));
    }
}
