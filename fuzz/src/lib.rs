//! What a hostile guest, client or peer can send, as bytes that a fuzzer makes up.
//!
//! A target plays its bytes to parts of the VMM as they are, with the doubles that tests use on the other side. It asks for
//! no answer: it fails by a panic (also in a worker), by not coming back, or by what the sanitizer finds. `fuzz/run`
//! gives targets to libFuzzer (`fuzz/engine`); the inputs that showed something are lines of `fuzz/corpus` and are played by
//! an ordinary test.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a target fails by panicking, also in its helpers"
)]

mod config;
mod http;
mod image;
mod input;
mod platform;
mod ring;
mod tpm;

/// Plays bytes.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Target); 9] = [
    ("platform", platform::play),
    ("block", ring::block::play),
    ("net", ring::net::play),
    ("rng", ring::rng::play),
    ("balloon", ring::balloon::play),
    ("tpm", tpm::play),
    ("http", http::play),
    ("config", config::play),
    ("image", image::play),
];

/// The target with this name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(other, _)| *other == name).map(|(_, target)| *target)
}
