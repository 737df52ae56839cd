//! A blocking client for the API, for `rackctl`, tests and host agents written in Rust.
//!
//! Every call makes its own connection: on a Unix socket that costs microseconds, and there is no state to go stale.

mod events;
mod transport;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{DiskConfig, DiskGroup, DiskGroupPatch, DiskPatch, NicConfig, NicPatch, VmConfig, VmPatch};
use crate::control::{DiskInfo, NicInfo, VmInfo};
use crate::events::EventKind;
use crate::problem::{Code, Problem};
use crate::server::Version;
use crate::state::{Action, VmState};

pub use events::Events;
pub use transport::Answer;

/// How long a call may take, if nothing else is said: longer than the server lets the VM take.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error("cannot connect to {}: {source}; is rackvisor running with --api-socket {}?", path.display(), path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection broke, or what came was not HTTP.
    #[error("talking to the API failed: {0}")]
    Transport(String),
    /// No answer in time.
    #[error("no answer within {} s; the request may still take effect", .0.as_secs_f32())]
    Timeout(Duration),
    /// The server refused: the problem says why and what to do.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// The answer is not what this version of the API gives.
    #[error("the answer cannot be understood: {0}; client {client} may be too old or too new for this server", client = crate::VERSION)]
    Answer(String),
}

impl ClientError {
    /// The code of the problem, if the server refused.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Problem(problem) => Some(problem.code),
            _ => None,
        }
    }
}

/// See the module docs.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

type Result<T> = std::result::Result<T, ClientError>;

impl Client {
    /// A client of the server that listens at `socket`. Connects with the first call, not now.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), timeout: DEFAULT_TIMEOUT }
    }

    /// The same client, giving up a call after `timeout`.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET /v1/version`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn version(&self) -> Result<Version> {
        self.get("/v1/version")
    }

    /// `GET /v1/openapi.json`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn openapi(&self) -> Result<serde_json::Value> {
        self.get("/v1/openapi.json")
    }

    /// `GET /v1/vm`.
    ///
    /// # Errors
    /// `vm-undefined`, or another [`ClientError`].
    pub fn describe(&self) -> Result<VmInfo> {
        self.get("/v1/vm")
    }

    /// The state of the VM: like [`Client::describe`], but `undefined` is an answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn state(&self) -> Result<VmState> {
        match self.describe() {
            Ok(vm) => Ok(vm.state),
            Err(error) if error.code() == Some(Code::VmUndefined) => Ok(VmState::Undefined),
            Err(error) => Err(error),
        }
    }

    /// `PUT /v1/vm`.
    ///
    /// # Errors
    /// `wrong-state`, a 422 code, or another [`ClientError`].
    pub fn define(&self, config: &VmConfig) -> Result<VmInfo> {
        self.define_with_fds(config, Vec::new())
    }

    /// `PUT /v1/vm`, with the descriptors of its taps that are to be passed, in the order of the NICs.
    ///
    /// # Errors
    /// As [`Client::define`]; `bad-descriptors`.
    pub fn define_with_fds(&self, config: &VmConfig, fds: Vec<OwnedFd>) -> Result<VmInfo> {
        self.exchange_with_fds(Method::PUT, "/v1/vm", Some(json(config)?), fds)?.successful()?.json()
    }

    /// `PATCH /v1/vm`.
    ///
    /// # Errors
    /// `hotplug-unsupported`, a 422 code, or another [`ClientError`].
    pub fn patch(&self, patch: &VmPatch) -> Result<VmInfo> {
        self.send(Method::PATCH, "/v1/vm", patch)
    }

    /// `DELETE /v1/vm`.
    ///
    /// # Errors
    /// `wrong-state`, or another [`ClientError`].
    pub fn forget(&self) -> Result<()> {
        self.delete("/v1/vm")
    }

    /// `POST /v1/vm/{action}`.
    ///
    /// # Errors
    /// `wrong-state`, what the action itself can fail with, or another [`ClientError`].
    pub fn act(&self, action: Action) -> Result<VmInfo> {
        self.request(Method::POST, &format!("/v1/vm/{action}"), None)?.json()
    }

    /// `GET /v1/vm/disks`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn disks(&self) -> Result<Vec<DiskInfo>> {
        self.get("/v1/vm/disks")
    }

    /// `GET /v1/vm/disks/{id}`.
    ///
    /// # Errors
    /// `no-such-disk`, or another [`ClientError`].
    pub fn disk(&self, id: &str) -> Result<DiskInfo> {
        self.get(&disk_path(id))
    }

    /// `PUT /v1/vm/disks/{id}`.
    ///
    /// # Errors
    /// `hotplug-unsupported`, a 422 code, or another [`ClientError`].
    pub fn put_disk(&self, disk: &DiskConfig) -> Result<DiskInfo> {
        self.send(Method::PUT, &disk_path(&disk.id), disk)
    }

    /// `PATCH /v1/vm/disks/{id}`.
    ///
    /// # Errors
    /// `no-such-disk`, `hotplug-unsupported`, a 422 code, or another [`ClientError`].
    pub fn patch_disk(&self, id: &str, patch: &DiskPatch) -> Result<DiskInfo> {
        self.send(Method::PATCH, &disk_path(id), patch)
    }

    /// `DELETE /v1/vm/disks/{id}`.
    ///
    /// # Errors
    /// `no-such-disk`, `hotplug-unsupported`, or another [`ClientError`].
    pub fn delete_disk(&self, id: &str) -> Result<()> {
        self.delete(&disk_path(id))
    }

    /// `GET /v1/vm/disk-groups`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn disk_groups(&self) -> Result<Vec<DiskGroup>> {
        self.get("/v1/vm/disk-groups")
    }

    /// `PATCH /v1/vm/disk-groups/{id}`.
    ///
    /// # Errors
    /// `no-such-disk-group`, a 422 code, or another [`ClientError`].
    pub fn patch_disk_group(&self, id: &str, patch: &DiskGroupPatch) -> Result<DiskGroup> {
        self.send(Method::PATCH, &format!("/v1/vm/disk-groups/{}", escape(id)), patch)
    }

    /// `GET /v1/vm/nics`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn nics(&self) -> Result<Vec<NicInfo>> {
        self.get("/v1/vm/nics")
    }

    /// `GET /v1/vm/nics/{id}`.
    ///
    /// # Errors
    /// `no-such-nic`, or another [`ClientError`].
    pub fn nic(&self, id: &str) -> Result<NicInfo> {
        self.get(&nic_path(id))
    }

    /// `PUT /v1/vm/nics/{id}`.
    ///
    /// # Errors
    /// `hotplug-unsupported`, a 422 code, or another [`ClientError`].
    pub fn put_nic(&self, nic: &NicConfig) -> Result<NicInfo> {
        self.put_nic_with_fds(nic, Vec::new())
    }

    /// `PUT /v1/vm/nics/{id}`, with the descriptors of its tap that are to be passed.
    ///
    /// # Errors
    /// As [`Client::put_nic`]; `bad-descriptors`.
    pub fn put_nic_with_fds(&self, nic: &NicConfig, fds: Vec<OwnedFd>) -> Result<NicInfo> {
        self.exchange_with_fds(Method::PUT, &nic_path(&nic.id), Some(json(nic)?), fds)?.successful()?.json()
    }

    /// `PATCH /v1/vm/nics/{id}`.
    ///
    /// # Errors
    /// `no-such-nic`, `hotplug-unsupported`, a 422 code, or another [`ClientError`].
    pub fn patch_nic(&self, id: &str, patch: &NicPatch) -> Result<NicInfo> {
        self.send(Method::PATCH, &nic_path(id), patch)
    }

    /// `POST /v1/vm/nics/{id}/announce`.
    ///
    /// # Errors
    /// `no-such-nic`, `wrong-state`, or another [`ClientError`].
    pub fn announce_nic(&self, id: &str) -> Result<NicInfo> {
        self.request(Method::POST, &format!("{}/announce", nic_path(id)), None)?.json()
    }

    /// `DELETE /v1/vm/nics/{id}`.
    ///
    /// # Errors
    /// `no-such-nic`, `hotplug-unsupported`, or another [`ClientError`].
    pub fn delete_nic(&self, id: &str) -> Result<()> {
        self.delete(&nic_path(id))
    }

    /// `GET /v1/metrics`, as OpenMetrics text.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn metrics(&self) -> Result<String> {
        let answer = self.request(Method::GET, "/v1/metrics", None)?;
        String::from_utf8(answer.body).map_err(|error| ClientError::Answer(error.to_string()))
    }

    /// `GET /v1/inspect/{path}`: that part of the tree, all of it if `path` is empty.
    ///
    /// # Errors
    /// `no-such-part`, or another [`ClientError`].
    pub fn inspect(&self, path: &str) -> Result<serde_json::Value> {
        let names: Vec<String> = path.split('/').filter(|name| !name.is_empty()).map(escape).collect();
        let whole = ["/v1/inspect".to_owned()].into_iter().chain(names).collect::<Vec<_>>().join("/");
        self.get(&whole)
    }

    /// `GET /v1/vm/disk-groups/{id}`.
    ///
    /// # Errors
    /// `no-such-disk-group`, or another [`ClientError`].
    pub fn disk_group(&self, id: &str) -> Result<DiskGroup> {
        self.get(&format!("/v1/vm/disk-groups/{}", escape(id)))
    }

    /// `GET /v1/events`: those after `after` (0: all that are kept; `None`: only new ones, or all without `follow`).
    /// With `follow` the iterator waits for new events until the server ends; else it ends with what is there.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn events(&self, after: Option<u64>, follow: bool) -> Result<Events> {
        Events::open(&self.socket, self.timeout, after, follow)
    }

    /// Waits until the VM is in one of these states, and says in which. `timeout` of `None` waits for ever.
    ///
    /// # Errors
    /// [`ClientError::Timeout`], or another [`ClientError`].
    pub fn wait_for(&self, states: &[VmState], timeout: Option<Duration>) -> Result<VmState> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        // First listen, then look: so no change falls between the two.
        let mut events = self.events(None, true)?;
        let mut state = self.state()?;
        while !states.contains(&state) {
            let event = match (events.next_before(deadline), timeout) {
                (Err(ClientError::Timeout(_)), Some(timeout)) => return Err(ClientError::Timeout(timeout)),
                (event, _) => event?,
            };
            match event.map(|event| event.what) {
                Some(EventKind::StateChanged { to, .. }) => state = to,
                Some(EventKind::Lagged { .. }) => state = self.state()?,
                Some(_) => {}
                None => return Err(ClientError::Transport("the server ended".into())),
            }
        }
        Ok(state)
    }

    /// Any request, with a JSON body or none.
    ///
    /// # Errors
    /// [`ClientError`]; an answer with an error status is [`ClientError::Problem`].
    pub fn request(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Answer> {
        self.exchange(method, path, body)?.successful()
    }

    /// Like [`Client::request`], but an answer with an error status is an answer.
    ///
    /// # Errors
    /// [`ClientError`], but never [`ClientError::Problem`].
    pub fn exchange(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Answer> {
        self.exchange_with_fds(method, path, body, Vec::new())
    }

    /// Like [`Client::exchange`], with descriptors that are passed with the request and then closed here.
    ///
    /// # Errors
    /// As [`Client::exchange`].
    pub fn exchange_with_fds(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        fds: Vec<OwnedFd>,
    ) -> Result<Answer> {
        transport::exchange(&self.socket, self.timeout, method, path, body, fds)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.request(Method::GET, path, None)?.json()
    }

    fn send<T: DeserializeOwned>(&self, method: Method, path: &str, body: &impl Serialize) -> Result<T> {
        self.request(method, path, Some(json(body)?))?.json()
    }

    fn delete(&self, path: &str) -> Result<()> {
        self.request(Method::DELETE, path, None).map(drop)
    }
}

fn json(body: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(body).map_err(|error| ClientError::Answer(error.to_string()))
}

fn disk_path(id: &str) -> String {
    format!("/v1/vm/disks/{}", escape(id))
}

fn nic_path(id: &str) -> String {
    format!("/v1/vm/nics/{}", escape(id))
}

/// Percent-encodes all but unreserved characters (RFC 3986 §2.3).
fn escape(id: &str) -> String {
    let mut escaped = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}
