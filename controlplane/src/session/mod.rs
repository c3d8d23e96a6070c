//! Sessions: one task per dataplane, between its stream and the hub.
//!
//! The task reads the stream, hands each message to the hub, sends heartbeats, and ends when the
//! stream does, when the dataplane falls silent, or when the hub says so. What the hub leaves in the
//! outbox is the answer's stream. What the messages mean is written over
//! `DataplaneService.Session` in `dataplane.proto`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};
use tonic::{Code, Request, Response, Status, Streaming};
use vnet_proto::v1;
use vnet_proto::v1::dataplane_service_server::DataplaneService;
use vnet_proto::v1::session_request::Message;

use crate::hub::{HEARTBEAT, Hub, MESSAGE_PACKETS_BYTES_MAX, MESSAGE_PACKETS_MAX, SessionKey};
use crate::peer::Peer;
use crate::refusal::Refusal;

/// How long a dataplane may take to say Hello.
const HELLO_WAIT: Duration = Duration::from_secs(10);
/// Intervals of silence after which a session ends.
const SILENT_INTERVALS: u32 = 3;

/// Serves dataplanes.
#[derive(Debug)]
pub struct Sessions {
    hub: Arc<Hub>,
    heartbeat: Duration,
}

impl Sessions {
    /// With the heartbeat that Welcome states.
    pub fn new(hub: Arc<Hub>) -> Self {
        Self {
            hub,
            heartbeat: HEARTBEAT,
        }
    }

    #[cfg(test)]
    pub(crate) fn with_heartbeat(hub: Arc<Hub>, heartbeat: Duration) -> Self {
        Self { hub, heartbeat }
    }
}

/// What the API's listeners say to a dataplane: where it belongs. They take no sessions.
#[derive(Debug, Clone, Copy)]
pub struct NoSessions;

#[tonic::async_trait]
impl DataplaneService for NoSessions {
    type SessionStream = Outbound;

    async fn session(&self, _: Request<Streaming<v1::SessionRequest>>) -> Result<Response<Outbound>, Status> {
        Err(elsewhere())
    }

    async fn send_capture(
        &self,
        _: Request<Streaming<v1::SendCaptureRequest>>,
    ) -> Result<Response<v1::SendCaptureResponse>, Status> {
        Err(elsewhere())
    }
}

fn elsewhere() -> Status {
    let text = "sessions are not served on the API's socket (expected the session's: session.sock beside it, \
                or where --session-listen says)";
    Refusal::Elsewhere(text.to_owned()).into()
}

#[tonic::async_trait]
impl DataplaneService for Sessions {
    type SessionStream = Outbound;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Outbound>, Status> {
        let (ready, outbox) = oneshot::channel();
        let (fail, failure) = oneshot::channel();
        let session = Session {
            hub: Arc::clone(&self.hub),
            heartbeat: self.heartbeat,
        };
        let peer = request.extensions().get::<Peer>();
        let process = peer.map(|peer| peer.process.clone()).unwrap_or_default();
        // Answered at once: a client may wait for the headers before it speaks.
        tokio::spawn(async move {
            let status = session.run(request.into_inner(), &process, ready).await;
            // A client that went away does not need to know why.
            let _ = fail.send(status);
        });
        Ok(Response::new(Outbound {
            waiting: Some(outbox),
            outbox: None,
            failure,
        }))
    }

    async fn send_capture(
        &self,
        request: Request<Streaming<v1::SendCaptureRequest>>,
    ) -> Result<Response<v1::SendCaptureResponse>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(HELLO_WAIT, inbound.message()).await;
        let mut next = match first {
            Err(_) => return Err(Status::deadline_exceeded("no token came")),
            Ok(message) => message?,
        };
        let token = next
            .as_ref()
            .map(|message| message.token.clone())
            .unwrap_or_default();
        let mut sink = self.hub.capture_sink(&token).ok_or_else(|| {
            self.hub.metrics().stray.add(1);
            Status::not_found("no such capture was asked for, or it is over")
        })?;
        // Read at all times, whether the client reads or not.
        while let Some(message) = next {
            let bytes: usize = message.packets.iter().map(|packet| packet.data.len()).sum();
            let count = message.packets.len();
            if bytes > MESSAGE_PACKETS_BYTES_MAX || count > MESSAGE_PACKETS_MAX {
                self.hub.metrics().malformed.add(1);
                return Err(Status::invalid_argument(format!(
                    "a message has {count} packets of {bytes} bytes (expected at most {MESSAGE_PACKETS_MAX} of \
                     {MESSAGE_PACKETS_BYTES_MAX})"
                )));
            }
            let (is_last, lost) = sink.put(message).await;
            self.hub.metrics().capture_dropped.add(lost);
            if is_last {
                break;
            }
            next = tokio::select! {
                message = inbound.message() => message?,
                () = sink.closed() => break,
            };
        }
        Ok(Response::new(v1::SendCaptureResponse {}))
    }
}

struct Session {
    hub: Arc<Hub>,
    heartbeat: Duration,
}

impl Session {
    async fn run(
        self,
        mut inbound: Streaming<v1::SessionRequest>,
        process: &str,
        ready: oneshot::Sender<mpsc::Receiver<v1::SessionResponse>>,
    ) -> Status {
        let hello = match tokio::time::timeout(HELLO_WAIT, inbound.message()).await {
            Err(_) => return Status::deadline_exceeded("no hello came"),
            Ok(Err(status)) => return status,
            Ok(Ok(Some(v1::SessionRequest {
                message: Some(Message::Hello(hello)),
            }))) => hello,
            Ok(Ok(_)) => return Status::failed_precondition("the first message is not a hello"),
        };
        let attachment = match self.hub.attach(hello, process) {
            Ok(attachment) => attachment,
            Err(status) => {
                tracing::warn!(error = status.message(), "hello refused");
                return status;
            }
        };
        let key = attachment.key;
        let status = match ready.send(attachment.outbox) {
            Ok(()) => self.serve(key, inbound, attachment.end).await,
            Err(_) => Status::cancelled("the stream is gone"),
        };
        self.hub.detach(key);
        status
    }

    async fn serve(
        &self,
        key: SessionKey,
        mut inbound: Streaming<v1::SessionRequest>,
        mut end: oneshot::Receiver<Status>,
    ) -> Status {
        let mut beat = tokio::time::interval(self.heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent_at = Instant::now() + self.heartbeat * SILENT_INTERVALS;
        loop {
            tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(v1::SessionRequest { message: Some(message) })) => {
                        silent_at = Instant::now() + self.heartbeat * SILENT_INTERVALS;
                        if let Err(status) = self.hub.handle(key, message) {
                            return status;
                        }
                    }
                    // A message of a later version.
                    Ok(Some(v1::SessionRequest { message: None })) => self.hub.metrics().malformed.add(1),
                    Ok(None) => return Status::ok("the dataplane ended the session"),
                    Err(status) => return status,
                },
                _ = beat.tick() => self.hub.heartbeat(key),
                () = tokio::time::sleep_until(silent_at) => {
                    self.hub.metrics().sessions_silent.add(1);
                    return Status::deadline_exceeded("the dataplane is silent");
                }
                status = &mut end => {
                    let status = status.unwrap_or_else(|_| Status::unavailable("the controlplane ends"));
                    if status.code() == Code::ResourceExhausted {
                        self.hub.metrics().sessions_overrun.add(1);
                    }
                    return status;
                }
            }
        }
    }
}

/// What is sent to a dataplane: the outbox, then why the session ended.
#[derive(Debug)]
pub struct Outbound {
    waiting: Option<oneshot::Receiver<mpsc::Receiver<v1::SessionResponse>>>,
    outbox: Option<mpsc::Receiver<v1::SessionResponse>>,
    failure: oneshot::Receiver<Status>,
}

impl Stream for Outbound {
    type Item = Result<v1::SessionResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(waiting) = &mut this.waiting
            && let Poll::Ready(outbox) = Pin::new(waiting).poll(cx)
        {
            this.waiting = None;
            this.outbox = outbox.ok();
        }
        if let Some(outbox) = &mut this.outbox {
            match outbox.poll_recv(cx) {
                Poll::Ready(Some(response)) => return Poll::Ready(Some(Ok(response))),
                Poll::Ready(None) => this.outbox = None,
                Poll::Pending => {}
            }
        }
        match Pin::new(&mut this.failure).poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(status)) if status.code() != Code::Ok => {
                // Once; the next poll finds the sender gone.
                let (_, closed) = oneshot::channel();
                this.failure = closed;
                this.outbox = None;
                this.waiting = None;
                Poll::Ready(Some(Err(status)))
            }
            Poll::Ready(_) => Poll::Ready(None),
        }
    }
}
