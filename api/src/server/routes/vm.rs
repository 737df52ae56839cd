//! `/v1/vm` and its actions.

use axum::extract::State;

use super::super::App;
use super::super::extract::{JsonBody, JsonWithFds, NoBody};
use super::super::respond::Answer;
use super::{BodyProblems, ChangeProblems, ReadProblems};
use crate::config::{VmConfig, VmPatch};
use crate::control::{Request, VmInfo};
use crate::state::Action;

/// Describe the VM: configuration, state, runtime
#[utoipa::path(get, path = "/v1/vm", tag = "vm", operation_id = "describe",
    responses((status = 200, description = "The VM.", body = VmInfo), ReadProblems))]
pub(super) async fn describe(State(app): State<App>) -> Answer {
    Answer(app.ask(Request::Describe).await)
}

/// Define the VM, or replace its definition
///
/// Legal in: undefined, defined, stopped, crashed. The configuration is checked as far as that needs no look at the
/// host; nothing is opened before the boot. Only descriptors of taps (`tap_fds`) are checked at once: up to 64 may come with the
/// request (SCM_RIGHTS), which are taken in the order of the NICs.
#[utoipa::path(put, path = "/v1/vm", tag = "vm", operation_id = "define", request_body = VmConfig,
    responses((status = 200, description = "The VM has the new definition.", body = VmInfo),
        (status = 201, description = "The VM is defined.", body = VmInfo), ReadProblems, ChangeProblems, BodyProblems))]
pub(super) async fn define(State(app): State<App>, JsonWithFds(config, passed): JsonWithFds<VmConfig>) -> Answer {
    Answer(match config.validate() {
        Ok(()) => app.ask(Request::Define(Box::new(config), passed)).await,
        Err(problem) => Err(problem),
    })
}

/// Change the VM, also while the guest runs
///
/// A JSON merge patch (RFC 7396).
#[utoipa::path(patch, path = "/v1/vm", tag = "vm", operation_id = "patch",
    request_body(content((VmPatch = "application/merge-patch+json"), (VmPatch = "application/json"))),
    responses((status = 200, description = "The VM is changed.", body = VmInfo), ReadProblems, ChangeProblems, BodyProblems))]
pub(super) async fn patch(State(app): State<App>, JsonBody(patch): JsonBody<VmPatch>) -> Answer {
    Answer(app.ask(Request::PatchVm(Box::new(patch))).await)
}

/// Forget the VM
///
/// Legal in: defined, stopped, crashed. Its disks and files stay.
#[utoipa::path(delete, path = "/v1/vm", tag = "vm", operation_id = "forget",
    responses((status = 204, description = "There is no VM any more."), ReadProblems, ChangeProblems))]
pub(super) async fn forget(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Forget).await)
}

/// Build the machine and start the guest
///
/// Legal in: defined, stopped, crashed.
#[utoipa::path(post, path = "/v1/vm/boot", tag = "vm", operation_id = "boot",
    responses((status = 200, description = "The guest runs.", body = VmInfo), ReadProblems, ChangeProblems))]
pub(super) async fn boot(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Act(Action::Boot)).await)
}

/// Stop vCPUs and devices where they are
///
/// Legal in: running. Answers when nothing is in flight any more.
#[utoipa::path(post, path = "/v1/vm/pause", tag = "vm", operation_id = "pause",
    responses((status = 200, description = "The guest stands still.", body = VmInfo), ReadProblems, ChangeProblems))]
pub(super) async fn pause(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Act(Action::Pause)).await)
}

/// Let a paused guest go on
///
/// Legal in: paused.
#[utoipa::path(post, path = "/v1/vm/resume", tag = "vm", operation_id = "resume",
    responses((status = 200, description = "The guest runs.", body = VmInfo), ReadProblems, ChangeProblems))]
pub(super) async fn resume(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Act(Action::Resume)).await)
}

/// Restart the guest as its reset line would
///
/// Legal in: running, paused. A paused VM stays paused, at the reset vector.
#[utoipa::path(post, path = "/v1/vm/reset", tag = "vm", operation_id = "reset",
    responses((status = 200, description = "The guest begins anew.", body = VmInfo), ReadProblems, ChangeProblems))]
pub(super) async fn reset(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Act(Action::Reset)).await)
}

/// Press the ACPI power button
///
/// Legal in: running. Answers when the button is pressed; what the guest does then is its own decision, and an event.
#[utoipa::path(post, path = "/v1/vm/power-button", tag = "vm", operation_id = "powerButton",
    responses((status = 200, description = "The button is pressed.", body = VmInfo), ReadProblems, ChangeProblems))]
pub(super) async fn power_button(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Act(Action::PowerButton)).await)
}

/// Press the ACPI sleep button
///
/// Legal in: running. Answers when the button is pressed. The guest has no state to sleep in but may do what it is set up to do.
#[utoipa::path(post, path = "/v1/vm/sleep-button", tag = "vm", operation_id = "sleepButton",
    responses((status = 200, description = "The button is pressed.", body = VmInfo), ReadProblems, ChangeProblems))]
pub(super) async fn sleep_button(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Act(Action::SleepButton)).await)
}

/// End the guest now
///
/// Legal in: running, paused. The guest is not asked; what it wrote is flushed to the disks.
#[utoipa::path(post, path = "/v1/vm/shutdown", tag = "vm", operation_id = "shutdown",
    responses((status = 200, description = "The guest has ended.", body = VmInfo), ReadProblems, ChangeProblems))]
pub(super) async fn shutdown(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Act(Action::Shutdown)).await)
}

/// Inject a non-maskable interrupt into every vCPU
///
/// Legal in: running. Most guests write a crash dump or a stack trace.
#[utoipa::path(post, path = "/v1/vm/nmi", tag = "vm", operation_id = "nmi",
    responses((status = 200, description = "The interrupt is injected.", body = VmInfo), ReadProblems, ChangeProblems))]
pub(super) async fn nmi(State(app): State<App>, _: NoBody) -> Answer {
    Answer(app.ask(Request::Act(Action::Nmi)).await)
}
