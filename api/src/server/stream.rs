//! The byte stream of a connection, watched on its way to hyper.
//!
//! It notes when the client sends and when it stops reading, and keeps the descriptors that come. And it puts a problem document into the bare answers that
//! hyper gives by itself to a request that it cannot parse (400, 414, 431), for which it offers no hook.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

use super::activity::{Activity, Phase};
use super::inbox::Inbox;
use super::respond::raw_problem;
use crate::descriptors::receive;
use crate::problem::{Code, Problem};

/// See the module docs.
#[derive(Debug)]
pub(super) struct Watched {
    stream: UnixStream,
    activity: Activity,
    inbox: Inbox,
    /// An answer of ours that goes out instead of one of hyper's.
    substitute: Vec<u8>,
    sent: usize,
}

impl Watched {
    pub(super) fn new(stream: UnixStream, activity: Activity, inbox: Inbox) -> Self {
        Self { stream, activity, inbox, substitute: Vec::new(), sent: 0 }
    }

    /// Sends a last problem, as far as the socket takes it at once.
    pub(super) fn last_word(&self, problem: &Problem) {
        // The client may have gone: then nobody misses the answer.
        let _ = self.stream.try_write(&raw_problem(problem));
    }

    fn poll_substitute(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.substitute.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let written = Pin::new(&mut self.stream).poll_write(cx, rest);
            self.activity.stalled(written.is_pending());
            match ready!(written)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
        }
        self.substitute = Vec::new();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let received = loop {
            ready!(this.stream.poll_read_ready(cx))?;
            let read = || receive(&this.stream, buffer.initialize_unfilled());
            match this.stream.try_io(Interest::READABLE, read) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => break received?,
            }
        };
        buffer.advance(received.bytes);
        if received.bytes > 0 {
            this.activity.step(Phase::Quiet, Phase::Head);
        }
        this.inbox.add(received);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_substitute(cx))?;
        if let Some(code) = bare_refusal(bytes) {
            let (detail, remedy) = refusal_text(code);
            this.substitute = raw_problem(&Problem::new(code, detail, remedy));
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.activity.stalled(written.is_pending());
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_substitute(cx))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_substitute(cx))?;
        Pin::new(&mut this.stream).poll_shutdown(cx)
    }
}

/// Tells hyper's own refusals from our answers: only they are a head without a content type and nothing else.
fn bare_refusal(bytes: &[u8]) -> Option<Code> {
    let head = bytes.strip_prefix(b"HTTP/1.1 ").or_else(|| bytes.strip_prefix(b"HTTP/1.0 "))?;
    let code = match head.get(..3)? {
        b"400" => Code::BadRequest,
        b"414" => Code::UriTooLong,
        b"431" => Code::HeadersTooLarge,
        _ => return None,
    };
    let bare =
        head.ends_with(b"\r\n\r\n") && !head.windows(13).any(|window| window.eq_ignore_ascii_case(b"content-type:"));
    bare.then_some(code)
}

fn refusal_text(code: Code) -> (&'static str, &'static str) {
    match code {
        Code::UriTooLong => ("the request target is too long", "shorten it to 4 KiB"),
        Code::HeadersTooLarge => ("the headers are too large or too many", "send at most 16 KiB and 32 headers"),
        _ => ("this is not a request of HTTP/1.1", "speak HTTP/1.1, for example with curl --unix-socket or rackctl"),
    }
}
