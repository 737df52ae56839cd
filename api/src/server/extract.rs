//! Request bodies: bounded in size and time, strict in type, and problems where they are not.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::App;
use super::inbox::Inbox;
use crate::config;
use crate::descriptors::Descriptors;
use crate::problem::{Code, Problem};

/// The most bytes of a body. A configuration with all 30 devices and the longest paths fits.
pub const MAX_BODY: usize = 256 << 10;

/// A JSON body, read strictly, and no descriptors. Takes `application/json` and `application/merge-patch+json`.
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned + Serialize> FromRequest<App> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let inbox = request.extensions().get::<Inbox>().cloned();
        let body = Self::read(request, app).await?;
        inbox.map_or(Ok(()), |inbox| inbox.expect_none())?;
        Ok(body)
    }
}

/// A [`JsonBody`], and the descriptors that came with the request.
pub(super) struct JsonWithFds<T>(pub(super) T, pub(super) Descriptors);

impl<T: DeserializeOwned + Serialize> FromRequest<App> for JsonWithFds<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let inbox = request.extensions().get::<Inbox>().cloned();
        let JsonBody(body) = JsonBody::read(request, app).await?;
        let came = inbox.map_or_else(|| Ok(Descriptors::default()), |inbox| inbox.take())?;
        Ok(Self(body, came))
    }
}

impl<T: DeserializeOwned + Serialize> JsonBody<T> {
    async fn read(request: Request, app: &App) -> Result<Self, Problem> {
        let media_type =
            request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if essence != "application/json" && essence != "application/merge-patch+json" {
            let detail = if essence.is_empty() {
                "the body has no Content-Type".to_owned()
            } else {
                format!("the body is {essence:.64}")
            };
            return Err(Problem::new(
                Code::UnsupportedMediaType,
                detail,
                "send JSON with the header Content-Type: application/json",
            ));
        }
        config::json(&read(request.into_body(), app.limits.body).await?).map(Self)
    }
}

/// No body: for requests that take none, so that a mistaken one is not silently ignored.
pub(super) struct NoBody;

impl FromRequest<App> for NoBody {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        if read(request.into_body(), app.limits.body).await?.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self);
        }
        Err(Problem::new(Code::UnexpectedBody, "this request takes no body, but one came", "send it without a body"))
    }
}

async fn read(body: Body, limit: Duration) -> Result<Bytes, Problem> {
    match tokio::time::timeout(limit, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Problem::new(
            Code::BodyTooLarge,
            format!("the body has more than {} KiB", MAX_BODY >> 10),
            "send a smaller document",
        )),
        Ok(Err(error)) => Err(Problem::new(
            Code::BadRequest,
            format!("the body cannot be read: {error}"),
            "send the whole body in valid HTTP/1.1",
        )),
        Err(_) => Err(Problem::new(
            Code::RequestTimeout,
            format!("the body was not complete after {} s", limit.as_secs_f32()),
            "send the body at once",
        )),
    }
}
