//! `/v1/inspect`: what every part of the VM is doing.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::super::App;
use super::super::respond::json;
use super::ReadProblems;
use crate::problem::{Code, Problem};

/// What every part of the VM is doing
///
/// A tree for people who look for a fault: the control thread, vCPUs, devices, threads. It is read without waiting for any
/// of them. Names and shape may change with each version; what programs rely on is in the metrics and descriptions.
#[utoipa::path(get, path = "/v1/inspect", tag = "process", operation_id = "inspect",
    responses((status = 200, description = "The tree.", body = serde_json::Value, content_type = "application/json"), ReadProblems))]
pub(super) async fn tree(State(app): State<App>) -> Result<Response, Problem> {
    look(&app, "")
}

/// What one part of the VM is doing
#[utoipa::path(get, path = "/v1/inspect/{path}", tag = "process", operation_id = "inspectPart",
    params(("path" = String, Path, description = "Names of the tree, joined by `/`: `devices/root/queues/0`.")),
    responses((status = 200, description = "That part of the tree.", body = serde_json::Value, content_type = "application/json"), ReadProblems))]
pub(super) async fn part(State(app): State<App>, Path(path): Path<String>) -> Result<Response, Problem> {
    look(&app, &path)
}

fn look(app: &App, path: &str) -> Result<Response, Problem> {
    match app.control.inspect(path) {
        Some(tree) => Ok(json(StatusCode::OK, &tree)),
        None => {
            let path: String = path.chars().take(128).collect();
            let detail = format!("the VM has nothing at \"{path}\" now");
            Err(Problem::new(Code::NoSuchPart, detail, "GET /v1/inspect shows all of the tree"))
        }
    }
}
