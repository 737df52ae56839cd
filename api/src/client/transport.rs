//! One request, one answer, one connection.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use super::ClientError;
use crate::descriptors::send;
use crate::problem::Problem;

/// The most bytes of an answer: metrics of the largest VM are far smaller.
const MAX_ANSWER: usize = 16 << 20;

/// An answer as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The media type, empty if none.
    pub content_type: String,
    /// The methods of the `Allow` header, empty if none.
    pub allow: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body, read as JSON.
    ///
    /// # Errors
    /// [`ClientError::Answer`].
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_slice(&self.body).map_err(|error| ClientError::Answer(error.to_string()))
    }

    /// This answer, or the problem if it is one.
    ///
    /// # Errors
    /// [`ClientError::Problem`], or [`ClientError::Answer`] for an error status without a problem.
    pub fn successful(self) -> Result<Self, ClientError> {
        if (200..300).contains(&self.status) {
            return Ok(self);
        }
        let problem: Problem = self
            .json()
            .map_err(|_| ClientError::Answer(format!("status {} without a problem document", self.status)))?;
        Err(ClientError::Problem(Box::new(problem)))
    }
}

/// An event loop for one connection.
pub(super) fn runtime() -> Result<Runtime, ClientError> {
    Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| ClientError::Transport(format!("cannot make an event loop: {error}")))
}

/// Runs a future on `runtime`, at most as long as `timeout`.
pub(super) fn run<T>(
    runtime: &Runtime,
    timeout: Duration,
    future: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    runtime.block_on(async {
        match tokio::time::timeout(timeout, future).await {
            Ok(result) => result,
            Err(_) => Err(ClientError::Timeout(timeout)),
        }
    })
}

pub(super) fn transport(error: impl std::fmt::Display) -> ClientError {
    ClientError::Transport(error.to_string())
}

/// A stream that passes descriptors with the first bytes that are written. What a server that has closed the connection no longer
/// reads is written in vain, which is no failure: its answer, which says why, is still there to be read.
struct Passing {
    stream: UnixStream,
    fds: Vec<OwnedFd>,
}

impl AsyncRead for Passing {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Passing {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while !this.fds.is_empty() {
            ready!(this.stream.poll_write_ready(cx))?;
            match this.stream.try_io(Interest::WRITABLE, || send(&this.stream, bytes, &this.fds)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    this.fds.clear();
                    return Poll::Ready(written(sent, bytes));
                }
            }
        }
        Pin::new(&mut this.stream).poll_write(cx, bytes).map(|sent| written(sent, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

fn written(sent: io::Result<usize>, bytes: &[u8]) -> io::Result<usize> {
    match sent {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(bytes.len()),
        sent => sent,
    }
}

/// Connects and sends a request, and `fds` with it; the connection is driven by a task of the current runtime.
pub(super) async fn open(
    socket: &Path,
    request: Request<Full<Bytes>>,
    fds: Vec<OwnedFd>,
) -> Result<Response<Incoming>, ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source: io::Error| ClientError::Connect { path: socket.to_owned(), source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(Passing { stream, fds })).await.map_err(transport)?;
    tokio::spawn(async move {
        // Its failure is also the failure of the request, which is where it is told.
        let _ = connection.await;
    });
    sender.send_request(request).await.map_err(transport)
}

/// A request to `path`.
pub(super) fn request(method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Request<Full<Bytes>>, ClientError> {
    let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
    if body.is_some() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    request.body(Full::new(Bytes::from(body.unwrap_or_default()))).map_err(transport)
}

/// One request and its whole answer.
pub(super) fn exchange(
    socket: &Path,
    timeout: Duration,
    method: Method,
    path: &str,
    body: Option<Vec<u8>>,
    fds: Vec<OwnedFd>,
) -> Result<Answer, ClientError> {
    let request = request(method, path, body)?;
    let runtime = runtime()?;
    run(&runtime, timeout, async { read(open(socket, request, fds).await?).await })
}

/// The whole of an answer.
pub(super) async fn read(response: Response<Incoming>) -> Result<Answer, ClientError> {
    let header =
        |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (status, content_type, allow) = (response.status().as_u16(), header("content-type"), header("allow"));
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            ClientError::Answer(format!("it has more than {} MiB", MAX_ANSWER >> 20))
        } else {
            transport(error)
        }
    })?;
    Ok(Answer { status, content_type, allow, body: body.to_bytes().to_vec() })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Write;

    use super::*;

    /// What is written and read by a client whose server has said why it closes, and closed.
    fn written_and_heard(fds: Vec<OwnedFd>) -> Result<(usize, Vec<u8>), ClientError> {
        run(&runtime()?, Duration::from_secs(20), async {
            let (client, mut server) = std::os::unix::net::UnixStream::pair().map_err(transport)?;
            client.set_nonblocking(true).map_err(transport)?;
            let mut passing = Passing { stream: UnixStream::from_std(client).map_err(transport)?, fds };
            server.write_all(b"HTTP/1.1 403").map_err(transport)?;
            drop(server);
            let written = poll_fn(|cx| Pin::new(&mut passing).poll_write(cx, b"GET /")).await.map_err(transport)?;
            let mut heard = [0; 100];
            let mut buffer = ReadBuf::new(&mut heard);
            poll_fn(|cx| Pin::new(&mut passing).poll_read(cx, &mut buffer)).await.map_err(transport)?;
            Ok((written, buffer.filled().to_vec()))
        })
    }

    #[test]
    fn the_answer_of_a_server_that_closed_without_reading_the_request_is_heard() {
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        for fds in [vec![], vec![file]] {
            assert_eq!(written_and_heard(fds).unwrap(), (5, b"HTTP/1.1 403".to_vec()));
        }
    }
}
