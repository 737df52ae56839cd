//! A body that notes its end.

use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Frame, SizeHint};

use super::activity::StepAtEnd;

/// A body that makes a step when it is dropped, which is when it was read or sent, or given up.
pub(super) struct NotedBody<B> {
    body: B,
    _end: StepAtEnd,
}

impl<B> NotedBody<B> {
    pub(super) fn new(body: B, end: StepAtEnd) -> Self {
        Self { body, _end: end }
    }
}

impl<B: Body + Unpin> Body for NotedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
