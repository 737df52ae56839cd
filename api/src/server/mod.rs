//! The HTTP server: one thread, one Unix socket, every answer bounded in time and size.
//!
//! | limit                                   | value   | what happens then                                  |
//! |-----------------------------------------|---------|----------------------------------------------------|
//! | connections                             | 128     | the one that is idle longest is closed, else 503    |
//! | followers of `/v1/events`               | 32      | 503                                                |
//! | request head                            | 16 KiB, 32 headers | 431                                     |
//! | time from its first byte to its last    | 5 s     | 408, closed                                        |
//! | body                                    | 256 KiB | 413                                                |
//! | time until the body is complete         | 10 s    | 408                                                |
//! | answer of the controller                | 30 s    | 504                                                |
//! | connection without a request            | 60 s    | closed                                             |
//! | client that does not read its answer    | 30 s    | closed                                             |
//! | descriptors with a request              | 64      | 400, closed                                        |
//! | descriptors with all requests           | 256     | 503, closed                                        |
//!
//! Who may connect is for the permissions of the socket file to say, and for [`Server::allow`], which asks the kernel who the
//! client is (SO_PEERCRED).
//!
//! The thread only translates: whatever takes time happens at the controller. So a slow client delays nobody else.

mod activity;
mod allowed;
mod body;
mod connection;
mod extract;
mod inbox;
mod listener;
mod openapi;
mod respond;
mod routes;
mod sse;
mod stream;

use std::future::Future;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use tokio::runtime;
use tokio::sync::{Semaphore, watch};
use tokio::task;

use self::activity::Activity;
use self::inbox::{Inbox, MAX_HELD};
use self::listener::SocketFile;
use self::stream::Watched;
use crate::control::{Control, Outcome, Reply, Request};
use crate::problem::{Code, Problem};

pub use allowed::Allowed;
pub use extract::MAX_BODY;
pub use listener::SocketOptions;
pub use openapi::{OPENAPI_JSON, openapi};
pub use routes::Version;

/// What clients may take of the server. The defaults are in the table of the module docs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time, at least one.
    pub connections: usize,
    /// Followers of the events at a time.
    pub followers: usize,
    /// From the first byte of a request's head to its last.
    pub head: Duration,
    /// From the end of the head to the end of the body.
    pub body: Duration,
    /// For the answer of the controller.
    pub control: Duration,
    /// Between two requests of a connection.
    pub idle: Duration,
    /// Without the client reading any byte of its answer.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 128,
            followers: 32,
            head: Duration::from_secs(5),
            body: Duration::from_secs(10),
            control: Duration::from_secs(30),
            idle: Duration::from_secs(60),
            stall: Duration::from_secs(30),
        }
    }
}

/// How much the thread gives way to vCPUs and the workers of devices (nice(2)). Where processors are scarce, 100 connections at
/// work leave a guest's disk 0.9 of its operations with it, and 0.3 without (`benches/api`).
const NICE: i32 = 10;

/// At the end, requests that are being served have this long to finish.
const GRACE: Duration = Duration::from_secs(2);

/// A socket that listens, before it is served.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    file: Option<SocketFile>,
    limits: Limits,
    allowed: Option<Allowed>,
}

impl Server {
    /// Listens on a Unix socket at `path`, mode 0600. A socket that a dead process left there is replaced; the file
    /// is removed when the server ends.
    ///
    /// # Errors
    /// The path is in use by a living process or by something else, too long (107 bytes), or not writable.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::bind_with(path, SocketOptions::default())
    }

    /// As [`Server::bind`], with other permissions or another owner of the socket.
    ///
    /// # Errors
    /// As [`Server::bind`]; only root may give a file to others.
    pub fn bind_with(path: impl AsRef<Path>, options: SocketOptions) -> io::Result<Self> {
        let path = path.as_ref();
        let (listener, file) = listener::listen(path, options).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot listen on API socket {}: {error}", path.display()))
        })?;
        Ok(Self { listener, file: Some(file), limits: Limits::default(), allowed: None })
    }

    /// Serves on the listening Unix socket that this process was started with as descriptor `number`, by the jailer or systemd.
    /// Its file is left alone.
    ///
    /// # Errors
    /// There is no such descriptor, or it is something else.
    pub fn inherit(number: u32) -> io::Result<Self> {
        listener::inherited(number).map(Self::from_listener).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot serve the API on descriptor {number}: {error}"))
        })
    }

    /// Serves on a socket that someone else opened. Its file is left alone.
    pub fn from_listener(listener: UnixListener) -> Self {
        Self { listener, file: None, limits: Limits::default(), allowed: None }
    }

    /// The same server with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The same server for these clients only: others are answered 403, `not-allowed`.
    ///
    /// # Errors
    /// The kernel cannot tell one of them from others here, in this user namespace.
    pub fn allow(mut self, allowed: Allowed) -> io::Result<Self> {
        allowed.check()?;
        self.allowed = Some(allowed);
        Ok(self)
    }

    /// Serves on a new thread named `api` until [`ServerHandle::stop`].
    ///
    /// `prepare` runs on that thread when everything it needs is open, before the first client is heard: the place
    /// to install its seccomp filter.
    ///
    /// # Errors
    /// The thread or its event loop cannot be made, or `prepare` failed.
    pub fn start(
        self,
        control: Arc<dyn Control>,
        prepare: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<ServerHandle> {
        let (stop, stopped) = watch::channel(false);
        let (ready, outcome) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("api".into()).spawn(move || {
            // Of this thread alone. Where it is refused the thread is as good as others.
            let _ = rustix::process::setpriority_process(None, NICE);
            let runtime = match event_loop().and_then(|runtime| prepare().map(|()| runtime)) {
                Ok(runtime) => runtime,
                Err(error) => {
                    // The socket file goes before the caller hears of it.
                    drop(self);
                    return drop(ready.send(Err(error)));
                }
            };
            let stopped = async move {
                let mut stopped = stopped;
                let _ = stopped.wait_for(|stop| *stop).await;
            };
            let served = runtime.block_on(async {
                let _ = ready.send(Ok(()));
                self.serve(control, stopped).await
            });
            if let Err(error) = served {
                tracing::error!(%error, "the API server ended");
            }
        })?;
        match outcome.recv() {
            Ok(Ok(())) => Ok(ServerHandle { stop, thread: Some(thread) }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the API thread ended before it began")),
        }
    }

    /// Serves on the current tokio runtime (which needs I/O and time) until `shutdown` is ready. Then nothing more is
    /// accepted, and requests that are being served have two seconds to finish.
    ///
    /// # Errors
    /// The socket cannot be used with the runtime.
    pub async fn serve(self, control: Arc<dyn Control>, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        self.listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(self.listener)?;
        let (stop, stopped) = watch::channel(false);
        let limits = self.limits;
        let app = App { control, limits, followers: Arc::new(AtomicUsize::new(0)), stop: stopped.clone() };
        let router = routes::router(app);
        let mut connections = Connections::new(self.allowed);
        {
            let mut shutdown = std::pin::pin!(shutdown);
            while let Some(accepted) = accept_unless(&listener, shutdown.as_mut()).await {
                match accepted {
                    Ok(stream) => connections.add(stream, &router, limits, &stopped),
                    Err(error) => {
                        // Out of descriptors, most likely: others will free some.
                        tracing::warn!(%error, "cannot accept an API connection");
                        connections.close_idlest();
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        }
        drop(listener);
        drop(self.file);
        stop.send_replace(true);
        connections.finish(GRACE).await;
        Ok(())
    }
}

/// The event loop of the API thread: no other threads, timers and sockets only.
fn event_loop() -> io::Result<runtime::Runtime> {
    runtime::Builder::new_current_thread().enable_io().enable_time().max_blocking_threads(1).build()
}

/// The next connection, or `None` when `shutdown` is ready first.
async fn accept_unless(
    listener: &tokio::net::UnixListener,
    mut shutdown: std::pin::Pin<&mut impl Future<Output = ()>>,
) -> Option<io::Result<tokio::net::UnixStream>> {
    use std::task::Poll;
    std::future::poll_fn(|cx| {
        if shutdown.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        listener.poll_accept(cx).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    })
    .await
}

/// A server that runs. Dropping it stops it too.
#[derive(Debug)]
pub struct ServerHandle {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl ServerHandle {
    /// Ends the server: nothing more is accepted, requests that are being served have two seconds to finish, the
    /// socket file is removed. Returns when all that is done.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API thread panicked");
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the handlers share.
#[derive(Clone)]
struct App {
    control: Arc<dyn Control>,
    limits: Limits,
    followers: Arc<AtomicUsize>,
    stop: watch::Receiver<bool>,
}

impl App {
    /// Asks the controller and waits for its answer.
    async fn ask(&self, request: Request) -> Outcome {
        let (reply, answer) = Reply::to_future();
        self.control.submit(request, reply);
        answer.wait(self.limits.control).await
    }
}

/// The connections there are, at most [`Limits::connections`].
struct Connections {
    list: Vec<(Activity, task::JoinHandle<()>)>,
    /// One for each descriptor that may be held.
    places: Arc<Semaphore>,
    allowed: Option<Allowed>,
}

impl Connections {
    fn new(allowed: Option<Allowed>) -> Self {
        Self { list: Vec::new(), places: Arc::new(Semaphore::new(MAX_HELD)), allowed }
    }

    /// Why this client is not served, if it is not.
    fn refuses(&self, stream: &tokio::net::UnixStream) -> Option<Problem> {
        let allowed = self.allowed.as_ref()?;
        let client = match stream.peer_cred() {
            Ok(client) if allowed.takes(&client) => return None,
            Ok(client) => format!("uid {}, gid {}", client.uid(), client.gid()),
            Err(error) => format!("a client that cannot be identified ({error})"),
        };
        let detail = format!("the API of this VM is not for {client}");
        Some(Problem::new(
            Code::NotAllowed,
            detail,
            "ask as a user that rackvisor --api-allow-uid or --api-allow-gid names",
        ))
    }

    fn add(&mut self, stream: tokio::net::UnixStream, router: &Router, limits: Limits, stop: &watch::Receiver<bool>) {
        self.list.retain(|(_, task)| !task.is_finished());
        let (activity, inbox) = (Activity::new(), Inbox::new(&self.places));
        if let Some(problem) = self.refuses(&stream) {
            return Watched::new(stream, activity, inbox).last_word(&problem);
        }
        if self.list.len() >= limits.connections && !self.close_idlest() {
            let problem = Problem::new(
                Code::TooManyConnections,
                format!("all {} connections of the API socket are busy", limits.connections),
                "close connections that are not needed, then try again",
            );
            Watched::new(stream, activity, inbox).last_word(&problem);
            return;
        }
        let serving = connection::serve(stream, router.clone(), activity.clone(), inbox, limits, stop.clone());
        self.list.push((activity, tokio::spawn(serving)));
    }

    /// Closes the connection that has gone longest without being served; says whether there was one.
    fn close_idlest(&mut self) -> bool {
        let idle =
            self.list.iter().enumerate().filter_map(|(index, (activity, _))| Some((activity.unserved_since()?, index)));
        let Some((_, index)) = idle.min() else { return false };
        self.list.swap_remove(index).1.abort();
        true
    }

    async fn finish(self, grace: Duration) {
        let end = tokio::time::Instant::now() + grace;
        for (_, task) in self.list {
            let abort = task.abort_handle();
            if tokio::time::timeout_at(end, task).await.is_err() {
                abort.abort();
            }
        }
    }
}
