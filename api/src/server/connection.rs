//! One connection, from accept to close.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, Response};
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::Limits;
use super::activity::{Activity, Phase};
use super::body::NotedBody;
use super::inbox::Inbox;
use super::respond::as_problem;
use super::stream::Watched;
use crate::problem::{Code, Problem};

/// Bytes that hyper may buffer for a request head, and for an answer.
const BUFFER: usize = 16 << 10;
/// Headers of a request.
const MAX_HEADERS: usize = 32;

/// How a connection ended.
enum End {
    /// hyper is done with it.
    Closed,
    /// It was quiet, slow or stalled for too long, in this phase.
    TimedOut(Phase),
}

/// Serves a connection until it closes, is given up, or the server ends.
pub(super) async fn serve(
    stream: UnixStream,
    router: Router,
    activity: Activity,
    inbox: Inbox,
    limits: Limits,
    stop: watch::Receiver<bool>,
) {
    let io = TokioIo::new(Watched::new(stream, activity.clone(), inbox.clone()));
    let service = service(router, activity.clone(), inbox);
    let mut connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(BUFFER)
        .max_headers(MAX_HEADERS)
        .writev(false)
        .half_close(true)
        .serve_connection(io, service);

    let mut stopping = pin!(stopped(stop));
    let mut stopped = false;
    let mut timer = pin!(tokio::time::sleep(limits.head));
    let end = poll_fn(|cx| {
        if !stopped && stopping.as_mut().poll(cx).is_ready() {
            stopped = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        if Pin::new(&mut connection).poll(cx).is_ready() {
            return Poll::Ready(End::Closed);
        }
        let phase = activity.phase();
        if stopped && matches!(phase, Phase::Quiet | Phase::Head) {
            return Poll::Ready(End::Closed);
        }
        // After each poll, because a poll is what moves the connection from phase to phase.
        let Some(deadline) = activity.deadline(&limits) else { return Poll::Pending };
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        timer.as_mut().poll(cx).map(|()| End::TimedOut(phase))
    })
    .await;
    if let End::TimedOut(Phase::Head) = end {
        let problem = Problem::new(
            Code::RequestTimeout,
            format!("the headers were not complete after {} s", limits.head.as_secs_f32()),
            "send the request at once",
        );
        connection.into_parts().io.inner().last_word(&problem);
    }
}

/// Ready when the server is to end, also if it is gone altogether.
async fn stopped(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// An answer on its way.
type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// The router, with every error made a problem, and each step of a request noted.
fn service(
    router: Router,
    activity: Activity,
    inbox: Inbox,
) -> impl Service<Request<Incoming>, Response = Response<Body>, Error = Infallible, Future = Answering> + Send {
    let router = TowerToHyperService::new(router);
    service_fn(move |request: Request<Incoming>| {
        activity.enter(Phase::Body);
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let arriving = activity.step_at_end(Phase::Body, Phase::Busy);
        let mut request = request.map(|body| Body::new(NotedBody::new(body, arriving)));
        // Whether a PUT takes descriptors is for its handler to say.
        let fit = if method == Method::PUT { Ok(()) } else { inbox.expect_none() };
        request.extensions_mut().insert(inbox.clone());
        let answer = fit.map(|()| router.call(request));
        let (activity, inbox) = (activity.clone(), inbox.clone());
        let answering: Answering = Box::pin(async move {
            let response = match answer {
                Ok(answer) => answer.await?,
                Err(problem) => problem.into_response(),
            };
            // Those that nobody took.
            drop(inbox.take());
            activity.step(Phase::Body, Phase::Busy);
            let sending = activity.step_at_end(Phase::Busy, Phase::Quiet);
            let response = as_problem(response, method.as_str(), &path);
            Ok(response.map(|body| Body::new(NotedBody::new(body, sending))))
        });
        answering
    })
}
