//! `/v1/vm/nics`.

use axum::extract::{Path, State};

use super::super::App;
use super::super::extract::{JsonBody, JsonWithFds, NoBody};
use super::super::respond::Answer;
use super::{BodyProblems, ChangeProblems, ReadProblems, check_id};
use crate::config::{NicConfig, NicPatch};
use crate::control::{NicInfo, Request};
use crate::problem::Pointer;

/// List the NICs, in configuration order
#[utoipa::path(get, path = "/v1/vm/nics", tag = "nics", operation_id = "listNics",
    responses((status = 200, description = "The NICs.", body = Vec<NicInfo>), ReadProblems))]
pub(super) async fn list(State(app): State<App>) -> Answer {
    Answer(app.ask(Request::ListNics).await)
}

/// Describe a NIC
#[utoipa::path(get, path = "/v1/vm/nics/{id}", tag = "nics", operation_id = "showNic",
    params(("id" = String, Path, description = "The id of the NIC.")),
    responses((status = 200, description = "The NIC.", body = NicInfo), ReadProblems))]
pub(super) async fn show(State(app): State<App>, Path(id): Path<String>) -> Answer {
    Answer(app.ask(Request::GetNic(id)).await)
}

/// Add a NIC, or replace it
///
/// Legal in: defined, stopped, crashed. The id in the body must be the one in the path. Descriptors of its tap (`tap_fds`) may
/// come with the request (SCM_RIGHTS); they are checked at once.
#[utoipa::path(put, path = "/v1/vm/nics/{id}", tag = "nics", operation_id = "putNic",
    params(("id" = String, Path, description = "The id of the NIC.")), request_body = NicConfig,
    responses((status = 200, description = "The NIC is replaced.", body = NicInfo),
        (status = 201, description = "The NIC is added.", body = NicInfo), ReadProblems, ChangeProblems, BodyProblems))]
pub(super) async fn put(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonWithFds(nic, passed): JsonWithFds<NicConfig>,
) -> Answer {
    Answer(match nic.check(&Pointer::root()).and_then(|()| check_id(&id, &nic.id)) {
        Ok(()) => app.ask(Request::PutNic(Box::new(nic), passed)).await,
        Err(problem) => Err(problem),
    })
}

/// Change a NIC
///
/// A JSON merge patch (RFC 7396). While the guest exists only `link`, `rx_limits` and `tx_limits` may change.
#[utoipa::path(patch, path = "/v1/vm/nics/{id}", tag = "nics", operation_id = "patchNic",
    params(("id" = String, Path, description = "The id of the NIC.")),
    request_body(content((NicPatch = "application/merge-patch+json"), (NicPatch = "application/json"))),
    responses((status = 200, description = "The NIC is changed.", body = NicInfo), ReadProblems, ChangeProblems, BodyProblems))]
pub(super) async fn patch(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(patch): JsonBody<NicPatch>,
) -> Answer {
    Answer(app.ask(Request::PatchNic(id, Box::new(patch))).await)
}

/// Tell the network where a NIC is, as after a move
///
/// Legal in: running, paused. Reverse ARP through the tap, and a request to the guest if its driver takes such; five times
/// within a second.
#[utoipa::path(post, path = "/v1/vm/nics/{id}/announce", tag = "nics", operation_id = "announceNic",
    params(("id" = String, Path, description = "The id of the NIC.")),
    responses((status = 200, description = "It is being announced.", body = NicInfo), ReadProblems, ChangeProblems))]
pub(super) async fn announce(State(app): State<App>, Path(id): Path<String>, _: NoBody) -> Answer {
    Answer(app.ask(Request::AnnounceNic(id)).await)
}

/// Remove a NIC
///
/// Legal in: defined, stopped, crashed. The tap stays.
#[utoipa::path(delete, path = "/v1/vm/nics/{id}", tag = "nics", operation_id = "deleteNic",
    params(("id" = String, Path, description = "The id of the NIC.")),
    responses((status = 204, description = "The NIC is removed."), ReadProblems, ChangeProblems))]
pub(super) async fn remove(State(app): State<App>, Path(id): Path<String>, _: NoBody) -> Answer {
    Answer(app.ask(Request::DeleteNic(id)).await)
}
