//! `/v1/vm/disks`.

use axum::extract::{Path, State};

use super::super::App;
use super::super::extract::{JsonBody, NoBody};
use super::super::respond::Answer;
use super::{BodyProblems, ChangeProblems, ReadProblems, check_id};
use crate::config::{DiskConfig, DiskPatch};
use crate::control::{DiskInfo, Request};
use crate::problem::Pointer;

/// List the disks, in configuration order
#[utoipa::path(get, path = "/v1/vm/disks", tag = "disks", operation_id = "listDisks",
    responses((status = 200, description = "The disks.", body = Vec<DiskInfo>), ReadProblems))]
pub(super) async fn list(State(app): State<App>) -> Answer {
    Answer(app.ask(Request::ListDisks).await)
}

/// Describe a disk
#[utoipa::path(get, path = "/v1/vm/disks/{id}", tag = "disks", operation_id = "showDisk",
    params(("id" = String, Path, description = "The id of the disk.")),
    responses((status = 200, description = "The disk.", body = DiskInfo), ReadProblems))]
pub(super) async fn show(State(app): State<App>, Path(id): Path<String>) -> Answer {
    Answer(app.ask(Request::GetDisk(id)).await)
}

/// Add a disk, or replace it
///
/// Legal in: defined, stopped, crashed. The id in the body must be the one in the path.
#[utoipa::path(put, path = "/v1/vm/disks/{id}", tag = "disks", operation_id = "putDisk",
    params(("id" = String, Path, description = "The id of the disk.")), request_body = DiskConfig,
    responses((status = 200, description = "The disk is replaced.", body = DiskInfo),
        (status = 201, description = "The disk is added.", body = DiskInfo), ReadProblems, ChangeProblems, BodyProblems))]
pub(super) async fn put(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(disk): JsonBody<DiskConfig>,
) -> Answer {
    Answer(match disk.check(&Pointer::root()).and_then(|()| check_id(&id, &disk.id)) {
        Ok(()) => app.ask(Request::PutDisk(Box::new(disk))).await,
        Err(problem) => Err(problem),
    })
}

/// Change a disk
///
/// A JSON merge patch (RFC 7396). While the guest exists only `limits`, `on_error` and `stall_after` may change. Any patch,
/// `{}` too, reads the size of the disk again.
#[utoipa::path(patch, path = "/v1/vm/disks/{id}", tag = "disks", operation_id = "patchDisk",
    params(("id" = String, Path, description = "The id of the disk.")),
    request_body(content((DiskPatch = "application/merge-patch+json"), (DiskPatch = "application/json"))),
    responses((status = 200, description = "The disk is changed.", body = DiskInfo), ReadProblems, ChangeProblems, BodyProblems))]
pub(super) async fn patch(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(patch): JsonBody<DiskPatch>,
) -> Answer {
    Answer(app.ask(Request::PatchDisk(id, Box::new(patch))).await)
}

/// Remove a disk
///
/// Legal in: defined, stopped, crashed. What is on it stays.
#[utoipa::path(delete, path = "/v1/vm/disks/{id}", tag = "disks", operation_id = "deleteDisk",
    params(("id" = String, Path, description = "The id of the disk.")),
    responses((status = 204, description = "The disk is removed."), ReadProblems, ChangeProblems))]
pub(super) async fn remove(State(app): State<App>, Path(id): Path<String>, _: NoBody) -> Answer {
    Answer(app.ask(Request::DeleteDisk(id)).await)
}
