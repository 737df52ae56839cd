//! `GET /v1/events`: the event log as server-sent events (WHATWG HTML, §9.2).

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use tokio::sync::watch;
use utoipa::IntoParams;

use super::App;
use super::routes::ReadProblems;
use crate::events::{Event, Subscription};
use crate::problem::{Code, Problem};

/// How often a quiet stream gets a comment, by which both sides notice a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What to send.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Begin after this event; 0 begins with the oldest that is kept (the last 1024 are). Default: only new events.
    /// The header `Last-Event-ID` says the same and wins.
    after: Option<u64>,
    /// Keep the stream open for new events. With `false` it ends after those that are there, by default all.
    #[serde(default = "yes")]
    #[param(default = true)]
    follow: bool,
}

fn yes() -> bool {
    true
}

/// Follow what happens to the VM
///
/// Server-sent events: `id` is the number of the event, `event` its kind, `data` one Event in JSON. A client that
/// reconnects with `Last-Event-ID` misses nothing that is still kept; if it missed something, a `lagged` event says how
/// much.
#[utoipa::path(
    get, path = "/v1/events", tag = "events", operation_id = "followEvents",
    params(EventsQuery, ("Last-Event-ID" = Option<u64>, Header, description = "Begin after this event.")),
    responses((status = 200, description = "A stream of events.", body = Event, content_type = "text/event-stream"), ReadProblems)
)]
pub(super) async fn events(
    State(app): State<App>,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|error| {
        Problem::new(
            Code::BadRequest,
            format!("the query cannot be understood: {}", error.body_text()),
            "use after=NUMBER and follow=true|false",
        )
    })?;
    let last = match headers.get("last-event-id") {
        None => query.after,
        Some(value) => Some(value.to_str().ok().and_then(|text| text.trim().parse().ok()).ok_or_else(|| {
            Problem::new(
                Code::BadRequest,
                "Last-Event-ID is no number",
                "send the id of the last event received, or leave the header out",
            )
        })?),
    };
    let place = Place::take(&app.followers, app.limits.followers)?;
    let log = app.control.events();
    let subscription = match last {
        Some(id) => log.follow_after(id),
        None if query.follow => log.follow(),
        None => log.follow_after(0),
    };
    let stop = query.follow.then_some(app.stop);
    let events = stream::unfold(Follower { subscription, stop, _place: place }, |mut follower| async {
        let event = follower.next().await?;
        Some((Ok::<_, Infallible>(line(&event)), follower))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

fn line(event: &Event) -> SseEvent {
    // An event is numbers and strings: it can always be written.
    let data = serde_json::to_string(event).unwrap_or_default();
    SseEvent::default().id(event.id.to_string()).event(event.what.name()).data(data)
}

/// A follower and how long it follows.
struct Follower {
    subscription: Subscription,
    /// Rises when the server ends; `None` if the stream ends with what is there.
    stop: Option<watch::Receiver<bool>>,
    _place: Place,
}

impl Follower {
    async fn next(&mut self) -> Option<Arc<Event>> {
        if let Some(event) = self.subscription.try_next() {
            return Some(event);
        }
        let stop = self.stop.as_mut()?;
        let waited = {
            let mut event = pin!(self.subscription.next());
            let mut stopped = pin!(stop.wait_for(|stop| *stop));
            poll_fn(|cx| match event.as_mut().poll(cx) {
                Poll::Ready(event) => Poll::Ready(Some(event)),
                Poll::Pending => stopped.as_mut().poll(cx).map(|_| None),
            })
            .await
        };
        // What was published just before the end is still to be told.
        waited.or_else(|| self.subscription.try_next())
    }
}

/// One of the places for followers.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(followers: &Arc<AtomicUsize>, limit: usize) -> Result<Self, Problem> {
        let place = Self(Arc::clone(followers));
        if followers.fetch_add(1, Ordering::Relaxed) >= limit {
            return Err(Problem::new(
                Code::TooManyConnections,
                format!("{limit} clients follow the events already"),
                "end one of them, then try again",
            ));
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
