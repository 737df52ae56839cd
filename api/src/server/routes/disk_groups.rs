//! `/v1/vm/disk-groups`.

use axum::extract::{Path, State};

use super::super::App;
use super::super::extract::JsonBody;
use super::super::respond::Answer;
use super::{BodyProblems, ChangeProblems, ReadProblems};
use crate::config::{DiskGroup, DiskGroupPatch};
use crate::control::Request;

/// List the groups of disks that share limits, in configuration order
#[utoipa::path(get, path = "/v1/vm/disk-groups", tag = "disks", operation_id = "listDiskGroups",
    responses((status = 200, description = "The groups.", body = Vec<DiskGroup>), ReadProblems))]
pub(super) async fn list(State(app): State<App>) -> Answer {
    Answer(app.ask(Request::ListDiskGroups).await)
}

/// Describe a group of disks
#[utoipa::path(get, path = "/v1/vm/disk-groups/{id}", tag = "disks", operation_id = "showDiskGroup",
    params(("id" = String, Path, description = "The id of the group.")),
    responses((status = 200, description = "The group.", body = DiskGroup), ReadProblems))]
pub(super) async fn show(State(app): State<App>, Path(id): Path<String>) -> Answer {
    Answer(app.ask(Request::GetDiskGroup(id)).await)
}

/// Change the limits of a group of disks, also while the guest runs
///
/// A JSON merge patch (RFC 7396).
#[utoipa::path(patch, path = "/v1/vm/disk-groups/{id}", tag = "disks", operation_id = "patchDiskGroup",
    params(("id" = String, Path, description = "The id of the group.")),
    request_body(content((DiskGroupPatch = "application/merge-patch+json"), (DiskGroupPatch = "application/json"))),
    responses((status = 200, description = "The group is changed.", body = DiskGroup), ReadProblems, ChangeProblems, BodyProblems))]
pub(super) async fn patch(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(patch): JsonBody<DiskGroupPatch>,
) -> Answer {
    Answer(app.ask(Request::PatchDiskGroup(id, Box::new(patch))).await)
}
