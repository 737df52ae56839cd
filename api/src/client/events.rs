//! Reading server-sent events (WHATWG HTML, §9.2.6).

use std::path::Path;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::Incoming;
use tokio::runtime::Runtime;

use super::ClientError;
use super::transport::{open, read, request, run, runtime, transport};
use crate::events::Event;

/// The most bytes of one event; ours are a few hundred.
const MAX_EVENT: usize = 1 << 20;

/// An open event stream. As an iterator it waits for each event, and ends when the server does.
#[derive(Debug)]
pub struct Events {
    runtime: Runtime,
    body: Incoming,
    parser: Parser,
}

impl Events {
    pub(super) fn open(
        socket: &Path,
        timeout: Duration,
        after: Option<u64>,
        follow: bool,
    ) -> Result<Self, ClientError> {
        let after = after.map(|after| format!("&after={after}")).unwrap_or_default();
        let request = request(Method::GET, &format!("/v1/events?follow={follow}{after}"), None)?;
        let runtime = runtime()?;
        let response = run(&runtime, timeout, open(socket, request, Vec::new()))?;
        if !response.status().is_success() {
            run(&runtime, timeout, read(response))?.successful()?;
            return Err(ClientError::Answer("not an event stream".into()));
        }
        Ok(Self { runtime, body: response.into_body(), parser: Parser::default() })
    }

    /// The next event, waiting at most until `deadline` (`None`: for ever); `None` when the stream ended.
    ///
    /// # Errors
    /// [`ClientError::Timeout`], a broken connection, or an event that cannot be read.
    pub fn next_before(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(data) = self.parser.next()? {
                let event = serde_json::from_slice(&data).map_err(|error| ClientError::Answer(error.to_string()))?;
                return Ok(Some(event));
            }
            let frame = self.runtime.block_on(async {
                let Some(deadline) = deadline else { return Ok(self.body.frame().await) };
                let begin = Instant::now();
                tokio::time::timeout_at(deadline.into(), self.body.frame())
                    .await
                    .map_err(|_| ClientError::Timeout(deadline.saturating_duration_since(begin)))
            })?;
            match frame {
                Some(frame) => {
                    if let Ok(bytes) = frame.map_err(transport)?.into_data() {
                        self.parser.push(&bytes)?;
                    }
                }
                None => return Ok(None),
            }
        }
    }
}

impl Iterator for Events {
    type Item = Result<Event, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_before(None).transpose()
    }
}

/// Collects bytes until there is an event.
#[derive(Debug, Default)]
struct Parser {
    buffer: Vec<u8>,
    data: Vec<u8>,
}

impl Parser {
    fn push(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        if self.buffer.len() + self.data.len() + bytes.len() > MAX_EVENT {
            return Err(ClientError::Answer("an event of more than 1 MiB".into()));
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The data of the next event that is there whole.
    fn next(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
            while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
                line.pop();
            }
            if line.is_empty() {
                if !self.data.is_empty() {
                    return Ok(Some(std::mem::take(&mut self.data)));
                }
            } else if let Some(data) = line.strip_prefix(b"data:") {
                if !self.data.is_empty() {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_however_the_stream_is_cut() {
        let stream = b": hello\n\nid: 1\nevent: a\ndata: {\"x\":1}\n\r\ndata:two\ndata: lines\n\n:\n\ndata: unfinished";
        for cut in 1..stream.len() {
            let mut parser = Parser::default();
            let mut found = Vec::new();
            for part in stream.chunks(cut) {
                parser.push(part).unwrap();
                while let Some(data) = parser.next().unwrap() {
                    found.push(String::from_utf8(data).unwrap());
                }
            }
            assert_eq!(found, ["{\"x\":1}", "two\nlines"], "cut every {cut} bytes");
        }
    }

    #[test]
    fn an_endless_event_is_an_error_and_not_memory() {
        let mut parser = Parser::default();
        let result = (0..).find_map(|_| parser.push(&[b'x'; 4096]).err());
        assert!(matches!(result, Some(ClientError::Answer(_))));
    }
}
