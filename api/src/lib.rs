//! The contract: configuration schema, routes, OpenAPI, server, client and `rackctl`. Knows no KVM.
//!
//! One set of serde types ([`config`]) yields the JSON body of `PUT /v1/vm`, the file of `rackvisor --config`, the
//! OpenAPI document and the client. The HTTP side talks to the virtual machine only through [`control::Control`]:
//! it sends a [`control::Request`] and waits, with a deadline, for the answer. [`state`] is the state machine as a
//! pure function; [`events`] the bounded log behind `GET /v1/events`; every error is a [`problem::Problem`].

pub mod client;
pub mod config;
pub mod control;
pub mod descriptors;
pub mod events;
pub mod problem;
pub mod server;
pub mod size;
pub mod span;
pub mod state;
#[cfg(feature = "testing")]
pub mod testing;
mod text;

pub use config::VmConfig;
pub use problem::{Code, Problem};
pub use size::ByteSize;
pub use state::{Action, VmState};

/// The version of this build, as `GET /v1/version` and every [`control::VmInfo`] report it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
