//! Answers: JSON where it went well, a problem document everywhere else.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use serde::Serialize;

use crate::control::{Outcome, Response as Answered};
use crate::problem::{Code, MEDIA_TYPE, Problem};

type HttpResponse = Response<Body>;

impl IntoResponse for Problem {
    fn into_response(self) -> HttpResponse {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        with_type(status, MEDIA_TYPE, problem_body(&self))
    }
}

/// A problem as text. Its fields are strings and numbers, so the fallback is only for the type system.
fn problem_body(problem: &Problem) -> Vec<u8> {
    serde_json::to_vec(problem).unwrap_or_else(|_| b"{}".to_vec())
}

/// An answer with a body of this media type.
pub(super) fn with_type(status: StatusCode, media_type: &'static str, body: impl Into<Body>) -> HttpResponse {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

/// An answer in JSON.
pub(super) fn json<T: Serialize>(status: StatusCode, value: &T) -> HttpResponse {
    match serde_json::to_vec(value) {
        Ok(body) => with_type(status, "application/json", body),
        Err(error) => Problem::new(
            Code::Internal,
            format!("the answer cannot be written as JSON: {error}"),
            "report this as a bug",
        )
        .into_response(),
    }
}

/// What the controller answered, as the HTTP handlers return it.
pub(super) struct Answer(pub(super) Outcome);

impl IntoResponse for Answer {
    fn into_response(self) -> HttpResponse {
        match self.0 {
            Ok(Answered::Vm(vm)) => json(StatusCode::OK, &vm),
            Ok(Answered::VmCreated(vm)) => json(StatusCode::CREATED, &vm),
            Ok(Answered::Disks(disks)) => json(StatusCode::OK, &disks),
            Ok(Answered::Disk(disk)) => json(StatusCode::OK, &disk),
            Ok(Answered::DiskCreated(disk)) => json(StatusCode::CREATED, &disk),
            Ok(Answered::DiskGroups(groups)) => json(StatusCode::OK, &groups),
            Ok(Answered::DiskGroup(group)) => json(StatusCode::OK, &group),
            Ok(Answered::Nics(nics)) => json(StatusCode::OK, &nics),
            Ok(Answered::Nic(nic)) => json(StatusCode::OK, &nic),
            Ok(Answered::NicCreated(nic)) => json(StatusCode::CREATED, &nic),
            Ok(Answered::Deleted) => {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::NO_CONTENT;
                response
            }
            Err(problem) => problem.into_response(),
        }
    }
}

/// Makes a problem of every error that did not come from us: the router's 404 and 405, and its refusals of a path.
pub(super) fn as_problem(response: HttpResponse, method: &str, path: &str) -> HttpResponse {
    let status = response.status();
    let told =
        response.headers().get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes() == MEDIA_TYPE.as_bytes());
    if !(status.is_client_error() || status.is_server_error()) || told {
        return response;
    }
    let allow = response.headers().get(header::ALLOW).cloned();
    let path: String = path.chars().take(128).collect();
    let problem = match status {
        StatusCode::NOT_FOUND => Problem::new(
            Code::NoSuchPath,
            format!("there is nothing at {path}"),
            "GET /v1/openapi.json lists the paths",
        ),
        StatusCode::METHOD_NOT_ALLOWED => {
            let legal = allow.as_ref().and_then(|value| value.to_str().ok()).unwrap_or("other methods");
            Problem::new(Code::MethodNotAllowed, format!("{method} is not possible on {path}"), format!("use {legal}"))
        }
        status if status.is_client_error() => Problem::new(
            Code::BadRequest,
            format!("{path} cannot be understood"),
            "GET /v1/openapi.json has the schema",
        ),
        _ => Problem::new(Code::Internal, "the server failed to answer", "the log of the VMM says why"),
    };
    let mut response = problem.into_response();
    if let Some(allow) = allow {
        response.headers_mut().insert(header::ALLOW, allow);
    }
    response
}

/// A whole HTTP answer in bytes, for where there is no HTTP connection (any more).
pub(super) fn raw_problem(problem: &Problem) -> Vec<u8> {
    let body = problem_body(problem);
    let mut bytes = format!(
        "HTTP/1.1 {} {}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        problem.status,
        StatusCode::from_u16(problem.status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Error"),
        body.len(),
    )
    .into_bytes();
    bytes.extend_from_slice(&body);
    bytes
}
