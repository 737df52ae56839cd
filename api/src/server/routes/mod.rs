//! The routes of `/v1` and what each does.

mod disk_groups;
mod disks;
mod inspect;
mod nics;
mod vm;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use utoipa::{IntoResponses, OpenApi, ToSchema};

use super::respond::{json, with_type};
use super::{App, OPENAPI_JSON, sse};
use crate::VERSION;
use crate::problem::{Code, Pointer, Problem};

/// The media type of OpenMetrics 1.0.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a request that changes nothing can come to.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes the answers for the OpenAPI document")]
pub(super) enum ReadProblems {
    /// The request is malformed.
    #[response(status = 400, content_type = "application/problem+json")]
    Malformed(Problem),
    /// Nothing is there: no VM, no such device.
    #[response(status = 404, content_type = "application/problem+json")]
    Missing(Problem),
    /// The VMM failed.
    #[response(status = 500, content_type = "application/problem+json")]
    Failed(Problem),
    /// The server is busy or ends.
    #[response(status = 503, content_type = "application/problem+json")]
    Busy(Problem),
    /// The VM did not answer in time.
    #[response(status = 504, content_type = "application/problem+json")]
    Late(Problem),
}

/// What a request that changes something can come to, besides [`ReadProblems`].
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes the answers for the OpenAPI document")]
pub(super) enum ChangeProblems {
    /// The request was too slow to arrive.
    #[response(status = 408, content_type = "application/problem+json")]
    Slow(Problem),
    /// The VM is in the wrong state, or something is in use.
    #[response(status = 409, content_type = "application/problem+json")]
    Conflict(Problem),
    /// The body is too large.
    #[response(status = 413, content_type = "application/problem+json")]
    TooLarge(Problem),
    /// The content is not valid, or names what the host cannot give; `pointer` says where.
    #[response(status = 422, content_type = "application/problem+json")]
    Invalid(Problem),
    /// Not supported by this guest or VMM.
    #[response(status = 501, content_type = "application/problem+json")]
    Unsupported(Problem),
}

/// What a request with a body can come to, besides [`ReadProblems`] and [`ChangeProblems`].
#[derive(IntoResponses)]
#[expect(dead_code, reason = "describes the answers for the OpenAPI document")]
pub(super) enum BodyProblems {
    /// The body is not labelled as JSON.
    #[response(status = 415, content_type = "application/problem+json")]
    MediaType(Problem),
}

/// Which VMM this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The name of the VMM: `rackvisor`.
    pub name: String,
    /// The version of the VMM.
    pub version: String,
    /// The version of the API, which is also the first part of its paths: `v1`.
    pub api: String,
}

/// All routes.
pub(super) fn router(app: App) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/openapi.json", get(openapi_json))
        .route("/v1/vm", get(vm::describe).put(vm::define).patch(vm::patch).delete(vm::forget))
        .route("/v1/vm/boot", post(vm::boot))
        .route("/v1/vm/pause", post(vm::pause))
        .route("/v1/vm/resume", post(vm::resume))
        .route("/v1/vm/reset", post(vm::reset))
        .route("/v1/vm/power-button", post(vm::power_button))
        .route("/v1/vm/sleep-button", post(vm::sleep_button))
        .route("/v1/vm/shutdown", post(vm::shutdown))
        .route("/v1/vm/nmi", post(vm::nmi))
        .route("/v1/vm/disks", get(disks::list))
        .route("/v1/vm/disks/{id}", get(disks::show).put(disks::put).patch(disks::patch).delete(disks::remove))
        .route("/v1/vm/disk-groups", get(disk_groups::list))
        .route("/v1/vm/disk-groups/{id}", get(disk_groups::show).patch(disk_groups::patch))
        .route("/v1/vm/nics", get(nics::list))
        .route("/v1/vm/nics/{id}", get(nics::show).put(nics::put).patch(nics::patch).delete(nics::remove))
        .route("/v1/vm/nics/{id}/announce", post(nics::announce))
        .route("/v1/events", get(sse::events))
        .route("/v1/metrics", get(metrics))
        .route("/v1/inspect", get(inspect::tree))
        .route("/v1/inspect/{*path}", get(inspect::part))
        .with_state(app)
}

/// The same routes, as the document describes them. A test compares the two.
#[derive(OpenApi)]
#[openapi(
    paths(
        version, openapi_json, metrics, inspect::tree, inspect::part, sse::events,
        vm::describe, vm::define, vm::patch, vm::forget,
        vm::boot, vm::pause, vm::resume, vm::reset, vm::power_button, vm::sleep_button, vm::shutdown, vm::nmi,
        disks::list, disks::show, disks::put, disks::patch, disks::remove,
        disk_groups::list, disk_groups::show, disk_groups::patch,
        nics::list, nics::show, nics::put, nics::patch, nics::remove, nics::announce,
    ),
    components(schemas(Problem, Code)),
    tags(
        (name = "vm", description = "The virtual machine of this process: its configuration and its state."),
        (name = "disks", description = "Its disks (virtio-blk)."),
        (name = "nics", description = "Its network interfaces (virtio-net)."),
        (name = "events", description = "What happens to it."),
        (name = "process", description = "The VMM itself."),
    ),
)]
pub(super) struct Document;

/// Which VMM this is
#[utoipa::path(get, path = "/v1/version", tag = "process", operation_id = "version",
    responses((status = 200, description = "Name and versions.", body = Version)))]
async fn version() -> Response {
    json(StatusCode::OK, &Version { name: "rackvisor".into(), version: VERSION.into(), api: "v1".into() })
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", tag = "process", operation_id = "openapi",
    responses((status = 200, description = "The OpenAPI document.", body = serde_json::Value, content_type = "application/json")))]
async fn openapi_json() -> Response {
    with_type(StatusCode::OK, "application/json", OPENAPI_JSON)
}

/// Counters and gauges of the VM, its devices and vCPUs, and of the process
#[utoipa::path(get, path = "/v1/metrics", tag = "process", operation_id = "metrics",
    responses((status = 200, description = "OpenMetrics 1.0 text.", body = String, content_type = "application/openmetrics-text")))]
async fn metrics(State(app): State<App>) -> Response {
    with_type(StatusCode::OK, OPENMETRICS, app.control.metrics())
}

/// The id of a device in the body must be the one in the path.
fn check_id(path: &str, body: &str) -> Result<(), Problem> {
    if path == body {
        return Ok(());
    }
    let path: String = path.chars().take(64).collect();
    Err(Problem::invalid(
        &Pointer::root().key("id"),
        format!("the id is \"{body}\" in the body, but \"{path}\" in the path"),
        "make them the same",
    ))
}
